"""SparcAdam is torch.optim.Adam on model.loss, with projection before the step and unit norm after it."""

from __future__ import annotations

import copy

import pytest
import torch
from operands import fast_backends, seeded

import sparc_fast as sf

WIDTHS = {"a": 12, "b": 7, "c": 5}


def make(backend: str, selection: str = "global", dtype: torch.dtype = torch.float32, **kwargs: object) -> sf.SPARC:
    torch.manual_seed(0)
    arguments = {"auxk": 4, "dead_after": 40, **kwargs}
    return sf.SPARC(WIDTHS, 48, 5, selection=selection, backend=backend, dtype=dtype, **arguments)


def batches(steps: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = seeded(1)
    mixing = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    draws = [torch.randn(16, 6, generator=generator, dtype=torch.float64) @ mixing for _ in range(steps)]
    return [draw.to(dtype) for draw in draws]


def plain_step(model: sf.SPARC, adam: torch.optim.Optimizer, inputs: object) -> sf.SparcLoss:
    adam.zero_grad()
    loss = model.loss(inputs)
    loss.total.backward()
    model.project_gradients_()
    adam.step()
    model.normalize_decoder_()
    return loss


@pytest.mark.parametrize("selection", ["global", "local", "batch"])
def test_a_hundred_steps_equal_torch_adam_with_auxk_at_work(selection: str, backend: str) -> None:
    ours, theirs = (make(backend, selection, torch.float64) for _ in range(2))
    fused, adam = sf.SparcAdam(ours, lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    used_auxk = 0
    for x in batches(100, torch.float64):
        loss, expected = fused.step(x), plain_step(theirs, adam, x)
        torch.testing.assert_close(loss.total, expected.total.detach(), rtol=1e-9, atol=1e-12)
        used_auxk += loss.auxk is not None
    assert used_auxk > 10
    assert torch.equal(ours.silence, theirs.silence)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-7, atol=1e-9)


def test_a_hundred_float32_steps_stay_as_close_to_float64_as_torch_adam_does(backend: str) -> None:
    ours, theirs, truth = make(backend), make(backend), make(backend).double()
    optimizers = [sf.SparcAdam(ours, lr=1e-3)]
    adams = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in (theirs, truth)]
    for x in batches(100):
        optimizers[0].step(x)
        plain_step(theirs, adams[0], x)
        plain_step(truth, adams[1], x.double())
    for name, p in truth.named_parameters():
        error = (ours.get_parameter(name) - p).norm() / p.norm()
        allowed = 2 * (theirs.get_parameter(name) - p).norm() / p.norm() + 1e-6
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("selection", ["global", "local", "batch"])
def test_batches_without_some_streams_equal_torch_adam(selection: str, backend: str) -> None:
    ours, theirs = (make(backend, selection, torch.float64) for _ in range(2))
    fused, adam = sf.SparcAdam(ours, lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for i, x in enumerate(batches(20, torch.float64)):
        streams = dict(zip(WIDTHS, x.split(list(WIDTHS.values()), dim=1), strict=True))
        if i:
            del streams["abc"[i % 3]]
        fused.step(streams)
        plain_step(theirs, adam, streams)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-7, atol=1e-9)


def test_decoder_rows_keep_unit_norm(backend: str) -> None:
    model = make(backend)
    optimizer = sf.SparcAdam(model, lr=0.05)
    for x in batches(10):
        optimizer.step(x)
    for columns in model._columns():
        torch.testing.assert_close(model.W_dec[:, columns].norm(dim=1), torch.ones(48))


def test_schedulers_set_the_learning_rate_of_the_fused_step(backend: str) -> None:
    ours, theirs = (make(backend, dtype=torch.float64) for _ in range(2))
    fused, adam = sf.SparcAdam(ours, lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (fused, adam)]
    for x in batches(10, torch.float64):
        fused.step(x)
        plain_step(theirs, adam, x)
        for scheduler in schedulers:
            scheduler.step()
    assert fused.param_groups[0]["lr"] == adam.param_groups[0]["lr"] < 1e-6
    torch.testing.assert_close(ours.W_dec, theirs.W_dec, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_round_trips_and_training_goes_on_bit_for_bit(
    dtype: torch.dtype, moments: str, backend: str
) -> None:
    model = make(backend, dtype=dtype)
    optimizer = sf.SparcAdam(model, lr=1e-2, moments=moments, seed=4)
    for x in batches(5):
        optimizer.step(x)
    other = make(backend, dtype=dtype)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = sf.SparcAdam(other, moments=moments, seed=4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in batches(5):
        optimizer.step(x)
        resumed.step(x)
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


def test_the_state_is_that_of_torch_adam(backend: str) -> None:
    ours, theirs = (make(backend, dtype=torch.float64, auxk=0) for _ in range(2))
    fused, adam = sf.SparcAdam(ours, lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    draws = batches(6, torch.float64)
    for x in draws[:3]:
        fused.step(x)
    theirs.load_state_dict(ours.state_dict())
    state = copy.deepcopy(fused.state_dict()["state"])
    adam.load_state_dict({"state": state, "param_groups": adam.state_dict()["param_groups"]})
    for x in draws[3:]:
        fused.step(x)
        plain_step(theirs, adam, x)
    torch.testing.assert_close(ours.W_enc, theirs.W_enc, rtol=1e-7, atol=1e-9)


def test_bfloat16_weights_learn_from_steps_smaller_than_their_rounding(backend: str) -> None:
    model = make(backend, dtype=torch.bfloat16)
    optimizer = sf.SparcAdam(model, lr=1e-5)
    before = model.W_enc.clone()
    for x in batches(40):
        optimizer.step(x)
    master = optimizer.state[model.W_enc]["master"]
    assert master.dtype == torch.float32
    assert not torch.equal(master, before.float())
    assert torch.equal(model.W_enc, master.bfloat16())


def test_training_is_the_same_bit_for_bit_from_run_to_run(backend: str) -> None:
    runs = []
    for _ in range(2):
        model = make(backend)
        optimizer = sf.SparcAdam(model, lr=1e-2)
        for x in batches(10):
            optimizer.step(x)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_weights_loaded_from_elsewhere_are_not_overwritten_by_old_masters(backend: str) -> None:
    model, other = make(backend, dtype=torch.bfloat16), make(backend, dtype=torch.bfloat16)
    optimizer = sf.SparcAdam(model, lr=1e-2)
    for x in batches(3):
        optimizer.step(x)
    model.load_state_dict(other.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(batches(1)[0])
    assert torch.equal(model.W_enc, other.W_enc)


def test_torch_adam_can_go_on_from_our_state(backend: str) -> None:
    model = make(backend)
    fused = sf.SparcAdam(model, lr=1e-2)
    fused.step(batches(1)[0])
    adam = torch.optim.Adam(model.parameters())
    adam.load_state_dict(copy.deepcopy(fused.state_dict()))
    assert torch.isfinite(plain_step(model, adam, batches(1)[0]).total)


@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_capturable_step_reads_nothing_on_the_host_and_trains_alike(selection: str, backend: str) -> None:
    plain, capturable = (make(backend, selection, torch.float64) for _ in range(2))
    rate = torch.tensor(1e-2, dtype=torch.float64)
    optimizers = sf.SparcAdam(plain, lr=1e-2), sf.SparcAdam(capturable, lr=rate, capturable=True)
    without_dead = 0
    for x in batches(60, torch.float64):
        losses = [optimizer.step(x) for optimizer in optimizers]
        torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-9, atol=1e-12)
        if losses[0].auxk is None:
            without_dead += 1
            assert losses[1].auxk == 0
        else:
            torch.testing.assert_close(losses[0].auxk, losses[1].auxk, rtol=1e-9, atol=1e-12)
    assert 0 < without_dead < 50
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p, capturable.get_parameter(name), rtol=1e-7, atol=1e-9)


def test_a_hundred_steps_with_bfloat16_moments_reach_the_loss_of_float32_within_a_hundredth(backend: str) -> None:
    ends = []
    for settings in ({}, {"moments": "bfloat16"}, {"moments": "bfloat16", "seed": 1}):
        optimizer = sf.SparcAdam(make(backend), lr=3e-3, **settings)
        losses = torch.stack([optimizer.step(x).total for x in batches(100)])
        assert losses[-10:].mean() < losses[0] / 2
        ends.append(float(losses[-10:].mean()))
    assert ends[1:] == pytest.approx([ends[0]] * 2, rel=0.01)
    assert ends[1] != ends[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bfloat16_moments_of_the_matrices_take_half_the_memory_and_biases_keep_float32(
    dtype: torch.dtype, backend: str
) -> None:
    model = make(backend, dtype=dtype)
    optimizer = sf.SparcAdam(model, moments="bfloat16")
    optimizer.step(batches(1)[0])
    for p in model.parameters():
        state = optimizer.state[p]
        bytes_each = 2 if p is model.W_enc or p is model.W_dec else 4
        assert state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes == 2 * bytes_each * p.numel()
        assert ("master" in state) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_are_their_masters_rounded_beside_bfloat16_moments(dtype: torch.dtype, backend: str) -> None:
    model = make(backend, dtype=dtype)
    optimizer = sf.SparcAdam(model, moments="bfloat16")
    for x in batches(5):
        optimizer.step(x)
    for W in (model.W_enc, model.W_dec):
        assert torch.equal(W, optimizer.state[W]["master"].to(dtype))


@pytest.mark.skipif("cpu" not in fast_backends(), reason="the CPU backend is not here")
def test_bfloat16_moments_do_not_depend_on_the_number_of_threads() -> None:
    runs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = make("cpu")
            optimizer = sf.SparcAdam(model, lr=1e-2, moments="bfloat16")
            for x in batches(10):
                optimizer.step(x)
            runs.append([p.detach() for p in model.parameters()] + [optimizer.state[model.W_dec]["exp_avg_sq"]])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_states_of_one_type_of_moments_load_into_the_other(backend: str) -> None:
    exact, narrow = (sf.SparcAdam(make(backend), lr=1e-2, moments=moments) for moments in ("float32", "bfloat16"))
    for x in batches(3):
        exact.step(x)
        narrow.step(x)
    for giver, moments in ((exact, "bfloat16"), (narrow, "float32")):
        taker = sf.SparcAdam(make(backend), moments=moments)
        taker.load_state_dict(copy.deepcopy(giver.state_dict()))
        for mine, theirs in zip(taker.model.parameters(), giver.model.parameters(), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                got, given = taker.state[mine][key], giver.state[theirs][key]
                is_matrix = mine is taker.model.W_enc or mine is taker.model.W_dec
                assert got.dtype == (getattr(torch, moments) if is_matrix else torch.float32)
                assert torch.equal(got, given.to(got.dtype))  # to the nearest, or widened
        assert torch.isfinite(taker.step(batches(1)[0]).total)
    adam = torch.optim.Adam(narrow.model.parameters())
    adam.load_state_dict(copy.deepcopy(narrow.state_dict()))
    assert torch.isfinite(plain_step(narrow.model, adam, batches(1)[0]).total)


def test_a_capturable_step_rounds_moments_as_a_plain_one_does(backend: str) -> None:
    plain, capturable = (
        sf.SparcAdam(make(backend, auxk=0), lr=1e-2, moments="bfloat16", capturable=c) for c in (False, True)
    )
    for x in batches(10):
        plain.step(x)
        capturable.step(x)
    for name, p in plain.model.named_parameters():
        torch.testing.assert_close(p, capturable.model.get_parameter(name), rtol=1e-4, atol=1e-5)
    v = [optimizer.state[optimizer.model.W_enc]["exp_avg_sq"] for optimizer in (plain, capturable)]
    assert (v[0] != v[1]).float().mean() < 0.01


@pytest.mark.parametrize("lazy", [None, "replay"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_whose_weights_change_their_type_on_the_way_trains_on(
    dtype: torch.dtype, lazy: str | None, backend: str
) -> None:
    model, expected = make(backend), make(backend)
    optimizers = sf.SparcAdam(model, lr=1e-3, lazy=lazy), sf.SparcAdam(expected, lr=1e-3)
    for step, x in enumerate(batches(10)):
        if step == 5:
            model.to(dtype)
        for optimizer in optimizers:
            optimizer.step(x)
    tolerance = {torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(model.W_dec.float(), expected.W_dec, rtol=tolerance, atol=tolerance)


def test_a_state_of_other_shapes_is_refused_and_changes_nothing() -> None:
    model = make("auto")
    optimizer = sf.SparcAdam(model)
    optimizer.step(batches(1)[0])
    before = copy.deepcopy(optimizer.state_dict())
    of_others = copy.deepcopy(before)
    of_others["state"][0]["exp_avg"] = of_others["state"][0]["exp_avg"].T.contiguous()
    with pytest.raises(ValueError, match=r"float exp_avg \[48, 24\] of W_enc, got torch.float32 \[24, 48\]"):
        optimizer.load_state_dict(of_others)
    smaller = sf.SparcAdam(sf.SPARC(WIDTHS, 32, 5))
    with pytest.raises(ValueError, match=r"float exp_avg \[32, 24\] of W_enc, got torch.float32 \[48, 24\]"):
        smaller.load_state_dict(before)
    of_others = copy.deepcopy(before)
    of_others["state"][1]["step"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"float step \[\] of W_dec, got torch.float32 \[2\]"):
        optimizer.load_state_dict(of_others)
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(optimizer.state_dict()["state"][index][name], value)


def test_whoever_reads_the_decoder_of_a_lazy_run_gets_rows_that_are_up_to_date() -> None:
    lazy, eager = make("auto"), make("auto")
    optimizers = sf.SparcAdam(lazy, lr=1e-2, lazy="replay"), sf.SparcAdam(eager, lr=1e-2)
    averages = [torch.optim.swa_utils.AveragedModel(m, avg_fn=lambda a, b, _: (a + b) / 2) for m in (lazy, eager)]
    for x in batches(6):
        for optimizer, model, average in zip(optimizers, (lazy, eager), averages, strict=True):
            optimizer.step(x[:2])
            average.update_parameters(model)
    assert torch.equal(averages[0].module.W_dec, averages[1].module.W_dec)
    for read in (lambda m: m.W_dec, lambda m: dict(m.named_parameters())["W_dec"], lambda m: list(m.parameters())[1],
                 lambda m: copy.deepcopy(m).W_dec, lambda m: m.state_dict()["W_dec"]):  # fmt: skip
        for optimizer in optimizers:
            optimizer.step(batches(7)[6][:2])
        assert torch.equal(read(lazy), read(eager))


def test_numpy_arrays_are_trained_on_as_the_tensors_they_are(backend: str) -> None:
    ours, theirs = make(backend), make(backend)
    optimizers = sf.SparcAdam(ours, lr=1e-3), sf.SparcAdam(theirs, lr=1e-3)
    for x in batches(3):
        of_streams = theirs.normalized(x)
        arrays = {name: part.numpy(force=True) for name, part in of_streams.items()}
        halves = [{name: part[rows] for name, part in arrays.items()} for rows in (slice(7), slice(7, None))]
        for given, tensors in ((arrays, of_streams), (x.numpy(force=True), x), (halves, x.split([7, 9]))):
            assert torch.equal(optimizers[0].step(given).total, optimizers[1].step(tensors).total)
        assert torch.equal(ours.loss(arrays).total, theirs.loss(of_streams).total)
        assert torch.equal(ours(arrays).recons["a", "b"], theirs(of_streams).recons["a", "b"])
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)

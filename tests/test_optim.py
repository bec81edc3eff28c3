"""SparcAdam is torch.optim.Adam on model.loss, with projection before the step and unit norm after it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from operands import fast_backends
from torch_adam import (
    EVERY_MOMENTS,
    EVERY_RULE,
    KINDS,
    TorchAdam,
    assert_close,
    assert_same,
    batches,
    given,
    make,
    parts_of,
    train,
)  # fmt: skip

import sparc_fast as sf
from sparc_fast.selection import jumprelu

FROZEN = [(), "encoder", "decoder", ("a",), ("b",), ("a", "c"), ("encoder", "b"), ("decoder", "c", "a")]


@pytest.mark.covering(2)
@EVERY_RULE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("freeze", FROZEN, ids=str)
@pytest.mark.parametrize("way", ["whole", "lazy", "in parts", "lacking samples", "lacking streams"])
@pytest.mark.parametrize("clips", [False, True])
def test_what_is_trained_moves_as_by_torch_adam_and_the_rest_not_at_all(
    selection: str, kind: str, freeze: Any, way: str, clips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if selection == "batch" and way == "in parts":
        pytest.skip("who fires is decided over a batch as a whole")
    options: dict[str, Any] = {"selection": selection, "dtype": torch.float64, "dead_after": 0, **KINDS[kind]}
    draws, most = batches(6, torch.float64), None
    if clips:
        unclipped = TorchAdam(make(**options), freeze=freeze, max_grad_norm=1e9)
        unclipped.step(draws[0])
        most = 0.9 * unclipped.norms[0]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.5, 0.9), "freeze": freeze, "max_grad_norm": most}
    theirs, first = TorchAdam(make(**options), **settings), make(**options)
    lazy: Any = "replay" if way == "lazy" else None
    ours = [sf.SparcAdam(make(backend, **options), lazy=lazy, **settings) for backend in fast_backends()]
    models = [optimizer.model for optimizer in (theirs, *ours)]
    if way == "in parts" and first.jumprelu is not None:
        monkeypatch.setattr(jumprelu, "EVERY", 10**9)  # offsets of sets of streams would be measured in other samples
        for model in models:
            model.learn_thresholds(draws[0])
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, len(draws)) for o in (theirs.adam, *ours)]
    used_auxk = 0
    for step, x in enumerate(draws):
        samples, present = given(way, x, step)
        expected = theirs.step(samples, 1 / (1 + step), present=present)
        parts = samples.split((5, 0, 11)) if way == "in parts" else samples
        for optimizer in ours:
            loss = optimizer.step(parts, 1 / (1 + step), present=present)
            torch.testing.assert_close(tuple(loss), tuple(expected), rtol=1e-9, atol=1e-11)
        for scheduler in schedulers:
            scheduler.step()
        used_auxk += expected.auxk is not None
    assert used_auxk
    assert most is None or min(theirs.norms) < most < max(theirs.norms), theirs.norms
    for model in models[1:]:
        assert_close(model, theirs.model)
        for (name, part, trained), (_, before, _) in zip(parts_of(model, freeze), parts_of(first, freeze), strict=True):
            assert torch.equal(part, before) != trained, name


@pytest.mark.covering(2)
@EVERY_RULE
@EVERY_MOMENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("freeze", [(), "encoder", ("b",)], ids=str)
@pytest.mark.parametrize("lazy", [None, "replay"])
@pytest.mark.parametrize("way", ["a state", "a copy", "a pickle"])
def test_training_goes_on_bit_for_bit_from_a_state_or_a_copy_which_stands_on_its_own(
    selection: str, dtype: torch.dtype, moments: Any, freeze: Any, lazy: Any, way: str, backend: str
) -> None:
    def begun(lazy: Any = lazy) -> sf.SparcAdam:
        model = make(backend, selection, dtype)
        return sf.SparcAdam(model, lr=1e-2, moments=moments, seed=4, freeze=freeze, lazy=lazy)

    whole, first = begun(None), begun()
    train(batches(4), whole, first)
    if way == "a state":
        again = begun()
        again.param_groups[0]["lr"] = 1.0
        again.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
        again.load_state_dict(copy.deepcopy(first.state_dict()))
    else:
        again = copy.deepcopy(first) if way == "a copy" else pickle.loads(pickle.dumps(first))
    train(batches(2, seed=3), first)
    train(batches(4, seed=2), whole, again)
    assert_same(again, whole)


@pytest.mark.parametrize("lazy", [None, "replay"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_state_may_be_loaded_before_that_of_its_model(steps_before: int, lazy: Any, backend: str) -> None:
    whole, first, again = (
        sf.SparcAdam(make(backend, dtype=torch.bfloat16), lr=1e-2, lazy=way) for way in (None, lazy, lazy)
    )
    train(batches(4, N=3), whole, first)
    train(batches(steps_before, N=3, seed=3), again)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    again.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    train(batches(4, N=3, seed=2), whole, again)
    assert_same(again, whole)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, None), (torch.float32, 0.4), (torch.bfloat16, 0.4)], ids=str
)
def test_steps_stay_as_close_to_float64_as_torch_adam_does(
    dtype: torch.dtype, most: float | None, backend: str
) -> None:
    ours, theirs, truth = (make(backend, auxk=4 if most is None else 0) for _ in range(3))
    # torch.optim.Adam has no masters of bfloat16 weights
    steps, narrow = 50 if most is None else 3, dtype == torch.bfloat16
    train([x.to(dtype) for x in batches(steps)], sf.SparcAdam(ours.to(dtype), lr=1e-3, max_grad_norm=most))
    train(batches(steps), TorchAdam(theirs, 1e-3, max_grad_norm=most))
    train([x.double() for x in batches(steps)], TorchAdam(truth.double(), 1e-3, max_grad_norm=most))
    for name, p in truth.named_parameters():
        error = (ours.get_parameter(name).double() - p).norm()
        allowed = 2 * (theirs.get_parameter(name) - p).norm() + 1e-6 * p.norm()
        allowed = allowed + narrow * (2**-7 * p.norm() + 3e-3 * p.numel() ** 0.5)
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def test_the_state_is_that_of_torch_adam(backend: str) -> None:
    ours, theirs = (make(backend, dtype=torch.float64, auxk=0) for _ in range(2))
    fused, plain = sf.SparcAdam(ours, lr=1e-2), TorchAdam(theirs)
    train(batches(3, torch.float64), fused)
    theirs.load_state_dict(ours.state_dict())
    plain.adam.load_state_dict(copy.deepcopy(fused.state_dict()))
    train(batches(3, torch.float64, seed=2), fused, plain)
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY_MOMENTS
def test_narrow_weights_are_their_masters_rounded_which_learn_from_smaller_steps(
    dtype: torch.dtype, moments: Any, backend: str
) -> None:
    model = make(backend, dtype=dtype)
    optimizer, before = sf.SparcAdam(model, lr=1e-5, moments=moments), model.W_enc.float()
    train(batches(10), optimizer)
    for W in (model.W_enc, model.W_dec):
        master = optimizer.state[W]["master"]
        assert master.dtype == torch.float32
        assert torch.equal(W, master.to(dtype))
    assert not torch.equal(optimizer.state[model.W_enc]["master"], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("freeze", [(), ("b",)], ids=str)
@pytest.mark.parametrize("way", ["a state without masters", "a state of float32", "weights that were float32"])
def test_narrow_weights_that_have_no_masters_get_them(way: str, freeze: Any, dtype: torch.dtype, backend: str) -> None:
    model = make(backend, dtype=dtype if "without" in way else torch.float32)
    giver = sf.SparcAdam(model, lr=1e-5, freeze=freeze)
    train(batches(2), giver)
    state = copy.deepcopy(giver.state_dict())
    for of_parameter in state["state"].values():
        of_parameter.pop("master", None)  # torch.optim.Adam has none
    model.to(dtype)
    loaded, expected = (sf.SparcAdam(copy.deepcopy(model), freeze=freeze) for _ in range(2))
    for optimizer in (loaded, expected):
        optimizer.load_state_dict(state)
    for name, parameter in expected.model.named_parameters():
        expected.state[parameter]["master"] = expected._trained.of(name, parameter.detach()).float()
    found = giver if "weights" in way else loaded
    train(batches(9, seed=2), found, expected)
    assert_same(found, expected)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wider", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("freeze", [(), ("b",)], ids=str)
@pytest.mark.parametrize("lazy", [None, "replay"])
def test_weights_that_become_as_wide_as_their_masters_take_what_these_hold_but_where_others_wrote(
    lazy: Any, freeze: Any, wider: torch.dtype, dtype: torch.dtype, backend: str
) -> None:
    model = make(backend, dtype=dtype)
    optimizer = sf.SparcAdam(model, lr=1e-3, freeze=freeze, lazy=lazy)
    train(batches(3), optimizer)
    expected = {name: optimizer.state[p]["master"].to(wider) for name, p in model.named_parameters()}
    model.to(wider)
    with torch.no_grad():
        model.pre_bias.add_(1)
    expected["pre_bias"] = optimizer._trained.of("pre_bias", model.pre_bias).clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(batches(1)[0])
    for name, parameter in model.named_parameters():
        assert "master" not in optimizer.state[parameter]
        torch.testing.assert_close(optimizer._trained.of(name, parameter), expected[name], rtol=0, atol=1e-6)


def test_weights_loaded_from_elsewhere_are_not_overwritten_by_old_masters(backend: str) -> None:
    model, other = make(backend, dtype=torch.bfloat16), make(backend, dtype=torch.bfloat16)
    optimizer = sf.SparcAdam(model, lr=1e-2)
    train(batches(3), optimizer)
    model.load_state_dict(other.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(batches(1)[0])
    assert torch.equal(model.W_enc, other.W_enc)


@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_capturable_step_reads_nothing_on_the_host_and_trains_alike(selection: str, backend: str) -> None:
    plain, capturable = (make(backend, selection, torch.float64) for _ in range(2))
    rate = torch.tensor(1e-2, dtype=torch.float64)
    optimizers = sf.SparcAdam(plain, lr=1e-2), sf.SparcAdam(capturable, lr=rate, capturable=True)
    without_dead = 0
    for losses in zip(*train(batches(30, torch.float64), *optimizers), strict=True):
        torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-9, atol=1e-12)
        if losses[0].auxk is None:
            without_dead += 1
            assert losses[1].auxk == 0
        else:
            torch.testing.assert_close(losses[0].auxk, losses[1].auxk, rtol=1e-9, atol=1e-12)
    assert 0 < without_dead < 25
    assert_close(capturable, plain)


def test_sixty_steps_with_bfloat16_moments_reach_the_loss_of_float32_within_a_hundredth(backend: str) -> None:
    ends = []
    for settings in ({}, {"moments": "bfloat16"}, {"moments": "bfloat16", "seed": 1}):
        optimizer = sf.SparcAdam(make(backend), lr=6e-3, **settings)
        losses = torch.stack([optimizer.step(x).total for x in batches(60)])
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


@EVERY_MOMENTS
def test_training_does_not_depend_on_the_number_of_threads(moments: Any, backend: str) -> None:
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(sf.SparcAdam(make(backend), lr=1e-2, moments=moments))
            train(batches(3, N=40), runs[-1])
    finally:
        torch.set_num_threads(1)
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_states_of_one_type_of_moments_load_into_the_other(backend: str) -> None:
    exact, narrow = (sf.SparcAdam(make(backend), lr=1e-2, moments=moments) for moments in ("float32", "bfloat16"))
    train(batches(3), exact, narrow)
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
    plain = TorchAdam(narrow.model)
    plain.adam.load_state_dict(copy.deepcopy(narrow.state_dict()))
    assert torch.isfinite(plain.step(batches(1)[0]).total)


def test_a_capturable_step_rounds_moments_as_a_plain_one_does(backend: str) -> None:
    plain, capturable = (
        sf.SparcAdam(make(backend, auxk=0), lr=1e-2, moments="bfloat16", capturable=c) for c in (False, True)
    )
    train(batches(10), plain, capturable)
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
    smaller = sf.SparcAdam(make(n_latents=32))
    with pytest.raises(ValueError, match=r"float exp_avg \[32, 24\] of W_enc, got torch.float32 \[48, 24\]"):
        smaller.load_state_dict(before)
    of_others = copy.deepcopy(before)
    of_others["state"][1]["step"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"float step \[\] of W_dec, got torch.float32 \[2\]"):
        optimizer.load_state_dict(of_others)
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(optimizer.state_dict()["state"][index][name], value)


def test_numpy_arrays_are_trained_on_as_the_tensors_they_are(backend: str) -> None:
    ours, theirs = make(backend), make(backend)
    optimizers = sf.SparcAdam(ours, lr=1e-3), sf.SparcAdam(theirs, lr=1e-3)
    for x in batches(3):
        of_streams = theirs.normalized(x)
        arrays = {name: part.numpy(force=True) for name, part in of_streams.items()}
        halves = [{name: part[rows] for name, part in arrays.items()} for rows in (slice(7), slice(7, None))]
        for of_numpy, tensors in ((arrays, of_streams), (x.numpy(force=True), x), (halves, x.split([7, 9]))):
            assert torch.equal(optimizers[0].step(of_numpy).total, optimizers[1].step(tensors).total)
        assert torch.equal(ours.loss(arrays).total, theirs.loss(of_streams).total)
        assert torch.equal(ours(arrays).recons["a", "b"], theirs(of_streams).recons["a", "b"])
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_average_of_a_lazy_run_is_of_rows_that_are_up_to_date() -> None:
    optimizers = [sf.SparcAdam(make(), lr=1e-2, lazy=lazy) for lazy in (None, "replay")]
    averages = [torch.optim.swa_utils.AveragedModel(o.model, avg_fn=lambda a, b, _: (a + b) / 2) for o in optimizers]
    for x in batches(6):
        train([x[:2]], *optimizers)
        for optimizer, average in zip(optimizers, averages, strict=True):
            average.update_parameters(optimizer.model)
    assert torch.equal(averages[0].module.W_dec, averages[1].module.W_dec)

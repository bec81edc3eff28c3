"""The model: what it promises about codes, streams, shapes, calibration and dead latents."""

from __future__ import annotations

import pytest
import torch
from dense import Weights, logits, masks, objective
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import fast_backends

import sparc_fast as sf
from sparc_fast import selection
from sparc_fast.objective import Objective, Terms

WIDTHS = {"dino": 10, "image": 7, "text": 5}


def make(backend: str = "auto", **kwargs: object) -> sf.SPARC:
    torch.manual_seed(0)
    arguments = {"n_latents": 40, "k": 6, "backend": backend, **kwargs}
    return sf.SPARC(WIDTHS, **arguments)


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(*shape, width, dtype=dtype) for name, width in WIDTHS.items()}


@pytest.mark.parametrize("selection", ["global", "local"])
def test_codes_equal_the_dense_equations(selection: str, backend: str) -> None:
    model, inputs = make(backend, selection=selection), batch(8)
    codes = model.encode(inputs)
    truth = Weights.of(model)
    h = logits(truth, [x.double() for x in inputs.values()])
    for name, score, mask in zip(WIDTHS, h, masks(h, 6, selection), strict=True):
        torch.testing.assert_close(codes.dense(name).double(), torch.relu(score) * mask, rtol=1e-5, atol=1e-6)


def test_streams_given_as_one_tensor_or_as_a_dict_in_any_order_give_the_same_codes(backend: str) -> None:
    model, inputs = make(backend), batch(8)
    expected = model.encode(inputs)
    side_by_side = model.encode(torch.cat(list(inputs.values()), dim=-1))
    reordered = model.encode(dict(reversed(inputs.items())))
    for codes in (side_by_side, reordered):
        assert codes.streams == expected.streams == ("dino", "image", "text")
        assert torch.equal(codes.values, expected.values)
        assert torch.equal(codes.indices, expected.indices)


@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions_are_flattened_and_restored(leading: tuple[int, ...], selection: str, backend: str) -> None:
    model, inputs = make(backend, selection=selection), batch(*leading)
    codes = model.encode(inputs)
    assert codes.values.shape == (*leading, 3, 6)
    assert codes.indices.shape == ((*leading, 6) if selection == "global" else (*leading, 3, 6))
    assert codes.dense("text").shape == (*leading, 40)
    assert model.decode(codes, "text", "dino").shape == (*leading, 10)
    recons = model(inputs).recons
    assert set(recons) == {(source, target) for source in WIDTHS for target in WIDTHS}
    for (_, target), recon in recons.items():
        assert recon.shape == (*leading, WIDTHS[target])
    flat = model.encode({name: x.reshape(-1, x.shape[-1]) for name, x in inputs.items()})
    assert torch.equal(flat.values, codes.values.reshape(flat.values.shape))


@pytest.mark.parametrize("present", [("dino",), ("text",), ("dino", "text"), ("image", "text")], ids="-".join)
def test_a_subset_of_streams_encodes_as_a_model_that_never_had_the_others(present: tuple[str, ...]) -> None:
    model, inputs = make(), batch(8)
    codes = model.encode({name: inputs[name] for name in present})
    small = sf.SPARC({name: WIDTHS[name] for name in present}, 40, 6)
    columns = dict(zip(WIDTHS, model._columns(), strict=True))
    with torch.no_grad():
        small.W_enc.copy_(torch.cat([model.W_enc[:, columns[name]] for name in present], dim=1))
    expected = small.encode({name: inputs[name] for name in present})
    assert codes.streams == present
    assert torch.equal(codes.indices, expected.indices)
    torch.testing.assert_close(codes.values, expected.values)


def test_translate_needs_only_the_source_stream(backend: str) -> None:
    model, inputs = make(backend), batch(8)
    alone = model.translate({"text": inputs["text"]}, source="text", target="dino")
    beside_others = model.translate(inputs, source="text", target="dino")
    as_tensor = model.translate(torch.cat(list(inputs.values()), -1), source="text", target="dino")
    assert alone.shape == (8, 10)
    assert torch.equal(alone, beside_others)
    assert torch.equal(alone, as_tensor)


def test_one_stream_alone_is_local_topk(backend: str) -> None:
    model = make(backend)
    local = make(backend, selection="local")
    local.load_state_dict(model.state_dict())
    inputs = batch(8)
    all_local = local.encode(inputs)
    for name in WIDTHS:
        alone = model.encode({name: inputs[name]})
        for got, expected in zip(alone.stream(name), all_local.stream(name), strict=True):
            assert torch.equal(got, expected)


def test_forward_without_every_stream_has_recons_of_all_targets_and_no_loss(backend: str) -> None:
    out = make(backend)({"image": batch(8)["image"]})
    assert out.loss is None
    assert set(out.recons) == {("image", target) for target in WIDTHS}


def test_losses_are_distinct_tensors_and_add_up(backend: str) -> None:
    loss = make(backend).loss(batch(8), cross_loss_coef=0.5)
    assert loss.auxk is None
    assert len({t.data_ptr() for t in (loss.total, loss.self, loss.cross)}) == 3
    torch.testing.assert_close(loss.total.detach(), loss.self + 0.5 * loss.cross)


def test_without_cross_loss_no_cross_pair_is_computed(backend: str) -> None:
    loss = make(backend).loss(batch(8), cross_loss_coef=0.0)
    assert loss.cross is None
    assert torch.equal(loss.nmse, loss.nmse.diagonal().diag())


@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_sample_alone_equals_the_same_sample_in_a_batch(selection: str, backend: str) -> None:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 384, "b": 1792}, 100, 7, selection=selection, backend=backend)
    x = torch.randn(133, 2176)
    together = model.encode(x)
    recons = model.decode(together, "a", "b")
    for n in (0, 17, 132):
        alone = model.encode(x[n : n + 1])
        assert torch.equal(alone.indices[0], together.indices[n])
        assert torch.equal(alone.values[0], together.values[n])
        assert torch.equal(model.decode(alone, "a", "b")[0], recons[n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_float_dtype_trains(dtype: torch.dtype, backend: str) -> None:
    model = make(backend, dtype=dtype)
    loss = model.loss(batch(8))
    loss.total.backward()
    assert {p.grad.dtype for p in model.parameters()} == {dtype}
    assert model.encode(batch(8)).values.dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_gradients_are_as_good_as_their_dtype(dtype: torch.dtype, size: float, backend: str) -> None:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 24, "b": 16}, 32, 8, dtype=dtype, backend=backend)
    x = size * torch.randn(1024, 40, dtype=dtype)
    truth = sf.SPARC({"a": 24, "b": 16}, 32, 8, dtype=torch.float64, backend="reference")
    truth.load_state_dict(model.state_dict())
    loss_scale = 2.0**12  # what a GradScaler does
    (model.loss(x).total * loss_scale).backward()
    truth.loss(x.double()).total.backward()
    for name, p in model.named_parameters():
        expected = truth.get_parameter(name).grad
        error = (p.grad.double() / loss_scale - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(dtype).eps, f"{name}: {error:.1e}"


@pytest.mark.parametrize("size", [1e-21, 1e-15, 0.0])
def test_a_row_next_to_nothing_counts_as_zero_and_ruins_nothing(size: float, backend: str) -> None:
    model, inputs = make(backend), batch(8)
    inputs["image"][3] = size
    of_model = model.loss(inputs)
    assert of_model.zero_rows.tolist() == [0, 1, 0]
    of_model.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model = make(backend)
    loss = sf.SparcAdam(model).step(inputs)
    assert loss.zero_rows.tolist() == [0, 1, 0]
    assert loss.total < 10
    torch.testing.assert_close(make(backend)(inputs).loss.total.detach(), loss.total)
    assert all(p.isfinite().all() for p in model.parameters())


def test_cross_loss_is_not_lost_beside_a_large_self_loss() -> None:
    nmse = torch.tensor([[1e6, 1e-3], [1e-3, 1e6]])
    loss = Objective("global", 1, "auto").summarize({("a", "b"): Terms(nmse, None, torch.ones(1, 2))}, ("a", "b"))
    torch.testing.assert_close(loss.cross, nmse[0, 1])


def test_no_samples_have_no_loss(backend: str) -> None:
    model, x = make(backend), torch.zeros(0, 22)
    assert model(x).loss.total == model.loss(x).total == 0


def test_losses_whose_gradient_is_one_expanded_number_work(backend: str) -> None:
    model, inputs = make(backend), batch(8)
    model.encode(inputs).values.sum().backward()
    model.decode(model.encode(inputs), "dino", "text").sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_accumulate(backend: str) -> None:
    model, inputs = make(backend, dtype=torch.float64), batch(8, dtype=torch.float64)
    model.loss(inputs).total.backward()
    once = model.W_dec.grad.clone()
    model.loss(inputs).total.backward()
    torch.testing.assert_close(model.W_dec.grad, 2 * once)


def test_k_and_widths_without_round_numbers_or_limits(backend: str) -> None:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 1152, "b": 385}, 600, 513, backend=backend, dtype=torch.float64)
    x = torch.randn(3, 1537, dtype=torch.float64)
    model.loss(x).total.backward()
    truth = Weights.of(model)
    objective(truth, list(x.split([1152, 385], dim=1)), 513, "global", 1.0).backward()
    for name, expected in truth.gradients().items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-8, atol=1e-11)


def test_autocast_does_not_change_the_numbers(backend: str) -> None:
    model, inputs = make(backend), batch(8)
    expected = model.loss(inputs)
    expected.total.backward()
    grad = model.W_enc.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(inputs)
        loss.total.backward()
        model.decode(model.encode(inputs), "dino", "text").sum().backward()
        step = sf.SparcAdam(make(backend)).step(inputs)
    assert torch.equal(loss.total, expected.total)
    assert torch.equal(step.total, expected.total)
    model.zero_grad()
    model.loss(inputs).total.backward()
    assert torch.equal(model.W_enc.grad, grad)


def test_decoder_rows_start_at_unit_norm_in_every_stream() -> None:
    model = make()
    for columns in model._columns():
        torch.testing.assert_close(model.W_dec[:, columns].norm(dim=1), torch.ones(40))


def test_projection_leaves_nothing_along_the_decoder_rows(backend: str) -> None:
    model = make(backend)
    model.loss(batch(8)).total.backward()
    assert (model.W_dec.grad * model.W_dec).sum(1).abs().max() > 1e-4
    model.project_gradients_()
    for columns in model._columns():
        along = (model.W_dec.grad[:, columns] * model.W_dec[:, columns]).sum(1)
        torch.testing.assert_close(along, torch.zeros(40), atol=1e-6, rtol=0)


def test_calibration_centres_each_stream_at_mean_squared_norm_one_and_is_undone_in_reconstructions() -> None:
    inputs = {name: 100**i * (x + 5) for i, (name, x) in enumerate(batch(200).items())}
    model = make()
    model.calibrate(inputs)
    x = model._batch(inputs).x
    for columns in model._columns():
        torch.testing.assert_close(x[:, columns].mean(0), torch.zeros(columns.stop - columns.start), atol=1e-4, rtol=0)
        torch.testing.assert_close(x[:, columns].square().sum(1).mean(), torch.tensor(1.0))
    plain = make()
    plain.load_state_dict({**model.state_dict(), "input_mean": torch.zeros(22), "input_rms": torch.ones(3)})
    expected = plain.translate(x, "dino", "text") * model.input_rms[2] + model.input_mean[17:]
    torch.testing.assert_close(model.translate(inputs, "dino", "text"), expected)
    torch.testing.assert_close(model.loss(inputs).total, plain.loss(x).total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_constant_stream_calibrates_to_zero_rather_than_nan(dtype: torch.dtype) -> None:
    inputs = batch(20, dtype=dtype)
    inputs["image"][:] = 0.1
    model = make(dtype=dtype)
    model.calibrate(inputs)
    torch.testing.assert_close(model._batch(inputs).x[:, 10:17], torch.zeros(20, 7, dtype=dtype), atol=1e-7, rtol=0)


def test_a_failed_calibration_leaves_the_previous_one() -> None:
    model, inputs = make(), batch(20)
    model.calibrate(inputs)
    before = model.input_mean.clone()
    with pytest.raises(ValueError, match="to calibrate"):
        model.calibrate({"dino": inputs["dino"]})
    inputs["text"][3] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        model.calibrate(inputs)
    assert torch.equal(model.input_mean, before)
    assert model.is_calibrated


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_calibration_is_measured_and_kept_in_the_inputs_own_precision(dtype: torch.dtype) -> None:
    inputs = {name: 1e5 + 0.5 * x for name, x in batch(200).items()}
    narrow, cast = make(dtype=dtype), make()
    narrow.calibrate(inputs)
    cast.calibrate(inputs)
    cast = cast.to(dtype)
    assert torch.equal(narrow.input_mean, cast.input_mean)
    x = cast._batch(inputs).x
    torch.testing.assert_close(x[:, :10].float().square().sum(1).mean(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_latents_die_by_samples_and_revive_when_any_stream_fires_them(backend: str) -> None:
    model = make(backend, dead_after=20, auxk=0)
    with torch.no_grad():
        model.latent_bias[:, 30:] = -100.0
    for _ in range(3):
        model.loss(batch(8))
    assert model.silence[30:].tolist() == [24] * 10
    assert model.dead[30:].all()
    assert not model.dead[: int((model.silence == 0).sum())].all() or (model.silence[:30] <= 24).all()
    with torch.no_grad():
        model.latent_bias[1, 35] = 500.0
    model.loss(batch(8))
    assert model.silence[35] == 0
    assert not model.dead[35]


def test_counters_move_in_training_only(backend: str) -> None:
    model = make(backend)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    model.loss(batch(8))
    model(batch(8))
    model.train()
    model.encode(batch(8))
    model.translate(batch(8), "dino", "text")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.loss(batch(8))
    assert not torch.equal(model.silence, before["silence"])


def test_auxk_reaches_dead_latents_alone_and_never_the_pre_bias_directly(backend: str) -> None:
    model = make(backend, dead_after=0, auxk=4)
    dead = torch.arange(30, 40)
    with torch.no_grad():
        model.latent_bias[:, 30:] = -100.0
    model.silence[30:] = 1
    with_auxk = model.loss(batch(8), auxk_coef=0.5)
    assert with_auxk.auxk is not None
    with torch.no_grad():
        model.latent_bias[:, 30:] = 0.0
        model.W_enc[30:] *= 1e-3
    model.silence[:30], model.silence[30:] = 0, 1
    without = torch.autograd.grad(model.loss(batch(8), auxk_coef=0.0).total, model.W_enc)[0]
    model.silence[:30], model.silence[30:] = 0, 1
    with_it = torch.autograd.grad(model.loss(batch(8), auxk_coef=0.5).total, model.W_enc)[0]
    changed = (with_it != without).any(1).nonzero()[:, 0]
    assert len(changed) > 0
    assert torch.isin(changed, dead).all()


def test_auxk_chooses_from_the_rows_of_dead_latents_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    select = selection.select
    monkeypatch.setattr(
        selection, "select", lambda rule, x, *a, **kw: rows.append(len(x.W_enc)) or select(rule, x, *a, **kw)
    )
    model = make(backend, dead_after=0, auxk=4)
    for n_dead in (1, 3, 17):
        model.silence.zero_()
        model.silence[:n_dead] = 1
        model.loss(batch(8), auxk_coef=0.5)
    assert rows == [1, model.n_latents, 3, model.n_latents, 17, model.n_latents]


def test_auxk_joins_the_loss_of_float16_weights_whose_residual_is_float32(backend: str) -> None:
    model, inputs = make(backend, dead_after=0, auxk=4, dtype=torch.float16), batch(8, dtype=torch.float16)
    model.silence[:9] = 1
    loss = model.loss(inputs, auxk_coef=0.5)
    loss.total.backward()
    model.silence.zero_()
    model.silence[:9] = 1
    assert torch.equal(loss.auxk, sf.SparcAdam(model).step(inputs, auxk_coef=0.5).auxk)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_auxk_without_dead_latents_changes_nothing(backend: str) -> None:
    model = make(backend)
    loss = model.loss(batch(8), auxk_coef=10.0)
    assert loss.auxk is None
    assert torch.equal(loss.total.detach(), make(backend).loss(batch(8), auxk_coef=0.0).total.detach())


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(0, 9), k=st.integers(1, 12), widths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 99)
)  # fmt: skip
def test_any_shape_encodes_to_k_ascending_distinct_latents(N: int, k: int, widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    for backend in fast_backends():
        model = sf.SPARC({str(s): width for s, width in enumerate(widths)}, 12, k, backend=backend)
        codes = model.encode(torch.randn(N, sum(widths)))
        assert codes.indices.shape == (N, k)
        assert (codes.indices.diff(dim=1) > 0).all()
        assert codes.indices.numel() == 0 or (codes.indices.min() >= 0 and codes.indices.max() < 12)
        assert (codes.values >= 0).all()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised by torch's own tracing
def test_the_layer_compiles_as_one_graph(backend: str) -> None:
    model, inputs = make(backend, auxk=0), batch(8)
    expected = model.loss(inputs)
    expected.total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(inputs)
    compiled.total.backward()
    torch.testing.assert_close(compiled.total, expected.total)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])


def test_a_support_chosen_by_some_streams_serves_them_all(backend: str) -> None:
    model, inputs = make(backend), batch(8)
    chosen = selection.select("global", model._batch(inputs), 6, support_from=("text", "dino"), backend=backend)
    assert torch.equal(chosen, model.encode({name: inputs[name] for name in ("dino", "text")}).indices)
    loss = model.loss(inputs, support_from=("text", "dino"))
    loss.total.backward()
    assert model.W_enc.grad[:, 10:17].abs().sum() > 0
    with pytest.raises(ValueError, match=r"support_from must be one of the streams .* got 'audio'"):
        model.loss(inputs, support_from=("audio",))
    with pytest.raises(ValueError, match="support_from must name at least one"):
        model.loss(inputs, support_from=())
    with pytest.raises(ValueError, match="support_from must be None under local selection"):
        make(backend, selection="local").loss(inputs, support_from=("dino",))

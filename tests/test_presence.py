"""Samples that lack some streams: each is what it would be if just its own streams were given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch_adam import KINDS, WIDTHS, assert_close, batches, given, make

import sparc_fast as sf

SELECTIONS = ["global", "local"]


def model_of(
    backend: str = "auto", selection: str = "global", dtype: torch.dtype = torch.float64, **more: Any
) -> sf.SPARC:
    model = make(backend, selection, dtype, **more)
    with torch.no_grad():
        model.latent_bias.normal_(0, 0.3)
        model.pre_bias.normal_(0, 0.3)
    model._clear_private()
    return model


def batch(n: int = 17, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
    """Streams, and who has them; what a sample lacks is NaN."""
    inputs, present = given("lacking samples", *batches(1, dtype, n, seed), seed)
    assert present is not None
    return inputs, present


def alone(inputs: dict[str, Tensor], present: Tensor, n: int) -> dict[str, Tensor]:
    return {name: inputs[name][n : n + 1] for s, name in enumerate(WIDTHS) if present[n, s]}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", ["plain", "private"])
def test_a_sample_has_the_code_of_the_streams_it_has(selection: str, kind: str, backend: str) -> None:
    model = model_of(backend, selection, torch.float32, **KINDS[kind])
    inputs, present = batch(dtype=torch.float32)
    codes = model.encode(inputs, present)
    assert codes.streams == tuple(WIDTHS)
    for n in range(len(present)):
        own = model.encode(alone(inputs, present, n))
        own = own.with_slots(codes.indices.shape[-1])
        for s, name in enumerate(WIDTHS):
            values, indices = (part[n] for part in codes.stream(name))
            if present[n, s]:
                assert torch.equal(values, own.stream(name)[0][0])
                assert torch.equal(indices, own.stream(name)[1][0])
            else:
                assert not values.any()
                assert selection == "global" or (indices == -1).all()


@pytest.mark.parametrize(
    ("selection", "support_from", "kind"),
    [("global", None, "plain"), ("global", ["b"], "plain"), ("global", ["a", "c"], "private"), ("local", None, "plain"),
     ("local", None, "private")], ids=str,
)  # fmt: skip
def test_the_loss_is_the_mean_over_samples_of_the_loss_of_their_own_streams(
    selection: str, support_from: list[str] | None, kind: str, backend: str
) -> None:
    inputs, present = batch()
    model, each = (model_of(backend, selection, **KINDS[kind]) for _ in range(2))
    for one in (model, each):
        one.silence[3:20] = 1000
    loss = model.loss(inputs, 0.7, present=present, support_from=support_from)
    loss.total.backward()
    losses = []
    for n in range(len(present)):
        each.silence.zero_()[3:20] = 1000
        own = alone(inputs, present, n)
        among = [name for name in support_from or () if name in own] or None
        losses.append(each.loss(own, 0.7, support_from=among))
    expected = torch.stack([one.total for one in losses]).mean()
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.total, loss.self + 0.7 * loss.cross + loss.auxk / 32, rtol=1e-10, atol=1e-12)
    assert loss.auxk > 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, each.get_parameter(name).grad, rtol=1e-8, atol=1e-11)
    for s, source in enumerate(WIDTHS):
        for t, target in enumerate(WIDTHS):
            pairs = [one.nmse for n, one in enumerate(losses) if present[n, s] and present[n, t]]
            places = [
                [name for i, name in enumerate(WIDTHS) if row[i]] for row in present.tolist() if row[s] and row[t]
            ]
            errors = [e[names.index(source), names.index(target)] for e, names in zip(pairs, places, strict=True)]
            torch.testing.assert_close(loss.nmse[s, t], torch.stack(errors).mean(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ["nmse", "fvu"])
def test_parts_of_a_batch_may_each_lack_streams(loss: Any, backend: str) -> None:
    whole, parts = (model_of(backend, loss=loss) for _ in range(2))
    inputs, present = batch(24)
    optimizers = [sf.SparcAdam(model, lr=1e-2) for model in (whole, parts)]
    for _ in range(5):
        expected = optimizers[0].step(inputs, present=present)
        pieces = [{name: x[i : i + 8] for name, x in inputs.items()} for i in (0, 8, 16)]
        loss = optimizers[1].step(pieces, present=present.split(8))
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert_close(parts, whole)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("streams", ["abc", "ac"])
def test_streams_that_all_samples_have_are_those_given_bit_for_bit_and_one_that_none_has_is_not(
    selection: str, streams: str, backend: str
) -> None:
    models = [model_of(backend, selection, torch.float32) for _ in range(2)]
    optimizers = [sf.SparcAdam(model, lr=1e-2) for model in models]
    has = torch.tensor([name in streams for name in WIDTHS])
    for step in range(10):
        inputs = {name: x.nan_to_num(0.5) for name, x in batch(seed=step, dtype=torch.float32)[0].items()}
        loss = optimizers[0].step(inputs, present=has.expand(17, 3))
        expected = optimizers[1].step({name: inputs[name] for name in streams})
        assert torch.equal(loss.total, expected.total)
        assert torch.equal(loss.nmse[has][:, has], expected.nmse)
        assert not loss.nmse[~has].any()
        assert loss.zero_rows.tolist() == [0, 0, 0]
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])


def test_zero_rows_are_counted_among_those_that_are_there() -> None:
    inputs, present = batch()
    inputs["a"][:5] = 0
    inputs["b"][:] = 0
    present[:, 0], present[:, 1] = True, False
    inputs["a"].nan_to_num_(0.5)
    present[:3] = torch.tensor([True, False, False])
    assert model_of().loss(inputs, present=present).zero_rows.tolist() == [5, 0, 0]


def test_leading_dimensions_and_no_samples_at_all_keep_their_shape() -> None:
    model = model_of()
    inputs, present = batch(24)
    shaped = {name: x.reshape(2, 3, 4, -1) for name, x in inputs.items()}
    codes, flat = model.encode(shaped, present.reshape(2, 3, 4, 3)), model.encode(inputs, present)
    assert torch.equal(codes.values.reshape(24, 3, 5), flat.values)
    assert torch.equal(codes.indices.reshape(24, 5), flat.indices)
    nobody = {name: x[:0] for name, x in inputs.items()}
    assert model.encode(nobody, present[:0]).values.shape == (0, 3, 5)
    assert model.loss(nobody, present=present[:0]).total == 0


def test_a_mask_may_be_an_array_of_numpy_as_the_samples_may() -> None:
    inputs, present = batch()
    arrays, mask = {name: x.numpy(force=True) for name, x in inputs.items()}, present.numpy(force=True)
    models = model_of(), model_of()
    codes = models[0].encode(arrays, mask), models[1].encode(inputs, present)
    assert torch.equal(codes[0].values, codes[1].values)
    optimizers = [sf.SparcAdam(model) for model in models]
    halves = [{name: x[rows] for name, x in arrays.items()} for rows in (slice(9), slice(9, None))]
    parts = [{name: x[rows] for name, x in inputs.items()} for rows in (slice(9), slice(9, None))]
    for ours, theirs in (
        ((arrays, mask), (inputs, present)),
        ((halves, [mask[:9], mask[9:]]), (parts, [*present.split([9, 8])])),
    ):
        found, expected = (opt.step(x, present=has) for opt, (x, has) in zip(optimizers, (ours, theirs), strict=True))
        assert torch.equal(found.total, expected.total)


def test_a_mask_that_does_not_fit_is_refused_in_words() -> None:
    model = model_of()
    inputs, present = batch()
    with pytest.raises(ValueError, match=r"present must be a bool tensor, .* got torch.float32"):
        model.loss(inputs, present=present.float())
    with pytest.raises(ValueError, match=r"present must be a bool tensor, .* got list"):
        model.encode(inputs, present=present.tolist())
    with pytest.raises(ValueError, match=r"present must be of \[17\] samples by 3 streams .*, got \[17, 2\]"):
        model.loss(inputs, present=present[:, :2])
    present[4] = False
    with pytest.raises(ValueError, match=r"present must leave each sample at least one stream, got none for row 4"):
        model.loss(inputs, present=present)
    with pytest.raises(ValueError, match=r"support_from must be one of the streams .*, got 'd'"):
        model.loss({name: x.nan_to_num(0.5) for name, x in inputs.items()}, support_from=["d"])
    with pytest.raises(ValueError, match=r"present must be one tensor for each of 2 parts of a batch, got 1"):
        sf.SparcAdam(model).step([inputs, inputs], present=present)
    with pytest.raises(ValueError, match=r"present must be None with capturable=True"):
        sf.SparcAdam(model, capturable=True).step(inputs, present=present)


def calibrated_with_zero_rows(**more: Any) -> tuple[sf.SPARC, dict[str, Tensor], Tensor]:
    """A calibrated model, inputs of which some rows are zero, and what is there of them."""
    torch.manual_seed(0)
    model = sf.SPARC({"a": 9, "b": 5}, 32, 4, auxk=4, dead_after=1, **more)
    x = {name: 3 + torch.randn(12, width) for name, width in model.d_streams.items()}
    has = torch.ones(12, 2, dtype=torch.bool)
    has[[1, 7], 0] = has[4, 1] = False
    for s, rows in enumerate(x.values()):
        rows[~has[:, s]] = 0
    model.calibrate(x)
    return model, x, has


def test_a_row_of_zeros_is_absent_to_a_calibrated_model_and_is_counted() -> None:
    model, x, has = calibrated_with_zero_rows()
    codes, expected = model.encode(x), model.encode(x, has)
    assert torch.equal(codes.values, expected.values)
    assert torch.equal(codes.indices, expected.indices)
    model.eval()
    found, told = model.loss(x), model.loss(x, present=has)
    assert torch.equal(found.total, told.total)
    assert found.zero_rows.tolist() == [2, 1]
    assert told.zero_rows.tolist() == [0, 0]
    assert model.loss(x, present=torch.ones_like(has)).total > found.total + 0.1  # they may be said to be there


@pytest.mark.parametrize("selection", [*SELECTIONS, "batch"])
@pytest.mark.parametrize("more", [{}, {"matryoshka": (8, 20)}, {"private": {"a": 6}, "private_k": 1}, {"loss": "fvu"}],
                         ids=str)  # fmt: skip
def test_forward_takes_rows_of_zeros_for_absent_as_encode_and_loss_do(selection: str, more: dict[str, Any]) -> None:
    model, x, has = calibrated_with_zero_rows(selection=selection, **more)
    found, codes, expected = model(x, 0.7), model.encode(x, has), model.loss(x, 0.7, auxk_coef=0)
    assert torch.equal(found.codes.values, codes.values)
    assert torch.equal(found.codes.indices, codes.indices)
    for (source, target), recons in found.recons.items():
        torch.testing.assert_close(recons, model.decode(codes, source, target))
    for one, other in zip(found.loss, expected, strict=True):
        torch.testing.assert_close(one, other)
    gradients = [torch.autograd.grad(loss.total, tuple(model.parameters())) for loss in (found.loss, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_on_rows_of_zeros_is_that_without_them(parts: int) -> None:
    models = []
    for told in (False, True):
        model, x, has = calibrated_with_zero_rows()
        rows = torch.cat(list(x.values()), dim=1)
        present = has.tensor_split(parts) if told else None
        opt = sf.SparcAdam(model, lr=1e-2)
        loss = opt.step(list(rows.tensor_split(parts)), present=list(present) if present else None)
        assert loss.zero_rows.tolist() == ([0, 0] if told else [2, 1])
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("whiten", ["none", "diag"])
def test_calibration_measures_no_row_of_zeros(whiten: str) -> None:
    model, x, has = calibrated_with_zero_rows()
    model.calibrate(x, whiten=whiten)
    for s, (name, rows) in enumerate(x.items()):
        alone = sf.SPARC({name: rows.shape[1]}, 32, 4)
        alone.calibrate({name: rows[has[:, s]]}, whiten=whiten)
        columns = slice(0, 9) if name == "a" else slice(9, 14)
        assert torch.equal(model.input_mean[columns], alone.input_mean)
        scale = model.input_rms[s : s + 1] if whiten == "none" else model.input_rms[columns]
        assert torch.equal(scale, alone.input_rms)


def test_a_sample_of_nothing_but_zeros_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = calibrated_with_zero_rows()
    without = model.eval().loss({name: rows[:1] for name, rows in x.items()}).total
    beside = {name: torch.cat([rows[:1], torch.zeros_like(rows[:1])]) for name, rows in x.items()}
    found = model.loss(beside)
    assert torch.allclose(2 * found.total, without)
    assert found.zero_rows.tolist() == [1, 1]
    # where the host must not ask which rows are zero, their own errors are left out all the same
    monkeypatch.setattr("sparc_fast.model._is_capturing", lambda x: True)
    assert torch.equal(model.loss(beside).total, found.total)
    assert model.loss(x).zero_rows.tolist() == [2, 1]

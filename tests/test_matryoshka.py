"""Nested dictionaries (Matryoshka): the mean of every prefix's loss, in models, both ways of training, and runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
import training_runs
from accuracy import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import DTYPES, Operands, fast_backends, operands, operators_of, seeded
from torch import Tensor
from torch_adam import WIDTHS

import sparc_fast as sf
from sparc_fast.cli import train
from sparc_fast.ops import reference
from sparc_fast.ops.layout import by_group, wide
from sparc_fast.training import Config

L, K = 40, 6
SELECTIONS = pytest.mark.parametrize("selection", ["global", "local", "batch"])


def make(selection: str = "global", matryoshka: Sequence[int] = (5, 20), **arguments: Any) -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC(WIDTHS, L, K, selection=selection, matryoshka=matryoshka, **arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in (model.pre_bias, model.latent_bias):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(3)))
    return model


def samples(n: int = 24, seed: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {name: torch.randn(n, width, generator=generator).to(dtype) for name, width in WIDTHS.items()}


def every_latent(model: sf.SPARC, x: dict[str, Tensor]) -> Tensor:
    """Codes [N, S, L]."""
    codes = model.encode(x)
    return torch.stack([codes.dense(name) for name in codes.streams], dim=-2).detach()


@SELECTIONS
def test_loss_and_gradients_are_those_of_every_prefix_decoded_by_itself(selection: str, backend: str) -> None:
    model = make(selection, auxk=8, dead_after=3, dtype=torch.float64, backend=backend)
    model.silence[30:] = 10
    weights, x = dense.Weights.of(model), samples()
    given = list(x.values()), K, selection, 0.5
    truth = dense.objective(weights, *given, model.dead, 8, 1 / 32, sizes=(5, 20, L))
    truth.backward()
    loss = model.loss(x, 0.5)
    loss.total.backward()
    torch.testing.assert_close(loss.total, truth, rtol=1e-10, atol=0)
    prefixes = torch.stack([dense.objective(weights, *given, sizes=(size,)) for size in (5, 20, L)])
    torch.testing.assert_close(loss.prefixes, prefixes.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.total, loss.prefixes.mean() + loss.auxk / 32)
    for name, gradient in weights.gradients().items():
        torch.testing.assert_close(getattr(model, name).grad, gradient, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_batch_in_parts_and_streams_that_are_absent_are_the_same_batch(selection: str) -> None:
    present = torch.rand(24, 3, generator=seeded(5)) < 0.7
    present[:, 0] |= ~present.any(1)
    x = samples()
    models = [make(selection, auxk=8, dead_after=30, dtype=torch.float64) for _ in range(3)]
    for model in models:
        model.silence[30:] = 100
    whole = sf.SparcAdam(models[0], lr=1e-2).step(x, present=present)
    parts = [{name: part[rows] for name, part in x.items()} for rows in (slice(0, 9), slice(9, 24))]
    halves = sf.SparcAdam(models[1], lr=1e-2).step(parts, present=(present[:9], present[9:]))
    plain = models[2].loss(x, present=present)
    for other in (halves, plain):
        torch.testing.assert_close(whole.total, other.total, rtol=1e-10, atol=0)
        torch.testing.assert_close(whole.prefixes, other.prefixes, rtol=1e-10, atol=0)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_step_that_a_graph_could_capture_is_the_same_step(selection: str) -> None:
    captured, plain = (make(selection, auxk=0) for _ in range(2))
    for model, capturable in ((captured, True), (plain, False)):
        sf.SparcAdam(model, lr=1e-2, capturable=capturable).step(samples(dtype=torch.float32))
    for one, two in zip(captured.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@SELECTIONS
def test_one_dictionary_named_is_one_that_is_not_bit_for_bit(selection: str) -> None:
    named, plain = make(selection, (L,)), make(selection, ())
    assert named.matryoshka == ()
    assert named.config() == plain.config()
    x = samples(dtype=torch.float32)
    losses = [sf.SparcAdam(model, lr=1e-2).step(x) for model in (named, plain)]
    assert losses[0].prefixes is None
    assert torch.equal(losses[0].total, losses[1].total)
    assert_equal(named.state_dict().values(), plain.state_dict().values())


def test_the_parts_that_are_reported_are_those_of_all_latents() -> None:
    nested, plain = make(dtype=torch.float64), make(matryoshka=(), dtype=torch.float64)
    x = samples()
    of_all, one = nested.loss(x), plain.loss(x)
    assert torch.equal(of_all.nmse, one.nmse)
    assert torch.equal(of_all.self, one.self)
    assert of_all.prefixes is not None
    torch.testing.assert_close(of_all.prefixes[-1], one.total)
    forward = nested(x).loss
    torch.testing.assert_close(forward.total, of_all.total)
    torch.testing.assert_close(forward.prefixes, of_all.prefixes)


def test_fvu_is_told_of_every_prefix() -> None:
    model = make(loss="fvu", dtype=torch.float64)
    x = samples()
    loss = model.loss(x)
    codes = model.encode(x)
    kept = torch.where(codes.indices < 5, codes.indices, -1)
    values = codes.values.masked_fill((kept < 0)[:, None], 0)
    recons = reference.sparse_decode(values, kept, model.W_dec, model.pre_bias).split(list(WIDTHS.values()), dim=2)
    fvu = torch.stack([torch.stack([sf.fvu(recon[:, s], part) for recon, part in zip(recons, x.values(), strict=True)])
                       for s in range(3)])  # fmt: skip
    expected = fvu.diagonal().mean() + (fvu.sum() - fvu.diagonal().sum()) / 6
    assert loss.prefixes is not None
    torch.testing.assert_close(loss.prefixes[0], expected)


def test_training_puts_what_matters_first() -> None:
    data = {name: x.to(torch.get_default_device()) for name, x in training_runs.rows(512).items()}
    losses = []
    for sizes in ((), (8, 24)):
        torch.manual_seed(0)
        model = sf.SPARC(training_runs.D, 64, 4, matryoshka=sizes)
        optimizer = sf.SparcAdam(model, lr=1e-2)
        for step in range(120):
            optimizer.step({name: x[step % 4 * 128 :][:128] for name, x in data.items()})
        probe = sf.SPARC(training_runs.D, 64, 4, matryoshka=(8, 24))
        probe.load_state_dict(model.state_dict())
        losses.append(probe.loss(data).prefixes)
    assert losses[1][0] < 0.9 * losses[0][0]
    assert losses[1][1] < losses[0][1]


def test_a_prefix_is_a_model_of_the_first_latents(tmp_path: Path) -> None:
    model = make(matryoshka=(5, 20, 30)).eval()
    model.calibrate(samples(dtype=torch.float32))
    some = model.prefix(20, k=3)
    assert (some.n_latents, some.k, some.matryoshka, some.training) == (20, 3, (5, 20), False)
    assert torch.equal(some.W_enc, model.W_enc[:20])
    assert torch.equal(some.latent_bias, model.latent_bias[:, :20])
    assert some.W_dec.data_ptr() != model.W_dec.data_ptr()
    x = samples(dtype=torch.float32)
    assert int(some.encode(x).indices.max()) < 20
    some.save(tmp_path / "some.safetensors")
    assert torch.equal(sf.SPARC.load(tmp_path / "some.safetensors").encode(x).values, some.encode(x).values)
    assert model.prefix(4).k == 4
    for size in (0, L + 1, 2.5):
        with pytest.raises(ValueError, match="n_latents must be between 1 and those that streams share, 40"):
            model.prefix(size)  # type: ignore[arg-type]


def test_a_prefix_under_batch_selection_fires_what_the_whole_model_fires_of_it() -> None:
    model = make("batch")
    model.learn_thresholds(samples(dtype=torch.float32))
    model.eval()
    x = samples(dtype=torch.float32)
    cut, whole = every_latent(model.prefix(20), x), every_latent(model, x)
    assert cut.any()
    assert torch.equal(cut, whole[..., :20])


def test_sizes_are_saved_with_the_model_and_stay_with_a_stream_more(tmp_path: Path) -> None:
    model = make()
    assert model.matryoshka == make(matryoshka=(5, 20, L)).matryoshka == (5, 20, L)
    model.save(tmp_path / "model.safetensors")
    assert sf.SPARC.load(tmp_path / "model.safetensors").matryoshka == (5, 20, L)
    assert model.with_stream("d", 4).matryoshka == (5, 20, L)
    assert "matryoshka" not in make(matryoshka=()).config()


@pytest.mark.parametrize("sizes", [(0, 5), (5, 5), (20, 5), (5, L + 1), (5.5,), (True, 5)], ids=str)
def test_sizes_that_do_not_ascend_within_the_dictionary_are_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="matryoshka must be integers that ascend from 1 to n_latents=40, got "):
        make(matryoshka=sizes)


def test_private_latents_are_of_one_dictionary() -> None:
    private = {"private": {"a": 4}, "private_k": 2}
    with pytest.raises(
        ValueError, match=r"matryoshka must be left out with private latents, which are the last .*, got \(5, 20, 40\)"
    ):
        make(**private)
    with pytest.raises(ValueError, match="matryoshka must be left out with private latents"):
        training_runs.config(matryoshka=[8], **private)
    shared = make(matryoshka=(), **private).prefix(36)
    assert not shared.private_latents


def test_the_public_loss_takes_sizes_and_refuses_those_that_do_not_end_in_all_latents() -> None:
    o = operands(((7, 4), 5, 9, 3), torch.float64)
    arguments = o.x, o.W_enc, o.W_dec, o.pre_bias, o.latent_bias, o.indices
    options = {"d_streams": o.d_streams, "scale": o.scale, "weights": o.weights}
    loss, nmse, _, grad_recons = sf.functional.reconstruction_loss(*arguments, **options, sizes=(2, 9))
    assert grad_recons.shape == (2, 5, 2, 11)
    assert torch.equal(nmse, sf.functional.reconstruction_loss(*arguments, **options)[1])
    assert loss.ndim == 0
    for sizes in ((9, 2), (2, 8), (-1, 9)):
        with pytest.raises(ValueError, match=r"sizes must ascend to n_latents=9, got"):
            sf.functional.reconstruction_loss(*arguments, **options, sizes=sizes)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    N=st.integers(0, 20),
    latents=st.integers(1, 30),
    data=st.data(),
    per_stream=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_sizes_and_any_slots_give_what_the_dictionaries_give_apart(
    widths: list[int], N: int, latents: int, data: st.DataObject, per_stream: bool, dtype: torch.dtype, seed: int
) -> None:
    k = data.draw(st.integers(1, latents), label="k")
    within = data.draw(st.lists(st.integers(0, latents), max_size=5), label="sizes")  # equal ones, groups of nothing
    sizes = [*sorted(within), latents]
    o = operands((tuple(widths), N, latents, k), dtype, per_stream, seed)
    empty = torch.rand(o.indices.shape, generator=seeded(seed)) < 0.3
    indices = o.indices.masked_fill(empty, -1)[..., torch.randperm(k, generator=seeded(seed))]
    o = replace(
        o, indices=indices, values=o.values.masked_fill(indices < 0 if per_stream else (indices < 0)[:, None], 0)
    )
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.05)
    truth = apart(o.to(torch.float64), sizes)
    for backend in fast_backends():
        got = nested(o, sizes, backend)
        for ours, exact in zip(got, truth, strict=True):
            scale = float(exact.abs().max()) + 1 if exact.numel() else 1
            torch.testing.assert_close(ours.to(exact.dtype), exact, rtol=0, atol=tolerance * scale)
        assert_equal(nested(o, sizes, backend), got)


def nested(o: Operands, sizes: Sequence[int], backend: str) -> tuple[Tensor, ...]:
    return operators_of(backend).nested_decode_loss(
        o.values, o.indices, o.W_dec, o.pre_bias, o.x, o.scale, o.weights, o.d_streams, sizes
    )


def apart(o: Operands, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """By autograd, from `sparse_decode` of every dictionary."""
    values, W_dec, pre_bias = (tensor.clone().requires_grad_() for tensor in (o.values, o.W_dec, o.pre_bias))
    S = len(o.d_streams)
    pairs, recons = [], []
    for size in sizes:
        kept = torch.where(o.indices < size, o.indices, -1)
        mask = (kept >= 0) if kept.ndim == 3 else (kept >= 0)[:, None]
        recons.append(reference.sparse_decode(values * mask, kept, W_dec, pre_bias))
        recons[-1].retain_grad()
        error = (recons[-1] - o.x[:, None]).split(list(o.d_streams), dim=2)
        pairs.append(
            torch.stack([(o.scale[:, t, None] * e.square().sum(2)).sum(0) for t, e in enumerate(error)], dim=1)
        )
    counted = torch.tensor(o.weights).double().view(S, S)
    nmse = torch.stack(pairs)
    (nmse * counted).sum().div(len(sizes)).backward()
    of_prefixes = torch.stack([torch.zeros_like(r) if r.grad is None else r.grad for r in recons])
    grad_recons = of_prefixes.flip(0).cumsum(0).flip(0)
    filled = (o.indices >= 0) if o.indices.ndim == 3 else (o.indices >= 0)[:, None]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (values, pre_bias)]
    return (nmse * (counted != 0)).detach(), grad_recons, grads[0] * filled, grads[1]


@pytest.mark.skipif("cpu" not in fast_backends(), reason="the CPU backend is not here")
def test_the_last_dictionary_has_the_bits_of_one_alone() -> None:
    for per_stream in (False, True):
        o = operands("several column runs", torch.float32, per_stream)
        operator = operators_of("cpu")
        one = operator.decode_loss(o.values, o.indices, o.W_dec, o.pre_bias, o.x, o.scale, o.weights, o.d_streams)
        alone, several = nested(o, [40], "cpu"), nested(o, [10, 20, 40], "cpu")
        assert_equal((alone[0][0], alone[1][0], *alone[2:]), one)
        assert torch.equal(several[0][-1], one[0])


def test_each_slot_is_in_the_group_of_its_latent() -> None:
    indices = torch.tensor([[0, 4, 5, 9], [-1, 3, 9, -1]], dtype=torch.int32)
    found = by_group(indices, (4, 5, 5, 10))
    assert found.dtype == torch.int32
    assert found.tolist() == [
        [0, -1, -1, -1], [-1, 3, -1, -1], [-1, 4, -1, -1], [-1, -1, -1, -1],
        [-1, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, 5, 9], [-1, -1, 9, -1],
    ]  # fmt: skip


def test_a_run_goes_on_bit_for_bit_and_records_every_prefix(tmp_path: Path) -> None:
    settings = {"matryoshka": [8, 24], "lazy": True}
    whole = training_runs.trained(tmp_path / "whole", **settings)
    training_runs.trained(tmp_path / "parts", **settings, steps=40)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    prefixes = [line["train"]["prefixes"] for line in lines if "train" in line]
    assert all(list(one) == ["8", "24", "64"] for one in prefixes)
    assert all(one["8"] > one["64"] for one in prefixes)
    last = [line["train"] for line in lines if "train" in line][-1]
    assert last["loss"] == pytest.approx(sum(last["prefixes"].values()) / 3 + (last["auxk"] or 0) / 32, rel=1e-4)
    model = sf.SPARC.load(tmp_path / "whole" / "model.safetensors")
    assert model.matryoshka == whole.model.matryoshka == (8, 24, 64)
    assert_equal(
        sf.SPARC.load(tmp_path / "parts" / "model.safetensors").state_dict().values(), model.state_dict().values()
    )


@pytest.mark.parametrize("sizes", [[8, 8], [24, 8], [8, 65]])
def test_settings_of_a_run_are_checked(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="matryoshka must be integers that ascend from 1 to n_latents=64"):
        training_runs.config(matryoshka=sizes)
    with pytest.raises(ValueError, match="matryoshka must be a list of integers >= 1, got "):
        Config(n_latents=64, k=3, steps=1, matryoshka=["8"])


def test_flags_give_sizes_one_after_the_other() -> None:
    parser = argparse.ArgumentParser()
    train.add_settings(parser)
    flags = ["--n-latents", "64", "--k", "3", "--steps", "1", "--matryoshka"]
    given = train.settings_of(parser.parse_args([*flags, "8", "24"]))
    assert Config.of(given).matryoshka == [8, 24]
    with pytest.raises(ValueError, match="--matryoshka must be a list of integers >= 1, got "):
        train.settings_of(parser.parse_args([*flags, "8", "many"]))


def test_sums_are_wide() -> None:
    found = nested(operands("ragged", torch.bfloat16), [10, 33], "reference")
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    assert wide(found[1]).abs().sum() > 0

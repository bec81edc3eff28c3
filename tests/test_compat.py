"""The drop-in gives the research code's numbers: its outputs, losses, gradients and counters, step after step."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from operands import seeded
from torch import Tensor
from upstream_dense import UpstreamDense, normalize, project, train_step

import sparc_fast.compat as compat

D = {"a": 7, "b": 5, "c": 6}
SELECTIONS = ("global", "local")
HELPERS = compat.unit_norm_decoder_, compat.unit_norm_decoder_grad_adjustment_


def pair(
    selection: str, dtype: torch.dtype = torch.float64, **settings: object
) -> tuple[UpstreamDense, compat.MultiStreamSparseAutoencoder]:
    """The dense model and the drop-in, with the same weights."""
    shape = {"d_streams": D, "n_latents": 48, "k": 4, "auxk": 6, "dead_steps_threshold": 4, **settings}
    backend = shape.pop("backend", "auto")
    torch.manual_seed(0)
    dense = UpstreamDense(**shape, selection=selection).to(dtype)
    model = compat.get_sae_model_class(selection)(**shape, backend=backend).to(dtype)
    model.load_state_dict(dense.state_dict())
    return dense, model


def batch(seed: int, n: int = 9, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {s: torch.randn(n, d, generator=generator, dtype=dtype) for s, d in D.items()}


def reinitialize(dense: UpstreamDense, model: compat.MultiStreamSparseAutoencoder, generator: torch.Generator) -> int:
    """What the research code's trainer does every 100 steps, to both; how many rows it was done to."""
    rows = 0
    for s, dead in model.get_dead_neurons().items():
        noise = 0.01 * torch.randn(int(dead.sum()), D[s], generator=generator, dtype=torch.float64)
        for side in (dense, model):
            side.encoders[s].weight.data[dead] = noise
            side.latent_biases[s].data[dead] = 0
            side.get_buffer(f"stats_last_nonzero_{s}")[dead] = 0
        rows += len(noise)
    return rows


def assert_close(got: Tensor, truth: Tensor, what: str) -> None:
    assert got.shape == truth.shape, what
    torch.testing.assert_close(got.double(), truth.double(), rtol=1e-9, atol=1e-11, msg=lambda m: f"{what}: {m}")


def compare_steps(steps: int, dense: UpstreamDense, model: compat.MultiStreamSparseAutoencoder) -> tuple[int, int]:
    """Train both alike; how many AuxK codes were positive, and how many rows were initialised again."""
    adams = [torch.optim.Adam(side.parameters(), lr=1e-2) for side in (dense, model)]
    generator = seeded(1)
    useful_auxk = reinitialized = 0
    for step in range(steps):
        x = batch(step)
        outputs = model(x)
        total, losses = model.compute_loss(outputs, x, 1 / 8, 0.7)
        expected_total, expected = dense.compute_loss(dense(x), x, 1 / 8, 0.7)
        assert set(losses) == set(expected)
        for name in expected:
            assert_close(losses[name], expected[name], f"step {step}, {name}")
        useful_auxk += sum(int((code.auxk_values > 0).sum()) for code in outputs.codes.values())
        for side, loss, adam in zip((dense, model), (expected_total, total), adams, strict=True):
            adam.zero_grad()
            loss.backward()
            for decoder in side.decoders.values():
                for helper in HELPERS if side is model else (normalize, project):
                    helper(decoder)
        for (name, p), (other, q) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
            assert name == other
            assert_close(p.grad, q.grad, f"step {step}, gradient of {name}")
        for adam in adams:
            adam.step()
        for (name, count), (other, truth) in zip(model.named_buffers(), dense.named_buffers(), strict=True):
            assert name == other
            assert torch.equal(count, truth), f"step {step}, {name}"
        if step % 12 == 11:
            reinitialized += reinitialize(dense, model, generator)
    return useful_auxk, reinitialized


@pytest.mark.parametrize("selection", SELECTIONS)
def test_fifty_steps_give_the_losses_gradients_and_counters_of_the_dense_model(selection: str) -> None:
    useful_auxk, reinitialized = compare_steps(50, *pair(selection))
    assert useful_auxk > 200
    assert reinitialized > 20


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_step_on_every_backend_is_that_of_the_dense_model(selection: str, backend: str) -> None:
    dense, model = pair(selection, backend=backend)
    for side in (dense, model):
        side.stats_last_nonzero_a[:20] = 9
    assert compare_steps(1, dense, model)[0] > 0


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_output_is_there_and_is_that_of_the_dense_model(selection: str) -> None:
    dense, model = pair(selection)
    for step in range(8):
        dense(batch(step))
        outputs = model(batch(step))
    assert any(code.auxk_indices.shape[1] for code in outputs.codes.values())
    x = batch(9)
    expected, outputs = dense(x), model(x)
    assert set(outputs) == set(expected)
    assert len(outputs) == len(expected)
    for name, truth in expected.items():
        if name.startswith("auxk_indices"):  # equal zeros fill up, in any order
            s = name.removeprefix("auxk_indices_")
            logits = expected[f"logits_{s}"] * (dense.get_buffer(f"stats_last_nonzero_{s}") > 4)
            if selection == "global":
                assert_close(logits.gather(1, outputs[name]), logits.gather(1, truth), name)
        elif truth.dtype in (torch.bool, torch.int64):
            assert torch.equal(outputs[name], truth), name
        else:
            assert_close(outputs[name], truth, name)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_read_is_differentiable(selection: str) -> None:
    dense, model = pair(selection)
    x = batch(0)
    for side in (dense, model):
        outputs = side(x)
        (outputs["sparse_codes_a"].square().sum() + outputs["logits_b"].square().sum()).backward()
    for name in ("encoders.a.weight", "encoders.b.weight", "pre_biases.a", "latent_biases.b"):
        assert dense.get_parameter(name).grad.abs().sum() > 0
        assert_close(model.get_parameter(name).grad, dense.get_parameter(name).grad, name)


def test_nothing_dense_is_made_until_it_is_read() -> None:
    _, model = pair("global")
    x = batch(0)
    outputs = model(x)
    model.compute_loss(outputs, x)[0].backward()
    made = [name for name, entry in outputs.data.items() if isinstance(entry, Tensor)]
    assert sorted(made) == sorted(["avg_num_active_neurons", *(name for name in outputs if "recon" in name)])
    assert outputs["mask_a"] is outputs["mask_a"]


def test_entries_that_need_old_weights_are_refused_after_a_step() -> None:
    _, model = pair("global")
    x = batch(0)
    outputs = model(x)
    early = outputs["logits_a"]
    model.compute_loss(outputs, x)[0].backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert outputs["logits_a"] is early
    assert outputs["sparse_codes_b"].shape == (9, 48)
    with pytest.raises(RuntimeError, match=r"outputs\['logits_b'\] must be read before the weights .* change"):
        outputs["logits_b"]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_seed_gives_the_weights_of_linear_layers_made_in_the_same_order(selection: str) -> None:
    torch.manual_seed(3)
    dense = UpstreamDense(D, 48, 4, selection=selection)
    after = torch.rand(1)
    torch.manual_seed(3)
    model = compat.get_sae_model_class(selection)(D, 48, 4)
    assert torch.equal(torch.rand(1), after)
    assert list(model.state_dict()) == list(dense.state_dict())
    for name, tensor in model.state_dict().items():
        if name.startswith("decoders"):
            torch.testing.assert_close(tensor, dense.state_dict()[name], rtol=3e-7, atol=0)
        else:
            assert torch.equal(tensor, dense.state_dict()[name])


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str)
def test_any_adam_takes_the_parameters_as_they_lie(options: dict[str, bool]) -> None:
    dense, model = pair("global")
    for side in (dense, model):
        adam = torch.optim.Adam(side.parameters(), lr=1e-2, **options)
        for step in range(3):
            train_step(side, adam, batch(step), helpers=())
    for name, p in model.named_parameters():
        assert_close(p, dense.get_parameter(name), name)


def test_gradients_lie_as_their_parameters_do() -> None:
    _, model = pair("global")
    model.compute_loss(model(batch(0)), batch(0))[0].backward()
    for name, p in model.named_parameters():
        assert p.grad.stride() == p.stride(), name
    assert model.decoders["a"].weight.T.is_contiguous()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).float()):
        assert other.decoders["a"].weight.T.is_contiguous()


def test_a_state_dict_of_contiguous_weights_can_be_assigned() -> None:
    dense, model = pair("global")
    model.load_state_dict(dense.state_dict(), assign=True)
    assert not model.decoders["a"].weight.T.is_contiguous()
    x = batch(0)
    total, _ = model.compute_loss(model(x), x)
    total.backward()
    expected, _ = dense.compute_loss(dense(x), x)
    assert_close(total, expected, "loss")


def test_checkpoints_of_the_global_and_the_local_class_are_interchangeable() -> None:
    _, model = pair("global")
    model(batch(0))
    other = compat.LocalMultiStreamSparseAutoencoder(D, 48, 4).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.stats_last_nonzero_a, model.stats_last_nonzero_a)
    alone = {"a": batch(0)["a"]}
    torch.testing.assert_close(other(alone)["recon_a"], model(alone)["recon_a"])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("given", [("a",), ("c", "a")], ids=" ".join)
def test_some_of_the_streams_can_be_encoded(selection: str, given: tuple[str, ...]) -> None:
    dense, model = pair(selection)
    x = {s: batch(0)[s] for s in given}
    expected, outputs = dense(x), model(x)
    assert set(outputs) == set(expected)
    for name in expected:
        if "recon" in name:
            assert_close(outputs[name], expected[name], name)
    with pytest.raises(ValueError, match=r"inputs and outputs must hold every stream \['a', 'b', 'c'\], got"):
        model.compute_loss(outputs, x)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_stream_has_no_cross_loss(selection: str) -> None:
    dense, model = pair(selection, d_streams={"a": 7}, auxk=None)
    x = {"a": batch(0)["a"]}
    _, losses = model.compute_loss(model(x), x)
    _, expected = dense.compute_loss(dense(x), x)
    assert set(losses) == set(expected)
    assert_close(losses["total_loss"], expected["total_loss"], "total")


def test_without_cross_loss_the_cross_terms_are_reported_and_not_trained_on() -> None:
    dense, model = pair("global")
    x = batch(0)
    total, losses = model.compute_loss(model(x), x, cross_loss_coef=0.0)
    expected, reported = dense.compute_loss(dense(x), x, cross_loss_coef=0.0)
    assert set(losses) == set(reported)
    assert "cross_loss_b_from_a" in losses
    assert_close(total, expected, "total")


def test_a_zero_row_makes_the_loss_infinite_as_it_does_there() -> None:
    dense, model = pair("global", torch.float32)
    x = batch(0, dtype=torch.float32)
    x["b"][2] = 0
    with torch.no_grad():
        for side in (dense, model):
            side.pre_biases["b"].fill_(0.1)
        assert dense.compute_loss(dense(x), x)[0] == torch.inf
        assert model.compute_loss(model(x), x)[0] == torch.inf


def test_auxk_with_nothing_dead_reports_one_and_pulls_the_pre_bias_alone() -> None:
    _, model = pair("global")
    x = batch(0)
    _, losses = model.compute_loss(model(x), x)
    torch.testing.assert_close(losses["avg_auxk_loss"], torch.tensor(1.0, dtype=torch.float64))
    losses["avg_auxk_loss"].backward()
    pulled = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert pulled == [f"pre_biases.{s}" for s in D]


def test_counters_move_in_eval_mode_too() -> None:
    _, model = pair("global")
    model.eval()
    with torch.no_grad():
        outputs = model(batch(0))
    assert model.stats_last_nonzero_a.min() >= 1
    assert not outputs["sparse_codes_a"].requires_grad
    assert not outputs["logits_a"].requires_grad


@pytest.mark.parametrize("selection", SELECTIONS)
def test_float32_is_no_further_from_the_truth_than_the_dense_model_over_50_steps(selection: str) -> None:
    truth, _ = pair(selection)
    dense, model = pair(selection, torch.float32)
    curves: dict[str, list[float]] = {}
    sides: Mapping[str, torch.nn.Module] = {"truth": truth, "dense": dense, "model": model}
    for name, side in sides.items():
        dtype = next(side.parameters()).dtype
        sgd = torch.optim.SGD(side.parameters(), lr=0.05)
        curves[name] = []
        for step in range(50):
            x = {s: t.to(dtype) for s, t in batch(step % 5, 32).items()}
            losses = train_step(side, sgd, x, HELPERS)
            curves[name].append(float(losses["total_loss"].detach()))
    of = {name: torch.tensor(curve, dtype=torch.float64) for name, curve in curves.items()}
    assert of["truth"][-1] < 0.9 * of["truth"][0]
    allowed = 2 * (of["dense"] - of["truth"]).abs().max() + 1e-6
    assert (of["model"] - of["truth"]).abs().max() <= allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be between 1 and n_latents=48, got 0"),
        ({"k": 49}, "k must be between 1 and n_latents=48, got 49"),
        ({"auxk": 0}, "auxk must be None or 1 … n_latents=48, got 0"),
        ({"d_streams": {}}, "d_streams must name at least one stream"),
        ({"backend": "abacus"}, "backend must be one of"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compat.MultiStreamSparseAutoencoder(**{"d_streams": D, "n_latents": 48, "k": 4, **settings})


def test_inputs_that_do_not_fit_are_named() -> None:
    _, model = pair("global", torch.float32)
    x = batch(0, dtype=torch.float32)
    for wrong, message in (
        ({"d": x["a"]}, r"inputs must hold some of the streams .*, got \['d'\]"),
        ({}, r"inputs must hold some of the streams .*, got \[\]"),
        ({**x, "b": x["c"]}, r"inputs\['b'\] must be torch.float32 \[N=9, 5\] on \S+, got .* \[9, 6\]"),
        ({**x, "b": x["b"].double()}, r"inputs\['b'\] must be .* got torch.float64 \[9, 5\]"),
        ({"a": x["a"].cpu().numpy()}, r"inputs\['a'\] must be a tensor \[N, D\], got array"),
    ):
        with pytest.raises(ValueError, match=message):
            model(wrong)
    with pytest.raises(ValueError, match="outputs must be what forward returned, got dict"):
        model.compute_loss(dict(model(x)), x)
    with pytest.raises(ValueError, match='topk_type must be "global" or "local", got \'batch\''):
        compat.get_sae_model_class("batch")


def test_the_figures_of_the_migration_guide_are_what_its_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], {})
    printed = capsys.readouterr().out
    figures = re.findall(r"[\d.]+(?:e-\d+)?(?= %|, mean| of 2048| of 6|\n)|inf", printed)
    assert len(figures) == 15
    table = guide.partition("| measured on the drop-in |")[2].partition("```")[0]
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", table), f"{figure} of {printed}"

"""SAEs of SAELens become models and streams of models SAEs, with the same codes and reconstructions.

What SAELens itself saved and computed lies in tests/recorded (record_saelens.py); test_interop.py runs the package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparc_fast as sf
from sparc_fast.interop.saelens import RELEASE, from_saelens, is_saelens, to_saelens

RECORDED = Path(__file__).parent / "recorded" / "saelens"
D = {"a": 5, "dino": 7, "b": 3}


def computed(config: dict[str, Any], weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [N, L], reconstructions [N, D]) of a TopK or JumpReLU SAE as SAELens computes them, in float64."""
    W_enc, W_dec, b_enc, b_dec = (weights[name].double() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    scale = torch.ones(1, dtype=torch.float64)
    if config["normalize_activations"] == "constant_norm_rescale":
        scale = config["d_in"] ** 0.5 / x.double().norm(dim=1, keepdim=True)
    rescaled = config.get("rescale_acts_by_decoder_norm", False)
    norms = W_dec.norm(dim=1) if rescaled else torch.ones(len(W_dec), dtype=torch.float64)
    before = ((x.double() * scale - b_dec * config["apply_b_dec_to_input"]) @ W_enc + b_enc) * norms
    if config["architecture"] == "jumprelu":
        codes = before.relu() * (before > weights["threshold"])
    else:
        best = before.topk(config["k"], dim=1)
        codes = torch.zeros_like(before).scatter_(1, best.indices, best.values.relu())
    return codes, (codes / norms @ W_dec + b_dec) / scale


def files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")


def assert_is_the_stream(folder: Path, model: sf.SPARC, stream: str, x: Tensor, unit: Tensor | float = 1) -> Tensor:
    """What SAELens makes of the folder is what the model does, codes times `unit`, and comes back; the codes."""
    codes, recons = computed(*files(folder), x)
    ours = model.encode({stream: x})
    expected = model.decode(ours, stream, stream).double()
    if stream in model.normalize:
        expected = expected * x.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(codes, ours.dense(stream).double() * unit, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recons, expected, rtol=1e-5, atol=2e-5)
    again = from_saelens(folder, stream).encode({stream: x})
    torch.testing.assert_close(again.dense(stream).double(), codes, rtol=1e-5, atol=1e-5)
    return codes


def recorded(name: str, folder: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(RECORDED / name, folder / name)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *((name, ("global", 3)) for name in ("topk", "topk_rescaled", "topk_normalized", "topk_trained")),
        ("batchtopk", ("batch", round(2.5))),
        ("batchtopk_inference", ("batch", round(2.5))),
        ("jumprelu", ("jumprelu", 16)),
    ],
)
def test_a_recorded_sae_becomes_a_model_of_the_same_codes_and_reconstructions(name: str, rule: tuple[str, int]) -> None:
    assert is_saelens(RECORDED / name)
    by_threshold, config = rule[0] != "global", files(RECORDED / name)[0]
    there = load_file(RECORDED / ("batchtopk_inference" if name == "batchtopk" else name) / "computed.safetensors")
    model = from_saelens(RECORDED / name, "resid")
    assert (model.selection, model.k, model.training) == (*rule, not by_threshold)
    result = model({"resid": there["x"]})
    size = there["x"].norm(dim=1, keepdim=True) if name == "topk_normalized" else 1
    torch.testing.assert_close(result.codes.dense("resid"), there["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.recons["resid", "resid"] * size, there["recons"], rtol=1e-5, atol=1e-5)
    assert ((there["codes"] > 0).sum(1).unique().numel() > 2) is by_threshold
    if name == "jumprelu":
        assert model.latent_threshold.unique().numel() > 2
    if config["architecture"] != "batchtopk":  # what the tests below take for SAELens
        codes, recons = computed(*files(RECORDED / name), there["x"])
        torch.testing.assert_close(codes.float(), there["codes"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(recons.float(), there["recons"], rtol=1e-5, atol=1e-5)


def test_weights_come_over_and_back_bit_for_bit_where_nothing_is_put_into_them(tmp_path: Path) -> None:
    to_saelens(from_saelens(RECORDED / "topk", "a"), tmp_path, "a")
    (theirs, before), (ours, after) = files(RECORDED / "topk"), files(tmp_path)
    assert {name: tensor.view(torch.int32).tolist() for name, tensor in before.items()} == {
        name: tensor.view(torch.int32).tolist() for name, tensor in after.items()
    }
    metadata = theirs.pop("metadata"), ours.pop("metadata")
    assert ours == theirs  # every field that SAELens writes, and no other
    assert set(metadata[0]) <= set(metadata[1])
    assert metadata[0]["sae_lens_version"] == metadata[1]["sae_lens_version"] == RELEASE


@settings(max_examples=40, deadline=None)
@given(
    selection=st.sampled_from(["global", "local"]),
    whiten=st.sampled_from([None, "none", "diag"]),
    normalize=st.sampled_from([{}, {"dino": "l2"}, {"a": "l2"}]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    stream=st.sampled_from(list(D)),
    k=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_a_stream_of_any_model_is_a_sae_of_its_codes_and_reconstructions(
    tmp_path_factory: pytest.TempPathFactory,
    selection: str,
    whiten: str | None,
    normalize: dict[str, str],
    dtype: torch.dtype,
    stream: str,
    k: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = sf.SPARC(D, 12, k, selection=selection, normalize=normalize, dtype=dtype)
    with torch.no_grad():
        model.pre_bias.normal_(std=0.3)
        model.latent_bias.normal_(std=0.3)
    x = {s: 2 * torch.randn(20, d) + 1 for s, d in D.items()}
    if whiten is not None:
        model.calibrate(x, whiten)
    folder = tmp_path_factory.mktemp("sae")
    to_saelens(model, folder, stream)
    assert_is_the_stream(folder, model, stream, x[stream])
    assert from_saelens(folder, stream).normalize == {s: how for s, how in normalize.items() if s == stream}


def test_decoder_rows_of_unit_norm_are_said_to_be_so_and_made_so_when_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sf.SPARC(D, 12, 3)
    x = {s: 5 * torch.randn(30, d) + 1 for s, d in D.items()}
    to_saelens(model, tmp_path / "plain", "dino")
    model.calibrate(x)
    to_saelens(model, tmp_path / "calibrated", "dino")
    to_saelens(model, tmp_path / "unit", "dino", unit_norm=True)
    said = [files(tmp_path / name)[0]["rescale_acts_by_decoder_norm"] for name in ("plain", "calibrated", "unit")]
    assert said == [True, False, True]
    _, weights = files(tmp_path / "unit")
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(12), rtol=1e-5, atol=0)
    assert_is_the_stream(tmp_path / "unit", model, "dino", x["dino"], model.input_rms[1])
    model.calibrate(x, "diag")
    with pytest.raises(ValueError, match=r"unit_norm \(--unit-norm\) must be asked of decoder rows of one norm"):
        to_saelens(model, tmp_path / "none", "dino", unit_norm=True)
    assert not (tmp_path / "none").exists()


def test_a_model_in_half_precision_is_written_in_float32_with_its_very_weights(tmp_path: Path) -> None:
    model = sf.SPARC(D, 12, 3, dtype=torch.bfloat16)
    to_saelens(model, tmp_path, "dino")
    config, weights = files(tmp_path)
    assert config["dtype"] == "float32"
    assert torch.equal(weights["W_dec"].bfloat16(), model.W_dec[:, 5:12])


def test_metadata_is_kept_for_the_tools_that_ask_for_it(tmp_path: Path) -> None:
    asked = {"model_name": "gpt2-small", "hook_name": "blocks.5.hook", "prepend_bos": True, "context_size": 128}
    to_saelens(sf.SPARC(D, 12, 3), tmp_path, "dino", asked)
    metadata = files(tmp_path)[0]["metadata"]
    assert {name: metadata[name] for name in asked} == asked
    assert metadata["sparc_fast_stream"] == "dino"


@pytest.mark.parametrize("selection", ["batch", "jumprelu", "local_jumprelu"])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_a_stream_of_a_model_of_thresholds_is_a_jumprelu_and_comes_back(
    unit_norm: bool, selection: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = sf.SPARC(D, 24, 3, selection=selection)
    seen, x = ({s: 5 * torch.randn(60, d) + 1 for s, d in D.items()} for _ in range(2))
    model.calibrate(seen)
    with pytest.raises(ValueError, match="must know a threshold for the streams"):
        to_saelens(model, tmp_path, "dino")
    model.learn_thresholds(seen)
    if model.latent_threshold is not None:
        with torch.no_grad():
            model.latent_threshold.normal_(std=0.3 * float(model.threshold.max()))
    to_saelens(model.eval(), tmp_path, "dino", unit_norm=unit_norm)
    config, _ = files(tmp_path)
    assert (config["architecture"], "k" in config) == ("jumprelu", False)
    codes = assert_is_the_stream(tmp_path, model, "dino", x["dino"], model.input_rms[1] if unit_norm else 1)
    assert (codes > 0).sum(1).unique().numel() > 2
    again = from_saelens(tmp_path, "dino")
    assert (again.k, again.selection) == (3, "jumprelu" if "jumprelu" in selection else "batch")


def test_a_batchtopk_whose_thresholds_were_changed_is_not_read_back_as_one_threshold(tmp_path: Path) -> None:
    folder = recorded("batchtopk_inference", tmp_path)
    _, weights = files(folder)
    weights["threshold"][0] += 1
    save_file(weights, folder / "sae_weights.safetensors")
    model = from_saelens(folder)
    assert (model.selection, model.k) == ("jumprelu", round(2.5))
    assert torch.equal(model.latent_threshold[0], weights["threshold"])
    save_file({**weights, "threshold": weights["threshold"][:-1]}, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"a threshold of each of 16 latents, got \[15\]"):
        from_saelens(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "gated", "must hold a SAE with architecture topk or batchtopk or jumprelu, got 'gated'$"),
        ("normalize_activations", "layer_norm", "got 'layer_norm': each input's own mean"),
        ("normalize_activations", "expected_average_only_in", "times a factor that is not in the folder"),
        ("normalize_activations", "covariance_whitening", "whitened by a matrix that is not in its weights"),
        ("dtype", "int8", "dtype float32 or .*, got 'int8'"),
        ("k", 17, "k must be between 1 and n_latents=16, got 17"),
        ("k", None, "must hold a whole SAE, but .* lacks 'k'"),
        ("k", 2.5, "n_latents, k, .* must be integers"),
        ("d_sae", 15, r"weights \{'W_enc': \[6, 15\], .* has \{.*\[6, 16\]"),
    ],
)
def test_a_configuration_that_a_model_cannot_have_is_refused(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    folder = recorded("topk", tmp_path)
    config = files(folder)[0]
    if value is None:
        del config[field]
    else:
        config[field] = value
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        from_saelens(folder)


def test_truncated_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    folder = recorded("topk", tmp_path)
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:-1], b"text"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"sae_weights\.safetensors is truncated or foreign"):
            from_saelens(folder)
    save_file({"W_enc": torch.zeros(6, 16)}, weights)
    with pytest.raises(ValueError, match=r"must hold the weights .* has \{'W_enc': \[6, 16\]\}"):
        from_saelens(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*sae_weights\.safetensors"):
        from_saelens(folder)
    for content in ("{", "[1]"):
        (folder / "cfg.json").write_text(content)
        with pytest.raises(ValueError, match="folder's configuration must"):
            from_saelens(folder)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*cfg\.json"):
        from_saelens(tmp_path)
    assert not is_saelens(tmp_path)


def test_a_stream_that_is_none_and_a_rule_that_saelens_lacks_are_refused(tmp_path: Path) -> None:
    model = sf.SPARC(D, 12, 3)
    with pytest.raises(ValueError, match=r"stream must be one of the streams .* got 'clip'"):
        to_saelens(model, tmp_path / "sae", "clip")
    model.selection = "nested"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"model must have the selection global or local or batch or .*, got 'nested'"):
        to_saelens(model, tmp_path / "sae", "dino")
    assert not (tmp_path / "sae").exists()


def test_reading_a_sae_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    from_saelens(RECORDED / "topk")
    assert torch.equal(torch.get_rng_state(), before)

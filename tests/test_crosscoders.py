"""Crosscoders of dictionary_learning become models of the same activations and reconstructions, or say why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_convert import Trap
from torch import Tensor

from sparc_fast.interop.crosscoders import from_crosscoder

LAYERS, D, L, K, N = 3, 5, 24, 4, 15
IDS = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4, "DECOUPLED": 5}


def crosscoder(
    normalization: str = "CROSSCODER", centred: bool = True, reads: int = LAYERS, seed: int = 0
) -> dict[str, Tensor]:
    """A state_dict as the package's BatchTopKCrossCoder has it."""
    torch.manual_seed(seed)
    std = torch.rand(LAYERS, D) + 0.2 if centred else torch.full((LAYERS, D), torch.nan)
    return {
        "encoder.weight": torch.randn(reads, D, L),
        "encoder.bias": 0.3 * torch.randn(L),
        "decoder.weight": torch.randn(LAYERS, L, D) * torch.rand(LAYERS, L, 1),
        "decoder.bias": torch.randn(LAYERS, D),
        "activation_mean": 3 * torch.randn(LAYERS, D) if centred else torch.full((LAYERS, D), torch.nan),
        "activation_std": std,
        "activation_global_scale": 2 / std.square().sum(1).sqrt() if centred else torch.ones(LAYERS),
        "target_rms": torch.tensor(2.0),
        "code_normalization_id": torch.tensor(IDS[normalization]),
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": torch.tensor(0.7),
    }


def computed(
    there: dict[str, Tensor],
    x: Tensor,
    reads: list[int],
    alphas: tuple[float, float] = (1.0, 0.1),
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(get_activations [N, L], reconstructions [N, layers, D]) of samples one at a time, in float64."""
    t = {name: tensor.double() for name, tensor in there.items()}
    centred = not bool(t["activation_mean"].isnan().any())
    scale = t["activation_global_scale"][:, None]
    inside = (x.double() - t["activation_mean"]) * scale if centred else x.double()
    post = (torch.einsum("nld, ldf -> nf", inside[:, reads], t["encoder.weight"]) + t["encoder.bias"]).relu()
    sae, cc = t["decoder.weight"].norm(dim=(0, 2)), t["decoder.weight"].norm(dim=2).sum(0)
    norms = [cc, sae, alphas[0] * sae + alphas[1] * cc, torch.ones_like(cc)][int(t["code_normalization_id"]) - 1]
    best = (post * norms).topk(K).indices
    f = torch.zeros_like(post).scatter_(1, best, post.gather(1, best))
    if threshold is not None:
        f = post * (post * norms > threshold)
    recons = torch.einsum("nf, lfd -> nld", f, t["decoder.weight"]) + t["decoder.bias"]
    return f * norms, recons / (scale + 1e-8) + t["activation_mean"] if centred else recons


def write(tensors: dict[str, Tensor], folder: Path, config: dict[str, Any] | None = None) -> Path:
    """The folder that huggingface_hub's mixin saves."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {"dict_class": "BatchTopKCrossCoder"}))
    return folder


@settings(max_examples=30, deadline=None)
@given(
    normalization=st.sampled_from(list(IDS)[:4]),
    centred=st.booleans(),
    reads=st.sampled_from([[0, 1, 2], [0, 2]]),
    seed=st.integers(0, 9),
)
def test_a_crosscoder_is_a_model_of_its_layers_side_by_side(
    tmp_path_factory: pytest.TempPathFactory, normalization: str, centred: bool, reads: list[int], seed: int
) -> None:
    there = crosscoder(normalization, centred, len(reads), seed)
    config = {"encoder_layers": reads if len(reads) < LAYERS else None, "code_normalization_alpha_sae": 0.5}
    model = from_crosscoder(write(there, tmp_path_factory.mktemp("crosscoder"), config), topk=True)
    assert (model.d_streams, model.n_latents, model.k) == ({"layers": LAYERS * D}, L, K)
    x = 2 * torch.randn(N, LAYERS, D) + 1
    activations, recons = computed(there, x, reads, (0.5, 0.1))
    result = model({"layers": x.flatten(1)})
    size = max(1.0, activations.max().item(), recons.abs().max().item())
    torch.testing.assert_close(result.codes.dense("layers").double(), activations, rtol=1e-5, atol=2e-6 * size)
    torch.testing.assert_close(
        result.recons["layers", "layers"].view_as(x).double(), recons, rtol=1e-5, atol=2e-6 * size
    )


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_that_encodes_a_single_layer_is_a_model_of_a_stream_a_layer(layer: int, tmp_path: Path) -> None:
    there, names = crosscoder(reads=1), ["early", "middle", "late"]
    torch.save(there, tmp_path / "ae.pt")
    model = from_crosscoder(tmp_path / "ae.pt", {"encoder_layers": [layer]}, topk=True, streams=names)
    x = 2 * torch.randn(N, LAYERS, D) + 1
    activations, recons = computed(there, x, [layer])
    source = names[layer]
    code = model.encode({source: x[:, layer]})
    torch.testing.assert_close(code.dense(source).double(), activations, rtol=1e-5, atol=1e-5)
    together = model.encode({name: x[:, i] for i, name in enumerate(names)})
    assert torch.equal(together.dense(source), code.dense(source))  # the other layers have no say
    for target, truth in zip(names, recons.unbind(1), strict=True):
        ours = model.translate({source: x[:, layer]}, source, target)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    assert from_crosscoder(tmp_path / "ae.pt", {"encoder_layers": [layer]}, topk=True).streams == (
        "layer_0", "layer_1", "layer_2",
    )  # fmt: skip


def test_older_files_and_those_of_compiled_models_are_read(tmp_path: Path) -> None:
    there = crosscoder(centred=False)
    old = {n: t for n, t in there.items() if not n.startswith(("activation", "target", "code"))}
    x = torch.randn(N, LAYERS * D)
    expected = from_crosscoder(write(there, tmp_path / "new"), topk=True).encode({"layers": x})
    torch.save(old, tmp_path / "old.pt")
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in there.items()}, tmp_path / "compiled.pt")
    for name in ("old.pt", "compiled.pt"):
        codes = from_crosscoder(tmp_path / name, topk=True).encode({"layers": x})
        assert torch.equal(codes.values, expected.values)
        assert torch.equal(codes.indices, expected.indices)


@pytest.mark.parametrize("normalization", ["CROSSCODER", "NONE"])
@pytest.mark.parametrize("threshold", [-1.0, 0.7, 8.0])
@pytest.mark.parametrize("reads", [[0, 1, 2], [2]])
def test_by_default_what_is_above_the_threshold_fires(
    normalization: str, threshold: float, reads: list[int], tmp_path: Path
) -> None:
    there = {**crosscoder(normalization, reads=len(reads)), "threshold": torch.tensor(threshold)}
    model = from_crosscoder(write(there, tmp_path / "batch", {"encoder_layers": reads}))
    assert (model.selection, model.k, model.training) == ("batch", K, False)
    x = 2 * torch.randn(N, LAYERS, D) + 1
    activations, recons = computed(there, x, reads, threshold=threshold)
    source, inputs = ("layers", {"layers": x.flatten(1)}) if len(reads) > 1 else ("layer_2", {"layer_2": x[:, 2]})
    code = model.encode(inputs)
    torch.testing.assert_close(code.dense(source).double(), activations, rtol=1e-5, atol=2e-5)
    if len(reads) == 1:
        together = model.encode({f"layer_{i}": x[:, i] for i in range(LAYERS)})
        assert torch.equal(together.dense(source), code.dense(source))
        torch.testing.assert_close(model.decode(code, source, "layer_0").double(), recons[:, 0], rtol=1e-5, atol=2e-5)
    else:
        ours = model.decode(code, source, source).view_as(x)
        torch.testing.assert_close(ours.double(), recons, rtol=1e-5, atol=5e-5)


def test_one_without_a_threshold_fires_above_zero(tmp_path: Path) -> None:
    there = crosscoder()
    plain = {name: tensor for name, tensor in there.items() if name not in ("k", "threshold")}
    model = from_crosscoder(write(plain, tmp_path / "plain", {"dict_class": "CrossCoder"}))
    x = 2 * torch.randn(N, LAYERS, D) + 1
    activations, recons = computed(there, x, list(range(LAYERS)), threshold=0.0)
    assert activations.count_nonzero(1).max() > K
    code = model.encode({"layers": x.flatten(1)})
    torch.testing.assert_close(code.dense("layers").double(), activations, rtol=1e-5, atol=2e-5)
    ours = model.decode(code, "layers", "layers").view_as(x)
    torch.testing.assert_close(ours.double(), recons, rtol=1e-5, atol=5e-5)
    with pytest.raises(
        ValueError, match=r"topk must be False for .*, which has no k: every latent above 0 fires there"
    ):
        from_crosscoder(tmp_path / "plain", topk=True)


def test_the_folder_of_a_training_run_is_read(tmp_path: Path) -> None:
    there, alphas = crosscoder("MIXED", reads=2), {"code_normalization_alpha_sae": 0.5}
    run = tmp_path / "run"
    run.mkdir()
    torch.save(there, run / "model_final.pt")
    trainer = {"dict_class": "BatchTopKCrossCoder", **alphas, "dict_class_kwargs": {"encoder_layers": [0, 2]}}
    (run / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    expected = from_crosscoder(write(there, tmp_path / "saved", {"encoder_layers": [0, 2], **alphas}))
    read = from_crosscoder(run)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_what_no_model_here_can_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DECOUPLED: each layer has a support and a threshold of its own"):
        from_crosscoder(write(crosscoder("DECOUPLED"), tmp_path / "a"), topk=True)
    with pytest.raises(ValueError, match=r"encoder of 3: it has one activation a latent, relu\(sum over layers\)"):
        from_crosscoder(write(crosscoder(), tmp_path / "b"), topk=True, streams=["x", "y", "z"])
    one = write(crosscoder(reads=1), tmp_path / "c")
    with pytest.raises(ValueError, match=r"config must give encoder_layers, 1 of the 3 layers .* got None"):
        from_crosscoder(one, topk=True)
    for wrong in ([3], [0, 1]):
        with pytest.raises(ValueError, match="config must give encoder_layers"):
            from_crosscoder(one, {"encoder_layers": wrong}, topk=True)
    with pytest.raises(ValueError, match="streams must be the names of 3 layers of which the encoder reads one"):
        from_crosscoder(one, {"encoder_layers": [0]}, topk=True, streams=["x"])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("encoder.weight", None, "has no encoder.weight and decoder.weight of three dimensions"),
        ("encoder.bias", torch.zeros(L + 1), r"has \{'encoder.bias': \(25,\)\} where"),
        ("decoder.bias", None, r"has \{'decoder.bias': None\} where"),
        ("activation_std", torch.zeros(LAYERS), r"has \{'activation_std': \(3,\)\} where"),
        ("encoder.projections.0.weight", torch.zeros(1), r"has \['encoder.projections.0.weight'\] besides"),
        ("code_normalization_id", torch.tensor(9), "one support for all layers, got code normalization 9"),
        ("k", torch.tensor(L + 1), "k must be between 1 and n_latents=24, got 25"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(name: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    there = crosscoder()
    if tensor is None:
        del there[name]
    else:
        there[name] = tensor
    with pytest.raises(ValueError, match=message):
        from_crosscoder(write(there, tmp_path / "a"), topk=True)


def test_pickles_are_never_run_and_foreign_files_refused(tmp_path: Path) -> None:
    torch.save({"encoder.weight": Trap(tmp_path / "sprung")}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="path must hold tensors alone"):
        from_crosscoder(tmp_path / "ae.pt", topk=True)
    assert not (tmp_path / "sprung").exists()
    folder = write(crosscoder(), tmp_path / "a")
    (folder / "model.safetensors").write_bytes(b"text")
    with pytest.raises(ValueError, match="truncated or foreign"):
        from_crosscoder(folder, topk=True)
    (folder / "config.json").write_text("{")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*model\.safetensors"):
        from_crosscoder(folder, topk=True)
    save_file(crosscoder(), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"config must be JSON, but .*config\.json is not"):
        from_crosscoder(folder, topk=True)

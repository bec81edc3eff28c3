"""Crosscoders of dictionary_learning as models, where the mathematics agrees.

They are `CrossCoder` and `BatchTopKCrossCoder` in dictionary.py of the fork github.com/science-of-finetuning, with the
files that its mixin and its trainSAE write; saprmarks/dictionary_learning has the first, without norms and statistics.

A crosscoder has one activation a latent, relu(sum over layers), that all layers are reconstructed from. So it is a
model of one stream, its layers side by side; and of a stream a layer only where its encoder reads one layer, since a
stream of ours has an activation of its own. Its activations here are those of `get_activations`, times the norms of
decoder weights by which it chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc_fast.files import as_path, read_object
from sparc_fast.model import SPARC

from .weights import LIKELY_K, known_threshold, load_tensors, model_of

__all__ = ["from_crosscoder"]

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model_final.pt")  # as save_pretrained and as trainSAE write them
NORMALIZATIONS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
COMPILED = "_orig_mod."  # before the names of a model that was saved while it was compiled
EPSILON = 1e-8  # of its `denormalize_activations`
STATISTICS = ("activation_mean", "activation_std", "activation_global_scale")
OPTIONAL = {"k", "threshold", "code_normalization_id", "target_rms", *STATISTICS}


def from_crosscoder(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    topk: bool = False,
    streams: Sequence[str] | None = None,
) -> SPARC:
    """The model of a crosscoder: its activations and reconstructions, to rounding.

    Args:
        path: a state_dict (``.pt``, ``.safetensors``), or the folder of ``save_pretrained`` or of a training run.
            Pickled objects other than tensors are never loaded.
        config: ``config.json`` or its content; by default the one in the folder. It says what weights do not:
            ``encoder_layers`` and, of MIXED normalization, the shares. Of weights that do not say it either, the
            normalization is CROSSCODER, as it is there.
        topk: the k largest activations of each sample fire, as ``encode(x, use_threshold=False)`` has it of one sample.
            By default what is above the threshold does, as there: a BatchTopK model, in eval mode. A crosscoder without
            one fires above 0; how many that are is not in its files: set ``model.k`` to train it further.
        streams: names of the layers, where the encoder reads one of them: ``model.translate`` goes from that to any. Of
            other crosscoders the model has one stream, "layers": ``x.flatten(1)`` of x [N, layers, D].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or foreign, or a model here cannot be that crosscoder exactly; the message says why.
    """
    path = as_path(path, "path")
    tensors = _read(path)
    settings = _settings(path, config)
    normalization = _check(tensors, settings, path)
    if topk and "k" not in tensors:
        raise ValueError(f"topk must be False for {path}, which has no k: every latent above 0 fires there, got True")
    W_enc, W_dec, b_dec = (tensors[name].double() for name in ("encoder.weight", "decoder.weight", "decoder.bias"))
    layers, L, D = W_dec.shape
    reads = _layers_read(settings, len(W_enc), layers, path)
    if streams is not None and (len(reads) > 1 or len(streams) != layers):
        raise ValueError(
            f"streams must be the names of {layers} layers of which the encoder reads one, got {list(streams)} and an "
            f"encoder of {len(reads)}: it has one activation a latent, relu(sum over layers), and streams of a model "
            "would each have their own"
        )
    mean, scale, back = _centre(tensors)
    norms = _norms(W_dec, normalization, settings)
    encoder = W_dec.new_zeros(layers, D, L)
    encoder[reads] = W_enc * scale[reads, None, None] * norms
    decoder = W_dec / back[:, None, None] / torch.where(norms > 0, norms, 1.0)[:, None]
    moved = b_dec / back[:, None]  # our encoder subtracts the pre-bias, theirs the mean alone
    latent_bias = tensors["encoder.bias"].double() * norms + torch.einsum("ndl, nd -> l", encoder, moved)

    names = ["layers"] if len(reads) > 1 else list(streams or [f"layer_{i}" for i in range(layers)])
    widths = {name: layers * D // len(names) for name in names}
    bias = W_dec.new_zeros(len(names), L)
    bias[0 if len(names) == 1 else reads[0]] = latent_bias
    state = {} if topk else known_threshold(float(tensors.get("threshold", 0)), len(names))
    weights = {
        "W_enc": encoder.permute(2, 0, 1).flatten(1),
        "W_dec": decoder.permute(1, 0, 2).flatten(1),
        "pre_bias": (moved + mean).flatten(),
        "latent_bias": bias,
    }
    k, rule = int(tensors.get("k", min(LIKELY_K, L))), "global" if topk else "batch"
    model = model_of({**weights, **state}, widths, L, k, selection=rule, dtype=tensors["encoder.weight"].dtype)
    return model if topk else model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        path = next((file for name in WEIGHTS if (file := path / name).is_file()), path / WEIGHTS[0])
    tensors = load_tensors(path, "path must be a crosscoder of dictionary_learning")
    return {name.rpartition(COMPILED)[2]: tensor for name, tensor in tensors.items()}


def _settings(path: Path, config: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not isinstance(config, Mapping):
        file = path / CONFIG if config is None else Path(config)
        if config is None and not file.is_file():
            return {}
        config = read_object(file, "config")
    of_run = config.get("trainer", config)  # which has what its crosscoder was made with
    return {**of_run, **of_run.get("dict_class_kwargs", {})}


def _check(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], path: Path) -> str:
    """Raise unless these are a crosscoder's weights; by which norms it chooses."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    encoder, decoder = shapes.get("encoder.weight", ()), shapes.get("decoder.weight", ())
    if len(encoder) != 3 or len(decoder) != 3:
        raise ValueError(
            f"path must be a CrossCoder of dictionary_learning, but {path} has no encoder.weight and decoder.weight of "
            f"three dimensions; its first keys are {list(tensors)[:4]}"
        )
    (_, D, L), layers = encoder, decoder[0]
    expected = {"encoder.weight": encoder, "encoder.bias": (L,)}
    expected |= {"decoder.weight": (layers, L, D), "decoder.bias": (layers, D)}
    if "activation_mean" in shapes:
        expected |= zip(STATISTICS, ((layers, D), (layers, D), (layers,)), strict=True)
    wrong = {name: shapes.get(name) for name, shape in expected.items() if shapes.get(name) != shape}
    if wrong or (unknown := sorted(set(shapes) - set(expected) - OPTIONAL)):
        raise ValueError(
            f"path must be a CrossCoder of dictionary_learning, but {path} has "
            + (f"{wrong} where {expected} is expected" if wrong else f"{unknown} besides")
        )
    number = tensors.get("code_normalization_id")
    said = settings.get("code_normalization", "CROSSCODER") if number is None else int(number)
    name = NORMALIZATIONS.get(said, str(said)).upper()
    if name == "DECOUPLED" or name not in NORMALIZATIONS.values():
        reason = ": each layer has a support and a threshold of its own" if name == "DECOUPLED" else ""
        raise ValueError(
            f"path must be a crosscoder of one support for all layers, got code normalization {name}{reason}"
        )
    return name


def _layers_read(settings: Mapping[str, Any], count: int, layers: int, path: Path) -> list[int]:
    """The layers that the encoder reads."""
    reads = settings.get("encoder_layers")
    if reads is None and count == layers:
        return list(range(layers))
    if reads is None or len(reads) != count or not set(reads) <= set(range(layers)):
        raise ValueError(
            f"config must give encoder_layers, {count} of the {layers} layers that {path} reconstructs, got {reads}"
        )
    return list(reads)


def _centre(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Activations become (x - mean) * scale, reconstructions y / back + mean: [layers, D], [layers], [layers].

    Without statistics, which it marks as NaN, they stay.
    """
    mean, deviation, scale = (tensors[name].double() if name in tensors else None for name in STATISTICS)
    if mean is None or deviation is None or scale is None or bool(mean.isnan().any() or deviation.isnan().any()):
        b_dec = tensors["decoder.bias"].double()
        one = torch.ones_like(b_dec[:, 0])
        return torch.zeros_like(b_dec), one, one
    return mean, scale, scale + EPSILON


def _norms(W_dec: Tensor, normalization: str, settings: Mapping[str, Any]) -> Tensor:
    """[L]: what activations are multiplied by before the largest are chosen."""
    of_all: Tensor = W_dec.norm(dim=(0, 2))
    of_layers: Tensor = W_dec.norm(dim=2).sum(0)
    if normalization == "MIXED":
        shares = (("sae", 1.0), ("cc", 0.1))
        of_sae, of_cc = (float(settings.get(f"code_normalization_alpha_{name}", usual)) for name, usual in shares)
        return of_sae * of_all + of_cc * of_layers
    return {"SAE": of_all, "CROSSCODER": of_layers, "NONE": torch.ones_like(of_all)}[normalization]

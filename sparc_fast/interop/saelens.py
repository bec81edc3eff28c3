"""SAELens' folders, ``cfg.json`` and ``sae_weights.safetensors``, in the format of its release 6.54: to ours and back.

A stream of a model is a TopK, BatchTopK or JumpReLU SAE: by itself it has a support of its own, under global selection
too. Weights go over bit for bit where nothing needs to be put into them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc_fast.files import as_path, atomic_path, read_object, write_text
from sparc_fast.model import SPARC
from sparc_fast.selection import BY_THRESHOLD
from sparc_fast.version import __version__

from .weights import LIKELY_K, known_threshold, load_tensors, model_of, stream_weights

__all__ = ["from_saelens", "is_saelens", "to_saelens"]

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
EXPECTED = "folder must hold a SAE as SAELens saves it"
RELEASE = "6.54.12"
"""Of SAELens; it reads a configuration by the release that it says wrote it."""
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
Fields = dict[str, Any]
Tensors = dict[str, Tensor]


def _as_topk(model: SPARC, stream: str, unit_norm: bool) -> tuple[Fields, Tensors]:
    return {"architecture": "topk", "k": model.k, "rescale_acts_by_decoder_norm": unit_norm}, {}


def _as_jumprelu(model: SPARC, stream: str, unit_norm: bool) -> tuple[Fields, Tensors]:
    """A BatchTopK as SAELens saves its own, which has one threshold for all latents."""
    of_all = model._all_thresholds().of((stream,))
    trained = "batchtopk" if model.latent_threshold is None else "jumprelu"
    metadata = {"training_architecture": trained, "training_architecture_details": {"k": model.k}}
    of_latents = torch.full((model.n_latents,), of_all, dtype=torch.float64, device="cpu")
    if model.latent_threshold is not None:
        of_latents += model.latent_threshold[model.streams.index(stream)].detach().double().cpu()
    return {"architecture": "jumprelu", "metadata": metadata}, {"threshold": of_latents}


WRITERS: dict[str, Callable[[SPARC, str, bool], tuple[Fields, Tensors]]] = {
    "global": _as_topk,
    "local": _as_topk,
    "batch": _as_jumprelu,
    "jumprelu": _as_jumprelu,
    "local_jumprelu": _as_jumprelu,
}
"""Selection -> the architecture that one stream is, and what its configuration and weights have besides, the latter in
the units of codes; these depend on whether decoder rows have unit norm."""
SAME = 1e-5  # what norms of decoder rows may differ by, relatively, to count as one


def _of_topk(config: Fields, tensors: Tensors) -> tuple[Fields, Tensors]:
    return {"k": config["k"]}, {}


def _of_batchtopk(config: Fields, tensors: Tensors) -> tuple[Fields, Tensors]:
    return _batch(config["k"], tensors.pop("topk_threshold"))


def _of_jumprelu(config: Fields, tensors: Tensors) -> tuple[Fields, Tensors]:
    """Of one that was trained as BatchTopK, and has one threshold for all latents, our BatchTopK."""
    threshold, metadata = tensors.pop("threshold"), config.get("metadata") or {}
    details = metadata.get("training_architecture_details") or {}
    k = details.get("k", min(LIKELY_K, config["d_sae"]))
    if list(threshold.shape) != [config["d_sae"]]:
        raise ValueError(
            f"folder must hold a threshold of each of {config['d_sae']} latents, got {list(threshold.shape)}"
        )
    if (
        metadata.get("training_architecture") == "batchtopk"
        and "k" in details
        and bool((threshold == threshold[0]).all())
    ):
        return _batch(k, threshold[0])
    return {"k": max(1, round(k)), "selection": "jumprelu"}, {"latent_threshold": threshold[None], **known_threshold(0)}


def _batch(k: float, threshold: Tensor) -> tuple[Fields, Tensors]:
    return {"k": max(1, round(k)), "selection": "batch"}, known_threshold(float(threshold))


READERS: dict[str, Callable[[Fields, Tensors], tuple[Fields, Tensors]]] = {
    "topk": _of_topk,
    "batchtopk": _of_batchtopk,
    "jumprelu": _of_jumprelu,
}
"""Architecture -> what our model of it is made with, and its state besides weights; takes what it reads of tensors."""
REFUSED = {
    "expected_average_only_in": "it expects inputs times a factor that is not in the folder; "
    "fold_activation_norm_scaling_factor and save_model put it into the weights",
    "layer_norm": "each input's own mean and deviation are taken out of it, for which a model here has no place",
    "covariance_whitening": "it expects inputs whitened by a matrix that is not in its weights; "
    "fold_activation_whitening and save_model put it there",
}
"""Normalization of inputs -> why a model here cannot be that."""


def is_saelens(path: str | Path) -> bool:
    """Whether this is a folder as SAELens saves a SAE."""
    return (Path(path) / CONFIG).is_file()


def to_saelens(
    model: SPARC,
    folder: str | Path,
    stream: str,
    metadata: Mapping[str, Any] | None = None,
    *,
    unit_norm: bool = False,
) -> None:
    """Write one stream as a SAE that ``sae_lens.SAE.load_from_disk(folder)`` loads: TopK, or JumpReLU, also of a
    BatchTopK model as it is in eval mode: of one threshold, as SAELens saves its own.

    Codes and reconstructions there are those of ``model.encode({stream: x})``, to rounding, calibration included. Where
    the model normalizes the stream's rows, so does SAELens ("constant_norm_rescale"), and its reconstructions are times
    the norm of the input, of which a row of zeros has none. To SAELens a row of zeros is an input like others; to a
    calibrated model it is absent. A model in half precision is written, and computes there, in float32.

    Args:
        folder: is made; SAELens' two files in it are replaced.
        metadata: what dashboards and tools ask of a SAE, such as ``model_name``, ``hook_name``, ``context_size``,
            ``prepend_bos``, ``dataset_path`` or ``neuronpedia_id``.
        unit_norm: decoder rows get unit norm, and codes are times the norm that they had: the stream's rms, where the
            model is calibrated. SAE Dashboard asks for it (`fold_W_dec_norm`); a model that is not calibrated has it.

    Raises:
        ValueError: the model has no such stream, or chooses latents in a way that SAELens does not; or `unit_norm` is
            asked of decoder rows of several norms, where other latents would be the largest.
    """
    from safetensors.torch import save_file

    if model.selection not in WRITERS:
        raise ValueError(f"model must have the selection {' or '.join(WRITERS)}, got {model.selection!r}")
    if model.private_latents:
        raise ValueError(
            "model must have no private latents: a SAE of SAELens chooses among all of its latents alike, not some of "
            f"these and some of those, got {model.config()['private']}"
        )
    # in half precision each side would round elsewhere
    dtype = model.W_enc.dtype if model.W_enc.dtype == torch.float64 else torch.float32
    # rows that it normalizes have the norm sqrt(D) there
    unit = math.sqrt(model.d_streams[stream]) if stream in model.normalize else 1.0
    W_enc, W_dec, pre_bias, latent_bias = stream_weights(model, stream, unit=unit, dtype=dtype)
    norms = W_dec.double().norm(dim=1)
    norm = float(norms.mean())
    if unit_norm and bool(((norms - norm).abs() > SAME * norm).any()):
        raise ValueError(
            "unit_norm (--unit-norm) must be asked of decoder rows of one norm: once activations are times theirs, "
            f"others are the largest, got norms of {norms.min():.3g} to {norms.max():.3g}"
        )
    if unit_norm:
        W_enc, W_dec, latent_bias = W_enc * norm, W_dec / norm, latent_bias * norm
    has_unit_norm = unit_norm or bool(((norms - 1).abs() <= SAME / 10).all())
    fields, of_codes = WRITERS[model.selection](model, stream, has_unit_norm)
    chosen_by = {name: (tensor * (norm if unit_norm else 1)).to(dtype) for name, tensor in of_codes.items()}
    config = {
        "d_in": model.d_streams[stream],
        "d_sae": model.n_latents,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "constant_norm_rescale" if stream in model.normalize else "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": RELEASE,
            "sae_lens_training_version": None,
            "sparc_fast_version": __version__,
            "sparc_fast_stream": stream,
            **fields.pop("metadata", {}),
            **(metadata or {}),
        },
        **fields,
    }
    text = json.dumps(config, indent=2)
    tensors = {"W_enc": W_enc.T, "W_dec": W_dec, "b_enc": latent_bias, "b_dec": pre_bias, **chosen_by}
    folder = as_path(folder, "folder")
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, temporary
        )
    write_text(folder / CONFIG, text + "\n")


def from_saelens(folder: str | Path, stream: str = "activations") -> SPARC:
    """The model of one stream that is a SAE of SAELens: same codes, and same reconstructions, to rounding.

    A BatchTopK SAE, also saved as JumpReLU, fires above its threshold in eval mode, in which the model comes. So
    does a JumpReLU above its latents'; how many that are is not in its folder: set ``model.k`` to train it further.

    Of a SAE with ``normalize_activations="constant_norm_rescale"`` the model normalizes rows, and reconstructions are
    of those (`SPARC.normalized`). Inputs of a ``hook_z`` SAE are those of all heads side by side.

    Args:
        folder: with ``cfg.json`` and ``sae_weights.safetensors``.
        stream: what the model calls its inputs.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: they are truncated or foreign, or hold a SAE that our model cannot be exactly; the message says why.
    """
    folder = as_path(folder, "folder")
    config = read_object(folder / CONFIG, "folder's configuration")
    architecture = str(config.get("architecture"))
    normalization = str(config.get("normalize_activations", "none"))
    for name, got, known in (
        ("architecture", architecture, tuple(READERS)),
        ("normalize_activations", normalization, ("none", "constant_norm_rescale")),
    ):
        if got not in known:
            reason = f": {REFUSED[got]}" if got in REFUSED else ""
            raise ValueError(f"folder must hold a SAE with {name} {' or '.join(known)}, got {got!r}{reason}")
    dtype = DTYPES.get(str(config.get("dtype", "float32")).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"folder must hold a SAE with dtype {' or '.join(DTYPES)}, got {config['dtype']!r}")
    # as SAELens does, all in the type that the configuration names
    tensors = {name: tensor.to(dtype) for name, tensor in load_tensors(folder / WEIGHTS, EXPECTED).items()}
    try:
        arguments, state = READERS[architecture](config, tensors)
        _check_weights(tensors, config, folder / WEIGHTS)
    except KeyError as error:
        raise ValueError(f"folder must hold a whole SAE, but {folder} lacks {error}") from error
    W_enc, W_dec, b_enc, b_dec = tensors["W_enc"].T, tensors["W_dec"], tensors["b_enc"], tensors["b_dec"]
    if config.get("rescale_acts_by_decoder_norm", False):
        norms = W_dec.double().norm(dim=1).clamp_min(1e-8)  # activations are those of a decoder of unit norm
        W_enc, W_dec, b_enc = W_enc * norms[:, None], W_dec / norms[:, None], b_enc * norms
    if normalization == "constant_norm_rescale":
        unit = math.sqrt(config["d_in"])
        W_enc, W_dec, b_dec = W_enc.double() * unit, W_dec.double() / unit, b_dec.double() / unit
    if not config.get("apply_b_dec_to_input", True):
        b_enc = b_enc + W_enc.double() @ b_dec.double()  # our encoder subtracts it
    weights = {"W_enc": W_enc, "W_dec": W_dec, "pre_bias": b_dec, "latent_bias": b_enc[None]}
    normalize = "none" if normalization == "none" else "l2"
    shape = {stream: config["d_in"]}, config["d_sae"]
    model = model_of({**weights, **state}, *shape, **arguments, normalize=normalize, dtype=dtype)
    return model.eval() if model.selection in BY_THRESHOLD else model


def _check_weights(tensors: Tensors, config: Fields, path: Path) -> None:
    D, L = config["d_in"], config["d_sae"]
    expected = {"W_enc": [D, L], "W_dec": [L, D], "b_enc": [L], "b_dec": [D]}
    got = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if got != expected:
        raise ValueError(f"folder must hold the weights {expected}, as {CONFIG} has it, but {path} has {got}")

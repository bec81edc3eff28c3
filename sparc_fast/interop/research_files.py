"""The research code's files: its checkpoints to ours and back, and its JSON configurations.

Its checkpoint is a pickled state_dict, ``msae_checkpoint.pth``, of weights alone; k, AuxK and the kind of TopK stand in
``run_config.json`` beside it. Weights go over bit for bit. Its counters are batches for which a stream's latent was
silent, ours are samples for which no stream fired it: latents dead in all of them stay dead, and
counts per stream are lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparc_fast.files import as_path, atomic_path, read_object, write_text
from sparc_fast.model import SPARC
from sparc_fast.selection import BY_THRESHOLD

from .weights import load_tensors, model_of, stream_weights

__all__ = ["UpstreamConfig", "from_upstream", "read_config", "to_upstream"]

RUN_CONFIG = "run_config.json"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class UpstreamConfig:
    """What a research-code configuration says; its defaults where it says nothing."""

    n_latents: int | None = None
    """None where the configuration does not say; the checkpoint does."""
    k: int = 64
    auxk: int | None = 64
    topk_type: str = "global"
    dead_steps_threshold: int = 1000
    batch_size: int = 256
    feature_files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """split ("train", "val", "test") -> stream -> HDF5 file, in the streams' order; paths as they are written."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Everything else of the command line, such as lr, num_epochs or seed."""


def read_config(config: str | Path | Mapping[str, Any]) -> UpstreamConfig:
    """Read ``run_config.json``, a data configuration (``train_stream_feature_files``, …), or either as a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or a setting is not what it should be.
    """
    content, origin = (
        (config, "config") if isinstance(config, Mapping) else (read_object(Path(config), "config"), str(config))
    )
    arguments = content.get("args", {} if any(_files_key(s) in content for s in SPLITS) else content)
    data = content.get("config_file_content", content)
    if not isinstance(arguments, Mapping) or not isinstance(data, Mapping):
        raise ValueError(f"config must hold objects under args and config_file_content, got others in {origin}")
    sizes = {
        name: arguments[name] for name in ("n_latents", "k", "dead_steps_threshold", "batch_size") if name in arguments
    }
    auxk = arguments.get("auxk", UpstreamConfig.auxk)
    topk_type = arguments.get("topk_type", UpstreamConfig.topk_type)
    for name, size in sizes.items():
        if not _is_count(size) or size < (name != "dead_steps_threshold"):
            raise ValueError(f"config must give {name} as a positive integer, got {size!r} in {origin}")
    if auxk is not None and not _is_count(auxk):
        raise ValueError(f"config must give auxk as an integer or null, got {auxk!r} in {origin}")
    if topk_type not in ("global", "local"):
        raise ValueError(f'config must give topk_type as "global" or "local", got {topk_type!r} in {origin}')
    files = {split: data[_files_key(split)] for split in SPLITS if data.get(_files_key(split))}
    for split, paths in files.items():
        if not isinstance(paths, Mapping) or not all(isinstance(path, str) for path in paths.values()):
            raise ValueError(f"config must map streams to files in {_files_key(split)}, got {paths!r} in {origin}")
    rest = {name: value for name, value in arguments.items() if name not in (*sizes, "auxk", "topk_type")}
    return UpstreamConfig(**sizes, auxk=auxk, topk_type=topk_type, feature_files=files, arguments=rest)


def from_upstream(path: str | Path, config: str | Path | Mapping[str, Any] | None = None) -> SPARC:
    """The model of a research-code checkpoint, its weights bit for bit.

    Args:
        path: ``msae_checkpoint.pth``, a state_dict. Pickled objects other than tensors are never loaded.
        config: ``run_config.json`` or its content; by default the one beside the checkpoint. Without one, the settings
            that are not in a checkpoint: ``{"k": 64, "topk_type": "global"}``.

    Raises:
        FileNotFoundError: there is no such checkpoint or configuration.
        ValueError: the file is not a checkpoint of the research code, or the configuration does not fit it.
    """
    path = as_path(path, "path")
    tensors = load_tensors(path, "path must be a state_dict of the research code")
    settings = read_config(path.with_name(RUN_CONFIG) if config is None else config)
    d_streams, n_latents = _check_tensors(tensors, path)
    if settings.n_latents not in (None, n_latents):
        raise ValueError(f"config must say n_latents={n_latents}, as {path} has them, got {settings.n_latents}")
    streams = list(d_streams)
    silent = torch.stack([tensors[f"stats_last_nonzero_{s}"] for s in streams]).amin(0)
    state = {
        "W_enc": torch.cat([tensors[f"encoders.{s}.weight"] for s in streams], dim=1),
        "W_dec": torch.cat([tensors[f"decoders.{s}.weight"].T for s in streams], dim=1),
        "pre_bias": torch.cat([tensors[f"pre_biases.{s}"] for s in streams]),
        "latent_bias": torch.stack([tensors[f"latent_biases.{s}"] for s in streams]),
        "silence": silent * settings.batch_size,
    }
    return model_of(
        state, d_streams, n_latents, settings.k, selection=settings.topk_type, auxk=min(settings.auxk or 0, n_latents),
        dead_after=settings.dead_steps_threshold * settings.batch_size, dtype=state["W_enc"].dtype,
    )  # fmt: skip


def to_upstream(model: SPARC, path: str | Path, *, batch_size: int = 256, fold_calibration: bool = False) -> None:
    """Write a model as a research-code checkpoint, with its ``run_config.json`` beside it.

    Args:
        path: the checkpoint, usually ``…/msae_checkpoint.pth``.
        batch_size: samples in a batch of the research code, in which its counters count; where `dead_after` is a
            multiple of it, the same latents are dead.
        fold_calibration: put the calibration of the inputs into the weights. Codes and reconstructions are then those
            of the model, to rounding, on inputs as they come (where the model normalizes rows, on rows of unit norm,
            which the research code's loader makes them); decoder columns no longer have unit norm, so that
            training it further with the research code would change its scale.

    Raises:
        ValueError: the model is calibrated and `fold_calibration` is not set, or a stream's name cannot be a key
            there, or another model's ``run_config.json`` lies beside `path`.
    """
    path = as_path(path, "path")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if model.is_calibrated and not fold_calibration:
        raise ValueError(
            "model must not be calibrated: the research code has no calibration of inputs; "
            "fold_calibration (--fold-calibration) puts it into the weights"
        )
    if model.selection in BY_THRESHOLD:
        raise ValueError(
            f'model must have selection "global" or "local" for the research code, got "{model.selection}"'
        )
    if model.private_latents:
        raise ValueError(f"model must have no private latents for the research code, got {model.config()['private']}")
    for name in model.streams:
        if not name or "." in name:
            raise ValueError(f"model must have stream names without a dot for the research code, got {name!r}")
    settings = {
        "n_latents": model.n_latents,
        "k": model.k,
        "auxk": model.auxk or None,
        "topk_type": model.selection,
        "dead_steps_threshold": -(-model.dead_after // batch_size),
        "batch_size": batch_size,
        "auxk_threshold": 0.0,
        "use_sparse_decoder": False,
    }
    config_path = path.with_name(RUN_CONFIG)
    _check_config_beside(config_path, settings)
    with atomic_path(path) as temporary:
        torch.save(_state_dict(model, batch_size), temporary)
    if not config_path.exists():
        write_text(config_path, json.dumps({"args": settings, "config_file_content": {}}, indent=4))


def _state_dict(model: SPARC, batch_size: int) -> dict[str, Tensor]:
    """A model's weights under the research code's names, in its order and layout."""
    weights = {s: stream_weights(model, s) for s in model.streams}
    silent = (model.silence.cpu() + batch_size - 1) // batch_size
    tensors = {f"stats_last_nonzero_{s}": silent for s in weights}
    tensors |= {f"encoders.{s}.weight": of_stream.W_enc for s, of_stream in weights.items()}
    tensors |= {f"decoders.{s}.weight": of_stream.W_dec.T for s, of_stream in weights.items()}
    tensors |= {f"pre_biases.{s}": of_stream.pre_bias for s, of_stream in weights.items()}
    tensors |= {f"latent_biases.{s}": of_stream.latent_bias for s, of_stream in weights.items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, int], int]:
    """(stream widths in order, n_latents) of a state_dict that is the research code's, whole and of one dtype."""
    streams = [key[len("encoders.") : -len(".weight")] for key in tensors if key.startswith("encoders.")]
    wrong = f"path must be a state_dict of the research code's MultiStreamSparseAutoencoder, but {path}"
    if not streams:
        raise ValueError(f"{wrong} has no encoders.*.weight; its first keys are {list(tensors)[:4]}")
    first = tensors.get(f"encoders.{streams[0]}.weight")
    n_latents = first.shape[0] if first is not None and first.ndim == 2 else 0
    expected: dict[str, tuple[int, ...]] = {}
    for s in streams:
        encoder = tensors.get(f"encoders.{s}.weight")
        width = encoder.shape[1] if encoder is not None and encoder.ndim == 2 else 0
        expected |= {
            f"encoders.{s}.weight": (n_latents, width),
            f"decoders.{s}.weight": (width, n_latents),
            f"pre_biases.{s}": (width,),
            f"latent_biases.{s}": (n_latents,),
            f"stats_last_nonzero_{s}": (n_latents,),
        }
    if set(expected) != set(tensors):
        missing, foreign = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(f"{wrong} lacks {missing or 'nothing'} and has {foreign or 'nothing'} besides")
    for key, shape in expected.items():
        dtype = torch.int64 if key.startswith("stats_") else tensors[f"encoders.{streams[0]}.weight"].dtype
        if tuple(tensors[key].shape) != shape or tensors[key].dtype != dtype:
            got = f"{tensors[key].dtype} {list(tensors[key].shape)}"
            raise ValueError(f"{wrong} has {key} as {got}, not {dtype} {list(shape)}")
    return {s: expected[f"pre_biases.{s}"][0] for s in streams}, n_latents


def _check_config_beside(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise unless the research code would read this model with the configuration that lies there already."""
    if not path.exists():
        return
    there = read_config(path)
    for name in ("n_latents", "k", "auxk", "topk_type"):
        if (getattr(there, name) or None) != settings[name]:
            raise ValueError(
                f"path must not be beside another model's configuration: {path} says {name}={getattr(there, name)}, "
                f"the model has {settings[name]}"
            )


def _files_key(split: str) -> str:
    return f"{split}_stream_feature_files"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

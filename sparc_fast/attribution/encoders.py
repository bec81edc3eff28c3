"""The models that made a folder of features, loaded again as its manifest says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from sparc_fast.data.feature_folder import FeatureFolder
from sparc_fast.extract import StreamConfig, read_extraction
from sparc_fast.extract.emoji import STREAMS, emoji_encoder
from sparc_fast.extract.encoders import Encoder, encoder_of, is_of_library, name_on_hub

__all__ = ["encoders_of"]


def encoders_of(
    folder: FeatureFolder | str | Path,
    streams: Sequence[str] | None = None,
    *,
    settings: str | Path | None = None,
    device: str | torch.device = "cpu",
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Encoder]:
    """stream -> the model that its rows were made with, of the streams named or of all.

    Args:
        settings: the file of settings of the extraction. It must be given where a model is a function, since none runs
            but one of a file that you name, and where paths of models are relative to it.
        say: told of models that are fetched from a hub, unless they are cached.

    Raises:
        ValueError: a model is not the one whose rows the folder holds, or is a function and settings are not given.
    """
    folder = folder if isinstance(folder, FeatureFolder) else FeatureFolder(folder)
    device, place = torch.device(device), Path()
    told: Mapping[str, StreamConfig] = {}
    if settings is not None:
        extraction = read_extraction(settings)
        told, place = extraction.streams, extraction.folder
    made = {}
    for name in folder.streams if streams is None else streams:
        config = told.get(name) or _told_by(folder, name)
        made[name] = _encoder(config, place, device, name in told, say)
        _check(made[name], folder, name)
    return made


def _told_by(folder: FeatureFolder, stream: str) -> StreamConfig:
    """As the manifest has it."""
    known = folder.manifest.get("extraction", {}).get("streams", {})
    if stream not in known:
        raise ValueError(
            f"{folder.path} must say how stream {stream!r} was made, got {', '.join(known) or 'nothing'}: give settings"
        )
    names = {f.name for f in fields(StreamConfig)}
    config = StreamConfig(**{key: value for key, value in known[stream].items() if key in names})
    config.check(stream)
    return config


def _encoder(
    config: StreamConfig, place: Path, device: torch.device, is_told: bool, say: Callable[[str], object]
) -> Encoder:
    of_emoji = next((name for name, known in STREAMS.items() if known.model == config.model), None)
    if of_emoji is not None:
        return emoji_encoder(of_emoji, device)
    if not is_told and not is_of_library(config):
        raise ValueError(
            f"settings (--models) must be given, the file that names {config.model}: a folder runs no function"
        )
    if on_hub := name_on_hub(config, place):
        say(f"{on_hub} is a name on a hub, and fetched from there unless it was cached")
    return encoder_of(config, place, device)


def _check(encoder: Encoder, folder: FeatureFolder, stream: str) -> None:
    about: Mapping[str, Any] = folder.streams.get(stream, {})
    for what in ("weights_sha256", "module_sha256"):
        if (expected := about.get(what)) is not None and encoder.about.get(what) != expected:
            raise ValueError(
                f"the model of stream {stream!r} must be that of {folder.path}, whose {what} is {expected}, "
                f"got {encoder.about.get(what)}"
            )

"""What a report shows: plain arrays and words, so that any trainer can fill it."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field

import numpy as np

from sparc_fast.evaluate import Row

__all__ = ["ModelReport", "Report"]


@dataclass(frozen=True)
class ModelReport:
    """One model, over L latents."""

    name: str  # "SPARC"
    top_samples: dict[str, np.ndarray]  # stream -> [L, n] rows of the samples, strongest first, -1 = none
    top_values: dict[str, np.ndarray]  # stream -> [L, n] how strongly each fires the latent
    concept: list[str]  # [L] the word that describes the latent, or ""
    agreement: np.ndarray  # [L] 0..1: do the streams, each encoded alone, fire it on the same samples
    frequency: np.ndarray  # [L] share of the samples that fire it
    jaccard: np.ndarray  # [L] 0..1: alike concepts in every stream, on held-out samples; NaN = silent there
    curves: dict[str, list[float]]  # "step" and any of "loss", "self", "cross", "dead"

    def alive(self) -> np.ndarray:
        """[L]: whether any stream fires the latent."""
        alive: np.ndarray = np.any([(rows >= 0).any(axis=1) for rows in self.top_samples.values()], axis=0)
        return alive


@dataclass(frozen=True)
class Report:
    """Two models over the same N samples."""

    before: ModelReport
    after: ModelReport
    streams: dict[str, str]  # stream -> what it sees of a sample, in a few words
    characters: list[str]  # [N]
    names: list[str]  # [N]
    faces: list[str]  # [N]
    images: dict[str, np.ndarray]  # stream -> uint8 [N, H, W], 255 = ink; the other streams show names
    table: list[Row] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)  # versions, seed, settings, command

    def __post_init__(self) -> None:
        n = len(self.characters)
        sizes = {"names": len(self.names), "faces": len(self.faces)}
        sizes |= {f"images[{stream!r}]": len(images) for stream, images in self.images.items()}
        for what, size in sizes.items():
            if size != n:
                raise ValueError(f"{what} must be one per character ({n}), got {size}")
        latents = len(self.after.concept)
        for model in (self.before, self.after):
            if model.top_samples.keys() != self.streams.keys():
                raise ValueError(
                    f"{model.name} must have the streams {list(self.streams)}, got {list(model.top_samples)}"
                )
            columns: dict[str, Sized] = {
                "concept": model.concept,
                "agreement": model.agreement,
                "frequency": model.frequency,
                "jaccard": model.jaccard,
            }
            columns |= {f"top_samples[{stream!r}]": rows for stream, rows in model.top_samples.items()}
            columns |= {f"top_values[{stream!r}]": rows for stream, rows in model.top_values.items()}
            for what, column in columns.items():
                if len(column) != latents:
                    raise ValueError(f"{what} of {model.name} must be of {latents} latents, got {len(column)}")

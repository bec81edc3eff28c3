"""What a report shows: plain arrays and words, so that any trainer can fill it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc_fast.evaluate import Carried, Codes, Evaluation, Row, latent_use, name_latents, words_as_concepts
from sparc_fast.evaluate.codes import check_codes

from .pictures import Pictures

__all__ = ["Items", "ModelReport", "Report", "Stream"]


@dataclass(frozen=True)
class Stream:
    """How a stream's samples are shown: by a text each, or by a picture each; with both, by the text beside it."""

    about: str = ""  # what it sees of a sample, in a few words
    text: str | None = None  # which of the items' texts
    picture: str | None = None  # which of their pictures


@dataclass(frozen=True, eq=False, repr=False)
class Items:
    """What is known of N samples."""

    ids: Sequence[str]  # [N]
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # title -> [N], "" where there is none
    pictures: Mapping[str, Pictures] = field(default_factory=dict)  # title -> [N]
    carried: Carried | None = None  # which concepts each carries
    concepts: Sequence[str] = ()  # their names: labels, or words of the texts
    groups: Sequence[str] | None = None  # [N] of those of one group the strongest alone is shown
    held_out: npt.NDArray[np.bool_] | None = None  # [N] kept from training
    about: Mapping[str, Sequence[str]] = field(default_factory=dict)  # title -> [N], lines of a sample's own page

    def __post_init__(self) -> None:
        columns: dict[str, Sized | None] = {"groups": self.groups, "held_out": self.held_out, "carried": self.carried}
        for what, of_what in (("texts", self.texts), ("pictures", self.pictures), ("about", self.about)):
            columns |= {f"{what}[{title!r}]": column for title, column in of_what.items()}
        for what, column in columns.items():
            if column is not None and len(column) != len(self.ids):
                raise ValueError(f"{what} must be one per sample ({len(self.ids)}), got {len(column)}")
        if self.carried is not None and self.carried.n_concepts != len(self.concepts):
            raise ValueError(f"concepts must be those carried ({self.carried.n_concepts}), got {len(self.concepts)}")

    def __len__(self) -> int:
        return len(self.ids)

    def texts_of_samples(self) -> list[tuple[str, ...]]:
        """All texts of each sample."""
        return [tuple(column[row] for column in self.texts.values()) for row in range(len(self))]

    def vocabulary(self) -> tuple[Carried, list[str]]:
        """The words that can be searched for: those of at least two samples' texts, and not of most."""
        return words_as_concepts(self.texts_of_samples(), fewest=2)

    def known(self) -> Carried:
        """Which concepts each sample carries, if it is none."""
        none = torch.zeros(len(self), 0, dtype=torch.bool, device="cpu")
        return Carried.from_labels(none) if self.carried is None else self.carried


@dataclass(frozen=True, eq=False, repr=False)
class ModelReport:
    """One model, over L latents."""

    name: str  # "SPARC"
    codes: Codes  # stream -> (values [N, k], indices [N, k]), each encoded alone
    names: Sequence[Sequence[str]]  # [L] the concepts that describe the latent, the best first
    agreement: npt.NDArray[np.floating]  # [L] 0..1: do the streams fire it on the same samples; NaN = one has it alone
    frequency: npt.NDArray[np.floating]  # [L] share of the samples that fire it, mean of the streams that have it
    jaccard: npt.NDArray[np.floating] | None = None  # [L] 0..1: alike concepts in every stream; NaN = silent
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)  # "step" and any of "loss", "self", …

    @classmethod
    def of(
        cls,
        name: str,
        codes: Codes,
        n_latents: int,
        items: Items,
        *,
        jaccard: Tensor | None = None,
        curves: Mapping[str, Sequence[float]] | None = None,
        private: Mapping[str, slice] | None = None,
    ) -> ModelReport:
        """Of its codes, its latents named by the items' concepts.

        Those private to a stream say so: their frequency is that stream's, and there is no agreement of theirs.
        """
        codes = {stream: (values.detach().cpu(), indices.cpu()) for stream, (values, indices) in codes.items()}
        named = name_latents(codes, items.known(), items.concepts, n_latents)
        names: list[tuple[str, ...]] = list(named.several)
        of_streams = latent_use(codes, n_latents).frequency
        agreement, frequency = named.agreement.clone(), of_streams.mean(0)
        if len(codes) == 1:
            agreement[:] = torch.nan
        for stream, some in (private or {}).items():
            names[some] = [(*several, f"private to {stream}") for several in names[some]]
            agreement[some], frequency[some] = torch.nan, of_streams[list(codes).index(stream), some]
        return cls(
            name,
            codes,
            names,
            agreement.numpy(),
            frequency.numpy(),
            None if jaccard is None else jaccard.numpy(),
            curves or {},
        )

    @staticmethod
    def jaccard_of(found: Evaluation) -> Tensor | None:
        """The `jaccard` that an evaluation found: NaN where a latent is silent, or private to a stream."""
        if (jaccard := found.jaccard_single) is None:
            return None
        silent = ~found.latents_single.alive_in_any
        jaccard = jaccard.masked_fill(silent[: len(jaccard)], torch.nan)
        return pad(jaccard, (0, len(silent) - len(jaccard)), value=torch.nan)

    def concept(self, latent: int) -> str:
        """The word that describes the latent best, or ""."""
        return self.names[latent][0] if self.names[latent] else ""


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """A model over N samples, beside another one, which is shown as what was before."""

    after: ModelReport
    before: ModelReport | None
    streams: Mapping[str, Stream]
    items: Items
    table: Sequence[Row] = ()
    settings: Mapping[str, str] = field(default_factory=dict)  # versions, seed, settings, command
    attribution: str = ""  # whose pictures and texts these are
    first: Sequence[str] = ()  # concepts whose latents are shown before all others
    word_codes: tuple[Sequence[str], Codes] | None = None  # words and, of streams of texts, their codes: to search by

    def __post_init__(self) -> None:
        for name, stream in self.streams.items():
            for what, shown, there in (
                ("text", stream.text, self.items.texts),
                ("picture", stream.picture, self.items.pictures),
            ):
                if shown is not None and shown not in there:
                    raise ValueError(f"{what} of stream {name!r} must be one of {list(there)}, got {shown!r}")
        latents = self.n_latents
        if self.word_codes is not None and (n := check_codes(self.word_codes[1], latents)) != len(self.word_codes[0]):
            raise ValueError(f"word_codes must be of {len(self.word_codes[0])} words, got {n}")
        for model in self.models:
            if model.codes.keys() != self.streams.keys():
                raise ValueError(f"{model.name} must have the streams {list(self.streams)}, got {list(model.codes)}")
            columns: dict[str, Sized | None] = {
                "names": model.names, "agreement": model.agreement, "frequency": model.frequency,
                "jaccard": model.jaccard,
            }  # fmt: skip
            for what, column in columns.items():
                if column is not None and len(column) != latents:
                    raise ValueError(f"{what} of {model.name} must be of {latents} latents, got {len(column)}")
            if (n := check_codes(model.codes, latents)) != len(self.items):
                raise ValueError(f"codes of {model.name} must be of {len(self.items)} samples, got {n}")

    @property
    def n_latents(self) -> int:
        return len(self.after.names)

    @property
    def models(self) -> tuple[ModelReport, ...]:
        """What was before, where there is such, and what is after."""
        return (self.after,) if self.before is None else (self.before, self.after)

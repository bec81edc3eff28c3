"""Which samples, word and latents to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparc_fast.evaluate import top_samples

from .contents import ModelReport, Report
from .pictures import sights

__all__ = ["Shown", "Tops", "choose_latents", "tops_of"]

SHOWN = 12  # samples of a latent on its own page
DEEPER = 4  # times as many are looked at where several are of one group
CONSIDERED = 200  # latents whose pictures are compared
RARER = 1.25  # a near tie of words goes to the latent's own


@dataclass(frozen=True)
class Tops:
    """One model's strongest samples, each group once: [S, L, SHOWN], row -1 and value 0 where fewer fire."""

    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]

    def of(self, stream: int, latent: int, n: int = SHOWN) -> list[int]:
        """Rows of a latent's samples."""
        rows: list[int] = self.rows[stream, latent, :n].tolist()
        return [row for row in rows if row >= 0]


def tops_of(report: Report, model: ModelReport, latents: Tensor | None = None) -> Tops:
    """The strongest samples of every latent, or of those given, in every stream."""
    groups = report.items.groups
    found = top_samples(model.codes, report.n_latents, SHOWN if groups is None else SHOWN * DEEPER, latents)
    rows, values = found.samples.cpu().numpy(), found.values.cpu().numpy()
    if groups is None:
        return Tops(rows, values)
    number = np.append(np.unique(np.array(groups, np.str_), return_inverse=True)[1], -1)
    group = number[rows]
    later = np.zeros_like(group, bool)
    for place in range(1, group.shape[2]):
        later[..., place] = (group[..., :place] == group[..., place, None]).any(2)
    order = (later | (rows < 0)).argsort(axis=2, kind="stable")[..., :SHOWN]
    rows, values, later = (np.take_along_axis(of_samples, order, 2) for of_samples in (rows, values, later))
    return Tops(np.where(later, -1, rows), np.where(later, 0, values))


class Shown:
    """Which concepts samples carry, and which they share."""

    def __init__(self, report: Report) -> None:
        carried = report.items.known()
        self.concepts = list(report.items.concepts)
        self.number = {concept: y for y, concept in enumerate(self.concepts)}
        self._offsets, self._carried = carried.offsets.tolist(), carried.concepts.tolist()
        counts = np.maximum(carried.counts().numpy(), 1)
        self.n = len(carried)
        self.rarity = np.log(max(self.n, 1) / counts)

    def of(self, row: int) -> list[int]:
        """The concepts that a sample carries."""
        found: list[int] = self._carried[self._offsets[row] : self._offsets[row + 1]]
        return found

    def surprise(self, concept: str) -> float:
        """How rare a concept is, in logarithms, as a share of the rarest there could be; 0 if no sample can bear it."""
        place = self.number.get(concept)
        return 0.0 if place is None else float(self.rarity[place] / np.log(max(self.n, 2)))

    def bears(self, row: int, concept: str) -> bool:
        return self.number.get(concept, -1) in self.of(row)

    def shared(self, rows: list[int], hint: str = "") -> str:
        """The concept that samples share most, beyond chance: of at least half of them, else ""; near ties: `hint`."""
        shares = Counter(y for row in rows for y in self.of(row))
        own = self.number.get(hint)
        common = [(y, share) for y, share in shares.items() if share >= 2 and 2 * share >= len(rows)]
        surprise = [(share * self.rarity[y] * (RARER if y == own else 1), -y) for y, share in common]
        return self.concepts[-max(surprise)[1]] if surprise else ""


def choose_latents(report: Report, tops: Sequence[Tops] = (), n: int = 12, shown: int = 8) -> list[int]:
    """`n` latents that show the point best, best first; the same report gives the same choice.

    Alive in every stream of all models, one per concept, with high agreement, and with `shown` samples in each stream
    that bear the concept, best a rare one; after the first, each unlike those already chosen, to the eye and in its
    samples. The best latents of the concepts that the report is to show `first` come before all others.
    """
    tops = tops or [tops_of(report, model) for model in report.models]
    words, model = Shown(report), report.after
    after, streams = tops[-1], range(len(report.streams))
    alive = np.stack([(of_model.rows[:, :, :shown] >= 0).sum(2) for of_model in tops])  # [models, S, L]
    measured = [model.agreement if len(streams) > 1 else np.ones_like(model.agreement)]
    if model.jaccard is not None:
        measured.append(np.nan_to_num(model.jaccard))
    quality = np.nan_to_num(np.mean(measured, axis=0)) * (alive[0].min(0) / shown) * (alive.min((0, 1)) > 0)
    for latent in np.flatnonzero(quality).tolist():
        concept = model.concept(latent)
        if not concept and len(words.concepts):
            quality[latent] = 0
        elif concept:
            rows = [after.of(s, latent, shown) for s in streams]
            bearing = min(sum(words.bears(row, concept) for row in of_stream) / shown for of_stream in rows)
            named = np.mean([words.shared(of_stream, concept) == concept for of_stream in rows])
            quality[latent] *= bearing * named * words.surprise(concept) ** 0.5
    asked = np.array([model.concept(latent) in report.first for latent in range(len(quality))], bool)
    ranked = np.lexsort((-quality, ~asked))[:CONSIDERED]
    latents: list[int] = ranked[quality[ranked] > 0].tolist()
    if not latents:
        return []

    likeness = np.maximum(_alike_to_the_eye(report, after, latents, shown), _alike_in_samples(after, latents, shown))
    concepts = [model.concept(latent) or str(latent) for latent in latents]
    free = np.ones(len(latents), bool)
    # the best of each
    wanted = [concepts.index(concept) for concept in dict.fromkeys(report.first) if concept in concepts]
    chosen: list[int] = []  # positions in latents
    while free.any() and len(chosen) < n:
        novelty = np.maximum(1 - likeness[:, chosen].max(axis=1, initial=0), 0)
        best = wanted.pop(0) if wanted else int(np.where(free, quality[latents] * novelty**0.5, -1).argmax())
        chosen.append(best)
        free &= np.array([concept != concepts[best] for concept in concepts])
    return [latents[i] for i in chosen]


def _alike_to_the_eye(report: Report, after: Tops, latents: list[int], shown: int) -> npt.NDArray[np.float64]:
    """Cosines of the mean pictures of every two latents, less the mean of all."""
    looks = [np.zeros((len(latents), 1))]
    seen = set()
    for s, stream in enumerate(report.streams.values()):
        if stream.text is None and stream.picture is not None and stream.picture not in seen:
            seen.add(stream.picture)
            pictures = report.items.pictures[stream.picture]
            looks.append(np.stack([sights(pictures, after.of(s, latent, shown)) for latent in latents]))
    together = np.concatenate(looks, axis=1)
    return _cosines(together - together.mean(axis=0))


def _alike_in_samples(after: Tops, latents: list[int], shown: int) -> npt.NDArray[np.float64]:
    """Cosines of the sets of samples of every two latents."""
    rows = after.rows[:, latents, :shown]
    _, number = np.unique(rows, return_inverse=True)
    has = np.zeros((len(latents), int(number.max(initial=-1)) + 1))
    for of_stream, present in zip(number.reshape(rows.shape), rows >= 0, strict=True):
        for latent, (places, there) in enumerate(zip(of_stream, present, strict=True)):
            has[latent, places[there]] = 1
    return _cosines(has)


def _cosines(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of every pair of rows [n, d] → [n, n]."""
    unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9)
    cosines: npt.NDArray[np.float64] = unit @ unit.T
    return cosines

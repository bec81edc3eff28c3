"""Which samples, word and latents to show."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np

from .contents import ModelReport, Report

__all__ = ["SharedWord", "choose_latents", "top", "words"]

SHOWN = 12  # samples of a latent on its own page


def words(name: str) -> set[str]:
    """The words of a Unicode name."""
    return set(re.findall(r"\w+", name))


def top(report: Report, model: ModelReport, stream: str, latent: int, n: int = SHOWN) -> dict[int, float]:
    """The latent's strongest samples (row -> value): each character once, in its strongest face."""
    rows, values = model.top_samples[stream][latent], model.top_values[stream][latent]
    best: dict[str, tuple[int, float]] = {}
    for row, value in zip(rows.tolist(), values.tolist(), strict=True):
        if row >= 0 and len(best) < n:
            best.setdefault(report.characters[row], (row, value))
    return dict(best.values())


class SharedWord:
    """The word that a latent's samples share most, beyond chance."""

    def __init__(self, report: Report) -> None:
        distinct = set(report.names)
        self.total = len(distinct)
        self.count = Counter(word for name in distinct for word in words(name))

    def rarity(self, word: str) -> float:
        return math.log(self.total / self.count[word])

    def __call__(self, names: list[str], hint: str = "") -> str:
        """At least half of the names have it, else ""; near ties go to `hint` (DOTS or BRAILLE?)."""
        shares = Counter(word for name in names for word in words(name))

        def surprise(word: str) -> float:
            return shares[word] * self.rarity(word) * (1.25 if word == hint else 1)

        common = sorted(word for word, share in shares.items() if share >= 2 and 2 * share >= len(names))
        return max(common, key=surprise, default="")


def choose_latents(report: Report, n: int = 12, shown: int = 8) -> list[int]:
    """`n` latents that show the point best, best first; the same report gives the same choice.

    Alive in every stream of both models, one per concept, with high agreement, and with `shown` samples
    in each stream that bear the concept; after the first, each unlike those already chosen, to the eye and
    in words.
    """
    after, before = report.after, report.before
    shared_word = SharedWord(report)
    latents, quality, looks, vocabularies = [], [], [], []
    for latent, concept in enumerate(after.concept):
        rows = {stream: list(top(report, after, stream, latent, shown)) for stream in report.streams}
        others = [len(top(report, before, stream, latent, shown)) for stream in report.streams]
        if not concept or not all(rows.values()) or not all(others):
            continue
        names = [[report.names[row] for row in r] for r in rows.values()]
        bearing = min(sum(concept in words(name) for name in stream) / shown for stream in names)
        named = np.mean([shared_word(stream, concept) == concept for stream in names])
        aligned = np.nan_to_num([after.agreement[latent], after.jaccard[latent]]).mean()
        latents.append(latent)
        quality.append(bearing * named * aligned * min(others) / shown)
        look = [report.images[stream][rows[stream]].mean(axis=0).ravel() for stream in report.images]
        looks.append(np.concatenate([[0.0], *look]))
        vocabularies.append(Counter(word for stream in names for name in stream for word in words(name)))
    if not latents:
        return []

    vocabulary = sorted({word for counts in vocabularies for word in counts})
    rarity = np.array([shared_word.rarity(word) for word in vocabulary])
    meanings = np.array([[counts[word] for word in vocabulary] for counts in vocabularies]) * rarity
    pictures = np.array(looks) - np.mean(looks, axis=0)
    likeness = np.maximum(_cosines(pictures), _cosines(meanings))
    concepts = np.array([after.concept[latent] for latent in latents])
    free = np.ones(len(latents), bool)
    chosen: list[int] = []  # positions in latents
    while free.any() and len(chosen) < n:
        novelty = np.maximum(1 - likeness[:, chosen].max(axis=1, initial=0), 0)
        best = int(np.where(free, np.array(quality) * novelty**0.5, -1).argmax())
        chosen.append(best)
        free &= concepts != concepts[best]
    return [latents[i] for i in chosen]


def _cosines(rows: np.ndarray) -> np.ndarray:
    """Of every pair of rows [n, d] → [n, n]."""
    unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9)
    cosines: np.ndarray = unit @ unit.T
    return cosines

"""Words of texts in any language, as concepts that samples carry."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from .concepts import Carried

__all__ = ["as_words", "words_as_concepts"]

FEWEST, MOST_SHARE, MOST_WORDS = 5, 0.5, 20_000
RUN = re.compile(r"[^\W_]+")
SPACELESS = re.compile(  # Thai to Myanmar, Khmer, kana, Han: scripts without spaces between words
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


def as_words(text: str) -> list[str]:
    """Words in lower case, in order; of scripts without spaces every two neighbouring characters."""
    words = []
    for run in _split(unicodedata.normalize("NFC", text).lower()):
        place = 0
        for found in SPACELESS.finditer(run):
            words += [run[place : found.start()]] if found.start() > place else []
            characters = found[0]
            words += [characters[i : i + 2] for i in range(max(1, len(characters) - 1))]
            place = found.end()
        words += [run[place:]] if place < len(run) else []
    return words


def _split(text: str) -> list[str]:
    """Runs of letters, digits and the marks that go with them, which \\w leaves out."""
    if text.isascii():
        return RUN.findall(text)
    return "".join(character if _in_word(character) else " " for character in text).split()


@lru_cache(None)
def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def words_as_concepts(
    texts: Sequence[Iterable[str]], *, fewest: int = FEWEST, most_words: int = MOST_WORDS
) -> tuple[Carried, list[str]]:
    """Which words the texts of each of N samples have, and the words, the most frequent first, as most often written.

    Words of fewer than `fewest` samples are left out, and those of more than half of them, which say nothing of one.
    """
    carried = [{word for text in of_sample for word in as_words(text)} for of_sample in texts]
    counts = Counter(word for words in carried for word in words)
    kept = sorted((-n, word) for word, n in counts.items() if fewest <= n <= MOST_SHARE * len(texts))
    number = {word: place for place, (_, word) in enumerate(kept[:most_words])}
    lists = [sorted(number[word] for word in words if word in number) for words in carried]
    offsets = torch.tensor([0, *accumulate(map(len, lists))], dtype=torch.int64, device="cpu")
    concepts = torch.tensor([y for found in lists for y in found], dtype=torch.int64, device="cpu")
    return Carried(offsets, concepts, len(number)), _as_written(texts, number)


def _as_written(texts: Sequence[Iterable[str]], number: dict[str, int]) -> list[str]:
    """Words in the case that they have most often: GREEK, but arrow."""
    forms: list[Counter[str]] = [Counter() for _ in number]
    for of_sample in texts:
        for text in of_sample:
            for run in _split(unicodedata.normalize("NFC", text)):
                if (place := number.get(run.lower())) is not None:
                    forms[place][run] += 1
    return [max(sorted(form), key=form.__getitem__) if form else word for word, form in zip(number, forms, strict=True)]

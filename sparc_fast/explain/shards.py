"""The data of a page in pieces that it loads when it shows them.

Samples are numbered in the order in which the page shows them, so that what is seen together lies together. A piece is
a script that calls `shard(name, content)`: a page opened from disk may load scripts, but no other data. Content has
lists where the data could give a name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparc_fast.evaluate import Carried, retrieve

from .contents import ModelReport, Report
from .latents import Shown, Tops, choose_latents, tops_of
from .pictures import Ink, columns
from .relations import fire_together, latents_of_words, strongest

__all__ = ["Shards", "clipped"]

LATENTS, TEXTS, SAMPLES = 64, 128, 64  # in a piece
ENERGIES = 12  # latents of a sample
CLIPPED = 280  # letters of a text in a list
LONGEST = 20_000
WORD_SAMPLES = 6
AHEAD = 4  # sheets that a thread has before it
NEAREST = 6  # samples of another stream


class Shards:
    """All pieces of a report, each made when it is asked for."""

    def __init__(self, report: Report) -> None:
        self.report, self.words = report, Shown(report)
        self.tops = [tops_of(report, model) for model in report.models]
        alive: npt.NDArray[np.bool_] = np.any(self.tops[-1].rows >= 0, axis=(0, 2))
        ranked = np.lexsort((np.arange(len(alive)), -np.nan_to_num(report.after.agreement)))
        self.latents = ranked[alive[ranked]]  # in the order of the page
        self.chosen = choose_latents(report, self.tops)
        self.rows = self._order()  # the row of each number
        self.number = np.full(len(report.items) + 1, -1)  # of each row; the last is of row -1
        self.number[self.rows] = np.arange(len(self.rows))
        self.flags = [(1 << len(report.items.pictures)) - 1] * len(self.rows)
        """Of each number, which pictures it has, as bits; known once they are drawn."""

    def _order(self) -> npt.NDArray[np.int64]:
        """Rows in the order in which the page first shows them."""
        shown = [of_model.rows[:, some] for some in (self.chosen, self.latents) for of_model in reversed(self.tops)]
        seen = [rows.transpose(1, 0, 2).ravel() for rows in shown]
        together = np.concatenate([*seen, np.arange(len(self.report.items))])
        together = together[together >= 0]
        _, first = np.unique(together, return_index=True)
        return together[np.sort(first)]

    def pictures(self) -> Iterator[tuple[str, bytes]]:
        """(name of the file, content) of all sheets, several drawn at a time."""
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            for p, pictures in enumerate(self.report.items.pictures.values()):
                sheets = [rows.tolist() for _, rows in _parts(self.rows, pictures.sheet)]
                for start in range(0, len(sheets), AHEAD * threads):
                    drawn = pool.map(pictures.write, sheets[start : start + AHEAD * threads])
                    for place, (suffix, content, there) in enumerate(drawn, start):
                        for number, is_there in enumerate(there, place * pictures.sheet):
                            self.flags[number] &= ~(0 if is_there else 1 << p)
                        name = f"pictures/{p}/{place}"
                        yield f"{name}.{suffix}", (_call(name, content) if isinstance(content, str) else content)

    def pieces(self) -> Iterator[tuple[str, bytes]]:
        """(name of the file, content) of all pieces; to be asked for after the pictures."""
        whole: list[tuple[str, Any]] = [
            ("start", self.start()), ("index", self.index()), ("words", self.vocabulary())
        ]  # fmt: skip
        for name, content in chain(whole, self._latents(), self._texts(), self._samples()):
            yield f"{name}.js", _call(name, content)

    def start(self) -> dict[str, Any]:
        """What the page needs at once."""
        report, items = self.report, self.report.items
        titles = list(items.pictures)
        texts = list(items.texts)
        return {
            "models": [
                {"name": m.name, "curves": [[key, list(map(_number, line))] for key, line in m.curves.items()]}
                for m in report.models
            ],
            "streams": [
                {
                    "name": name, "about": stream.about,
                    "text": -1 if stream.text is None else texts.index(stream.text),
                    "picture": -1 if stream.picture is None else titles.index(stream.picture),
                }
                for name, stream in report.streams.items()
            ],
            "pictures": [
                {"sheet": p.sheet, "columns": columns(p.sheet), "ink": isinstance(p, Ink), "title": title}
                for title, p in items.pictures.items()
            ],
            "texts": texts, "about": list(items.about), "heldOut": items.held_out is not None,
            "chosen": self.chosen, "samples": len(items), "latents": report.n_latents, "alive": len(self.latents),
            "sizes": {"latents": LATENTS, "texts": TEXTS, "samples": SAMPLES},
            "jaccard": report.after.jaccard is not None, "named": bool(items.concepts),
        }  # fmt: skip

    def index(self) -> dict[str, Any]:
        """Of all live latents what searching and sorting needs."""
        after, used = self.report.after, dict[str, int]()
        names = [[used.setdefault(name, len(used)) for name in after.names[latent]] for latent in self.latents.tolist()]
        jaccard = np.full(self.report.n_latents, np.nan) if after.jaccard is None else after.jaccard
        columns = after.agreement, after.frequency, jaccard
        stats = [[_number(x) for x in column[self.latents].tolist()] for column in columns]
        return {"ids": self.latents.tolist(), "names": names, "words": list(used), "stats": stats}

    def vocabulary(self) -> dict[str, Any]:
        """Words of the texts: the latents they speak of, and some samples that have them.

        A word speaks of latents that its own code has, where words were encoded, or else codes of texts that have it.
        """
        report = self.report
        carried, words = report.items.vocabulary()
        if report.word_codes is None:
            reading = [name for name, stream in report.streams.items() if stream.text is not None]
            codes = [report.after.codes[name] for name in reading or report.streams]
            latents, rises = latents_of_words(codes, carried, report.n_latents)
        else:
            encoded, of_words = report.word_codes
            if list(encoded) != words:
                raise ValueError(f"word_codes must be of the {len(words)} words of the texts, got {len(encoded)}")
            each = torch.arange(len(words) + 1, device="cpu")
            alone = Carried(each, each[:-1], len(words))
            latents, rises = latents_of_words(list(of_words.values()), alone, report.n_latents)
        samples: list[list[int]] = [[] for _ in words]
        offsets, concepts = carried.offsets.tolist(), carried.concepts.tolist()
        for number, row in enumerate(self.rows.tolist()):
            for word in concepts[offsets[row] : offsets[row + 1]]:
                if len(samples[word]) < WORD_SAMPLES:
                    samples[word].append(number)
        found = [
            [[l, round(1000 * x)] for l, x in zip(ls, xs, strict=True) if l >= 0 and x >= 0.0005]
            for ls, xs in zip(latents.tolist(), rises.tolist(), strict=True)
        ]
        return {"words": [word.lower() for word in words], "latents": found, "samples": samples}

    def _latents(self) -> Iterator[tuple[str, Any]]:
        others, shares = fire_together(self.report.after.codes, self.report.after.frequency)
        for place, some in _parts(self.latents, LATENTS):
            content = []
            for latent in some.tolist():
                together = zip(others[latent].tolist(), shares[latent].tolist(), strict=True)
                content.append({
                    "models": [self._latent(m, t, latent) for m, t in zip(self.report.models, self.tops, strict=True)],
                    "together": [[l, round(100 * x)] for l, x in together if l >= 0 and x >= 0.005],
                })  # fmt: skip
            yield f"latents/{place}", content

    def _latent(self, model: ModelReport, tops: Tops, latent: int) -> dict[str, Any]:
        hint, streams = self.report.after.concept(latent), []
        for s in range(len(self.report.streams)):
            rows = tops.of(s, latent)
            values = tops.values[s, latent, : len(rows)]
            strength = (100 * values / (values.max(initial=0) or 1)).round().astype(int).tolist()
            bears = [int(self.words.bears(row, hint)) for row in rows]
            streams.append([self.number[rows].tolist(), strength, bears, self.words.shared(rows, hint)])
        jaccard = math.nan if model.jaccard is None else model.jaccard[latent]
        stats = [_number(float(x)) for x in (model.agreement[latent], model.frequency[latent], jaccard)]
        return {"stats": stats, "streams": streams}

    def _texts(self) -> Iterator[tuple[str, Any]]:
        """[id, held out, which pictures it has, texts, in brief]."""
        items = self.report.items
        held_out = np.zeros(len(items), bool) if items.held_out is None else items.held_out
        for place, some in _parts(self.rows, TEXTS):
            content = []
            for row in some.tolist():
                texts = [clipped(column[row], CLIPPED) for column in items.texts.values()]
                content.append([str(items.ids[row]), int(held_out[row]), self.flags[self.number[row]], texts])
            yield f"texts/{place}", content

    def _samples(self) -> Iterator[tuple[str, Any]]:
        report, items, L = self.report, self.report.items, self.report.n_latents
        codes = report.after.codes
        strong = [strongest(code, ENERGIES) for code in codes.values()]
        shares = [(latents.numpy(), (1000 * share).round().long().numpy()) for latents, share in strong]
        near = [
            [
                None if s == t else self.number[retrieve(codes[s], codes[t], L, top=NEAREST).candidates.numpy()]
                for t in codes
            ]
            for s in codes
        ]
        for place, some in _parts(self.rows, SAMPLES):
            content = []
            for row in some.tolist():
                fired = [
                    [[l, x] for l, x in zip(ls[row].tolist(), xs[row].tolist(), strict=True) if x > 0]
                    for ls, xs in shares
                ]
                nearby = [
                    [[] if found is None else [n for n in found[row].tolist() if n >= 0] for found in of_stream]
                    for of_stream in near
                ]
                about = [clipped(str(column[row]), LONGEST) for column in items.about.values()]
                texts = [clipped(column[row], LONGEST) for column in items.texts.values()]
                content.append({"codes": fired, "near": nearby, "about": about, "texts": texts})
            yield f"samples/{place}", content


def _parts(values: npt.NDArray[np.int64], size: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    return ((place, values[start : start + size]) for place, start in enumerate(range(0, len(values), size)))


def _call(name: str, content: Any) -> bytes:
    """JSON is JavaScript; surrogates that stand alone are no text and become "?"."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return f'shard("{name}",{text});\n'.encode("utf-8", "replace")


def clipped(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _number(x: float) -> float | None:
    """Four digits are plenty; JSON knows neither NaN nor infinity."""
    return float(f"{x:.4g}") if math.isfinite(x) else None

"""Reports of made-up codes, small enough to write in a moment: what tests of the page share."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparc_fast.evaluate import Carried, Row
from sparc_fast.explain import Ink, Items, ModelReport, Report, Stream, Thumbnails

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"document.title='run'\"><!-- \u2028 \" ' & \\ {{ 7 * 7 }} $x^2$ __proto__"
CONCEPTS = ["ARROW", "CYRILLIC", "BRAILLE", "GREEK", "ACUTE", "ROMAN"]
STREAMS = {
    "sans": Stream("its picture", picture="sans"),
    "photo": Stream("its other picture", picture="photo"),
    "name": Stream("its name", text="name", picture="photo"),
}
OF_CONCEPT = 20  # samples


def code_of(latents: Sequence[Sequence[int]], n: int) -> tuple[Tensor, Tensor]:
    """A code of n samples in which each latent fires for these rows, strongest first."""
    fired: list[list[tuple[int, float]]] = [[] for _ in range(n)]
    for latent, rows in enumerate(latents):
        for place, row in enumerate(rows):
            fired[row].append((latent, 2 - place / len(rows)))
    k = max(map(len, fired))
    values, indices = torch.zeros(n, k), torch.zeros(n, k, dtype=torch.int32)
    for row, pairs in enumerate(fired):
        for slot, (latent, value) in enumerate(pairs):
            values[row, slot], indices[row, slot] = value, latent
        unused = [l for l in range(len(latents)) if l not in dict(pairs)]
        indices[row, len(pairs) :] = torch.tensor(unused[: k - len(pairs)], dtype=torch.int32)
    return values, indices


def a_report(seed: int = 0) -> Report:
    """20 samples a concept; latents 2i and 2i + 1 bear concept i after, and none before; the last one is dead."""
    rng = np.random.default_rng(seed)
    characters = []
    for concept in CONCEPTS:
        bearing = [c for c in map(chr, range(0x80, 0x2900)) if concept in unicodedata.name(c, "").split()]
        characters += bearing[:OF_CONCEPT]
    n, live = len(characters), 2 * len(CONCEPTS)
    names = [unicodedata.name(c) for c in characters]
    of = [list(range(OF_CONCEPT * i, OF_CONCEPT * (i + 1))) for i in range(len(CONCEPTS))]
    after = {s: code_of([*(rng.permutation(of[i // 2])[: 12 + i % 2] for i in range(live)), []], n) for s in STREAMS}
    before = {s: code_of([*(rng.permutation(n)[:14] for _ in range(live)), []], n) for s in STREAMS}
    labels = torch.tensor([[concept in name.split() for concept in CONCEPTS] for name in names])
    colours = rng.integers(0, 256, (n, 3), dtype=np.uint8)
    items = Items(
        ids=characters,
        texts={"name": names},
        pictures={
            "sans": Ink(rng.integers(1, 256, (n, 12, 12), dtype=np.uint8)),
            "photo": Thumbnails(n, lambda row: None if row == 3 else Image.new("RGB", (8, 6), tuple(colours[row]))),
        },
        carried=Carried.from_labels(labels),
        concepts=CONCEPTS,
        held_out=np.arange(n) % 5 == 0,
        about={"point": [f"U+{ord(c):04X}" for c in characters]},
    )
    curves = {"step": [0.0, 10.0, 20.0], "self": [1.0, 0.5, float("nan")], "dead": [0.0, 2.0, 3.0]}
    jaccard = torch.linspace(0.9, 0.1, live + 1)
    return Report(
        after=ModelReport.of("after", after, live + 1, items, jaccard=jaccard, curves=curves),
        before=ModelReport.of("before", before, live + 1, items, jaccard=jaccard / 3, curves=curves),
        streams=STREAMS,
        items=items,
        table=[
            Row("Jaccard", "How alike.", "higher", {"before": "0.02", "after": "0.21", "untrained": "0.01"}, "A", True),
            Row("L0", "How many.", "neither", {"before": "12", "after": "12"}, "B"),
        ],
        settings={"seed": "0", "command": "sparc-fast demo"},
    )


def with_a_private_latent(report: Report) -> tuple[Report, int, str]:
    """(the report where the latent of a place in its list is private to a stream, the latent, the stream)."""
    latent, stream = 2, "name"
    codes = {
        s: (values if s == stream else values.masked_fill(indices == latent, 0), indices)
        for s, (values, indices) in report.after.codes.items()
    }
    private = {stream: slice(latent, latent + 1)}
    after = ModelReport.of("after", codes, report.n_latents, report.items, private=private)
    return replace(report, before=None, after=after), latent, stream


def hostile(report: Report) -> Report:
    """Every text that can come from outside is as bad as text can be."""
    items = report.items
    renamed = {"sans": HOSTILE, "photo": "__proto__", "name": "constructor"}
    texts = [HOSTILE + "\ud800" * (row == 1) for row in range(len(items))]

    def model(m: ModelReport, name: str) -> ModelReport:
        names = [tuple(HOSTILE if word == CONCEPTS[0] else word for word in several) for several in m.names]
        return replace(m, name=name, names=names, codes={renamed[stream]: code for stream, code in m.codes.items()})

    assert report.before is not None
    return replace(
        report,
        before=model(report.before, "b" + HOSTILE),
        after=model(report.after, HOSTILE),
        streams={
            renamed[name]: Stream(HOSTILE, stream.text and HOSTILE, stream.picture)
            for name, stream in report.streams.items()
        },
        items=replace(
            items, ids=["<", "&", '"', "\u2028", *items.ids[4:]], texts={HOSTILE: texts}, concepts=[HOSTILE, *CONCEPTS[1:]],
            about={HOSTILE: texts, "__proto__": texts},
        ),
        table=[Row(HOSTILE, HOSTILE, "lower", {HOSTILE: HOSTILE, "before": HOSTILE}, HOSTILE, True)],
        settings={HOSTILE: HOSTILE},
    )  # fmt: skip


def pieces(page: Path, kind: str) -> Any:
    """The content of all pieces of a kind that a page loads, one after another, or of the one of that name."""
    (folder,) = page.parent.glob("report-*")
    if (folder / kind).is_dir():
        files = sorted((folder / kind).glob("*.js"), key=lambda path: int(path.stem))
        return [entry for path in files for entry in _content(path)]
    return _content(folder / f"{kind}.js")


def _content(path: Path) -> Any:
    call = re.fullmatch(r'shard\("([\w/]+)",(.*)\);\n', path.read_text("utf-8"), re.DOTALL)
    assert call
    assert path.as_posix().endswith(f"/{call[1]}.js")
    return json.loads(call[2])

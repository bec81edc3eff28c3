"""`index.html`: one self-contained page. Its words and numbers are one JSON block, drawn by page.js."""

from __future__ import annotations

import base64
import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .atlas import atlas, columns
from .contents import ModelReport, Report
from .latents import SharedWord, choose_latents, top

__all__ = ["page_data", "render_page"]

HERE = Path(__file__).parent


def _number(x: float) -> float | None:
    """Four digits are plenty; JSON knows neither NaN nor infinity."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


class _Index(dict[Any, int]):
    """Numbers things in the order in which they are first asked for."""

    def __missing__(self, key: Any) -> int:
        self[key] = len(self)
        return self[key]


def page_data(report: Report) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The page's JSON, and the rows that each stream's pictures (cells) come from."""
    shared_word = SharedWord(report)
    cells: dict[str, _Index] = {stream: _Index() for stream in report.streams}

    def shown(model: ModelReport, latent: int, hint: str) -> dict[str, Any]:
        samples, strength, word = [], [], []
        for stream in report.streams:
            rows = top(report, model, stream, latent)
            samples.append([cells[stream][row] for row in rows])
            strongest = max(rows.values(), default=0) or 1
            strength.append([round(100 * value / strongest) for value in rows.values()])
            word.append(shared_word([report.names[row] for row in rows], hint))
        stats = [_number(x[latent]) for x in (model.agreement, model.frequency, model.jaccard)]
        return {"samples": samples, "strength": strength, "word": word, "stats": stats}

    latents = []
    for latent in np.flatnonzero(report.after.alive()).tolist():
        concept = report.after.concept[latent]
        models = [shown(model, latent, concept) for model in (report.before, report.after)]
        latents.append({"id": latent, "concept": concept, "models": models})

    characters, faces = _Index(), _Index()
    streams = [
        {
            "name": stream,
            "about": report.streams[stream],
            "pictures": stream in report.images,
            "cells": [
                [characters[report.characters[row], report.names[row]], faces[report.faces[row]]] for row in rows
            ],
        }
        for stream, rows in cells.items()
    ]
    curves = [
        {"name": m.name, "curves": {key: [_number(y) for y in line] for key, line in m.curves.items()}}
        for m in (report.before, report.after)
    ]
    data = {
        "models": curves,
        "streams": streams,
        "characters": list(characters),
        "faces": list(faces),
        "latents": latents,
        "chosen": choose_latents(report),
    }
    return data, {stream: np.fromiter(rows, int) for stream, rows in cells.items()}


def render_page(report: Report) -> str:
    """The whole page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    data, cells = page_data(report)
    pictures = [
        {
            "stream": list(report.streams).index(stream),
            "columns": columns(len(cells[stream])),
            "png": base64.b64encode(atlas(images[cells[stream]])).decode(),
        }
        for stream, images in report.images.items()
    ]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        report=report,
        pictures=pictures,
        css=(HERE / "page.css").read_text("utf-8"),
        js=(HERE / "page.js").read_text("utf-8"),
        # "<" escaped: no "</script>" or "<!--" in a name can end the block
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        sections=[(name, list(rows)) for name, rows in groupby(report.table, key=lambda row: row.section)],
        table_columns=list(dict.fromkeys(column for row in report.table for column in row.cells)),
    )

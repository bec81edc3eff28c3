"""Samples as Apple's `embedding-atlas` takes them, which draws a map of them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparc_fast.data.readers import require
from sparc_fast.files import as_path, atomic_path

from .contents import Report
from .relations import energy, strongest

__all__ = ["write_atlas"]

STRONGEST = 3  # latents of a sample in each stream


def write_atlas(report: Report, path: str | Path) -> None:
    """Write a Parquet file with a row a sample: id, texts, names of its strongest latents, and places on a map.

    The places `projection_x` and `projection_y` are the two principal directions of the codes of all streams; with
    `embedding-atlas FILE --x projection_x --y projection_y` they are taken, else it makes its own of a text.

    Raises:
        ImportError: pyarrow is missing.
        OSError: the file cannot be written.
    """
    path = as_path(path, "path")
    pyarrow, parquet = require("pyarrow", path), require("pyarrow.parquet", path)
    items = report.items
    taken = {"id": list(map(str, items.ids))}
    taken |= {f"text {title}" if title in taken else title: list(column) for title, column in items.texts.items()}
    taken |= {f"about {title}" if title in taken else title: list(column) for title, column in items.about.items()}
    if items.held_out is not None:
        taken["held out"] = items.held_out.tolist()
    for stream, code in report.after.codes.items():
        latents, share = strongest(code, STRONGEST)
        taken[f"latents of {stream}"] = [
            ", ".join(dict.fromkeys(report.after.concept(l) or str(l) for l, x in zip(ls, xs, strict=True) if x > 0))
            for ls, xs in zip(latents.tolist(), share.tolist(), strict=True)
        ]
    places = _principal(report)
    taken |= {"projection_x": places[:, 0].tolist(), "projection_y": places[:, 1].tolist()}
    with atomic_path(path) as temporary:
        parquet.write_table(pyarrow.table(taken), temporary)


def _principal(report: Report, iterations: int = 8) -> np.ndarray:
    """The two main directions of the roots of energy, all streams added up, [N, 2], by power iteration."""
    codes = [
        (np.sqrt(energy(code).numpy()), code[1].long().clamp_min(0).numpy()) for code in report.after.codes.values()
    ]
    L, N = report.n_latents, len(report.items)
    mean = sum(np.bincount(i.ravel(), v.ravel(), L) for v, i in codes) / max(N, 1)
    axes = np.random.default_rng(0).standard_normal((L, 2))
    places = np.zeros((N, 2))
    for _ in range(iterations):
        axes, _ = np.linalg.qr(axes)
        places = sum(np.einsum("nk,nkd->nd", v, axes[i]) for v, i in codes) - mean @ axes
        axes = np.stack(
            [
                sum(np.bincount(i.ravel(), (v * places[:, d, None]).ravel(), L) for v, i in codes)
                - mean * places[:, d].sum()
                for d in range(2)
            ],
            axis=1,
        )
    return places

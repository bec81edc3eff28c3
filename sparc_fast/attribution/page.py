"""A page of heatmaps and words: static files that open from disk, and ask for nothing outside their folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparc_fast.explain.write import render
from sparc_fast.files import as_path, as_png, atomic_path, check_folder

from .texts import WordScores

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Looked", "Seen", "write_heatmaps"]

PAGE, FOLDER, STYLE = "heatmaps.html", "heatmaps", "heatmaps.css"
HERE = Path(__file__).parent
SHADES = 8  # of a word for, and as many of one against


@dataclass(frozen=True, eq=False)
class Seen:
    """What one stream says of a sample and a target: an overlay or words, the score, and a line about it."""

    stream: str
    score: float
    overlay: Image | None = None
    words: WordScores | None = None
    about: str = ""


@dataclass(frozen=True, eq=False)
class Looked:
    """A sample looked into."""

    title: str
    picture: Image | None
    texts: Sequence[str]
    targets: Sequence[tuple[str, Sequence[Seen]]] = field(default_factory=list)
    """(what was looked for, what each stream says)."""


def write_heatmaps(samples: Sequence[Looked], folder: str | os.PathLike[str], *, attribution: str = "") -> Path:
    """Write `heatmaps.html` and the folder `heatmaps` of its pictures into `folder`; returns the page's path.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = as_path(folder, "folder").resolve()
    check_folder(folder / FOLDER, "folder")
    for old in (folder / FOLDER).glob("*.png"):
        old.unlink()
    names: dict[int, str] = {}

    def save(picture: Image) -> str:
        if id(picture) not in names:
            names[id(picture)] = f"{len(names):04}.png"
            (folder / FOLDER / names[id(picture)]).write_bytes(as_png(picture, optimize=True))
        return f"{FOLDER}/{names[id(picture)]}"

    page = render(
        HERE / "heatmaps.html.jinja", samples=samples, save=save, shades=_shades, style=f"{FOLDER}/{STYLE}",
        attribution=attribution,
    )  # fmt: skip
    shutil.copyfile(HERE / STYLE, folder / FOLDER / STYLE)
    with atomic_path(folder / PAGE) as file:
        file.write_bytes(page)
    return folder / PAGE


def _shades(found: WordScores) -> list[tuple[str, str, float]]:
    """(word, classes of its shade, score) of each word."""
    top = max((abs(score) for score in found.scores), default=0.0) or 1.0
    return [
        (word, f"{'for' if score > 0 else 'against'} shade{round(SHADES * abs(score) / top)}", score)
        for word, score in zip(found.words, found.scores, strict=True)
    ]

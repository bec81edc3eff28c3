"""`alignment.png`: before and after in one picture, for a README."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image

from .contents import Report
from .latents import Tops
from .shards import Shards, clipped

__all__ = ["render_headline"]

INK, SOFT, LINE, ACCENT = "#1d1e20", "#62656b", "#e0ddd6", "#00756a"
WIDTH, DPI = 1600, 200  # pixels
TOP, PICTURE, TEXT_LINE, GAP = 176, 54, 30, 44  # pixels
COLUMNS = (262, 946)  # where before and after begin
LABEL = 146  # the stream's name, before its samples
SHOWN, TEXTS, LETTERS, WORD, FOOT = 8, 2, 36, 11, 40
LEAST = 112  # of a latent: what is told of it


def render_headline(report: Report, shards: Shards, n: int = 6) -> bytes:
    """A PNG of the first `n` chosen latents: concept, agreement, frequency, and all models' samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen, words, items = shards.chosen[:n], shards.words, report.items
    pictured = {name: stream.picture for name, stream in report.streams.items() if stream.text is None}
    heights = {name: PICTURE + 6 if pictured.get(name) else TEXTS * TEXT_LINE + 8 for name in report.streams}
    block = max(sum(heights.values()), LEAST) + GAP
    height = TOP + len(chosen) * block + (FOOT if report.attribution else 10)
    written = _font_has()
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, size: float, color: str = INK, weight: str = "normal") -> None:
        """`y` is the middle of the line, from the top; a "$" in a name is no mathematics."""
        figure.text(
            x / WIDTH, 1 - y / height, text, size=size, color=color, weight=weight, va="center", parse_math=False
        )

    def draw(tops: Tops, latent: int, x: int, y: int) -> None:
        concept = report.after.concept(latent)
        for s, (name, stream) in enumerate(report.streams.items()):
            rows = tops.of(s, latent)
            word = words.shared(rows, concept)
            middle = y + heights[name] / 2
            write(x, middle - 11, _short(name, WORD + 4), 7, SOFT)
            shown = _short(word if written(word) else "…", WORD) or ("mixed" if items.concepts else "")
            write(x, middle + 13, shown, 6, ACCENT if word == concept else INK, "bold" if word else "normal")
            readable = [row for row in rows if stream.text is None or written(items.texts[stream.text][row])]
            for i, row in enumerate(rows[:SHOWN] if pictured.get(name) else (readable or rows)[:TEXTS]):
                color = ACCENT if words.bears(row, concept) else INK
                if (title := pictured.get(name)) is not None:
                    paint(items.pictures[title].draw(row), x + LABEL + i * (PICTURE + 4), y, PICTURE, color)
                    continue
                text, left = items.ids[row] if stream.text is None else items.texts[stream.text][row], x + LABEL
                if stream.picture is not None:
                    picture = items.pictures[stream.picture].draw(row)
                    paint(picture, left, y + 6 + i * TEXT_LINE, TEXT_LINE - 4, INK)
                    left += TEXT_LINE + 2
                write(left, y + 8 + (i + 0.5) * TEXT_LINE, _short(text, LETTERS), 6.5, color)
            y += heights[name]

    def paint(picture: Image.Image | None, x: int, y: int, side: int, color: str) -> None:
        """On whole pixels: ink as alpha over one colour, colours with a line below where it is not that of all."""
        from matplotlib.colors import to_rgb

        if picture is None:
            return
        small = picture.resize((side, side), Image.Resampling.LANCZOS)
        image = np.empty((side, side, 4))
        if small.mode == "L":
            image[..., :3], image[..., 3] = to_rgb(color), np.asarray(small) / 255
        else:
            image[:] = np.asarray(small.convert("RGBA")) / 255
            if color == ACCENT:
                image[-3:] = *to_rgb(ACCENT), 1
        figure.figimage(image, x, height - y - side - 3)

    def rule(y: float) -> None:
        from matplotlib.lines import Line2D

        figure.add_artist(Line2D([40 / WIDTH, 1 - 40 / WIDTH], [1 - y / height] * 2, color=LINE, linewidth=0.6))

    write(40, 52, "One latent, one concept, in every stream", 14, INK, "bold")
    heads = [("", ACCENT)] if report.before is None else [("Before: ", INK), ("After: ", ACCENT)]
    for x, (when, color), model in zip(COLUMNS, heads, report.models, strict=False):
        write(x, 124, when + model.name, 9, color, "bold")
    for i, latent in enumerate(chosen):
        y = TOP + i * block
        rule(y - GAP / 2)
        write(40, y + 20, _short(report.after.concept(latent), 2 * WORD), 10, INK, "bold")
        agreement, frequency = report.after.agreement[latent], report.after.frequency[latent]
        told = [f"agreement {agreement:.2f}"] * (not np.isnan(agreement))
        for j, line in enumerate([*told, f"frequency {frequency:.1%}", f"latent {latent}"]):
            write(40, y + 64 + 30 * j, line, 7, SOFT)
        for x, tops in zip(COLUMNS, shards.tops, strict=False):
            draw(tops, latent, x, y)

    if report.attribution:
        write(40, height - FOOT / 2 - 4, report.attribution, 5, SOFT)

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # no font has all scripts
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def _font_has() -> Callable[[str], bool]:
    """Whether the font can write a text: of those that it cannot, the page shows what a picture has no room for."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return lambda text: all(ord(character) in known for character in text)


def _short(text: str, letters: int) -> str:
    return clipped(" ".join(text.split()), letters)

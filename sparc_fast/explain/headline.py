"""`alignment.png`: before and after in one picture, for a README."""

from __future__ import annotations

import io

import numpy as np

from .atlas import cells
from .contents import ModelReport, Report
from .latents import SharedWord, choose_latents, top, words

__all__ = ["render_headline"]

INK, SOFT, LINE, ACCENT = "#1d1e20", "#62656b", "#e0ddd6", "#00756a"
WIDTH, DPI = 1600, 200  # pixels
TOP, PICTURE, NAME_LINE, GAP = 176, 54, 30, 44  # pixels
COLUMNS = (262, 946)  # where before and after begin
LABEL = 146  # the stream's name, before its samples
SHOWN, NAMES, LETTERS, WORD = 8, 2, 36, 11


def render_headline(report: Report, n: int = 6) -> bytes:
    """A PNG of the first `n` chosen latents: concept, agreement, frequency, and both models' samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = choose_latents(report)[:n]
    shared_word = SharedWord(report)
    heights = {stream: PICTURE + 6 if stream in report.images else NAMES * NAME_LINE + 8 for stream in report.streams}
    block = sum(heights.values()) + GAP
    height = TOP + len(chosen) * block + 10
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, size: float, color: str = INK, weight: str = "normal") -> None:
        """`y` is the middle of the line, from the top; a "$" in a name is no mathematics."""
        figure.text(
            x / WIDTH, 1 - y / height, text, size=size, color=color, weight=weight, va="center", parse_math=False
        )

    def draw(model: ModelReport, latent: int, x: int, y: int) -> None:
        concept = report.after.concept[latent]
        for stream in report.streams:
            rows = list(top(report, model, stream, latent))
            word = shared_word([report.names[row] for row in rows], concept)
            rows = rows[:SHOWN]
            names = [report.names[row] for row in rows]
            middle = y + heights[stream] / 2
            write(x, middle - 11, stream, 7, SOFT)
            shown = word if len(word) <= WORD else word[: WORD - 1] + "…"
            write(x, middle + 13, shown or "mixed", 6, ACCENT if word == concept else INK, "bold" if word else "normal")
            if stream in report.images:
                pictures = cells(report.images[stream][rows])
                for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
                    paint(picture, x + LABEL + i * (PICTURE + 4), y, ACCENT if concept in words(name) else INK)
            else:
                for i, name in enumerate(names[:NAMES]):
                    short = name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"
                    color = ACCENT if concept in words(name) else INK
                    write(x + LABEL, y + 8 + (i + 0.5) * NAME_LINE, short, 6.5, color)
            y += heights[stream]

    def paint(picture: np.ndarray, x: int, y: int, color: str) -> None:
        """Ink as alpha over one colour, on whole pixels."""
        from matplotlib.colors import to_rgb
        from PIL import Image

        alpha = Image.fromarray(picture).resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
        image = np.empty((PICTURE, PICTURE, 4))
        image[..., :3], image[..., 3] = to_rgb(color), np.asarray(alpha) / 255
        figure.figimage(image, x, height - y - PICTURE - 3)

    def rule(y: float) -> None:
        from matplotlib.lines import Line2D

        figure.add_artist(Line2D([40 / WIDTH, 1 - 40 / WIDTH], [1 - y / height] * 2, color=LINE, linewidth=0.6))

    write(40, 52, "One latent, one concept, in every stream", 14, INK, "bold")
    for x, when, model, color in zip(
        COLUMNS, ("Before", "After"), (report.before, report.after), (INK, ACCENT), strict=True
    ):
        write(x, 124, f"{when}: {model.name}", 9, color, "bold")
    for i, latent in enumerate(chosen):
        y = TOP + i * block
        rule(y - GAP / 2)
        write(40, y + 20, report.after.concept[latent], 10, INK, "bold")
        write(40, y + 64, f"agreement {report.after.agreement[latent]:.2f}", 7, SOFT)
        write(40, y + 94, f"frequency {report.after.frequency[latent]:.1%}", 7, SOFT)
        write(40, y + 124, f"latent {latent}", 7, SOFT)
        draw(report.before, latent, COLUMNS[0], y)
        draw(report.after, latent, COLUMNS[1], y)

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()

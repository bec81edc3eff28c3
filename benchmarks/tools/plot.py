"""The ratios of a run, and training curves, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..figures import over
from ..record import Row
from ..table import case_of, ours_of


def plot(rows: Sequence[Row], path: Path) -> None:
    """Every baseline's and yardstick's time over ours, grouped by case, on a log axis; ours is the line at 1."""
    ours = ours_of(rows)
    others = [row for row in rows if row.seconds and row.role != "ours" and case_of(row) in ours][::-1]
    ratios = [over(row, ours[case_of(row)]) for row in others]
    figure = new_figure(9, 1.2 + 0.28 * len(others))
    axes = figure.subplots()
    colours = {"baseline": "#3b6ea5", "yardstick": "#b8b8b8"}
    widths = [ratio - 1 for ratio in ratios]
    bars = axes.barh(range(len(others)), widths, left=1, color=[colours[row.role] for row in others])
    axes.bar_label(bars, [f"{ratio:.2f}×" for ratio in ratios], padding=3, fontsize=8)
    axes.set_yticks(range(len(others)), [f"{row.what}  {row.shape}  {row.contender}" for row in others], fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("time ÷ ours (grey: does less than the operator)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_curves(curves: Sequence[tuple[str, int, Sequence[float], Sequence[float]]], path: Path) -> None:
    """(label, seed, steps, losses) of runs: above, the first label's losses and the others' drawn over them; below, how
    far a run is from the first label's of the same seed."""
    figure = new_figure(7, 4.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    first = {seed: losses for label, seed, _, losses in curves if label == curves[0][0]}
    colours = dict(zip(dict.fromkeys(label for label, *_ in curves), ("#3b6ea5", "#c8553d"), strict=False))
    named = set()
    for label, seed, steps, losses in curves:
        style = {"color": colours[label], "linewidth": 0.7, "linestyle": "-" if label == curves[0][0] else "--"}
        above.plot(steps, losses, label=None if label in named else label, **style)
        named.add(label)
        if label != curves[0][0]:
            percent = [100 * (loss / other - 1) for loss, other in zip(losses, first[seed], strict=True)]
            below.plot(steps, percent, color=colours[label], linewidth=0.7)
    above.set_yscale("log")
    above.set_ylabel("loss of a batch")
    above.legend(frameon=False)
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylabel("difference, %")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, format="png")


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'sparc_fast[demo]'") from error
    return Figure(figsize=(width, height), layout="constrained")

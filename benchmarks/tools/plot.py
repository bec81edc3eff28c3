"""The ratios of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..figures import over
from ..record import Row
from ..table import case_of, ours_of


def plot(rows: Sequence[Row], path: Path) -> None:
    """Every baseline's and yardstick's time over ours, grouped by case, on a log axis; ours is the line at 1."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'sparc_fast[demo]'") from error
    ours = ours_of(rows)
    others = [row for row in rows if row.seconds and row.role != "ours" and case_of(row) in ours][::-1]
    ratios = [over(row, ours[case_of(row)]) for row in others]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(others)), layout="constrained")
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

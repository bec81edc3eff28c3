"""The ratios of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .figures import Line


def plot(lines: Sequence[Line], path: Path) -> None:
    """Every baseline's and yardstick's time over ours, grouped by case, on a log axis; ours is the line at 1."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'sparc_fast[demo]'") from error
    others = [line for line in lines if line.ratio is not None and line.role != "ours"][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(others)), layout="constrained")
    axes = figure.subplots()
    colours = {"baseline": "#3b6ea5", "yardstick": "#b8b8b8"}
    widths = [(line.ratio or 1) - 1 for line in others]
    bars = axes.barh(range(len(others)), widths, left=1, color=[colours[l.role] for l in others])
    axes.bar_label(bars, [f"{line.ratio:.2f}×" for line in others], padding=3, fontsize=8)
    axes.set_yticks(range(len(others)), [f"{line.op}  {line.shape}  {line.contender}" for line in others], fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("time ÷ ours (grey: does less than the operator)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)

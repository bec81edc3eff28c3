"""Pictures of evaluations: alignment over latents and by depth, variance explained, and retrieval curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparc_fast.files import as_path, atomic_path, check_folder

from .evaluation import Evaluation
from .table import Evaluated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plots", "write_plots"]

COLORS = "#00756a", "#c2571a", "#4a6fb5", "#8f8a80", "#a2417a", "#7a8c2e", "#1d1e20"
BINS = 40


def check_plots(folder: Path) -> None:
    """Before any work is done for them: matplotlib is here, and the folder can be written."""
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'sparc_fast[evaluate]'")
    check_folder(folder, "--plots")


def write_plots(
    evaluations: Mapping[str, Evaluated], folder: str | Path, endings: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write the pictures for which there are figures into a folder, each whole or not at all.

    Of several runs the first is drawn. latents.*: how many latents have which concept alignment above chance and firing
    agreement; depth.*: alignment above chance by depth of a hierarchy; r2.*: variance explained of each stream (column)
    by the code of each (row); retrieval.*: recall at K, the mean over all pairs of streams.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    folder = as_path(folder, "folder")
    check_plots(folder)
    firsts = {name: one if isinstance(one, Evaluation) else one[0] for name, one in evaluations.items()}
    paths = []
    for name, draw in {"latents": _latents, "depth": _depth, "r2": _r2, "retrieval": _retrieval}.items():
        if (figure := draw(firsts)) is None:
            continue
        for ending in endings:
            paths.append(folder / f"{name}.{ending}")
            with atomic_path(paths[-1]) as temporary:
                figure.savefig(temporary, format=ending, dpi=200, metadata=None if ending == "png" else {"Date": None})
    return paths


def _figure(n: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _latents(evaluations: Mapping[str, Evaluation]) -> Figure | None:
    """How many latents have which score."""
    readings: dict[str, Callable[[Evaluation], torch.Tensor | None]] = {
        "concept alignment above chance": lambda e: e.alignment,
        "firing agreement": lambda e: e.agreement if e.results.get("agreement") is not None else None,
    }
    found = {words: {name: values for name, e in evaluations.items() if (values := read(e)) is not None}
             for words, read in readings.items()}  # fmt: skip
    found = {words: of_models for words, of_models in found.items() if of_models}
    if not found:
        return None
    figure, axes = _figure(len(found))
    for one, (words, of_models) in zip(axes, found.items(), strict=True):
        low = min(0.0, *(float(values.nan_to_num(0).min()) for values in of_models.values()))
        edges = np.linspace(max(low, -1), 1, BINS + 1)
        for color, (name, values) in zip(cycle(COLORS), of_models.items(), strict=False):
            counts, _ = np.histogram(values.nan_to_num(0).clamp(min=-1).numpy(), edges)
            one.stairs(counts, edges, label=_shown(name), color=color, linewidth=1.4)
        one.set(xlabel=words, ylabel="latents", yscale="symlog", ylim=(0, None))
    return _named(figure, axes[0])


def _depth(evaluations: Mapping[str, Evaluation]) -> Figure | None:
    """Alignment of labels lifted to each depth of their hierarchy."""
    found = {name: e["concepts_by_depth"] for name, e in evaluations.items() if e.results.get("concepts_by_depth")}
    if not found:
        return None
    figure, (one,) = _figure(1, 5)
    for color, (name, by_depth) in zip(cycle(COLORS), found.items(), strict=False):
        heights = [at.corrected for at in by_depth]
        one.plot(range(len(heights)), heights, marker="o", label=_shown(name), color=color, linewidth=1.6)
    one.axhline(0, color="#b5b1a8", linestyle=":", linewidth=1)
    one.set_xticks(range(len(heights)))
    one.set(xlabel="depth of the labels", ylabel="concept alignment above chance")
    return _named(figure, one)


def _r2(evaluations: Mapping[str, Evaluation]) -> Figure | None:
    """A heatmap a model."""
    found = {name: e for name, e in evaluations.items() if e.results.get("reconstruction") is not None}
    if not found:
        return None
    figure, axes = _figure(len(found), 3.2, 3.2)
    for one, (name, e) in zip(axes, found.items(), strict=True):
        shown = one.imshow(e.r2.numpy(), vmin=0, vmax=1, cmap="viridis")
        places = range(len(e.streams))
        one.set_xticks(places, map(_shown, e.streams), rotation=45, ha="right", fontsize=7)
        one.set_yticks(places, map(_shown, e.streams), fontsize=7)
        one.set_title(name, fontsize=8, parse_math=False)
        for s in places:
            for t in places:
                color = "white" if float(e.r2[s, t].nan_to_num(0)) < 0.6 else "black"
                one.text(t, s, f"{e.r2[s, t]:.2f}", ha="center", va="center", fontsize=7, color=color)
        one.set(xlabel="target", ylabel="source")
    figure.colorbar(shown, ax=axes, label="R²", shrink=0.8)
    return figure


def _retrieval(evaluations: Mapping[str, Evaluation]) -> Figure | None:
    """Recall by how many candidates are looked at."""
    found = {name: [r for r in e.retrieval.values() if r.ranks is not None and r.n] for name, e in evaluations.items()}
    found = {name: of_pairs for name, of_pairs in found.items() if of_pairs}
    if not found:
        return None
    figure, (one,) = _figure(1, 5)
    for color, (name, of_pairs) in zip(cycle(COLORS), found.items(), strict=False):
        most = min(r.n_candidates for r in of_pairs)
        at = np.unique(np.geomspace(1, max(most, 1), 100).astype(int))
        curves = [
            np.searchsorted(r.ranks.sort().values.numpy(), at, side="right") / r.n
            for r in of_pairs
            if r.ranks is not None
        ]
        one.plot(at, np.mean(curves, axis=0), label=_shown(name), color=color, linewidth=1.6)
    one.plot(at, at / at[-1], color="#b5b1a8", linestyle=":", linewidth=1, label="chance")
    one.set(xscale="log", xlabel="K", ylabel="recall at K, mean over pairs of streams", ylim=(0, 1))
    return _named(figure, one)


def _shown(name: str) -> str:
    """So that it is drawn as it is: no dollar begins a formula, and what begins with "_" is in a legend."""
    return f"{' ' * name.startswith('_')}{name}".replace("$", r"\$")


def _named(figure: Figure, axes: Axes) -> Figure:
    """With the models' names above, where they cover nothing."""
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=3, frameon=False, fontsize=7)
    return figure

"""Evaluations side by side, one column a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from statistics import stdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .evaluation import Evaluation, half_width
from .metrics import METRICS
from .registry import Metric, Row
from .resampling import Z

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Evaluated", "as_text", "comparison", "difference", "table"]


DASH = "–"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # t, 95 %, of 1 ... 10 degrees


class Comparison(list[Row]):
    """Rows that show themselves in a notebook, and what is to be said of them all, in sentences."""

    def __init__(self, rows: Iterable[Row] = (), notes: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.notes = list(notes)

    def __repr__(self) -> str:
        columns = ", ".join(self[0].cells) if self else "no models"
        return f"Comparison({len(self)} rows of {columns})"

    def _repr_html_(self) -> str:
        columns = list(self[0].cells) if self else []
        lines = [f"<tr><th></th>{''.join(f'<th>{escape(column)}</th>' for column in columns)}</tr>"]
        for section, rows in groupby(self, lambda row: row.section):
            lines.append(f'<tr><th colspan="{len(columns) + 1}" style="text-align: left">{escape(section)}</th></tr>')
            for row in rows:
                cells = "".join(f"<td>{escape(row.cells[column])}</td>" for column in columns)
                lines.append(f'<tr><td title="{escape(row.meaning)}">{escape(row.name)}</td>{cells}</tr>')
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table>{''.join(lines)}</table>{notes}"


Evaluated = Evaluation | Sequence[Evaluation]
"""One evaluation, or those of several runs that differ by their seed."""


def table(evaluations: Mapping[str, Evaluated]) -> Comparison:
    """Compare models: one row per score, one column per evaluation, for example "SPARC", "untrained".

    A column of several evaluations, of runs of the same settings with other seeds, is their mean. Intervals are of
    95 %, over samples (see `Evaluation.intervals`) and, where there are several runs, over seeds too (Student's t).
    What none of them has, such as what labels are needed for, has no row. Notes say in which scores the first column is
    better than another, worse, or within noise: the interval of the difference, resampled on the same samples, holds 0.
    """
    runs = {column: _runs(evaluated) for column, evaluated in evaluations.items()}
    scores = {column: [one.scores() for one in of_column] for column, of_column in runs.items()}
    rows = Comparison()
    for metric in _metrics(runs):
        for score in metric.scores:
            values = {column: _mean([one.get(score.key) for one in found]) for column, found in scores.items()}
            widths = {column: _width(of_column, score.key) for column, of_column in runs.items()}
            cells = {column: _cell(values[column], widths[column], score.format) for column in runs}
            first = next(iter(values.values()), None)
            highlight = score.highlight and first is not None and first > 0  # what chance explains is no headline
            rows.append(
                Row(
                    score.name, score.meaning, score.better, cells, "Over all streams", highlight, score.key, values,
                    widths,
                )
            )  # fmt: skip
    rows.notes = _notes(rows, runs)
    return rows


def comparison(evaluations: Mapping[str, Evaluated]) -> Comparison:
    """The metrics, then every pair of streams by itself; of several runs those of the first."""
    rows = table(evaluations)
    firsts = {column: _runs(evaluated)[0] for column, evaluated in evaluations.items()}
    for metric in _metrics({column: (one,) for column, one in firsts.items()}):
        found = {name: result for name, e in firsts.items() if (result := e.results.get(metric.key)) is not None}
        if found and metric.rows is not None:
            for row in metric.rows(found):
                rows.append(replace(row, cells={name: row.cells.get(name, DASH) for name in evaluations}))
    if rows.notes and any(len(_runs(evaluated)) > 1 for evaluated in evaluations.values()):
        rows.notes.insert(1, "rows without ± are of the first seed")
    return rows


def difference(one: Evaluated, other: Evaluated, score: str) -> tuple[float, float] | None:
    """How much a score of one is above the other's, and half the width of the difference's 95 % interval.

    Resampled on the same samples where both were evaluated on them, which is far narrower than what either's own
    interval says of it. None where a score is undefined, or was not resampled.
    """
    a, b = _runs(one), _runs(other)
    of_a, of_b = (_mean([e.scores().get(score) for e in runs]) for runs in (a, b))
    drawn_a, drawn_b = (_drawn(runs, score) for runs in (a, b))
    if of_a is None or of_b is None or drawn_a is None or drawn_b is None:
        return None
    same = drawn_a.shape == drawn_b.shape and a[0].n_samples == b[0].n_samples
    variances = [float((drawn_a - drawn_b).var()) if same else float(drawn_a.var() + drawn_b.var())]
    between = [_between(runs, score) for runs in (a, b)]
    width = math.sqrt(sum(Z**2 * v for v in variances) + sum(w**2 for w in between))
    return (of_a - of_b, width) if math.isfinite(width) else None


def _runs(evaluated: Evaluated) -> Sequence[Evaluation]:
    return (evaluated,) if isinstance(evaluated, Evaluation) else tuple(evaluated)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if values and len(known) == len(values) else None


def _drawn(runs: Sequence[Evaluation], score: str) -> Tensor | None:
    """The mean of several runs' score in each resampling of their common samples, [B]."""
    drawn = [run.resampled[score] for run in runs if score in run.resampled]
    if len(drawn) < len(runs) or len(set(map(len, drawn))) != 1:
        return None
    return torch.stack(drawn).mean(dim=0)


def _between(runs: Sequence[Evaluation], score: str) -> float:
    """Half the width of the 95 % interval over seeds of the mean of several runs; 0 of one."""
    values = [value for run in runs if (value := run.scores().get(score)) is not None]
    if len(values) < 2:
        return 0.0
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return quantile * stdev(values) / math.sqrt(len(values))


def _width(runs: Sequence[Evaluation], score: str) -> float | None:
    samples, seeds = half_width(_drawn(runs, score)), _between(runs, score)
    if samples is None:
        return seeds if len(runs) > 1 and _mean([run.scores().get(score) for run in runs]) is not None else None
    return math.hypot(samples, seeds)


def _cell(value: float | None, width: float | None, form: str) -> str:
    if value is None:
        return DASH
    return format(value, form) if width is None else f"{format(value, form)} ±{format(width, form)}"


def _notes(rows: Sequence[Row], runs: Mapping[str, Sequence[Evaluation]]) -> list[str]:
    """What the intervals are of, and for each other column where the first is better, worse, or neither."""
    if not any(width is not None for row in rows for width in row.intervals.values()):
        return []
    n_seeds = {len(of_column) for of_column in runs.values()}
    over = [one.drawn for of_column in runs.values() for one in of_column if one.resampled][:1]
    if max(n_seeds) > 1:
        over.append(f"{'up to ' if len(n_seeds) > 1 else ''}{max(n_seeds)} seeds")
        notes = [f"mean ± 95 % interval over {' and '.join(over)}"]
    else:
        notes = [f"± 95 % interval over {over[0]}, of one seed"]
    (first, ours), *others = runs.items()
    judged = [row for row in rows if row.better != "neither"]
    for name, theirs in others:
        found: dict[str, list[str]] = {"better": [], "worse": [], "noise": []}
        for row in judged:
            if (apart := difference(ours, theirs, row.key)) is not None:
                above, width = apart
                good = (above > 0) == (row.better == "higher")
                found["noise" if abs(above) <= width else "better" if good else "worse"].append(row.name)
        words = (
            [f"better in {len(found['better'])} of {sum(map(len, found.values()))} scores"] if found["better"] else []
        )
        words += [f"worse in {'; '.join(found['worse'])}"] if found["worse"] else []
        words += [f"within noise in {'; '.join(found['noise'])}"] if found["noise"] else []
        if words:
            notes.append(f"{first} against {name}: {', '.join(words)}")
    return notes


def _metrics(runs: Mapping[str, Sequence[Evaluation]]) -> list[Metric]:
    """Of which any has a result, in the order of the registry; of no evaluation the default ones."""
    if not runs:
        return [metric for metric in METRICS if metric.default]
    found = {metric.key: metric for of_column in runs.values() for one in of_column for metric in one.metrics}
    known = [metric.key for metric in METRICS]
    told = [m for m in found.values() if any(one.results.get(m.key) is not None for of in runs.values() for one in of)]
    return sorted(
        told or found.values(), key=lambda metric: known.index(metric.key) if metric.key in known else len(known)
    )


def as_text(rows: Sequence[Row], samples: str) -> Table:
    """The table for a terminal, by rich; the first model's column is bold."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    columns = list(rows[0].cells) if rows else []
    text = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    text.add_column(samples)
    for name in columns:
        text.add_column(escape(name), justify="right", style="bold" if name == columns[0] else None)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            text.add_section()
            text.add_row(f"[bold]{section}[/bold]")
        text.add_row(escape(row.name), *(row.cells[name] for name in columns))
    return text

"""Evaluations side by side, one column a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from .evaluation import Evaluation
from .metrics import METRICS
from .registry import Metric, Row

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Row", "as_text", "comparison", "table"]


DASH = "–"


class Comparison(list[Row]):
    """Rows that show themselves in a notebook."""

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
        return f"<table>{''.join(lines)}</table>"


def table(evaluations: Mapping[str, Evaluation]) -> Comparison:
    """Compare models: one row per score, one column per evaluation, for example "SPARC", "untrained"."""
    scores = {column: evaluation.scores() for column, evaluation in evaluations.items()}
    rows = Comparison()
    for metric in _metrics(evaluations):
        for score in metric.scores:
            values = {column: by_key.get(score.key) for column, by_key in scores.items()}
            cells = {c: DASH if value is None else format(value, score.format) for c, value in values.items()}
            rows.append(
                Row(
                    score.name, score.meaning, score.better, cells, "Over all streams", score.highlight, score.key,
                    values,
                )
            )  # fmt: skip
    return rows


def comparison(evaluations: Mapping[str, Evaluation]) -> Comparison:
    """The metrics, then every pair of streams by itself."""
    rows = table(evaluations)
    for metric in _metrics(evaluations):
        found = {name: result for name, e in evaluations.items() if (result := e.results.get(metric.key)) is not None}
        if found and metric.rows is not None:
            for row in metric.rows(found):
                rows.append(replace(row, cells={name: row.cells.get(name, DASH) for name in evaluations}))
    return rows


def _metrics(evaluations: Mapping[str, Evaluation]) -> list[Metric]:
    """Of any of them, in the order of the registry; of no evaluation the default ones."""
    if not evaluations:
        return [metric for metric in METRICS if metric.default]
    found = {metric.key: metric for evaluation in evaluations.values() for metric in evaluation.metrics}
    known = [metric.key for metric in METRICS]
    return sorted(found.values(), key=lambda metric: known.index(metric.key) if metric.key in known else len(known))


def as_text(rows: list[Row], samples: str) -> Table:
    """The table for a terminal, by rich; the first model's column is bold."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    columns = list(rows[0].cells)
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

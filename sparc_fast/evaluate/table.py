"""Evaluations side by side, one column a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from .evaluation import METRICS, Better, Evaluation

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Row", "as_text", "comparison", "table"]

HIGHLIGHTS = ("jaccard_single", "r1")


@dataclass(frozen=True)
class Row:
    """One line of the comparison. A column is a model's name."""

    name: str
    meaning: str  # one sentence
    better: Better
    cells: dict[str, str]  # column -> what is written there; a dash where the metric is undefined
    section: str = ""  # rows of one section stand together under its name
    highlight: bool = False  # also shown as a large figure at the top of a page
    key: str = ""  # of the metric; "" where a cell holds several figures
    values: dict[str, float | None] = field(default_factory=dict)  # column -> the metric, None where it is undefined


class Comparison(list[Row]):
    """Rows that show themselves in a notebook."""

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
    """Compare models: one row per metric, one column per evaluation, for example "SPARC", "untrained"."""
    scores = {column: evaluation.scores() for column, evaluation in evaluations.items()}
    rows = Comparison()
    for m in METRICS:
        values = {column: by_key[m.key] for column, by_key in scores.items()}
        cells = {c: "–" if value is None else format(value, m.format) for c, value in values.items()}
        rows.append(Row(m.name, m.meaning, m.better, cells, "Over all streams", m.key in HIGHLIGHTS, m.key, values))
    return rows


def comparison(evaluations: Mapping[str, Evaluation]) -> Comparison:
    """The metrics, then every pair of streams by itself."""
    rows = table(evaluations)
    first = next(iter(evaluations.values()))
    for query, candidate in first.retrieval:
        cells = {}
        for name, evaluation in evaluations.items():
            r = evaluation.retrieval[query, candidate]
            cells[name] = f"{r.r1:.3f} / {r.r5:.3f} / {r.r10:.3f} · {r.median_rank:.0f} · {r.mrr:.3f}"
        meaning = (
            f"R@1 / R@5 / R@10 · median rank · MRR of finding a sample's {candidate} code from its {query} code, "
            f"among {r.n_candidates} candidates."
        )
        rows.append(Row(f"{query} → {candidate}", meaning, "higher", cells, "Retrieval between two streams"))
    for s, source in enumerate(first.streams):
        for t, target in enumerate(first.streams):
            cells = {name: f"{e.nmse[s, t]:.3f} / {e.r2[s, t]:.3f}" for name, e in evaluations.items()}
            meaning = f"NMSE / R² of {target} reconstructed from the {source} code alone."
            rows.append(Row(f"{source} → {target}", meaning, "neither", cells, "Reconstruction, source to target"))
    return rows


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

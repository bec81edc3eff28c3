"""Evaluations side by side, one column a model."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.markup import escape
from rich.table import Table

from sparc_fast.evaluate import Evaluation, table
from sparc_fast.report import Row

HIGHLIGHTS = ("jaccard_single", "r1")


def comparison(evaluations: Mapping[str, Evaluation]) -> list[Row]:
    """The metrics, then every pair of streams by itself."""
    rows = [
        Row(row.name, row.meaning, row.better, row.cells, "Over all streams", row.key in HIGHLIGHTS)
        for row in table(evaluations)
    ]
    first = next(iter(evaluations.values()))
    for query, candidate in first.retrieval:
        cells = {}
        for name, evaluation in evaluations.items():
            r = evaluation.retrieval[query, candidate]
            cells[name] = f"{r.r1:.3f} / {r.r5:.3f} / {r.r10:.3f} · {r.median_rank:.0f} · {r.mrr:.3f}"
        meaning = (
            f"R@1 / R@5 / R@10 · median rank · MRR of finding a sample's {candidate} code from its {query} code, "
            f"among {r.n} candidates."
        )
        rows.append(Row(f"{query} → {candidate}", meaning, "higher", cells, "Retrieval between two streams"))
    for s, source in enumerate(first.streams):
        for t, target in enumerate(first.streams):
            cells = {name: f"{e.nmse[s, t]:.3f} / {e.r2[s, t]:.3f}" for name, e in evaluations.items()}
            meaning = f"NMSE / R² of {target} reconstructed from the {source} code alone."
            rows.append(Row(f"{source} → {target}", meaning, "neither", cells, "Reconstruction, source to target"))
    return rows


def as_text(rows: list[Row], samples: str) -> Table:
    """The table for a terminal; the first model's column is bold."""
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

"""`index.html`: what the page says whatever is looked at. The rest is drawn by its scripts, from pieces."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from sparc_fast.sizes import counted

from .contents import Report

__all__ = ["render_page"]


def render_page(report: Report, pieces: str) -> str:
    """The page as text; `pieces` is the folder of what it loads."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.jinja").render(
        report=report,
        counted=counted,
        pieces=pieces,
        sections=[(name, list(rows)) for name, rows in groupby(report.table, key=lambda row: row.section)],
        table_notes=getattr(report.table, "notes", ()),
        table_columns=list(dict.fromkeys(column for row in report.table for column in row.cells)),
    )

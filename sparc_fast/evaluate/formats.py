"""A comparison as text for other programs: CSV, LaTeX and Markdown; and all figures as JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sparc_fast.files import atomic_path

from .evaluation import Evaluation
from .registry import Row
from .table import Comparison, Evaluated, table

__all__ = ["FORMATS", "as_csv", "as_json", "as_latex", "as_markdown", "write_comparison"]

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\to$",
    "·": r"$\cdot$",
}
LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"²": r"\textsuperscript{2}", "–": "--", "…": r"\dots{}"}
LATEX |= {"±": r"$\pm$", "λ": r"$\lambda$", "≥": r"$\ge$", "≤": r"$\le$"}


def as_json(rows: Comparison, evaluations: Mapping[str, Evaluated]) -> str:
    """By model `Evaluation.to_dict`; of several runs their mean scores, and all of each under "runs"."""
    summaries: dict[str, Any] = {}
    scores = table(evaluations)
    for name, evaluated in evaluations.items():
        if isinstance(evaluated, Evaluation):
            summaries[name] = evaluated.to_dict()
            continue
        summaries[name] = {
            "scores": {row.key: row.values[name] for row in scores},
            "intervals": {row.key: row.intervals[name] for row in scores},
            "runs": [one.to_dict() for one in evaluated],
        }
    return json.dumps(summaries, indent=2) + "\n"


def as_csv(rows: Comparison, evaluations: Mapping[str, Evaluated] | None = None) -> str:
    """A line for each row and model: the number at full precision and half its interval, or the text of several."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["section", "name", "key", "better", "model", "value", "half_width_95", "text"])
    for row in rows:
        for model, cell in row.cells.items():
            value, width = row.values.get(model), row.intervals.get(model)
            numbers = ["" if number is None else repr(number) for number in (value, width)]
            lines.writerow([row.section, row.name, row.key, row.better, model, *numbers, cell])
    return text.getvalue()


def as_markdown(rows: Comparison, evaluations: Mapping[str, Evaluated] | None = None) -> str:
    """A table, the best of each row bold, and the notes below."""
    columns = list(rows[0].cells) if rows else []
    lines = [_piped(["", *map(_plain, columns)]), _piped(["---"] * (len(columns) + 1))]
    for section, of_section in groupby(rows, lambda row: row.section):
        lines.append(_piped([f"**{_plain(section)}**", *[""] * len(columns)]))
        for row in of_section:
            best = _best(row)
            cells = [f"**{_plain(c)}**" if name in best else _plain(c) for name, c in row.cells.items()]
            lines.append(_piped([_plain(row.name), *cells]))
    return "\n".join([*lines, "", *(f"{note}.\n" for note in map(_plain, rows.notes))])


def as_latex(rows: Comparison, evaluations: Mapping[str, Evaluated] | None = None) -> str:
    """A tabular that needs no package, the best of each row bold; the notes are comments."""
    columns = list(rows[0].cells) if rows else []
    lines = [f"% {_latex(note)}" for note in rows.notes]
    lines += [
        f"\\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\hline",
        " & ".join(["", *map(_latex, columns)]) + r" \\",
    ]
    for section, of_section in groupby(rows, lambda row: row.section):
        lines += [r"\hline", f"\\multicolumn{{{len(columns) + 1}}}{{l}}{{\\textbf{{{_latex(section)}}}}} \\\\"]
        for row in of_section:
            best = _best(row)
            cells = [f"\\textbf{{{_latex(c)}}}" if name in best else _latex(c) for name, c in row.cells.items()]
            lines.append(" & ".join([_latex(row.name), *cells]) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


FORMATS: Mapping[str, Callable[[Comparison, Mapping[str, Evaluated]], str]] = {
    ".json": as_json,
    ".csv": as_csv,
    ".tex": as_latex,
    ".md": as_markdown,
}


def write_comparison(rows: Comparison, evaluations: Mapping[str, Evaluated], paths: Sequence[str | Path]) -> None:
    """Write files in the formats of their endings, .json, .csv, .tex or .md, each whole or not at all.

    Raises:
        ValueError: another ending.
        OSError: a file cannot be written.
    """
    for path in check_endings(paths):
        with atomic_path(path) as temporary:
            temporary.write_text(FORMATS[path.suffix.lower()](rows, evaluations), encoding="utf-8")


def check_endings(paths: Sequence[str | Path]) -> list[Path]:
    """The paths, before any work is done for them."""
    found = [Path(path) for path in paths]
    for path in found:
        if path.suffix.lower() not in FORMATS:
            raise ValueError(f"a table must be written to a file that ends in {', '.join(FORMATS)}, got {path}")
    return found


def _best(row: Row) -> list[str]:
    """The columns of the best value; none where better is neither, or all are the same."""
    known = {name: value for name, value in row.values.items() if value is not None}
    if row.better == "neither" or len(set(known.values())) < 2:
        return []
    best = (max if row.better == "higher" else min)(known.values())
    return [name for name, value in known.items() if value == best]


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


def _latex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)

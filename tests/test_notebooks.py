"""What a notebook shows, and the quickstart, from a folder of pictures to what a latent sees in them."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from reports import CONCEPTS, HOSTILE, a_report, hostile

from sparc_fast.evaluate import Comparison, Row
from sparc_fast.explain import Latent
from sparc_fast.training import progress

QUICKSTART = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


def test_a_latent_shows_its_names_and_the_strongest_samples_of_every_stream_side_by_side() -> None:
    report = a_report()
    latent = Latent(report, 2, samples=5)
    assert repr(latent).startswith(f"Latent 2 of {report.after.name}: {CONCEPTS[1]} (agreement ")
    shown = latent._repr_html_()
    assert [row.split("</th>")[0] for row in shown.split("<tr><th>")[1:]] == list(report.streams)
    for name, line in zip(report.streams, shown.split("<tr><th>")[1:], strict=True):
        values, indices = report.after.codes[name]
        fired = [(-float(values[row][indices[row] == 2].sum()), row) for row in range(len(values))]
        strongest = [row for value, row in sorted(fired)[:5] if value < 0]
        assert latent.rows[name] == strongest
        assert line.count("<td") == 5
        for row in strongest:
            assert (report.items.texts["name"][row] in line) == (name == "name")
    assert shown.count('src="data:image/png;base64,') == 15


def test_a_dead_latent_and_one_of_the_model_before_are_shown_too() -> None:
    report = a_report()
    assert "<td>–</td>" in Latent(report, report.n_latents - 1)._repr_html_()
    assert f"of {report.before.name}: " in repr(Latent(report, 0, before=True))
    with pytest.raises(ValueError, match=r"number must be in 0 \.\.\. 12, got 13"):
        Latent(report, 13)


def test_texts_in_a_notebook_are_data() -> None:
    shown = Latent(hostile(a_report()), 0)._repr_html_()
    assert "<script" not in shown
    assert 'onerror="' not in shown
    assert "&lt;/script&gt;" in shown
    table = Comparison([Row(HOSTILE, HOSTILE, "higher", {HOSTILE: HOSTILE}, HOSTILE)])._repr_html_()
    assert "<script" not in table
    assert table.count("&lt;script&gt;") == 5


def test_a_comparison_shows_a_row_a_metric_and_a_column_a_model_by_section() -> None:
    cells = {"SPARC": "0.5", "untrained": "0.1"}
    rows = Comparison(
        Row(name, "why", "higher", cells, section) for name, section in (("a", "x"), ("b", "x"), ("c", "y"))
    )
    shown = rows._repr_html_()
    assert "<tr><th></th><th>SPARC</th><th>untrained</th></tr>" in shown
    assert re.findall(r">(\w)</t[hd]>", shown) == ["x", "a", "b", "y", "c"]
    assert shown.count("<td>0.5</td><td>0.1</td>") == 3


@pytest.mark.parametrize(("widgets", "shown"), [(True, progress.Bar), (False, progress.Lines)])
def test_a_notebook_has_a_bar_where_there_are_widgets_to_draw_it(
    widgets: bool, shown: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")

    class ZMQInteractiveShell: ...

    there = progress.find_spec
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr(progress, "find_spec", lambda name: (widgets or None) if name == "ipywidgets" else there(name))
    assert type(progress.best_display()) is shown


def test_the_quickstart_runs_from_a_folder_of_pictures_to_a_latent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells one after another in one process, the last line of each shown: as a kernel does, without needing one."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a cell adds the folder of its encoders
    monkeypatch.delitem(sys.modules, "encoders", raising=False)
    book = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    cells = [cell.replace("steps=600", "steps=300") for cell in cells]
    assert cells[0].startswith("%pip install ")
    names: dict[str, Any] = {"__name__": "__main__"}
    shown: list[Any] = []
    for cell in cells[1:]:
        tree = ast.parse(cell)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    pages = [thing._repr_html_() for thing in shown if hasattr(thing, "_repr_html_")]
    assert len(pages) >= 3, "codes, a comparison and a latent"
    table = names["table"]
    r1 = next(row.values for row in table if row.key == "r1")
    assert r1["trained"] > 3 * r1["untrained"]
    latent = shown[-1]
    (name, *_) = latent.model.names[latent.number]
    captions = names["folder"].column("text")
    for rows in latent.rows.values():
        assert sum(name in captions[row] for row in rows) > 0.8 * len(rows), "it is the same concept in every stream"

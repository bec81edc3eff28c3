"""Labels and groups of samples: every form in which they come, and one clear error for any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparc_fast.evaluate.labels import as_groups, as_labels

CLASSES = [2, 0, 7, 2, 0]
ONE_HOT = [[False, True, False], [True, False, False], [False, False, True], [False, True, False], [True, False, False]]
NAMES = ["cat", "ant", "dog", "cat", "ant"]


def write(path: Path, content: Any) -> Path:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(content), path)
    return path


@pytest.mark.parametrize("classes", [CLASSES, NAMES], ids=["ids", "names"])
@pytest.mark.parametrize("form", [list, np.array, "npy", "csv", "txt csv", "parquet", "column"])
def test_classes_become_a_concept_each_in_every_form_in_which_they_are_kept(
    classes: list[Any], form: Any, tmp_path: Path
) -> None:
    lines = "\n".join(map(str, classes))
    two_columns = "\n".join(f"{name},1" for name in classes)
    source = {
        "npy": lambda: write(tmp_path / "l.npy", np.array(classes)),
        "csv": lambda: str(write(tmp_path / "l.csv", f"label,x\n{two_columns}")),
        "txt csv": lambda: write(tmp_path / "l.csv", lines),
        "parquet": lambda: (write(tmp_path / "l.parquet", {"other": [0.5] * 5, "kind": classes}), "kind"),
        "column": lambda: f"{write(tmp_path / 'l.parquet', {'kind': classes, 'label': classes})}:kind",
    }
    given = form(classes) if callable(form) else source[form]()
    assert as_labels(given, (5,)).tolist() == ONE_HOT


def test_truth_values_stay_as_they_are_and_one_row_of_them_is_one_concept(tmp_path: Path) -> None:
    truth = torch.rand(5, 3) < 0.5
    torch.save(truth, tmp_path / "l.pt")
    for given in (truth, truth.numpy(), write(tmp_path / "l.npy", truth.numpy()), tmp_path / "l.pt"):
        assert torch.equal(as_labels(given, (5,)), truth)
    assert torch.equal(as_labels(truth[:, 0], (5,)), truth[:, :1])
    assert as_labels(torch.zeros(0, 2, dtype=torch.bool), (0,)).shape == (0, 2)
    assert as_labels([], (0,)).shape == (0, 0)


def test_a_sample_without_a_class_carries_no_concept() -> None:
    assert as_labels([1, -1, 0], (3,)).tolist() == [[False, True], [False, False], [True, False]]
    assert as_labels(["b", None, "a"], (3,)).tolist() == [[False, True], [False, False], [True, False]]


def test_a_table_may_lack_names_of_columns_where_it_has_a_single_one(tmp_path: Path) -> None:
    for n, text in enumerate(["2\n0\n7\n2\n0\n", "label\n2\n0\n7\n2\n0", "kind\r\n2\r\n0\r\n7\r\n2\r\n0\r\n"]):
        assert as_labels(write(tmp_path / f"{n}.csv", text), (5,)).tolist() == ONE_HOT
    for n, text in enumerate(
        ["kind\na\n\nb\n\n", "a\n\nb"]
    ):  # an empty line is a sample without, but for the last ones
        table = write(tmp_path / f"empty {n}.csv", text)
        assert as_labels(table, (3,)).tolist() == [[True, False], [False, False], [False, True]]
    quoted = write(tmp_path / "q.csv", '\ufeffid,label\n1,"a, b"\n2,"c"\n')
    assert as_labels(quoted, (2,)).tolist() == [[True, False], [False, True]]


def test_labels_of_a_sample_are_repeated_for_its_tokens_or_there_is_one_a_token() -> None:
    assert as_labels([1, 0], (2, 3)).tolist() == [[False, True]] * 3 + [[True, False]] * 3
    each = torch.tensor([[0, 1, 1], [1, 0, 1]])
    assert as_labels(each, (2, 3)).int().argmax(1).tolist() == each.flatten().tolist()
    assert torch.equal(as_labels(each.flatten(), (2, 3)), as_labels(each, (2, 3)))
    truth = torch.rand(2, 3, 4) < 0.5
    assert torch.equal(as_labels(truth, (2, 3)), truth.reshape(6, 4))
    assert torch.equal(as_labels(truth[:, 0], (2, 3)), truth[:, 0].repeat_interleave(3, 0))
    assert as_groups([[5, 5, 9], [9, 5, 5]], (2, 3)).tolist() == [0, 0, 1, 1, 0, 0]


def test_groups_are_numbered_by_identifiers_of_any_kind(tmp_path: Path) -> None:
    assert as_groups(["b", "a", "b"], (3,)).tolist() == [1, 0, 1]
    assert as_groups(torch.tensor([9, -4, 9]), (3,)).tolist() == [1, 0, 1]
    path = write(tmp_path / "c.csv", "image,caption\nx.jpg,one\ny.jpg,two\nx.jpg,three\n")
    assert as_groups((path, "image"), (3,)).tolist() == [0, 1, 0]


WANTED = r"must be bool \[N=2, C\] or \[N\], or class ids or names \[N\]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 3), rf"labels {WANTED}, got float32 \[2, 3\]"),
        (np.zeros((2, 3), np.uint8), rf"labels {WANTED}, got uint8 \[2, 3\]"),
        ([1, 2, 3], rf"labels {WANTED}, got int64 \[3\]"),
        (torch.zeros((), dtype=torch.bool), rf"labels {WANTED}, got bool \[\]"),
        (torch.zeros(2, dtype=torch.bfloat16, requires_grad=True), rf"labels {WANTED}, got bfloat16 \[2\]"),
        (torch.eye(2).bool().to_sparse(), rf"labels {WANTED}, got sparse_coo \[2, 2\]"),
        ([1.5, 2.5], rf"labels {WANTED}, got float64 \[2\]"),
        ([{}, {}], rf"labels {WANTED}, got objects"),
        ([[1], [2, 3]], rf"labels {WANTED}, got objects"),
        ([0, -2], "labels must be class ids >= 0, or -1 for none, got -2"),
        ("none.csv", "labels must be a file, but there is none at none.csv"),
        ("labels.xlsx", "labels must be in a file that ends in one of .* got labels.xlsx"),
    ],
)
def test_other_labels_are_refused_by_what_was_expected_and_what_came(given: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        as_labels(given, (2,))


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("o.npy", np.array([{}, 1], dtype=object), None, "o.npy is truncated or foreign, or holds objects"),
        ("t.npy", "1\n2", None, "t.npy is truncated or foreign, or holds objects"),
        ("n.npy", np.array([1, 2]), "kind", "n.npy holds a single array, and no column 'kind'"),
        ("c.csv", "a,b\n1,2\n3,4", None, r"has no column 'label' among 'a', 'b': name one, FILE:COLUMN"),
        ("c.csv", "a,b\n1,2\n3,4", "c", "has no column 'c' among 'a', 'b'"),
        ("c.csv", "a,b\n1,2\n3", "a", "has 2 columns, but 1 in its row 2"),
        ("c.csv", "1\n2\n3\n4", None, r"got int64 \[4\] in .*c.csv"),
        ("p.parquet", {"a": [1, 2], "b": [1, 2]}, None, "which has 'a', 'b', got 'label'"),
        ("p.parquet", {"a": [0.5, 2]}, "a", r"got float64 \[2\] in .*p.parquet:a"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_advice_to_unpickle(
    name: str, content: Any, column: str | None, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"^labels {WANTED}.*{message}") as caught:
        as_labels(path if column is None else (path, column), (2,))
    assert "pickle" not in str(caught.value)


def test_groups_are_neither_truth_values_nor_missing() -> None:
    with pytest.raises(ValueError, match=r"groups must be ids \[N=2\], integers or text, got bool \[2\]"):
        as_groups([True, False], (2,))
    with pytest.raises(ValueError, match="groups must have an id for every sample, got none for 1"):
        as_groups(["a", None], (2,))
    with pytest.raises(ValueError, match=r"groups must be ids .* or one for each of \[2, 3\] tokens, got int64 \[5\]"):
        as_groups(range(5), (2, 3))  # type: ignore[arg-type]

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import seeded

from sparc_fast.evaluate import Hierarchy

ANIMALS = {"animal": None, "mammal": "animal", "bird": "animal", "cat": "mammal", "dog": "mammal", "car": None}
TREE = {
    "LabelName": "/m/root",
    "Subcategory": [
        {"LabelName": "/m/toy", "Subcategory": [{"LabelName": "/m/bear"}]},
        {
            "LabelName": "/m/animal",
            "Part": [{"LabelName": "/m/ear"}],
            "Subcategory": [{"LabelName": "/m/mammal", "Subcategory": [{"LabelName": "/m/bear"}]}],
        },
    ],
}


@st.composite
def forests(draw: st.DrawFn) -> Hierarchy:
    parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(0, 12)))]
    order = draw(st.permutations(range(len(parents))))
    place = {old: new for new, old in enumerate(order)}
    return Hierarchy(tuple(f"c{i}" for i in order), tuple(-1 if parents[i] < 0 else place[parents[i]] for i in order))


def ancestors(tree: Hierarchy, node: int) -> list[int]:
    """The node, and all above it, the root last."""
    return [node] + (ancestors(tree, tree.parents[node]) if tree.parents[node] >= 0 else [])


@given(tree=forests(), data=st.data())
def test_lifting_and_closing_equal_their_definitions(tree: Hierarchy, data: st.DataObject) -> None:
    columns = data.draw(st.permutations(range(len(tree))))[: data.draw(st.integers(0, len(tree)))]
    labels = torch.rand(5, len(columns), generator=seeded(data.draw(st.integers(0, 2**31)))) < 0.4
    names = [tree.names[node] for node in columns]
    assert tree.depths == tuple(len(ancestors(tree, node)) - 1 for node in range(len(tree)))

    def carried(n: int) -> list[int]:
        return [columns[c] for c in range(len(columns)) if labels[n, c]]

    closed, closed_names = tree.closed(labels, names)
    for n, row in enumerate(closed):
        of_row = {closed_names[c] for c in range(len(closed_names)) if row[c]}
        assert of_row == {tree.names[a] for node in carried(n) for a in ancestors(tree, node)}
    for depth in range(tree.max_depth + 1):
        lifted, lifted_names = tree.at_depth(labels, names, depth)
        assert sorted(lifted_names, key=tree.names.index) == list(lifted_names)
        for n, row in enumerate(lifted):
            of_row = {lifted_names[c] for c in range(len(lifted_names)) if row[c]}
            above = [ancestors(tree, node)[::-1] for node in carried(n)]
            assert of_row == {tree.names[path[min(depth, len(path) - 1)]] for path in above}


def test_depths_of_a_hierarchy_in_memory() -> None:
    tree = Hierarchy.from_parents(ANIMALS)
    assert dict(zip(tree.names, tree.depths, strict=True)) == {
        "animal": 0, "mammal": 1, "bird": 1, "cat": 2, "dog": 2, "car": 0,
    }  # fmt: skip
    assert Hierarchy.from_parents({"cat": "animal"}).parents == (1, -1)
    assert len(Hierarchy.from_parents({})) == Hierarchy.from_parents({}).max_depth == 0


def test_a_class_of_open_images_in_several_places_has_the_deepest_and_parts_are_no_classes(tmp_path: Path) -> None:
    file = tmp_path / "bbox_labels_600_hierarchy.json"
    file.write_text(json.dumps(TREE))
    tree = Hierarchy.read(file)
    assert dict(zip(tree.names, tree.depths, strict=True)) == {
        "/m/root": 0, "/m/toy": 1, "/m/bear": 3, "/m/animal": 1, "/m/mammal": 2,
    }  # fmt: skip
    assert tree.names[tree.parents[tree.names.index("/m/bear")]] == "/m/mammal"
    names = tmp_path / "oidv7-class-descriptions-boxable.csv"
    names.write_text('LabelName,DisplayName\n/m/bear,"Bear, brown"\n/m/root,Entity\n')
    assert Hierarchy.read(file, names).names == ("Entity", "/m/toy", "Bear, brown", "/m/animal", "/m/mammal")


def test_parents_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(ANIMALS))
    assert Hierarchy.read(file) == Hierarchy.from_parents(ANIMALS)


@pytest.mark.parametrize("content", ["[1]", '{"a": 3}', "{", '{"LabelName": "a", "Subcategory": [{"b": 1}]}'])
def test_a_file_that_is_no_hierarchy_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"must be a hierarchy|must have nodes"):
        Hierarchy.read(file)


def test_what_is_wrong_with_a_hierarchy_is_named() -> None:
    with pytest.raises(ValueError, match=r"parents must lead to a root, got a cycle through '[ab]'"):
        Hierarchy.from_parents({"a": "b", "b": "a"})
    with pytest.raises(ValueError, match="names must be distinct, got 'a' twice"):
        Hierarchy(("a", "a"), (-1, -1))
    with pytest.raises(ValueError, match=r"parents must be one of -1 ... 0 for each of 1 names, got \(3,\)"):
        Hierarchy(("a",), (3,))
    tree = Hierarchy.from_parents(ANIMALS)
    with pytest.raises(ValueError, match=r"concepts must be in the hierarchy, but 1 of 2 are not: \['fish'\]"):
        tree.at_depth(torch.zeros(3, 2, dtype=torch.bool), ["cat", "fish"], 1)
    with pytest.raises(ValueError, match=r"labels must be bool \[N, C=1\], got torch.float32 \[3, 2\]"):
        tree.closed(torch.zeros(3, 2), ["cat"])
    with pytest.raises(ValueError, match="depth must be at least 0, got -1"):
        tree.at_depth(torch.zeros(3, 1, dtype=torch.bool), ["cat"], -1)

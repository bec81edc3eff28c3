"""The built-in data set. One call serves the suite; what needs a second one asks for the regular face alone."""

import re
import sys
import unicodedata
from collections import Counter

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from sparc_fast.data import Glyphs, glyphs
from sparc_fast.demo.glyphs import Principal, _blurred, _hog, _semantic


@pytest.fixture(scope="module")
def data() -> Glyphs:
    return glyphs()


@pytest.fixture(scope="module")
def regular() -> Glyphs:
    return glyphs(faces=["regular"])


def test_every_field_has_one_entry_per_row_and_there_are_at_least_9000_rows(data: Glyphs) -> None:
    n = len(data.characters)
    assert n >= 9000
    assert {len(data.names), len(data.faces), len(data.held_out), len(data.labels)} == {n}
    assert {len(x) for x in (*data.inputs.values(), *data.images.values())} == {n}
    assert list(data.inputs) == ["sans", "serif", "name"]


def test_a_row_is_a_character_in_a_face_and_its_unicode_name(data: Glyphs) -> None:
    assert len(set(zip(data.characters, data.faces, strict=True))) == len(data.characters)
    assert data.names == [unicodedata.name(character) for character in data.characters]


def test_inputs_are_finite_float32_rows_of_unit_length(data: Glyphs) -> None:
    for x in data.inputs.values():
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))


def test_the_same_arguments_give_bitwise_the_same_data(regular: Glyphs) -> None:
    again = glyphs(faces=["regular"])
    assert again.characters == regular.characters
    assert torch.equal(again.held_out, regular.held_out)
    assert all(torch.equal(again.inputs[stream], x) for stream, x in regular.inputs.items())


def test_the_split_is_by_character_and_keeps_out_a_fifth_of_them(data: Glyphs) -> None:
    held_out = {data.characters[i] for i in data.rows(held_out=True)}
    trained = {data.characters[i] for i in data.rows(held_out=False)}
    assert not held_out & trained
    assert len(held_out) == round(0.2 * len(held_out | trained))


def test_the_split_does_not_depend_on_the_faces_but_on_the_seed(data: Glyphs, regular: Glyphs) -> None:
    rows = torch.tensor([face == "regular" for face in data.faces])
    assert torch.equal(data.held_out[rows], regular.held_out)
    other = glyphs(faces=["regular"], seed=1, width=8)
    assert other.held_out.sum() == regular.held_out.sum()
    assert not torch.equal(other.held_out, regular.held_out)


def test_rows_choose_by_split_and_face_and_together_cover_everything(data: Glyphs) -> None:
    both = torch.cat([data.rows(held_out=False), data.rows(held_out=True)])
    assert torch.equal(both.sort().values, torch.arange(len(data.characters)))
    bold = data.rows(held_out=True, face="bold")
    assert bold.dtype == torch.int64
    assert len(bold) > 500
    assert all(data.held_out[i] and data.faces[i] == "bold" for i in bold)


@pytest.mark.parametrize("features", [_hog, _blurred])
def test_held_out_pictures_do_not_change_what_is_fitted(regular: Glyphs, features) -> None:
    images, train = regular.images["sans"][:300], ~regular.held_out[:300]
    changed = images.clone()
    changed[~train] = changed[~train].flip(1)  # upside down
    before, after = (Principal.fit(features(x)[train], 16)(features(x)) for x in (images, changed))
    torch.testing.assert_close(before[train], after[train], rtol=0, atol=1e-5)
    assert not torch.allclose(before[~train], after[~train], atol=0.1)


def test_a_row_s_own_picture_is_described_as_the_row(regular: Glyphs) -> None:
    for stream in ("sans", "serif"):
        torch.testing.assert_close(regular.describe(stream, regular.images[stream][:50]), regular.inputs[stream][:50])
    with pytest.raises(ValueError, match=r"stream must be one of \['sans', 'serif'\], got 'name'"):
        regular.describe("name", regular.images["sans"])


def test_held_out_names_do_not_change_what_is_fitted(regular: Glyphs) -> None:
    names, train = regular.names[:1500], ~regular.held_out[:1500]
    changed = [name if trained else "ZZQ" for name, trained in zip(names, train.tolist(), strict=True)]
    before, after = _semantic(names, train), _semantic(changed, train)
    torch.testing.assert_close(before[train], after[train], rtol=0, atol=1e-5)
    assert not torch.allclose(before[~train], after[~train], atol=0.1)


def test_concepts_are_the_words_of_15_to_600_characters_names(regular: Glyphs) -> None:
    words = [re.split(r"[ -]", name) for name in regular.names]
    counts = Counter(word for name in words for word in set(name))
    assert regular.concepts == sorted(word for word, count in counts.items() if 15 <= count <= 600)
    assert {"ACUTE", "ARROW", "GREEK", "BRAILLE"} <= set(regular.concepts)
    assert regular.labels.sum(0).tolist() == [counts[concept] for concept in regular.concepts]


def test_a_label_says_that_the_word_is_in_the_name(data: Glyphs) -> None:
    row = data.names.index("GREEK SMALL LETTER ALPHA WITH TONOS")
    concepts = [data.concepts[i] for i in data.labels[row].nonzero().flatten()]
    assert concepts == ["ALPHA", "GREEK", "TONOS"]


def test_pictures_are_never_blank_and_sans_differs_from_serif(data: Glyphs) -> None:
    sans, serif = data.images["sans"], data.images["serif"]
    assert sans.dtype == serif.dtype == torch.uint8
    assert sans.flatten(1).any(1).all()
    assert serif.flatten(1).any(1).all()
    assert (sans != serif).flatten(1).any(1).float().mean() > 0.8  # braille and box drawings are the same in both


def test_faces_differ_from_each_other(data: Glyphs) -> None:
    a = [i for i, character in enumerate(data.characters) if character == "a"]
    assert len(a) == len(set(data.faces))
    assert len({data.images["sans"][i].numpy().tobytes() for i in a}) == len(a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"faces": ["regular", "gothic"]}, r"faces must be distinct names out of .*'regular'.*, got .*gothic"),
        ({"faces": "bold"}, r"faces must be .*, got 'bold'"),
        ({"faces": []}, r"faces must be .*, got \[\]"),
        ({"faces": ["bold", "bold"]}, r"faces must be distinct"),
        ({"held_out": 0.0}, r"held_out must be a share .*, got 0.0"),
        ({"held_out": 1}, r"held_out must be a share .*, got 1"),
        ({"width": 0}, r"width must be 1 to 400, got 0"),
        ({"seed": -1}, r"seed must be 0 or more, got -1"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs(**arguments)


def test_rows_of_an_absent_face_say_which_are_there(regular: Glyphs) -> None:
    with pytest.raises(ValueError, match=r"face must be one of \['regular'\], got 'bold'"):
        regular.rows(held_out=True, face="bold")


@pytest.mark.parametrize("missing", ["matplotlib", "sklearn"])
def test_a_missing_extra_is_one_sentence_with_the_command(monkeypatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'sparc_fast\[demo\]'"):
        glyphs()

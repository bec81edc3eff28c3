"""Words of texts in any language, as concepts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparc_fast.evaluate import as_words, words_as_concepts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A cat, the CAT's tail_end!", ["a", "cat", "the", "cat", "s", "tail", "end"]),
        ("мышь и кот", ["мышь", "и", "кот"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("قطة سوداء", ["قطة", "سوداء"]),
        ("笑う猫3匹", ["笑う", "う猫", "3", "匹"]),
        ("e\u0301te\u0301", ["été"]),
        ("</script>", ["script"]),
        (" …!", []),
    ],
)
def test_words_are_runs_of_letters_digits_and_marks_and_neighbours_where_there_are_no_spaces(text, words):
    assert as_words(text) == words


@given(st.text())
def test_words_have_no_space_and_are_found_again_in_themselves_joined(text):
    words = as_words(text)
    assert all(word and not any(map(str.isspace, word)) for word in words)
    assert all(word in as_words(" ".join(words)) for word in words)


def test_each_sample_carries_its_words_once_and_common_and_rare_words_are_left_out():
    texts = [["a red CAT", "the cat"], ["a cat"], ["a dog"], ["a GREEK dog GREEK"], ["GREEK a"], []]
    carried, words = words_as_concepts(texts, fewest=2)
    assert words == ["cat", "dog", "GREEK"]  # "a" is everywhere, "red" once; as most often written
    assert carried.offsets.tolist() == [0, 1, 2, 3, 5, 6, 6]
    assert carried.concepts.tolist() == [0, 0, 1, 1, 2, 2]
    assert carried.counts().tolist() == [2, 2, 2]
    assert words_as_concepts(texts, fewest=2, most_words=1)[1] == ["cat"]

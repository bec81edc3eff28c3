"""Whether heatmaps lie where things are: each figure against a slow version or a map whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparc_fast.evaluate.localisation import (
    average_precision,
    boxes_as_masks,
    localisation,
    mass_inside,
    otsu,
    overlaps,
    pointing_game,
)


def planted(n: int = 6, side: int = 12, seed: int = 0) -> tuple[Any, Any]:
    """Maps of noise below 0.2 with 1 in a square of 4, and the squares' masks."""
    rng = np.random.default_rng(seed)
    maps, masks = rng.uniform(0, 0.2, (n, side, side)), np.zeros((n, side, side), bool)
    for n_, (y, x) in enumerate(rng.integers(0, side - 4, (n, 2))):
        masks[n_, y : y + 4, x : x + 4] = True
    maps[masks] += 1
    return maps, masks


def test_a_map_that_is_the_thing_itself_is_right_by_every_figure() -> None:
    maps, masks = planted()
    found = localisation(maps, masks, ["cat", "dog"] * 3, np.linspace(1, 0.5, 6))
    assert found.pointing == found.iou == found.mean_average_precision == 1
    assert found.mass > 0.5
    aside = localisation(maps, np.roll(masks, 6, axis=2) & ~masks, ["cat", "dog"] * 3, np.ones(6))
    assert aside.pointing == 0
    assert aside.iou < 0.1
    assert aside.mean_average_precision == 0


def test_the_largest_value_counts_wherever_it_lies_and_equal_ones_count_in_parts() -> None:
    maps, masks = np.zeros((3, 2, 4)), np.zeros((3, 2, 4), bool)
    masks[:, :, 0] = True
    maps[0, 1, 0] = maps[1, 1, 1] = 1
    maps[2, 0, 0] = maps[2, 0, 3] = 1
    assert pointing_game(maps, masks).tolist() == [1, 0, 0.5]
    assert pointing_game(np.zeros((1, 2, 4)), masks[:1]).tolist() == [0.25]  # a map of one value points nowhere
    maps[0, 0, 3] = np.nan
    assert pointing_game(maps, masks)[0] == 1


def test_mass_is_of_what_is_above_zero_and_was_seen() -> None:
    map_ = np.array([[[3.0, 1.0], [-5.0, np.nan]]])
    mask = np.array([[[True, False], [True, True]]])
    assert mass_inside(map_, mask).tolist() == [0.75]
    assert mass_inside(-np.abs(map_), mask).tolist() == [0]


@settings(deadline=None)
@given(arrays.arrays(np.float64, st.integers(1, 30), elements=st.integers(-4, 4).map(float)))
def test_the_threshold_parts_values_with_the_largest_variance_between(values: Any) -> None:
    found = otsu(values)
    if len(np.unique(values)) == 1:
        assert found == values[0]
        return

    def between(cut: float) -> float:
        low, high = values[values <= cut], values[values > cut]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    best = max(between(cut) for cut in np.unique(values)[:-1])
    assert between(found) == pytest.approx(best)
    assert otsu(np.append(values, np.nan)) == found


def test_overlap_is_of_what_is_above_the_threshold() -> None:
    map_, mask = np.array([[[4.0, 3.0, 1.0, 0.0]]]), np.array([[[True, False, False, False]]])
    assert overlaps(map_, mask).tolist() == [0.5]
    assert overlaps(map_, mask, 3.5).tolist() == [1]
    assert overlaps(np.zeros((1, 1, 4)), np.zeros((1, 1, 4), bool)).tolist() == [0]


def by_hand(scores: Any, right: Any, n_truth: int) -> float:
    """Precision at each score that occurs, the best at that recall or a larger one, times the recall it adds."""
    points = [(right[scores >= cut].sum() / n_truth, right[scores >= cut].mean()) for cut in np.unique(scores)[::-1]]
    area, before = 0.0, 0.0
    for place, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[place:])
        before = recall
    return area


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12), st.integers(0, 3), st.randoms())
def test_precision_is_that_of_ranks_and_the_order_of_equal_scores_says_nothing(
    predictions: Any, missed: int, random: Any
) -> None:
    scores, right = (np.array(column) for column in zip(*predictions, strict=True))
    n_truth = int(right.sum()) + missed
    found = average_precision(scores, right * 0.9, n_truth)
    assert found == pytest.approx(by_hand(scores, right, n_truth) if n_truth else 0)
    order = random.sample(range(len(scores)), len(scores))
    assert average_precision(scores[order], (right * 0.9)[order], n_truth) == pytest.approx(found)


def test_precision_needs_what_can_be_wrong() -> None:
    """With one prediction of one score in every picture that has the class, and none elsewhere, nothing can."""
    maps, masks = planted(8)
    masks[4:] = False  # pictures without the class
    sure, unsure = np.array([1.0] * 4 + [0.1] * 4), np.array([0.1] * 4 + [1.0] * 4)
    right = localisation(maps, masks, ["cat"] * 8, sure)
    wrong = localisation(maps, masks, ["cat"] * 8, unsure)
    same = localisation(maps, masks, ["cat"] * 8, np.ones(8))
    assert right.mean_average_precision == 1
    assert same.mean_average_precision == 0.5
    assert wrong.mean_average_precision == 0.5
    assert right.iou == wrong.iou == 1
    interleaved = localisation(maps, masks, ["cat"] * 8, np.array([0.9, 0.7, 0.5, 0.3, 0.8, 0.6, 0.4, 0.2]))
    assert 0.5 < interleaved.mean_average_precision < 1


def test_precision_is_told_at_every_threshold() -> None:
    maps, masks = planted(1)
    half = masks.copy()
    half[0, np.flatnonzero(masks[0].any(1))[:2]] = False  # the upper half of the thing is not known as it
    found = localisation(maps, half, ["cat"], [1.0])
    assert found.iou == 0.5
    assert found.average_precision == {0.2: 1, 0.3: 1, 0.4: 1, 0.5: 1, 0.6: 0, 0.7: 0}


def test_boxes_hold_the_pixels_whose_centres_they_hold() -> None:
    masks = boxes_as_masks([[0, 0, 2, 1], [0.6, 0.4, 2.5, 2.5]], (3, 2))
    assert masks.astype(int).tolist() == [[[1, 1, 0], [0, 0, 0]], [[0, 1, 0], [0, 1, 0]]]


def test_bad_input_is_named() -> None:
    maps, masks = planted(2)
    for call, message in (
        (lambda: pointing_game(maps, masks[:1]), "maps and masks must be"),
        (lambda: overlaps(maps, masks.astype(int)), "maps and masks must be"),
        (lambda: boxes_as_masks([[1, 2, 3]], (4, 4)), r"boxes must be \[n, 4\]"),
        (lambda: average_precision([1.0], [1.0], 0), "n_truth must be at least the 1 that were found, got 0"),
        (lambda: average_precision([1.0], [1.0, 0.0], 1), "scores and ious must be"),
        (lambda: localisation(maps, masks, ["cat"], [1, 2]), "classes and scores must be of n=2 maps, got 1"),
        (lambda: localisation(maps, masks & False, ["a", "a"], [1, 2]), "masks must hold something"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

"""Does a heatmap lie where a thing is? Against masks or boxes: pointing game, mass, overlap, average precision."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "Localisation",
    "average_precision",
    "boxes_as_masks",
    "localisation",
    "mass_inside",
    "otsu",
    "overlaps",
    "pointing_game",
]

Maps: TypeAlias = "npt.NDArray[np.floating]"
"""[n, H, W], NaN where nothing was seen."""
Masks: TypeAlias = "npt.NDArray[np.bool_]"
"""[n, H, W], where the thing is."""
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Of the intersection over union from which on a thing is found, for `localisation`."""


class Localisation(NamedTuple):
    """Means over pairs of a picture and a class that it has; the last over classes, and thresholds of the overlap."""

    pointing: float
    mass: float
    iou: float
    average_precision: dict[float, float]
    """Threshold -> the mean over classes."""

    @property
    def mean_average_precision(self) -> float:
        return float(np.mean(list(self.average_precision.values())))


def boxes_as_masks(boxes: npt.ArrayLike, size: tuple[int, int]) -> Masks:
    """Masks of boxes [n, 4], (left, top, right, bottom) in pixels, of pictures of this width and height.

    A pixel is inside where its centre is.
    """
    sides = np.asarray(boxes, np.float64)
    if sides.ndim != 2 or sides.shape[1] != 4:
        raise ValueError(f"boxes must be [n, 4], got {list(sides.shape)}")
    x, y = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    left, top, right, bottom = sides.T[:, :, None]
    across, down = (left <= x) & (x < right), (top <= y) & (y < bottom)
    inside: Masks = down[:, :, None] & across[:, None, :]
    return inside


def pointing_game(maps: Maps, masks: Masks) -> npt.NDArray[np.float64]:
    """Whether the largest value lies in the mask, [n]; of equal ones, the share that does (Zhang et al., 2016)."""
    _check(maps, masks)
    filled = np.where(np.isnan(maps), -np.inf, maps)
    largest = filled == filled.max((1, 2), keepdims=True)
    hits: npt.NDArray[np.float64] = (largest & masks).sum((1, 2)) / largest.sum((1, 2))
    return hits


def mass_inside(maps: Maps, masks: Masks) -> npt.NDArray[np.float64]:
    """The share of what is above 0 that lies in the mask, [n]; 0 where nothing is."""
    _check(maps, masks)
    above = np.where(maps > 0, maps, 0).astype(np.float64)
    whole, inside = above.sum((1, 2)), (above * masks).sum((1, 2))
    share: npt.NDArray[np.float64] = np.divide(inside, whole, out=np.zeros_like(whole), where=whole > 0)
    return share


def otsu(values: npt.ArrayLike) -> float:
    """The threshold that parts values in two with the largest variance between them; exact: no histogram.

    Those above it are of the upper part. Equal values have none above.
    """
    ordered = np.sort(np.asarray(values, np.float64).ravel())
    ordered = ordered[~np.isnan(ordered)]
    if not len(ordered) or ordered[0] == ordered[-1]:
        return float(ordered[-1]) if len(ordered) else np.nan
    centred = ordered - ordered.mean()
    below = np.arange(1, len(ordered))
    between = centred.cumsum()[:-1] ** 2 / (below * (len(ordered) - below))
    between[ordered[1:] == ordered[:-1]] = -1  # equal values stay together
    return float(ordered[between.argmax()])


def overlaps(maps: Maps, masks: Masks, threshold: float | None = None) -> npt.NDArray[np.float64]:
    """Intersection over union of what is above the threshold, and the mask, [n]; 0 where both are empty.

    `threshold`: of all maps; by default each one's own by `otsu`.
    """
    _check(maps, masks)
    cuts = np.array([otsu(one) for one in maps]) if threshold is None else np.full(len(maps), threshold)
    found = maps > cuts[:, None, None]
    union = (found | masks).sum((1, 2))
    shared = (found & masks).sum((1, 2))
    iou: npt.NDArray[np.float64] = np.divide(shared, union, out=np.zeros(len(maps)), where=union > 0)
    return iou


def average_precision(scores: npt.ArrayLike, ious: npt.ArrayLike, n_truth: int, threshold: float = 0.5) -> float:
    """Area under the precision and recall of predictions ranked by score, precision made monotone; no interpolation.

    Predictions of one score are one step, so their order says nothing. 0 where nothing is to be found.

    Args:
        scores: how sure each prediction is, [n].
        ious: its overlap with the thing in its picture, 0 where there is none.
        n_truth: things that there are to be found.
    """
    score, iou = np.asarray(scores, np.float64), np.asarray(ious, np.float64)
    if score.shape != iou.shape or score.ndim != 1:
        raise ValueError(f"scores and ious must be [n], got {list(score.shape)} and {list(iou.shape)}")
    right = (iou >= threshold) & (iou > 0)
    if n_truth < right.sum():
        raise ValueError(f"n_truth must be at least the {int(right.sum())} that were found, got {n_truth}")
    if not n_truth or not len(score):
        return 0.0
    order = np.argsort(-score, kind="stable")
    hits = right[order].cumsum()
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    precision = np.maximum.accumulate((hits[ends] / (ends + 1))[::-1])[::-1]
    return float((precision * np.diff(hits[ends] / n_truth, prepend=0)).sum())


def localisation(
    maps: Maps,
    masks: Masks,
    classes: Sequence[Hashable],
    scores: npt.ArrayLike,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Localisation:
    """All of it, for predictions of classes in pictures, each a map, with the mask of the class there and a score.

    Give predictions of classes that pictures do not have, too, with masks that are empty: a precision is only of use
    where something can be wrong. Which latents stand for a class must come from other samples than these.

    Args:
        classes: [n], the class that each prediction is of.
        scores: [n], how sure each is, such as the latent's value.
    """
    _check(maps, masks)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(classes))}
    score, names = np.asarray(scores, np.float64), np.array([numbers[name] for name in classes])
    if len(names) != len(maps) or score.shape != (len(maps),):
        raise ValueError(f"classes and scores must be of n={len(maps)} maps, got {len(names)} and {list(score.shape)}")
    there: npt.NDArray[np.bool_] = np.asarray(masks.any((1, 2)))
    ious = overlaps(maps, masks)
    if not there.any():
        raise ValueError("masks must hold something in at least one picture, got none")
    pointing, mass = pointing_game(maps[there], masks[there]), mass_inside(maps[there], masks[there])
    kinds = [names == name for name in np.unique(names[there])]
    precision = {
        threshold: float(
            np.mean([average_precision(score[of], ious[of], int(there[of].sum()), threshold) for of in kinds])
        )
        for threshold in thresholds
    }
    return Localisation(float(pointing.mean()), float(mass.mean()), float(ious[there].mean()), precision)


def _check(maps: Maps, masks: Masks) -> None:
    if maps.ndim != 3 or maps.shape != masks.shape or masks.dtype != np.bool_:
        raise ValueError(
            f"maps and masks must be [n, H, W], masks bool, got {list(maps.shape)}, {list(masks.shape)} {masks.dtype}"
        )

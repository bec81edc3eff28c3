"""Which part of a picture a model is given, found by showing its preprocessing pictures that say where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from sparc_fast.extract.encoders import ModelEncoder

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Region", "region_seen"]

FARTHEST = 0.02  # of the picture's side that a pixel may lie from where the line through all says


class Region(NamedTuple):
    """A part of a picture, in its pixels; beyond its edges where the picture was padded."""

    left: float
    top: float
    right: float
    bottom: float


def region_seen(encoder: ModelEncoder, size: tuple[int, int]) -> Region:
    """Of pictures of this width and height.

    Raises:
        ValueError: preprocessing does more than resize, crop, pad and normalize.
    """
    from PIL import Image

    width, height = size
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))

    def prepared(picture: Image.Image) -> npt.NDArray[np.float64]:
        grey: npt.NDArray[np.float64] = encoder.prepare(picture).double().mean(0).numpy()
        return grey

    black, white = (float(np.median(prepared(Image.new("RGB", size, colour)))) for colour in ("black", "white"))
    edges = []
    for axis, ramp in ((1, across), (0, down)):
        seen = Image.fromarray((ramp * 255).round().astype(np.uint8)).convert("RGB")
        where = np.median((prepared(seen) - black) / (white - black), axis=1 - axis)
        edges.append(_line(where, encoder.stream.model))
    (left, right), (top, bottom) = edges
    return Region(left * width, top * height, right * width, bottom * height)


def _line(where: npt.NDArray[np.float64], name: str) -> tuple[float, float]:
    """The ends of the line through the places of pixels in a picture of side 1; padding has none."""
    steps = np.diff(where)
    step = np.median(
        steps[(steps > 1e-6) & (where[1:] < 0.97) & (where[:-1] > 0.03)] if (steps > 1e-6).any() else steps
    )
    inside = (where > 0.03) & (where < 0.97)
    lies = np.gradient(where) if len(where) > 1 else np.zeros_like(where)
    inside &= (lies > step / 3) & (lies < step * 3)
    places = np.flatnonzero(inside)
    if len(places) < 2:
        raise ValueError(f"{name} must resize, crop or pad pictures to be looked into, got no picture out of it")
    slope, start = np.polyfit(places + 0.5, where[places], 1)
    if np.abs(slope * (places + 0.5) + start - where[places]).max() > FARTHEST:
        raise ValueError(f"{name} must only resize, crop and pad pictures to be looked into, but it bends them")
    return float(start), float(slope * len(where) + start)

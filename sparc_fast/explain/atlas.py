"""Many small pictures in one PNG of alpha masks, which CSS paints in any colour."""

from __future__ import annotations

import io
import math

import numpy as np

__all__ = ["atlas", "cells", "columns"]

LARGEST = 40  # pixels of a picture's longer side
LEVELS = 16  # 4 bits of alpha per pixel


def columns(n: int) -> int:
    """Pictures in a row of the atlas: as good as square."""
    return max(1, math.ceil(math.sqrt(n)))


def cells(images: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W] → [n, C, C]: square, at most LARGEST, with one empty pixel around each."""
    from PIL import Image

    height, width = images.shape[1:]
    side = max(height, width)
    square = np.zeros((len(images), side, side), np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    square[:, y : y + height, x : x + width] = images
    if side > LARGEST:
        small = [Image.fromarray(image).resize((LARGEST, LARGEST), Image.Resampling.LANCZOS) for image in square]
        square = np.array(small, np.uint8).reshape(-1, LARGEST, LARGEST)
    return np.pad(square, ((0, 0), (1, 1), (1, 1)))


def atlas(images: np.ndarray) -> bytes:
    """uint8 [n, H, W] → a PNG: picture i stands in row i // columns(n), column i % columns(n)."""
    from PIL import Image

    tiles = cells(images)
    wide, side = columns(len(tiles)), tiles.shape[1]
    high = max(1, math.ceil(len(tiles) / wide))
    grid = np.zeros((high * wide, side, side), np.uint8)
    grid[: len(tiles)] = tiles
    sheet = grid.reshape(high, wide, side, side).swapaxes(1, 2).reshape(high * side, wide * side)

    step = 255 // (LEVELS - 1)
    picture = Image.fromarray(((sheet.astype(np.uint16) + step // 2) // step).astype(np.uint8))
    picture = picture.convert("P")
    picture.putpalette([0] * 3 * LEVELS)
    file = io.BytesIO()
    alpha = bytes(step * level for level in range(LEVELS))
    picture.save(file, "PNG", bits=4, transparency=alpha)
    return file.getvalue()

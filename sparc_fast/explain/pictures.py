"""Small pictures of samples, many in one file: in colour, or as ink that the page paints in a colour of its own."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from sparc_fast.files import as_png

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Ink", "Pictures", "Thumbnails"]

SIDE = 96  # pixels of a thumbnail
LARGEST_INK = 40  # pixels of an ink picture's longer side
LEVELS = 16  # of ink: 4 bits a pixel
SIGHT = 12  # pixels each way that tell whether two pictures look alike


class Pictures(Protocol):
    """A picture of each of N samples, or None."""

    sheet: int
    """Pictures in one file."""
    side: int
    """Pixels of a picture, which is square."""

    def __len__(self) -> int: ...

    def draw(self, row: int) -> Image.Image | None:
        """The picture, square: RGBA, or as "L" ink that is 255."""

    def write(self, rows: Sequence[int]) -> tuple[str, bytes | str, Sequence[bool]]:
        """Some pictures, row after row of `columns(sheet)`: suffix and content of their file, and which were there.

        Text, of a script, is what the page is given. Several threads ask at once.
        """


def columns(sheet: int) -> int:
    """Pictures in a row of a sheet."""
    return math.isqrt(sheet)


def _sheet(mode: str, pictures: Sequence[Image.Image | None], wide: int, side: int) -> Image.Image:
    """Pictures, row after row of so many; an empty place where there is none."""
    from PIL import Image

    sheet = Image.new(mode, (wide * side, max(1, -(-len(pictures) // wide)) * side))
    for place, picture in enumerate(pictures):
        if picture is not None:
            sheet.paste(picture, (place % wide * side, place // wide * side))
    return sheet


def _in_square(picture: Image.Image, side: int) -> Image.Image:
    """The picture in the middle of an empty square."""
    from PIL import Image

    square = Image.new(picture.mode, (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def sights(pictures: Pictures, rows: Sequence[int]) -> npt.NDArray[np.floating]:
    """The mean of some pictures as numbers that lie near for pictures that look alike."""
    from PIL import Image

    seen = np.zeros((SIGHT, SIGHT, 4), np.float32)
    for row in rows:
        if (picture := pictures.draw(row)) is not None:
            small = picture.resize((SIGHT, SIGHT), Image.Resampling.BILINEAR)
            if small.mode == "L":
                seen[..., 0] += np.asarray(small, np.float32)
            else:
                pixels = np.asarray(small, np.float32)
                seen[..., :3] += pixels[..., :3] * (pixels[..., 3:] / 255)
                seen[..., 3] += pixels[..., 3]
    mean: npt.NDArray[np.floating] = seen.ravel() / max(len(rows), 1)
    return mean


class Ink:
    """Pictures of one ink, uint8 [N, H, W], 255 being full ink."""

    sheet = 256

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self.images = images
        self.side = min(max(images.shape[1:]), LARGEST_INK) + 2  # an empty pixel around each

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, row: int) -> Image.Image:
        from PIL import Image

        picture = _in_square(Image.fromarray(self.images[row]), max(self.images.shape[1:]))
        if picture.width > LARGEST_INK:
            picture = picture.resize((LARGEST_INK, LARGEST_INK), Image.Resampling.LANCZOS)
        return _in_square(picture, self.side)

    def write(self, rows: Sequence[int]) -> tuple[str, str, Sequence[bool]]:
        from PIL import Image

        sheet = _sheet("L", [self.draw(row) for row in rows], columns(self.sheet), self.side)
        step = 255 // (LEVELS - 1)
        levels = ((np.asarray(sheet).astype(np.uint16) + step // 2) // step).astype(np.uint8)
        picture = Image.fromarray(levels).convert("P")
        picture.putpalette([0] * 3 * LEVELS)
        png = as_png(picture, bits=4, transparency=bytes(step * level for level in range(LEVELS)))
        # as a mask, a file beside the page is refused by browsers where the page is opened from disk
        content = base64.b64encode(png).decode()
        return "js", f"data:image/png;base64,{content}", [True] * len(rows)


class Thumbnails:
    """Pictures in colour, each opened when it is needed.

    Args:
        n: N.
        load: a sample's picture, of any size and mode, or None where it has none; several threads call it at once.
    """

    sheet = 64
    side = SIDE

    def __init__(self, n: int, load: Callable[[int], Image.Image | None]) -> None:
        self._n, self._load = n, load

    def __len__(self) -> int:
        return self._n

    def draw(self, row: int) -> Image.Image | None:
        """Whole, in the middle of a square."""
        from PIL import Image

        picture = self._load(row)
        if picture is None:
            return None
        size = [max(1, round(self.side / max(picture.size) * n)) for n in picture.size]
        return _in_square(picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS), self.side)

    def write(self, rows: Sequence[int]) -> tuple[str, bytes, Sequence[bool]]:
        pictures = [self.draw(row) for row in rows]
        file = io.BytesIO()
        _sheet("RGBA", pictures, columns(self.sheet), self.side).save(
            file, "WEBP", quality=80, method=2
        )  # 4, the default, is half as fast for 8 % fewer bytes
        return "webp", file.getvalue(), [picture is not None for picture in pictures]

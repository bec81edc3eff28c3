"""An item: a picture, texts, or both, seen by every stream; and how items become a table."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparc_fast.data.feature_folder import below

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Failure", "Item", "load_picture", "split_of", "thumbnail"]

THUMBNAIL = 128  # pixels of its longer side
TRAINING = ("train", "training")
"""What sources call the split to train on; others are held out."""


@dataclass(frozen=True)
class Item:
    """What is known of a sample."""

    id: str
    picture: str | bytes | None = None
    """A path below the source's folder, or a file's content."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """column -> text."""
    label: tuple[str, ...] = ()
    group: str = ""
    """Those of one group stay on one side of the split; by default each item is one."""
    split: str = ""
    """As the source has it, or "" to let the group's name decide."""
    about: Mapping[str, str] = field(default_factory=dict)
    """Further columns of text of the table."""


@dataclass(frozen=True)
class Failure:
    """An item that is left out, and why."""

    id: str
    reason: str


def load_picture(picture: str | bytes, root: Path | None) -> Image:
    """In RGB, turned as its EXIF says, transparent parts on white; ValueError or OSError where it is none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(picture, str):
        if root is None:
            raise ValueError(f"source must have a folder of pictures to open {picture!r}")
        picture = below(root, picture, "picture").read_bytes()
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            return on_white(ImageOps.exif_transpose(opened))
    except (UnidentifiedImageError, SyntaxError):  # of which the second is of broken PNG files
        raise ValueError("it is no picture of a kind that can be read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"it is a picture of too many pixels: {error}") from None


def on_white(picture: Image) -> Image:
    """In RGB, transparent parts on white; ValueError where its numbers have no range that is known."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):  # of which convert keeps what fits 8 bits as it is
        deep = np.asarray(picture)
        if picture.mode == "F" or deep.min(initial=0) < 0 or deep.max(initial=0) >= 2**16:
            raise ValueError(f"it must be a picture of 8 or 16 bits a channel, got {deep.dtype} (mode {picture.mode})")
        eight = (deep.astype(np.uint32) * 255 + 2**15 - 1) // (2**16 - 1)
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def thumbnail(picture: Image) -> bytes:
    """A small JPEG of it."""
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def split_of(item: Item, held_out: float, seed: int) -> str:
    """As the source says, or by the group's name and the seed alone: the same wherever the group comes again."""
    if item.split:
        return "train" if item.split.lower() in TRAINING else "held_out"
    return "held_out" if held_out_by_name(item.group or item.id, held_out, seed) else "train"


def held_out_by_name(group: str, share: float, seed: int) -> bool:
    """Whether a group is one of a share of them all that its name and the seed choose."""
    digest = hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def as_line(item: Item, split: str, small: bytes | None) -> str:
    """The item as a line of JSON."""
    return json.dumps({
        "id": item.id, "picture": item.picture if isinstance(item.picture, str) else None,
        "thumbnail": None if small is None else base64.b64encode(small).decode(), **item.texts, **item.about,
        "label": list(item.label), "group": item.group or item.id, "split": split,
    }, ensure_ascii=False)  # fmt: skip

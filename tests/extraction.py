"""Small pictures with captions, and models of them that need no library: what tests of extraction share."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparc_fast.data.feature_folder import write_items, write_manifest

SETTINGS = """\
batch_size = 4
shard_rows = 10
held_out = 0.3

[source]
csv = "pictures.csv"

[streams.colours]
model = "extraction:colours"

[streams.letters]
model = "extraction:letters"
modality = "text"
dtype = "float16"
"""


def colours(pictures: Sequence[Image.Image]) -> Tensor:
    """The mean and the spread of each colour, [n, 6]."""
    pixels = [torch.from_numpy(np.asarray(p, np.float32)).flatten(0, 1) / 255 for p in pictures]
    return torch.stack([torch.cat([x.mean(0), x.std(0)]) for x in pixels]) + 0.01


def letters(texts: Sequence[str]) -> Tensor:
    """How often each letter comes, [n, 26]."""
    counts = [[text.count(chr(97 + n)) for n in range(26)] for text in texts]
    return torch.tensor(counts, dtype=torch.float32, device="cpu")


batches_left = -1


def mortal(texts: Sequence[str]) -> Tensor:
    """The same; a process that has only so many batches to live then kills itself."""
    global batches_left
    if batches_left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    batches_left -= 1
    return letters(texts)


def picture(n: int, side: int = 8) -> Image.Image:
    """The n-th picture: noise that no other one has."""
    return Image.fromarray(np.random.default_rng(n).integers(0, 255, (side, side, 3), np.uint8))


def write_pictures(folder: Path, n: int) -> list[dict[str, Any]]:
    """Pictures in `folder`/pictures, and rows of what is known of them."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for i in range(n):
        picture(i).save(folder / "pictures" / f"{i:03}.png")
        words = f"picture {'abcdefghij'[i % 10]} of {'kitten' if i % 3 else 'rocket'}"
        rows.append({"id": f"p{i}", "path": f"pictures/{i:03}.png", "text": words, "label": words.split()[-1]})
    return rows


def write_features(
    folder: Path,
    streams: Mapping[str, tuple[str, np.ndarray]],
    rows: Sequence[dict[str, Any]],
    texts: Sequence[str],
    contents: Sequence[str] = ("thumbnail",),
    parts: int = 1,
    **about: Any,
) -> Path:
    """A folder of features: streams that are (the column they saw, rows [N, D] or of tokens [N, T, D])."""
    described = {}
    for name, (column, x) in streams.items():
        files = [f"{name}/{part:05}.npy" for part in range(parts)]
        (folder / name).mkdir(parents=True)
        for file, some in zip(files, np.array_split(x.astype(np.float32), parts), strict=True):
            np.save(folder / file, some.reshape(-1, x.shape[-1]))
        tokens = x.shape[1] if x.ndim == 3 else 1
        described[name] = {"column": column, "width": x.shape[-1], "tokens": tokens, "files": files, "model": name}
    write_items(folder, rows, texts, contents)
    write_manifest(folder, described, len(rows), failed=0, **about)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_csv(path: Path, rows: Sequence[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)

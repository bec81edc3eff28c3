"""The glyphs as a large data set in files: many jittered pictures of every character, written as they are drawn.

The characters, their split, their features and all that is fitted are those of `glyphs`. A training row shows one
character in one face at one size; its sans and its serif picture are jittered each by itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.files import as_path, as_png, atomic_path, write_text

from .feature_folder import write_items, write_manifest
from .glyphs import EM, FACES, FEATURES, SIDE, Glyphs, Pictures, draw, glyphs
from .jitter import CHANGES, jitter

__all__ = ["write_glyphs"]

SIZES = 20, 22, EM  # font sizes in pixels: none is larger than the picture
DRAWN_TOGETHER = 512  # rows
RANDOM = 1_785_427_305  # keeps these numbers apart from the split's, which have the same seed


def write_glyphs(
    folder: str | Path,
    rows: int = 200_000,
    *,
    seed: int = 0,
    faces: Sequence[str] = tuple(FACES),
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Write `rows` training rows, all held-out characters, and settings for `sparc-fast train`, into `folder`.

    docs/wide_run.md lists the files. Each appears whole, the settings last. The bytes depend on the arguments but not
    on `threads`, on one kind of machine with one version of the libraries; memory does not grow with `rows`.

    Args:
        rows: training rows: every character in every face comes once, in a random order, before any comes again.
        seed: chooses the held-out characters, as in `glyphs`, and the jitter.
        faces: as in `glyphs`.
        threads: that draw; as many as there are cores by default.
        progress: called with (training rows written, rows in all).

    Raises:
        ValueError: an argument is out of range.
        OSError: the folder cannot be written.
        ImportError: matplotlib, scikit-learn or pyarrow is missing.
    """
    if rows < 1:
        raise ValueError(f"rows must be 1 or more, got {rows}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    folder = as_path(folder, "folder")
    with _one_thread_a_product():
        base = glyphs(faces=faces, seed=seed)
        for face in faces:
            here = base.rows(held_out=True, face=face)
            _write_held_out(folder / "held_out" / face.replace(" ", "_"), base, here, base.inputs)
        here = base.rows(held_out=True, face=faces[0])
        _write_held_out(folder / "held_out" / "jittered", base, here, _jittered(base, here, seed))
        _write_training(folder / "train", base, rows, seed, threads or os.cpu_count() or 1, progress)
    _write_contents(folder, base, seed)
    _write_folder(folder, base, rows, faces[0])
    for name, settings in RUNS.items():
        write_text(folder / name, settings)


@contextmanager
def _one_thread_a_product() -> Iterator[None]:
    """Products of matrices, and all that is fitted with them, come out the same whatever the machine has to spare."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    try:
        with threadpool_limits(1):  # scikit-learn's
            torch.set_num_threads(1)
            yield
    finally:
        torch.set_num_threads(before)


def _jittered(base: Glyphs, rows: Tensor, seed: int) -> dict[str, Tensor]:
    """Inputs [N, D_s] of all rows, those of `rows` seen in jittered pictures."""
    inputs = {stream: x.clone() for stream, x in base.inputs.items()}
    for stream, changes in zip(FEATURES, _changes((seed, RANDOM), len(rows)), strict=True):
        inputs[stream][rows] = base.describe(stream, jitter(base.images[stream][rows], changes))
    return inputs


def _write_held_out(folder: Path, base: Glyphs, rows: Tensor, inputs: dict[str, Tensor]) -> None:
    for stream, x in inputs.items():
        with _array(folder / f"{stream}.npy", (len(rows), x.shape[1]), np.float32) as array:
            array[:] = x[rows].numpy()
    with _array(folder / "labels.npy", (len(rows), len(base.concepts)), np.bool_) as labels:
        labels[:] = base.labels[rows].numpy()
    whose = {"characters": [base.characters[n] for n in rows], "names": [base.names[n] for n in rows]}
    write_text(folder / "rows.json", json.dumps(whose, ensure_ascii=False))


def _write_training(
    folder: Path, base: Glyphs, n_rows: int, seed: int, threads: int, progress: Callable[[int, int], object] | None
) -> None:
    """Round after round: each goes once through all characters and faces, in the same order, drawn anew."""
    rows = base.rows(held_out=False).numpy()
    rows = rows[np.random.default_rng((seed, RANDOM)).permutation(len(rows))][:n_rows]
    pictures = np.stack([_pictures(base, rows, size) for size in SIZES])
    whose = _whose(base)[rows]
    with ExitStack() as files:
        arrays = {
            stream: files.enter_context(_array(folder / f"{stream}.npy", (n_rows, x.shape[1]), np.float16))
            for stream, x in base.inputs.items()
        }
        about = files.enter_context(_array(folder / "rows.npy", (n_rows, 3), np.int32))

        def write(start: int) -> int:
            """The rows of the files from `start`, to the end of their round at most; returns how many."""
            turn, first = divmod(start, len(rows))
            part = np.arange(first, min(first + DRAWN_TOGETHER, len(rows), first + n_rows - start))
            out = slice(start, start + len(part))
            size = (part + turn) % len(SIZES)  # a character comes in another size in the next round
            changes = _changes((seed, RANDOM, turn, first), len(part))
            for s, stream in enumerate(FEATURES):
                images = jitter(torch.from_numpy(pictures[size, part, s]), changes[s])
                arrays[stream][out] = base.describe(stream, images).numpy()
            arrays["name"][out] = base.inputs["name"][rows[part]].numpy()
            about[out] = np.column_stack([whose[part], np.array(SIZES)[size]])
            return len(part)

        rounds = range(0, n_rows, len(rows))
        starts = [turn + first for turn in rounds for first in range(0, len(rows), DRAWN_TOGETHER)]
        done = 0
        workers = ThreadPoolExecutor(threads)
        try:
            for written in workers.map(write, [start for start in starts if start < n_rows]):
                done += written
                if progress is not None:
                    progress(done, n_rows)
        finally:
            workers.shutdown(cancel_futures=True)


def _pictures(base: Glyphs, rows: npt.NDArray[np.int64], size: int) -> Pictures:
    """Both pictures of some rows at a size, [M, 2, SIDE, SIDE]."""
    pictures = np.empty((len(rows), len(FEATURES), SIDE, SIDE), np.uint8)
    face = np.array([base.faces[n] for n in rows])
    for name in sorted(set(face)):
        here = (face == name).nonzero()[0]
        pictures[here] = draw([base.characters[n] for n in rows[here]], name, size)
    return pictures


def _changes(seed: tuple[int, ...], n: int) -> Tensor:
    """How both pictures of n rows are jittered, [2, n, 7]."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (len(FEATURES), n, CHANGES)))


def _whose(base: Glyphs) -> npt.NDArray[np.int32]:
    """Numbers of every row's character and face, as glyphs.json lists them, [N, 2]."""
    characters = {character: n for n, character in enumerate(sorted(set(base.characters)))}
    faces = {face: n for n, face in enumerate(dict.fromkeys(base.faces))}
    pairs = zip(base.characters, base.faces, strict=True)
    return np.array([(characters[character], faces[face]) for character, face in pairs], np.int32)


def _write_contents(folder: Path, base: Glyphs, seed: int) -> None:
    """What all rows have in common: the characters, their names, split and concepts."""
    first = np.unique(_whose(base)[:, 0], return_index=True)[1]
    with _array(folder / "labels.npy", (len(first), len(base.concepts)), np.bool_) as labels:
        labels[:] = base.labels[first].numpy()
    contents = {
        "seed": seed,
        "columns of train/rows.npy": ["character", "face", "size"],
        "faces": list(dict.fromkeys(base.faces)),
        "concepts": base.concepts,
        "characters": [base.characters[n] for n in first],
        "names": [base.names[n] for n in first],
        "held_out": base.held_out[first].tolist(),
    }
    write_text(folder / "glyphs.json", json.dumps(contents, ensure_ascii=False))


def _write_folder(folder: Path, base: Glyphs, rows: int, face: str) -> None:
    """What makes it a folder of features: training rows, then the held-out characters in one face."""
    held_out = base.rows(held_out=True, face=face)
    streams = {}
    for stream, x in base.inputs.items():
        files = [f"train/{stream}.npy", f"evaluate/{stream}.npy"]
        with _array(folder / files[1], (len(held_out), x.shape[1]), np.float16) as array:
            array[:] = x[held_out].numpy()
        seen = {"modality": "image", "column": stream} if stream in FEATURES else {"modality": "text", "column": "text"}
        streams[stream] = {**seen, "width": x.shape[1], "tokens": 1, "dtype": "float16", "files": files}
    contents, texts = tuple(FEATURES), ("text", "character", "face")
    write_items(folder, _items(folder, base, held_out), texts, contents)
    write_manifest(folder, streams, rows + len(held_out), splits={"train": rows, "held_out": len(held_out)}, failed=0)


def _items(folder: Path, base: Glyphs, held_out: Tensor) -> Iterator[dict[str, object]]:
    """Pictures are those of held-out rows; a training row's is drawn anew for its features alone."""
    from PIL import Image

    first = dict(zip(map(tuple, _whose(base).tolist()), range(len(base.characters)), strict=True))
    faces = list(dict.fromkeys(base.faces))
    whose = np.load(folder / "train" / "rows.npy", mmap_mode="r")
    for n, (character, face, size) in enumerate(whose):
        yield _item(base, first[int(character), int(face)], f"train-{n}-{size}", "train")
    for n in held_out.tolist():
        pictures = {stream: as_png(Image.fromarray(255 - base.images[stream][n].numpy())) for stream in FEATURES}
        yield {**_item(base, n, f"held-out-{base.characters[n]}-{faces[0]}", "held_out"), **pictures}


def _item(base: Glyphs, n: int, name: str, split: str) -> dict[str, object]:
    words = [concept for concept, carried in zip(base.concepts, base.labels[n].tolist(), strict=True) if carried]
    return {
        "id": name, "text": base.names[n], "character": base.characters[n], "face": base.faces[n], "label": words,
        "group": base.names[n], "split": split,
    }  # fmt: skip


@contextmanager
def _array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Iterator[npt.NDArray[np.generic]]:
    """A .npy file to be filled; it appears when the block ends well."""
    with atomic_path(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)  # type: ignore[no-untyped-call]
        yield array
        array.flush()


SETTINGS = """\
n_latents = 32768
k = 64
epochs = 5
batch_size = 2048
lr = 6e-3
dead_after = 100_000
lazy = true
checkpoint_every = 50
{choice}
[data]
sans = "train/sans.npy"
serif = "train/serif.npy"
name = "train/name.npy"
"""
RUNS = {
    "train.toml": SETTINGS.format(choice="support_dropout = 0.5  # streams learn to choose a support by themselves\n"),
    "independent.toml": SETTINGS.format(choice='selection = "local"  # no stream sees another\ncross_loss_coef = 0\n'),
}

"""A folder of features, and of what is known of every sample: what `sparc-fast extract` writes, read as files are.

manifest.json    streams, their files, models and preprocessing; reading it runs nothing and fetches nothing
items.parquet    a row a sample: id, picture, texts, label, group, split
STREAM/*.npy     rows [N, D_s], or [N T, D_s] of a stream that has T tokens of every sample
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
import numpy.typing as npt

from sparc_fast.files import as_path, atomic_path, write_text

from . import npy
from .readers import Reader, closed_on_failure, require
from .shuffle import Rows
from .views import PickedReader, one_after_the_other

__all__ = ["FeatureFolder", "Split", "below", "is_feature_folder", "write_items", "write_manifest"]

MANIFEST, ITEMS, FORMAT = "manifest.json", "items.parquet", "sparc_fast.Features/1"
KNOWN = ("id", "picture", "thumbnail", "label", "group", "split")
"""Columns of items that are no texts."""
WRITTEN_TOGETHER = 20_000  # items
Split = Literal["train", "held_out", "all"]
"""Samples to train on, those kept from that, or both."""


class FeatureFolder:
    """A folder with a manifest.

    Raises:
        ValueError: the manifest is not one, or names files outside its folder.
        FileNotFoundError: there is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = as_path(path, "path").resolve()
        file = self.path / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"a folder of features must hold a {MANIFEST}, but there is none in {path}")
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r}, not {FORMAT!r}")
            streams = {str(name): dict(about) for name, about in manifest["streams"].items()}
            self.n_items = int(manifest["items"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file} must be a manifest of features, but {reason}") from error
        self.manifest: dict[str, Any] = manifest
        self.streams: dict[str, dict[str, Any]] = streams
        """name -> modality, width, tokens, files, how it was made, and the column of the items that it saw: texts,
        pictures' paths, or their content."""

    def tokens(self, stream: str) -> int:
        """Rows that each sample has in a stream."""
        return int(self._about(stream).get("tokens") or 1)

    def rows(self, split: Split) -> Rows:
        """Numbers of the samples of a split, ascending; ValueError where it has none."""
        if split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
        found = np.arange(self.n_items) if split == "all" else np.flatnonzero(self._splits == split)
        if not len(found):
            raise ValueError(
                f"{self.path} must hold {split.replace('_', '-')} samples, got none of {self.n_items}: split all"
            )
        return found

    def reader(self, stream: str, split: Split = "all") -> Reader:
        """The rows of a stream."""
        about, tokens = self._about(stream), self.tokens(stream)
        with closed_on_failure() as readers:
            for name in about["files"]:
                readers.append(npy.open_file(below(self.path, name, f"files of stream {stream!r}"), None))
            title = f"{self.path} stream {stream!r}"
            whole = one_after_the_other(readers, title)
            if whole.n_rows != self.n_items * tokens:
                raise ValueError(f"{title} must hold {self.n_items * tokens} rows, got {whole.n_rows}")
            numbers = (self.rows(split)[:, None] * tokens + np.arange(tokens)).reshape(-1)
        reader = whole if len(numbers) == whole.n_rows else PickedReader(whole, numbers)
        reader.tokens = tokens
        return reader

    @property
    def columns(self) -> list[str]:
        """Of the items."""
        names: list[str] = self._parquet.read_schema(self.path / ITEMS).names
        return names

    def column(self, name: str, split: Split = "all") -> list[Any]:
        """What the items have there, one a sample: text, or a list of texts."""
        if name not in self.columns:
            raise ValueError(f"items of {self.path} must have a column {name!r}, got {', '.join(self.columns)}")
        values: list[Any] = self._parquet.read_table(self.path / ITEMS, columns=[name]).column(name).to_pylist()
        if len(values) != self.n_items:
            raise ValueError(f"items of {self.path} must be {self.n_items}, got {len(values)}")
        return values if split == "all" else [values[row] for row in self.rows(split)]

    def labels_of_samples(self, split: Split = "all") -> list[list[str]]:
        """Those that each carries; a text is one."""
        return [[labels] if isinstance(labels, str) else list(labels or ()) for labels in self.column("label", split)]

    def labels(self, split: Split = "all", at_least: int = 1) -> tuple[npt.NDArray[np.bool_], list[str]] | None:
        """Which labels each sample carries, bool [n, C], and their names, sorted; None where there are none.

        `at_least`: of how many of the samples a label must be.
        """
        found = [(n, label) for n, labels in enumerate(self.labels_of_samples(split)) for label in labels]
        names, number, counts = np.unique(
            np.array([label for _, label in found], dtype=np.str_), return_inverse=True, return_counts=True
        )
        if not (kept := counts >= at_least).any():
            return None
        truth = np.zeros((len(self.rows(split)), len(names)), np.bool_)
        truth[[n for n, _ in found], number] = True
        return truth[:, kept], names[kept].tolist()

    def picture(self, path: str) -> Path:
        """The file of an item's `picture`; ValueError where it leads out of the pictures' folder."""
        root = self.manifest.get("pictures")
        if root is None:
            raise ValueError(f"{self.path} must say where its pictures are to open {path!r}, got none")
        return below(self.path / root, path, "picture")

    @cached_property
    def _splits(self) -> npt.NDArray[Any]:
        return np.array(self.column("split"))

    @cached_property
    def _parquet(self) -> Any:
        return require("pyarrow.parquet", self.path / ITEMS)

    def _about(self, stream: str) -> dict[str, Any]:
        if stream not in self.streams:
            raise ValueError(f"stream must be one of {', '.join(self.streams)} of {self.path}, got {stream!r}")
        return self.streams[stream]


def is_feature_folder(where: Any) -> TypeGuard[str | Path]:
    """Whether that is a folder with a manifest."""
    return isinstance(where, str | Path) and (Path(where) / MANIFEST).is_file()


def below(folder: Path, path: str, what: str) -> Path:
    """The file, or ValueError where it is not in the folder: by "..", as an absolute path or through a link."""
    if "\0" in path or not (found := (folder / path).resolve()).is_relative_to(folder.resolve()):
        raise ValueError(f"{what} must stay below {folder}, got {path!r}")
    return found


def write_items(
    folder: Path, rows: Iterable[Mapping[str, Any]], texts: Iterable[str], contents: Iterable[str] = ("thumbnail",)
) -> None:
    """The table of the items, a few at a time.

    Args:
        rows: id, picture (a path, or None), label (texts), group and split of each, and its other columns.
        texts: columns of text.
        contents: columns of pictures' content, bytes or None.
    """
    path = folder / ITEMS
    pyarrow, parquet = require("pyarrow", path), require("pyarrow.parquet", path)
    text = pyarrow.string()
    schema = pyarrow.schema({
        "id": text, "picture": text, **dict.fromkeys(contents, pyarrow.binary()), **dict.fromkeys(texts, text),
        "label": pyarrow.list_(text), "group": text, "split": text,
    })  # fmt: skip
    left = iter(rows)
    with atomic_path(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        while some := list(islice(left, WRITTEN_TOGETHER)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema))


def write_manifest(folder: Path, streams: Mapping[str, Mapping[str, Any]], items: int, **about: Any) -> None:
    """The last file to be written: it makes a folder one of features."""
    content = {"format": FORMAT, "items": items, "streams": streams, **about}
    write_text(folder / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def samples_and_tokens(readers: Mapping[str, Reader]) -> tuple[dict[str, Reader], Rows | None]:
    """Streams whose row n is the same token, and where each sample begins: what has no tokens repeats its rows."""
    T = max(reader.tokens for reader in readers.values())
    if T == 1:
        return dict(readers), None
    if other := next((reader.tokens for reader in readers.values() if reader.tokens not in (1, T)), None):
        listed = ", ".join(f"{reader.tokens} in {stream!r}" for stream, reader in readers.items())
        raise ValueError(
            f"streams must have one row of a sample, or equally many tokens, got {T} and {other}: {listed}"
        )
    spread = {
        stream: reader if reader.tokens == T else PickedReader(reader, np.repeat(np.arange(reader.n_rows), T))
        for stream, reader in readers.items()
    }
    n = next(iter(spread.values())).n_rows // T
    return spread, np.arange(n + 1) * T

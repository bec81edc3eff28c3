"""Where items come from: a function a kind of source, each of which reads on in one direction, always the same way."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from sparc_fast.data.feature_folder import below
from sparc_fast.data.readers import require
from sparc_fast.data.shards import files_of, in_natural_order
from sparc_fast.files import read_object

from .config import SourceConfig
from .items import Failure, Item

__all__ = ["Source", "open_source"]

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jfif")
DECODED_TOGETHER = 256  # rows of a table with pictures in it
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


@dataclass
class Source:
    """Items in an order that never changes."""

    read: Callable[[], Iterator[Item | Failure]]
    """From the first on."""
    total: int | None = None
    """How many there are, where that is known before they are read."""
    root: Path | None = None
    """The folder below which pictures' paths stay; None where items bring their pictures' content."""


@dataclass
class _Record:
    """What a source has of a sample; it may have several texts."""

    id: str
    picture: str | bytes | None = None
    texts: dict[str, list[str]] = field(default_factory=dict)
    label: tuple[str, ...] = ()
    group: str = ""
    split: str = ""


_Records = Iterator[_Record | Failure]


def open_source(config: SourceConfig, folder: Path, texts: Sequence[str]) -> Source:
    """The items of a source; `texts` are the columns of texts that are wanted, `folder` that of relative paths.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: one is not what it should be, or lacks a column that was named.
    """
    read, total, root = _KINDS[config.kind](config, folder, texts)
    if config.folder:
        root = _folder(folder / config.folder, "source.folder")

    def items() -> Iterator[Item | Failure]:
        for record in read():
            yield from (record,) if isinstance(record, Failure) else _items_of(record, config.every_text)

    return Source(items, None if config.every_text else total, root)


_Opened = tuple[Callable[[], _Records], int | None, Path | None]


def _items_of(record: _Record, every_text: bool) -> Iterator[Item]:
    first = {column: texts[0] for column, texts in record.texts.items() if texts}
    group = record.group or record.id
    if not every_text:
        yield Item(record.id, record.picture, first, record.label, group, record.split)
        return
    n = max((len(texts) for texts in record.texts.values()), default=0)
    for nth in range(n):
        texts = {column: of_it[min(nth, len(of_it) - 1)] for column, of_it in record.texts.items() if of_it}
        yield Item(f"{record.id}#{nth}", record.picture, texts, record.label, group, record.split)


def _images(config: SourceConfig, folder: Path, texts: Sequence[str]) -> _Opened:
    root = _folder(folder / config.images, "source.images")
    files = [path for path in root.rglob("*") if path.is_file()]
    pictures = in_natural_order(path.relative_to(root) for path in files if path.suffix.lower() in PICTURES)
    captions = {path.relative_to(root).with_suffix("") for path in files if path.suffix.lower() == ".txt"}

    def read() -> _Records:
        for path in pictures:
            record = _Record(path.as_posix(), path.as_posix(), label=path.parts[:1] if len(path.parts) > 1 else ())
            if path.with_suffix("") in captions:
                text = (root / path).with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace")
                record.texts = dict.fromkeys(texts, _listed(text.strip()))
            yield record

    if not pictures:
        raise FileNotFoundError(f"source.images must be a folder of pictures, but there are none in {root}")
    return read, len(pictures), root


def _csv(config: SourceConfig, folder: Path, texts: Sequence[str]) -> _Opened:
    files = _files(folder, config.csv, "source.csv", (".csv", ".tsv"))

    def rows() -> Iterator[Mapping[str, Any]]:
        for path in files:
            with path.open(newline="", encoding="utf-8-sig") as file:
                table = csv.DictReader(file, delimiter=_delimiter(path))
                try:
                    yield from table
                except csv.Error as error:
                    raise ValueError(f"{path} must be a table, but not in line {table.line_num}: {error}") from error

    with files[0].open(newline="", encoding="utf-8-sig") as file:
        head = csv.DictReader(file, delimiter=_delimiter(files[0])).fieldnames
    return _table(config, texts, head or [], rows, sum(1 for _ in rows()), files[0].parent)


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _jsonl(config: SourceConfig, folder: Path, texts: Sequence[str]) -> _Opened:
    files = _files(folder, config.jsonl, "source.jsonl", (".jsonl", ".ndjson", ".json"))

    def rows() -> Iterator[Mapping[str, Any]]:
        return chain.from_iterable(_json_lines(path) for path in files)

    return _table(config, texts, next(rows(), {}), rows, sum(1 for _ in rows()), files[0].parent)


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{path} must hold a JSON object in each line, but not in {number}: {error}"
                    ) from None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{path} must hold a JSON object in each line, got {type(row).__name__} in {number}"
                    )
                yield row


def _parquet(config: SourceConfig, folder: Path, texts: Sequence[str]) -> _Opened:
    files = _files(folder, config.parquet, "source.parquet", (".parquet",))
    parquet = require("pyarrow.parquet", files[0])
    schema = parquet.read_schema(files[0])
    config, columns, names = _of_schema(config, texts, schema)

    def rows() -> Iterator[Mapping[str, Any]]:
        for path in files:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(DECODED_TOGETHER, columns=columns):
                    yield from (_with_class_names(row, names) for row in batch.to_pylist())

    total = sum(parquet.read_metadata(path).num_rows for path in files)
    return _table(config, texts, schema.names, rows, total, files[0].parent)


def _datasets(config: SourceConfig, folder: Path, texts: Sequence[str]) -> _Opened:
    """By pyarrow: what `datasets` wrote is Arrow, and needs none of its code to be read."""
    root = _folder(folder / config.datasets, "source.datasets")
    pyarrow = require("pyarrow", root)
    splits: list[tuple[Path, str]] = [(root, "")]
    if (root / "dataset_dict.json").is_file():
        named = json.loads((root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        splits = [(below(root, name, "split of source.datasets"), name) for name in named]
    files = []
    for path, split in splits:
        if not (path / "state.json").is_file():
            raise FileNotFoundError(f"source.datasets must be what save_to_disk wrote, but {path} has no state.json")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files += [(below(path, file["filename"], "file of source.datasets"), split) for file in state["_data_files"]]

    def batches(path: Path) -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
            for batch in stream:
                yield from (batch.slice(at, DECODED_TOGETHER) for at in range(0, len(batch), DECODED_TOGETHER))

    with pyarrow.memory_map(str(files[0][0])) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        schema = stream.schema
    config, columns, names = _of_schema(config, texts, schema)

    def rows() -> Iterator[Mapping[str, Any]]:
        for path, split in files:
            for batch in batches(path):
                for row in batch.select(columns).to_pylist():
                    yield {**({config.split: split} if split else {}), **_with_class_names(row, names)}

    total = sum(len(batch) for path, _ in files for batch in batches(path))
    return _table(config, texts, schema.names, rows, total, root)


def _coco(config: SourceConfig, folder: Path, texts: Sequence[str]) -> _Opened:
    root = _folder(folder / config.coco["images"], "source.coco.images")
    told = read_object(folder / config.coco["captions"], "source.coco.captions")
    captions, labels = defaultdict(list), defaultdict(set)
    for one in told.get("annotations", ()):
        captions[one["image_id"]].append(one["caption"].strip())
    if "instances" in config.coco:
        instances = read_object(folder / config.coco["instances"], "source.coco.instances")
        category = {one["id"]: one["name"] for one in instances["categories"]}
        for one in instances["annotations"]:
            labels[one["image_id"]].add(category[one["category_id"]])

    def read() -> _Records:
        for image in told["images"]:
            n = image["id"]
            of_it = dict.fromkeys(texts, captions[n])
            yield _Record(str(n), image["file_name"], of_it, tuple(sorted(labels[n])))

    return read, len(told["images"]), root


def _open_images(config: SourceConfig, folder: Path, texts: Sequence[str]) -> _Opened:
    places = config.open_images
    root = _folder(folder / places["images"], "source.open_images.images")
    captions, labels = defaultdict(list), defaultdict(set)
    for path in _files(folder, places["narratives"], "source.open_images.narratives", (".jsonl",)):
        for row in _json_lines(path):
            captions[str(row["image_id"])].append(str(row["caption"]).strip())
    names: dict[str, str] = {}
    if "classes" in places:
        with (folder / places["classes"]).open(newline="", encoding="utf-8-sig") as file:
            names = {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}
    if "labels" in places:
        with (folder / places["labels"]).open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                if row["ImageID"] in captions and float(row.get("Confidence") or 1) == 1:
                    labels[row["ImageID"]].add(names.get(row["LabelName"], row["LabelName"]))

    def read() -> _Records:
        for n, of_it in captions.items():
            yield _Record(n, f"{n}.jpg", dict.fromkeys(texts, of_it), tuple(sorted(labels[n])))

    return read, len(captions), root


def _webdataset(config: SourceConfig, folder: Path, texts: Sequence[str]) -> _Opened:
    """By tarfile: the addresses and pipes that webdataset would also open are none of ours."""
    patterns = _expand(config.webdataset)
    files = [path for one in patterns for path in _files(folder, one, "source.webdataset", (".tar", ".tgz", ".gz"))]

    def read() -> _Records:
        for path in files:
            try:
                with tarfile.open(path, "r|*") as tar:
                    yield from map(sample, _samples(tar))
            except (tarfile.TarError, OSError, EOFError) as error:
                yield Failure(path.name, f"the rest of {path} cannot be read: {error}")

    def sample(found: tuple[str, Mapping[str, bytes]]) -> _Record | Failure:
        key, parts = found
        try:
            row = json.loads(parts["json"]) if "json" in parts else {}
            if not isinstance(row, dict):
                raise ValueError("its .json is no object")
            record = _record({config.id: key, **row}, 0, config, texts)
        except ValueError as error:
            return Failure(key, str(error))
        record.picture = next((data for end, data in parts.items() if f".{end.rpartition('.')[2]}" in PICTURES), None)
        if "txt" in parts:
            record.texts[texts[0] if texts else "text"] = _listed(parts["txt"].decode("utf-8", "replace").strip())
        if "cls" in parts:
            record.label = (parts["cls"].decode("utf-8", "replace").strip(),)
        return record

    return read, None, None


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """Neighbouring files whose names are equal up to the first dot are one."""
    key, parts = "", dict[str, bytes]()
    for member in tar:
        folder, _, name = member.name.rpartition("/")
        stem, dot, end = name.partition(".")
        if not member.isfile() or not stem or not dot or (file := tar.extractfile(member)) is None:
            continue
        this = f"{folder}/{stem}" if folder else stem
        if this != key and parts:
            yield key, parts
            parts = {}
        key = this
        parts[end.lower()] = file.read()
    if parts:
        yield key, parts


def _expand(pattern: str) -> list[str]:
    """``a-{000..002}`` and ``a-{x,y}``, as shells do."""
    if (found := BRACES.search(pattern)) is None:
        return [pattern]
    first, last, words = found.groups()
    each = words.split(",") if words else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [path for word in each for path in _expand(pattern[: found.start()] + word + pattern[found.end() :])]


_KINDS: Mapping[str, Callable[[SourceConfig, Path, Sequence[str]], _Opened]] = {
    "images": _images,
    "csv": _csv,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "coco": _coco,
    "open_images": _open_images,
    "webdataset": _webdataset,
    "datasets": _datasets,
}


def _columns(config: SourceConfig, texts: Sequence[str]) -> list[str]:
    return [config.id, config.path, config.label, config.group, config.split, *texts]


def _of_schema(
    config: SourceConfig, texts: Sequence[str], schema: Any
) -> tuple[SourceConfig, list[str], dict[str, list[str]]]:
    """(with the column of pictures, which `datasets` calls "image", columns to read, what a column's integers mean)."""
    if config.path == SourceConfig.path and config.path not in schema.names and "image" in schema.names:
        config = replace(config, path="image")
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    classes = {name: kind["names"] for name, kind in features.items() if isinstance(kind, dict) and "names" in kind}
    return config, [name for name in schema.names if name in _columns(config, texts)], classes


def _table(
    config: SourceConfig,
    texts: Sequence[str],
    names: Iterable[str],
    rows: Callable[[], Iterator[Mapping[str, Any]]],
    total: int,
    root: Path,
) -> _Opened:
    there, defaults = set(names), (*_columns(SourceConfig(images="."), ()), "text", "image")
    if missing := [column for column in _columns(config, texts) if column not in there and column not in defaults]:
        raise ValueError(f"source.{config.kind} must have a column {missing[0]!r}, got {', '.join(sorted(there))}")

    def read() -> _Records:
        for n, row in enumerate(rows()):
            try:
                yield _record(row, n, config, texts)
            except ValueError as error:
                yield Failure(str(row.get(config.id) or n), str(error))

    return read, total, root


def _record(row: Mapping[str, Any], n: int, config: SourceConfig, texts: Sequence[str]) -> _Record:
    picture = row.get(config.path)
    if isinstance(picture, Mapping):  # as `datasets` stores it
        picture = picture.get("bytes") or picture.get("path")
    if picture is not None and not isinstance(picture, str | bytes):
        raise ValueError(f"its {config.path} must be a path or a file's content, got {type(picture).__name__}")
    given = row.get(config.id)
    name = str(given) if given not in (None, "") else picture if isinstance(picture, str) and picture else f"{n:08d}"
    texts_of_it = {column: _listed(row.get(column)) for column in texts}
    group, split = (str(row.get(column) or "") for column in (config.group, config.split))
    return _Record(name, picture or None, texts_of_it, tuple(_listed(row.get(config.label))), group, split)


def _listed(value: Any) -> list[str]:
    """Texts: none, one or several."""
    several = value if isinstance(value, list | tuple) else [value]
    return [str(one) for one in several if one is not None and str(one).strip()]


def _with_class_names(row: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> Mapping[str, Any]:
    if not names:
        return row
    return {
        k: names[k][v] if k in names and isinstance(v, int) and 0 <= v < len(names[k]) else v for k, v in row.items()
    }


def _files(folder: Path, where: str, what: str, suffixes: Sequence[str]) -> list[Path]:
    return files_of(where if "://" in where else folder / where, what, suffixes)


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{what} must be a folder, but there is none at {path}")
    return path.resolve()

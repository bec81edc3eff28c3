"""Extraction: every item once through every model, in batches, into files; a killed one goes on where it was."""

from __future__ import annotations

import base64
import json
import os
import platform
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparc_fast.data.feature_folder import (
    ITEMS,
    MANIFEST,
    FeatureFolder,
    is_feature_folder,
    write_items,
    write_manifest,
)
from sparc_fast.data.readers import require
from sparc_fast.files import as_path, atomic_path, check_folder, write_text
from sparc_fast.sizes import counted
from sparc_fast.training.run_folder import lock
from sparc_fast.training.trainer import device_of
from sparc_fast.version import __version__

from .config import Extraction
from .encoders import Encoder, encoder_of, name_on_hub
from .items import Failure, Item, as_line, load_picture, split_of, thumbnail
from .journal import JOURNAL, Journal
from .sources import Source, open_source

__all__ = ["Extracted", "extract"]

PARTIAL, IDS, FAILED, SETTINGS = ".partial", "ids.txt", "failed.jsonl", "extraction.json"
AHEAD = 2  # batches whose pictures are read while one is encoded


class Extracted(NamedTuple):
    """What an extraction came to."""

    folder: Path
    items: int
    """Those that every stream has."""
    failed: int
    """Those left out; failed.jsonl says why."""
    before: int
    """Items of the source that were done before this call, which went on from there."""
    seconds: float
    """That this call took."""


_Inputs = tuple[dict[str, Any], bytes | None]
"""stream -> what its model gets of an item, and a small copy of a picture that is in no file."""


class _Prepared(NamedTuple):
    """A batch on its way to the models."""

    found: Sequence[Item | Failure]
    pictures: Mapping[Any, Future[_Inputs]]


def extract(
    extraction: Extraction,
    out: str | Path,
    *,
    source: Source | None = None,
    encoders: Callable[[torch.device], Mapping[str, Encoder]] | None = None,
    columns: Sequence[str] = (),
    progress: Callable[[int, int | None], object] | None = None,
    say: Callable[[str], object] | None = None,
    **about: Any,
) -> Extracted:
    """Write the features of all items, and what is known of them, to a folder that `sparc_fast.data.open` takes.

    An item that cannot be read, or of which a model makes rows that are not finite or zero, is left out of every stream
    and listed in failed.jsonl. Going on after a kill gives the same bytes as a call that was never interrupted.

    Args:
        source: the items, instead of ``extraction.source``.
        encoders: makes the models, instead of those that the streams name.
        columns: of texts in the items' `about`, also to be written.
        progress: called with (items of the source done, how many there are or None).
        say: called with what a person may want to know.
        about: further entries of the manifest.

    Raises:
        ValueError: a setting is out of range, or the folder holds another extraction.
        FileNotFoundError: a source or model is missing.
        ImportError: a library is missing.
    """
    began, out = time.perf_counter(), as_path(out, "out")
    say, progress = say or (lambda _: None), progress or (lambda _done, _total: None)
    require("pyarrow.parquet", out / ITEMS)  # known before the work, not after it
    check_folder(out, "out")
    out = out.resolve()
    with _locked(out):
        settings = _settings(extraction)
        for name in (ITEMS, IDS, MANIFEST):  # of a process that was killed while it wrote
            for leftover in out.glob(f".{name}.*"):
                leftover.unlink()
        if is_feature_folder(out):
            done = FeatureFolder(out)
            shutil.rmtree(done.path / PARTIAL, ignore_errors=True)
            _agree(done.manifest.get("extraction"), settings, done.path)
            return Extracted(done.path, done.n_items, int(done.manifest["failed"]), done.n_items, 0.0)
        if source is None:
            if extraction.source is None:
                raise ValueError("source must be given, in the settings or as items, got none")
            source = open_source(extraction.source, extraction.folder, extraction.texts)
        (out / PARTIAL).mkdir(exist_ok=True)
        _keep(out / PARTIAL, settings, out)
        device = torch.device(device_of(extraction.device))
        models = _encoders(extraction, device, say) if encoders is None else encoders(device)
        run = _Run(extraction, out, source, models)
        before = run.journal.state.consumed
        if before:
            say(f"going on behind {counted(before, 'item')}")
        with warnings.catch_warnings():  # here, as threads have them in common
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            run.through(progress)
        run.finish(columns, settings, about)
        state = run.journal.state
        return Extracted(out, state.items, state.failed, before, time.perf_counter() - began)


class _Run:
    """One extraction under way."""

    def __init__(self, extraction: Extraction, out: Path, source: Source, encoders: Mapping[str, Encoder]) -> None:
        self.extraction, self.out, self.source, self.encoders = extraction, out, source, encoders
        dtypes = {name: getattr(torch, stream.dtype) for name, stream in extraction.streams.items()}
        self.journal = Journal(out / PARTIAL, {name: out / name for name in dtypes}, dtypes, extraction.shard_rows)
        self._ids = {item["id"] for item in self.journal.items()}
        self._sees = {name: s for name, s in extraction.streams.items() if s.modality == "image"}

    def through(self, progress: Callable[[int, int | None], object]) -> None:
        """Encode what is left of the source."""
        found = self.source.read()
        consumed, last = self.journal.state.consumed, self.journal.state.last
        if consumed:
            before = deque(islice(found, consumed), maxlen=1)
            if not before or before[0].id != last:
                raise ValueError(
                    f"source must be as it was when {self.out} was begun, but item {consumed} is not {last!r}"
                )
        progress(consumed, self.source.total)
        with ThreadPoolExecutor(self.extraction.threads) as pool:
            try:
                for batch in self._prepared(found, pool):
                    self._encode(batch)
                    progress(self.journal.state.consumed, self.source.total)
            finally:
                pool.shutdown(cancel_futures=True)

    def _prepared(self, found: Iterator[Item | Failure], pool: ThreadPoolExecutor) -> Iterator[_Prepared]:
        """Batches, the pictures of the next ones already being read."""
        waiting: deque[_Prepared] = deque()
        while batch := list(islice(found, self.extraction.batch_size)):
            pictures: dict[Any, Future[_Inputs]] = {}
            for item in batch:
                if isinstance(item, Item) and item.picture is not None and item.picture not in pictures:
                    pictures[item.picture] = pool.submit(self._prepare, item.picture)
            waiting.append(_Prepared(batch, pictures))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _prepare(self, picture: str | bytes) -> _Inputs:
        loaded = load_picture(picture, self.source.root)
        small = thumbnail(loaded) if isinstance(picture, bytes) else None
        return {name: self.encoders[name].prepare(loaded) for name in self._sees}, small

    def _encode(self, batch: _Prepared) -> None:
        found: list[tuple[Item, dict[str, Any], bytes | None]] = []
        failed: list[Failure] = []
        taken: set[str] = set()
        for item in batch.found:
            if isinstance(item, Failure):
                failed.append(item)
                continue
            try:
                if item.id in self._ids or item.id in taken:
                    raise ValueError("its id is that of an item before it")
                if "\n" in item.id or "\r" in item.id:
                    raise ValueError("its id has several lines")
                found.append((item, *self._inputs(item, batch)))
                taken.add(item.id)
            except (ImportError, MemoryError):
                raise
            except Exception as error:  # each decoder has its own
                failed.append(Failure(item.id, f"{error}" or type(error).__name__))
        rows = self._rows(found) if found else {}
        bad = {n: reason for name, of_it in rows.items() for n, reason in self._not_rows(of_it, name)}
        kept = [n for n in range(len(found)) if n not in bad]
        failed += [Failure(found[n][0].id, bad[n]) for n in sorted(bad)]
        lines = []
        for n in kept:
            item, _, small = found[n]
            lines.append(as_line(item, split_of(item, self.extraction.held_out, self.extraction.seed), small))
        self._ids.update(found[n][0].id for n in kept)
        self.journal.add(
            len(batch.found), batch.found[-1].id, {name: of_it[kept] for name, of_it in rows.items()}, lines,
            [json.dumps(one.__dict__, ensure_ascii=False) for one in failed],
            {name: self.encoders[name].pooled for name in rows},
        )  # fmt: skip

    def _inputs(self, item: Item, batch: _Prepared) -> _Inputs:
        """An exception where something is missing or cannot be read."""
        given: dict[str, Any] = {}
        small = None
        if item.picture is not None:
            prepared, small = batch.pictures[item.picture].result()
            given.update(prepared)
        for name, stream in self.extraction.streams.items():
            if stream.modality == "text":
                given[name] = item.texts.get(self.extraction.text_of(stream)) or None
            if given.get(name) is None:
                what = "picture" if stream.modality == "image" else f"text in {self.extraction.text_of(stream)!r}"
                raise ValueError(f"it has no {what} for stream {name!r}")
        return given, small

    def _rows(self, found: Sequence[tuple[Item, dict[str, Any], bytes | None]]) -> dict[str, Tensor]:
        """Of every stream, each different picture and text encoded once."""
        rows = {}
        for name, encoder in self.encoders.items():
            keys = [item.picture if name in self._sees else given[name] for item, given, _ in found]
            inputs = dict(zip(keys, (given[name] for _, given, _ in found), strict=True))
            place = {key: n for n, key in enumerate(inputs)}
            encoded = encoder.encode(list(inputs.values()))
            rows[name] = encoded if len(inputs) == len(found) else encoded[[place[key] for key in keys]]
        return rows

    def _not_rows(self, rows: Tensor, stream: str) -> Iterator[tuple[int, str]]:
        """(number, reason) of the items whose rows, as they are stored, say nothing."""
        dtype = self.extraction.streams[stream].dtype
        given, stored = _faults(rows), _faults(rows.to(getattr(torch, dtype)))
        for words, bad in stored.items():
            for n in bad.nonzero().flatten().tolist():
                yield n, f"its row of stream {stream!r} is {words}{'' if given[words][n] else f' in {dtype}'}"

    def finish(self, columns: Sequence[str], settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """What is written when all rows are: the table, the identifiers, what failed, and last the manifest."""
        state, journal = self.journal.state, self.journal
        shutil.copyfile(journal.failed_path, self.out / FAILED)
        if not state.items:
            raise ValueError(f"source must have an item that can be read, got none; {self.out / FAILED} says why")
        files = journal.close()
        texts = (*self.extraction.texts, *columns)
        write_items(self.out, map(_with_content, journal.items()), texts or ("text",))
        with atomic_path(self.out / IDS) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{row['id']}\n" for row in journal.items())
        splits = [row["split"] for row in journal.items()]
        streams = {}
        for name, stream in self.extraction.streams.items():
            tokens, width = state.shapes[name]
            picture = "thumbnail" if self.source.root is None else "picture"
            column = picture if stream.modality == "image" else self.extraction.text_of(stream)
            streams[name] = {
                "modality": stream.modality, "column": column, "width": width, "tokens": tokens, "dtype": stream.dtype,
                "files": files[name], "model": stream.model, "layer": stream.layer,
                "pooling": state.pooled[name] or stream.pooling,
                **self.encoders[name].about,
            }  # fmt: skip
        versions = {"sparc_fast": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
        write_manifest(
            self.out, streams, state.items, failed=state.failed,
            splits={split: splits.count(split) for split in ("train", "held_out")},
            pictures=None if self.source.root is None else _pictures(self.source.root, self.out),
            extraction=settings, versions=versions, **about,
        )  # fmt: skip
        shutil.rmtree(self.out / PARTIAL)


def _encoders(extraction: Extraction, device: torch.device, say: Callable[[str], object]) -> dict[str, Encoder]:
    made = {}
    for name, stream in extraction.streams.items():
        if on_hub := name_on_hub(stream, extraction.folder):
            say(f"{name}: {on_hub} is a name on a hub, and fetched from there unless it was cached")
        made[name] = encoder_of(stream, extraction.folder, device)
    return made


def _with_content(item: dict[str, Any]) -> dict[str, Any]:
    small = item["thumbnail"]
    return {**item, "thumbnail": None if small is None else base64.b64decode(small)}


def _faults(rows: Tensor) -> dict[str, Tensor]:
    """words -> of which rows they are true."""
    flat = rows.flatten(1)
    return {"not finite": ~flat.isfinite().all(1), "0 throughout": (flat == 0).all(1)}


def _pictures(root: Path, out: Path) -> str:
    """Relative where they lie in the folder itself, which may then be moved."""
    return root.relative_to(out).as_posix() if root.is_relative_to(out) else str(root)


def _settings(extraction: Extraction) -> dict[str, Any]:
    """What the result depends on."""
    kept = {name: value for name, value in asdict(extraction).items() if name not in ("device", "threads", "folder")}
    settings: dict[str, Any] = json.loads(json.dumps(kept))
    return settings


def _keep(folder: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Keep the settings, or hold them against those by which a batch was written."""
    path, journal = folder / SETTINGS, folder / JOURNAL
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if journal.is_file() and journal.stat().st_size:
        _agree(there, settings, out)
    if there != settings:
        write_text(path, json.dumps(settings))


def _agree(there: Any, settings: Mapping[str, Any], out: Path) -> None:
    if there == settings:
        return
    differ = [name for name in settings if not isinstance(there, Mapping) or there.get(name) != settings[name]]
    raise ValueError(f"out must be a new folder, or go on as it was begun; {out} has other {', '.join(differ)}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(handle, folder, "extracting")
        yield
    finally:
        os.close(handle)

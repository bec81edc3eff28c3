"""How fast shuffled batches come from files, and how well they are shuffled: ``python -m benchmarks.data``.

Writes features of three streams in the layouts people have, then times, taking turns, one epoch of: reading the
files in order (to nowhere; in large blocks; a batch at a time), the loader, and a row at a time in a random order
through h5py, which is how the research code's data set reads under a true shuffle. Rows are checked first.

The loader keeps two threads busy when nobody computes between batches: one that reads, and the caller, who gathers and
then reads along. So its rate is given relative to reading in order with one thread and with two.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np
import torch
from torch import Tensor

from sparc_fast import data
from sparc_fast.data.aligned import blocks
from sparc_fast.data.shuffle import Shuffling, permutation

D_STREAMS = {"dino": 1024, "clip_img": 768, "clip_txt": 768}
LAYOUTS = {  # name: (suffix, dtype, h5py's arguments)
    "npy float32": (".npy", np.float32, None),
    "npy float16": (".npy", np.float16, None),
    "HDF5": (".h5", np.float32, {}),
    "HDF5, gzip, 32 rows a chunk": (".h5", np.float32, {"chunks": 32, "compression": "gzip"}),
}
BATCH = 1024
MIB = 2**20
IN_ORDER = ("in order, 1 thread", "in order, 2 threads")


@dataclass
class Layout:
    """The files of one layout, and seconds of each contender's epoch, brought to the same number of rows."""

    name: str
    sources: dict[str, Path]
    n_rows: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def delivered(self) -> int:
        """Bytes of the rows as they are stored, uncompressed."""
        item = np.dtype(LAYOUTS[self.name][1]).itemsize
        return self.n_rows * sum(D_STREAMS.values()) * item


def write(name: str, folder: Path, n_rows: int) -> Layout:
    """Gaussian rows, whose first number in every stream is the row's own."""
    import h5py

    suffix, dtype, options = LAYOUTS[name]
    layout = Layout(
        name, {s: folder / f"{name.replace(', ', '-').replace(' ', '-')}-{s}{suffix}" for s in D_STREAMS}, n_rows
    )
    generator = np.random.default_rng(0)
    for stream, path in layout.sources.items():
        width = D_STREAMS[stream]
        pattern = generator.standard_normal((4096, width), dtype=np.float32).astype(dtype)
        if options is None:
            target = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n_rows, width))
        else:
            file = h5py.File(path, "w")
            chunks = {"chunks": (options["chunks"], width), "compression": options["compression"]} if options else {}
            target = file.create_dataset("features", (n_rows, width), dtype, **chunks)
        for start in range(0, n_rows, len(pattern)):
            rows = pattern[: n_rows - start].copy()
            rows[:, 0] = np.arange(start, start + len(rows)) % 2048  # exact in half precision
            target[start : start + len(rows)] = rows
        if options is None:
            target.flush()
        else:
            file.close()
    return layout


def evict(layout: Layout) -> None:
    """Make the system forget the files, so that the next reading comes from the disk."""
    for path in layout.sources.values():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def to_nowhere(layout: Layout) -> int:
    """The files in order, 1 MiB at a time, into a buffer that never leaves the cache: the system's own rate."""
    buffer = bytearray(MIB)
    for path in layout.sources.values():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return layout.n_rows


def in_order(files: data.AlignedFiles, n_threads: int) -> int:
    """Every stream in order, 8 MiB at a time, into memory used again and again; in batches of float32 if it is not."""
    lock = threading.Lock()
    parts = iter([(reader, *rows) for reader in files.readers.values() for rows in blocks(reader, 8 * MIB)])

    def read() -> None:
        room = {reader: torch.empty(8 * MIB // reader.row_bytes + reader.granule, reader.width, dtype=reader.dtype)
                for reader in files.readers.values()}  # fmt: skip
        batches = {reader: torch.empty(BATCH, reader.width) for reader in room}
        while True:
            with lock:
                reader, start, stop = next(parts, (None, 0, 0))
            if reader is None:
                return
            rows = reader.rows(start, stop, room[reader][: stop - start])
            if rows.dtype != torch.float32:
                for batch in rows.split(BATCH):
                    batches[reader][: len(batch)] = batch

    threads = [threading.Thread(target=read) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return files.n_rows


def batch_at_a_time(files: data.AlignedFiles) -> Iterator[Tensor]:
    """Batches in the order of the files, side by side, always in the same memory: what a plain loop does."""
    batch = torch.empty(BATCH, sum(D_STREAMS.values()))
    parts = [torch.empty(BATCH, reader.width, dtype=reader.dtype) for reader in files.readers.values()]
    for start in range(0, files.n_rows, BATCH):
        n = min(BATCH, files.n_rows - start)
        for part, reader, target in zip(
            parts, files.readers.values(), batch.split(list(D_STREAMS.values()), 1), strict=True
        ):
            target[:n] = reader.rows(start, start + n, part[:n])
        yield batch[:n]


def row_at_a_time(layout: Layout, at_most: int) -> Iterator[Tensor]:
    """Batches of single rows in a random order, each read from every stream by h5py."""
    import h5py

    files = [h5py.File(path, "r") for path in layout.sources.values()]
    try:
        for rows in np.array_split(permutation(layout.n_rows, 0)[:at_most], max(1, at_most // BATCH)):
            samples = [np.concatenate([file["features"][row] for file in files]) for row in rows]
            yield torch.from_numpy(np.stack(samples))
    finally:
        for file in files:
            file.close()


def through_memory() -> float:
    """Bytes a second, with two threads, of a copy to memory beyond the caches and one reading of what was copied.

    No shuffle larger than the caches is faster: what is read in the order of the file must wait somewhere until its
    turn comes. Reading in order into memory used again and again does neither.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    source = torch.ones(2**27)
    target = torch.zeros_like(source)

    def once() -> float:
        start = perf_counter()
        target.copy_(source)
        target.sum()
        return perf_counter() - start

    rate = source.nbytes / min(once() for _ in range(7))
    torch.set_num_threads(threads)
    return rate


def drain(batches: Iterator[Tensor]) -> int:
    return sum(len(batch) for batch in batches)


def check(batches: Iterator[Tensor], n_rows: int) -> None:
    """Every row once, all streams of the same row."""
    firsts = torch.cat([batch[:, [0, 1024, 1792]] for batch in batches])
    assert (firsts[:, :1] == firsts).all(), "streams of different rows"
    assert torch.equal(firsts[:, 0].sort().values, (torch.arange(n_rows) % 2048).float().sort().values), "other rows"


def contenders(layout: Layout, memory: int, rows_at_a_time: int) -> Mapping[str, Callable[[], int]]:
    """name -> a run, which returns the number of rows it gave."""
    files = data.open(layout.sources)
    windowed = data.Loader(files, BATCH, memory=memory)
    unchecked = data.Loader(files, BATCH, memory=memory, check_finite=False)
    resident = data.Loader(files, BATCH, memory=2 * layout.delivered + 2**28)
    assert windowed.plan.n_windows > 1, "the data fit in the memory: ask for more rows"
    assert resident.plan.n_windows == 1
    for loader in (windowed, resident, unchecked):
        check(iter(loader), layout.n_rows)
    check(batch_at_a_time(files), layout.n_rows)
    runs: dict[str, Callable[[], int]] = {
        "to nowhere": lambda: to_nowhere(layout),
        IN_ORDER[0]: lambda: in_order(files, 1),
        IN_ORDER[1]: lambda: in_order(files, 2),
        "in order, a batch at a time": lambda: drain(batch_at_a_time(files)),
        f"loader, {memory // MIB} MiB": lambda: drain(iter(windowed)),
        f"loader, {memory // MIB} MiB, not looking for NaN": lambda: drain(iter(unchecked)),
        "loader, all in memory": lambda: drain(iter(resident)),
    }
    if layout.name.startswith("HDF5"):
        runs["a row at a time"] = lambda: drain(row_at_a_time(layout, rows_at_a_time))
    return runs


def timed(layout: Layout, runs: Mapping[str, Callable[[], int]], rounds: int, cold: bool = False) -> None:
    for _ in range(rounds):
        for name, run in runs.items():
            if cold:
                evict(layout)
            start, busy = perf_counter(), process_time()
            rows = run()
            busy, taken = process_time() - busy, perf_counter() - start
            layout.seconds.setdefault(name, []).append(taken * layout.n_rows / rows)
            layout.cpu_seconds.setdefault(name, []).append(busy * layout.n_rows / rows)


def report(layout: Layout, heading: str) -> None:
    print(
        f"\n{heading}: {layout.n_rows} rows, {layout.delivered / 1e6:.0f} MB as stored; % of in order, 1 and 2 threads"
    )
    for name, seconds in layout.seconds.items():
        middle = median(seconds)
        # rounds in turns: a slow spell hits both sides of a ratio
        of_order = [median(o / s for o, s in zip(layout.seconds[order], seconds, strict=True)) for order in IN_ORDER]
        speed = f"{layout.delivered / middle / 1e9:8.3f} GB/s {layout.n_rows / middle:12,.0f} rows/s"
        busy = median(layout.cpu_seconds[name]) / layout.delivered * 1e9
        print(f"  {name:42} {speed} {of_order[0]:7.0%} {of_order[1]:7.0%} {busy:8.3f} CPU s/GB"
              f"   ({min(seconds):.3f} to {max(seconds):.3f} s)")  # fmt: skip
    layout.seconds.clear()
    layout.cpu_seconds.clear()


def quality(n_rows: int, window_fraction: int, block_rows: int, epochs: int = 4) -> dict[str, tuple[float, float]]:
    """name -> (the loader's plan, a true permutation), for figures in which 1 permutation is as good as another."""
    n_blocks = -(-n_rows // block_rows)
    plan = Shuffling(n_rows, block_rows, -(-n_blocks // window_fraction), seed=0)
    truly = Shuffling(n_rows, block_rows, n_blocks, seed=0)
    figures = [{name: float(np.mean(values)) for name, values in _figures(p, epochs).items()} for p in (plan, truly)]
    return {name: (figures[0][name], figures[1][name]) for name in figures[0]}


def epoch_order(plan: Shuffling, epoch: int) -> np.ndarray:
    """The rows of an epoch, in order."""
    windows = []
    for number, window in enumerate(plan.windows(epoch)):
        rows = np.concatenate([np.arange(*plan.rows(int(block))) for block in window])
        windows.append(rows[plan.order(epoch, number, len(rows))])
    return np.concatenate(windows)


def _figures(plan: Shuffling, epochs: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    previous = None
    for epoch in range(epochs):
        order = epoch_order(plan, epoch)
        n = len(order) // BATCH * BATCH
        batches = order[:n].reshape(-1, BATCH)
        place = np.empty(len(order))
        place[order] = np.arange(len(order))
        where = np.sort(place[: len(order) // 100]) / len(order)
        steps = (np.arange(len(where)) + 0.5) / len(where)
        together = (np.abs(np.diff(place)) < BATCH).mean() / (2 * BATCH / len(order))
        same_block = [(np.bincount(b // plan.block_rows) ** 2).sum() - BATCH for b in batches]
        truly = BATCH * (BATCH - 1) * (plan.block_rows - 1) / (len(order) - 1)
        means = (batches / len(order)).mean(1)
        figures = {
            "|correlation| of place in file and in epoch": abs(np.corrcoef(np.arange(len(order)), place)[0, 1]),
            "file's first 1 %: largest deviation of its places from uniform": np.abs(where - steps).max(),
            "neighbours in the file within a batch's length, ÷ chance": together,
            "pairs from one block in a batch, ÷ chance": np.mean(same_block) / truly,
            "file in sorted order: variance of a batch's mean, ÷ of independent rows": means.var() * 12 * BATCH,
        }
        if previous is not None:
            figures["|correlation| of an epoch's order and the next one's"] = abs(np.corrcoef(previous, place)[0, 1])
        previous = place
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=160_000, help="rows of the .npy files, 10 kB each (%(default)s)")
    parser.add_argument("--hdf5-rows", type=int, default=16_384, help="rows of the HDF5 files (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times each contender runs (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write the files; by default a temporary folder")
    parser.add_argument("--only", choices=LAYOUTS, help="one of the layouts; all by default")
    parser.add_argument(
        "--cold", action="store_true", help="also from the disk itself, files forgotten before each run"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {os.cpu_count()} processors, {torch.get_num_threads()} threads, batches of {BATCH}"
    )
    folder = Path(tempfile.mkdtemp(prefix="sparc_fast-", dir=arguments.folder))
    try:
        for name in [arguments.only] if arguments.only else LAYOUTS:
            layout = write(name, folder, arguments.hdf5_rows if name.startswith("HDF5") else arguments.rows)
            print(f"\ncopied to memory and read there, which no shuffle avoids: {through_memory() / 1e9:.1f} GB/s")
            runs = contenders(layout, max(layout.delivered // 4, 64 * MIB), rows_at_a_time=1024)
            timed(layout, runs, arguments.rounds)
            report(layout, f"{name}, from the page cache")
            if arguments.cold:
                disk = {run: f for run, f in runs.items() if run != "loader, all in memory"}
                timed(layout, disk, arguments.rounds, cold=True)
                report(layout, f"{name}, from the disk")
            for path in layout.sources.values():
                path.unlink()
    finally:
        shutil.rmtree(folder)
    print("\nshuffling: the loader | a true permutation (1.7 M rows, windows of a sixteenth, blocks of 104 rows)")
    for name, (ours, truly) in quality(1_700_000, 16, 104).items():
        print(f"  {name:74} {ours:9.4f} | {truly:9.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Samples pass by a model once, a batch at a time, and what metrics need of them is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from sparc_fast.batch import Arrays, as_tensors
from sparc_fast.codes import SparseLatents
from sparc_fast.data import AlignedFiles
from sparc_fast.data.absence import mark_zero_rows
from sparc_fast.ops.huge_pages import give_back_freed
from sparc_fast.selection import LOCAL
from sparc_fast.sizes import as_bytes

from .codes import CHUNK_BYTES
from .labels import PerSample, as_groups, as_labels
from .registry import Batch, Given, Metric, Need, Sizes
from .resampling import Resampling

if TYPE_CHECKING:
    from ..model import SPARC

__all__ = ["InputsOnCPU", "InputsOnDevice", "Run", "Samples", "bytes_of_inputs"]

Samples = Mapping[str, Tensor] | Arrays | AlignedFiles
"""stream -> its rows, tensors or NumPy arrays, or files that were opened."""

LEAST_CHUNK, PIECES = 2**17, 12  # bytes of a piece of work on resamplings, and how many such pieces there are at a time


def _as_tensors(inputs: Samples) -> Mapping[str, Tensor] | AlignedFiles:
    """On the host, from which batches go to the model's device; tensors are as they were."""
    if isinstance(inputs, AlignedFiles):
        return inputs
    return cast("Mapping[str, Tensor]", as_tensors(inputs, torch.device("cpu")))  # what is none is refused later


def _check_inputs(model: SPARC, inputs: Mapping[str, Tensor] | AlignedFiles) -> tuple[int, ...]:
    """The leading dimensions, which all streams share."""
    if isinstance(inputs, AlignedFiles):
        got = {name: inputs.d_streams[name] for name in model.streams if name in inputs.d_streams}
        if got != model.d_streams or len(inputs.d_streams) != len(got):
            raise ValueError(f"inputs must have the streams and widths {model.d_streams}, got {inputs.d_streams}")
        return (inputs.n_rows,)
    if not isinstance(inputs, Mapping) or set(inputs) != set(model.streams):
        got_names = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(f"inputs must hold the streams {list(model.streams)}, got {got_names}")
    leading: tuple[int, ...] | None = None
    for name, width in model.d_streams.items():
        x = inputs[name]
        if not isinstance(x, Tensor):
            raise ValueError(f"inputs[{name!r}] must be a tensor [N, D={width}], got {type(x).__name__}")
        shape = tuple(x.shape)
        if leading is None:
            leading = shape[:-1]
        if not leading or shape != (*leading, width):
            others = ", ".join(map(str, leading[1:]))
            expected = f"[N={leading[0]}, {others + ', ' if others else ''}D={width}]" if leading else f"[N, D={width}]"
            raise ValueError(f"inputs[{name!r}] must be {expected}, got {list(shape)}")
    assert leading is not None  # a model has streams
    return leading


class _Rows(NamedTuple):
    """How many samples are read, and how many of them encoded, at a time; bytes of a piece of work on resamplings."""

    read: int
    encoded: int
    chunk_bytes: int


@dataclass(eq=False)
class Run:
    """What passes samples by, and keeps of them what the metrics need."""

    model: SPARC
    metrics: Sequence[Metric]
    batch_size: int
    zero_rows: str
    memory: int | str
    resamples: int

    def given(
        self,
        samples: Samples,
        labels: PerSample | None,
        groups: PerSample | None,
        say: Callable[[str], object],
        labels_name: str = "labels",
    ) -> Given:
        """What the metrics are computed from, of these samples; it names labels as the caller does."""
        model = self.model
        with model._shards.agreed("evaluate"):
            inputs = _as_tensors(samples)
            leading = _check_inputs(model, inputs)
            N = math.prod(leading)
            truth = None if labels is None else as_labels(labels, leading, labels_name)
            if groups is None and isinstance(inputs, AlignedFiles):
                groups = inputs.sample_of_rows()
            group_of = None if groups is None else as_groups(groups, leading)
            rows = self._rows_at_once(inputs, N, 0 if truth is None else truth.shape[1])
        model._shards.check_samples(inputs)
        kept: list[Tensor] = []
        resampling = None
        if self.resamples:
            resampling = Resampling(N, self.resamples, group_of, chunk_bytes=rows.chunk_bytes)

        def batches() -> Iterator[Batch]:
            first = read = 0
            kept.clear()
            for batch, complete in _batches(model, inputs, N, rows, self.zero_rows):
                n = len(batch[model.streams[0]])
                here = torch.ones(n, dtype=torch.bool, device="cpu") if complete is None else complete.cpu()
                kept.append(here)
                weights = None
                if resampling is not None:
                    weights = resampling.weights(read + here.nonzero()[:, 0]).to(model.W_enc.device)
                yield Batch(model, batch, slice(first, first + n), weights)
                first, read = first + n, read + len(here)

        given = Given(model, N, batches, say=say)
        self._pass(given, N)
        which = torch.cat(kept)
        given.n_samples = int(which.sum())
        if not which.all():
            truth = None if truth is None else truth[which]
            group_of = None if group_of is None else group_of[which]
            resampling = None if resampling is None else resampling[which]
        given.labels, given.groups, given.resampling = truth, group_of, resampling
        return given

    def _needs(self, need: Need) -> bool:
        return any(need in metric.needs for metric in self.metrics)

    def _pass(self, given: Given, N: int) -> None:
        """All samples by all that looks at them."""
        streams = self.model.streams
        given.watched = {metric.key: metric.watch(given) for metric in self.metrics if metric.watch is not None}
        single = {name: _Store(N) for name in streams} if self._needs("single") else {}
        joint = _Store(N) if self._needs("joint") else None
        for batch in given.batches():
            if joint is not None:
                joint.add(batch.together.values > 0, batch.together)
            for name, store in single.items():
                store.add(batch.alone[name].values, batch.alone[name])
            for watch in given.watched.values():
                watch.see(batch)
        given.single = {name: store.codes().stream(name) for name, store in single.items()}
        if joint is not None:
            codes = joint.codes()
            given.joint = {name: codes.stream(name) for name in streams}
        give_back_freed()

    def _rows_at_once(self, inputs: Mapping[str, Tensor] | AlignedFiles, N: int, n_labels: int) -> _Rows:
        """Such that all of it fits: what is kept, and beside it a batch, and after it what metrics take."""
        model, room = self.model, as_bytes(self.memory, "memory")
        S, k, L, itemsize = len(model.streams), model._slots(), model.n_latents, model.W_enc.dtype.itemsize
        sizes = Sizes(N, S, k, L, n_labels, sum(model.d_streams.values()), self.resamples)
        kept = 2**25 + 2 * N * n_labels  # and what the allocator holds back
        kept += sum(metric.kept(sizes) for metric in self.metrics if metric.kept is not None)
        if self.resamples:
            kept += N * (self.resamples + 16)
        if self._needs("single"):
            kept += N * S * k * (itemsize + 4)
        if self._needs("joint"):
            kept += N * k * (S + 4 * (S if model.selection in LOCAL else 1))
        if model.n_shared < L:
            kept += 2 * N * S * k * (itemsize + 4)  # the codes once more, of shared latents
        work = max((metric.work(sizes) for metric in self.metrics if metric.work is not None), default=0)
        work += min(96 * N * k, CHUNK_BYTES) + 96 * S * L  # a part of the work
        if self.resamples:
            work = max(work, PIECES * max(LEAST_CHUNK, 8 * N))
        readers = list(inputs.readers.values()) if isinstance(inputs, AlignedFiles) else []
        stored = sum(reader.row_bytes for reader in readers) or 4 * sizes.D
        wide = max(4, itemsize)
        # as read and side by side, calibrated, converted, decoded; scores and what selecting takes; the code
        encoded = wide * (5 * sizes.D + 2 * L) + 24 * S * k
        copies = 4 * min(L * sizes.D, 2**23) + 48 * L + 2 * max((r.pick_scratch for r in readers), default=0)
        least = kept + max(work, copies + 2 * (stored + encoded))
        if room < least:
            raise ValueError(f"memory must be at least {least} bytes for {N} samples here, got {self.memory}")
        half = (room - kept - copies) // 2
        read = min(min(half, 2**25) // stored, 2**27 // encoded)  # more at a time is no faster
        together = max(1, min(self.batch_size, half // encoded, read))
        chunk = max(LEAST_CHUNK, min(CHUNK_BYTES, (room - kept) // PIECES))
        return _Rows(max(1, read // together) * together, together, chunk)


def _batches(
    model: SPARC, inputs: Mapping[str, Tensor] | AlignedFiles, N: int, rows: _Rows, zero_rows: str
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Every stream's samples, and which of a batch's rows they are, [rows]; None where they are all. One at least."""
    device, dtype = model.W_enc.device, torch.promote_types(model.W_enc.dtype, torch.float32)
    files = inputs if isinstance(inputs, AlignedFiles) else None
    flat = {} if files is not None else {name: x.reshape(-1, x.shape[-1]) for name, x in inputs.items()}  # type: ignore[union-attr]
    room = {} if files is None else files.room(min(rows.read, N), model.streams)
    # of what is present, which is in the files' order of streams, whose rows go together
    columns = [] if files is None else [list(files.d_streams).index(name) for name in model.streams]
    for start in range(0, max(N, 1), rows.read):
        stop = min(start + rows.read, N)
        give_back_freed()  # the allocator would hold back several times what a batch takes
        block = (
            files.read(start, stop, room)
            if files is not None
            else {name: flat[name][start:stop] for name in model.streams}
        )
        for first in range(start, max(stop, start + 1), rows.encoded):
            at = slice(first, min(first + rows.encoded, stop))
            batch = {name: x[at.start - start : at.stop - start] for name, x in block.items()}
            present = None if files is None or files.present is None else files.present[at, columns]
            if zero_rows == "absent":
                present, _ = mark_zero_rows(torch.cat(list(batch.values()), dim=1), present, model.d_streams)
            complete = None if present is None else present.all(dim=1)
            if complete is not None:
                batch = {name: x[complete] for name, x in batch.items()}
            if files is not None:
                batch = {name: x.to(dtype) for name, x in batch.items()}
            yield {name: x.to(device) for name, x in batch.items()}, complete


class _Store:
    """Codes, on the CPU, as they come; of at most N samples."""

    def __init__(self, N: int) -> None:
        self._N, self._n = N, 0
        self._codes: SparseLatents | None = None

    def add(self, values: Tensor, codes: SparseLatents) -> None:
        """Some samples below those before, with these values."""
        if self._codes is None:
            parts = [
                torch.empty(self._N, *part.shape[1:], dtype=part.dtype, device="cpu")
                for part in (values, codes.indices)
            ]
            self._codes = SparseLatents(parts[0], parts[1], codes.streams, codes.n_latents)
        k = max(values.shape[-1], self._codes.values.shape[-1])  # samples may have as many latents as they need
        if k > self._codes.values.shape[-1]:
            self._codes = self._codes.with_slots(k)
        codes = SparseLatents(values, codes.indices, codes.streams, codes.n_latents).with_slots(k)
        values, stop = codes.values, self._n + len(values)
        self._codes.values[self._n : stop], self._codes.indices[self._n : stop] = values, codes.indices
        self._n = stop

    def codes(self) -> SparseLatents:
        assert self._codes is not None  # there is one batch at least
        parts = self._codes.values[: self._n], self._codes.indices[: self._n]
        return SparseLatents(*parts, self._codes.streams, self._codes.n_latents)


class InputsOnDevice:
    """All inputs, float32 and in the units of reconstructions, on the model's device: a `Watch`."""

    device: torch.device | None = None

    def __init__(self, given: Given) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in given.streams}

    def see(self, batch: Batch) -> None:
        for name, kept in self._parts.items():
            kept.append(batch.truth[name].to(self.device, torch.float32))

    def stream(self, name: str) -> Tensor:
        """[N, D]."""
        self._parts[name] = [torch.cat(self._parts[name])]
        return self._parts[name][0]


class InputsOnCPU(InputsOnDevice):
    """The same on the CPU, where codes are."""

    device = torch.device("cpu")


def bytes_of_inputs(sizes: Sizes) -> int:
    """That are kept, and side by side once."""
    return 8 * sizes.N * sizes.D

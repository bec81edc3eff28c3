"""All metrics of one model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparc_fast.codes import SparseLatents
from sparc_fast.data import AlignedFiles
from sparc_fast.data.absence import mark_zero_rows
from sparc_fast.ops.huge_pages import give_back_freed
from sparc_fast.sizes import as_bytes

from .agreement import firing_agreement
from .codes import CHUNK_BYTES, Codes, firing_counts
from .jaccard import concept_jaccard, concept_jaccard_by_chance
from .labels import PerSample, as_groups, as_labels
from .latents import LatentUse, latent_use
from .reconstruction import Reconstruction, squared_error
from .retrieval import Retrieval, retrieval_scores, retrieval_seconds

if TYPE_CHECKING:
    from ..model import SPARC

__all__ = ["METRICS", "Better", "Evaluation", "Metric", "evaluate"]

LONG = 10  # seconds of retrieval that are announced


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of one model on one set of samples, on the CPU.

    single_codes: each stream encoded alone; every metric is of these, but for the two called joint (all
    streams encoded together, the SPARC paper's protocol). The jaccard tensors [L] are None without labels.
    retrieval is by (query stream, candidate stream); nmse and r2 [S, S] by source (row) and target (column).
    """

    streams: tuple[str, ...]
    n_samples: int
    n_latents: int
    single_codes: Codes
    jaccard_single: Tensor | None
    jaccard_chance: Tensor | None
    jaccard_joint: Tensor | None
    agreement: Tensor
    latents_single: LatentUse
    latents_joint: LatentUse
    retrieval: dict[tuple[str, str], Retrieval]
    nmse: Tensor
    r2: Tensor

    @property
    def frequency(self) -> Tensor:
        """Fraction of samples that fire each latent in each stream encoded alone, [S, L]."""
        return self.latents_single.frequency

    def scores(self) -> dict[str, float | None]:
        """One number per metric of `METRICS`; None where it is undefined."""
        return {metric.key: _finite(metric.value(self)) for metric in METRICS}

    def to_dict(self) -> dict[str, Any]:
        """The summary numbers as plain JSON; undefined ones are null."""
        return {
            "streams": list(self.streams),
            "n_samples": self.n_samples,
            "n_latents": self.n_latents,
            "scores": self.scores(),
            "dead_latents": self.latents_single.dead,
            "active_per_sample": self.latents_single.active_per_sample,
            "retrieval": {
                f"{query} -> {candidate}": {key: _finite(value) for key, value in vars(found).items()}
                for (query, candidate), found in self.retrieval.items()
            },
            "nmse": self._matrix(self.nmse),
            "r2": self._matrix(self.r2),
        }

    def _matrix(self, matrix: Tensor) -> dict[str, float | None]:
        return {
            f"{source} -> {target}": _finite(float(matrix[s, t]))
            for s, source in enumerate(self.streams)
            for t, target in enumerate(self.streams)
        }


@torch.no_grad()
def evaluate(
    model: SPARC,
    inputs: Mapping[str, Tensor] | AlignedFiles,
    labels: PerSample | None = None,
    *,
    groups: PerSample | None = None,
    batch_size: int = 1024,
    retrieval: bool = True,
    zero_rows: Literal["keep", "absent"] = "keep",
    memory: int | str = "4GiB",
    say: Callable[[str], object] | None = None,
) -> Evaluation:
    """Run every metric on paired inputs {stream: [N, D_s]}, row n being the same sample in each.

    The model runs in eval mode and without gradients, and is left as it was. Inputs pass once, a batch at a time on the
    model's device; sparse codes are kept, on the CPU. Time is linear in N but for retrieval, which compares all pairs.

    Args:
        inputs: of patch tokens, [N, T, D_s], each token is a sample. Or files that `sparc_fast.data.open` opened, of
            which samples that lack a stream are left out; rows of one identifier, with ``repeated="all"``, are a group.
        labels: the concepts each sample carries, bool [N, C] or [N], or its class, ids (-1: none) or names [N]: a
            tensor, array or list, a .npy file, or a column of a CSV, Parquet, Arrow or HDF5 file, "labels.csv:column"
            or (path, column), by default its only column or the one called "label". For [N, T, D_s] one a sample or
            one a token.
        groups: ids [N], given like labels, such as the image of a caption: in retrieval any sample of the query's
            group is right, the best of them counting, and equal rows of a group are one. By default a sample's own pair
            alone is.
        retrieval: False leaves it out.
        zero_rows: samples of which a stream is 0 throughout are evaluated as they are, "keep", or left out, "absent".
        memory: bytes, or a size such as "8GiB", to take beside the model and the inputs, codes included.
        say: is told beforehand, in a sentence, when retrieval will take more than some seconds; by default it is
            written to standard error.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if zero_rows not in ("keep", "absent"):
        raise ValueError(f'zero_rows must be "keep" or "absent", got {zero_rows!r}')
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    leading = _check_inputs(model, inputs)
    N, S, L = math.prod(leading), len(model.streams), model.n_latents
    truth = None if labels is None else as_labels(labels, leading)
    if groups is None and isinstance(inputs, AlignedFiles) and inputs.groups is not None:
        groups = np.repeat(np.arange(len(inputs.groups) - 1), np.diff(inputs.groups))
    group_of = None if groups is None else as_groups(groups, leading)
    rows = _rows_at_once(model, inputs, N, 0 if truth is None else truth.shape[1], retrieval, batch_size, memory)
    was_training = model.training
    model.eval()
    try:
        passed = _pass(model, _batches(model, inputs, N, rows, zero_rows), N, truth is not None)
    finally:
        model.train(was_training)
    give_back_freed()
    if passed.kept is not None:
        truth = None if truth is None else truth[passed.kept]
        group_of = None if group_of is None else group_of[passed.kept]
    single = passed.single
    return Evaluation(
        streams=tuple(model.streams),
        n_samples=passed.n,
        n_latents=L,
        single_codes=single,
        jaccard_single=None if truth is None else concept_jaccard(single, truth, L),
        jaccard_chance=None if truth is None else concept_jaccard_by_chance(single, truth, L),
        jaccard_joint=None if truth is None else concept_jaccard(passed.joint, truth, L),
        agreement=firing_agreement(single, L),
        latents_single=latent_use(single, L),
        latents_joint=LatentUse(tuple(model.streams), passed.joint_counts.double() / max(passed.n, 1)),
        retrieval=_retrieve_all(single, L, group_of, say) if retrieval and S > 1 else {},
        nmse=torch.stack([target.nmse.cpu() for target in passed.targets], dim=1),
        r2=torch.stack([target.r2.cpu() for target in passed.targets], dim=1),
    )


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
    """How many samples are read, and how many of them encoded, at a time."""

    read: int
    encoded: int


def _rows_at_once(
    model: SPARC,
    inputs: Mapping[str, Tensor] | AlignedFiles,
    N: int,
    n_labels: int,
    retrieval: bool,
    batch_size: int,
    memory: int | str,
) -> _Rows:
    """Such that all of it fits: the codes that are kept, and beside them a batch, and after it what metrics take."""
    S, k, L, itemsize = len(model.streams), model.k, model.n_latents, model.W_enc.dtype.itemsize
    kept = 2**25 + N * (S * k * (itemsize + 4) + 2 * n_labels)  # and what the allocator holds back
    if n_labels:
        kept += N * k * (S + 4 * (S if model.selection == "local" else 1))
    # two streams' entries, scales and places; the counts of all labels, with those of a pair; a part of the work
    entries = N * (16 * k + 80) if retrieval and S > 1 else 0
    metrics = max(entries, 3 * min(4 * S * L * n_labels, CHUNK_BYTES)) + min(96 * N * k, CHUNK_BYTES) + 96 * S * L
    readers = list(inputs.readers.values()) if isinstance(inputs, AlignedFiles) else []
    stored = sum(reader.row_bytes for reader in readers) or 4 * sum(model.d_streams.values())
    wide = max(4, itemsize)
    # as read and side by side, calibrated, converted, decoded; scores and what selecting takes; the code
    encoded = wide * (5 * sum(model.d_streams.values()) + 2 * L) + 24 * S * k
    copies = 4 * min(model.W_enc.numel(), 2**23) + 48 * L + 2 * max((r.pick_scratch for r in readers), default=0)
    room = as_bytes(memory, "memory")
    least = kept + max(metrics, copies + 2 * (stored + encoded))
    if room < least:
        raise ValueError(f"memory must be at least {least} bytes for {N} samples here, got {memory}")
    half = (room - kept - copies) // 2
    read = min(min(half, 2**25) // stored, 2**27 // encoded)  # more at a time is no faster
    together = max(1, min(batch_size, half // encoded, read))
    return _Rows(max(1, read // together) * together, together)


def _batches(
    model: SPARC, inputs: Mapping[str, Tensor] | AlignedFiles, N: int, rows: _Rows, zero_rows: str
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """Every stream's samples, and which of a batch's rows they are, [rows]; None where they are all. One at least."""
    device, dtype = model.W_enc.device, torch.promote_types(model.W_enc.dtype, torch.float32)
    files = inputs if isinstance(inputs, AlignedFiles) else None
    flat = {} if files is not None else {name: x.reshape(-1, x.shape[-1]) for name, x in inputs.items()}  # type: ignore[union-attr]
    room = {} if files is None else files.room(min(rows.read, N), model.streams)
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
            present = None if files is None or files.present is None else files.present[at]
            if present is not None:  # in the files' order of streams, whose rows go together
                present = present[:, [list(files.d_streams).index(name) for name in model.streams]]  # type: ignore[union-attr]
            if zero_rows == "absent":
                present, _ = mark_zero_rows(torch.cat(list(batch.values()), dim=1), present, model.d_streams)
            complete = None if present is None else present.all(dim=1)
            if complete is not None:
                batch = {name: x[complete] for name, x in batch.items()}
            if files is not None:
                batch = {name: x.to(dtype) for name, x in batch.items()}
            yield {name: x.to(device) for name, x in batch.items()}, complete


@dataclass(eq=False)
class _Passed:
    """What is left of the inputs when they have passed."""

    n: int
    kept: Tensor | None
    single: Codes
    joint: Codes
    joint_counts: Tensor
    targets: list[Reconstruction]


def _pass(
    model: SPARC, batches: Iterator[tuple[dict[str, Tensor], Tensor | None]], N: int, keep_joint: bool
) -> _Passed:
    """Codes of every stream alone, which latents fire when all are encoded together, and how well streams decode."""
    S, L = len(model.streams), model.n_latents
    single = {name: _Store(N) for name in model.streams}
    joint = _Store(N)
    counts = torch.zeros(S, L, dtype=torch.int64, device="cpu")
    targets = [Reconstruction() for _ in model.streams]
    kept: list[Tensor] = []
    for batch, complete in batches:
        n = len(batch[model.streams[0]])
        kept.append(torch.ones(n, dtype=torch.bool, device="cpu") if complete is None else complete.cpu())
        together = model.encode(batch)
        counts += torch.stack([firing_counts(together.stream(name), L) for name in model.streams]).cpu()
        if keep_joint:
            joint.add(together.values > 0, together)
        alone = {name: model.encode({name: x}) for name, x in batch.items()}
        for name, codes in alone.items():
            single[name].add(codes.values, codes)
        truth = model.normalized(batch)  # in the units of reconstructions
        for target, found in zip(model.streams, targets, strict=True):
            errors = [
                squared_error(truth[target], model.decode(codes, source=source, target=target))
                for source, codes in alone.items()
            ]
            found.add(torch.stack(errors), truth[target])
    which = torch.cat(kept)
    return _Passed(
        n=int(which.sum()),
        kept=None if which.all() else which,
        single={name: store.codes().stream(name) for name, store in single.items()},
        joint={name: joint.codes().stream(name) for name in model.streams} if keep_joint else {},
        joint_counts=counts,
        targets=targets,
    )


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
        stop = self._n + len(values)
        self._codes.values[self._n : stop], self._codes.indices[self._n : stop] = values, codes.indices
        self._n = stop

    def codes(self) -> SparseLatents:
        assert self._codes is not None  # there is one batch at least
        parts = self._codes.values[: self._n], self._codes.indices[: self._n]
        return SparseLatents(*parts, self._codes.streams, self._codes.n_latents)


def _retrieve_all(
    codes: Codes, n_latents: int, groups: Tensor | None, say: Callable[[str], object] | None
) -> dict[tuple[str, str], Retrieval]:
    pairs = list(permutations(codes, 2))
    seconds = sum(retrieval_seconds(codes[a], codes[b], n_latents) for a, b in pairs)
    if seconds > LONG:
        n = len(next(iter(codes.values()))[0])
        words = f"retrieval compares {n:,} codes with as many, {len(pairs)} times: about {seconds:,.0f} seconds"
        print(words, file=sys.stderr) if say is None else say(words)
    return {(a, b): retrieval_scores(codes[a], codes[b], n_latents, groups) for a, b in pairs}


Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """One number of an `Evaluation`: what it is called, means, and how it is written."""

    key: str
    name: str
    meaning: str
    better: Better
    format: str
    value: Callable[[Evaluation], float | None]


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def _mean_alive(values: Tensor | None, use: LatentUse) -> float | None:
    return None if values is None else float(values[use.alive_in_any].mean())


def _retrieval(field: str) -> Callable[[Evaluation], float]:
    return lambda e: _average([getattr(found, field) for found in e.retrieval.values()])


def _own(matrix: Tensor) -> float:
    return float(matrix.diagonal().mean())


def _cross(matrix: Tensor) -> float:
    return float(matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)].mean())


def _average(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("jaccard_single", "Concept alignment",
           "How alike the labels are that a latent fires for in two streams, each encoded alone (Jaccard, 0 to "
           "1, over all latents, a dead one counting 0).", "higher", ".3f", lambda e: _mean(e.jaccard_single)),
    Metric("jaccard_single_alive", "Concept alignment, alive latents",
           "The same over the latents that fire in at least one stream.",
           "higher", ".3f", lambda e: _mean_alive(e.jaccard_single, e.latents_single)),
    Metric("jaccard_chance", "Concept alignment by chance",
           "The same after each stream's samples are shuffled: what firing often earns without any meaning.",
           "neither", ".3f", lambda e: _mean(e.jaccard_chance)),
    Metric("jaccard_joint", "Concept alignment, encoded jointly",
           "The same with all streams encoded together: a shared support makes it high by construction, even "
           "untrained.", "neither", ".3f", lambda e: _mean(e.jaccard_joint)),
    Metric("jaccard_joint_alive", "Concept alignment, encoded jointly, alive latents",
           "The same over the latents that fire in at least one stream.",
           "neither", ".3f", lambda e: _mean_alive(e.jaccard_joint, e.latents_joint)),
    Metric("agreement", "Firing agreement",
           "Of the samples that fire a latent in either of two streams, the fraction that fire it in both, each "
           "encoded alone, over alive latents.", "higher", ".3f", lambda e: _mean_alive(e.agreement, e.latents_single)),
    Metric("r1", "Retrieval R@1",
           "How often a sample's code in one stream is nearest to its own code in another, over all pairs.",
           "higher", ".3f", _retrieval("r1")),
    Metric("r5", "Retrieval R@5", "How often it is among the 5 nearest.", "higher", ".3f", _retrieval("r5")),
    Metric("r10", "Retrieval R@10", "How often it is among the 10 nearest.", "higher", ".3f", _retrieval("r10")),
    Metric("median_rank", "Retrieval median rank",
           "The rank at which half of the samples are found; 1 is best.", "lower", ",.1f", _retrieval("median_rank")),
    Metric("mrr", "Retrieval MRR", "Mean of 1 / rank.", "higher", ".3f", _retrieval("mrr")),
    Metric("nmse_self", "Own error (NMSE)",
           "Squared error of rebuilding a stream from its own code, as a fraction of its squared norm.",
           "lower", ".3f", lambda e: _own(e.nmse)),
    Metric("nmse_cross", "Cross error (NMSE)",
           "The same, from the code of another stream.", "lower", ".3f", lambda e: _cross(e.nmse)),
    Metric("r2_self", "Own variance explained (R²)",
           "Fraction of a stream's variance that its own code explains; 0 is what the mean scores.",
           "higher", ".3f", lambda e: _own(e.r2)),
    Metric("r2_cross", "Cross variance explained (R²)",
           "The same, from the code of another stream.", "higher", ".3f", lambda e: _cross(e.r2)),
    Metric("alive", "Latents alive in all streams",
           "Fraction of latents that some sample fires in every stream, each encoded alone.",
           "higher", ".1%", lambda e: e.latents_single.n_alive / e.n_latents),
    Metric("mixed", "Latents alive in some streams only",
           "Fraction of latents that cannot mean the same in all streams, being silent in some.",
           "lower", ".1%", lambda e: e.latents_single.n_mixed / e.n_latents),
    Metric("dead", "Latents dead in all streams",
           "Fraction of latents that no sample fires in any stream.",
           "lower", ".1%", lambda e: e.latents_single.n_dead / e.n_latents),
    Metric("active", "Active latents per sample",
           "Mean number of latents with a value above 0 (L0), over the streams.",
           "neither", ".1f", lambda e: _average(e.latents_single.active_per_sample.values())),
)
# fmt: on

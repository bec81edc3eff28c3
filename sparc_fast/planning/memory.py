"""What a training run holds in memory, part by part: the sums of the tensors that its code makes.

A step's tensors come and go, so a part says in which phases of a run it is there; the peak is that of the largest
phase. Freed blocks below 32 MiB stay with the C library's allocator: on a CPU what finding the support takes, which is
such blocks, is there in every phase of a step. What a step on a CPU frees it lends again: all of it together takes
little more than what is there at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from sparc_fast.data import Reader, budget
from sparc_fast.distributed.layout import groups_of, piece_size, told_groups
from sparc_fast.objective import nested_sizes
from sparc_fast.ops import gpu_scratch
from sparc_fast.optim.step_graphs import KEPT as KEPT_GRAPHS
from sparc_fast.selection import BY_THRESHOLD, LOCAL
from sparc_fast.sizes import counted
from sparc_fast.training.config import Config

ACCURACY = 0.15
"""By which the peak may be off: the test suite holds it to that."""

CALIBRATING, CHOOSING, RECONSTRUCTING, UPDATING, VALIDATING, GOING_ON = PHASES = (
    "measuring the streams",
    "choosing the support",
    "reconstructing",
    "updating the weights",
    "validating",
    "going on from a checkpoint",
)
STEP = (CHOOSING, RECONSTRUCTING, UPDATING)
TRAINED = PHASES[1:]
"""Phases in which there are moments and masters."""

FLOAT, INDEX, LONG = 4, 4, 8  # bytes
UNLIKE = 4  # times k that the sample of most latents has, where they are not k for each
KEPT = 2**25  # bytes of a block below which it stays with the allocator: malloc's largest threshold
GPU_SCORES = 2**25  # bytes that fit a GPU's L2 cache


@dataclass(frozen=True)
class Part:
    """Some bytes of a run."""

    name: str
    bytes: int
    phases: tuple[str, ...] = PHASES
    """When they are there."""


@dataclass(frozen=True)
class Streams:
    """The data of a run, or what they will be."""

    readers: Mapping[str, Reader]
    n_rows: int | None
    """Rows that are trained on; None where that is not known."""

    @property
    def d_streams(self) -> dict[str, int]:
        return {name: reader.width for name, reader in self.readers.items()}


class Sizes:
    """The letters: S streams, N samples at a time, L latents, k active, D all widths, W the widest, P dictionaries; and
    bytes."""

    def __init__(self, config: Config, d_streams: Mapping[str, int], dead: float = 0.0, ranks: int = 1) -> None:
        self.widths = tuple(d_streams.values())
        self.S, self.D, self.W = S, D, _ = len(self.widths), sum(self.widths), max(self.widths)
        self.N, self.rows = config.micro_batch, config.batch_size  # `rows` of an optimizer step
        self.k_mean = k = max(config.k, config.k_start)
        k = min(k * UNLIKE, config.n_latents) if config.selection in BY_THRESHOLD else k
        q = config.private_k  # beside these, those of each stream's own, all in one support where there is one
        quotas = dict.fromkeys(config.private, q) if isinstance(q, int) else q
        self.slots = (max if config.selection in LOCAL else sum)([0, *quotas.values()])
        self.private = [(count, quotas[name], d_streams[name]) for name, count in config.private.items()]
        k += self.slots
        self.L, self.k, self.ranks = L, _, _ = -(-config.n_latents // ranks), k, ranks  # L of this rank's latents
        self.n_dead = round(dead * L) if config.auxk and config.auxk_coef else 0
        self.k_dead = min(config.auxk, self.n_dead)  # latents of AuxK's support
        self.widest_support = max(self.k, self.k_dead)
        self.supports = S if config.selection in LOCAL else 1  # of a sample
        # columns of streams that choose and are not neighbours, which are copied together
        self.apart = D - min(self.widths[1:-1]) if config.support_dropout and S > 2 else 0
        nested = nested_sizes(config.matryoshka, config.n_latents)
        self.P = max([1, *(len(told) for told in told_groups(nested, ranks))]) if nested else 1  # told of, by any rank
        # of a reconstruction, those of a rank and its share of all ranks'
        n_groups = [len(own) for own in groups_of(nested, ranks)] if nested else [1] * ranks
        self.parts = max(n_groups) + -(-sum(n_groups) // ranks)
        self.dictionaries = len(nested) or 1
        self.passes = 2 if self.n_dead else 1  # of a batch through the model: once more for AuxK
        self.entries = self.passes * self.N * self.supports * self.widest_support  # of a step, stacked
        # of the decoder, which nested dictionaries show every sample once for each
        self.decoded = self.P + self.passes - 1
        self.weight, moment = getattr(torch, config.dtype).itemsize, getattr(torch, config.moments).itemsize
        self.gradient = 2 if config.dtype == "bfloat16" else FLOAT  # of a number of the reconstructions' gradient
        self.has_thresholds = config.selection in ("jumprelu", "local_jumprelu")
        self.moment, biases = moment, D + S * L * (1 + self.has_thresholds)
        self.weights = 2 * L * D + biases  # how many there are
        matrices = 2 - ("encoder" in config.freeze) - ("decoder" in config.freeze)  # of frozen streams they are counted
        self.moments = 2 * (matrices * L * D * moment + biases * FLOAT)  # those of the biases are float32
        self.batch = -(-self.rows // ranks) * D * FLOAT  # as the loader gives it


def parts_of(
    config: Config,
    streams: Streams,
    *,
    threads: int,
    overhead: int,
    steps: int,
    on_gpu: bool = False,
    dead: float = 0.5,
    ranks: int = 1,
) -> list[Part]:
    """Every part of a run in the memory where it trains: the process's, or a GPU's.

    Args:
        overhead: bytes that are taken before there is a model.
        steps: of the whole run.
        dead: the part of the latents that is dead when AuxK works hardest.
        ranks: that share the latents; the parts are those of one.
    """
    sizes = Sizes(config, streams.d_streams, dead, ranks)
    taken = "CUDA's context and libraries" if on_gpu else "process: Python, torch, libraries"
    parts = [Part(taken, overhead), *_kept(config, sizes, steps)]
    if not on_gpu:
        parts.append(Part("loader: windows and orders of rows", loader_bytes(config, streams)))
        measuring = 5 * sizes.batch * config.calibrate
        parts.append(Part("measuring: one more batch, two in float64", measuring, (CALIBRATING,)))
    step = [*_batch(config, sizes), *(_gpu_scratch(sizes) if on_gpu else _cpu_scratch(config, sizes, threads))]
    parts += [*_inputs(config, sizes), *step]
    if on_gpu and _is_captured(config, sizes):
        parts += _captured(config, sizes, step)
    return [part for part in parts if part.bytes and part.phases]


def totals(parts: Iterable[Part]) -> dict[str, int]:
    """phase -> bytes."""
    parts = list(parts)
    return {phase: sum(part.bytes for part in parts if phase in part.phases) for phase in PHASES}


def loader_bytes(config: Config, streams: Streams) -> int:
    """Windows, orders and what reading takes; batches are counted with the step. All it may take, if N is unknown.

    Raises:
        ValueError: its memory is too small for these files.
    """
    if streams.n_rows is None:
        return config.memory
    readers, n_threads = streams.readers.values(), config.reading_threads or budget.default_threads()
    needs = budget.Needs.of(readers, config.batch_size, torch.float32, n_threads)
    plan = budget.make_plan(readers, needs, config.memory, config.seed, shuffle=True)
    held = 1 if plan.n_windows == 1 else 2
    scratch = n_threads * max(reader.scratch for reader in readers)
    return plan.window_rows * (held * needs.row + needs.order) + scratch


def host_bytes(config: Config, streams: Streams, overhead: int, ranks: int = 1) -> int:
    """Of the host beside a GPU: the process, the loader with three page-locked batches, a checkpoint's copies."""
    batches = 3 * Sizes(config, streams.d_streams, ranks=ranks).batch
    return overhead + loader_bytes(config, streams) + batches + mapped_bytes(config, streams.d_streams, ranks)


def mapped_bytes(config: Config, d_streams: Mapping[str, int], ranks: int = 1) -> int:
    """Of a checkpoint's file, while it is read: its pages are in memory, until somebody else needs it."""
    sizes = Sizes(config, d_streams, ranks=ranks)
    return sum(part.bytes for part in _kept(config, sizes, 0) if UPDATING in part.phases)


def _kept(config: Config, sizes: Sizes, steps: int) -> Iterator[Part]:
    """The model and what the optimizer keeps, and the copies of them that reading a checkpoint makes."""
    measured = LONG * sizes.L + FLOAT * (sizes.D + (sizes.D if config.whiten == "diag" else sizes.S))
    weights, widened = sizes.weights * sizes.weight, sizes.weight < FLOAT
    yield Part(f"weights, {config.dtype}", weights + measured)
    yield Part(f"Adam's moments, {config.moments}", sizes.moments, TRAINED)
    if widened:
        yield Part("float32 masters of the weights", FLOAT * sizes.weights, TRAINED)
    if config.lazy:
        yield Part("replay: last steps, settings of all steps", LONG * sizes.L + 64 * steps, TRAINED)
    if widened:  # sizes of a comparison, and of the choice that it makes between float32 numbers
        yield Part("masters held against a matrix of weights", (1 + 2 * FLOAT) * sizes.L * sizes.D, (GOING_ON,))


def _inputs(config: Config, sizes: Sizes) -> Iterator[Part]:
    """What a step is given, and validation."""
    N, D, w = sizes.N, sizes.D, sizes.weight
    validates = bool(config.validation_rows or config.validation_data)
    yield Part("batch", sizes.batch)
    if sizes.ranks > 1:
        yield Part("exchange: the next batch", sizes.batch, STEP)
        batches = 2 if config.accumulate == 1 else 3  # worked on, and coming: the next part, and that of the next batch
        yield Part("exchange: batches of all ranks, N D each", batches * N * D * w, (*STEP, VALIDATING))
    if config.calibrate or config.normalize != "none" or w < FLOAT:
        yield Part("batch as the model sees it", N * D * w // sizes.ranks, (*STEP, VALIDATING))
    yield Part("batch of held-out rows", N * D * FLOAT * validates, (VALIDATING,))


def _batch(config: Config, sizes: Sizes) -> Iterator[Part]:
    """What flows through a step, whatever computes it."""
    S, N, D, w, g = sizes.S, sizes.N, sizes.D, sizes.weight, sizes.gradient
    both, and_validating = (RECONSTRUCTING, UPDATING), (RECONSTRUCTING, UPDATING, VALIDATING)
    if sizes.ranks > 1:
        yield from _exchanged(config, sizes)
    if config.loss == "fvu":
        yield Part("deviations of a stream, in float64", 3 * LONG * N * sizes.W, (CHOOSING,))
    if config.accumulate > 1:
        gradients = FLOAT * (2 * sizes.L * D + S * sizes.L)
        yield Part("gradients of the weights, summed over micro-batches", gradients, STEP)
        yield Part("gradients of the weights by one micro-batch", gradients, (UPDATING,))
    stacked = INDEX * sizes.entries * (sizes.passes - 1)
    supports = INDEX * N * sizes.supports * (sizes.k + sizes.k_dead) + stacked
    yield Part("supports, and their inverse", supports + LONG * (sizes.entries + 2 * sizes.L), and_validating)
    narrow = w if w < FLOAT else 0
    yield Part("values, and their gradient", 2 * N * S * sizes.k * (FLOAT + narrow), and_validating)
    title = "gradient of the reconstructions: N S D" + " by dictionaries" * (sizes.P > 1)
    yield Part(title, sizes.P * N * S * D * g, and_validating)
    if sizes.has_thresholds:
        near = N * sizes.supports * sizes.k * (1 + 2 * FLOAT)
        of_streams = 2 * N * S * sizes.k * FLOAT
        yield Part("thresholds: who fires, and their gradient", near + of_streams, (RECONSTRUCTING, VALIDATING))
    if sizes.P > 1:
        of_decoder = sizes.entries // sizes.passes * sizes.decoded
        slots = of_decoder * (2 * INDEX + LONG) + sizes.decoded * N * S * sizes.widest_support * (w + FLOAT)
        yield Part("dictionaries: supports of their own latents, values, inverse", slots, (UPDATING,))
    if sizes.n_dead:
        yield Part("AuxK: weights of the dead latents", sizes.n_dead * (D + S) * w, (CHOOSING,))
        second = N * D * w + N * S * (D * g + 2 * sizes.k_dead * FLOAT)
        yield Part("AuxK: residual, and the second pass over it", second, (RECONSTRUCTING,))
        stacks = N * (2 * (D * w + 2 * S * sizes.widest_support * FLOAT) + sizes.decoded * S * D * g)
        yield Part("AuxK: both passes in one batch", stacks, both)


def _exchanged(config: Config, sizes: Sizes) -> Iterator[Part]:
    """What ranks send each other, or on one host write for each other: memory that they share is in each of them."""
    S, N, D, ranks = sizes.S, sizes.N, sizes.D, sizes.ranks
    candidates = (3 * ranks + 2) * N * sizes.supports * sizes.widest_support * (FLOAT + INDEX)
    if config.selection == "batch":  # a rank's own, and which of them fire
        candidates = 4 * N * 2 * -(-config.k // ranks) * (FLOAT + INDEX)
    if sizes.has_thresholds:
        candidates = 0
    yield Part("exchange: candidates of all ranks", candidates, (CHOOSING, VALIDATING))
    if sizes.dictionaries > 1:
        parts = N * S * D * (sizes.parts * FLOAT + sizes.dictionaries * -(-sizes.gradient // ranks))
        yield Part("exchange: parts of reconstructions, sent and received", parts, (RECONSTRUCTING, VALIDATING))
        return
    n = piece_size(N) * S * D  # numbers of a piece; three are coming, to be read and free again
    piece = FLOAT * n + 3 * FLOAT * (n + n * (ranks - 1) // ranks) + sizes.gradient * n // ranks
    yield Part("exchange: reconstructions in pieces, sent and received", piece, (RECONSTRUCTING, UPDATING, VALIDATING))


def _cpu_scratch(config: Config, sizes: Sizes, threads: int) -> Iterator[Part]:
    from sparc_fast import _cpu  # which need not be there, nor what imports it
    from sparc_fast.ops import cpu_topk

    S, N, L, D = sizes.S, sizes.N, sizes.L, sizes.D
    columns = D if sizes.supports == 1 else sizes.W
    topk = cpu_topk.scratch_bytes(N, columns, L, sizes.widest_support, sizes.weight < FLOAT)
    yield Part("support: scores, candidates", topk, (*STEP, VALIDATING))
    if config.dtype == "float16":
        yield Part("float16 weights widened to be read", FLOAT * L * D, (CHOOSING, RECONSTRUCTING, VALIDATING))
    kept = STEP if sizes.apart * L * sizes.weight < KEPT else (CHOOSING,)
    yield Part("columns of the streams that choose", (2 * L + N) * sizes.apart * sizes.weight, kept)
    sums = N * S * S * sizes.P * LONG + -(-N // _cpu.BLOCK_SAMPLES) * D * FLOAT
    yield Part("errors, and sums of the pre-bias's gradient", sums, (RECONSTRUCTING, VALIDATING))
    of_batch, of_gradient = sizes.passes * N, sizes.decoded * N * S
    rows = of_batch + of_gradient if sizes.P == 1 else max(of_batch, of_gradient)  # those of one matrix after the other
    strips = rows * -(-sizes.W // _cpu.STRIP_WIDTH) * _cpu.STRIP_WIDTH * FLOAT
    yield Part("update: batch and gradient in strips", strips, (UPDATING,))
    of_decoder = S if sizes.supports == 1 else 1
    terms = sizes.entries * (S + of_decoder) * (INDEX + FLOAT) + INDEX * (S + 1) * L
    yield Part("update: terms of the sums", terms, (UPDATING,))
    runs = threads * min(_cpu.RUN_BYTES, -(-L // (3 * threads)) * sizes.W * FLOAT)
    of_weights = 2 * L * D * FLOAT if config.accumulate > 1 else 0
    lent = sizes.passes * sizes.P * N * S * D * sizes.gradient + of_weights + strips + terms
    # what has no use for another's memory, a quarter of it about
    yield Part("freed, for the next step", min(_cpu.SPARE_MEMORY, lent // 4), STEP)
    yield Part("update: gradients of some rows", runs + 256 * D * FLOAT + 4 * S * L * FLOAT, (UPDATING,))


def _gpu_scratch(sizes: Sizes) -> Iterator[Part]:
    """What the Triton kernels' launchers allocate, from their code."""
    S, N, L, D = sizes.S, sizes.N, sizes.L, sizes.D
    yield Part("columns of the streams that choose", (2 * L + N) * sizes.apart * sizes.weight, (CHOOSING,))
    capacity = min(gpu_scratch.ROOM * sizes.widest_support + gpu_scratch.SPARE, L)
    rows = min(N, gpu_scratch.ROWS, max(1, gpu_scratch.CANDIDATES // (16 * capacity)))
    chunk = min(L, max(256, GPU_SCORES // (4 * rows)))
    topk = 4 * rows * chunk + 16 * rows * capacity + 2 * (rows + chunk) * D + (3 * FLOAT + FLOAT + LONG) * L
    yield Part("support: scores, candidates", topk, (CHOOSING, VALIDATING))
    sorted_entries = sizes.entries // sizes.passes * sizes.decoded if sizes.P > 1 else sizes.entries
    yield Part("supports being sorted", 24 * sorted_entries, (RECONSTRUCTING,))
    chunks = sum(-(-width // 128) for width in sizes.widths)
    yield Part("sums by chunks of columns", chunks * N * S * (sizes.P + sizes.k) * FLOAT, (RECONSTRUCTING, VALIDATING))
    terms = sizes.entries * (FLOAT * (S + (S if sizes.supports == 1 else 1)) + 2 * INDEX)
    yield Part("update: terms of the sums", terms, (UPDATING,))
    pieces = -(-sizes.entries // gpu_scratch.PIECE) * 2 * D * FLOAT
    yield Part("update: sums of long latents", pieces + 1024 * D * FLOAT + 4 * S * L * FLOAT, (UPDATING,))


def _is_captured(config: Config, sizes: Sizes) -> bool:
    """Whether `SparcAdam` captures steps of complete samples in CUDA graphs."""
    is_plain = config.selection in ("global", "local") and not (config.private or config.matryoshka or config.lazy)
    return is_plain and config.accumulate == 1 and sizes.ranks == 1


def _captured(config: Config, sizes: Sizes, step: Iterable[Part]) -> Iterator[Part]:
    """Beside what the graph that is replayed takes: samples of each, and what the others keep for themselves."""
    choices = 2**sizes.S - 1 if config.support_dropout else 1  # of streams that choose
    graphs = min(KEPT_GRAPHS, choices * (1 + bool(config.auxk and config.auxk_coef)))
    scratch = max(bytes for phase, bytes in totals(step).items() if phase in STEP)
    samples = graphs * sizes.N * sizes.D * sizes.weight
    yield Part(f"captured steps: samples of {counted(graphs, 'graph')}", samples, (*STEP, VALIDATING))
    yield Part("captured steps: scratch of those not replayed", (graphs - 1) * scratch, STEP)
    yield Part("captured steps: scratch of all", graphs * scratch, (VALIDATING,))

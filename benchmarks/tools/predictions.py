"""What a step takes on a Hopper GPU, predicted from the machine code: nothing here was measured.

A kernel's time is the longest of three: its instructions at 70 % of what the SMs issue, its bytes at the memory's rate,
its gathers at the L2 cache's. Instructions are those of its hot paths (`machine_code`) times how often warps take them.
Small operations of PyTorch are not in that, so the smallest shape says least; how many a step launches and how long the
host takes is counted apart (`step_launches`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch

from sparc_fast.ops.gpu_scratch import ROWS
from sparc_fast.planning.roofline import Cost, Roofline

from .. import cases
from ..cases import CALLS, Operands, Shape, namespace
from . import cuda_resources, step_launches, triton_resources
from .machine_code import Code, Needs, Way

ISSUED = 132 * 4 * 1.755e9 * 0.7
"""Instructions of warps a second: one a cycle in each quarter of an SM, of which 70 % is assumed to be reached."""
ROOFS = {
    "H100": Roofline(copy=3.0e12, float32=59e12, bfloat16=790e12, gather=9.7e12),
    "H200": Roofline(copy=4.3e12, float32=59e12, bfloat16=790e12, gather=9.7e12),
}
"""90 % of the memory's rate; what products of random numbers and gathers from an L2 cache reach."""
MARKED = 12
"""Rows a sample whose score is settled exactly, counted at shapes A and B on a CPU; where pre_bias is as long as what
is left of the samples without it, 16, and at its worst, where samples are centred, 44."""
KNOWN = 6
"""Of these, those that are in the support."""
PASSING, STAYING = 1.2, 1.2
"""Latents of a sample, for each of k, that pass in a step by tiles, and that stay candidates: simulated at A and B."""
LISTED = 3.6
"""Fours of scores of a sample one of which passes, for each of k ln(L / k): simulated at A, B, C and U."""
HELD = 8  # columns of a row that a lane has in 16 bytes
L2_BYTES, SMS = 50 * 2**20, 132
TILE_ROWS, TILE_LATENTS, TILE_COLUMNS = 128, 256, 64
WARPS, PART = 8, 16  # of a block by tiles; scores of a lane that are tested together
LINES = re.compile(r"(?<=<!-- predicted -->\n).*?(?=<!-- end -->)", re.DOTALL)
BASELINE = Path(__file__).resolve().parents[1] / "instructions.json"
TABLE = Path(__file__).resolve().parents[2] / "docs/gpu.md"


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, and how it is started at a shape."""

    code: Code
    registers: int
    shared: int
    threads: int
    programs: int
    constants: Mapping[str, Any]

    @property
    def warps(self) -> int:
        return self.programs * self.threads // 32

    @property
    def together(self) -> int:
        """Blocks that a multiprocessor has room for."""
        registers = 65536 // (math.ceil(self.registers / 8) * 8 * self.threads)
        return min(registers, 227 * 1024 // (self.shared + 1024), 2048 // self.threads, 32)


Count = Callable[[Shape, Compiled], float]


@dataclass(frozen=True)
class HotPath:
    """A way through a kernel that is taken again and again."""

    part: str
    """Of the step."""
    kernel: str
    unit: str
    """Of work."""
    needs: Callable[[Compiled], Needs]
    """What the way holds at least."""
    each: Callable[[Compiled], int]
    """Units a thread does on the way."""
    times: Count
    """How often a warp takes it."""
    is_loop: bool = True
    without: Callable[[Compiled], Needs] | None = None
    """A loop on the way that has a line of its own."""

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.unit}"

    def way(self, compiled: Compiled) -> Way:
        needs = self.needs(compiled)
        return compiled.code.loop(needs) if self.is_loop else compiled.code.whole(needs)

    def instructions(self, compiled: Compiled) -> float:
        """Of a warp, for a unit."""
        inner = 0 if self.without is None else len(compiled.code.loop(self.without(compiled)))
        return (len(self.way(compiled)) - inner) / self.each(compiled)


def rounds(mean: float, at_once: int) -> float:
    """How often a loop that does so many terms at once goes round, on average, for a Poisson number of terms."""
    chance, total = math.exp(-mean), 0.0
    for terms in range(1, int(mean + 12 * math.sqrt(mean) + 12)):
        chance *= mean / terms
        total += chance * math.ceil(terms / at_once)
    return total


def _entries(shape: Shape) -> float:
    """Of a latent, where all are used evenly."""
    return shape.N * shape.k / shape.L


def steps_by_tiles(shape: Shape) -> list[int]:
    """How far apart the latents are that each step takes in between; nothing where one product has all of them."""
    from sparc_fast.kernels.global_topk import chunk_length

    apart, chunk = 1, chunk_length(min(shape.N, ROWS), shape.L, L2_BYTES, SMS)
    while math.ceil(shape.L / apart) > chunk:
        apart *= 2
    return [2**i for i in reversed(range(apart.bit_length() - 1))]


def _tiles(shape: Shape, apart: int) -> int:
    return math.ceil(shape.N / TILE_ROWS) * math.ceil(shape.L / (2 * apart) / TILE_LATENTS)


def _warp_tiles(shape: Shape) -> float:
    return WARPS * sum(_tiles(shape, apart) for apart in steps_by_tiles(shape))


def fullest(mean: float, lanes: int = 32) -> float:
    """The mean of the largest of so many Poisson numbers."""
    chance, below, total = math.exp(-mean), 0.0, 0.0
    for number in range(1, int(mean + 12 * math.sqrt(mean) + 12)):
        below += chance
        total += 1 - below**lanes
        chance *= mean / number
    return total


def _looks(shape: Shape, _: Compiled) -> float:
    """Times a warp looks at what the quick test left over, one score a lane."""
    new = [(apart, shape.L / (2 * apart)) for apart in steps_by_tiles(shape)]
    return sum(
        _tiles(shape, apart) * WARPS * TILE_LATENTS / 32 * fullest(PART * PASSING * shape.k / latents)
        for apart, latents in new
    )


def _of_steps(shape: Shape) -> int:
    """Times the candidates are tightened."""
    steps = steps_by_tiles(shape)
    return len(steps) + 1 if steps else 0


def _gathered(shape: Shape, rows: float) -> float:
    """Times a warp reads 16 bytes a lane for so many rows of every sample."""
    return shape.N * rows * shape.D / HELD / 32


def _one(compiled: Compiled) -> int:
    return 1


def _constant(name: str) -> Callable[[Compiled], int]:
    return lambda compiled: int(compiled.constants[name])


def _scores(compiled: Compiled) -> int:
    return int(compiled.constants["COLUMNS"]) // compiled.threads


def _taken(compiled: Compiled) -> int:
    return int(compiled.constants["BLOCK"]) // compiled.threads


def _tiles_taken(shape: Shape, compiled: Compiled) -> float:
    """Times a sample's fours of scores are taken in, a last part of each chunk's besides."""
    from sparc_fast.kernels.global_topk import chunk_length

    fours = LISTED * shape.k * math.log(shape.L / shape.k)
    chunks = shape.L / chunk_length(min(shape.N, ROWS), shape.L, L2_BYTES, SMS)
    return shape.N * (4 * fours / compiled.constants["BLOCK"] + chunks / 2)


def _rows_of_sources(compiled: Compiled) -> int:
    return int(compiled.constants["ROWS"]) * int(compiled.constants["SOURCES"])


def _tile(rows: str) -> Callable[[Compiled], int]:
    """16 bytes of a thread in a tile of gathered rows."""
    return lambda c: int(c.constants[rows]) * int(c.constants["BLOCK_D"]) // HELD // c.threads


_settled, _valued, _decoded = _tile("R"), _tile("ROWS"), _tile("BLOCK_K")


def _of_decoder(compiled: Compiled) -> Needs:
    return {r"LDGSTS.*\.128": _decoded(compiled), "MMA": 1}


def _latent_blocks(shape: Shape, compiled: Compiled) -> float:
    """Warps that go through every latent's row in every stream."""
    return shape.L * shape.S * compiled.threads / 32


WIDE_LOADS = r"LDG.*\.128"
GATHER = r"LDG\.E\.EL\.128"
MOVED = {r"LDG\.E\.EF\.128": 6, r"STG\.E\.EF\.128": 6}

TRITON = (
    HotPath(
        "norms and biases", "_prepare", "16 bytes of W",
        lambda c: {WIDE_LOADS: _tile("ROWS")(c), "^FMNMX": HELD * _tile("ROWS")(c)}, _tile("ROWS"),
        lambda shape, c: shape.L * shape.D / HELD / 32 / _tile("ROWS")(c),
    ),
    HotPath(
        "filter", "_filter", "a score", lambda c: {WIDE_LOADS: 3 * _scores(c) // 4, "^STG": _scores(c) // 4}, _scores,
        lambda shape, c: shape.N * shape.L / 32 / _scores(c),
    ),
    HotPath(
        "filter", "_filter", "a score taken in", lambda c: {WIDE_LOADS: 3 * _taken(c) // 4, "^STG": 3 * _taken(c)},
        _taken, lambda shape, c: _tiles_taken(shape, c) * c.threads / 32,
    ),
    HotPath(
        "settle", "_settle", "16 bytes gathered", lambda c: {WIDE_LOADS: _settled(c)}, _settled,
        lambda shape, c: _gathered(shape, MARKED) / _settled(c),
    ),
    HotPath(
        "support_values", "_support_values_kernel", "16 bytes gathered", lambda c: {WIDE_LOADS: _valued(c)}, _valued,
        lambda shape, c: _gathered(shape, shape.k) / _valued(c),
    ),
    HotPath(
        "decode_loss", "_decode_loss_kernel", "16 bytes gathered", _of_decoder, _decoded,
        lambda shape, c: _gathered(shape, shape.k) / _decoded(c),
    ),
    HotPath(
        "decode_loss", "_decode_loss_kernel", "a warp's beginning and end", _of_decoder, _one,
        lambda shape, c: c.warps, is_loop=False, without=_of_decoder,
    ),
    HotPath(
        "update, encoder", "_update_encoder_kernel", "16 bytes gathered",
        lambda c: {GATHER: c.constants["ROWS"]}, _constant("ROWS"),
        lambda shape, c: _latent_blocks(shape, c) * rounds(_entries(shape), c.constants["ROWS"]),
    ),
    HotPath(
        "update, encoder", "_update_encoder_kernel", "8 weights", lambda c: MOVED, _one, _latent_blocks,
    ),
    HotPath(
        "update, decoder", "_update_decoder_kernel", "16 bytes gathered",
        lambda c: {GATHER: _rows_of_sources(c)}, _rows_of_sources,
        lambda shape, c: _latent_blocks(shape, c) * rounds(_entries(shape), c.constants["ROWS"]),
    ),
    HotPath(
        "update, decoder", "_update_decoder_kernel", "8 weights", lambda c: MOVED, _one,
        lambda shape, c: c.warps, is_loop=False,
    ),
)  # fmt: skip
"""The hot paths of the Triton kernels at streams that a program holds whole."""


def _rows_of_warps(shape: Shape, mean: float, at_once: int) -> float:
    """Times warps go round a gather loop: warps that have columns, and all of a block's threads do."""
    warps = sum(math.ceil(width / HELD / 32) for width in shape.d_streams)
    return shape.L * warps * rounds(mean, at_once)


def gathered_together(shape: Shape) -> bool:
    """Whether the CUDA backend sums values with the choice of a support."""
    from sparc_fast.kernels.gather import gathers_whole_rows

    return gathers_whole_rows(shape.L, shape.D, torch.bfloat16.itemsize)


IN_FLIGHT = 4
SUMMED = {WIDE_LOADS: IN_FLIGHT, "^FFMA": HELD * IN_FLIGHT}
SUMS = SUMMED | {"^SHFL": 6}  # of four rows' columns in one stream
KEPT = r"LDG\.E\.NA\.128"
PRODUCTS, PRODUCT_UNIT = {"HGMMA": 4, "SYNCS": 2}, "64 columns of a tile"
DIGITS = 2  # of four, until no more than k / 8 candidates too many reach a threshold
CUDA = (
    HotPath(
        "product", "screen_scores_kernel", PRODUCT_UNIT, lambda c: PRODUCTS, _one,
        lambda shape, c: _warp_tiles(shape) * shape.D / TILE_COLUMNS,
    ),
    HotPath(
        "product", "screen_scores_kernel", "a score",
        lambda c: {**PRODUCTS, "^FFMA": 128, r"FSETP\.GEU": 128}, lambda c: 128,
        lambda shape, c: _warp_tiles(shape), without=lambda c: PRODUCTS,
    ),
    HotPath(
        "product", "screen_scores_kernel", "32 scores looked at",
        lambda c: {"POPC": 1, "BREV": 1, "^LDS": 1, "^STS": 1}, _one, _looks,
    ),
    HotPath(
        "product", "screen_scores_kernel", "32 latents taken in", lambda c: {"ATOMG": 1, "STG": 3}, _one,
        lambda shape, c: shape.N * PASSING * shape.k / 32 * len(steps_by_tiles(shape)),
    ),
    HotPath(
        "filter", "tighten_kernel", "a digit of a sample", lambda c: {"ATOMS": 1, "BAR": 3}, _one,
        lambda shape, c: shape.N * DIGITS * _of_steps(shape), without=lambda c: {"ATOMS": 1},
    ),
    HotPath(
        "filter", "tighten_kernel", "a digit of 32 candidates", lambda c: {"ATOMS": 1}, _one,
        lambda shape, c: shape.N * DIGITS * _of_steps(shape) * (PASSING + STAYING) * shape.k / 32,
    ),
    HotPath(
        "filter", "tighten_kernel", "32 candidates kept", lambda c: {"STG": 3, "BAR": 1, "LDG": 3}, _one,
        lambda shape, c: shape.N * _of_steps(shape) * (PASSING + STAYING) * shape.k / 32,
    ),
    HotPath(
        "filter", "filter_scores_kernel", "a score", lambda c: {r"LDG\.E\.EF\.128": 4}, lambda c: 16,
        lambda shape, c: shape.N * shape.L / 2 ** len(steps_by_tiles(shape)) / 32 / 16,
    ),
    HotPath(
        "settle", "settle_supports_kernel", "16 bytes gathered", lambda c: SUMMED, lambda c: IN_FLIGHT,
        lambda shape, c: _gathered(shape, MARKED) / IN_FLIGHT,
    ),
    HotPath(
        "settle", "settle_supports_kernel", "a row's product in a stream", lambda c: SUMS, lambda c: IN_FLIGHT,
        lambda shape, c: shape.N * MARKED * shape.S / IN_FLIGHT, without=lambda c: SUMMED,
    ),
    HotPath(
        "support_values", "support_values_kernel", "16 bytes gathered", lambda c: SUMMED, lambda c: IN_FLIGHT,
        lambda shape, c: _gathered(shape, shape.k - KNOWN) / IN_FLIGHT,
    ),
    HotPath(
        "support_values", "support_values_kernel", "a row's product in a stream", lambda c: SUMS, lambda c: IN_FLIGHT,
        lambda shape, c: shape.N * (shape.k - KNOWN) * shape.S / IN_FLIGHT, without=lambda c: SUMMED,
    ),
    HotPath(
        "update, encoder", "update_rows_kernel", "16 bytes gathered, encoder",
        lambda c: {KEPT: IN_FLIGHT, "^FFMA": HELD * IN_FLIGHT, "^FADD": HELD * IN_FLIGHT}, lambda c: IN_FLIGHT,
        lambda shape, c: _rows_of_warps(shape, _entries(shape), IN_FLIGHT),
    ),
    HotPath(
        "update, encoder", "update_rows_kernel", "32 terms looked up, encoder",
        lambda c: {"VOTE": 1, "STS": 1, r"LDG\.E\.64": 1}, _one,
        lambda shape, c: _rows_of_warps(shape, _entries(shape), 32),
    ),
    HotPath(
        "update, encoder", "update_rows_kernel", "8 weights, encoder",
        lambda c: {**MOVED, r"STG\.E\.EF\.128": 7}, _one, _latent_blocks,
    ),
    HotPath(
        "update, decoder", "update_rows_kernel", "16 bytes gathered, decoder",
        lambda c: {KEPT: IN_FLIGHT, "^FFMA": HELD * IN_FLIGHT}, lambda c: IN_FLIGHT,
        lambda shape, c: _rows_of_warps(shape, _entries(shape) * shape.S, IN_FLIGHT),
    ),
    HotPath(
        "update, decoder", "update_rows_kernel", "32 terms looked up, decoder",
        lambda c: {"VOTE": 1, "STS": 1, r"LDG\.E\.64": 1}, _one,
        lambda shape, c: _rows_of_warps(shape, _entries(shape) * shape.S, 32),
    ),
    HotPath(
        "update, decoder", "update_rows_kernel", "8 weights, decoder",
        lambda c: {**MOVED, r"STG\.E\.EF\.128": 7, "BAR": 2}, _one, _latent_blocks,
    ),
)  # fmt: skip
"""Those of the CUDA kernels; what is not here they leave to Triton's."""
STAGED = tuple(
    HotPath(
        f"{half}, staged", "update_rows_kernel, staged", f"8 weights, {half}",
        lambda c, barriers=barriers: {"SYNCS": 1, "MUFU": 2 * HELD, r"STG\.E\.EF\.128": 7, "BAR": barriers},
        _one, _latent_blocks,
    )
    for half, barriers in (("encoder", 0), ("decoder", 2))
)  # fmt: skip
"""Where a plan has rows brought by bulk copies: in no time yet, as no device has said what that hides."""


def compiled_triton(shape: Shape) -> dict[str, Compiled]:
    """Every kernel of a step that has a hot path, for sm_90 and weights and inputs in bfloat16."""
    operators = triton_resources.operators()
    with triton_resources.noting() as seen:
        o = Operands(shape, torch.bfloat16, torch.device("cpu"))
        for name in ("global_topk", "support_values", "decode_loss", "update_rows"):
            CALLS[name](namespace(**operators), o)()
    found = {}
    for launch, programs in seen.items():
        if launch.name not in {path.kernel for path in TRITON}:
            continue
        made = launch.compiled(90)
        registers, _ = triton_resources.resource_usage(made.asm["cubin"])
        code = Code(triton_resources.disassembled(made.asm["cubin"]))
        threads = 32 * dict(launch.options).get("num_warps", 4)
        constants = dict(launch.constants)
        found[launch.name] = Compiled(code, registers, made.metadata.shared, threads, programs, constants)
    return found


def compiled_cuda(machine_code: Sequence[tuple[cuda_resources.CudaResources, str]]) -> dict[str, Compiled]:
    """The same for sm_90a, of `cuda_resources.machine_code`; their code is one for all shapes."""
    # types, bytes of shared memory, threads of a block
    started = {
        "screen_scores_kernel": ("BFloat16", 222 * 1024, 384),
        "tighten_kernel": ("", 8 * 1024 + 512, 32),
        "filter_scores_kernel": ("", 8 * 1024 + 512, 128),
        "settle_supports_kernel": ("BFloat16", 8 * 1024 + 512 + 2560 * 4 + 1024, 128),
        "support_values_kernel": ("BFloat16", 2560 * 4, 128),
        "update_rows_kernel": ("BFloat16 BFloat16 whole", 2048, 128),
        "update_rows_kernel, staged": ("BFloat16 BFloat16 whole staged", 2048 + 2 * 3 * 1024 * 4, 128),
    }
    return {
        name: Compiled(Code(assembly), r.registers, shared, threads, 0, {})
        for name, (types, shared, threads) in started.items()
        for r, assembly in machine_code
        if (r.arch, r.kernel, r.types) == ("90a", name.partition(",")[0], types)
    }


def _touched(shape: Shape, rows: float) -> float:
    """Bytes of W of which so many rows of every sample are read."""
    return (1 - math.exp(-shape.N * rows / shape.L)) * shape.L * shape.D * 2


def costs(shape: Shape) -> dict[str, Cost]:
    """What every part of a step cannot do without: weights and inputs in bfloat16, masters and moments in float32."""
    N, L, D, S, k = shape.N, shape.L, shape.D, shape.S, shape.k
    row, used = 2.0 * N * D, _touched(shape, k)
    moved = 26.0 * L * D  # a weight and its moments read and written, and its copy written
    parts = 4.0 * N * S * k * D / 512  # of grad_values, by chunks of columns
    return {
        "norms and biases": Cost(bytes=2.0 * L * D + 2 * row),
        "product": Cost(2.0 * N * L * D, 2.0 * L * D + row, "bfloat16"),
        "filter": Cost(),
        "settle": Cost(bytes=_touched(shape, MARKED) + row, gathered=row * MARKED),
        "support_values": Cost(bytes=used + row, gathered=row * k),
        "decode_loss": Cost(bytes=used + row * (1 + S), gathered=row * k),
        "sums of decode_loss": Cost(bytes=row * S + parts),
        "invert_indices": Cost(bytes=12.0 * N * k + 8 * L),
        "update, encoder": Cost(bytes=moved + row, gathered=row * k),
        "update, decoder": Cost(bytes=moved + row * S, gathered=row * k * S),
    }


@dataclass(frozen=True)
class Counted:
    """A path at a shape."""

    path: HotPath
    kernel: Compiled
    seconds: float
    """To issue its instructions."""


def counted(shape: Shape, paths: Sequence[HotPath], kernels: Mapping[str, Compiled]) -> list[Counted]:
    result = []
    for path in paths:
        kernel = kernels[path.kernel]
        instructions = path.instructions(kernel) * path.each(kernel) * path.times(shape, kernel)
        result.append(Counted(path, kernel, instructions / ISSUED))
    return result


def product_by_tiles(shape: Shape) -> Cost:
    """The last round of a step keeps few multiprocessors busy; every tile reads its operands from the L2 cache."""
    steps, whole = steps_by_tiles(shape), costs(shape)["product"]
    if not steps:
        return whole
    first = math.ceil(shape.N / TILE_ROWS) * math.ceil(shape.L / 2 ** len(steps) / TILE_LATENTS) / SMS
    rounds_of_tiles = first + sum(math.ceil(_tiles(shape, apart) / SMS) for apart in steps)
    flops = 2.0 * TILE_ROWS * TILE_LATENTS * shape.D * SMS * rounds_of_tiles
    read = _warp_tiles(shape) / WARPS * (TILE_ROWS + TILE_LATENTS) * shape.D * 2
    return Cost(flops, whole.bytes, whole.dtype, read)


def seconds(shape: Shape, counts: Sequence[Counted], roof: Roofline) -> dict[str, float]:
    """Of each part of a step."""
    work = costs(shape)
    if any(c.path.part == "product" for c in counts):
        work["product"] = product_by_tiles(shape)
    if any(c.path.kernel == "support_values_kernel" for c in counts):  # of what the choice has not summed
        touched = _touched(shape, shape.k + MARKED - KNOWN) - _touched(shape, MARKED)
        work["support_values"] = Cost(bytes=touched, gathered=2.0 * shape.N * shape.D * (shape.k - KNOWN))
    return {
        part: max(sum(c.seconds for c in counts if c.path.part == part), roof.floor([cost]))
        for part, cost in work.items()
    }


def instructions(paths: Sequence[HotPath], kernels: Mapping[str, Compiled]) -> dict[str, float]:
    """By name of the path, of a warp for a unit of work."""
    return {path.name: round(path.instructions(kernels[path.kernel]), 2) for path in paths}


def compilers() -> dict[str, str]:
    """Other versions make other code."""
    return {"triton": version("triton"), "nvcc": cuda_resources.version()}


def shape_lines(shape: Shape, triton: Sequence[Counted], cuda: Sequence[Counted]) -> Iterator[str]:
    """A Markdown table of every part's milliseconds."""
    yield f"| {shape.name}: N {shape.N}, L {shape.L}, k {shape.k}; ms | Triton | CUDA | floor H100 | floor H200 |"
    yield "|---|---|---|---|---|"
    columns = [seconds(shape, triton, ROOFS["H200"]), seconds(shape, cuda, ROOFS["H200"])]
    columns += [{part: roof.floor([cost]) for part, cost in costs(shape).items()} for roof in ROOFS.values()]
    for part in columns[0]:
        yield f"| {part} | " + " | ".join(f"{column[part] * 1e3:.3g}" for column in columns) + " |"
    parts = "norms and biases", "product", "filter", "settle"
    selected = [sum(column[part] for part in parts) for column in columns]
    bare = columns[-1]["product"]  # what cuBLAS takes
    yield "| encoder and TopK ÷ cuBLAS's product | " + " | ".join(f"{time / bare:.3g}" for time in selected) + " |"
    shown = sum(c.seconds for c in cuda if c.path.part == "product" and c.path.unit != PRODUCT_UNIT)
    yield f"| the same, if no test hid behind other warps' products | | {(selected[1] + shown) / bare:.3g} | | |"
    yield "| **together, on an H200** | " + " | ".join(f"{sum(c.values()) * 1e3:.3g}" for c in columns) + " |"
    others = [sum(seconds(shape, c, ROOFS["H100"]).values()) for c in (triton, cuda)]
    yield "| **together, on an H100** | " + " | ".join(f"{t * 1e3:.3g}" for t in others) + " | | |"


def path_lines(found: Sequence[Counted]) -> Iterator[str]:
    heads = "path of a kernel, for a unit of work", "instructions of a warp", "accesses on the way, bytes of a thread"
    yield "| " + " | ".join((*heads, "tensor cores", "blocks an SM")) + " |"
    yield "|---|---|---|---|---|"
    for c in found:
        way = c.path.way(c.kernel)
        accesses = ", ".join(f"{many} {name}" for name, many in sorted(way.accesses.items()))
        yield (
            f"| {c.path.name} | {c.path.instructions(c.kernel):.3g} | {accesses} | {way.tensor_cores or '–'} "
            f"| {c.kernel.together} |"
        )


def step_counts(emulated: ModuleType) -> dict[str, float]:
    """What may not rise besides, of a captured step."""
    counts = {}
    for backend, cuda in (("Triton", None), ("CUDA", emulated)):
        host, graph = step_launches.count(captured=True, cuda=cuda)
        counts[f"a captured step by {backend}, launches"] = host.kernels + 1
        counts[f"a captured step by {backend}, kernels in its graph"] = graph.kernels
    return counts


def step_lines(emulated: ModuleType) -> Iterator[str]:
    yield "| a step | launches of the host | kernels it runs, in a graph | the host's µs |"
    yield "|---|---|---|---|"
    for backend, cuda in (("Triton", None), ("CUDA", emulated)):
        eager, _ = step_launches.count(captured=False, cuda=cuda)
        host, graph = step_launches.count(captured=True, cuda=cuda)
        of_eager = f"{eager.kernels} | {eager.kernels} | {eager.microseconds:.0f}, without the launches"
        yield f"| {backend}, one call at a time | {of_eager} |"
        kernels = f"{host.kernels + graph.kernels}, {graph.kernels} of them"
        yield f"| {backend}, captured | {host.kernels + 1} | {kernels} | {host.microseconds:.0f} |"


def merged(triton: Sequence[Counted], cuda: Sequence[Counted]) -> list[Counted]:
    """The CUDA backend's: its own kernels, and Triton's for the other parts."""
    own = {c.path.part for c in cuda}
    return [*(c for c in triton if c.path.part not in own), *cuda]


def main(write: bool) -> str:
    """The tables; with `write` also into docs/gpu.md and benchmarks/instructions.json."""
    own = compiled_cuda(
        cuda_resources.machine_code([90], ["global_topk", "screen_scores", "support_values", "update_rows"])
    )
    with TemporaryDirectory() as folder:
        emulated = step_launches.emulated(Path(folder))
        of_steps, launched = step_counts(emulated), list(step_lines(emulated))
    lines, baseline = [], {}
    for shape in (cases.SHAPES[name] for name in "ABCU"):
        triton = compiled_triton(shape)
        of_triton, of_cuda = counted(shape, TRITON, triton), counted(shape, CUDA, own)
        if shape is cases.A:
            baseline = instructions(TRITON, triton) | instructions((*CUDA, *STAGED), own)
            baseline |= of_steps
            lines += [*path_lines([*of_triton, *of_cuda, *counted(shape, STAGED, own)]), ""]
        if not gathered_together(shape):
            of_cuda = [c for c in of_cuda if c.path.kernel != "support_values_kernel"]
        lines += [*shape_lines(shape, of_triton, merged(of_triton, of_cuda)), ""]
    text = "\n".join([*lines, *launched])
    if write:
        TABLE.write_text(LINES.sub(lambda _: f"\n{text}\n", TABLE.read_text(encoding="utf-8")), encoding="utf-8")
        held = {"compilers": compilers(), "instructions": baseline}
        BASELINE.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    return text

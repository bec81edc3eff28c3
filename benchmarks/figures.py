"""The figures this project set itself, and how each is read off a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .cases import ROWS, STEP, WIDE


@dataclass(frozen=True)
class Line:
    """One contender at one shape: what the table prints and JSON keeps."""

    op: str
    shape: str
    contender: str
    role: str
    """"ours", "baseline", or "yardstick": one that does less than the others."""
    seconds: list[float]
    median: float
    spread: float
    """Distance of the quartiles over the median."""
    ratio: float | None
    """How many times the time of ours, the first backend."""
    flops: float
    bytes: float
    of_roof: float
    """The floor of this work at the roofs of this run, over the median."""
    bytes_beyond: int | None = None
    """Peak memory beyond weights, moments and inputs."""


@dataclass(frozen=True)
class Figure:
    what: str
    must: str
    aim: str
    read: Callable[[Line], float | None]
    """The figure, if this line holds it."""
    unit: str = "×"


def _over_ours(op: str, shape: str, contender: str) -> Callable[[Line], float | None]:
    return lambda line: line.ratio if (line.op, line.shape, line.contender) == (op, shape, contender) else None


def _ours_over(op: str, shape: str, yardstick: str) -> Callable[[Line], float | None]:
    read = _over_ours(op, shape, yardstick)
    return lambda line: 1 / ratio if (ratio := read(line)) else None


def _megabytes(line: Line) -> float | None:
    return line.bytes_beyond / 1e6 if line.bytes_beyond is not None and line.shape == WIDE.name else None


def _figures() -> Iterator[Figure]:
    musts = {
        "Dense": (("≥ 9", "≥ 14"), ("≥ 14", "≥ 25")),
        "Lean": (("≥ 5.5", "–"), ("≥ 4", "–")),
        "Tuned": (("–", "–"), ("–", "–")),
    }
    for at, shape in enumerate(STEP):
        for rival, must in musts.items():
            read = _over_ours("step", shape.name, rival)
            yield Figure(f"whole step, N {shape.N}, L {shape.L}: {rival} ÷ ours", *must[at], read)
    for shape in STEP:
        read = _ours_over("step", shape.name, "x @ W_enc.T")
        yield Figure(f"whole step ÷ bare float32 encoder GEMM, N {shape.N}, L {shape.L}", "≤ 1.9", "< 1.0", read)
    for shape in ROWS:
        read = _over_ours("topk_rows", shape.name, "torch.topk")
        yield Figure(f"torch.topk ÷ our TopK, rows of {shape.L}", "≥ 5", "≥ 6", read)
    for shape in STEP:
        read = _over_ours("sparse_decode", shape.name, "S bags, no bias")
        yield Figure(f"S = 3 embedding_bags ÷ one gather, N {shape.N}, L {shape.L}", "≥ 2.5", "≥ 3", read)
    yield Figure(f"peak memory beyond weights, moments, inputs, {WIDE.name}", "≤ 256", "≤ 64", _megabytes, " MB")
    read = _over_ours("sae", "S1-N384-L8192", "EagerSAE")
    yield Figure("S = 1, forward + backward: EagerSAE ÷ ours", "≥ 1.5", "≥ 2", read)


def reached(lines: Iterable[Line]) -> Sequence[tuple[Figure, str, float]]:
    """(figure, whose, value) for every figure that these lines hold."""
    lines = list(lines)
    found = []
    for figure in _figures():
        for line in lines:
            if (value := figure.read(line)) is not None and not (line.op == "memory" and line.role != "ours"):
                found.append((figure, line.contender, value))
    return found

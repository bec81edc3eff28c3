"""The figures set for the GPU, read off the rows of a run, and the tables that are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .gpu_record import Row
from .gpu_steps import MEMORY
from .gpu_timing import Roofs, Work

Read = Callable[[Sequence[Row]], float | None]
CUDA = "cuda"
"""The contender with the CUDA C++ kernels, beside Triton's, which are "ours"."""


@dataclass(frozen=True)
class Figure:
    what: str
    must: float | None
    aim: float | None
    read: Read
    unit: str = "×"
    least: bool = True
    """Whether the figure must be at least `must`; else at most."""

    def held(self, value: float, wanted: float | None) -> bool:
        return wanted is None or (value >= wanted if self.least else value <= wanted)


def value(rows: Sequence[Row], what: str, shape: str, contender: str = "ours", dtype: str = "bfloat16") -> float | None:
    """Of the one row that is so named, if it was measured."""
    named = (what, shape, contender, dtype)
    return next(
        (r.value for r in rows if (r.what, r.shape, r.contender, r.dtype) == named and r.value is not None), None
    )


def best(rows: Sequence[Row], what: str, shape: str, contender: str, dtype: str) -> float | None:
    """The fastest whose name begins so: the best of PyTorch is the rival."""
    found = [
        r.value
        for r in rows
        if (r.what, r.shape, r.dtype) == (what, shape, dtype)
        and r.contender.startswith(contender)
        and r.value is not None
    ]
    return min(found, default=None)


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _rival_over_ours(shape: str, rival: str, dtype: str, ours: str) -> Read:
    return lambda rows: over(best(rows, "step", shape, rival, dtype), value(rows, "step", shape, "ours", ours))


def _milliseconds(shape: str) -> Read:
    return lambda rows: over(value(rows, "step", shape), 1e-3)


def _figures() -> list[Figure]:
    figures = [
        Figure(
            f"encoder + TopK ÷ bare cuBLAS product, {shape}", 1.25, 1.1,
            lambda rows, shape=shape: over(
                value(rows, "global_topk", shape), value(rows, "global_topk", shape, "x @ W_enc.T")
            ),
            least=False,
        )
        for shape in ("A", "B")
    ]  # fmt: skip
    figures += [
        Figure(
            f"encoder + TopK in CUDA C++ ÷ bare cuBLAS product, {shape}", None, None,
            lambda rows, shape=shape: over(
                value(rows, "global_topk", shape, CUDA), value(rows, "global_topk", shape, "x @ W_enc.T")
            ),
        )
        for shape in ("A", "B")
    ]  # fmt: skip
    figures += [
        Figure(
            f"torch.topk ÷ our TopK, float32 rows {what}", 4, 6,
            lambda rows, shape=shape: over(
                best(rows, "topk_rows", shape, "torch.topk", "float32"),
                value(rows, "topk_rows", shape, "ours", "float32"),
            ),
        )
        for shape, what in (("A", "4096 × 32768"), ("B", "4096 × 131072"))
    ]  # fmt: skip
    figures += [
        Figure(f"whole step, bfloat16, {shape}", must, aim, _milliseconds(shape), " ms", least=False)
        for shape, must, aim in (("U", None, None), ("A", 4.5, 3.4), ("B", 15, 11.5), ("C", 170, 130))
    ]
    figures += [
        Figure(
            f"Lean bfloat16 ÷ ours bfloat16, {shape}",
            must,
            aim,
            _rival_over_ours(shape, "Lean", "bfloat16", "bfloat16"),
        )
        for shape, must, aim in (("U", None, None), ("A", 4, 6), ("B", 5, 7))
    ]
    figures += [
        Figure(
            f"Lean float32 ÷ ours float32, {shape}", None, None, _rival_over_ours(shape, "Lean", "float32", "float32")
        )
        for shape in ("U", "A")
    ]
    figures += [
        Figure(f"Dense {dtype} ÷ ours {ours}, {shape}", must, aim, _rival_over_ours(shape, "Dense", dtype, ours))
        for shape, dtype, ours, must, aim in (
            ("U", "float32", "bfloat16", 5, 9),
            ("U", "float32", "float32", None, None),
            ("U", "bfloat16", "bfloat16", None, None),
            ("A", "float32", "float32", None, None),
            ("A", "bfloat16", "bfloat16", None, None),
        )
    ]
    figures.append(
        Figure(
            "extra memory of a step, A", 400, 150, lambda rows: over(value(rows, MEMORY, "A"), 1e6), " MB", least=False
        )
    )
    figures += [
        Figure(
            f"20 steps twice, bitwise equal, {dtype}", 1, None,
            lambda rows, dtype=dtype: value(rows, "20 steps twice, bitwise equal", "U", "ours", dtype), "",
        )
        for dtype in ("bfloat16", "float32")
    ]  # fmt: skip
    figures.append(
        Figure("a step in a CUDA graph equals eager, bitwise", 1, None,
               lambda rows: value(rows, "graph equals eager, bitwise", "U"), "")
    )  # fmt: skip
    figures += [
        Figure(f"{what} finds nothing wrong", 1, None, lambda rows, what=what: value(rows, what, "", "", ""), "")
        for what in ("operator tests on the device", "compute-sanitizer memcheck", "compute-sanitizer racecheck")
    ]
    return figures


FIGURES = _figures()


@dataclass(frozen=True)
class Reached:
    """A figure of a run, as the table and the JSON hold it."""

    what: str
    must: str
    aim: str
    measured: str
    held: str
    """"yes", "aim" where the aim is held too, "NO", "–" where nothing was asked, "not measured"."""


def reached(rows: Sequence[Row]) -> list[Reached]:
    return [_reached(figure, figure.read(rows)) for figure in FIGURES]


def _reached(figure: Figure, value: float | None) -> Reached:
    def asked(wanted: float | None) -> str:
        if wanted is None:
            return "–"
        return "yes" if not figure.unit else f"{'≥' if figure.least else '≤'} {wanted:g}{figure.unit}"

    names = figure.what, asked(figure.must), asked(figure.aim)
    if value is None:
        return Reached(*names, "–", "not measured")
    measured = f"{value:.3g}{figure.unit}" if figure.unit else ("yes" if value == 1 else "no")
    if figure.must is None:
        return Reached(*names, measured, "–")
    if not figure.held(value, figure.must):
        return Reached(*names, measured, "NO")
    return Reached(*names, measured, "aim" if figure.aim is not None and figure.held(value, figure.aim) else "yes")


def figures_table(found: Sequence[Reached]) -> str:
    heading = Reached("figure", "must", "aim", "measured", "held")
    return "\n".join(
        f"{line.what:58} {line.must:>10} {line.aim:>10} {line.measured:>12} {line.held:>13}"
        for line in (heading, *found)
    )


def faster_in_cuda(rows: Sequence[Row]) -> str:
    """Which operators the CUDA kernels do faster than Triton's, and where: a line each, for `FASTER_IN_CUDA`."""
    lines = []
    for row in rows:
        triton = value(rows, row.what, row.shape, "ours", row.dtype)
        if row.contender == CUDA and row.value is not None and triton is not None and row.value < triton:
            times = f"{row.value * 1e3:.3f} ms, Triton {triton * 1e3:.3f} ms"
            lines.append(f"faster in CUDA C++: {row.what}, {row.shape}, {row.dtype}: {times}")
    return "\n".join(lines) or "faster in CUDA C++ than in Triton: nothing that was measured"


def rows_table(rows: Iterable[Row], roofs: Roofs | None) -> str:
    """A line a row: times with the ratio to ours and the share of the floor; other values; what went wrong."""
    rows = list(rows)
    ours = {(r.what, r.shape, r.dtype): r.value for r in rows if r.contender == "ours" and r.unit == "s" and r.value}
    return "\n".join(
        _line(row, ours.get((row.what, row.shape, row.dtype)), roofs) for row in rows if row.what != "roof"
    )


def _line(row: Row, ours: float | None, roofs: Roofs | None) -> str:
    start = f"{row.what:32} {row.shape:5} {row.contender:34} {row.dtype:9}"
    if row.value is None:
        return f"{start} {row.error}"
    if row.unit != "s":
        shown = {"B": f"{row.value / 1e6:10.1f} MB", "held": "       yes" if row.value == 1 else "        NO"}
        return f"{start} {shown.get(row.unit, f'{row.value:.4g} {row.unit}')} {row.note} {row.error}".rstrip()
    times = f"{row.value * 1e3:10.3f} ms " + (f"{row.value / ours:7.2f}×" if ours else " " * 8)
    floor = floor_of(row, roofs)
    share = (
        f" floor {floor * 1e3:9.3f} ms {floor / row.value:5.0%}" if floor and row.contender in ("ours", "cuda") else ""
    )
    return f"{start} {times}{share} {row.note}".rstrip()


def floor_of(row: Row, roofs: Roofs | None) -> float | None:
    """Seconds below which a row's phases, one after another, cannot come on this device."""
    if roofs is None or not row.work:
        return None
    return sum(roofs.floor(Work(**phase), row.dtype) for phase in row.work)

"""The figures set for the GPU, read off the rows of a run, and the tables that are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sparc_fast.ops.backends import Backend

from .gpu_checks import SMALL
from .gpu_record import Row
from .gpu_steps import MEMORY
from .timing import DeviceRoofs, Work

Read = Callable[[Sequence[Row]], float | None]
OURS = ("triton", "cuda", "hybrid", "graph")
"""Our contenders: the fastest of them that was measured is what a user can have."""


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


def value(
    rows: Sequence[Row], what: str, shape: str, contender: str | tuple[str, ...] = OURS, dtype: str = "bfloat16"
) -> float | None:
    """The least of the rows that are so named; of rivals whose names begin alike the best counts."""
    found = [
        r.value
        for r in rows
        if (r.what, r.shape, r.dtype) == (what, shape, dtype)
        and r.value is not None
        and r.contender.startswith(contender)
    ]
    return min(found, default=None)


def beside(rows: Sequence[Row], what: str, shape: str, a: tuple[str, str], b: tuple[str, str]) -> float | None:
    """a / b, each (contender, type), from a phase that measured both in turns; `b` "" is ours."""
    for phase in dict.fromkeys(row.phase for row in rows):
        own = [row for row in rows if row.phase == phase]
        found = over(value(own, what, shape, *a), value(own, what, shape, b[0] or OURS, b[1]))
        if found is not None:
            return found
    return None


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _rival_over_ours(shape: str, rival: str, dtype: str, ours: str) -> Read:
    return lambda rows: beside(rows, "step", shape, (rival, dtype), ("", ours))


def _milliseconds(shape: str, role: str | tuple[str, ...] = OURS) -> Read:
    return lambda rows: over(value(rows, "step", shape, role), 1e-3)


def _figures() -> list[Figure]:
    figures = [
        Figure(
            f"encoder + TopK, {backend} ÷ bare cuBLAS product, {shape}", 1.25, 1.1,
            lambda rows, shape=shape, backend=backend: over(
                1.0, beside(rows, "global_topk", shape, ("x @ W_enc.T", "bfloat16"), (backend, "bfloat16"))
            ),
            least=False,
        )
        for shape in ("A", "B")
        for backend in ("triton", "cuda")
    ]  # fmt: skip
    figures += [
        Figure(
            f"torch.topk ÷ our TopK, {backend}, float32 rows {what}", 4, 6,
            lambda rows, shape=shape, backend=backend: beside(
                rows, "topk_rows", shape, ("torch.topk", "float32"), (backend, "float32")
            ),
        )
        for shape, what in (("A", "4096 × 32768"), ("B", "4096 × 131072"))
        for backend in ("triton", "cuda")
    ]  # fmt: skip
    figures += [
        Figure(f"whole step, bfloat16, {shape}, {role}", None, None, _milliseconds(shape, role), " ms")
        for shape in ("A", "B")
        for role in OURS
        if (shape, role) != ("B", "graph")
    ]
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
            lambda rows, dtype=dtype: value(rows, "20 steps twice, bitwise equal", "U", OURS, dtype), "",
        )
        for dtype in ("bfloat16", "float32")
    ]  # fmt: skip
    figures.append(
        Figure("a step in a CUDA graph equals eager, bitwise", 1, None,
               lambda rows: value(rows, "graph equals eager, bitwise", "U"), "")
    )  # fmt: skip
    figures += [
        Figure(f"{SMALL}, {backend}", 1, None,
               lambda rows, backend=backend: value(rows, SMALL, "", backend, ""), "")
        for backend in ("triton", "cuda")
    ]  # fmt: skip
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


FOR_CUDA = frozenset(name for name in vars(Backend) if not name.startswith("_"))
"""What `FASTER_IN_CUDA` may name: the vocabulary of the backends."""
CLEARLY = 0.98
"""Of the other's time: what is less faster than that is not worth a choice."""


def faster_in_cuda(rows: Sequence[Row]) -> dict[str, str]:
    """Operator -> where, and both times: those the CUDA kernels do faster than Triton's wherever both were measured."""
    both: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        triton = value(rows, row.what, row.shape, "triton", row.dtype)
        if row.contender == "cuda" and row.unit == "s" and row.value and triton and row.what in FOR_CUDA:
            where = f"{row.shape} {row.dtype}: {row.value * 1e3:.3f} ms, Triton {triton * 1e3:.3f}"
            both.setdefault(row.what, []).append((row.value, triton, where))
    return {
        operator: "; ".join(where for _, _, where in times)
        for operator, times in both.items()
        if all(cuda < CLEARLY * triton for cuda, triton, _ in times)
    }


def launch_choices(rows: Sequence[Row]) -> dict[str, str]:
    """ "file.function" of a launch choice -> what the sweep found for it at each shape."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.what == "launch choice" and row.value is not None:
            found.setdefault(row.contender, []).append(f"{row.shape} {row.dtype}: {row.note}")
    return {name: "; ".join(notes) for name, notes in found.items()}


def to_paste(rows: Sequence[Row], gpu: str, commit: str | None) -> str:
    """What the run justifies, as it belongs into the sources: entries of a table, and each launch choice's comment."""
    lines = ["# sparc_fast/ops/backends.py", "FASTER_IN_CUDA: dict[str, str] = {"]
    lines += [f'    "{operator}": "{gpu}, {where}",' for operator, where in faster_in_cuda(rows).items()]
    lines.append("}")
    for name, note in launch_choices(rows).items():
        file, function = name.split(".")
        lines += [f"# kernels/{file}.py, {function}:", f"    # measured on {gpu} at {commit or 'no commit'}: {note}"]
    return "\n".join(lines)


def rows_table(rows: Iterable[Row], roofs: DeviceRoofs | None) -> str:
    """A line a row: times with the ratio to ours and the share of the floor; other values; what went wrong."""
    rows = list(rows)
    ours = {
        (r.phase, r.what, r.shape, r.dtype): r.value for r in rows if r.contender in OURS and r.unit == "s" and r.value
    }
    return "\n".join(_line(row, ours.get((row.phase, row.what, row.shape, row.dtype)), roofs) for row in rows)


def _line(row: Row, ours: float | None, roofs: DeviceRoofs | None) -> str:
    start = f"{row.what:32} {row.shape:5} {row.contender:34} {row.dtype:9}"
    if row.value is None:
        return f"{start} {row.error}"
    if row.unit != "s":
        shown = {"B": f"{row.value / 1e6:10.1f} MB", "held": "       yes" if row.value == 1 else "        NO"}
        return f"{start} {shown.get(row.unit, f'{row.value:.4g} {row.unit}')} {row.note} {row.error}".rstrip()
    times = f"{row.value * 1e3:10.3f} ms " + (f"{row.value / ours:7.2f}×" if ours else " " * 8)
    floor = floor_of(row, roofs)
    share = f" floor {floor * 1e3:9.3f} ms {floor / row.value:5.0%}" if floor and row.contender in OURS else ""
    return f"{start} {times}{share} {row.note}".rstrip()


def floor_of(row: Row, roofs: DeviceRoofs | None) -> float | None:
    """Seconds below which a row's phases, one after another, cannot come on this device."""
    if roofs is None or not row.work:
        return None
    return sum(roofs.floor(Work(**phase), row.dtype) for phase in row.work)

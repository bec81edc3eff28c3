"""The figures this project set itself, how each is read off the rows of a run, and what a run justifies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sparc_fast.ops.backends import Backend

from .cases import ROWS, STEP, WIDE
from .record import Row
from .timing import ratio

Found = Iterable[tuple[str, float]]
"""Whose, and what."""
OURS = None
"""Stands for whatever of ours was measured."""
SMALL = "every operator at small shapes"
TESTS = "operator tests on the device"
SANITIZER = "compute-sanitizer"
REPEATED = "20 steps twice, bitwise equal"
GRAPH = "graph equals eager, bitwise"
GROWTH = "growth, busy core"
ROLES = ("triton", "cuda", "hybrid", "graph")
"""Ours on a GPU, each in phases of its own: the fastest is what a user can have."""


@dataclass(frozen=True)
class Figure:
    what: str
    read: Callable[[Sequence[Row]], Found]
    must: float | None = None
    aim: float | None = None
    unit: str = "×"
    least: bool = True
    """Whether the figure must be at least `must`; else at most."""

    def held(self, value: float, wanted: float) -> bool:
        return value >= wanted if self.least else value <= wanted


@dataclass(frozen=True)
class Reached:
    """A figure of a run, as the table and the JSON hold it."""

    what: str
    must: str
    aim: str
    reached: str
    held: str
    """"yes", "aim" where the aim is held too, "NO", "–" where nothing was asked, "not measured"."""
    whose: str = ""


def named(rows: Iterable[Row], what: str, shape: str, contender: str | None, dtype: str) -> list[Row]:
    """The rows of this name that hold a value, the least first: ours, or of contenders whose names begin so."""
    found = [
        row for row in rows
        if (row.what, row.shape, row.dtype) == (what, shape, dtype) and row.value is not None
        and (row.role == "ours" if contender is OURS else row.contender.startswith(contender))
    ]  # fmt: skip
    return sorted(found, key=lambda row: row.value or 0.0)


def over(a: Row, b: Row) -> float:
    """How many times b's time fits into a's: round by round, if both have taken turns."""
    if len(a.seconds) == len(b.seconds) > 0:
        return ratio(a.seconds, b.seconds)
    return (a.value or 0.0) / (b.value or 1.0)


def _ratio(
    what: str, shape: str, a: str | None, b: str | None = OURS, types: tuple[str, str] = ("float32", "float32")
) -> Callable[[Sequence[Row]], Found]:
    """a ÷ b, from the first phase that measured both in turns."""

    def read(rows: Sequence[Row]) -> Found:
        for phase in dict.fromkeys(row.phase for row in rows):
            own = [row for row in rows if row.phase == phase]
            ones, others = named(own, what, shape, a, types[0]), named(own, what, shape, b, types[1])
            if ones and others:
                return [(ones[0].contender, over(ones[0], others[0]))]
        return []

    return read


def _value(
    what: str, shape: str = "", contender: str | None = OURS, dtype: str = "", unit: float = 1.0, every: bool = False
) -> Callable[[Sequence[Row]], Found]:
    """The least of what was measured, or each of them."""

    def read(rows: Sequence[Row]) -> Found:
        found = named(rows, what, shape, contender, dtype)
        return [(row.contender, (row.value or 0.0) / unit) for row in (found if every else found[:1])]

    return read


def _on_cpu() -> Iterator[Figure]:
    musts = {"Dense": ((9, 14), (14, 25)), "Lean": ((5.5, None), (4, None)), "Tuned": ((None, None),) * 2}
    for at, shape in enumerate(STEP):
        for rival, must in musts.items():
            read = _ratio("step", shape.name, rival)
            yield Figure(f"whole step, N {shape.N}, L {shape.L}: {rival} ÷ ours", read, *must[at])
    for shape in STEP:
        read = _ratio("step", shape.name, OURS, "x @ W_enc.T")
        name = f"whole step ÷ bare float32 encoder GEMM, N {shape.N}, L {shape.L}"
        yield Figure(name, read, 1.9, 1, least=False)
    for shape in ROWS:
        yield Figure(f"torch.topk ÷ our TopK, rows of {shape.L}", _ratio("topk_rows", shape.name, "torch.topk"), 5, 6)
    for shape in STEP:
        read = _ratio("sparse_decode", shape.name, "S bags, no bias")
        yield Figure(f"S = 3 embedding_bags ÷ one gather, N {shape.N}, L {shape.L}", read, 2.5, 3)
    read = _value("memory", WIDE.name, dtype="float32", unit=1e6, every=True)
    yield Figure(f"peak memory beyond weights, moments, inputs, {WIDE.name}", read, 256, 64, " MB", least=False)
    read = _value(GROWTH, STEP[0].name, dtype="float32")
    yield Figure("growth of a step beside a busy core ÷ that of a product", read, 1.2, 1, least=False)
    yield Figure("S = 1, forward + backward: EagerSAE ÷ ours", _ratio("sae", "S1-N384-L8192", "EagerSAE"), 1.5, 2)


def _on_gpu() -> Iterator[Figure]:
    narrow = ("bfloat16", "bfloat16")
    for shape in "AB":
        for own in ("triton", "cuda"):
            name = f"encoder + TopK, {own} ÷ bare cuBLAS product, {shape}"
            read = _ratio("global_topk", shape, own, "x @ W_enc.T", narrow)
            yield Figure(name, read, 1.25, 1.1, least=False)
    for shape, size in (("A", "4096 × 32768"), ("B", "4096 × 131072")):
        for own in ("triton", "cuda"):
            read = _ratio("topk_rows", shape, "torch.topk", own)
            yield Figure(f"torch.topk ÷ our TopK, {own}, float32 rows {size}", read, 4, 6)
    for shape in "AB":
        for own in ROLES[: 4 if shape == "A" else 3]:
            read = _value("step", shape, own, "bfloat16", 1e-3)
            yield Figure(f"whole step, bfloat16, {shape}, {own}", read, unit=" ms")
    for shape, must, aim in (("U", None, None), ("A", 4.5, 3.4), ("B", 15, 11.5), ("C", 170, 130)):
        read = _value("step", shape, OURS, "bfloat16", 1e-3)
        yield Figure(f"whole step, bfloat16, {shape}", read, must, aim, " ms", least=False)
    for rival, its, ours, shape, must, aim in (
        ("Lean", "bfloat16", "bfloat16", "U", None, None),
        ("Lean", "bfloat16", "bfloat16", "A", 4, 6),
        ("Lean", "bfloat16", "bfloat16", "B", 5, 7),
        ("Lean", "float32", "float32", "U", None, None),
        ("Lean", "float32", "float32", "A", None, None),
        ("Dense", "float32", "bfloat16", "U", 5, 9),
        ("Dense", "float32", "float32", "U", None, None),
        ("Dense", "bfloat16", "bfloat16", "U", None, None),
        ("Dense", "float32", "float32", "A", None, None),
        ("Dense", "bfloat16", "bfloat16", "A", None, None),
    ):
        yield Figure(
            f"{rival} {its} ÷ ours {ours}, {shape}", _ratio("step", shape, rival, OURS, (its, ours)), must, aim
        )
    read = _value("memory", "A", OURS, "bfloat16", 1e6)
    yield Figure("extra memory of a step, A", read, 400, 150, " MB", least=False)
    for dtype in ("bfloat16", "float32"):
        yield Figure(f"{REPEATED}, {dtype}", _value(REPEATED, "U", OURS, dtype), 1, unit="")
    yield Figure("a step in a CUDA graph equals eager, bitwise", _value(GRAPH, "U", OURS, "bfloat16"), 1, unit="")
    for own in ("triton", "cuda"):
        yield Figure(f"{SMALL}, {own}", _value(SMALL, contender=own), 1, unit="")
    for what in (TESTS, f"{SANITIZER} memcheck", f"{SANITIZER} racecheck"):
        yield Figure(f"{what} finds nothing wrong", _value(what, contender=""), 1, unit="")


ON_CPU, ON_GPU = tuple(_on_cpu()), tuple(_on_gpu())


def reached(rows: Sequence[Row], figures: Iterable[Figure]) -> list[Reached]:
    """A line for every value of a figure, or for a figure that was not measured."""
    found = ((figure, list(figure.read(rows)) or [("", None)]) for figure in figures)
    return [_reached(figure, whose, value) for figure, values in found for whose, value in values]


def _reached(figure: Figure, whose: str, value: float | None) -> Reached:
    def asked(wanted: float | None) -> str:
        if wanted is None:
            return "–"
        return f"{'≥' if figure.least else '≤'} {wanted:g}{figure.unit}" if figure.unit else "yes"

    names = figure.what, asked(figure.must), asked(figure.aim)
    if value is None:
        return Reached(*names, "–", "not measured")
    shown = f"{value:.2f}{figure.unit}" if figure.unit else ("yes" if value == 1 else "no")
    if figure.must is None:
        return Reached(*names, shown, "–", whose)
    if not figure.held(value, figure.must):
        return Reached(*names, shown, "NO", whose)
    has_aim = figure.aim is not None and figure.held(value, figure.aim)
    return Reached(*names, shown, "aim" if has_aim else "yes", whose)


FOR_CUDA = frozenset(name for name in vars(Backend) if not name.startswith("_"))
"""What `FASTER_IN_CUDA` may name: the vocabulary of the backends."""
CLEARLY = 0.98
"""Of the other's time: what is less faster than that is not worth a choice."""


def faster_in_cuda(rows: Sequence[Row]) -> dict[str, str]:
    """Operator -> where, and both times: those the CUDA kernels do faster than Triton's wherever both were measured."""
    both: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        triton = named(rows, row.what, row.shape, "triton", row.dtype)
        if row.contender == "cuda" and row.unit == "s" and row.value and triton and row.what in FOR_CUDA:
            other = triton[0].value or 0.0
            where = f"{row.shape} {row.dtype}: {row.value * 1e3:.3f} ms, Triton {other * 1e3:.3f}"
            both.setdefault(row.what, []).append((row.value, other, where))
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

"""The tables that are printed: a line a row, and a line a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparc_fast.planning.roofline import Roofline

from .figures import Reached, over
from .record import Row
from .timing import spread


def rows_table(rows: Sequence[Row], roofs: Roofline | None) -> str:
    """Times with the ratio to ours, rates and the share of the roof; other values; what went wrong."""
    ours = ours_of(rows)
    return "\n".join(_line(row, ours.get(case_of(row)), roofs) for row in rows)


def ours_of(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """Case -> the first of ours."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.role == "ours" and row.seconds:
            found.setdefault(case_of(row), row)
    return found


def case_of(row: Row) -> tuple[str, ...]:
    """Rows of one case were measured in turns."""
    return row.phase, row.what, row.shape, row.dtype


def _line(row: Row, ours: Row | None, roofs: Roofline | None) -> str:
    """float32 where no type is named."""
    start = f"{row.what:16} {row.shape:15} {row.contender:26} "
    if row.value is None:
        measured = row.error
    elif row.unit != "s":
        shown = {"B": f"{row.value / 1e6:10.1f} MB", "held": "       yes" if row.value == 1 else "        NO"}
        measured = f"{shown.get(row.unit, f'{row.value:10.4g} {row.unit}')} {row.note} {row.error}".rstrip()
    else:
        measured = f"{row.value * 1e3:10.3f} ms "
        if row.seconds:
            measured += f"±{spread(row.seconds):4.0%} " + (f"{over(row, ours):7.2f}× " if ours else " " * 9)
        if row.work and row.role != "yardstick":  # which does not do this work
            moved, flops = (sum(getattr(phase, of) for phase in row.work) for of in ("bytes", "flops"))
            measured += f"{moved / row.value / 1e9:7.1f} GB/s {flops / row.value / 1e9:7.1f} GFLOP/s"
            measured += f" {roofs.floor(row.work) / row.value:5.0%} of roof" if roofs else ""
        measured += f" {row.note}" if row.note else ""
    return start + measured + (f"  {row.dtype}" if row.dtype not in ("", "float32") else "")


def figures_table(found: Iterable[Reached], goals: bool = True) -> str:
    """With `goals` what this project asks of each figure stands beside it."""
    heading = Reached("figure", "must", "aim", "reached", "held")
    lines = []
    for line in (heading, *found):
        asked, held = (f"{line.must:>9} {line.aim:>9} ", f" {line.held:>12}") if goals else ("", "")
        lines.append(f"{line.what:64} {asked}{line.reached:>12}{held} {line.whose}".rstrip())
    return "\n".join(lines)

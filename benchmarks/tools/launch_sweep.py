"""Finds each kernel's launch choice on the device.

``python -m benchmarks.tools.launch_sweep [--operator NAME] [--shape A]``.

A launch choice is plain data from a plain function of the kernel's file. From what it returns now, one number is
changed at a time to a neighbour (twice, half; one stage more or less); what is right, and at least 2 % faster, is where
the search goes on. The table says what to write into the function; nothing is changed by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from time import monotonic
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparc_fast.ops import backends

from ..cases import CALLS, SHAPES, A, B, Operands, Place, Shape, Trained, U
from ..operators import disagreement
from ..processes import joined
from ..record import Record, first_line
from ..timing import Run

Choice = dict[str, Any]
ORDER = (
    "update_rows",
    "decode_loss",
    "global_topk",
    "support_values",
    "topk_rows",
    "weight_gradients",
    "sparse_decode",
)
"""What a step spends most time in comes first."""
FASTER = 0.98


def modules() -> list[ModuleType]:
    package = importlib.import_module("sparc_fast.kernels")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"sparc_fast.kernels.{name}") for name in names]


def choice_functions() -> dict[str, Callable[..., Choice]]:
    """ "file.function" -> every plain function of a kernel's file that says it returns a launch choice."""
    found = {}
    for module in modules():
        for name, function in vars(module).items():
            own = getattr(function, "__module__", None) == module.__name__
            if own and callable(function) and inspect.isfunction(inspect.unwrap(function)):
                returns = str(inspect.signature(function).return_annotation)
                if returns.startswith("dict[str, "):
                    found[f"{module.__name__.rpartition('.')[2]}.{name}"] = function
    return found


@contextlib.contextmanager
def changed(function: Callable[..., Choice], change: Mapping[str, Any]) -> Iterator[list[Choice]]:
    """Inside, the function's callers get its data with these entries; yields what they got, in turn."""
    given: list[Choice] = []

    @functools.wraps(function)
    def other(*args: Any, **named: Any) -> Choice:
        data = function(*args, **named)
        given.append({**data, **{name: value for name, value in change.items() if name in data}})
        return dict(given[-1])

    places = [(module, name) for module in modules() for name, value in vars(module).items() if value is function]
    for module, name in places:
        setattr(module, name, other)
    try:
        yield given
    finally:
        for module, name in places:
            setattr(module, name, function)


def neighbours(data: Mapping[str, Any]) -> Iterator[Choice]:
    """The data with one number changed."""
    for name, value in data.items():
        if isinstance(value, bool):
            options: tuple[Any, ...] = (not value,)
        elif not isinstance(value, int):
            continue
        elif name == "num_stages":
            options = (value + 1, value - 1)
        else:
            options = (value * 2, value // 2)
        limit = 16 if name == "num_warps" else 2**31
        yield from ({**data, name: option} for option in options if isinstance(option, bool) or 1 <= option <= limit)


def results(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Trained):
        return result.moved()
    return (result,) if isinstance(result, Tensor) else tuple(result)


class Search:
    """Of one choice function, through one operator at one shape."""

    def __init__(self, record: Record, o: Operands, operator: str) -> None:
        self.record, self.clock, self.o, self.operator = record, record.clock, o, operator
        self.ours = backends.resolve(record.place.backend, record.place.device)
        self.few = o.first(64)
        self.want = results(self.fresh(self.few)())
        self.run = self.fresh(o)

    def fresh(self, o: Operands) -> Run:
        return CALLS[self.operator](self.ours, o)

    def used(self) -> dict[str, Choice]:
        """The choice functions that this operator calls once or alike, and what they return."""
        found = {}
        for name, function in choice_functions().items():
            with changed(function, {}) as given:
                self.fresh(self.few)()
            if given and all(data == given[0] for data in given):
                found[name] = given[0]
        return found

    def seconds(self, function: Callable[..., Choice], data: Choice) -> float | None:
        """Of the operator with this choice; None where it does not run, or is wrong."""
        with changed(function, data):
            try:
                if disagreement(results(self.fresh(self.few)()), self.want, 1e-2):
                    return None
                self.run()
                hidden = 2 * self.clock.host_seconds(self.run) + 5e-5
                return median(self.clock.seconds(self.run, hidden=hidden) for _ in range(7))
            except Exception as error:
                print(f"  {self.operator}: {data}: {first_line(error, 100)}")
                return None

    def climb(self, name: str, data: Choice) -> None:
        """Records the best data found from `data` on, and what it was tried against."""
        function, start = choice_functions()[name], dict(data)
        first = fastest = self.seconds(function, data)
        if first is None or fastest is None:
            self.record.add("launch choice", self.o.shape.name, name, error="does not run as it stands")
            return
        tried = {str(sorted(data.items()))}
        better = True
        while better:
            better = False
            for other in list(neighbours(data)):
                if str(sorted(other.items())) in tried or self.record.left() < 3:
                    continue
                tried.add(str(sorted(other.items())))
                took = self.seconds(function, other)
                if took is not None and took < FASTER * fastest:
                    fastest, data, better = took, other, True
                    break
        moved = ", ".join(f"{key} {start[key]} -> {value}" for key, value in data.items() if value != start[key])
        note = f"{len(tried)} tried; {moved or 'stays'}; {first * 1e3:.3f} -> {fastest * 1e3:.3f} ms"
        self.record.add("launch choice", self.o.shape.name, name, str(self.o.dtype)[6:], value=fastest, note=note)


def sweep(record: Record, shapes: Sequence[Shape] = (A, U, B), operators: Sequence[str] = ORDER) -> None:
    """A row for each choice function at each shape, for as long as there is time."""
    if record.place.backend != "triton":
        record.add("launch choice", error=f"the backend {record.place.backend!r} has none")
        return
    for shape in shapes:
        for operator in operators:
            if not record.has_time(8, "launch choice", shape.name, operator):
                continue
            dtype = torch.float32 if operator == "topk_rows" else torch.bfloat16
            with record.guard("launch choice", shape.name, operator):
                search = Search(record, Operands(shape, dtype, record.place.device), operator)
                for name, data in search.used().items():
                    search.climb(name, data)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.launch_sweep", description=__doc__)
    parser.add_argument("--operator", action="append", choices=CALLS, help="only this one (those of a step)")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this one (A, U, B)")
    parser.add_argument("--seconds", type=float, default=540.0, help="to search (%(default)g)")
    arguments = parser.parse_args(argv)
    status = joined("tools.launch_sweep", argv)
    if status is not None:
        return status
    if not torch.cuda.is_available():
        print("benchmarks.tools.launch_sweep needs a CUDA device, and PyTorch finds none here")
        return 2
    place = Place(torch.device("cuda"), {"triton": "triton"})
    record = Record("sweep", place, until=monotonic() + arguments.seconds)
    shapes = [SHAPES[name] for name in arguments.shape or ("A", "U", "B")]
    sweep(record, shapes, arguments.operator or ORDER)
    for row in record.rows:
        print(f"{row.shape:4} {row.contender:32} {row.note or row.error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where in a model a picture is still a grid of positions, and where each is centred: found by watching it run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparc_fast.extract.encoders import ModelEncoder, patch_size

__all__ = ["Grid", "grid_of", "hooks", "rows_of"]

CONVOLUTIONS = {F.conv2d, torch.conv2d}
POOLS = {F.max_pool2d, torch.max_pool2d, F.avg_pool2d}


@dataclass(eq=False)
class _Call:
    """A module's call while a model runs, with the calls inside it."""

    module: nn.Module
    number: int  # of the module's calls
    inside: list[_Call] = field(default_factory=list)
    features: Tensor | None = None
    """What it gave, where that is tokens [n, T, D] or maps, [n, D, h, w] or [n, h, w, D]."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The last features of a picture that have positions, on the way to its row.

    Tokens [n, prefix + h w, D], the first `prefix` being no positions; or maps [n, D, h, w], of `is_last` [n, h, w, D].
    """

    encoder: ModelEncoder
    call: _Call
    height: int
    width: int
    prefix: int
    is_map: bool
    is_last: bool
    shape: torch.Size
    """Of one picture's features."""
    window: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Left, top, right and bottom of what the positions cover, in parts of what the model is given."""

    def run(self, inputs: Tensor, change: Callable[[Tensor], Tensor] = lambda features: features) -> Tensor:
        """The encoder's rows where the features are what `change` makes of them."""
        with hooks() as add:
            calls = 0

            def swap(_m: nn.Module, _i: Any, out: Any) -> Any:
                nonlocal calls
                calls += 1
                return _with(out, change(_features(out))) if calls == self.call.number else None  # type: ignore[arg-type]

            add(self.call.module.register_forward_hook(swap))
            return rows_of(self.encoder, inputs)

    def run_keeping(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Rows, and all features of this form that they came from, the last of them last."""
        kept: list[Tensor] = []
        with hooks() as add:

            def keep(_m: nn.Module, _i: Any, out: Any) -> None:
                features = _features(out)
                is_of_it = features is not None and features.requires_grad and len(features) == len(inputs)
                if features is not None and is_of_it and features.shape[1:] == self.shape:
                    kept.append(features)

            for module in self.encoder.model.modules():
                add(module.register_forward_hook(keep))
            return rows_of(self.encoder, inputs), kept

    def positions(self, features: Tensor) -> Tensor:
        """[n, h w, D] of features; prefix tokens are left out."""
        if not self.is_map:
            return features[:, self.prefix :]
        return features.flatten(1, 2) if self.is_last else features.flatten(2).mT

    def alone(self, features: Tensor) -> Tensor:
        """[n h w, ...]: every position as the features of a picture of which there is nothing else."""
        each = self.positions(features).flatten(0, 1)
        if self.is_map:
            return each[:, None, None, :] if self.is_last else each[:, :, None, None]
        return each[:, None, :].expand(-1, self.prefix + 1, -1)  # whichever token is pooled, it is this one


class _Geometry(TorchFunctionMode):
    """Where positions of maps are centred in the input: here convolutions, pools and padding are followed to them.

    Along each axis, maps of one size are centred alike, as they are where branches of a network are added up; the first
    way to a size is kept. Position i lies at pixel ``step · i + first`` of the input.
    """

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self._known: list[dict[int, tuple[float, float]]] = [{int(size): (1.0, 0.0)} for size in inputs.shape[-2:]]
        self._sizes = inputs.shape[-2:]

    def window(self, height: int, width: int) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of what maps of a size cover, in parts of the input; None if it is unknown."""
        ends = []
        for axis, count in enumerate((height, width)):
            if count not in self._known[axis]:
                return None
            step, first = self._known[axis][count]
            start = (first + 0.5 - step / 2) / self._sizes[axis]
            ends.append((start, start + step * count / self._sizes[axis]))
        (top, bottom), (left, right) = ends
        return left, top, right, bottom

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in CONVOLUTIONS:
            self._convolution(result, *args, **kwargs)
        elif func in POOLS and isinstance(result, Tensor):
            self._pool(result, *args, **kwargs)
        elif func is F.pad and result.ndim == 4:
            self._pad(result, *args, **kwargs)
        return result

    def _convolution(
        self, result: Tensor, given: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        if padding != "same":  # which leaves all where it is
            kernel = [d * (k - 1) + 1 for d, k in zip(_two(dilation), weight.shape[2:], strict=True)]
            self._step(given, result, kernel, _two(stride), _two(0 if padding == "valid" else padding))

    def _pool(
        self, result: Tensor, given: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *_: Any, **__: Any
    ) -> None:
        self._step(given, result, _two(kernel_size), _two(stride or kernel_size), _two(padding))

    def _step(
        self, given: Tensor, result: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> None:
        for axis, known in enumerate(self._known):
            before, after = int(given.shape[axis - 2]), int(result.shape[axis - 2])
            if before in known and after not in known:
                step, first = known[before]
                known[after] = step * stride[axis], first + step * ((kernel[axis] - 1) / 2 - padding[axis])

    def _pad(self, result: Tensor, given: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> None:
        for axis, known in enumerate(self._known):
            before, after = int(given.shape[axis - 2]), int(result.shape[axis - 2])
            if before in known and after != before:  # it was larger once, perhaps, and is not again
                step, first = known[before]
                known[after] = step, first - step * pad[2 * (1 - axis)]


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


@contextmanager
def hooks() -> Iterator[Callable[[Any], None]]:
    """Hooks of modules, removed at the end."""
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def grid_of(encoder: ModelEncoder, inputs: Tensor) -> Grid:
    """Where the pictures in `inputs` are a grid.

    Raises:
        ValueError: it is nowhere found.
    """
    with _Geometry(inputs) as geometry:
        calls = _watch(encoder, inputs[:1])
    for call in _candidates(calls):
        grid = _as_grid(encoder, call, inputs, geometry)
        if grid is not None and _leads_to_rows(grid, inputs[:1]):
            return grid
    raise ValueError(
        f"{encoder.stream.model} must keep positions of the picture to be looked into: no tokens or maps were found "
        f"that lead to its rows"
    )


@torch.no_grad()
def _watch(encoder: ModelEncoder, inputs: Tensor) -> list[_Call]:
    """The outermost calls, in order."""
    outermost: list[_Call] = []
    stack: list[_Call] = []
    counts: dict[nn.Module, int] = {}

    def before(module: nn.Module, _: Any) -> None:
        counts[module] = counts.get(module, 0) + 1
        call = _Call(module, counts[module])
        (stack[-1].inside if stack else outermost).append(call)
        stack.append(call)

    def after(_module: nn.Module, _: Any, out: Any) -> None:
        features = _features(out)
        stack.pop().features = features if features is not None and _has_positions(features) else None

    with hooks() as add:
        for module in encoder.model.modules():
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                add(module.register_forward_pre_hook(before))
                add(module.register_forward_hook(after))
        rows_of(encoder, inputs)
    return outermost


def _candidates(calls: list[_Call]) -> Iterator[_Call]:
    """Calls that give features, the last of the outer ones first.

    A call that gives none though features came before it is what pools them: no position is looked for in it.
    """
    gave = [n for n, call in enumerate(calls) if call.features is not None]
    for n in reversed(range(len(calls))):
        if calls[n].features is not None:
            yield calls[n]
            yield from _candidates(calls[n].inside)
        elif not gave or n < gave[0]:
            yield from _candidates(calls[n].inside)


def _as_grid(encoder: ModelEncoder, call: _Call, inputs: Tensor, geometry: _Geometry) -> Grid | None:
    features = call.features
    assert features is not None
    if features.ndim == 4:
        is_last = any(getattr(m, "output_fmt", "") == "NHWC" for m in encoder.model.modules())
        height, width = features.shape[1:3] if is_last else features.shape[2:]
        window = geometry.window(height, width) or (0.0, 0.0, 1.0, 1.0)
        return Grid(encoder, call, height, width, 0, True, is_last, features.shape[1:], window)
    H, W, T = *inputs.shape[-2:], features.shape[1]
    patch = patch_size(encoder.model)
    if patch is None:  # a square, behind tokens that are no patches
        side = math.isqrt(T)
        return Grid(encoder, call, side, side, T - side**2, False, False, features.shape[1:]) if H == W else None
    h, w = H // patch[0], W // patch[1]
    window = (0.0, 0.0, w * patch[1] / W, h * patch[0] / H)  # what is left of a patch has no position
    while h * w > T and h > 1 and w > 1:  # patches are merged, two by two
        h, w = -(-h // 2), -(-w // 2)
    return Grid(encoder, call, h, w, T - h * w, False, False, features.shape[1:], window) if h * w <= T else None


def _leads_to_rows(grid: Grid, inputs: Tensor) -> bool:
    """Whether its features are what rows are made of, and each position alone can be made a row."""
    given: list[Tensor] = []

    def note(features: Tensor) -> Tensor:
        given.append(features.detach().requires_grad_())
        return given[0]

    with torch.enable_grad():
        rows = grid.run(inputs, note)
        if not given or not rows.requires_grad:
            return False
        return torch.autograd.grad(rows.sum(), given[0], allow_unused=True)[0] is not None


def rows_of(encoder: ModelEncoder, inputs: Any) -> Tensor:
    """In float32 wherever it runs; what the encoder says of its pooling stays."""
    pooled = encoder.pooled
    try:
        return encoder.run(inputs)
    finally:
        encoder.pooled = pooled


def _has_positions(features: Tensor) -> bool:
    if features.ndim == 4:
        return min(features.shape[2:]) > 0 and features.shape[1] * features.shape[2] > 1 and features[0, 0].numel() > 1
    return features.ndim == 3 and features.shape[1] > 1


def _features(out: Any) -> Tensor | None:
    """Modules give a tensor, or something whose first part it is."""
    if isinstance(out, Mapping):
        out = next(iter(out.values()), None)
    elif isinstance(out, tuple | list):
        out = out[0] if out else None
    return out if isinstance(out, Tensor) and out.is_floating_point() else None


def _with(out: Any, features: Tensor) -> Any:
    if isinstance(out, Mapping):
        return type(out)(**{**out, next(iter(out)): features})  # an output of transformers
    return type(out)([features, *out[1:]]) if isinstance(out, tuple | list) else features

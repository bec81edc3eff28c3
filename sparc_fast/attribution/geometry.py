"""Where in its input each position of a convolutional model's maps is centred: what strides and padding make of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Geometry"]

CONVOLUTIONS = {F.conv2d, torch.conv2d}
POOLS = {F.max_pool2d, torch.max_pool2d, F.avg_pool2d}


class Geometry(TorchFunctionMode):
    """Here convolutions, pools and padding are followed, whichever modules they are in.

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

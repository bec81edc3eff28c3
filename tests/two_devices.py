"""A second device where there is none: memory of the CPU that keeps to the rules of a GPU's.

`DEVICE` is the device, `torch.device("cpu")` the host. Where a tensor is, is kept with its storage, so that views,
saved tensors and `.data` know it, and `Tensor.device` tells it. Within `two_devices()` this raises as beside a GPU:

- an operator, or a launch in Triton's interpreter, on tensors of both, but where a GPU takes them: copies, a number of
  the host in arithmetic, indices of the host;
- a generator of one that draws for the other;
- `.numpy()` on the device;
- the backend "cpu" there.

It holds for the thread that entered it. What files hold, NumPy shares and other threads make is the host's. Compiled
code that gets only the address of a tensor is not watched.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparc_fast.ops import backends

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# to these a number of the host is a tensor like any other
STRICT = {aten.cat.default, aten.stack.default, aten.equal.default}

_backends = backends.available
_device, _to, _numpy = torch.Tensor.device.__get__, torch.Tensor.to, torch.Tensor.numpy
_generators: weakref.WeakValueDictionary[int, torch.Generator] = weakref.WeakValueDictionary()  # the device's


@contextmanager
def two_devices() -> Iterator[None]:
    new: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "device", property(device)),
        (torch.Tensor, "new_tensor", _placed(torch.Tensor.new_tensor, lambda tensor, _: tensor.device)),
        *((torch.Tensor, method.__name__, method) for method in (to, cpu, numpy)),
        *((torch, name, _placed(getattr(torch, name))) for name in ("tensor", "as_tensor", "asarray")),
        (torch, "Generator", Generator),
        (backends, "available", _available),
    ]
    if find_spec("triton") is not None:
        from triton.runtime.interpreter import GridExecutor

        new.append((GridExecutor, "__call__", _launched(GridExecutor.__call__)))
    with ExitStack() as replaced:
        for owner, name, value in new:
            replaced.enter_context(mock.patch.object(owner, name, value))
        replaced.enter_context(Watched())
        yield


def is_on_device(tensor: Tensor) -> bool | None:
    """None: nobody knows, since autograd made it, which asks for "cpu" whatever it differentiates."""
    return getattr(tensor.untyped_storage(), "on_device", False)


def _place(tensors: Iterable[Tensor], on_device: bool | None) -> None:
    for tensor in tensors:
        tensor.untyped_storage().on_device = on_device  # type: ignore[attr-defined]


def _moved(tensor: Tensor, where: torch.device) -> Tensor:
    """The tensor itself if it is there, or else a copy."""
    if where.type == "cpu" and is_on_device(tensor) != (where == DEVICE):
        tensor = tensor.clone()
        _place([tensor], where == DEVICE)
    return tensor


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def device(tensor: Tensor) -> torch.device:
    plain = _device(tensor)
    return plain if plain.type != "cpu" else HOST if is_on_device(tensor) is False else DEVICE


def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result = _to(tensor, *args, **kwargs)
    asked = kwargs.get("device", kwargs.get("other", args[0] if args else None))
    if isinstance(asked, Tensor):
        asked = asked.device
    return _moved(result, torch.device(asked)) if isinstance(asked, torch.device | str | int) else result


def cpu(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _moved(tensor, HOST)


def numpy(tensor: Tensor, *, force: bool = False) -> Any:
    if is_on_device(tensor) and not force:
        raise TypeError("can't convert a tensor of the device to numpy. Use Tensor.cpu() to copy it to the host first.")
    return _numpy(tensor, force=force)


def _placed(
    function: Callable[..., Tensor], default: Callable[..., torch.device] = lambda *_: torch.empty(0).device
) -> Callable[..., Tensor]:
    """A function that brings numbers of the host to the device asked for, or else to the default."""

    @functools.wraps(function)
    def placed(*args: Any, **kwargs: Any) -> Tensor:
        asked = kwargs.get("device")
        result = function(*args, **kwargs)
        where = default(*args) if asked is None else torch.device(asked)
        if result.requires_grad and result.is_leaf:
            _place([result], where == DEVICE)
        return _moved(result, where)

    return placed


def _launched(launch: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(launch)
    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        if any(is_on_device(tensor) is False for tensor in _tensors((args, kwargs))):
            raise ValueError("a pointer argument cannot be accessed from Triton: its tensor is on the host")
        launch(executor, *args, **kwargs)

    return launched


def _available(device: torch.device | str = HOST) -> tuple[str, ...]:
    """The backend "cpu" is compiled for the host alone."""
    return tuple(name for name in _backends(device) if name != "cpu" or torch.device(device) != DEVICE)


def _tag(storage: torch.UntypedStorage) -> str | None:
    return str(DEVICE) if getattr(storage, "on_device", False) else None


def _restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    if location != str(DEVICE):
        return None
    storage.on_device = True  # type: ignore[attr-defined]
    return storage


torch.serialization.register_package(0, _tag, _restore)  # what is saved on the device is loaded there


class Generator(torch.Generator):
    """One that remembers which of the two it draws for."""

    def __new__(cls, device: torch.device | str = HOST) -> Generator:
        generator = super().__new__(cls, torch.device(device).type)
        generator.chosen = torch.device(device)
        if generator.chosen == DEVICE:
            _generators[generator._cdata] = generator
        return generator

    @property
    def device(self) -> torch.device:
        return self.chosen


class Watched(TorchDispatchMode):
    """Every operator's operands are checked, and its results are placed."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors, asked = _tensors((args, kwargs)), kwargs.get("device")
        if asked is None:
            _check_tensors(operator, args, tensors)
            places = {is_on_device(tensor) for tensor in (tensors[:1] if operator in COPIES else tensors)}
            on_device = True in places or (None if None in places and False not in places else False)
        else:
            on_device = asked == DEVICE or (None if _differentiates() else False)
        _check_generators(operator, (args, kwargs), on_device)
        # in a kernel's own code, too, but for the CPU's, which is compiled
        ours = "sparc_fast_" in operator.namespace and operator.namespace.endswith(("_triton", "_cuda"))
        if ours and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors):
            with self:
                results = operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            results = operator(*args, **kwargs)
        if on_device is not False:
            _place(_tensors(results), on_device)
        return results


def _differentiates() -> bool:
    """Whether autograd itself called the operator, not Python within a backward pass."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(
        ("torch/_compile.py", "_dynamo/eval_frame.py")
    ):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def _check_tensors(operator: torch._ops.OpOverload, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    host = [tensor for tensor in tensors if is_on_device(tensor) is False]
    if not host or not any(map(is_on_device, tensors)) or operator in COPIES:
        return
    if operator in INDEXES and is_on_device(args[0]) is not False:
        indices = {id(index) for index in _tensors(args[1])}
        host = [tensor for tensor in host if id(tensor) not in indices]
    if operator not in STRICT:
        named = zip(operator._schema.arguments, args, strict=False)
        written = {id(value) for argument, value in named if argument.is_write}
        host = [tensor for tensor in host if tensor.ndim or id(tensor) in written]
    if host:
        raise RuntimeError(f"Expected all tensors to be on the same device, the device or the host: {operator}")


def _check_generators(operator: torch._ops.OpOverload, operands: Any, on_device: bool | None) -> None:
    for leaf in tree_leaves(operands):
        if isinstance(leaf, torch._C.Generator) and (leaf._cdata in _generators) != bool(on_device):
            wanted, found = ("device", "host") if on_device else ("host", "device")
            raise RuntimeError(f"Expected a generator of the {wanted} but found one of the {found}: {operator}")

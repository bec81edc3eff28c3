"""Which implementations of the operators exist here, and which one a tensor gets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from sparc_fast import reference
from sparc_fast.row_step import AdamStep, Gradients, Rows, Samples


class Backend(Protocol):
    """The vocabulary every backend speaks; `reference` is its specification."""

    def global_topk(
        self, x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str = "auto"
    ) -> Tensor: ...

    def topk_rows(self, scores: Tensor, k: int) -> Tensor: ...

    def support_scores(
        self, x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, indices: Tensor
    ) -> Tensor: ...

    def support_values(
        self,
        x: Tensor,
        W_enc: Tensor,
        pre_bias: Tensor,
        latent_bias: Tensor,
        indices: Tensor,
        d_streams: Sequence[int],
    ) -> Tensor: ...

    def support_values_grad_x(
        self, grad_values: Tensor, values: Tensor, indices: Tensor, W_enc: Tensor, d_streams: Sequence[int]
    ) -> Tensor: ...

    def sparse_decode(self, values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor) -> Tensor: ...

    def sparse_decode_grad_values(self, grad_recons: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor: ...

    def decode_loss(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        pre_bias: Tensor,
        target: Tensor,
        scale: Tensor,
        weights: Sequence[float],
        d_streams: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def invert_indices(self, indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]: ...

    def encoder_gradients(
        self,
        x: Tensor,
        pre_bias: Tensor,
        values: Tensor,
        grad_values: Tensor,
        offsets: Tensor,
        entries: Tensor,
        d_streams: Sequence[int],
    ) -> tuple[Tensor, Tensor]: ...

    def decoder_gradients(self, values: Tensor, grad_recons: Tensor, offsets: Tensor, entries: Tensor) -> Tensor: ...

    def weight_gradients(
        self,
        x: Tensor,
        pre_bias: Tensor,
        values: Tensor,
        grad_values: Tensor,
        grad_recons: Tensor,
        offsets: Tensor,
        entries: Tensor,
        d_streams: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def update_rows(self, rows: Rows, batch: Samples, settings: AdamStep) -> tuple[Tensor, Tensor]: ...

    def step_rows(self, rows: Rows, gradients: Gradients, settings: AdamStep) -> Tensor: ...

    def replay_rows(
        self,
        W_dec: Tensor,
        moments: Sequence[Tensor],
        latents: Tensor,
        last_step: Tensor,
        history: Tensor,
        d_streams: Sequence[int],
        copy: Tensor | None = None,
        seed: int | None = None,
    ) -> None: ...

    def count_silence(self, silence: Tensor, values: Tensor, indices: Tensor) -> None: ...


if TYPE_CHECKING:  # every backend speaks all of it; at run time, modules are loaded by name where they can run
    import kernels
    from sparc_fast import native, native_cuda

    _reference: Backend = reference
    _cpu: Backend = native
    _triton: Backend = kernels
    _cuda: Backend = native_cuda

# Operators that "auto" takes from the CUDA kernels on a GPU, each with the measurement that says so: where, both times.
# Nothing has been measured yet; `python -m benchmarks.gpu` names those that belong here.
FASTER_IN_CUDA: dict[str, str] = {}

# The first that is here is "auto", but for FASTER_IN_CUDA. Triton runs on CPU tensors in its interpreter alone, to be
# tested.
_PREFERRED = {"cpu": ("cpu", "reference", "triton"), "cuda": ("triton", "cuda", "reference")}
_BACKENDS: dict[str, Backend] = {"reference": reference}


def available(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can run on tensors of this device; the first is "auto"."""
    return _AVAILABLE.get(torch.device(device).type, ("reference",))


def resolve(name: str, device: torch.device) -> Backend:
    """The backend called `name` for tensors on `device`; "auto" is the fastest of those available there.

    Raises:
        ValueError: no such backend, or it cannot run on this device.
    """
    names = available(device)
    if name == "auto" and FASTER_IN_CUDA and names[:2] == ("triton", "cuda"):
        return _fastest(device)
    if name == "auto":
        name = names[0]
    if name not in names:
        choices = ", ".join(repr(n) for n in ("auto", *names))
        raise ValueError(f"backend must be one of {choices} for {device.type} tensors, got {name!r}")
    if name not in _BACKENDS:
        _BACKENDS[name] = _load(name)
    return _BACKENDS[name]


def _fastest(device: torch.device) -> Backend:
    """Triton's operators, and those that have been measured to be faster in CUDA."""
    cuda = resolve("cuda", device)
    faster = {operator: getattr(cuda, operator) for operator in FASTER_IN_CUDA}
    return cast(Backend, SimpleNamespace(**{**vars(resolve("triton", device)), **faster}))


def _load(name: str) -> Backend:
    module, devices = {
        "cpu": ("sparc_fast.native", ("cpu",)),
        "cuda": ("sparc_fast.native_cuda", ("cuda",)),
        "triton": ("sparc_fast.kernels", ("cuda", "cpu") if _INTERPRETS else ("cuda",)),
    }[name]
    operators = import_module("sparc_fast.custom_ops").backend(import_module(module), f"sparc_fast_{name}", devices)
    return cast(Backend, operators)


def _is_here(name: str, device: str) -> bool:
    if name == "cuda":
        return find_spec("sparc_fast._cuda") is not None and _is_here("triton", device)
    if name == "triton":
        return find_spec("triton") is not None and (device == "cuda" or _INTERPRETS)
    return name != "cpu" or _compiled_cpu_loads()


def _compiled_cpu_loads() -> bool:
    if find_spec("sparc_fast._cpu") is None:
        return False
    try:
        import_module("sparc_fast._cpu")
    except ImportError as error:
        warnings.warn(f"the compiled CPU backend cannot be loaded, the slow reference is used: {error}", stacklevel=2)
        return False
    return True


_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_AVAILABLE = {device: tuple(name for name in names if _is_here(name, device)) for device, names in _PREFERRED.items()}

"""The vocabulary of backends, which of them exist here, and which one a tensor gets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sparc_fast.ops import reference
from sparc_fast.ops.row_step import AdamStep, Bias, DecoderRows, Gradients, Rows, Samples


class Backend(Protocol):
    """The vocabulary every backend speaks; `reference` is its specification."""

    def global_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        pre_bias: Tensor,
        latent_bias: Tensor,
        k: int,
        screening: str = "auto",
        among: Tensor | None = None,
    ) -> Tensor: ...

    def batch_topk(
        self, x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str = "auto"
    ) -> Tensor: ...

    def latents_above(
        self,
        x: Tensor,
        W_enc: Tensor,
        pre_bias: Tensor,
        latent_bias: Tensor,
        threshold: float,
        k: int,
        screening: str = "auto",
        sure: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...

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

    def nested_decode_loss(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        pre_bias: Tensor,
        target: Tensor,
        scale: Tensor,
        weights: Sequence[float],
        d_streams: Sequence[int],
        sizes: Sequence[int],
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

    def gradient_squares(
        self, samples: Samples, d_streams: Sequence[int], encoder: bool = True, decoder: bool = True
    ) -> tuple[Tensor, Tensor]: ...

    def update_rows(self, rows: Rows, samples: Samples, adam: AdamStep) -> tuple[Tensor, Tensor]: ...

    def step_rows(self, rows: Rows, gradients: Gradients, adam: AdamStep) -> None: ...

    def replay_rows(self, rows: DecoderRows, latents: Tensor, history: Tensor, seed: int | None = None) -> None: ...

    def step_biases(self, biases: Sequence[Bias], adam: AdamStep) -> None: ...

    def sample_scale(
        self, x: Tensor, d_streams: Sequence[int], n_samples: int | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def loss_summary(
        self, nmse: Tensor, auxk: Tensor | None, energy: Tensor, weights: Sequence[float], auxk_coef: float
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]: ...

    def count_silence(self, silence: Tensor, values: Tensor, indices: Tensor) -> None: ...

    def finish_step(
        self,
        biases: Sequence[Bias],
        adam: AdamStep,
        silence: Tensor,
        values: Tensor,
        indices: Tensor,
        counted: Tensor | None,
        nmse: Tensor,
        auxk: Tensor | None,
        energy: Tensor,
        weights: Sequence[float],
        auxk_coef: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]: ...


IN_GRAPHS = (
    "global_topk",
    "topk_rows",
    "support_scores",
    "support_values",
    "support_values_grad_x",
    "sparse_decode",
    "sparse_decode_grad_values",
    "decode_loss",
    "nested_decode_loss",
    "invert_indices",
    "encoder_gradients",
    "decoder_gradients",
    "weight_gradients",
    "count_silence",
    "sample_scale",
)
RAGGED = ("batch_topk", "latents_above")  # how wide their results are depends on data
# these move weights and moments in place, or say how, outside of any graph of torch.compile
PLAIN = (
    *RAGGED, "gradient_squares", "update_rows", "step_rows", "replay_rows", "step_biases", "loss_summary",
    "finish_step",
)  # fmt: skip
OPTIONAL = ("best_rows", "encode_topk")  # what others do in several steps

# results that the reference does not find without looking at data, or at all
_FAKES: dict[str, Callable[..., Any]] = {
    "count_silence": lambda silence, values, indices: None,
    "global_topk": lambda x, W_enc, pre_bias, latent_bias, k, screening="auto", among=None: x.new_empty(
        (len(x), k), dtype=torch.int32
    ),
}

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


def resolve(name: str | Backend, device: torch.device) -> Backend:
    """The backend called `name` for tensors on `device`; "auto" is the fastest of those available there.

    What is a backend already is that one.

    Raises:
        ValueError: no such backend, or it cannot run on this device.
    """
    if not isinstance(name, str):
        return name
    names = available(device)
    if name == "auto" and FASTER_IN_CUDA and names[:2] == ("triton", "cuda"):
        return _fastest(device)
    if name == "auto":
        name = names[0]
        if device.type == "cpu" and name != "cpu":
            _warn_of_slowness()
    if name not in names:
        choices = ", ".join(repr(n) for n in ("auto", *names))
        raise ValueError(f"backend must be one of {choices} for {device.type} tensors, got {name!r}")
    if name not in _BACKENDS:
        _BACKENDS[name] = _load(name)
    return _BACKENDS[name]


@cache
def _warn_of_slowness() -> None:
    if find_spec("sparc_fast._cpu") is None:
        warnings.warn(
            "sparc_fast is installed without its compiled CPU module, and computes many times slower: "
            "install it again where there is a C++ compiler",
            stacklevel=3,
        )


def _fastest(device: torch.device) -> Backend:
    """Triton's operators, and those that have been measured to be faster in CUDA."""
    cuda = resolve("cuda", device)
    return replaced(resolve("triton", device), {operator: getattr(cuda, operator) for operator in FASTER_IN_CUDA})


def _load(name: str) -> Backend:
    # imported here, each where it can run; mypy sees here that they speak the whole vocabulary
    if name == "cpu":
        from sparc_fast.ops import cpu
        from sparc_fast.ops.idle_threads import let_sleep

        let_sleep()
        return _in_graphs(cpu, "sparc_fast_cpu", ("cpu",))
    if name == "cuda":
        from sparc_fast.ops import cuda

        return _in_graphs(cuda, "sparc_fast_cuda", ("cuda",))
    if TYPE_CHECKING:
        import kernels
    else:
        from sparc_fast import kernels
    return _in_graphs(kernels, "sparc_fast_triton", ("cuda", "cpu") if _INTERPRETS else ("cuda",))


def _in_graphs(implementation: Backend, library: str, device_types: tuple[str, ...]) -> Backend:
    """The same backend, its operators behind ``torch.ops.<library>``, so that torch.compile takes a model as one graph.

    What a result looks like there, shape and dtype, is what the reference's result looks like.
    """
    operators = {
        name: _operator(f"{library}::{name}", getattr(implementation, name), device_types) for name in IN_GRAPHS
    }
    return replaced(implementation, operators)


def replaced(backend: Backend, operators: dict[str, Callable[..., Any]]) -> Backend:
    """A backend with some of its operators replaced."""
    has = [name for name in OPTIONAL if hasattr(backend, name)]
    functions = {name: getattr(backend, name) for name in (*IN_GRAPHS, *PLAIN, *has)}
    whole: Any = SimpleNamespace(**{**functions, **operators})
    of_both: Backend = whole
    return of_both


def _operator(name: str, function: Callable[..., Any], device_types: tuple[str, ...]) -> Any:
    library, short = name.split("::")
    in_place = short == "count_silence"
    schema = torch.library.infer_schema(function, mutates_args=("silence",) if in_place else ())
    # not torch.library.custom_op: a call takes twice as long through its layers of Python, 60 µs longer out of cache
    torch.library.define(name, schema)
    torch.library.impl(name, device_types, function)
    fake = _FAKES.get(short, getattr(reference, short))
    torch.library.register_fake(name, fake)
    return getattr(getattr(torch.ops, library), short).default


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

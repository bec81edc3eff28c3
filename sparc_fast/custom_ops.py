"""A backend's operators as PyTorch custom operators, so that torch.compile takes a model as one graph.

What a result looks like, shape and dtype, is what the reference's result looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch

from sparc_fast import reference
from sparc_fast.backends import Backend

IN_GRAPHS = (
    "global_topk",
    "topk_rows",
    "support_scores",
    "support_values",
    "support_values_grad_x",
    "sparse_decode",
    "sparse_decode_grad_values",
    "decode_loss",
    "invert_indices",
    "encoder_gradients",
    "decoder_gradients",
    "weight_gradients",
    "count_silence",
)
# these move weights and moments in place, outside of any graph
PLAIN = ("update_rows", "step_rows", "replay_rows")


# results that the reference does not find without looking at data, or at all
_FAKES: dict[str, Callable[..., Any]] = {
    "count_silence": lambda silence, values, indices: None,
    "global_topk": lambda x, W_enc, pre_bias, latent_bias, k, screening="auto": x.new_empty(
        (len(x), k), dtype=torch.int32
    ),
}


def backend(implementation: Any, library: str, device_types: str | tuple[str, ...]) -> Backend:
    """The functions of a module, each behind the operator ``torch.ops.<library>.<its name>``."""
    functions = {name: getattr(implementation, name) for name in (*IN_GRAPHS, *PLAIN)}
    functions |= {name: _operator(f"{library}::{name}", functions[name], device_types) for name in IN_GRAPHS}
    return cast(Backend, SimpleNamespace(**functions))


def _operator(name: str, function: Callable[..., Any], device_types: str | tuple[str, ...]) -> Any:
    library, short = name.split("::")
    in_place = short == "count_silence"
    schema = torch.library.infer_schema(function, mutates_args=("silence",) if in_place else ())
    # not torch.library.custom_op: a call takes twice as long through its layers of Python, 60 µs longer out of cache
    torch.library.define(name, schema)
    torch.library.impl(name, device_types, function)
    fake = _FAKES.get(short, getattr(reference, short))
    torch.library.register_fake(name, fake)
    return getattr(getattr(torch.ops, library), short).default

"""The CPU operators as PyTorch custom operators, so that torch.compile takes a model as one graph.

Each wraps the function of the same name in `native`. What its result looks like, shape and dtype, is what the
reference's result looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparc_fast import native, reference

__all__ = [*native.__all__]


def _operator(name: str, *, mutates: tuple[str, ...] = (), fake: Callable[..., Any] | None = None) -> Any:
    operator = torch.library.custom_op(f"sparc_fast::{name}", mutates_args=mutates, device_types="cpu")(
        getattr(native, name)
    )
    operator.register_fake(fake or getattr(reference, name))
    return operator


global_topk = _operator("global_topk")
local_topk = _operator("local_topk")
support_values = _operator("support_values")
support_values_grad_x = _operator("support_values_grad_x")
sparse_decode = _operator("sparse_decode")
sparse_decode_grad_values = _operator("sparse_decode_grad_values")
decode_loss = _operator("decode_loss")
invert_indices = _operator("invert_indices")
encoder_gradients = _operator("encoder_gradients")
decoder_gradients = _operator("decoder_gradients")
weight_gradients = _operator("weight_gradients")
update_rows = native.update_rows  # moves weights and moments in place, outside of any graph
replay_rows = native.replay_rows
count_silence = _operator("count_silence", mutates=("silence",), fake=lambda silence, values, indices: None)

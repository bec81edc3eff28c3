"""Gradient-weighted attention relevancy (Chefer et al., arXiv 2103.15679), from attention as a model computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["WatchedAttention", "relevancy"]

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}


class WatchedAttention(TorchFunctionMode):
    """Here attention is computed in the open, whichever way a model asks for it, and no model is changed for it.

    `found`: the probabilities [n, heads, T, T'] of every attention, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward and (found := self._heads(*args, **kwargs)) is not None:
            return found
        result = func(*args, **kwargs)
        if func in SOFTMAX and result.ndim == 4:
            self.found.append(result)
        return result

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """As torch's function of these arguments, without dropout."""
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(above, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        probabilities = scores.softmax(-1)
        if probabilities.ndim == 4:
            self.found.append(probabilities)
        return probabilities @ value

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, weight: Tensor | None,
        bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
        out_weight: Tensor, out_bias: Tensor | None, **options: Any,
    ) -> tuple[Tensor, None] | None:  # fmt: skip
        """As nn.MultiheadAttention computes it, [T, n, D]; None for what it may also do."""
        unusual = ("key_padding_mask", "use_separate_proj_weight", "is_causal")
        if weight is None or bias_k is not None or add_zero_attn or query.ndim != 3 or any(map(options.get, unusual)):
            return None
        weights, biases = weight.chunk(3), (None, None, None) if bias is None else bias.chunk(3)
        parts = [
            F.linear(x, w, b).view(*x.shape[:2], heads, -1).permute(1, 2, 0, 3)  # [n, heads, T, d]
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]
        query, key, value = parts
        attended = self._attend(query, key, value, options.get("attn_mask"))
        return F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None


def relevancy(attention: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Of each token for each, float32 [n, T, T]: R = I, then R += mean over heads of (∇A · A)+ R, block after block."""
    n, _, T, _ = attention[0].shape
    found = torch.eye(T, dtype=torch.float32, device=attention[0].device).expand(n, T, T)
    for A, gradient in zip(attention, gradients, strict=True):
        found = found + (gradient.float() * A.detach().float()).clamp(min=0).mean(1) @ found
    return found

"""Triton kernels of sparc_fast, installed as ``sparc_fast.kernels``: a file an operator, or several of one kind."""

from functools import partial

from sparc_fast.ops import pooled_topk

from .count_silence import count_silence
from .decode_loss import decode_loss
from .finish_step import finish_step
from .global_topk import global_topk
from .invert_indices import invert_indices
from .loss_summary import loss_summary
from .nested_decode_loss import nested_decode_loss
from .replay_rows import replay_rows
from .sample_scale import sample_scale
from .sparse_decode import sparse_decode
from .sparse_decode_grad_values import sparse_decode_grad_values
from .step_biases import step_biases
from .support_scores import support_scores
from .support_values import support_values
from .support_values_grad_x import support_values_grad_x
from .topk_rows import topk_rows
from .update_rows import step_rows, update_rows
from .weight_gradients import decoder_gradients, encoder_gradients, gradient_squares, weight_gradients

__all__ = [
    "batch_topk",
    "count_silence",
    "decode_loss",
    "decoder_gradients",
    "encoder_gradients",
    "finish_step",
    "global_topk",
    "gradient_squares",
    "invert_indices",
    "latents_above",
    "loss_summary",
    "nested_decode_loss",
    "replay_rows",
    "sample_scale",
    "sparse_decode",
    "sparse_decode_grad_values",
    "step_biases",
    "step_rows",
    "support_scores",
    "support_values",
    "support_values_grad_x",
    "topk_rows",
    "update_rows",
    "weight_gradients",
]

# of as many latents as a sample has, from its best ones and their scores
batch_topk = partial(pooled_topk.batch_topk, global_topk, support_scores)
latents_above = partial(pooled_topk.latents_above, global_topk, support_scores)

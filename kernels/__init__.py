"""Triton kernels of sparc_fast, installed as ``sparc_fast.kernels``: one operator a file, named after it."""

from sparc_fast.kernels.count_silence import count_silence
from sparc_fast.kernels.decode_loss import decode_loss
from sparc_fast.kernels.decoder_gradients import decoder_gradients
from sparc_fast.kernels.encoder_gradients import encoder_gradients
from sparc_fast.kernels.global_topk import global_topk
from sparc_fast.kernels.invert_indices import invert_indices
from sparc_fast.kernels.replay_rows import replay_rows
from sparc_fast.kernels.sparse_decode import sparse_decode
from sparc_fast.kernels.sparse_decode_grad_values import sparse_decode_grad_values
from sparc_fast.kernels.support_scores import support_scores
from sparc_fast.kernels.support_values import support_values
from sparc_fast.kernels.support_values_grad_x import support_values_grad_x
from sparc_fast.kernels.topk_rows import topk_rows
from sparc_fast.kernels.update_rows import step_rows, update_rows
from sparc_fast.kernels.weight_gradients import weight_gradients

__all__ = [
    "count_silence",
    "decode_loss",
    "decoder_gradients",
    "encoder_gradients",
    "global_topk",
    "invert_indices",
    "replay_rows",
    "sparse_decode",
    "sparse_decode_grad_values",
    "step_rows",
    "support_scores",
    "support_values",
    "support_values_grad_x",
    "topk_rows",
    "update_rows",
    "weight_gradients",
]

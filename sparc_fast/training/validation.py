"""How a model does on rows it is not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparc_fast.data import AlignedFiles
from sparc_fast.model import SPARC


@torch.no_grad()
def validate(model: SPARC, files: AlignedFiles, batch_size: int, cross_loss_coef: float) -> dict[str, Any]:
    """Losses on all rows of `files`, with the support of all streams together and of each stream alone.

    Returns:
        "loss" = self + cross_loss_coef cross, as in training but for AuxK, and its parts; "single_loss" and its parts
        are the same with every stream encoded by itself, which is what a model meets that is given one stream. Parts
        over pairs of streams are None where there is one stream.
    """
    was_training = model.training
    model.eval()
    S = len(model.streams)
    joint, single = (torch.zeros(S, S, dtype=torch.float64) for _ in range(2))
    for x in _batches(files, batch_size, model.W_enc.device):
        joint += len(x) * model.loss(x, 1.0, 0.0).nmse.double().cpu()
        for s, stream in enumerate(model.streams):
            alone = (stream,) if model.selection == "global" else None
            single[s] += len(x) * model.loss(x, 1.0, 0.0, support_from=alone).nmse[s].double().cpu()
    model.train(was_training)
    parts = {
        **_parts("", joint / files.n_rows, cross_loss_coef),
        **_parts("single_", single / files.n_rows, cross_loss_coef),
    }
    return {**parts, "rows": files.n_rows}


def _parts(prefix: str, nmse: Tensor, cross_loss_coef: float) -> dict[str, float | None]:
    S = len(nmse)
    itself = float(nmse.diagonal().mean())
    cross = float((nmse.sum() - nmse.diagonal().sum()) / (S * (S - 1))) if S > 1 else None
    loss = itself + cross_loss_coef * (cross or 0.0)
    return {f"{prefix}loss": loss, f"{prefix}self": itself, f"{prefix}cross": cross}


def _batches(files: AlignedFiles, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    for start in range(0, files.n_rows, batch_size):
        yield files.rows(start, min(start + batch_size, files.n_rows)).to(device)

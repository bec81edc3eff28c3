"""One model file of what ranks hold: the first of them writes it, with a piece of another's rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparc_fast import checkpoint

from .exchange import Exchange

DIMENSIONS = {"W_enc": 0, "W_dec": 0, "silence": 0, "latent_bias": 1, "latent_threshold": 1}
"""Of these parameters and buffers, and of their optimizer's state, the dimension of latents; others all ranks hold."""
PIECE = 2**26  # bytes that are sent together


def save_model(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], exchange: Exchange) -> None:
    """`SPARC.save` of a model whose latents are shared.

    Raises:
        OSError: the file cannot be written; on every rank.
    """
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    counts = [n for (n,) in exchange.numbers(0, len(own["silence"]))]
    for name in (name for name in own if DIMENSIONS.get(name) == 1):
        own[name] = exchange.gather(own[name].T, counts, "files").T
    with exchange.agreed("save"):
        pieces = _pieces(own, counts, exchange)
        if exchange.rank:
            for _ in pieces:
                pass
            return
        shapes = {
            name: (tensor.dtype, [sum(counts) if DIMENSIONS.get(name) == 0 else len(tensor), *tensor.shape[1:]])
            for name, tensor in own.items()
        }
        try:
            with checkpoint.save_in_parts(path, shapes, config) as write:
                for name, rows in pieces:
                    write(name, rows)
        except OSError:
            for _ in pieces:  # the others are sending
                pass
            raise


def _pieces(own: Mapping[str, Tensor], counts: Sequence[int], exchange: Exchange) -> Iterator[tuple[str, Tensor]]:
    """(name, rows) of the whole model on the first rank, in order; the others send theirs meanwhile."""
    for name, tensor in own.items():
        if DIMENSIONS.get(name) != 0:
            yield name, tensor
            continue
        row_bytes = tensor[0].nbytes
        for rank, n in enumerate(counts):
            for start in range(0, n, step := max(1, PIECE // row_bytes)):
                some = slice(start, min(start + step, n))
                if rank == exchange.rank == 0:
                    yield name, tensor[some]
                elif rank == exchange.rank:
                    with exchange.with_others():
                        dist.send(tensor[some].view(-1).view(torch.uint8), group=exchange.group, group_dst=0)
                elif exchange.rank == 0:
                    rows = tensor.new_empty(some.stop - some.start, *tensor.shape[1:])
                    with exchange.with_others():
                        dist.recv(rows.view(-1).view(torch.uint8), group=exchange.group, group_src=rank)
                    yield name, rows

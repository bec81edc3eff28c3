"""How a model does on rows it is not trained on, and rows of the same files held out for that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparc_fast.data import AlignedFiles
from sparc_fast.data.absence import present_of, without_empty_samples
from sparc_fast.data.readers import Spans
from sparc_fast.data.shuffle import Rows
from sparc_fast.data.views import PiecesReader
from sparc_fast.model import SPARC, evaluating
from sparc_fast.selection import LOCAL

BLOCKS = 64  # held-out blocks at most: enough of them to see every region of a sorted file


@torch.no_grad()
def validate(
    model: SPARC, files: AlignedFiles, batch_size: int, cross_loss_coef: float, zero_rows: str = "keep"
) -> dict[str, Any]:
    """Losses on all rows of `files`, with the support of all streams together and of each stream alone.

    Each is a mean over the samples that have both streams of a pair; with `zero_rows` "absent", zero rows are none.

    Returns:
        "loss" = self + cross_loss_coef cross, as in training but for AuxK, and its parts; "single_loss" and its parts
        are the same with every stream encoded by itself, which is what a model meets that is given one stream. Parts
        over pairs of streams are None where there is one stream.
    """
    S = len(model.streams)
    joint, single, n_pairs = (torch.zeros(S, S, dtype=torch.float64, device="cpu") for _ in range(3))
    n_rows = 0
    with evaluating(model):
        for x, present in _batches(files, batch_size, model.W_enc.device, zero_rows):
            n = pairs_of(present, len(x), S).double().cpu()
            n_pairs += n
            n_rows += len(x)
            own, has = model._shards.own(x), model._shards.own(present)
            assert own is not None
            joint += n * model.loss(own, 1.0, 0.0, present=has).nmse.double().cpu()
            for s, stream in enumerate(model.streams):
                alone = None if model.selection in LOCAL else (stream,)
                nmse = model.loss(own, 1.0, 0.0, support_from=alone, present=has).nmse
                single[s] += n[s] * nmse[s].double().cpu()
    of_single = _parts("single_", single / n_pairs, cross_loss_coef)
    return {**_parts("", joint / n_pairs, cross_loss_coef), **of_single, "rows": n_rows}


def pairs_of(present: Tensor | None, n_rows: int, n_streams: int) -> Tensor:
    """How many samples have both streams, [S, S]."""
    if present is None:
        return torch.full((n_streams, n_streams), n_rows, dtype=torch.int64, device="cpu")
    return present.T.float() @ present.float()


def _parts(prefix: str, nmse: Tensor, cross_loss_coef: float) -> dict[str, float | None]:
    """Of the pairs [S, S], NaN for those that no sample has."""
    S = len(nmse)
    itself = float(nmse.diagonal().nanmean())
    others = nmse[~torch.eye(S, dtype=torch.bool, device="cpu")]
    cross = float(others.nanmean()) if len(others) and not others.isnan().all() else None
    loss = itself + cross_loss_coef * (cross or 0.0)
    return {f"{prefix}loss": loss, f"{prefix}self": itself, f"{prefix}cross": cross}


def _batches(
    files: AlignedFiles, batch_size: int, device: torch.device, zero_rows: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, files.n_rows, batch_size):
        x = files.rows(start, min(start + batch_size, files.n_rows))
        present = None if files.present is None else files.present[start : start + batch_size]
        present, _ = present_of(x, present, files.d_streams, zero_rows)
        x, present = without_empty_samples(x, present)
        yield x.to(device), None if present is None else present.to(device)


def hold_out(files: AlignedFiles, n_rows: int) -> tuple[AlignedFiles, AlignedFiles]:
    """(files without some rows, those rows): about `n_rows` of them, in up to 64 blocks spread evenly.

    Blocks are whole chunks of the files where these are small enough, so that no chunk is read twice; else exactly
    `n_rows` are held out. Rows of one sample (`AlignedFiles.groups`) stay on one side.

    Raises:
        ValueError: that would be more than half of the rows.
    """
    if not 1 <= n_rows <= files.n_rows // 2:
        raise ValueError(f"validation_rows must be between 1 and {files.n_rows // 2}, half of the rows, got {n_rows}")
    unit = math.lcm(*(reader.granule for reader in files.readers.values()))
    unit = unit if unit <= n_rows else 1
    held = held_spans(files.n_rows, n_rows, unit)
    if files.groups is not None:
        held = _whole_groups(held, files.groups)
    rest = [(a, b) for (_, a), (b, _) in zip([(0, 0), *held], [*held, (files.n_rows, 0)], strict=True) if a < b]
    return _part(files, rest, "without the held-out rows"), _part(files, held, "held-out rows")


def held_spans(n: int, n_held: int, unit: int) -> list[tuple[int, int]]:
    """Spans of whole units, the last part of each of up to 64 equal stretches of n rows."""
    units, held = n // unit, n_held // unit
    blocks = min(BLOCKS, held)
    ends = [(i + 1) * units // blocks for i in range(blocks)]
    sizes = [(i + 1) * held // blocks - i * held // blocks for i in range(blocks)]
    return [((end - size) * unit, end * unit) for end, size in zip(ends, sizes, strict=True)]


def _whole_groups(spans: Spans, groups: Rows) -> list[tuple[int, int]]:
    """The same, each end moved back to where a sample begins."""
    ends = groups[np.searchsorted(groups, np.array(spans), side="right") - 1].tolist()
    if not (kept := [(start, stop) for start, stop in ends if start < stop]):
        raise ValueError("validation_rows must be at least the rows of a sample in each block that is held out")
    return kept


def _part(files: AlignedFiles, spans: Spans, words: str) -> AlignedFiles:
    readers = {
        stream: PiecesReader([(reader, *span) for span in spans], f"{reader.title} ({words})")
        for stream, reader in files.readers.items()
    }
    present = None if files.present is None else torch.cat([files.present[start:stop] for start, stop in spans])
    return AlignedFiles(readers, present, files.matched)

"""How a model does on rows it is not trained on, and rows of the same files held out for that."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparc_fast.data import AlignedFiles, Reader
from sparc_fast.data.readers import Spans
from sparc_fast.model import SPARC

BLOCKS = 64  # held-out blocks at most: enough of them to see every region of a sorted file


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
    joint, single = (torch.zeros(S, S, dtype=torch.float64, device="cpu") for _ in range(2))
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


class SpansReader(Reader):
    """Rows of another reader: those of some spans (start, stop), in order."""

    def __init__(self, whole: Reader, spans: Spans, title: str) -> None:
        ends = list(accumulate(stop - start for start, stop in spans))
        shape = (ends[-1], whole.width)
        super().__init__(title, shape, whole.dtype, granule=whole.granule, scratch=whole.scratch)
        self._whole, self._spans, self._ends = whole, spans, ends

    def _fill(self, start: int, out: Tensor) -> None:
        at = 0
        for first, stop in self._pieces(start, start + len(out)):
            self._whole.rows(first, stop, out[at : at + stop - first])
            at += stop - first

    def read(self, spans: Spans, out: Tensor, check_finite: bool) -> None:
        self._whole.read(self._of_whole(spans), out, check_finite)  # an error names the file's own row

    def will_need(self, spans: Spans) -> None:
        self._whole.will_need(self._of_whole(spans))

    def _of_whole(self, spans: Spans) -> Spans:
        return [piece for span in spans for piece in self._pieces(*span)]

    def close(self) -> None:
        self._whole.close()

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where rows start <= n < stop of the part are in the whole."""
        pieces = []
        i = bisect_right(self._ends, start)
        while start < stop:
            end = min(stop, self._ends[i])
            offset = self._spans[i][1] - self._ends[i]
            pieces.append((start + offset, end + offset))
            start, i = end, i + 1
        return pieces


def hold_out(files: AlignedFiles, n_rows: int) -> tuple[AlignedFiles, AlignedFiles]:
    """(files without some rows, those rows): about `n_rows` of them, in up to 64 blocks spread evenly.

    Blocks are whole chunks of the files where these are small enough, so that no chunk is read twice; else exactly
    `n_rows` are held out.

    Raises:
        ValueError: that would be more than half of the rows.
    """
    if not 1 <= n_rows <= files.n_rows // 2:
        raise ValueError(f"validation_rows must be between 1 and {files.n_rows // 2}, half of the rows, got {n_rows}")
    unit = math.lcm(*(reader.granule for reader in files.readers.values()))
    unit = unit if unit <= n_rows else 1
    held = held_spans(files.n_rows, n_rows, unit)
    rest = [(a, b) for (_, a), (b, _) in zip([(0, 0), *held], [*held, (files.n_rows, 0)], strict=True) if a < b]
    return _part(files, rest, "without the held-out rows"), _part(files, held, "held-out rows")


def held_spans(n: int, n_held: int, unit: int) -> list[tuple[int, int]]:
    """Spans of whole units, the last part of each of up to 64 equal stretches of n rows."""
    units, held = n // unit, n_held // unit
    blocks = min(BLOCKS, held)
    ends = [(i + 1) * units // blocks for i in range(blocks)]
    sizes = [(i + 1) * held // blocks - i * held // blocks for i in range(blocks)]
    return [((end - size) * unit, end * unit) for end, size in zip(ends, sizes, strict=True)]


def _part(files: AlignedFiles, spans: Spans, words: str) -> AlignedFiles:
    return AlignedFiles(
        {s: SpansReader(reader, spans, f"{reader.title} ({words})") for s, reader in files.readers.items()}
    )

"""Retrieval of inputs by reconstructions: the SPARC paper's SelfRecon and CrossReconRecall beside `retrieval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparc_fast.codes import SparseLatents

from .codes import StreamCode
from .passing import InputsOnDevice, bytes_of_inputs
from .registry import Given, Metric, Score, Sizes, details_by_pair, mean_over_pairs, rows_by_pair
from .retrieval import CELL, LONG, Retrieval, drawn_retrieval, retrieval_scores, retrieval_seconds

if TYPE_CHECKING:
    from sparc_fast.model import SPARC

__all__ = ["RETRIEVAL_BY_RECONSTRUCTION", "Decoded"]


class Decoded:
    """A stream as another's code reconstructs it, [N, D]: a `RowSource` of which nothing is kept."""

    def __init__(self, model: SPARC, code: StreamCode, source: str, target: str) -> None:
        self.model, self.code, self.source, self.target = model, code, source, target
        self.shape = torch.Size([len(code[0]), model.d_streams[target]])

    @property
    def device(self) -> torch.device:
        return self.model.W_dec.device

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows: Tensor | slice, /) -> Tensor:
        """Some rows, decoded now."""
        rows = rows if isinstance(rows, slice) else rows.to(self.code[0].device)
        values, indices = (part[rows].to(self.device) for part in self.code)
        some = SparseLatents(values[:, None], indices, (self.source,), self.model.n_latents)
        return self.model.decode(some, self.source, self.target)


def _compute(given: Given) -> dict[tuple[str, str], Retrieval]:
    """By (source, target): the stream whose code is decoded, and the one that is reconstructed and looked for."""
    inputs: InputsOnDevice = given.watched["retrieval_by_reconstruction"]
    found = {}
    for target in given.streams:
        candidates = inputs.stream(target)
        queries = [Decoded(given.model, given.single[source], source, target) for source in given.streams]
        seconds = sum(retrieval_seconds(one, candidates) for one in queries) * len(given.streams)
        if target == given.streams[0] and candidates.device.type == "cpu" and seconds > LONG:
            n, times = given.n_samples, len(queries) ** 2
            words = f"retrieval by reconstruction compares {n:,} rows with as many, {times} times"
            given.say(f"{words}: about {seconds:,.0f} seconds")
        for one in queries:
            found[one.source, target] = retrieval_scores(one, candidates, groups=given.groups)
    return {(s, t): found[s, t] for s in given.streams for t in given.streams}


def _resample(given: Given, found: Mapping[tuple[str, str], Retrieval]) -> Mapping[str, Tensor]:
    own, cross = (
        drawn_retrieval({pair: one for pair, one in found.items() if (pair[0] == pair[1]) is same}, given.draws)
        for same in (True, False)
    )
    drawn = {"self_recon_r1": own.get("r1"), "cross_recon_r1": cross.get("r1"), "cross_recon_mrr": cross.get("mrr")}
    return {key: values for key, values in drawn.items() if values is not None}


def _work(sizes: Sizes) -> int:
    """What is compared at a time."""
    return 80 * sizes.N + 2**27


RETRIEVAL_BY_RECONSTRUCTION = Metric(
    "retrieval_by_reconstruction",
    "Finding a sample's input among all inputs of a stream by its reconstruction, from its own code or another's.",
    _compute,
    (
        Score(
            "self_recon_r1",
            "Retrieval of inputs by own reconstruction, R@1",
            "How often a reconstruction is nearest to the input that it is of (the SPARC paper's SelfRecon).",
            value=mean_over_pairs("r1", own=True),
        ),
        Score(
            "cross_recon_r1",
            "Retrieval of inputs by cross reconstruction, R@1",
            "How often what another stream's code reconstructs is nearest to the input of the same sample (the SPARC "
            "paper's CrossReconRecall).",
            value=mean_over_pairs("r1", own=False),
        ),
        Score(
            "cross_recon_mrr",
            "Retrieval of inputs by cross reconstruction, MRR",
            "Mean of 1 / rank.",
            value=mean_over_pairs("mrr", own=False),
        ),
    ),
    needs=frozenset({"single"}),
    watch=InputsOnDevice,
    resample=_resample,
    details=details_by_pair("retrieval_by_reconstruction", Retrieval.figures),
    rows=rows_by_pair(
        f"Retrieval of inputs: {CELL}",
        "Finding a sample's {target} input by what its {source} code reconstructs of it, among {one.n_candidates} "
        "inputs.",
        lambda one: one.cell,
    ),
    kept=bytes_of_inputs,
    work=_work,
)

"""All metrics of one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .agreement import firing_agreement
from .codes import Codes, StreamCode
from .jaccard import concept_jaccard, concept_jaccard_by_chance
from .labels import PerSample, as_groups, as_labels
from .latents import LatentUse, latent_use
from .reconstruction import nmse_from_errors, r2_from_errors, squared_error
from .retrieval import Retrieval, retrieval_scores

if TYPE_CHECKING:
    from ..model import SPARC

__all__ = ["METRICS", "Better", "Evaluation", "Metric", "evaluate"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of one model on one set of samples, on the CPU.

    single_codes: each stream encoded alone; every metric is of these, but for the two called joint (all
    streams encoded together, the SPARC paper's protocol). The jaccard tensors [L] are None without labels.
    retrieval is by (query stream, candidate stream); nmse and r2 [S, S] by source (row) and target (column).
    """

    streams: tuple[str, ...]
    n_samples: int
    n_latents: int
    single_codes: Codes
    jaccard_single: Tensor | None
    jaccard_chance: Tensor | None
    jaccard_joint: Tensor | None
    agreement: Tensor
    latents_single: LatentUse
    latents_joint: LatentUse
    retrieval: dict[tuple[str, str], Retrieval]
    nmse: Tensor
    r2: Tensor

    @property
    def frequency(self) -> Tensor:
        """Fraction of samples that fire each latent in each stream encoded alone, [S, L]."""
        return self.latents_single.frequency

    def scores(self) -> dict[str, float | None]:
        """One number per metric of `METRICS`; None where it is undefined."""
        return {metric.key: _finite(metric.value(self)) for metric in METRICS}

    def to_dict(self) -> dict[str, Any]:
        """The summary numbers as plain JSON; undefined ones are null."""
        return {
            "streams": list(self.streams),
            "n_samples": self.n_samples,
            "n_latents": self.n_latents,
            "scores": self.scores(),
            "dead_latents": self.latents_single.dead,
            "active_per_sample": self.latents_single.active_per_sample,
            "retrieval": {
                f"{query} -> {candidate}": {key: _finite(value) for key, value in vars(found).items()}
                for (query, candidate), found in self.retrieval.items()
            },
            "nmse": self._matrix(self.nmse),
            "r2": self._matrix(self.r2),
        }

    def _matrix(self, matrix: Tensor) -> dict[str, float | None]:
        return {
            f"{source} -> {target}": _finite(float(matrix[s, t]))
            for s, source in enumerate(self.streams)
            for t, target in enumerate(self.streams)
        }


@torch.no_grad()
def evaluate(
    model: SPARC,
    inputs: Mapping[str, Tensor],
    labels: PerSample | None = None,
    *,
    groups: PerSample | None = None,
    batch_size: int = 1024,
) -> Evaluation:
    """Run every metric on paired inputs {stream: [N, D_s]}, row n being the same sample in each.

    The model runs in eval mode and without gradients, and is left as it was; batches are moved to its device. No
    tensor of size N x L or N x N is made.

    Args:
        inputs: of patch tokens, [N, T, D_s], each token is a sample.
        labels: the concepts each sample carries, bool [N, C] or [N], or its class, ids (-1: none) or names [N]: a
            tensor, array or list, a .npy file, or a column of a CSV, Parquet, Arrow or HDF5 file, "labels.csv:column"
            or (path, column), by default its only column or the one called "label". For [N, T, D_s] one a sample or
            one a token.
        groups: ids [N], given like labels, such as the image of a caption: in retrieval any sample of the query's
            group is right, the best of them counting, and equal rows of a group are one. By default a sample's own pair
            alone is.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    leading = _check_inputs(model, inputs, batch_size)
    inputs = {name: inputs[name].reshape(-1, width) for name, width in model.d_streams.items()}
    n_samples = len(inputs[model.streams[0]])
    truth = None if labels is None else as_labels(labels, leading)
    group_of = None if groups is None else as_groups(groups, leading)
    was_training = model.training
    model.eval()
    try:
        single, joint, errors = _run(model, inputs, n_samples, batch_size)
    finally:
        model.train(was_training)
    L = model.n_latents
    if truth is not None:
        truth = truth.to(errors.device)
    targets = [inputs[name] for name in model.streams]
    errors = errors.cpu()
    return Evaluation(
        streams=tuple(model.streams),
        n_samples=n_samples,
        n_latents=L,
        single_codes={name: (values.cpu(), indices.cpu()) for name, (values, indices) in single.items()},
        jaccard_single=None if truth is None else concept_jaccard(single, truth, L).cpu(),
        jaccard_chance=None if truth is None else concept_jaccard_by_chance(single, truth, L).cpu(),
        jaccard_joint=None if truth is None else concept_jaccard(joint, truth, L).cpu(),
        agreement=firing_agreement(single, L).cpu(),
        latents_single=latent_use(single, L),
        latents_joint=latent_use(joint, L),
        retrieval={
            (query, candidate): retrieval_scores(single[query], single[candidate], L, group_of)
            for query, candidate in permutations(model.streams, 2)
        },
        nmse=torch.stack([nmse_from_errors(errors[:, t], x.cpu()) for t, x in enumerate(targets)], dim=1),
        r2=torch.stack([r2_from_errors(errors[:, t], x.cpu()) for t, x in enumerate(targets)], dim=1),
    )


def _check_inputs(model: SPARC, inputs: Mapping[str, Tensor], batch_size: int) -> tuple[int, ...]:
    """The leading dimensions, which all streams share."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not isinstance(inputs, Mapping) or set(inputs) != set(model.streams):
        got = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(f"inputs must hold the streams {list(model.streams)}, got {got}")
    leading: tuple[int, ...] | None = None
    for name, width in model.d_streams.items():
        x = inputs[name]
        if not isinstance(x, Tensor):
            raise ValueError(f"inputs[{name!r}] must be a tensor [N, D={width}], got {type(x).__name__}")
        shape = tuple(x.shape)
        if leading is None:
            leading = shape[:-1]
        if not leading or shape != (*leading, width):
            others = ", ".join(map(str, leading[1:]))
            expected = f"[N={leading[0]}, {others + ', ' if others else ''}D={width}]" if leading else f"[N, D={width}]"
            raise ValueError(f"inputs[{name!r}] must be {expected}, got {list(shape)}")
    assert leading is not None  # a model has streams
    return leading


def _run(model: SPARC, inputs: Mapping[str, Tensor], n_samples: int, batch_size: int) -> tuple[Codes, Codes, Tensor]:
    """Single codes, joint codes, and squared errors [S, S, N] of decoding each single code to each stream."""
    S, device = len(model.streams), next(model.parameters()).device
    single: dict[str, list[StreamCode]] = {name: [] for name in model.streams}
    joint: dict[str, list[StreamCode]] = {name: [] for name in model.streams}
    errors = []
    for start in range(0, max(n_samples, 1), batch_size):
        batch = {name: inputs[name][start : start + batch_size].to(device) for name in model.streams}
        together = model.encode(batch)
        error = []
        for source in model.streams:
            alone = model.encode({source: batch[source]})
            joint[source].append(together.stream(source))
            single[source].append(alone.stream(source))
            for target in model.streams:
                error.append(squared_error(batch[target], model.decode(alone, source=source, target=target)))
        errors.append(torch.stack(error))
    return _concatenate(single), _concatenate(joint), torch.cat(errors, dim=1).reshape(S, S, -1)


def _concatenate(batches: Mapping[str, list[StreamCode]]) -> Codes:
    return {
        name: (torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts]))
        for name, parts in batches.items()
    }


Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """One number of an `Evaluation`: what it is called, means, and how it is written."""

    key: str
    name: str
    meaning: str
    better: Better
    format: str
    value: Callable[[Evaluation], float | None]


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else float(values.mean())


def _mean_alive(values: Tensor | None, use: LatentUse) -> float | None:
    return None if values is None else float(values[use.alive_in_any].mean())


def _retrieval(field: str) -> Callable[[Evaluation], float]:
    return lambda e: _average([getattr(found, field) for found in e.retrieval.values()])


def _own(matrix: Tensor) -> float:
    return float(matrix.diagonal().mean())


def _cross(matrix: Tensor) -> float:
    return float(matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)].mean())


def _average(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("jaccard_single", "Concept alignment",
           "How alike the labels are that a latent fires for in two streams, each encoded alone (Jaccard, 0 to "
           "1, over all latents, a dead one counting 0).", "higher", ".3f", lambda e: _mean(e.jaccard_single)),
    Metric("jaccard_single_alive", "Concept alignment, alive latents",
           "The same over the latents that fire in at least one stream.",
           "higher", ".3f", lambda e: _mean_alive(e.jaccard_single, e.latents_single)),
    Metric("jaccard_chance", "Concept alignment by chance",
           "The same after each stream's samples are shuffled: what firing often earns without any meaning.",
           "neither", ".3f", lambda e: _mean(e.jaccard_chance)),
    Metric("jaccard_joint", "Concept alignment, encoded jointly",
           "The same with all streams encoded together: a shared support makes it high by construction, even "
           "untrained.", "neither", ".3f", lambda e: _mean(e.jaccard_joint)),
    Metric("jaccard_joint_alive", "Concept alignment, encoded jointly, alive latents",
           "The same over the latents that fire in at least one stream.",
           "neither", ".3f", lambda e: _mean_alive(e.jaccard_joint, e.latents_joint)),
    Metric("agreement", "Firing agreement",
           "Of the samples that fire a latent in either of two streams, the fraction that fire it in both, each "
           "encoded alone, over alive latents.", "higher", ".3f", lambda e: _mean_alive(e.agreement, e.latents_single)),
    Metric("r1", "Retrieval R@1",
           "How often a sample's code in one stream is nearest to its own code in another, over all pairs.",
           "higher", ".3f", _retrieval("r1")),
    Metric("r5", "Retrieval R@5", "How often it is among the 5 nearest.", "higher", ".3f", _retrieval("r5")),
    Metric("r10", "Retrieval R@10", "How often it is among the 10 nearest.", "higher", ".3f", _retrieval("r10")),
    Metric("median_rank", "Retrieval median rank",
           "The rank at which half of the samples are found; 1 is best.", "lower", ",.1f", _retrieval("median_rank")),
    Metric("mrr", "Retrieval MRR", "Mean of 1 / rank.", "higher", ".3f", _retrieval("mrr")),
    Metric("nmse_self", "Own error (NMSE)",
           "Squared error of rebuilding a stream from its own code, as a fraction of its squared norm.",
           "lower", ".3f", lambda e: _own(e.nmse)),
    Metric("nmse_cross", "Cross error (NMSE)",
           "The same, from the code of another stream.", "lower", ".3f", lambda e: _cross(e.nmse)),
    Metric("r2_self", "Own variance explained (R²)",
           "Fraction of a stream's variance that its own code explains; 0 is what the mean scores.",
           "higher", ".3f", lambda e: _own(e.r2)),
    Metric("r2_cross", "Cross variance explained (R²)",
           "The same, from the code of another stream.", "higher", ".3f", lambda e: _cross(e.r2)),
    Metric("alive", "Latents alive in all streams",
           "Fraction of latents that some sample fires in every stream, each encoded alone.",
           "higher", ".1%", lambda e: e.latents_single.n_alive / e.n_latents),
    Metric("mixed", "Latents alive in some streams only",
           "Fraction of latents that cannot mean the same in all streams, being silent in some.",
           "lower", ".1%", lambda e: e.latents_single.n_mixed / e.n_latents),
    Metric("dead", "Latents dead in all streams",
           "Fraction of latents that no sample fires in any stream.",
           "lower", ".1%", lambda e: e.latents_single.n_dead / e.n_latents),
    Metric("active", "Active latents per sample",
           "Mean number of latents with a value above 0 (L0), over the streams.",
           "neither", ".1f", lambda e: _average(e.latents_single.active_per_sample.values())),
)
# fmt: on

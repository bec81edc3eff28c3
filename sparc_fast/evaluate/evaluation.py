"""All metrics of one model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparc_fast.sizes import is_integer

from .agreement import Agreement
from .codes import Codes
from .jaccard import Concepts
from .labels import PerSample, as_groups
from .latents import LatentUse
from .metrics import METRICS
from .passing import Run, Samples
from .reconstruction import Reconstructed
from .registry import Metric, Need, choose
from .resampling import RESAMPLES, Resampling, Z
from .retrieval import RETRIEVAL, Retrieval, drawn_retrieval, retrieval_scores

if TYPE_CHECKING:
    from ..model import SPARC

__all__ = ["Evaluation", "evaluate", "evaluate_raw", "half_width"]


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Metrics of one model on one set of samples, on the CPU.

    results: by each metric's key what it found; None where what it needs was missing. `evaluation["agreement"]` is one.
    Those of default metrics have names of their own too, which are None where a metric was not asked for. single_codes:
    each stream encoded alone, where a metric needs them; every metric is of these, but for those called joint (all
    streams encoded together, the SPARC paper's protocol). Whether streams agree is asked of the latents they share, the
    first n_shared of the model.
    """

    streams: tuple[str, ...]
    n_samples: int
    n_latents: int
    metrics: tuple[Metric, ...]
    results: Mapping[str, Any]
    single_codes: Codes = field(default_factory=dict)
    resampled: Mapping[str, Tensor] = field(default_factory=dict)
    """By each score's key its value in each resampling of the samples, float64 [B]."""
    drawn: str = "samples"
    """What is drawn in a resampling: "samples", or "groups" of them."""

    def __repr__(self) -> str:
        """The scores, one a line."""
        lines = [f"Evaluation of {self.n_latents:,} latents on {self.n_samples:,} samples of {', '.join(self.streams)}"]
        found = self.scores()
        for score in (score for metric in self.metrics for score in metric.scores):
            if (value := found[score.key]) is not None:
                lines.append(f"  {score.name}: {value:{score.format}}")
        return "\n".join(lines)

    def __getitem__(self, metric: str) -> Any:
        if metric not in self.results:
            raise KeyError(f"{metric!r} was not evaluated, only {', '.join(self.results)}")
        return self.results[metric]

    @property
    def jaccard_single(self) -> Tensor | None:
        """Of each latent that streams share, [L]; None without labels."""
        return None if (found := self._concepts()) is None else found.jaccard

    @property
    def jaccard_chance(self) -> Tensor | None:
        """The same of shuffled samples, [L]."""
        return None if (found := self._concepts()) is None else found.chance

    @property
    def alignment(self) -> Tensor | None:
        """The same corrected for chance, [L]: see `above_chance`."""
        return None if (found := self._concepts()) is None else found.of_latents

    @property
    def jaccard_joint(self) -> Tensor | None:
        """The same of codes of all streams together, [L]."""
        return None if (found := self._concepts("concepts_joint")) is None else found.jaccard

    @property
    def agreement(self) -> Tensor | None:
        """Firing agreement of each latent that streams share, [L]; None of one stream."""
        found: Agreement | None = self["agreement"]
        return None if found is None else found.of_latents

    @property
    def latents_single(self) -> LatentUse:
        """Which latents fire, and how often."""
        found: LatentUse = self["latents"]
        return found

    @property
    def frequency(self) -> Tensor:
        """Fraction of samples that fire each latent in each stream encoded alone, [S, L]."""
        return self.latents_single.frequency

    @property
    def retrieval(self) -> dict[tuple[str, str], Retrieval]:
        """By (query stream, candidate stream)."""
        return dict(self.results.get("retrieval") or {})

    @property
    def nmse(self) -> Tensor:
        """[S, S] by source (row) and target (column)."""
        found: Reconstructed = self["reconstruction"]
        return found.nmse

    @property
    def r2(self) -> Tensor:
        """[S, S] by source (row) and target (column)."""
        found: Reconstructed = self["reconstruction"]
        return found.r2

    def scores(self) -> dict[str, float | None]:
        """One number per score of its metrics; None where it is undefined."""
        found = {}
        for metric in self.metrics:
            result = self.results[metric.key]
            for score in metric.scores:
                value = None if result is None else score.value(result)
                found[score.key] = value if value is not None and math.isfinite(value) else None
        return found

    def intervals(self) -> dict[str, float | None]:
        """Half the width of each score's 95 % interval over samples: 1.96 standard deviations of its resampled values.

        It says what other samples of the same kind, or other groups where there are groups, would change; not what
        other training seeds would. In retrieval queries are drawn and candidates stay. None without resampling.
        """
        return {key: half_width(self.resampled.get(key)) for key in self.scores()}

    def to_dict(self) -> dict[str, Any]:
        """The summary numbers as plain JSON; undefined ones are null."""
        summary: dict[str, Any] = {
            "streams": list(self.streams),
            "n_samples": self.n_samples,
            "n_latents": self.n_latents,
            "scores": self.scores(),
            "names": {score.key: score.name for metric in self.metrics for score in metric.scores},
        }
        if self.resampled:
            summary["intervals"] = self.intervals()
        for metric in self.metrics:
            if metric.details is not None and (result := self.results[metric.key]) is not None:
                summary.update(_plain(metric.details(result)))
        return summary

    def _concepts(self, key: str = "concepts") -> Concepts | None:
        found: Concepts | None = self.results.get(key)
        return found


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def half_width(resampled: Tensor | None) -> float | None:
    """Of the 95 % interval of a score with these values in resamplings, [B]."""
    if resampled is None or len(resampled) < 2:
        return None
    width = Z * float(resampled.std())
    return width if math.isfinite(width) else None


@torch.no_grad()
def evaluate(
    model: SPARC,
    inputs: Samples,
    labels: PerSample | None = None,
    *,
    metrics: Sequence[str | Metric] | None = None,
    groups: PerSample | None = None,
    hierarchy: Any = None,
    train: Samples | None = None,
    train_labels: PerSample | None = None,
    batch_size: int = 1024,
    retrieval: bool = True,
    resamples: int = RESAMPLES,
    zero_rows: Literal["keep", "absent"] = "keep",
    memory: int | str = "4GiB",
    say: Callable[[str], object] | None = None,
) -> Evaluation:
    """Run metrics on paired inputs {stream: [N, D_s]}, row n being the same sample in each.

    The model runs in eval mode and without gradients, and is left as it was. Inputs pass once, a batch at a time on the
    model's device; sparse codes are kept, on the CPU. Time is linear in N but for retrieval, which compares all pairs.
    Where ranks share the model's latents, all of them call this with the same arguments, and all have the result: each
    encodes and decodes its share of every batch.

    Args:
        inputs: tensors or NumPy arrays; of patch tokens, [N, T, D_s], each token is a sample. Or files that
            `sparc_fast.data.open` opened, of which samples that lack a stream are left out; rows of one identifier,
            with ``repeated="all"``, are a group.
        labels: the concepts each sample carries, bool [N, C] or [N], or its class, ids (-1: none) or names [N]: a
            tensor, array or list, a .npy file, or a column of a CSV, Parquet, Arrow or HDF5 file, "labels.csv:column"
            or (path, column), by default its only column or the one called "label". For [N, T, D_s] one a sample or
            one a token.
        metrics: their names, keys of `METRICS`, or `Metric`s of your own; "all": all that these arguments allow; by
            default those that are marked so. What none of them needs is neither computed nor kept.
        groups: ids [N], given like labels, such as the image of a caption: in retrieval any sample of the query's
            group is right, the best of them counting, and equal rows of a group are one. By default a sample's own pair
            alone is.
        hierarchy: of the labels, for metrics that need one.
        train, train_labels: the training split, for metrics that learn something first; given like inputs and labels.
        retrieval: False leaves it out of the default metrics.
        resamples: how often samples, or groups where given, are drawn anew for the intervals; 0 leaves them out.
        zero_rows: samples of which a stream is 0 throughout are evaluated as they are, "keep", or left out, "absent".
        memory: bytes, or a size such as "8GiB", to take beside the model and the inputs, codes included.
        say: is told beforehand, in a sentence, when retrieval will take more than some seconds; by default it is
            written to standard error.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    from sparc_fast.model import SPARC, evaluating

    if not isinstance(model, SPARC):
        raise ValueError(f"model must be a SPARC, got {type(model).__name__}")
    if zero_rows not in ("keep", "absent"):
        raise ValueError(f'zero_rows must be "keep" or "absent", got {zero_rows!r}')
    if not is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if not is_integer(resamples) or resamples < 0 or resamples == 1:
        raise ValueError(f"resamples must be at least 2, or 0 for no intervals, got {resamples!r}")
    there: dict[Need, bool] = {"labels": labels is not None, "hierarchy": hierarchy is not None}
    there |= {"train": train is not None, "pairs": len(model.streams) > 1}
    chosen = choose(metrics, METRICS, there)
    if metrics is None and not retrieval:
        chosen = tuple(metric for metric in chosen if metric.key != "retrieval")
    both = [metric.key for metric in chosen if metric.needs >= {"train", "labels"}]
    if both and train is not None and train_labels is None and labels is not None:
        raise ValueError(f"train_labels must be given for {', '.join(both)}, got None")
    computed = [metric for metric in chosen if all(there.get(need, True) for need in metric.needs)]
    run = Run(model._shards.together(model), computed, batch_size, zero_rows, memory, resamples)
    with evaluating(model):
        given = run.given(inputs, labels, groups, say or partial(print, file=sys.stderr))
        given.hierarchy = hierarchy
        if train is not None and any("train" in metric.needs for metric in computed):
            given.train = replace(run, resamples=0).given(train, train_labels, None, given.say, "train_labels")
        seen = {metric.key: given.of_shared if metric.of_shared else given for metric in computed}
        results = {metric.key: metric.compute(seen[metric.key]) if metric in computed else None for metric in chosen}
        resampled: dict[str, Tensor] = {}
        varies = given.resampling is not None and given.resampling.units > 1 and given.n_samples > 0
        for metric in computed if varies else ():
            if metric.resample is not None and results[metric.key] is not None:
                resampled.update(metric.resample(seen[metric.key], results[metric.key]))
    return Evaluation(
        tuple(model.streams), given.n_samples, model.n_latents, chosen, results, given.single, resampled,
        "samples" if given.groups is None else "groups",
    )  # fmt: skip


@torch.no_grad()
def evaluate_raw(
    inputs: Mapping[str, Tensor], *, groups: PerSample | None = None, resamples: int = RESAMPLES
) -> Evaluation:
    """Retrieval by cosine of the inputs, {stream: [N, D_s]}, between all streams of one width; no other metric.

    It says something of streams in one space alone, such as CLIP's pictures and texts. It compares all pairs, in
    O(N² D) time.

    Raises:
        ValueError: no two streams have the same width.
    """
    widths = {name: x.shape[1] for name, x in inputs.items()}
    pairs = [(a, b) for a, b in permutations(inputs, 2) if widths[a] == widths[b]]
    if not pairs:
        raise ValueError(f"inputs must have two streams of one width, got {widths}")
    N = len(next(iter(inputs.values())))
    group_of = None if groups is None else as_groups(groups, (N,))
    found = {(a, b): retrieval_scores(inputs[a], inputs[b], groups=group_of) for a, b in pairs}
    resampled: Mapping[str, Tensor] = {}
    if resamples and N and (resampling := Resampling(N, resamples, group_of)).units > 1:
        resampled = drawn_retrieval(found, resampling)
    return Evaluation(
        tuple(inputs), N, 0, (RETRIEVAL,), {"retrieval": found}, {}, resampled,
        "samples" if groups is None else "groups",
    )  # fmt: skip

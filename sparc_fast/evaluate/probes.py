"""Linear and MLP probes: what can be read off a stream, its reconstructions, or its latents?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag, softplus

from sparc_fast.arrays import tensor_of

from . import codes as chunks
from .codes import StreamCode, by_latent, check_code, check_labels, parts
from .passing import InputsOnCPU, bytes_of_inputs
from .probe_1d import split_samples
from .reconstruction_retrieval import Decoded
from .registry import Given, Metric, Row, Score, Sizes
from .resampling import drawn_sums

__all__ = ["LINEAR_PROBES", "MLP_PROBES", "Probe", "average_precision", "linear_probe", "mlp_probe"]

HIDDEN, DROPOUT, MOST_WEIGHT = (256, 256), (0.3, 0.2), 10.0
HISTORY = 10  # gradients that L-BFGS keeps

Features = Tensor | StreamCode


@dataclass(frozen=True, eq=False)
class Probe:
    """How well each of C concepts is told for samples that the probe was not fitted on.

    average_precision, f1: float64 [C], nan for a concept that no such sample carries. base: float64 [C], the fraction
    that carry it, which is the average precision of a random order. classify: logits [n, C] of features alike.
    held_out: int64 [n], those samples. weight: of dense features by a linear probe, [D, C], what a logit gains for each
    unit of a feature; else None.
    """

    average_precision: Tensor
    f1: Tensor
    base: Tensor
    f1_micro: float
    """Over all pairs of a sample and a concept."""
    classify: Callable[[Features], Tensor]
    held_out: Tensor
    weight: Tensor | None = None

    @property
    def mean_average_precision(self) -> float:
        """mAP: over the concepts that some sample carries."""
        return float(self.average_precision.nanmean())

    @property
    def f1_macro(self) -> float:
        """Over the same."""
        return float(self.f1.nanmean())


def linear_probe(
    features: Features,
    labels: Tensor,
    n_latents: int | None = None,
    *,
    test_share: float = 0.2,
    groups: Tensor | None = None,
    strength: float = 1.0,
    steps: int = 100,
    seed: int = 0,
) -> Probe:
    """A logistic regression for each column of labels bool [N, C], of features [N, D] or a sparse code over n_latents.

    Each has the least sum of log-losses + |w|^2 / (2 strength), by L-BFGS of at most `steps` steps: scikit-learn's
    LogisticRegression(C=strength), of features that are first centred (not sparse ones) and divided by one number, so
    that their mean square is 1. A concept's F1 is at the threshold that is best in training. Samples, or whole groups,
    are split at random. Sparse features stay sparse; memory is bounded by fitting some concepts at a time.
    """
    data = _Data(features, labels, n_latents, test_share, groups, seed)
    labels = data.labels
    width, C = data.width, labels.shape[1]
    weight = torch.zeros(width, C, dtype=torch.float32, device=labels.device)
    bias = torch.zeros(C, dtype=torch.float32, device=labels.device)
    x = data.scaled(data.train)
    few = max(1, 8 * chunks.CHUNK_BYTES // (4 * ((2 * HISTORY + 6) * width + 4 * len(data.train) + 1)))
    for start in range(0, C, few):
        some = slice(start, start + few)
        weight[:, some], bias[some] = _logistic(x, width, labels[data.train, some].float(), strength, steps)

    def classify(given: Features) -> Tensor:
        return _times(data.scaled(features=given), weight) + bias

    found = data.judge(lambda rows, some: _times(data.scaled(rows), weight[:, some]) + bias[some], classify)
    return replace(found, weight=weight / data.scale) if data.is_dense else found


def mlp_probe(
    features: Features,
    labels: Tensor,
    n_latents: int | None = None,
    *,
    test_share: float = 0.2,
    groups: Tensor | None = None,
    epochs: int = 15,
    batch_size: int = 64,
    seed: int = 0,
) -> Probe:
    """As `linear_probe`, by the SPARC code's probe: 256 and 256 hidden units, ReLU, dropout of 0.3 and 0.2.

    Adam at 1e-3; a concept's n positives weigh (N - n) / n each, from 0.1 to 10, its negatives 1. Unlike there,
    latents are probed too, the split is the same for all features, and nothing is chosen on the test part. Of a sparse
    code only the rows of the first layer that a batch uses are touched.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    data = _Data(features, labels, n_latents, test_share, groups, seed)
    labels = data.labels
    device, C = labels.device, labels.shape[1]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        first = _FirstLayer(data)
        rest = nn.Sequential(
            nn.ReLU(), nn.Dropout(DROPOUT[0]), nn.Linear(*HIDDEN, dtype=torch.float32, device=device),
            nn.ReLU(), nn.Dropout(DROPOUT[1]), nn.Linear(HIDDEN[-1], max(C, 1), dtype=torch.float32, device=device),
        )  # fmt: skip
        positives = labels[data.train].sum(dim=0).float()
        heavier = ((len(data.train) - positives) / positives.clamp_min(1)).clamp(1 / MOST_WEIGHT, MOST_WEIGHT)
        kind = torch.optim.SparseAdam if first.is_sparse else torch.optim.Adam
        optimizers = [kind([first.weight], lr=1e-3), torch.optim.Adam([first.bias, *rest.parameters()], lr=1e-3)]
        for _ in range(epochs if C else 0):
            order = torch.randperm(len(data.train), device="cpu").to(device)
            for batch in torch.split(data.train[order], batch_size):
                logits = rest(first(data.scaled(batch)))[:, :C]
                loss = binary_cross_entropy_with_logits(logits, labels[batch].float(), pos_weight=heavier)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                for optimizer in optimizers:
                    optimizer.step()  # type: ignore[no-untyped-call]
    rest.eval()

    @torch.no_grad()
    def logits_of(x: Features) -> Tensor:
        logits: Tensor = rest(first(x))[:, :C]
        return logits

    found = torch.zeros(len(labels), C, dtype=torch.float32, device=device)
    for some in torch.split(torch.arange(len(labels), device=device), 4096):
        found[some] = logits_of(data.scaled(some))
    return data.judge(lambda rows, some: found[rows, some], lambda given: logits_of(data.scaled(features=given)))


def _times(x: Features, weight: Tensor, sparse: bool = False) -> Tensor:
    """[n, columns] of weight [width, columns]; `sparse`: with gradients of the rows that a code uses alone."""
    if isinstance(x, Tensor):
        return x @ weight
    if weight.shape[1] == 0:
        return weight.new_zeros(len(x[0]), 0)
    found: Tensor = embedding_bag(x[1], weight, per_sample_weights=x[0], mode="sum", sparse=sparse)
    return found


def _turned(x: Features, width: int) -> Callable[[Tensor], Tensor]:
    """What multiplies the transpose with [n, columns]."""
    if isinstance(x, Tensor):
        return lambda grad: x.T @ grad
    offsets, samples, values = by_latent(x, width)
    of = samples.long()
    return lambda g: embedding_bag(of, g, offsets, per_sample_weights=values, mode="sum", include_last_offset=True)


class _Data:
    """Features and labels, split, and how features are scaled."""

    def __init__(
        self,
        features: Features,
        labels: Tensor,
        n_latents: int | None,
        test_share: float,
        groups: Tensor | None,
        seed: int,
    ) -> None:
        features, labels = tensor_of(features), tensor_of(labels)
        self.is_dense = isinstance(features, Tensor)
        if isinstance(features, Tensor):
            if features.dim() != 2 or not features.is_floating_point():
                raise ValueError(f"features must be [N, D], got {features.dtype} {list(features.shape)}")
        else:
            if n_latents is None:
                raise ValueError("n_latents must be given where features are a sparse code, got None")
            check_code(features, n_latents, "features")
        self.features, self.labels = features, labels
        values = (features if isinstance(features, Tensor) else features[0]).detach()
        (N, self.row_width), device = values.shape, labels.device
        check_labels(labels, N)
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must be between 0 and 1, got {test_share}")
        part = split_samples(N, (1 - test_share, test_share), groups, seed).to(device)
        self.train, self.test = ((part == p).nonzero()[:, 0] for p in (0, 1))
        self.mean = torch.zeros((), dtype=torch.float64, device=device)
        if isinstance(features, Tensor):
            self.width = self.row_width
            self.mean = self.mean.expand(self.width).clone()
            for rows in parts(len(self.train), 16 * self.width):
                self.mean += values[self.train[rows]].double().sum(dim=0)
            self.mean /= max(len(self.train), 1)
        else:
            fires = torch.zeros(int(n_latents or 0), dtype=torch.bool, device=device)
            for rows in parts(len(self.train), 16 * self.row_width):
                fires[features[1][self.train[rows]][values[self.train[rows]] > 0].long()] = True
            self.place = torch.where(fires, fires.long().cumsum(0) - 1, -1)  # dead in training: without a weight
            self.width = int(fires.sum())
        squares, n = 0.0, 0
        for rows in parts(len(self.train), 16 * self.row_width):
            own = values[self.train[rows]].double() - self.mean
            squares += float((own if self.is_dense else own.relu()).square().sum())
            n += int(own.numel() if self.is_dense else (own > 0).sum())
        self.scale = (squares / n) ** 0.5 if squares else 1.0
        if not squares < float("inf"):
            raise ValueError("features must be finite, got NaN or inf")

    def scaled(self, rows: Tensor | slice = slice(None), features: Features | None = None) -> Features:
        """Some samples, of other features where given; of a code the latents that fire in training, by their place."""
        features = self.features if features is None else features
        if isinstance(features, Tensor) != self.is_dense:
            raise ValueError("features must be dense or sparse as those that the probe was fitted on")
        if isinstance(features, Tensor):
            return (features[rows].detach().float() - self.mean.float()) / self.scale
        values, indices = features[0][rows].detach().float().relu() / self.scale, self.place[features[1][rows].long()]
        if self.width == 0:
            return values.new_zeros(len(values), 0)
        return values.masked_fill(indices < 0, 0), indices.clamp_min(0)

    def judge(self, logits: Callable[[Tensor, slice], Tensor], classify: Callable[[Features], Tensor]) -> Probe:
        """By logits of (samples, concepts) in both parts."""
        C, device = self.labels.shape[1], self.labels.device
        ap, f1 = (torch.full((C,), torch.nan, dtype=torch.float64, device=device) for _ in range(2))
        hits = predicted = carried = 0
        for some in parts(C, 64 * max(len(self.train), len(self.test))):
            truth = self.labels[self.test, some]
            threshold = _best_threshold(logits(self.train, some), self.labels[self.train, some])
            scores = logits(self.test, some)
            ap[some] = average_precision(scores, truth)
            chosen = scores >= threshold
            both, either = (chosen & truth).sum(dim=0), chosen.sum(dim=0) + truth.sum(dim=0)
            f1[some] = torch.where(truth.any(dim=0), 2 * both / either.clamp_min(1).double(), torch.nan)
            hits, predicted, carried = hits + int(both.sum()), predicted + int(chosen.sum()), carried + int(truth.sum())
        base = self.labels[self.test].sum(dim=0, dtype=torch.float64) / max(len(self.test), 1)
        micro = 2 * hits / (predicted + carried) if carried else float("nan")
        return Probe(ap, f1, base, micro, classify, self.test)


class _FirstLayer(nn.Module):
    """A linear layer whose gradient is sparse where its input is."""

    def __init__(self, data: _Data) -> None:
        super().__init__()
        inputs = data.width if data.is_dense else min(data.width, data.row_width)
        bound = max(inputs, 1) ** -0.5  # torch.nn.Linear's, for as many inputs as are on
        shape, device = (data.width, HIDDEN[0]), data.labels.device
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape[1], dtype=torch.float32, device=device).uniform_(-bound, bound))
        self.is_sparse = not data.is_dense and data.width > 0

    def forward(self, x: Features) -> Tensor:
        return _times(x, self.weight, sparse=self.is_sparse) + self.bias


@torch.no_grad()
def _logistic(x: Features, width: int, y: Tensor, strength: float, steps: int) -> tuple[Tensor, Tensor]:
    """Weights [width, C] and biases [C] of the regressions on y [n, C]."""
    if strength <= 0 or steps < 1:
        raise ValueError(f"strength must be > 0 and steps at least 1, got {strength} and {steps}")
    n, C = y.shape
    turned_times = _turned(x, width)
    weight, bias = (torch.zeros(size, dtype=torch.float32, device=y.device) for size in ((width, C), (C,)))
    if n == 0 or C == 0:
        return weight, bias
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=steps,
        history_size=HISTORY,
        tolerance_grad=1e-6 / C,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        logits = _times(x, weight) + bias
        residual = (logits.sigmoid() - y) / n
        weight.grad = turned_times(residual).add_(weight, alpha=1 / (strength * n))
        bias.grad = residual.sum(dim=0)
        loss = (softplus(logits) - logits * y).sum(dtype=torch.float64) / n
        return loss + weight.double().square().sum() / (2 * strength * n)

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight, bias


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Area under precision by recall of each column, float64 [C]; nan without a positive. scores, truth bool [n, C].

    sum over positives of the precision among all that score at least as high, / the positives: samples of equal scores
    come together, so that constant scores earn the base rate.
    """
    positives, taken, hits, _ = _curve(scores, truth)
    found = torch.where(truth.gather(0, taken[1]), hits / (taken[0] + 1), 0).sum(dim=0)
    return torch.where(positives > 0, found / positives.clamp_min(1), torch.nan)


def drawn_average_precision(scores: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """`average_precision` of one concept, each sample there as often as drawn, float64 [b]; nan without a positive.

    scores [n], truth bool [n], weights float32 [n, b].
    """
    ordered, order = scores.sort(descending=True)
    level = torch.unique_consecutive(ordered, return_inverse=True)[1]  # of equal scores
    carried = truth[order]
    some = torch.unique_consecutive(level[carried])
    run = torch.searchsorted(some, level)  # what is taken to reach each level with a positive, beyond the one before
    first = torch.arange(len(some), device=scores.device)
    positives, all_ = (
        drawn_sums(order[kept], torch.searchsorted(run[kept], first), weights) for kept in (carried, run < len(some))
    )
    hits = positives.cumsum(dim=0)
    found = (positives * hits / all_.cumsum(dim=0).clamp_min(1)).sum(dim=0, dtype=torch.float64)
    return found / positives.sum(dim=0, dtype=torch.float64)


def _best_threshold(scores: Tensor, truth: Tensor) -> Tensor:
    """The score of each column from which on F1 is best, the highest of several; infinite without a positive."""
    if len(scores) == 0:
        return torch.full((scores.shape[1],), torch.inf, dtype=scores.dtype, device=scores.device)
    positives, taken, hits, ordered = _curve(scores, truth)
    best = (2 * hits / (taken[0] + 1 + positives)).argmax(dim=0, keepdim=True)
    return torch.where(positives > 0, ordered.gather(0, best)[0], torch.inf)


def _curve(scores: Tensor, truth: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Positives [C]; and with the scores of each column falling: (the last place of equal scores, the sample), the
    positives up to there, float64, and the scores, each [n, C]."""
    ordered, order = scores.sort(dim=0, descending=True, stable=True)
    n = len(scores)
    place = torch.arange(n, device=scores.device)[:, None].expand(scores.shape)
    last = torch.ones_like(truth)
    last[:-1] = ordered[1:] != ordered[:-1]
    ends = torch.where(last, place, n).flip(0).cummin(dim=0).values.flip(0) if n else place
    hits = truth.gather(0, order).cumsum(dim=0).double()
    return truth.sum(dim=0), (ends, order), hits.gather(0, ends), ordered


def _features(given: Given, key: str, of: tuple[str, str, str], samples: slice | Tensor = slice(None)) -> Features:
    """Of (what, source, target): "raw" inputs and "latents" of a stream, and what one's code "recon"structs."""
    what, source, target = of
    if what == "raw":
        inputs: InputsOnCPU = given.watched[key]
        return inputs.stream(target)[samples]
    values, indices = given.single[source]
    if what == "latents":
        return values[samples], indices[samples]
    rows = Decoded(given.model, (values[samples], indices[samples]), source, target)
    some = [rows[part].cpu().float() for part in parts(len(rows), 64 * rows.shape[1])]
    return torch.cat(some) if some else torch.zeros(rows.shape, dtype=torch.float32, device="cpu")


Found = Mapping[tuple[str, str, str], Probe]
"""By what `_features` are of."""
OF = {"raw": "the inputs of {t}", "latents": "the latents of {t}", "recon": "{t} as the {s} code reconstructs it"}
SCORED = {
    "latents": ("latents", "latents"),
    "raw": ("raw", "inputs"),
    "recon": ("own reconstructions", "what a stream's own code reconstructs"),
    "cross_recon": ("cross reconstructions", "what another stream's code reconstructs"),
}


def _suffix(of: tuple[str, str, str]) -> str:
    what, source, target = of
    return what if source == target else f"cross_{what}"


def _work(sizes: Sizes) -> int:
    """Features of one stream, decoded and scaled; a code by latent; logits; what fitting some concepts takes."""
    return 16 * sizes.N * sizes.D + 32 * sizes.N * sizes.k + 13 * sizes.N * sizes.C + 24 * chunks.CHUNK_BYTES


def _metric(kind: str, fit: Callable[..., Probe], meaning: str, work: Callable[[Sizes], int]) -> Metric:
    """Probes of one kind on all features there are."""
    name = kind.lower()
    key = f"{name}_probes"

    def compute(given: Given) -> Found:
        found = {}
        for target in given.streams:
            recon = [("recon", source, target) for source in given.streams]
            for of in [("raw", target, target), ("latents", target, target), *recon]:
                n_latents = given.n_latents if of[0] == "latents" else None
                found[of] = fit(_features(given, key, of), given.concepts, n_latents, groups=given.groups)
        return found

    def resample(given: Given, found: Found) -> Mapping[str, Tensor]:
        """Held-out samples are drawn, and ranked by the probe as it was fitted."""
        drawn: dict[str, list[Tensor]] = {}
        for of, probe in found.items():
            truth, resampling = given.concepts[probe.held_out], given.draws[probe.held_out]
            logits = probe.classify(_features(given, key, of, probe.held_out))
            total, n = resampling.zeros(), resampling.zeros()
            for some, weights in resampling.pieces(16 * len(truth)):
                for concept in truth.any(dim=0).nonzero()[:, 0].tolist():
                    one = drawn_average_precision(logits[:, concept], truth[:, concept], weights)
                    total[some] += one.nan_to_num()
                    n[some] += one.isfinite()
            drawn.setdefault(_suffix(of), []).append(total / n)
        return {f"{name}_probe_{suffix}": torch.stack(values).mean(dim=0) for suffix, values in drawn.items()}

    def details(found: Found) -> Mapping[str, Any]:
        figures = {
            f"{what} {source} -> {target}" if what == "recon" else f"{what} {target}": {
                "map": one.mean_average_precision,
                "f1_macro": one.f1_macro,
                "f1_micro": one.f1_micro,
            }
            for (what, source, target), one in found.items()
        }
        return {key: figures}

    def rows(models: Mapping[str, Found]) -> Iterator[Row]:
        for of in next(iter(models.values())):
            found = {model: by_features[of] for model, by_features in models.items()}
            cells = {
                model: f"{one.mean_average_precision:.3f} · {one.f1_macro:.3f} / {one.f1_micro:.3f}"
                for model, one in found.items()
            }
            what = OF[of[0]].format(s=of[1], t=of[2])
            section = f"{kind} probes: mAP · macro / micro F1"
            yield Row(what[:1].upper() + what[1:], f"A probe on {what}.", "higher", cells, section)

    def score(suffix: str) -> Score:
        def mean(found: Found) -> float:
            values = [probe.mean_average_precision for of, probe in found.items() if _suffix(of) == suffix]
            return sum(values) / len(values) if values else float("nan")

        features, what = SCORED[suffix]
        return Score(
            f"{name}_probe_{suffix}",
            f"{kind} probe on {features}, mAP",
            f"Mean average precision over concepts of a {'MLP' if kind == 'MLP' else name} probe on {what}, on samples "
            "that it was not fitted on.",
            better="neither" if suffix == "raw" else "higher",
            value=mean,
        )

    return Metric(
        key,
        meaning,
        compute,
        tuple(map(score, SCORED)),
        needs=frozenset({"single", "labels"}),
        watch=InputsOnCPU,
        resample=resample,
        details=details,
        rows=rows,
        kept=bytes_of_inputs,
        work=work,
    )


LINEAR_PROBES = _metric(
    "Linear",
    linear_probe,
    "Linear probes for all concepts on inputs, latents, and reconstructions from own and other codes, held out.",
    _work,
)
MLP_PROBES = _metric(
    "MLP",
    mlp_probe,
    "The same by the SPARC code's probe, an MLP of two hidden layers.",
    lambda sizes: _work(sizes) + 4 * 4 * HIDDEN[0] * sizes.L,
)

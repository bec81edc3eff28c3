"""1-D probes: how well does the best single latent tell a concept?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .codes import ByLatent, StreamCode, by_latent, check_code, check_labels
from .registry import Better, Given, Metric, Score, Sizes

__all__ = ["PROBE_1D", "PROBE_1D_SPARC_PAPER", "Probe1D", "probe_1d", "split_samples"]

SHARES = (0.7, 0.15, 0.15)  # of training, validation, test
NEWTON_STEPS, PRECISE = 100, 1e-10
Protocol = Literal["held_out", "sparc_paper"]


@dataclass(frozen=True, eq=False)
class Probe1D:
    """Of each concept probed, [P]: its column of labels, the latent chosen (-1: none fires), and the held-out log-loss.

    0 is perfect, log 2 = 0.693 is what telling nothing scores, as there are as many positives as negatives.
    """

    concepts: Tensor
    latents: Tensor
    log_loss: Tensor
    held_out: tuple[tuple[Tensor, Tensor], ...] = ()
    """Of each concept the samples [n] that log_loss is the mean of, and that of each, [n]."""

    @property
    def mean(self) -> float:
        """Over the concepts; nan where none is frequent enough."""
        return float(self.log_loss.mean())


def probe_1d(
    code: StreamCode,
    labels: Tensor,
    n_latents: int,
    *,
    groups: Tensor | None = None,
    fewest: int = 50,
    n_candidates: int = 20,
    protocol: Protocol = "held_out",
    seed: int = 0,
) -> Probe1D:
    """The best latent's logistic regression for each concept of more than `fewest` samples; labels bool [N, C].

    Samples, or whole groups, are split 70 : 15 : 15 once for all concepts; in each part there are as many negatives as
    positives, at random. The `n_candidates` latents whose firing rates of positives and negatives differ most in the
    training part are fitted there, the one of least log-loss on the validation part is chosen, and its log-loss on the
    test part is the score (as in Gao et al., arXiv 2406.04093, who try all latents). Activations are
    divided by their root mean square, so that the regression's penalty, w^2 / 2, weighs alike for large and small ones.

    protocol="sparc_paper" is that of the SPARC paper's published figures, for comparison with them alone: candidates
    are the latents that fire most often for positives of all samples, those of the test part too, and so are those
    that always fire; activations are as they are; each concept has a split of its own, and groups are not kept
    together. (It draws other samples than they did.)
    """
    check_code(code, n_latents)
    N = len(code[0])
    check_labels(labels, N)
    if protocol not in get_args(Protocol):
        raise ValueError(f'protocol must be "held_out" or "sparc_paper", got {protocol!r}')
    if fewest < 1 or n_candidates < 1:
        raise ValueError(f"fewest and n_candidates must be at least 1, got {fewest} and {n_candidates}")
    published = protocol == "sparc_paper"
    entries = by_latent(code, n_latents)
    shared = None if published else split_samples(N, SHARES, groups, seed).to(labels.device)
    frequent = (labels.sum(dim=0) > fewest).nonzero()[:, 0]
    row = torch.full((N,), -1, dtype=torch.int64, device=labels.device)
    chosen = torch.full(frequent.shape, -1, dtype=torch.int64, device=labels.device)
    losses = torch.zeros(frequent.shape, dtype=torch.float64, device=labels.device)
    held_out = []
    for place, concept in enumerate(frequent.tolist()):
        carried = labels[:, concept]
        generator = torch.Generator(device="cpu").manual_seed(seed * 1_000_003 + concept)
        if shared is None:
            samples, part = _balanced_then_split(carried, generator)
        else:
            samples, part = _split_then_balanced(carried, shared, generator)
        train = samples[part == 0]
        positives, negatives = (_fire(code, train[carried[train] == truth], n_latents) for truth in (True, False))
        worth = _fire(code, carried.nonzero()[:, 0], n_latents) if published else (positives - negatives).abs()
        worth = worth.masked_fill(positives + negatives == 0, -1)
        order = worth.argsort(descending=True, stable=True)[:n_candidates]
        candidates = order[worth[order] >= 0]
        row[samples] = torch.arange(len(samples), device=row.device)
        x = _activations(entries, candidates, row, len(samples))
        row[samples] = -1
        y = carried[samples].double()
        if not published:
            rms = x[:, part == 0].square().mean(dim=1, keepdim=True).sqrt()
            x = x / rms.where(rms > 0, 1)
        fit = _fit(x[:, part == 0], y[part == 0])
        validation, test = (_log_losses(x[:, part == p], y[part == p], fit) for p in (1, 2))
        each = torch.full_like(y[part == 2], math.log(2))
        if len(candidates):
            best = int(validation.mean(dim=1).nan_to_num(torch.inf).argmin())
            chosen[place], each = candidates[best], test[best]
        losses[place] = each.mean()
        held_out.append((samples[part == 2], each))
    return Probe1D(frequent, chosen, losses, tuple(held_out))


def split_samples(n: int, shares: tuple[float, ...], groups: Tensor | None = None, seed: int = 0) -> Tensor:
    """The part of each of n samples, int64 [n], 0, 1, ... with these shares, at random; a group's are in one part."""
    if min(shares, default=0) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares must be > 0 and add up to 1, got {shares}")
    if groups is not None and (groups.shape != (n,) or groups.is_floating_point()):
        raise ValueError(f"groups must be integers [N={n}], got {groups.dtype} {list(groups.shape)}")
    unit = torch.arange(n, device="cpu") if groups is None else torch.unique(groups.cpu(), return_inverse=True)[1]
    units = int(unit.max()) + 1 if n else 0
    ends = torch.tensor(shares, dtype=torch.float64, device="cpu").cumsum(0) * units
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(units, generator=generator, device="cpu")
    return torch.searchsorted(ends.round().long(), order, right=True).clamp_max(len(shares) - 1)[unit]


def _split_then_balanced(carried: Tensor, parts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples, as many negatives as positives in each part, and the part of each."""
    found, of = [], []
    for part in range(len(SHARES)):
        both = [((parts == part) & (carried == truth)).nonzero()[:, 0] for truth in (True, False)]
        n = min(map(len, both))
        found += [_draw(samples, n, generator) for samples in both]
        of.append(torch.full((2 * n,), part, dtype=torch.int64, device=carried.device))
    return torch.cat(found), torch.cat(of)


def _balanced_then_split(carried: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same, the other way round: all positives and as many negatives, each split by itself."""
    both = [(carried == truth).nonzero()[:, 0] for truth in (True, False)]
    n = min(map(len, both))
    shares = torch.tensor(SHARES, dtype=torch.float64, device="cpu").cumsum(0) * n
    part = torch.searchsorted(shares.round().long(), torch.arange(n, device="cpu"), right=True).to(carried.device)
    return torch.cat([_draw(samples, n, generator) for samples in both]), torch.cat([part, part])


def _draw(samples: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return samples[torch.randperm(len(samples), generator=generator, device="cpu")[:n].to(samples.device)]


def _fire(code: StreamCode, samples: Tensor, n_latents: int) -> Tensor:
    """How many of some samples fire each latent, [L]."""
    values, indices = code[0][samples], code[1][samples]
    return torch.bincount(indices[values > 0], minlength=n_latents)


def _activations(entries: ByLatent, latents: Tensor, row: Tensor, n: int) -> Tensor:
    """float64 [latents, n]: of the samples whose row is not -1."""
    x = torch.zeros(len(latents), n, dtype=torch.float64, device=row.device)
    for i, latent in enumerate(latents.tolist()):
        some = slice(int(entries.offsets[latent]), int(entries.offsets[latent + 1]))
        at = row[entries.samples[some].long()]
        x[i, at[at >= 0]] = entries.values[some][at >= 0].double()
    return x


def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of x, w and b of least w^2 / 2 + the sum of log-losses, by Newton's method, [rows, 1] each."""
    w, b = (torch.zeros(len(x), 1, dtype=torch.float64, device=x.device) for _ in range(2))
    loss = _penalised(x, y, w, b)
    for _ in range(NEWTON_STEPS):
        p = (w * x + b).sigmoid()
        slack = p * (1 - p)
        g_w, g_b = ((p - y) * x).sum(dim=1, keepdim=True) + w, (p - y).sum(dim=1, keepdim=True)
        h_ww, h_wb = (slack * x * x).sum(dim=1, keepdim=True) + 1, (slack * x).sum(dim=1, keepdim=True)
        h_bb = slack.sum(dim=1, keepdim=True) + 1e-12
        determinant = h_ww * h_bb - h_wb * h_wb
        step_w, step_b = (g_w * h_bb - g_b * h_wb) / determinant, (g_b * h_ww - g_w * h_wb) / determinant
        size = torch.ones_like(w)
        for _ in range(30):  # halved until it does not climb
            tried = _penalised(x, y, w - size * step_w, b - size * step_b)
            worse = tried > loss + 1e-12 * (1 + loss.abs())
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        w, b, loss = w - size * step_w, b - size * step_b, tried
        if not ((size * torch.maximum(step_w.abs(), step_b.abs())) > PRECISE).any():
            break
    return w, b


def _penalised(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    t = w * x + b
    return (softplus(t) - t * y).sum(dim=1, keepdim=True) + w * w / 2


def _log_losses(x: Tensor, y: Tensor, fit: tuple[Tensor, Tensor]) -> Tensor:
    """Of each row's fit for each column."""
    t = fit[0] * x + fit[1]
    return softplus(t) - t * y


def _metric(protocol: Protocol, key: str, meaning: str, score: str, told: str, better: Better) -> Metric:
    def compute(given: Given) -> dict[str, Probe1D]:
        """By stream."""
        return {
            name: probe_1d(code, given.concepts, given.n_latents, groups=given.groups, protocol=protocol)
            for name, code in given.single.items()
        }

    def resample(given: Given, found: Mapping[str, Probe1D]) -> Mapping[str, Tensor]:
        """Held-out samples are drawn; what was fitted and chosen stays."""
        total = given.draws.zeros()
        for one in found.values():
            drawn = [given.draws.means(each, samples) for samples, each in one.held_out]
            total += torch.stack(drawn).nanmean(dim=0) if drawn else torch.nan
        return {key: total / len(found)}

    return Metric(
        key,
        meaning,
        compute,
        (Score(key, score, told, better, value=lambda found: sum(one.mean for one in found.values()) / len(found)),),
        needs=frozenset({"single", "labels"}),
        resample=resample,
        details=lambda found: {key: {name: one.mean for name, one in found.items()}},
        work=_work,
    )


def _work(sizes: Sizes) -> int:
    """A stream's code once more, and the activations of candidates for all samples."""
    return 8 * sizes.N * sizes.k + 500 * sizes.N + 64 * sizes.L


PROBE_1D = _metric(
    "held_out",
    "probe_1d",
    "1-D probes: how well the best latent of each stream, encoded alone, tells each concept of more than 50 samples.",
    "1-D probe, held-out log-loss",
    "Log-loss of the best latent's logistic regression for each concept, on samples that neither it nor the latent was "
    "chosen by: 0 is perfect, 0.693 is chance.",
    "lower",
)
PROBE_1D_SPARC_PAPER = _metric(
    "sparc_paper",
    "probe_1d_sparc_paper",
    "The same by the SPARC paper's protocol, whose candidates are the latents that fire most often for a concept.",
    "1-D probe, log-loss as in the SPARC paper",
    "The same with candidates that fire most often for the concept in all samples, tested ones too.",
    "neither",
)

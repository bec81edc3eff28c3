"""Interventions: take a latent out of one stream's code, or set it, and see what another stream makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparc_fast.arrays import tensor_of
from sparc_fast.codes import SparseLatents

from .codes import CHUNK_BYTES, StreamCode, check_code, check_codes, parts
from .dictionary import Dictionary, directions
from .passing import InputsOnCPU, bytes_of_inputs
from .probes import linear_probe
from .purity import class_purity
from .registry import Batch, Given, Metric, Score, Sizes, details_by_pair, mean_over_pairs, rows_by_pair
from .resampling import Bags, firing_entries, latent_blocks

if TYPE_CHECKING:
    from sparc_fast.model import SPARC

__all__ = ["ABLATIONS", "PROBE_ABLATIONS", "Ablations", "Intervention", "intervene", "probe_effects"]


class Ablations:
    """What taking each latent out of one stream's code does to the reconstruction of another, for all latents at once.

    As decoding is linear, x_hat without latent l is x_hat - z[l] d[l], and with the residual r = x - x_hat

        |x - x_hat + z[l] d[l]|^2 - |r|^2 = 2 z[l] r . d[l] + z[l]^2 |d[l]|^2,

    so that L ablations of N samples cost N k D, not N L D. Samples come a batch at a time.
    """

    def __init__(self, dictionary: Tensor | Dictionary) -> None:
        """dictionary [L, D]: what a unit of each latent adds to the reconstruction, see `dictionary_of`."""
        self.dictionary = dictionary if isinstance(dictionary, Dictionary) else Dictionary(dictionary)
        self.n = 0
        (L, D), rows = self.dictionary.shape, self.dictionary.rows
        self._moved, self._worse = (torch.zeros(L, dtype=torch.float64, device=rows.device) for _ in range(2))
        squares = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for some in parts(len(rows), 16 * D):
            squares[some] = rows[some].detach().double().square().sum(dim=1)
        self._squares = self.dictionary.of_each(squares)
        self.fired = torch.zeros(L, dtype=torch.int64, device=rows.device)
        """How many samples fire each latent, [L]: of the others nothing is taken out."""

    @torch.no_grad()
    def add(self, code: StreamCode, residual: Tensor) -> Tensor:
        """code: of n samples, in the source stream. residual [n, D]: the target's inputs - what is decoded from it.

        Returns float32 [n, k]: by how much each sample's squared error grows without each of its latents.
        """
        L, D = self.dictionary.shape
        check_code(code, L)
        values, indices = code
        if residual.shape != (len(values), D):
            raise ValueError(f"residual must be [N={len(values)}, D={D}], got {list(residual.shape)}")
        grown = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
        for rows in parts(len(values), 8 * values.shape[1] * (D + 8)):
            latents, z = indices[rows].long().clamp_min(0), values[rows].double().relu()
            along = self.dictionary.along(latents, residual[rows]).double()
            moved = z * z * self._squares[latents]
            self._moved.scatter_add_(0, latents.flatten(), moved.flatten())
            worse = 2 * z * along + moved
            self._worse.scatter_add_(0, latents.flatten(), worse.flatten())
            grown[rows] = worse.float()
            self.fired += torch.bincount(latents[z > 0], minlength=L)
        self.n += len(values)
        return grown

    @property
    def moved(self) -> Tensor:
        """Mean squared change of the reconstruction over all samples, float64 [L]."""
        return self._moved / max(self.n, 1)

    @property
    def worse(self) -> Tensor:
        """By how much the mean squared error grows, float64 [L]; below 0 where the target is better off without it."""
        return self._worse / max(self.n, 1)

    @property
    def faithful(self) -> Tensor:
        """worse / moved, [L]: what the target gains by a latent, of what the latent does to it; nan where it is dead.

        1 where the rest of the reconstruction leaves exactly the latent's part to it, 0 where it could be twice or
        nothing, below 0 where it points away from what is missing: then the latent means something else there.
        """
        return torch.where(self._moved > 0, self._worse / self._moved.where(self._moved > 0, 1), torch.nan)

    @property
    def helpful(self) -> float:
        """Of the latents that fire, the fraction without which the target is worse; nan where none does."""
        return float((self._worse > 0)[self.fired > 0].double().mean())


@dataclass(frozen=True, eq=False)
class Intervention:
    """Of each of N samples, float64: before and after a latent was set in the source stream.

    moved [N]: the squared change of the target's reconstruction. error_before, error_after [N]: its squared error,
    None where the target's inputs were not given. logits_before, logits_after [N, C]: a probe's, None without one.
    """

    moved: Tensor
    error_before: Tensor | None
    error_after: Tensor | None
    logits_before: Tensor | None
    logits_after: Tensor | None


@torch.no_grad()
def intervene(
    model: SPARC,
    codes: SparseLatents,
    latent: int,
    value: float,
    source: str,
    target: str,
    *,
    truth: Tensor | None = None,
    probe: Callable[[Tensor], Tensor] | None = None,
) -> Intervention:
    """Set a latent to a value in the code of the source stream, 0 to take it out, and decode the target stream.

    codes: of N samples. truth [N, D]: the target's inputs in the units of `model.decode`. probe: takes reconstructions
    [n, D] and gives logits [n, C], such as `Probe.classify` of one fitted on the target's inputs.
    """
    N, D, truth = len(codes), model.d_streams[target], tensor_of(truth)
    if len(codes.shape) != 1:
        raise ValueError(f"codes must be of N samples, got {list(codes.shape)}")
    if truth is not None and truth.shape != (N, D):
        raise ValueError(f"truth must be [N={N}, D={D}], got {list(truth.shape)}")
    moved: list[Tensor] = []
    errors: tuple[list[Tensor], list[Tensor]] = [], []
    logits: tuple[list[Tensor], list[Tensor]] = [], []
    for rows in parts(N, 64 * D) if N else [slice(0, 0)]:
        some = codes[rows]
        both = [model.decode(c, source, target).double() for c in (some, some.set(latent, value, source))]
        moved.append((both[1] - both[0]).square().sum(dim=1))
        for when, x_hat in enumerate(both):
            if truth is not None:
                errors[when].append((truth[rows].double() - x_hat).square().sum(dim=1))
            if probe is not None:
                logits[when].append(probe(x_hat.float()).double())
    return Intervention(torch.cat(moved), *(torch.cat(found) if found else None for found in (*errors, *logits)))


@torch.no_grad()
def probe_effects(
    code: StreamCode, dictionary: Tensor | Dictionary, weight: Tensor, concepts: Tensor
) -> tuple[Tensor, Tensor]:
    """What taking each latent out does to a linear probe on the target: mean fall of logits over samples that fire it.

    (that of the latent's own concept, that of all other concepts on average), float64 [L] each; nan for a dead latent
    or one without a concept. dictionary [L, D] of the target, weight [D, C] of `linear_probe` on it, and concepts [L]
    the column each latent stands for in the source, -1 for none, such as `class_purity`'s. Exact, as all is linear.
    """
    known = dictionary if isinstance(dictionary, Dictionary) else Dictionary(dictionary)
    (L, D), C, device = known.shape, weight.shape[1], known.rows.device
    check_codes({"code": code}, L)
    if concepts.shape != (L,) or weight.shape[0] != D:
        raise ValueError(
            f"weight and concepts must be [D={D}, C] and [L={L}], got {list(weight.shape)} and {list(concepts.shape)}"
        )
    total, fired = (torch.zeros(L, dtype=torch.float64, device=device) for _ in range(2))
    for rows in parts(len(code[0]), 40 * code[0].shape[1]):
        latents, z = code[1][rows].long().clamp_min(0).flatten(), code[0][rows].double().relu().flatten()
        total.scatter_add_(0, latents, z)
        fired.scatter_add_(0, latents, (z > 0).double())
    mean = torch.where((concepts >= 0) & (fired > 0), total / fired.clamp_min(1), torch.nan)
    own, others = (torch.full((len(known.rows),), torch.nan, dtype=torch.float64, device=device) for _ in range(2))
    columns = concepts[known.here].clamp_min(0)
    for rows in parts(len(known.rows), 16 * (C + D)):
        effects = known.rows[rows].double() @ weight.double()
        if C:
            own[rows] = effects.gather(1, columns[rows, None])[:, 0]
            others[rows] = (effects.sum(dim=1) - own[rows]) / (C - 1) if C > 1 else torch.nan
    return mean * known.of_each(own), mean * known.of_each(others)


class _Watch:
    """Every latent taken out of every stream's code, for every stream, a batch at a time."""

    def __init__(self, given: Given) -> None:
        known = {name: directions(given.model, name) for name in given.streams}
        self.found = {(s, t): Ablations(known[t]) for s in given.streams for t in given.streams}
        self._grown: dict[tuple[str, str], list[Tensor]] = {pair: [] for pair in self.found}

    def see(self, batch: Batch) -> None:
        for (source, target), found in self.found.items():
            residual = batch.truth[target] - batch.decoded(source, target)
            grown = found.add(batch.alone[source].stream(source), residual)
            if batch.weights is not None:
                self._grown[source, target].append(grown.cpu())

    def grown(self, source: str, target: str, like: Tensor) -> Tensor:
        """What `Ablations.add` returned of all samples, in the shape of their code [N, k]; once, it is not kept."""
        found = torch.zeros(like.shape, dtype=torch.float32, device="cpu")
        start = 0
        for some in self._grown.pop((source, target)):
            found[start : start + len(some), : some.shape[1]] = some
            start += len(some)
        return found


def _compute(given: Given) -> dict[tuple[str, str], Ablations]:
    """By (source, target)."""
    found: dict[tuple[str, str], Ablations] = given.watched["ablations"].found
    return found


def _resample(given: Given, found: Mapping[tuple[str, str], Ablations]) -> Mapping[str, Tensor]:
    """What each latent does to each sample is summed anew, and the median latent of each resampling its own."""
    resampling, watched, L = given.draws, given.watched["ablations"], given.n_latents
    S = len(given.streams)
    helpful, own, faithful = (resampling.zeros() for _ in range(3))
    for source, code in given.single.items():
        grown = [watched.grown(source, target, code[0]) for target in given.streams]
        norms = [found[source, target]._squares.float().cpu() for target in given.streams]
        for some, weights in resampling.pieces(4 * (S + 4) * L):
            b = weights.shape[1]
            part = torch.zeros(S, L, b, dtype=torch.float32, device="cpu")
            helps = torch.zeros(S, b, dtype=torch.float64, device="cpu")
            alive = torch.zeros(b, dtype=torch.int64, device="cpu")
            for latents in latent_blocks([code], L, resampling, 1 + S // 4):
                keys, (z, *worse) = firing_entries(code, latents, resampling.chunk_bytes, code[0], *grown)
                bags = Bags.of(keys, latents, resampling.n)
                fired, energy = bags.drawn(weights) > 0, bags.drawn(weights, z.square())
                alive += fired.sum(dim=0)
                for t, (each, norm) in enumerate(zip(worse, norms, strict=True)):
                    grows, moved = bags.drawn(weights, each), energy * norm[latents, None]
                    helps[t] += (fired & (grows > 0)).sum(dim=0)
                    part[t, latents] = torch.where(moved > 0, grows / moved, torch.nan)
            for t, target in enumerate(given.streams):
                if target == source:
                    own[some] += helps[t] / alive / S
                else:
                    helpful[some] += helps[t] / alive / (S * (S - 1))
                    faithful[some] += part[t].nanmedian(dim=0).values.double() / (S * (S - 1))
    of_own = {"ablation_helpful_own": own}
    return of_own if S == 1 else {"ablation_helpful": helpful, "ablation_faithful": faithful, **of_own}


def _faithful(found: Ablations) -> float:
    return float(found.faithful.nanmedian())


def _figures(found: Ablations) -> dict[str, float]:
    return {"helpful": found.helpful, "faithful": _faithful(found)}


def _kept(sizes: Sizes) -> int:
    """Dictionaries and sums; for resampling, what each latent does to each sample."""
    grown = 4 * sizes.N * sizes.k * sizes.S * (sizes.S + 1) if sizes.B else 0
    return 4 * sizes.L * sizes.D + 32 * sizes.S**2 * sizes.L + 2 * CHUNK_BYTES + grown


ABLATIONS = Metric(
    "ablations",
    "Each latent taken out of one stream's code, encoded alone: is the reconstruction of another stream worse?",
    _compute,
    (
        Score(
            "ablation_helpful",
            "Latents that help another stream",
            "Of the latents that fire in one stream, the fraction without which another stream's reconstruction from "
            "that code has a larger error, over all pairs.",
            format=".1%",
            value=mean_over_pairs("helpful", own=False),
        ),
        Score(
            "ablation_faithful",
            "What a latent is worth to another stream",
            "By how much another stream's error grows when a latent is taken out, of how far that moves the "
            "reconstruction: 1 is all of it, below 0 it means something else there; the median latent.",
            value=mean_over_pairs(_faithful, own=False),
        ),
        Score(
            "ablation_helpful_own",
            "Latents that help their own stream",
            "The same fraction for the stream that was encoded.",
            format=".1%",
            value=mean_over_pairs("helpful", own=True),
        ),
    ),
    needs=frozenset({"single"}),
    watch=_Watch,
    resample=_resample,
    details=details_by_pair("ablations", _figures),
    rows=rows_by_pair(
        "Latents taken out: worse without / right",
        "Latents of the {source} code without which the {target} reconstruction is worse / how much of what the median "
        "latent does is right.",
        lambda one: f"{one.helpful:.1%} / {_faithful(one):.3f}",
    ),
    kept=_kept,
)


def _compute_with_probe(given: Given) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """By (source, target): `probe_effects` of the source's latents on a linear probe on the target's inputs."""
    inputs: InputsOnCPU = given.watched["probe_ablations"]
    purity = class_purity(given.single, given.concepts, given.n_latents)
    concepts = dict(zip(given.streams, purity.concept, strict=True))
    found = {}
    for target in given.streams:
        weight = linear_probe(inputs.stream(target), given.concepts, groups=given.groups).weight
        dictionary = directions(given.model, target).to("cpu")
        assert weight is not None  # of dense features
        for source in given.streams:
            found[source, target] = probe_effects(given.single[source], dictionary, weight, concepts[source])
    return {pair: found[pair] for pair in permutations(given.streams, 2)}


def _resample_with_probe(given: Given, found: Mapping[tuple[str, str], tuple[Tensor, Tensor]]) -> Mapping[str, Tensor]:
    """Activations are averaged over the samples that are drawn; the probe and the latents' concepts stay.

    Whether a latent lowers its own concept most is up to those alone, whatever samples are drawn, and so how many do
    has no interval: it would take a probe for each resampling.
    """
    resampling, L = given.draws, given.n_latents
    if not found:
        return {}
    once = torch.ones(resampling.n, 1, dtype=torch.float32, device="cpu")
    falls = resampling.zeros()
    for source, code in given.single.items():
        more = torch.stack([own - others for (of, _), (own, others) in found.items() if of == source])
        fall, n = (torch.zeros(len(more), resampling.n_resamples, dtype=torch.float64, device="cpu") for _ in range(2))
        for latents in latent_blocks([code], L, resampling):
            keys, (z,) = firing_entries(code, latents, resampling.chunk_bytes, code[0])
            bags = Bags.of(keys, latents, resampling.n)
            mean = bags.drawn(once, z) / bags.drawn(once)
            known = ~more[:, latents].isnan()
            each = torch.where(known, more[:, latents], 0)
            for some, weights in resampling.pieces(24 * len(mean)):
                fired = bags.drawn(weights)
                drawn = bags.drawn(weights, z) / fired.clamp_min(1)
                fall[:, some] += each @ (drawn / mean.where(mean > 0, 1)).double()
                n[:, some] += known.double() @ (fired > 0).double()
        falls += (fall / n).sum(dim=0) / len(found)
    return {"probe_ablation_fall": falls}


def _own_concept(found: Mapping[tuple[str, str], tuple[Tensor, Tensor]]) -> float:
    """Of latents with a concept, over all pairs of streams."""
    falls = [(own > others)[~(own - others).isnan()].double() for own, others in found.values()]
    return float(torch.cat(falls).mean()) if falls else float("nan")


def _fall(found: Mapping[tuple[str, str], tuple[Tensor, Tensor]]) -> float:
    falls = [(own - others).nanmean() for own, others in found.values()]
    return float(torch.stack(falls).mean()) if falls else float("nan")


def _work(sizes: Sizes) -> int:
    """What the linear probe takes, a dictionary, and the counts of some labels."""
    probe = 16 * sizes.N * sizes.D + 13 * sizes.N * sizes.C + 24 * CHUNK_BYTES
    return probe + 4 * sizes.L * sizes.D + 64 * sizes.S**2 * sizes.L


PROBE_ABLATIONS = Metric(
    "probe_ablations",
    "Each latent taken out of one stream's code: does a linear probe on another stream lose the latent's own concept?",
    _compute_with_probe,
    (
        Score(
            "probe_ablation_own",
            "Latents that carry their concept to another stream",
            "Of the latents with a dominant concept in one stream, the fraction that lower its logit of a linear probe "
            "on another stream's inputs by more than those of other concepts when they are taken out; chance is half.",
            format=".1%",
            value=_own_concept,
        ),
        Score(
            "probe_ablation_fall",
            "Fall of a concept's logit in another stream",
            "By how much that logit falls more than those of other concepts, on average.",
            value=_fall,
        ),
    ),
    needs=frozenset({"single", "labels"}),
    watch=InputsOnCPU,
    resample=_resample_with_probe,
    kept=bytes_of_inputs,
    work=_work,
)

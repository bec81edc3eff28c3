"""Feature recovery: of streams made from a known dictionary, does a model find its features, at one latent in all?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from .codes import Codes

__all__ = ["Recovery", "SyntheticStreams", "feature_recovery", "synthetic_streams"]


@dataclass(frozen=True, eq=False)
class SyntheticStreams:
    """inputs {stream: [N, D_s]} = the sum of each sample's features, times its strengths, + noise.

    features {stream: [G, D_s]}: rows of norm 1; feature g is the same concept in all streams, in a direction of its own
    in each. codes {stream: (values, indices), [N, k]}: which features a sample has, the same in all streams, and how
    strong each is in this one.
    """

    inputs: dict[str, Tensor]
    features: dict[str, Tensor]
    codes: Codes

    @property
    def labels(self) -> Tensor:
        """Which features each sample has, bool [N, G]."""
        values, indices = next(iter(self.codes.values()))
        n_features = len(next(iter(self.features.values())))
        has = torch.zeros(len(values), n_features, dtype=torch.bool, device=values.device)
        return has.scatter_(1, indices, True)


def synthetic_streams(
    d_streams: Mapping[str, int],
    n_samples: int,
    n_features: int,
    k: int,
    *,
    skew: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> SyntheticStreams:
    """Streams that share features: each sample has k of n_features at random, in every stream.

    Feature g is drawn with a weight of (g + 1)^-skew: 0, all as often; 1, Zipf's law. In each stream on its own it has
    a random direction and, in each sample, a strength between 0.5 and 1.5. noise: its standard deviation, times that
    of the sum of features, over all dimensions. Float32, on the CPU.
    """
    if not 1 <= k <= n_features:
        raise ValueError(f"k must be between 1 and n_features={n_features}, got {k}")
    if not d_streams or min(d_streams.values()) < 1:
        raise ValueError(f"d_streams must hold widths >= 1, got {dict(d_streams)}")
    if skew < 0 or noise < 0:
        raise ValueError(f"skew and noise must be at least 0, got {skew} and {noise}")
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    log_weights = -skew * torch.arange(1, n_features + 1, dtype=torch.float32, device="cpu").log()
    rows = [  # the k largest of log weight + Gumbel noise are draws without replacement
        (log_weights - (-uniform(len(some), n_features).clamp_min(1e-30).log()).log()).topk(k).indices
        for some in torch.split(torch.arange(n_samples, device="cpu"), max(1, 2**24 // n_features))
    ]
    indices = torch.cat(rows) if n_samples else torch.zeros(0, k, dtype=torch.int64, device="cpu")
    inputs, features, codes = {}, {}, {}
    for name, width in d_streams.items():
        directions = normal(n_features, width)
        directions /= directions.norm(dim=1, keepdim=True)
        values = 0.5 + uniform(n_samples, k)
        x = torch.nn.functional.embedding_bag(indices, directions, per_sample_weights=values, mode="sum")
        deviation = (k * 13 / 12 / width) ** 0.5  # of a dimension: strengths have a mean square of 13 / 12
        inputs[name] = x + noise * deviation * normal(n_samples, width)
        features[name], codes[name] = directions, (values, indices)
    return SyntheticStreams(inputs, features, codes)


@dataclass(frozen=True, eq=False)
class Recovery:
    """Cosines of G true features with the latents that recover them, float64.

    best {stream: [G]}: with the latent nearest to each in this stream, whatever it is in others or for other features.
    matched {stream: [G]}: with one latent for each feature, no latent for two. joint [S, G]: in each stream, with one
    latent for each feature that is the same in all streams; which, is latents [G], -1 where there are too few.
    """

    streams: tuple[str, ...]
    best: dict[str, Tensor]
    matched: dict[str, Tensor]
    joint: Tensor
    latents: Tensor

    @property
    def mean_max(self) -> float:
        """Mean max cosine similarity, over features and streams."""
        return float(torch.stack(list(self.best.values())).mean())

    @property
    def mean_matched(self) -> float:
        """The same one to one, in each stream by itself."""
        return float(torch.stack(list(self.matched.values())).mean())

    @property
    def mean_joint(self) -> float:
        """The same one to one, at the same latent in all streams: what aligned latents alone reach."""
        return float(self.joint.mean())

    def recovered(self, cosine: float = 0.9) -> float:
        """The fraction of features that one latent recovers in all streams, each with this cosine at least."""
        return float((self.joint >= cosine).all(dim=0).double().mean())


def feature_recovery(dictionaries: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Recovery:
    """Compare dictionaries {stream: [L, D_s]} with the true features {stream: [G, D_s]} by cosine.

    The mean max cosine similarity of Sharkey, Braun and Millidge (2022, "Taking features out of superposition with
    sparse autoencoders"); one to one by the assignment of the largest sum (Jonker and Volgenant 1987, SciPy), and
    jointly by that of the largest sum over all streams. Chance is not 0, but about sqrt(2 log L / D). Memory is G L.

    Raises:
        ImportError: SciPy is not installed.
    """
    if find_spec("scipy") is None:
        raise ImportError("matching features needs SciPy: pip install 'sparc_fast[evaluate]'")
    if not dictionaries or set(dictionaries) != set(features):
        raise ValueError(f"dictionaries must hold the streams {list(features)}, got {list(dictionaries)}")
    sizes = {(len(dictionaries[name]), len(features[name])) for name in dictionaries}
    widths = {name: (tuple(dictionaries[name].shape[1:]), tuple(features[name].shape[1:])) for name in dictionaries}
    if len(sizes) > 1 or any(len(mine) != 1 or mine != true for mine, true in widths.values()):
        raise ValueError(f"dictionaries and features must be [L, D] and [G, D] of each stream, got {sizes}, {widths}")
    L, G = next(iter(sizes))
    total = torch.zeros(G, L, dtype=torch.float64, device="cpu")
    best, matched = {}, {}
    for name in dictionaries:
        cosines = _cosines(features[name], dictionaries[name])
        total += cosines
        best[name] = cosines.amax(dim=1) if L else cosines.new_zeros(G)
        matched[name] = _taken(cosines, _assign(cosines))
    latents = _assign(total)
    joint = [_taken(_cosines(features[name], dictionaries[name]), latents) for name in dictionaries]
    return Recovery(tuple(dictionaries), best, matched, torch.stack(joint), latents)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """float64 [len(a), len(b)], on the CPU; 0 of a row of zeros."""
    unit = [x.detach().cpu().double() for x in (a, b)]
    unit = [x / x.norm(dim=1, keepdim=True).where(x.any(dim=1, keepdim=True), 1) for x in unit]
    return unit[0] @ unit[1].T


def _assign(cosines: Tensor) -> Tensor:
    """A column for each row, of the largest sum, int64 [rows]; -1 where there are fewer columns than rows."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    found = torch.full((len(cosines),), -1, dtype=torch.int64, device="cpu")
    found[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found


def _taken(cosines: Tensor, columns: Tensor) -> Tensor:
    """The cosine of each row with its column, 0 without one."""
    if cosines.shape[1] == 0:
        return cosines.new_zeros(len(cosines))
    return torch.where(columns >= 0, cosines.gather(1, columns.clamp_min(0)[:, None])[:, 0], 0)

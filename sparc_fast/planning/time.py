"""How long a training step takes: what it cannot do without, at a machine's roofs."""

from __future__ import annotations

from collections.abc import Mapping

from sparc_fast.training.config import Config

from .memory import FLOAT, Sizes
from .roofline import Cost

# floor ÷ measured step, each from one run, at N 1024, L 8192 and at N 256, L 32768, D 2560, float32, two cores:
# 0.77 and 0.72 on Zen 4, 0.52 and 0.76 on Zen 5 (benchmarks/NOTES.md, "Where it stands"); this is their mean
CPU_EFFICIENCY = 0.7


def step_costs(
    config: Config, d_streams: Mapping[str, int], product: str = "float32", ranks: int = 1
) -> dict[str, Cost]:
    """The phases of a step, one after another, and what each cannot do without; latents are used evenly.

    Args:
        d_streams: name -> width.
        product: the type in which the encoder may multiply.
        ranks: that share the latents evenly; the work is that of one, without what it waits for the others.
    """
    sizes = Sizes(config, d_streams, ranks=ranks)
    S, N, L, D, w = sizes.S, sizes.rows, sizes.L, sizes.D, sizes.weight
    turns = config.accumulate  # in each, all weights are read and, if there are several, their gradients added up
    matrix, batch, gradient = L * D * w, N * D * w, sizes.P * N * D * S * sizes.gradient
    # of a matrix; private latents have those of their stream alone
    weights = L * D - sum(count * (D - width) for count, _, width in sizes.private) / ranks

    def used(n: int) -> float:
        """The part of the latents that n samples use."""
        return 1 - (1 - min(1.0, (sizes.k_mean + sizes.slots) / (L * ranks))) ** (n * sizes.supports)

    # numbers of the rows that a batch's supports name, those of private latents whole and in their stream
    shared, private = N * sizes.k_mean * D / ranks, N * sizes.slots * D / ranks
    own = N * sum(quota * width for _, quota, width in sizes.private) / ranks
    kept = 2 * (2 * sizes.moment + FLOAT) + (w if w < FLOAT else 0)  # bytes of a weight read and written
    # rows left behind are gone through twice when they are used
    decoder = used(N) * (2 - used(N)) if config.lazy else 1.0
    moved = weights * kept * (1 + decoder)
    if turns > 1:
        moved += turns * 4 * 2 * L * D * FLOAT  # written, and read to be added to what is read and written
    return {
        "choosing the support: x W_encᵀ": Cost(2 * N * weights, turns * weights * w + batch, product),
        "values, reconstructions, their gradient": Cost(
            2 * (shared + private) * (1 + 2 * S),
            2 * turns * used(sizes.N) * matrix + batch + gradient,
            gathered=2 * (shared + private) * w,
        ),
        "updating the weights": Cost(
            2 * shared * (1 + S) + 4 * own, moved + batch + gradient, gathered=((1 + S) * shared + 2 * own) * w
        ),
    }

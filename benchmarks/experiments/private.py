"""What do private latents give? ``python -m benchmarks.experiments.private``.

The demo's training on the built-in glyphs with all of k shared, and with some of it each stream's own; then, on
characters kept from training, the errors of streams encoded alone and together, and what the demo's table says. A line
each; ``python -m benchmarks --op rules`` says what they cost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from sparc_fast import SPARC
from sparc_fast.demo.experiment import Settings
from sparc_fast.demo.glyphs import Glyphs, glyphs
from sparc_fast.evaluate import evaluate
from sparc_fast.training.in_memory import train

SPLITS = ((1024, 12, 0, 0), (1024, 10, 64, 2), (1024, 8, 128, 4), (640, 8, 0, 0))
"""L, k, and each stream's own latents and how many of them fire; the last is the shared part of the one before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure each; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.private", description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    given, data = parser.parse_args(argv), glyphs()
    for seed in given.seeds:
        for L, k, own, own_k in SPLITS:
            print(
                f"seed {seed}, L {L}, k {k}, own {own}, {own_k}: {measured(data, seed, L, k, own, own_k)}", flush=True
            )
    return 0


def measured(data: Glyphs, seed: int, n_latents: int, k: int, own: int, own_k: int) -> str:
    """Errors of streams encoded alone and together, each from itself and from others, and the scores."""
    settings, streams = Settings(seed=seed), data.inputs
    training, held_out = data.rows(held_out=False), data.rows(held_out=True, face="regular")
    private = dict.fromkeys(streams, own) if own else None
    torch.manual_seed(seed)
    widths = {name: x.shape[1] for name, x in streams.items()}
    model = SPARC(widths, n_latents, k, private=private, private_k=own_k or None, dead_after=settings.dead_after)
    known = {name: x[training] for name, x in streams.items()}
    model.calibrate(known)
    train(
        model, known, steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, support_dropout=0.5,
        seed=seed,
    )  # fmt: skip
    unseen = {name: x[held_out] for name, x in streams.items()}
    found = evaluate(model.eval(), unseen, data.labels[held_out], resamples=0)
    with torch.no_grad():
        together = model.loss(unseen)
    dead = (found.frequency == 0).all(0)
    scores = ", ".join(f"{key} {value:.4f}" for key, value in found.scores().items() if value is not None)
    return (
        f"together {float(together.self):.4f} {float(together.cross or 0):.4f}, "
        f"dead {int(dead[: model.n_shared].sum())} shared {int(dead[model.n_shared :].sum())} private, {scores}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Training curves with Adam's moments in float32 and in bfloat16 beside each other, on the built-in glyphs.

``python -m benchmarks.experiments.moments_curve --json moments.json --plot moments.png`` trains the demo's model
(global TopK, both losses, no dropout) with each for some seeds, a minute or two on one core. Both see the same batches
from the same weights, and the held-out characters give a loss at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

import torch

from sparc_fast import SPARC, data
from sparc_fast.demo import Settings
from sparc_fast.files import atomic_path
from sparc_fast.training.in_memory import train

Moments = Literal["float32", "bfloat16"]
MOMENTS: tuple[Moments, ...] = ("float32", "bfloat16")
LAST = 0.05  # the part of the steps whose mean loss is the final one


@dataclass(frozen=True)
class Curve:
    moments: str
    seed: int
    step: list[float]
    loss: list[float]
    final: float
    """The mean loss of the last steps."""
    held_out: float
    """The loss of the held-out characters at the end."""


def curve(glyphs: data.Glyphs, moments: Moments, settings: Settings) -> Curve:
    """Train once, and keep every step's self + cross loss: AuxK comes and goes with the first dead latent."""
    torch.manual_seed(settings.seed)
    seen, held_out = (
        {name: x[glyphs.rows(held_out=held)] for name, x in glyphs.inputs.items()} for held in (False, True)
    )
    widths = {name: x.shape[1] for name, x in glyphs.inputs.items()}
    model = SPARC(widths, settings.n_latents, settings.k, dead_after=settings.dead_after)
    model.calibrate(seen)
    curves = train(
        model, seen, steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr,
        auxk_coef=settings.auxk_coef, moments=moments, seed=settings.seed, curve_points=settings.steps,
    )  # fmt: skip
    with torch.no_grad():
        loss = float(model.loss(held_out, auxk_coef=0.0).total)
    losses = [self + cross for self, cross in zip(curves["self"], curves["cross"], strict=True)]
    final = mean(losses[-max(1, round(LAST * len(losses))) :])
    return Curve(moments, settings.seed, curves["step"], losses, final, loss)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.moments_curve", description=__doc__)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each type (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the curves")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw them (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.seeds < 1:
        parser.error(f"--steps and --seeds must be at least 1, got {arguments.steps} and {arguments.seeds}")
    settings, glyphs, curves = Settings(steps=arguments.steps), data.glyphs(), []
    for seed in range(arguments.seeds):
        for moments in MOMENTS:
            curves.append(curve(glyphs, moments, replace(settings, seed=seed)))
            print(
                f"{moments:9} seed {seed}: loss {curves[-1].final:.5f}, held out {curves[-1].held_out:.5f}", flush=True
            )
    if arguments.json:
        record = {"settings": asdict(settings), "curves": [asdict(c) for c in curves]}
        with atomic_path(arguments.json) as temporary:
            temporary.write_text(json.dumps(record) + "\n")
    if arguments.plot:
        from ..tools.plot import plot_curves

        with atomic_path(arguments.plot) as temporary:
            plot_curves([(f"{c.moments} moments", c.seed, c.step, c.loss) for c in curves], temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())

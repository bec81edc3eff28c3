"""What a step of each selection rule takes of the processor, beside one of global TopK:
``python -m benchmarks.experiments.rule_steps``.

CPU time of the process, in turns, so that other work on the machine and a slow spell hit all alike. Weights are
untrained, k is 64, streams are of 1024, 768 and 768, samples Gaussian and new in every step. The learning rate is 0: a
step does all its work, and every rule keeps the L0 that it begins with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from sparc_fast import SPARC, SparcAdam
from sparc_fast.selection import RULES

WIDTHS = {"a": 1024, "b": 768, "c": 768}
SHAPES = {"A": (1024, 8192), "B": (256, 32768)}
WARM = 3  # steps before any is timed


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a shape and rule; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.rule_steps", description=__doc__)
    parser.add_argument("rules", nargs="*", help="beside global; by default batch and jumprelu")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="(N, L) = %(choices)s; by default all")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each that are timed (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    arguments = parser.parse_args(argv)
    rules = ["global", *(arguments.rules or ["batch", "jumprelu"])]
    if set(rules) - set(RULES) or arguments.rounds < 1:
        parser.error(f"rules must be of {RULES}, and --rounds at least 1, got {vars(arguments)}")
    torch.set_num_threads(arguments.threads)
    for shape in arguments.shape or SHAPES:
        N, L = SHAPES[shape]
        generator = torch.Generator(device="cpu").manual_seed(0)

        def batch(n: int = N, generator: torch.Generator = generator) -> dict[str, torch.Tensor]:
            return {
                name: torch.randn(n, width, generator=generator, dtype=torch.float32, device="cpu")
                for name, width in WIDTHS.items()
            }

        optimizers = {}
        for rule in rules:
            torch.manual_seed(0)
            model = SPARC(WIDTHS, L, 64, selection=rule, auxk=0)
            model.calibrate(batch())
            optimizers[rule] = SparcAdam(model, 0.0)
        taken: dict[str, list[float]] = {rule: [] for rule in rules}
        l0: dict[str, float] = {}
        for step in range(WARM + arguments.rounds):
            inputs = batch()
            for rule, optimizer in optimizers.items():
                begun = time.process_time()
                loss = optimizer.step(inputs)
                if step >= WARM:
                    taken[rule].append(time.process_time() - begun)
                l0[rule] = 64.0 if loss.l0 is None else float(loss.l0)
        for rule in rules:
            ratio = statistics.median(a / b for a, b in zip(taken[rule], taken["global"], strict=True))
            seconds = statistics.median(taken[rule])
            print(f"N {N}, L {L}, {rule}: {seconds:.3f} s of CPU, {ratio:.2f} x global, L0 {l0[rule]:.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

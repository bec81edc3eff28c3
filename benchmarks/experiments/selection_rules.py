"""All selection rules beside each other at equal L0: ``python -m benchmarks.experiments.selection_rules``.

The demo's model and settings on the built-in glyphs, but for the rule, which gives a stream k latents of a sample, on
average where the rule says so; then the evaluation of held-out characters, each stream encoded alone. A line a run, and
the table in Markdown. A minute or two a run on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from sparc_fast import SPARC, data
from sparc_fast.demo import Settings
from sparc_fast.evaluate import comparison, evaluate
from sparc_fast.evaluate.formats import as_markdown
from sparc_fast.training.in_memory import train

SETTINGS = Settings()
L, K = SETTINGS.n_latents, SETTINGS.k
RULES: dict[str, dict[str, Any]] = {
    "global": {},
    "local": {"selection": "local"},
    "batch": {"selection": "batch"},
    "jumprelu": {"selection": "jumprelu"},
    "local_jumprelu": {"selection": "local_jumprelu"},
    "global, nested": {"matryoshka": (L // 16, L // 4, L // 2, L)},
    "batch, nested": {"selection": "batch", "matryoshka": (L // 16, L // 4, L // 2, L)},
    "global, private": {"k": K - 2, "private": dict.fromkeys(("sans", "serif", "name"), L // 16), "private_k": 2},
}
SCORES = ["alignment", "agreement", "r1", "nmse_self", "nmse_cross", "dead", "mixed", "active"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train and evaluate; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.selection_rules", description=__doc__)
    parser.add_argument("rules", nargs="*", help=f"of {', '.join(map(repr, RULES))}; by default all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="(%(default)s)")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.rules if name not in RULES]
    if unknown or arguments.seeds < 1 or arguments.steps < 1:
        parser.error(f"rules must be of {tuple(RULES)}, --seeds and --steps at least 1, got {vars(arguments)}")
    glyphs = data.glyphs()
    seen, held = glyphs.rows(held_out=False), glyphs.rows(held_out=True, face="regular")
    inputs, others = ({name: x[rows] for name, x in glyphs.inputs.items()} for rows in (seen, held))
    found = {}
    for name in arguments.rules or RULES:
        runs = []
        for seed in range(arguments.seeds):
            started = time.process_time()
            torch.manual_seed(seed)
            settings = {"k": K, "dead_after": SETTINGS.dead_after, **RULES[name]}
            model = SPARC({stream: x.shape[1] for stream, x in inputs.items()}, L, **settings)
            model.calibrate(inputs)
            dropout = 0.0 if "local" in name else 0.5  # each stream chooses its own there
            train(
                model, inputs, steps=arguments.steps, batch_size=SETTINGS.batch_size, lr=SETTINGS.lr,
                auxk_coef=SETTINGS.auxk_coef, support_dropout=dropout, seed=seed,
            )  # fmt: skip
            runs.append(evaluate(model.eval(), others, glyphs.labels[held]))
            cells = {row.key: row.cells[name] for row in comparison({name: runs[-1]}) if row.key in SCORES}
            print(name, seed, f"{time.process_time() - started:.0f} s of CPU", cells, flush=True)
        found[name] = runs
    table = comparison(found)
    table[:] = [row for row in table if row.key in SCORES]
    print(as_markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What do nested dictionaries cost, and give? ``python -m benchmarks.experiments.nested glyphs --sizes 64 256``.

The same short training with one dictionary and with nested ones (`matryoshka`), under each rule of selection named, on
the samples of `support_dropout`; then, on samples kept from training, what the whole dictionary is worth, and every
prefix of it: the first latents that both kinds of model fire, as training measures them, and `model.prefix`, which
chooses as many latents among the first as the model does among all. A line each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import fmean

import torch

from sparc_fast import SPARC
from sparc_fast.evaluate import evaluate
from sparc_fast.training.in_memory import train

from .support_dropout import Case, case_of


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure every case; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="nested", description=__doc__)
    parser.add_argument("cases", nargs="+", help="digits, glyphs, or NAME=FOLDER of features")
    parser.add_argument("--sizes", nargs="+", type=int, required=True, help="of the dictionaries within the whole one")
    parser.add_argument("--selection", nargs="+", default=["global"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--steps", type=int, help="instead of the case's")
    given = parser.parse_args(argv)
    print("case, selection, seed, trained on, latents: self, cross | chosen among them: self, cross, L0, scores")
    for name in given.cases:
        case = case_of(name)
        case = case._replace(steps=given.steps or case.steps)
        for selection in given.selection:
            for seed in given.seeds:
                for sizes in ((), tuple(given.sizes)):
                    model = trained(case, selection, sizes, given.dropout, seed)
                    label = "nested" if sizes else "one"
                    for size in (*given.sizes, case.n_latents):
                        line = ", ".join((name, selection, str(seed), label, str(size)))
                        print(f"{line}: {measured(model, case, size)}", flush=True)
    return 0


def trained(case: Case, selection: str, sizes: Sequence[int], dropout: float, seed: int) -> SPARC:
    """A model of the case, in eval mode."""
    torch.manual_seed(seed)
    widths = {stream: x.shape[1] for stream, x in case.train.items()}
    rule = {"selection": selection, "matryoshka": sizes}
    model = SPARC(widths, case.n_latents, case.k, dead_after=20_000, **rule)  # type: ignore[arg-type]
    model.calibrate(case.train)
    train(
        model, case.train, steps=case.steps, lr=4e-3, seed=seed,
        support_dropout=0.0 if selection == "local" else dropout,
    )  # fmt: skip
    return model.eval()


def measured(model: SPARC, case: Case, size: int) -> str:
    """Of the first latents: those that the model fires of them, and those that are chosen among them alone."""
    with torch.no_grad():
        codes = model.encode(case.held_out)
        x = model.normalized(case.held_out)
        kept = torch.where(codes.indices < size, codes.indices, -1)
        cut = type(codes)(
            codes.values.masked_fill(_of_streams(kept < 0, codes), 0), kept, codes.streams, codes.n_latents
        )
        errors = {
            (s, t): float(((model.decode(cut, s, t) - x[t]).square().sum(1) / x[t].square().sum(1)).mean())
            for s in model.streams
            for t in model.streams
        }
        l0 = (cut.values > 0).float().sum(-1).mean()
        own = model.prefix(size)
        loss = own.loss(case.held_out)
    scores = evaluate(own, case.held_out, groups=case.groups).scores()
    itself = fmean(error for (s, t), error in errors.items() if s == t)
    cross = fmean(error for (s, t), error in errors.items() if s != t)
    dead = int(model.dead[:size].sum())
    of_scores = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if value is not None)
    return (
        f"{itself:.4f}, {cross:.4f}, L0 {l0:.2f}, dead {dead} | "
        f"{loss.self:.4f}, {float(loss.cross or 0):.4f}, {of_scores}"
    )


def _of_streams(per_support: torch.Tensor, codes: object) -> torch.Tensor:
    return per_support if per_support.ndim == 3 else per_support[:, None]


if __name__ == "__main__":
    sys.exit(main())

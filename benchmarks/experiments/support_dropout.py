"""Does support dropout pay? ``python -m benchmarks.experiments.support_dropout digits glyphs emoji=FOLDER``.

The same short training with and without it, on scikit-learn's digits (upper, lower and left halves), on the built-in
glyphs, and on features that `sparc-fast extract` wrote; then what matters of a model that is given one stream, on
samples kept from training: R@1 of single codes (the mean over pairs of streams, both ways), and the validation figures
`single_loss` and `loss`. A line a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast import SPARC, data
from sparc_fast.data import FeatureFolder
from sparc_fast.evaluate import evaluate
from sparc_fast.training.in_memory import train
from sparc_fast.training.validation import validate

Inputs = dict[str, Tensor]


class Case(NamedTuple):
    """Samples to train on and others, of which those of a group are all right, and the size of the model."""

    train: Inputs
    held_out: Inputs
    groups: list[str] | None
    n_latents: int
    k: int
    steps: int


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure every case; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="support_dropout", description=__doc__)
    parser.add_argument("cases", nargs="+", help="digits, glyphs, or NAME=FOLDER of features")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--lr", nargs="+", type=float, default=[4e-3])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[256])
    parser.add_argument("--epochs", type=float, help="instead of the case's steps")
    arguments = parser.parse_args(argv)
    print("case, dropout, seed, batch, steps, lr: R@1, single_loss, loss")
    for name in arguments.cases:
        case = case_of(name)
        for seed in arguments.seeds:
            for batch in arguments.batch_size:
                rows = len(next(iter(case.train.values())))
                steps = case.steps if arguments.epochs is None else max(1, int(arguments.epochs * rows) // batch)
                for lr in arguments.lr:
                    for dropout in arguments.dropout:
                        r1, single, joint = measure(case, dropout, seed, batch, steps, lr)
                        run = f"{name.partition('=')[0]}, {dropout}, {seed}, {batch}, {steps}, {lr}"
                        print(f"{run}: {r1:.4f}, {single:.4f}, {joint:.4f}", flush=True)
    return 0


def case_of(name: str) -> Case:
    """The samples that a name stands for."""
    if name == "digits":
        from sklearn.datasets import load_digits

        pictures = torch.from_numpy(load_digits().images).float()
        streams = {"upper": pictures[:, :4], "lower": pictures[:, 4:], "left": pictures[:, :, :4]}
        chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
        held, rest = chosen[: len(pictures) // 5], chosen[len(pictures) // 5 :]
        inputs = {stream: x.flatten(1) for stream, x in streams.items()}
        return Case(_rows(inputs, rest), _rows(inputs, held), None, 256, 12, 600)
    if name == "glyphs":
        from sparc_fast.demo.glyphs import glyphs

        found = glyphs()
        held = found.rows(held_out=True, face="regular")
        return Case(_rows(found.inputs, found.rows(held_out=False)), _rows(found.inputs, held), None, 1024, 12, 1150)
    folder = FeatureFolder(name.partition("=")[2])
    inputs = {}
    for split in ("train", "held_out"):
        with data.open(folder.path, split=split) as files:  # type: ignore[arg-type]
            rows = files.rows(0, files.n_rows).split(list(files.d_streams.values()), dim=1)
            inputs[split] = {stream: x.float() for stream, x in zip(files.d_streams, rows, strict=True)}
    return Case(inputs["train"], inputs["held_out"], folder.column("group", "held_out"), 1024, 16, 1000)


def measure(
    case: Case, dropout: float, seed: int, batch_size: int, steps: int, lr: float
) -> tuple[float, float, float]:
    """(R@1, single_loss, loss) on the samples held out, after training on the others."""
    torch.manual_seed(seed)
    model = SPARC({stream: x.shape[1] for stream, x in case.train.items()}, case.n_latents, case.k, dead_after=20_000)
    model.calibrate(case.train)
    train(model, case.train, steps=steps, batch_size=batch_size, lr=lr, support_dropout=dropout, seed=seed)
    found = evaluate(model, case.held_out, groups=case.groups)
    with data.open(case.held_out) as files:
        figures = validate(model, files, 1024, cross_loss_coef=1.0)
    r1 = fmean(of_pair.r1 for of_pair in found.retrieval.values())
    return r1, figures["single_loss"], figures["loss"]


def _rows(inputs: Mapping[str, Tensor], rows: Tensor) -> Inputs:
    return {stream: x[rows].contiguous() for stream, x in inputs.items()}


if __name__ == "__main__":
    sys.exit(main())

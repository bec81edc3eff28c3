"""What a way of training gives: ``python -m benchmarks.experiments.training glyphs --rules global batch --seeds 0 1``.

The same short training with each rule of selection and each setting named, on scikit-learn's digits (upper, lower and
left halves), on the built-in glyphs, or on features that `sparc-fast extract` wrote; then, on samples kept from
training, the validation figures, and the scores of streams encoded alone. A line a run, and a table in Markdown of
each case, whose intervals are over samples and seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparc_fast import SPARC, data
from sparc_fast.data import FeatureFolder
from sparc_fast.evaluate import Evaluation, as_markdown, evaluate, table
from sparc_fast.evaluate.labels import PerSample
from sparc_fast.selection import LOCAL, RULES
from sparc_fast.training.in_memory import train
from sparc_fast.training.validation import validate

Inputs = dict[str, Tensor]
FIGURES = ("single_loss", "loss", "self", "cross")


class Case(NamedTuple):
    """Samples to train on and others, what is known of these, and the size of the model."""

    train: Inputs
    held_out: Inputs
    groups: PerSample | None
    """Samples of a group are all right."""
    labels: Tensor | None
    n_latents: int
    k: int
    steps: int


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure everything that is named with everything; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.training", description=__doc__)
    parser.add_argument("cases", nargs="+", help="digits, glyphs, or NAME=FOLDER of features")
    parser.add_argument(
        "--rules", nargs="+", default=["global"], metavar="RULE",
        help=f"of {', '.join(RULES)}; with ', nested', four dictionaries; with ', private N', N of k are each stream's",
    )  # fmt: skip
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.5], help="of support; 0 under local rules")
    parser.add_argument("--moments", nargs="+", default=["float32"], help="float32 or bfloat16")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[256])
    parser.add_argument("--lr", nargs="+", type=float, default=[4e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=float, help="instead of the case's steps")
    for size in ("steps", "n-latents", "k"):
        parser.add_argument(f"--{size}", type=int, help="instead of the case's")
    parser.add_argument("--prefixes", nargs="+", type=int, default=[], help="also the models of so many first latents")
    given = parser.parse_args(argv)
    for name in given.cases:
        case = case_of(name)
        case = case._replace(**{size: given_size for size in ("steps", "n_latents", "k")
                                if (given_size := getattr(given, size)) is not None})  # fmt: skip
        columns: dict[str, list[Evaluation]] = {}
        varied = (given.rules, given.dropout, given.moments, given.batch_size, given.lr)
        for settings in product(*varied):
            column = ", ".join(str(one) for one, of in zip(settings, varied, strict=True) if len(of) > 1) or name
            for seed in given.seeds:
                for size, figures, found in measured(case, *settings, given.epochs, seed, given.prefixes):
                    shown = {key: figures[key] for key in FIGURES} | found.scores()
                    numbers = ", ".join(f"{key} {value:.4f}" for key, value in shown.items() if value is not None)
                    print(f"{name}, {column}, seed {seed}, {size} latents: {numbers}", flush=True)
                    columns.setdefault(f"{column}, first {size}" if given.prefixes else column, []).append(found)
        print(as_markdown(table(columns)))
    return 0


def measured(
    case: Case, rule: str, dropout: float, moments: Any, batch_size: int, lr: float, epochs: float | None, seed: int,
    prefixes: Sequence[int],
) -> Iterator[tuple[int, Mapping[str, float], Evaluation]]:  # fmt: skip
    """(latents, validation figures, evaluation), of a model and of those of its first latents."""
    torch.manual_seed(seed)
    rows = len(next(iter(case.train.values())))
    steps = case.steps if epochs is None else max(1, int(epochs * rows) // batch_size)
    widths = {stream: x.shape[1] for stream, x in case.train.items()}
    model = SPARC(widths, case.n_latents, dead_after=20_000, **options_of(rule, case))
    model.calibrate(case.train)
    train(
        model, case.train, steps=steps, batch_size=batch_size, lr=lr, moments=moments, seed=seed,
        support_dropout=0.0 if model.selection in LOCAL else dropout,
    )  # fmt: skip
    model.eval()
    with data.open(case.held_out) as files:
        for size in (*prefixes, case.n_latents):
            own = model if size == case.n_latents else model.prefix(size)
            figures = validate(own, files, 1024, cross_loss_coef=1.0)
            yield size, figures, evaluate(own, case.held_out, case.labels, groups=case.groups)


def options_of(rule: str, case: Case) -> dict[str, Any]:
    """The arguments of a model that trains by the rule; its L0 is k, whatever is private."""
    selection, _, more = rule.partition(", ")
    L, options = case.n_latents, {"selection": selection, "k": case.k}
    if more == "nested":
        options["matryoshka"] = (L // 16, L // 4, L // 2, L)
    elif more:
        own = int(more.removeprefix("private "))
        options |= {"k": case.k - own, "private": dict.fromkeys(case.train, own * L // 32), "private_k": own}
    return options


def case_of(name: str) -> Case:
    """The samples that a name stands for."""
    if name == "digits":
        from sklearn.datasets import load_digits

        pictures = torch.from_numpy(load_digits().images).float()
        streams = {"upper": pictures[:, :4], "lower": pictures[:, 4:], "left": pictures[:, :, :4]}
        chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
        held, rest = chosen[: len(pictures) // 5], chosen[len(pictures) // 5 :]
        inputs = {stream: x.flatten(1) for stream, x in streams.items()}
        return Case(_rows(inputs, rest), _rows(inputs, held), None, None, 256, 12, 600)
    if name == "glyphs":
        found = data.glyphs()
        held, rest = found.rows(held_out=True, face="regular"), found.rows(held_out=False)
        of_both = (_rows(found.inputs, rows) for rows in (rest, held))
        return Case(*of_both, None, found.labels[held], 1024, 12, 1150)
    folder = FeatureFolder(name.partition("=")[2])
    inputs = {}
    for split in ("train", "held_out"):
        with data.open(folder.path, split=split) as files:  # type: ignore[arg-type]
            rows = files.rows(0, files.n_rows).split(list(files.d_streams.values()), dim=1)
            inputs[split] = {stream: x.float() for stream, x in zip(files.d_streams, rows, strict=True)}
    return Case(inputs["train"], inputs["held_out"], folder.column("group", "held_out"), None, 1024, 16, 1000)


def _rows(inputs: Mapping[str, Tensor], rows: Tensor) -> Inputs:
    return {stream: x[rows].contiguous() for stream, x in inputs.items()}


if __name__ == "__main__":
    sys.exit(main())

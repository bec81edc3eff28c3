"""The demo: SPARC and independent SAEs on the glyphs, compared on characters neither has seen."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparc_fast.data import Glyphs
from sparc_fast.evaluate import Carried, Evaluation, comparison, evaluate, matched
from sparc_fast.explain import Ink, Items, ModelReport, Report, Stream
from sparc_fast.model import SPARC
from sparc_fast.selection import Selection
from sparc_fast.training.in_memory import Curves, train
from sparc_fast.version import __version__

__all__ = ["ABLATIONS", "RECIPES", "STREAMS", "Progress", "Recipe", "Settings", "Trained", "report", "run"]

SPARC_NAME, INDEPENDENT, UNTRAINED = "SPARC", "independent SAEs", "untrained SPARC"
MATCHED = "independent SAEs, matched"
STREAMS = {"sans": "its picture in DejaVu Sans", "serif": "its picture in DejaVu Serif", "name": "its Unicode name"}


@dataclass(frozen=True)
class Recipe:
    """How a column of the table is made."""

    selection: Selection
    cross_loss_coef: float
    support_dropout: float = 0.0


RECIPES = {SPARC_NAME: Recipe("global", 1.0, support_dropout=0.5), INDEPENDENT: Recipe("local", 0.0)}
ABLATIONS = {
    "SPARC, no dropout": Recipe("global", 1.0),
    "global, λ = 0": Recipe("global", 0.0),
    "local, λ = 1": Recipe("local", 1.0),
}


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of the demo, chosen on a part of the training characters (`docs/demo.md`)."""

    n_latents: int = 1024
    k: int = 12
    steps: int = 1150
    batch_size: int = 256
    lr: float = 4e-3
    auxk_coef: float = 1 / 32
    dead_after: int = 20_000
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A model, its training curves and its evaluation on held-out characters."""

    model: SPARC
    curves: Curves
    evaluation: Evaluation
    seconds: float


Progress = Callable[[str, int, int], object]
"""Called with (what is being trained, steps done, steps in all)."""


def run(glyphs: Glyphs, settings: Settings, *, ablations: bool, progress: Progress) -> dict[str, Trained]:
    """Train and evaluate every column of the table."""
    trained = {}
    for name, recipe in {**RECIPES, **(ABLATIONS if ablations else {})}.items():
        trained[name] = _train(name, recipe, glyphs, settings, progress)
        if name == INDEPENDENT:
            after = matched(trained[name].model, _rows(glyphs, glyphs.rows(held_out=False)))
            trained[MATCHED] = Trained(after, {}, _evaluate(after, glyphs), 0.0)
    untrained = _model(glyphs, RECIPES[SPARC_NAME], settings).eval()
    trained[UNTRAINED] = Trained(untrained, {}, _evaluate(untrained, glyphs), 0.0)
    return trained


def _model(glyphs: Glyphs, recipe: Recipe, settings: Settings) -> SPARC:
    torch.manual_seed(settings.seed)
    widths = {name: x.shape[1] for name, x in glyphs.inputs.items()}
    model = SPARC(widths, settings.n_latents, settings.k, selection=recipe.selection, dead_after=settings.dead_after)
    model.calibrate(_rows(glyphs, glyphs.rows(held_out=False)))
    return model


def _train(name: str, recipe: Recipe, glyphs: Glyphs, settings: Settings, progress: Progress) -> Trained:
    model = _model(glyphs, recipe, settings)
    started = time.perf_counter()
    curves = train(
        model,
        _rows(glyphs, glyphs.rows(held_out=False)),
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        cross_loss_coef=recipe.cross_loss_coef,
        auxk_coef=settings.auxk_coef,
        support_dropout=recipe.support_dropout,
        seed=settings.seed,
        on_step=lambda step: progress(name, step, settings.steps),
    )
    seconds = time.perf_counter() - started
    return Trained(model, curves, _evaluate(model, glyphs), seconds)


def _rows(glyphs: Glyphs, rows: Tensor) -> dict[str, Tensor]:
    return {name: x[rows] for name, x in glyphs.inputs.items()}


def _evaluate(model: SPARC, glyphs: Glyphs) -> Evaluation:
    rows = glyphs.rows(held_out=True, face="regular")
    return evaluate(model, _rows(glyphs, rows), glyphs.labels[rows])


def report(glyphs: Glyphs, trained: dict[str, Trained], settings: Settings, command: str) -> Report:
    """Everything the page shows: both models over all characters in the regular face, each stream encoded alone."""
    regular = torch.tensor([face == "regular" for face in glyphs.faces]).nonzero()[:, 0]
    items = Items(
        ids=[glyphs.characters[n] for n in regular],
        texts={"name": [glyphs.names[n] for n in regular]},
        pictures={name: Ink(pictures[regular].numpy()) for name, pictures in glyphs.images.items()},
        carried=Carried.from_labels(glyphs.labels[regular]),
        concepts=glyphs.concepts,
        held_out=glyphs.held_out[regular].numpy(),
    )
    return Report(
        before=_model_report(INDEPENDENT, trained[INDEPENDENT], glyphs, regular, items),
        after=_model_report(SPARC_NAME, trained[SPARC_NAME], glyphs, regular, items),
        streams={
            name: Stream(about, **({"picture": name} if name in glyphs.images else {"text": name}))
            for name, about in STREAMS.items()
        },
        items=items,
        table=comparison({name: result.evaluation for name, result in trained.items()}),
        settings={
            "sparc_fast": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "command": command,
            "training": f"{(~glyphs.held_out).sum():,} pictures and names; table on "
            f"{len(glyphs.rows(held_out=True, face='regular'))} characters never trained on",
            **{name.replace("_", " "): str(value) for name, value in vars(settings).items()},
        },
    )


def _model_report(name: str, trained: Trained, glyphs: Glyphs, rows: Tensor, items: Items) -> ModelReport:
    model = trained.model
    with torch.no_grad():
        codes = {stream: model.encode({stream: x[rows]}).stream(stream) for stream, x in glyphs.inputs.items()}
    jaccard = ModelReport.jaccard_of(trained.evaluation)
    return ModelReport.of(name, codes, model.n_latents, items, jaccard=jaccard, curves=trained.curves)

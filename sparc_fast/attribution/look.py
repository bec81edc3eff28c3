"""Samples of a folder of features looked into, as `sparc-fast explain --heatmap` shows them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparc_fast.data.feature_folder import FeatureFolder
from sparc_fast.evaluate import Carried, Codes, name_latents
from sparc_fast.extract.encoders import Encoder, ModelEncoder
from sparc_fast.model import SPARC

from .heatmaps import Heatmaps, Method, heatmaps, opened_picture
from .page import Looked, Seen
from .target import Latents, strongest
from .texts import word_scores

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Names", "Sample", "look_into", "samples_of"]

SIDES = 320, 1280  # pixels of a picture's longer side on the page, at least and at most
STRONGEST = 4  # latents of a sample


class Sample(NamedTuple):
    """A picture and texts, and its row in the folder, or -1 of a picture that is none of its samples."""

    id: str
    picture: Image | None
    texts: Mapping[str, str]
    row: int


class Names:
    """Names of latents, on all samples of a folder."""

    def __init__(self, codes: Codes, carried: Carried, concepts: Sequence[str], n_latents: int) -> None:
        found = name_latents(codes, carried, concepts, n_latents)
        self._several, self._scores, self._n = found.several, found.score.tolist(), n_latents

    def title(self, latent: int) -> str:
        names = ", ".join(self._several[latent])
        return f"latent {latent}: {names}" if names else f"latent {latent}"

    def latent(self, asked: str) -> int:
        """That of a number, or the best of those whose first name it is, or else one of whose names."""
        if asked.isdecimal() and int(asked) < self._n:
            return int(asked)
        for most in (1, None):
            if named := [latent for latent, names in enumerate(self._several) if asked in names[:most]]:
                return max(named, key=self._scores.__getitem__)
        known = sorted({name for names in self._several for name in names})
        raise ValueError(f"--latent must be a number below {self._n} or a latent's name, got {_got(asked, known)}")


def samples_of(folder: FeatureFolder, asked: Sequence[str]) -> list[Sample]:
    """Samples by id; what is none is the file of a picture.

    Raises:
        ValueError: it is neither, or a sample's picture is in no file.
    """
    rows = {str(id_): row for row, id_ in enumerate(folder.column("id"))}
    wanted = [s for s in folder.streams.values() if s.get("column")]
    texts = dict.fromkeys(str(s["column"]) for s in wanted if s.get("modality") == "text")
    columns = {column: folder.column(column) for column in (*texts, "picture")}
    found = []
    for name in asked:
        if (row := rows.get(name)) is not None:
            path = columns["picture"][row]
            picture = None if path is None else opened_picture(folder.picture(path))
            found.append(Sample(name, picture, {column: columns[column][row] or "" for column in texts}, row))
        elif Path(name).is_file():
            found.append(Sample(Path(name).name, opened_picture(name), {}, -1))
        else:
            raise ValueError(f"--heatmap must be the id of a sample or the file of a picture, got {_got(name, rows)}")
    return found


def _got(asked: str, known: Iterable[str]) -> str:
    """What was asked for, and what is there and nearly so called."""
    near = difflib.get_close_matches(asked, list(known), 3, 0.5)
    return repr(asked) + (f"; near it: {', '.join(near)}" if near else "")


@torch.no_grad()
def look_into(
    model: SPARC,
    folder: FeatureFolder,
    samples: Sequence[Sample],
    encoders: Mapping[str, Encoder],
    codes: Codes,
    names: Names,
    *,
    latents: Sequence[int] = (),
    source: str | None = None,
    method: Method = "position",
    enlarge: float = 1.0,
    say: Callable[[str], object] = lambda _: None,
) -> list[Looked]:
    """Every sample by every encoder.

    Args:
        codes: of the folder's samples, each stream alone.
        latents: that are looked for; where there are none, a sample's strongest.
        source: a stream whose activations are looked for in the others, instead.
        say: told what cannot be looked into.
    """
    shown = []
    skipped: set[str] = set()
    maps: list[tuple[list[Seen], int, str, Heatmaps, Image]] = []
    highest: dict[tuple[str, str], float] = {}
    for sample in samples:
        own = {s: encoded for s, encoder in encoders.items() if (encoded := _codes(model, s, encoder, sample, codes))}
        targets: list[tuple[str, Latents]] = [(names.title(latent), latent) for latent in latents]
        if source is not None:
            if source not in own:
                raise ValueError(f"--from must be a stream that {sample.id} has, {', '.join(own)}, got {source}")
            values, indices = own[source]
            targets = [(f"what {source} says", (values, indices))]
        elif not latents:
            total = torch.zeros(model.n_latents, dtype=torch.float32, device="cpu")
            for values, indices in own.values():
                total.index_add_(0, indices[0].long().clamp(min=0), values[0].masked_fill(indices[0] < 0, 0))
            every = torch.arange(model.n_latents, dtype=torch.int64, device="cpu")
            targets = [(names.title(latent), latent) for latent in strongest(total, every, STRONGEST)]
        picture = None if sample.picture is None else _shown(sample.picture)
        looked = []
        for title, target in targets:
            seen: list[Seen] = []
            for stream, encoder in encoders.items():
                text = sample.texts.get(str(folder.streams[stream].get("column")))
                is_picture = folder.streams[stream].get("modality") == "image"
                if is_picture and sample.picture is not None and isinstance(encoder, ModelEncoder):
                    found = heatmaps(
                        model, encoder, [sample.picture], stream=stream, latents=target, method=method, enlarge=enlarge
                    )
                    assert picture is not None
                    about = _about(target, own.get(stream))
                    maps.append((seen, len(seen), title, found, picture))
                    highest[stream, title] = max(highest.get((stream, title), 0.0), float(found.maps.max()))
                    seen.append(Seen(stream, float(found.scores[0]), None, None, about))
                elif not is_picture and text:
                    (words,) = word_scores(model, encoder, [text], stream=stream, latents=target)
                    seen.append(Seen(stream, words.whole, None, words, _about(target, own.get(stream))))
                elif is_picture and stream not in skipped and sample.picture is not None:
                    skipped.add(stream)
                    say(f"{stream}: a function has no positions to look into")
            looked.append((title, seen))
        shown.append(Looked(sample.id, picture, [text for text in sample.texts.values() if text], looked))
    for seen, place, title, found, picture in maps:  # one latent's positions have one scale in all samples
        top = highest[seen[place].stream, title] if found.method == "position" and source is None else None
        seen[place] = replace(seen[place], overlay=found.overlay(0, picture, top))
    return shown


def _codes(model: SPARC, stream: str, encoder: Encoder, sample: Sample, codes: Codes) -> tuple[Tensor, Tensor] | None:
    """Of one sample in one stream, [1, k] both; None where it has nothing there."""
    if sample.row >= 0:
        values, indices = codes[stream]
        return values[sample.row, None], indices[sample.row, None]
    if sample.picture is None or not (isinstance(encoder, ModelEncoder) and encoder.stream.modality == "image"):
        return None
    row = encoder.encode([encoder.prepare(sample.picture)]).to(model.W_enc.device)
    values, indices = model.encode({stream: row}).stream(stream)
    return values.float().cpu(), indices.cpu()


def _about(target: Latents, own: tuple[Tensor, Tensor] | None) -> str:
    """Whether a latent is on."""
    if isinstance(target, tuple) or own is None:
        return ""
    values, indices = own
    on = (indices[0] == target) & (values[0] > 0)
    return "on" if bool(on.any()) else "not on"


def _shown(picture: Image) -> Image:
    from PIL.Image import Resampling

    least, most = SIDES
    scale = min(max(1.0, least / max(picture.size)), most / max(picture.size))
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Resampling.BICUBIC)

"""A report of models and a folder of features, as `sparc-fast extract` writes it."""

from __future__ import annotations

import io
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparc_fast import data
from sparc_fast.batch import stack
from sparc_fast.data.feature_folder import KNOWN, FeatureFolder, Split
from sparc_fast.evaluate import Carried, Codes, Evaluation, comparison, evaluate, top_samples, words_as_concepts
from sparc_fast.model import SPARC, evaluating
from sparc_fast.version import __version__

from .contents import Items, ModelReport, Report, Stream
from .pictures import Pictures, Thumbnails

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["codes_of", "concepts_of", "items_of", "report_of"]

FEWEST = 5  # samples of a label that may name a latent
PICTURE = "picture"
ROWS, WORDS = 4096, 256  # encoded together
WIDER = 8  # times as wide as that of a token is the code of a sample that has as many or more
STRONGEST, MOST = 8, 0.6  # samples of a latent that are asked for a concept, and their share that must bear it


def items_of(folder: FeatureFolder, split: Split = "all", *, labels: bool = True) -> Items:
    """What a folder knows of its samples. Latents are named by labels, or, where there are none, by words of the texts.

    Args:
        labels: False names them by words of the texts though there are labels.

    Raises:
        ValueError: a picture's path leads out of the folder of pictures.
    """
    read, contents = _columns(folder, sees=False), [c for c in _columns(folder, sees=True) if c not in KNOWN]
    others = [column for column in folder.columns if column not in (*KNOWN, *read, *contents)]
    texts = _texts(folder, split, (*read, *others))
    carried, concepts = _concepts(folder, split, {column: texts[column] for column in read} or texts, labels)
    splits = folder.column("split", split)
    labelled = [", ".join(of_sample) for of_sample in folder.labels_of_samples(split)]
    groups = [str(group) for group in folder.column("group", split)]
    return Items(
        ids=folder.column("id", split),
        texts={column: texts.pop(column) for column in read or list(texts)[:1]},
        pictures=_pictures(folder, split, contents),
        carried=carried,
        concepts=concepts,
        groups=groups if len(set(groups)) < len(groups) else None,
        held_out=np.array([of_sample == "held_out" for of_sample in splits]) if len(set(splits)) > 1 else None,
        about={**texts, **({"label": labelled} if any(labelled) else {})},
    )


def concepts_of(folder: FeatureFolder, split: Split, *, labels: bool = True) -> tuple[Carried, Sequence[str]]:
    """What latents are named by: labels, or, where there are none, words of the texts that streams read."""
    read = [column for column in _columns(folder, sees=False) if column in folder.columns]
    return _concepts(folder, split, _texts(folder, split, read), labels)


def _columns(folder: FeatureFolder, sees: bool) -> list[str]:
    """Columns of the items that streams of pictures were made of, or those of texts."""
    streams = [stream for stream in folder.streams.values() if stream.get("column") and _sees(stream) == sees]
    return list(dict.fromkeys(str(stream["column"]) for stream in streams))


def _texts(folder: FeatureFolder, split: Split, columns: Sequence[str]) -> dict[str, list[str]]:
    return {column: [text or "" for text in folder.column(column, split)] for column in columns}


def _concepts(
    folder: FeatureFolder, split: Split, texts: Mapping[str, Sequence[str]], labels: bool
) -> tuple[Carried, Sequence[str]]:
    if labels and (found := folder.labels(split, FEWEST)) is not None:
        return Carried.from_labels(torch.from_numpy(found[0])), found[1]
    return words_as_concepts([[column[n] for column in texts.values()] for n in range(len(folder.rows(split)))])


def _sees(stream: Mapping[str, Any]) -> bool:
    """Whether a stream is of pictures."""
    return stream.get("modality") == "image" or stream.get("column") in (PICTURE, "thumbnail")


def _pictures(folder: FeatureFolder, split: Split, contents: Sequence[str]) -> dict[str, Pictures]:
    """Of the items' thumbnails or files below the folder of pictures, and of each column of contents."""
    paths = folder.column("picture", split)
    small = folder.column("thumbnail", split) if "thumbnail" in folder.columns else [None] * len(paths)
    files = [
        folder.picture(path) if path is not None and content is None else None
        for path, content in zip(paths, small, strict=True)
    ]
    found: dict[str, Pictures] = {}
    if any(x is not None for x in (*small, *files)):
        found[PICTURE] = _thumbnails(small, files)
    for column in contents:
        found[column] = _thumbnails(folder.column(column, split), [None] * len(paths))
    return found


def _thumbnails(contents: Sequence[bytes | None], files: Sequence[Path | None]) -> Pictures:
    return Thumbnails(len(contents), lambda row: _opened(contents[row], files[row]))


def _opened(content: bytes | None, file: Path | None) -> Image.Image | None:
    """What cannot be read is missing."""
    from PIL import Image, ImageOps

    if content is None and file is None:
        return None
    try:
        with Image.open(io.BytesIO(content) if file is None else file) as opened:  # type: ignore[arg-type]
            return ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def report_of(
    models: Mapping[str, SPARC],
    path: str | Path,
    *,
    split: Split = "all",
    beside: Mapping[str, SPARC] | None = None,
    words: Mapping[str, Callable[[Sequence[str]], Tensor]] | None = None,
    curves: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    settings: Mapping[str, str] | None = None,
    labels: bool = True,
    first: Sequence[str] = (),
) -> Report:
    """All that a page shows of one model, or of two, the first as what was before, and the samples of a folder.

    Every stream is encoded alone. The table is of the samples kept from training, where there are such. Of tokens,
    a latent fires for a sample as it does for that of its tokens that fires it most; the table is then of tokens, and
    without retrieval, as which token of a picture is that of a text nobody can say.

    Args:
        split: which samples are shown.
        beside: further models of the table alone.
        words: stream -> the model whose features it has, from texts to [n, D_s]: words of the texts are then searched
            by their own codes, and not by those of the texts that have them.
        curves: of each model, "step" and any of "loss", "self", "cross" and "dead".
        settings: further lines of how it was made.
        labels: False names latents by words of the texts though there are labels; those of the table are used.
        first: concepts whose latents are shown before all others.

    Raises:
        ValueError: models and folder have other streams or widths.
    """
    if len(models) not in (1, 2):
        raise ValueError(f"models must be one, or two to compare, got {len(models)}")
    folder = FeatureFolder(path)
    items = items_of(folder, split, labels=labels)
    streams = list(next(iter(models.values())).streams)
    for name, model in models.items():
        if list(model.streams) != streams:
            raise ValueError(f"models must have the same streams, got {streams} and {list(model.streams)} in {name}")
        widths = {stream: about["width"] for stream, about in folder.streams.items()}
        if dict(model.d_streams) != {stream: widths.get(stream) for stream in streams}:
            raise ValueError(f"{path} must have the streams {dict(model.d_streams)} of {name}, got {widths}")
    kept = items.held_out is not None and bool(items.held_out.any())
    evaluations = _evaluated(
        {**dict(reversed(list(models.items()))), **(beside or {})}, folder, streams, "held_out" if kept else split
    )
    reports = [
        ModelReport.of(
            name, codes_of(model, folder, streams, split), model.n_latents, items,
            jaccard=ModelReport.jaccard_of(evaluations[name]), curves=(curves or {}).get(name),
            private=model.private_latents,
        )
        for name, model in models.items()
    ]  # fmt: skip
    reports[-1] = replace(reports[-1], names=_asked_first(reports[-1], items, first))
    return Report(
        after=reports[-1],
        before=reports[0] if len(reports) == 2 else None,
        streams={stream: _stream(folder.streams[stream], items) for stream in streams},
        items=items,
        table=comparison(evaluations),
        word_codes=_word_codes(model, items, words) if words else None,
        settings={
            "sparc_fast": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            **(settings or {}),
        },
        attribution=str(folder.manifest.get("attribution") or ""),
        first=first,
    )


def _asked_first(model: ModelReport, items: Items, first: Sequence[str]) -> Sequence[Sequence[str]]:
    """Names of latents: one that is asked for is the first where most of the strongest samples of every stream bear it.

    A latent of cats' faces is called "face" and "cat", which of them first is for who looks at it to say.
    """
    names, known = [tuple(several) for several in model.names], items.known()
    tops = top_samples(model.codes, len(names), STRONGEST).samples
    for word in reversed(first):
        if word not in items.concepts:
            continue
        samples = torch.repeat_interleave(known.offsets.diff())
        bears = torch.zeros(len(items) + 1, dtype=torch.bool, device="cpu")  # the last is of row -1
        bears[samples[known.concepts == list(items.concepts).index(word)]] = True
        for latent in (bears[tops].double().mean(2).amin(0) >= MOST).nonzero()[:, 0].tolist():
            if word in names[latent]:
                names[latent] = (word, *(other for other in names[latent] if other != word))
    return names


def _stream(about: Mapping[str, Any], items: Items) -> Stream:
    column, first = about.get("column"), next(iter(items.pictures), None)
    words = f"{'pictures' if _sees(about) else 'texts'} by {about.get('model', 'a model')}"
    picture = column if column in items.pictures else first
    return Stream(words, text=column if not _sees(about) and column in items.texts else None, picture=picture)


@torch.no_grad()
def _word_codes(
    model: SPARC, items: Items, encoders: Mapping[str, Callable[[Sequence[str]], Tensor]]
) -> tuple[Sequence[str], Codes]:
    """All words that can be searched for, each encoded as a text of its own."""
    if unknown := [stream for stream in encoders if stream not in model.streams]:
        raise ValueError(f"words must be encoded for streams of the model, {list(model.streams)}, got {unknown}")
    _, words = items.vocabulary()
    codes = {}
    for stream, encode in encoders.items():
        parts = [encode(words[start : start + WORDS]).float() for start in range(0, len(words), WORDS)]
        none = torch.zeros(0, model.d_streams[stream], dtype=torch.float32, device="cpu")
        x = torch.cat([none, *(part.cpu() for part in parts)])
        values, indices = model.encode({stream: x.to(model.W_enc.device)}).stream(stream)
        codes[stream] = values.float().cpu(), indices.cpu()
    return words, codes


def _evaluated(
    models: Mapping[str, SPARC], folder: FeatureFolder, streams: Sequence[str], split: Split
) -> dict[str, Evaluation]:
    """Of all tokens, where there are such."""
    T = max(folder.tokens(stream) for stream in streams)
    truth = folder.labels(split, FEWEST)
    labels = None if truth is None else torch.from_numpy(truth[0].repeat(T, axis=0))
    groups = np.unique(np.array(folder.column("group", split)), return_inverse=True)[1].repeat(T)
    with data.open({stream: (folder.path, stream) for stream in streams}, split=split) as files:
        return {name: evaluate(model, files, labels, groups=groups, retrieval=T == 1) for name, model in models.items()}


@torch.no_grad()
def codes_of(model: SPARC, folder: FeatureFolder, streams: Sequence[str], split: Split) -> Codes:
    """Of each stream encoded alone, (values [N, k], indices [N, k]) on the CPU; wider where a sample has tokens."""
    codes = {}
    with evaluating(model):
        for stream in streams:
            T, parts = folder.tokens(stream), []
            with data.open({stream: (folder.path, stream)}, split=split) as files:
                step = max(1, ROWS // T) * T
                for start in range(0, files.n_rows, step):
                    rows = files.rows(start, min(start + step, files.n_rows)).to(model.W_enc.device)
                    values, indices = model.encode({stream: rows}).stream(stream)
                    code = values.float(), indices
                    parts.append([x.cpu() for x in (code if T == 1 else _pooled(*code, T, model.n_latents))])
            codes[stream] = stack([values for values, _ in parts]), stack([indices for _, indices in parts])
    return codes


def _pooled(values: Tensor, indices: Tensor, T: int, n_latents: int) -> tuple[Tensor, Tensor]:
    """The largest value that each latent has for any of a sample's T tokens: of the latents, those largest."""
    k = values.shape[1]
    pooled = torch.zeros(len(values) // T, n_latents, dtype=values.dtype, device=values.device)
    latents, on = (part.clamp_min(0).reshape(-1, T * k) for part in (indices.long(), values))
    pooled.scatter_reduce_(1, latents, on, "amax")
    found = pooled.topk(min(n_latents, k * min(T, WIDER)), dim=1)
    return found.values, found.indices.to(indices.dtype)

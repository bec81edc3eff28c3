"""What an extraction is told: the samples, the models that look at them, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparc_fast.data.feature_folder import KNOWN
from sparc_fast.files import as_path
from sparc_fast.training.config import known_settings, read_table

__all__ = ["Extraction", "SourceConfig", "StreamConfig", "read_extraction"]

KINDS = ("images", "csv", "jsonl", "parquet", "coco", "open_images", "webdataset", "datasets")
PARTS = {  # of the sources that lie in several places: which must be given, which may be
    "coco": (("images", "captions"), ("instances",)),
    "open_images": (("images", "narratives"), ("labels", "classes")),
}
MODALITIES = ("image", "text")
POOLINGS = ("model", "cls", "mean", "last", "tokens")
DTYPES = ("float32", "float16", "bfloat16")
STREAM_NAME = re.compile(r"\w[\w.-]*")  # it names a folder


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the samples are. One of the first eight is given."""

    images: str = ""
    """A folder of pictures; those in folders of their own have the folder's name as label, and NAME.txt is the text."""
    csv: str = ""
    """A table with a line of names (.tsv: tabs)."""
    jsonl: str = ""
    parquet: str = ""
    coco: Mapping[str, str] = field(default_factory=dict)
    """images (a folder), captions, and instances, whose categories are the labels."""
    open_images: Mapping[str, str] = field(default_factory=dict)
    """images (a folder), narratives (a pattern of .jsonl), labels (a .csv), and classes, their names."""
    webdataset: str = ""
    """Tars, such as ``shard-{000..127}.tar``."""
    datasets: str = ""
    """What `datasets` wrote with save_to_disk: a data set, or its splits."""

    folder: str = ""
    """The pictures' folder, which no path may leave; by default that of the table."""
    id: str = "id"
    path: str = "path"
    text: str | tuple[str, ...] = "text"
    """The column of the texts, or several."""
    label: str = "label"
    group: str = "group"
    """Samples of one group stay on one side of the split: several texts, or crops, of a picture."""
    split: str = "split"
    every_text: bool = False
    """Whether each of a picture's texts is a sample, in the picture's group; otherwise the first one is taken."""

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind))

    def __post_init__(self) -> None:
        texts = (self.text,) if isinstance(self.text, str) else tuple(self.text)
        object.__setattr__(self, "text", texts)
        for name in ("images", "csv", "jsonl", "parquet", "webdataset", "datasets", "folder"):
            _check(f"source.{name}", getattr(self, name), lambda value: isinstance(value, str), "a path")
        for name, columns in (("text", texts), *((n, (getattr(self, n),)) for n in ("id", "path", "label", "group"))):
            _check(f"source.{name}", columns, lambda some: all(isinstance(c, str) and c for c in some), "a column")
        _check("source.every_text", self.every_text, lambda value: isinstance(value, bool), "true or false")
        given = [kind for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise ValueError(f"source must give one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}")
        if (parts := PARTS.get(self.kind)) is not None:
            needed, others = parts
            given_parts = getattr(self, self.kind)
            is_table = isinstance(given_parts, Mapping)
            if not is_table or not set(needed) <= set(given_parts) <= {*needed, *others}:
                shown = ", ".join(given_parts) if is_table else repr(given_parts)
                raise ValueError(
                    f"source.{self.kind} must be a table of {' and '.join(needed)}, and maybe "
                    f"{' and '.join(others)}, got {shown}"
                )


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """A model, and what of it becomes a stream."""

    model: str
    """timm:NAME, hf:NAME, open_clip:ARCHITECTURE/WEIGHTS, sentence-transformers:NAME, or module:function."""
    modality: str = "image"
    text: str = ""
    """The column of the texts that it reads; by default the source's first."""
    layer: int = 0
    """Block whose output is taken, from 1 on, or from -1 back; 0 is the model's own output."""
    pooling: str = "model"
    """model (its own embedding, or else cls or mean), cls, mean, last (token), or tokens: a row for each patch."""
    dtype: str = "float32"
    """In which rows are stored."""
    revision: str = ""
    """Of a model on the Hugging Face hub: a commit, tag or branch."""
    weights: str = ""
    """A file of weights for timm and open_clip, instead of published ones."""

    def check(self, name: str) -> None:
        """ValueError where something is out of range."""
        at = f"streams.{name}."
        _check(f"{at}model", self.model, lambda m: isinstance(m, str) and all(m.partition(":")), "FAMILY:NAME")
        for what, choices in (("modality", MODALITIES), ("pooling", POOLINGS), ("dtype", DTYPES)):
            _check(at + what, getattr(self, what), choices.__contains__, f"one of {', '.join(choices)}")
        _check(f"{at}layer", self.layer, lambda n: isinstance(n, int) and not isinstance(n, bool), "an integer")
        for what in ("text", "revision", "weights"):
            _check(at + what, getattr(self, what), lambda value: isinstance(value, str), "text")
        if self.pooling == "tokens" and self.modality == "text":
            raise ValueError(f"{at}pooling must be another than tokens for texts, whose tokens are not equally many")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """All settings of an extraction. Each is checked; docs/your_models.md says what each means.

    Raises:
        ValueError: names the setting, what was expected and what came.
    """

    source: SourceConfig | None
    """None where items are given in Python."""
    streams: Mapping[str, StreamConfig]
    folder: Path = Path()
    """Relative paths and modules of one's own are looked for here: the folder of the file of settings."""
    batch_size: int = 64
    shard_rows: int = 65536
    """Items whose rows go into one file."""
    held_out: float = 0.2
    """The part of the groups kept from training; which, only their names and `seed` say."""
    seed: int = 0
    device: str = "auto"
    threads: int = 4
    """That read and decode pictures."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("shard_rows", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        _check("held_out", self.held_out, lambda x: isinstance(x, int | float) and 0 <= x < 1, "a number >= 0 and < 1")
        _check("device", self.device, lambda value: isinstance(value, str), "text")
        if not self.streams:
            raise ValueError("streams must name at least one, [streams.NAME], got none")
        for name, stream in self.streams.items():
            if STREAM_NAME.fullmatch(name) is None:
                raise ValueError(f"streams must have names of letters, digits, '_', '-' and '.', got {name!r}")
            stream.check(name)
        if reserved := [column for column in self.texts if column in KNOWN]:
            raise ValueError(f"text must be another column than {', '.join(KNOWN)}, got {reserved[0]!r}")

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of texts that items carry: the source's, and those that streams read."""
        of_source = () if self.source is None else self.source.text
        return tuple(dict.fromkeys([*of_source, *(s.text for s in self.streams.values() if s.text)]))

    def text_of(self, stream: StreamConfig) -> str:
        """The column that a stream of texts reads."""
        return stream.text or (self.texts[0] if self.texts else "text")


def read_extraction(path: str | Path, **changed: Any) -> Extraction:
    """The settings in a TOML, JSON or YAML file, `changed` over them; relative paths are those of its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is unknown or out of range, or the file is not what its suffix says.
    """
    path = as_path(path, "path")
    content = {**read_table(path, "extraction"), **changed}
    streams = content.pop("streams", {})
    if not isinstance(streams, Mapping):
        raise ValueError(f"streams must be tables, [streams.NAME], got {streams!r}")
    source = _of(SourceConfig, content.pop("source", {}), "source.")
    named = {str(name): _of(StreamConfig, about, f"streams.{name}.") for name, about in streams.items()}
    settings = known_settings(Extraction, content, left_out=("source", "streams", "folder"))
    return Extraction(source=source, streams=named, folder=path.resolve().parent, **settings)


def _of(kind: Callable[..., Any], table: Any, at: str) -> Any:
    if not isinstance(table, Mapping):
        raise ValueError(f"{at.rstrip('.')} must be a table, got {table!r}")
    return kind(**known_settings(kind, table, at))


def _check(name: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    if not fits(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")

"""All settings of a training run: what each may be, in words and in code; files, flags and Python are held to it."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

from sparc_fast import data
from sparc_fast.data import AlignedFiles, FeatureFolder
from sparc_fast.data.formats import FORMATS
from sparc_fast.data.ids import SUFFIXES as IDS_SUFFIXES
from sparc_fast.data.shards import is_list_of_files
from sparc_fast.files import as_path
from sparc_fast.objective import nested_sizes
from sparc_fast.selection import LOCAL, RULES
from sparc_fast.selection.jumprelu import BANDWIDTH, SPARSITY_COEF
from sparc_fast.sizes import as_bytes, is_integer, parse_bytes

REQUIRED = MISSING
SUPPORT_DROPOUT = 0.5  # docs/training.md has what it wins
SUFFIXES = (".toml", ".json", ".yaml", ".yml")
Place = str | list[str]
"""A file, a folder or a pattern of files, or a list of files."""
Sources = Mapping[str, Place | tuple[Place, str]]
"""stream -> where its rows are, or (where, name of the data set in each file)."""


@dataclass(frozen=True)
class Kind:
    """The values a setting takes."""

    expected: str
    """In words, for messages."""
    convert: Callable[[Any], Any]
    """The value as it is kept; TypeError or ValueError where it is none."""
    parse: Callable[[str], Any] = str
    """The value that a text stands for; ValueError where it stands for none."""
    parse_all: Callable[[Sequence[str], str], Any] | None = None
    """Of a kind whose flag, of this name, takes several texts: the value of them all."""
    metavar: str = "X"
    """Of a text, for `--help`."""
    from_folder: Callable[[Any, Path], Any] | None = None
    """Of paths: the value in which those that are relative are paths from this folder."""


def setting(default: Any, kind: Kind, help: str, *, free: bool = False) -> Any:
    """A field of settings, `dict` being an empty one. A `free` one may change when a run goes on: no result depends on
    it."""
    given = {"default_factory": dict} if default is dict else {"default": default}
    return field(**given, metadata={"kind": kind, "help": help, "free": free})


def _checked(expected: str, accepted: Any, fits: Callable[[Any], bool], kept_as: Callable[[Any], Any]) -> Kind:
    def convert(value: Any) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and accepted is not bool) or not fits(value):
            raise ValueError
        return kept_as(value)

    return Kind(expected, convert, kept_as)


def integer(least: int) -> Kind:
    return _checked(f"an integer >= {least}", Integral, lambda n: n >= least, int)


def number(expected: str, fits: Callable[[float], bool]) -> Kind:
    return _checked(expected, Real, lambda x: math.isfinite(x) and fits(x), float)


def choice(*names: str) -> Kind:
    return replace(
        _checked(f"one of {', '.join(names)}", str, names.__contains__, str), metavar=f"{{{','.join(names)}}}"
    )


def _sources(value: Any, suffixes: Collection[str] = tuple(FORMATS)) -> dict[str, Place | tuple[Place, str]]:
    if not isinstance(value, Mapping) or not all(isinstance(stream, str) and stream for stream in value):
        raise ValueError
    return {stream: _source(source, suffixes) for stream, source in value.items()}


def _sources_or_folder(value: Any) -> str | dict[str, Place | tuple[Place, str]]:
    return str(value) if isinstance(value, str | Path) and str(value) else _sources(value)


def _source(source: Any, suffixes: Collection[str]) -> Place | tuple[Place, str]:
    if isinstance(source, Mapping):
        if set(source) - {"path", "name"} or "path" not in source:
            raise ValueError
        source = (source["path"], source["name"]) if "name" in source else source["path"]
    if isinstance(source, str | Path) and str(source):
        return str(source)
    if is_list_of_files(source, suffixes):
        return [str(path) for path in source]
    where, name = source  # TypeError or ValueError where there are not two
    where = _source(where, suffixes)
    if isinstance(where, tuple) or not isinstance(name, str):
        raise ValueError
    return where, name


def _identifiers(value: Any) -> str | dict[str, Place | tuple[Place, str]]:
    return value if isinstance(value, str) else _sources(value, IDS_SUFFIXES)


def _names(value: Any) -> list[str]:
    listed = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(name, str) and name for name in listed):
        raise ValueError
    return listed


def _sizes(value: Any) -> list[int]:
    listed = [value] if isinstance(value, Integral) else list(value)
    return [integer(1).convert(size) for size in listed]


def _norms(value: Any) -> str | dict[str, str]:
    of_streams = value.values() if isinstance(value, Mapping) else [value]
    if not all(how in ("none", "l2") for how in of_streams):
        raise ValueError
    return dict(value) if isinstance(value, Mapping) else str(value)


def _counts(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping) or not all(isinstance(stream, str) for stream in value):
        raise ValueError
    return {stream: integer(1).convert(n) for stream, n in value.items()}


def _quotas(value: Any) -> int | dict[str, int]:
    return integer(0).convert(value) if is_integer(value) else _counts(value)


def _of_streams(one: str, word: str, kept_as: Callable[[str], Any]) -> Callable[[Sequence[str], str], Any]:
    """What parses one word for all streams, or ``stream=word`` of some."""

    def parse(texts: Sequence[str], flag: str) -> Any:
        named = [text.rpartition("=") for text in texts]
        try:
            if len(texts) == 1 and "=" not in texts[0]:
                return kept_as(texts[0])
            kept = {stream: kept_as(value) for stream, _, value in named if stream}
        except ValueError:
            kept = {}
        if len(kept) < len(named):
            raise ValueError(f"{flag} must be {one}, or stream={word} once for each of some streams, got {list(texts)}")
        return kept

    return parse


def parse_source(text: str) -> tuple[str, Place | tuple[Place, str]]:
    """(stream, source) of a text ``stream=path`` or ``stream=path#name``; several files are separated by commas.

    A path that is there is taken whole. In others a name begins after a file's suffix.
    """
    stream, equals, source = text.partition("=")
    if not stream or not equals or not source.partition("#")[0]:
        raise ValueError(f"a source must be stream=path or stream=path#name, got {text!r}")
    suffixes = "|".join(map(re.escape, IDS_SUFFIXES))
    path, name = source, ""
    if "#" in source and not Path(source).exists():
        if (named := re.match(rf"(.*?(?:{suffixes}))#(.*)", source, re.IGNORECASE)) is not None:
            path, name = named.groups()
        elif Path(source).suffix.lower() not in IDS_SUFFIXES:  # a folder
            path, _, name = source.rpartition("#")
    files = path.split(",")
    several = len(files) > 1 and is_list_of_files(files, IDS_SUFFIXES) and not Path(path).exists()
    where: Place = files if several else path
    return stream, (where, name) if name else where


def parse_sources(texts: Sequence[str], flag: str) -> dict[str, Place | tuple[Place, str]]:
    """Those of several texts; ValueError where a stream is given twice."""
    named = [parse_source(text) for text in texts]
    streams = [stream for stream, _ in named]
    if twice := [stream for i, stream in enumerate(streams) if stream in streams[:i]]:
        raise ValueError(f"{flag} must give each stream once, got {twice[0]!r} twice")
    return dict(named)


def _parse_places(texts: Sequence[str], flag: str) -> Any:
    """Sources whose paths do not depend on the working folder, or a folder of all."""
    if len(texts) == 1 and Path(texts[0]).is_dir():
        return str(Path(texts[0]).resolve())
    return with_absolute_paths(parse_sources(texts, flag), Path.cwd())


def _parse_identifiers(texts: Sequence[str], flag: str) -> Any:
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    return with_absolute_paths(parse_sources(texts, flag), Path.cwd())


def _parse_sizes(texts: Sequence[str], flag: str) -> list[int]:
    try:
        return list(map(int, texts))
    except ValueError:
        raise ValueError(f"{flag} must be {sizes.expected}, got {list(texts)!r}") from None


def with_absolute_paths(sources: Any, folder: Path) -> Any:
    """Sources whose paths do not depend on the working folder; a name of identifiers stays one."""
    if not isinstance(sources, Mapping):
        return sources
    return {stream: absolute(source, folder) for stream, source in sources.items()}


def absolute(source: Any, folder: Path) -> Any:
    """A source whose paths do not depend on the working folder."""
    if isinstance(source, str | Path):
        return str(source) if "://" in str(source) else str(_resolved(folder / source))
    if isinstance(source, Mapping) and "path" in source:
        return {**source, "path": absolute(source["path"], folder)}
    if is_list_of_files(source, IDS_SUFFIXES):
        return [absolute(path, folder) for path in source]
    if isinstance(source, list | tuple) and source:
        return (absolute(source[0], folder), *source[1:])
    return source


def _resolved(path: Path) -> Path:
    """Links followed, but for one to a file whose name says another format, or none, as in caches of the Hub."""
    target = path.resolve()
    return target if target.suffix == path.suffix or target.is_dir() else path.parent.resolve() / path.name


flag = _checked("true or false", bool, lambda _: True, bool)
text = _checked("text", str, lambda _: True, str)
sources = Kind(
    "a table of streams, each a path, a list of files or [path, name], or a folder of features", _sources_or_folder,
    parse_all=_parse_places, metavar="STREAM=FILE[#NAME] or FOLDER",
    from_folder=lambda value, folder: (absolute if isinstance(value, str) else with_absolute_paths)(value, folder),
)  # fmt: skip
identifiers = Kind(
    "the name of a data set in every file, or a table of streams as for data", _identifiers,
    parse_all=_parse_identifiers, metavar="STREAM=FILE[#NAME] or NAME", from_folder=with_absolute_paths,
)  # fmt: skip
norms = Kind(
    "none or l2, or a table of streams, each none or l2", _norms, parse_all=_of_streams("one word", "word", str),
    metavar="HOW or STREAM=HOW",
)  # fmt: skip
names = Kind("a list of names", _names, parse_all=lambda texts, _: texts, metavar="NAME")
sizes = Kind("a list of integers >= 1", _sizes, parse_all=_parse_sizes, metavar="M")
counts = Kind(
    "a table of streams, each an integer >= 1", _counts, parse_all=_of_streams("a number", "number", int),
    metavar="STREAM=N",
)  # fmt: skip
quotas = replace(
    counts, expected="an integer >= 0, or a table of streams, each an integer >= 1", convert=_quotas,
    metavar="N or STREAM=N",
)  # fmt: skip
place = replace(
    _checked("a path", (str, Path), lambda _: True, str), parse=lambda text: absolute(text, Path.cwd()),
    from_folder=absolute,
)  # fmt: skip
size = Kind('an integer >= 1, in bytes, or a size such as "4GiB"', lambda value: as_bytes(value, "size"), parse_bytes)
part = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
below_one = number("a number >= 0 and < 1", lambda x: 0 <= x < 1)
positive = number("a number > 0", lambda x: x > 0)
not_negative = number("a number >= 0", lambda x: x >= 0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run. Each is checked; `sparc-fast train --help` and docs/training.md say what each means.

    Raises:
        ValueError: names the setting, what was expected and what came.
    """

    data: str | Sources = setting(
        dict, sources, "the streams' files, in the model's order, or a folder of features, of its training split",
        free=True,
    )  # fmt: skip
    validation_data: str | Sources = setting(
        dict, sources, "the same streams' held-out files, or the held-out split of a folder", free=True
    )
    ids: str | Sources = setting(
        "", identifiers, "identifiers of the rows: a data set of this name in every file, or files", free=True
    )
    validation_ids: str | Sources = setting(
        "", identifiers, "those of `validation_data`; where `ids` is a name, the same by default", free=True
    )
    join: str = setting(
        "none", choice("none", "inner", "outer"), "match rows by `ids`: samples that all streams have, or any has"
    )
    repeated: str = setting(
        "none", choice("none", "sample", "all"), "several rows of one id: one drawn each epoch, or all samples"
    )
    validation_rows: int = setting(
        0, integer(0), "rows of `data` held out instead, in up to 64 blocks spread evenly over the files"
    )

    start_from: str = setting(
        "", place, "a run's folder, a model file or a checkpoint, whose weights and calibration are the first"
    )
    freeze: Sequence[str] = setting((), names, "what stays as it is: encoder, decoder, or streams' names")
    n_latents: int = setting(REQUIRED, integer(1), "L, latents of the shared dictionary")
    k: int = setting(REQUIRED, integer(1), "latents kept per sample")
    selection: str = setting(
        "global",
        choice(*RULES),
        "one support for all streams; local: one for each; batch: for all, of k latents a sample on average; jumprelu "
        "and local_jumprelu: the same by latents' thresholds",
    )
    matryoshka: Sequence[int] = setting(
        (),
        sizes,
        "sizes of nested dictionaries, ascending, each the first latents; the last is `n_latents` in any case",
    )
    private: Mapping[str, int] = setting(
        dict, counts, "how many of the latents belong to one stream alone: a table of streams"
    )
    private_k: int | Mapping[str, int] = setting(
        0, quotas, "how many of its own latents a stream fires beside the k; or a table of streams"
    )
    auxk: int = setting(64, integer(0), "dead latents that reconstruct the residual; 0 turns AuxK off")
    dead_after: int = setting(256_000, integer(0), "samples without firing after which a latent is dead")
    loss: str = setting(
        "nmse", choice("nmse", "fvu"), "errors over each sample's squared norm, or over the batch's squared deviations"
    )
    sparsity_coef: float = setting(SPARSITY_COEF, not_negative, "under jumprelu, the weight of (L0 / k - 1)^2")
    bandwidth: float = setting(
        BANDWIDTH, positive, "under jumprelu, how wide the band of scores is that move thresholds, over their mean"
    )
    dtype: str = setting(
        "float32", choice("float32", "bfloat16", "float16"), "of the weights; Adam's master rows stay float32"
    )

    moments: str = setting(
        "float32", choice("float32", "bfloat16"), "of Adam's moments of the weights; bfloat16 is rounded stochastically"
    )

    steps: int = setting(0, integer(0), "optimizer steps; or give `epochs`")
    epochs: float = setting(0.0, not_negative, "passes over the data; or give `steps`")
    batch_size: int = setting(
        4096, integer(1), "rows of an optimizer step; the rows that an epoch has over are left out"
    )
    accumulate: int = setting(1, integer(1), "micro-batches in which the rows of a step pass through the model")
    seed: int = setting(0, integer(0), "of first weights, shuffling, support dropout and rounding")

    lr: float = setting(1e-4, positive, "SparcAdam's learning rate at its peak")
    warmup: float = setting(0.05, part, "the part of the steps in which the learning rate rises to `lr`")
    decay: str = setting("cosine", choice("cosine", "linear", "constant"), "how the learning rate falls after that")
    lr_end: float = setting(0.0, part, "the part of `lr` that is left at the end")
    beta_1: float = setting(0.9, below_one, "Adam's decay of the first moment")
    beta_2: float = setting(0.999, below_one, "Adam's decay of the second moment")
    eps: float = setting(1e-8, not_negative, "Adam's epsilon")
    max_grad_norm: float = setting(0.0, not_negative, "the most the norm of all gradients may be; 0: any")
    lazy: bool = setting(False, flag, "update decoder rows when they are next read: the same bits", free=True)

    cross_loss_coef: float = setting(1.0, not_negative, "λ, the weight of the cross-reconstruction loss")
    cross_loss_start: float = setting(0.0, not_negative, "λ at the first step, where `cross_loss_ramp` > 0")
    cross_loss_ramp: float = setting(0.0, part, "the part of the steps in which λ goes from its start to its value")
    k_start: int = setting(0, integer(0), "k at the first step, where `k_ramp` > 0")
    k_ramp: float = setting(0.0, part, "the part of the steps in which k goes from its start to its value")
    auxk_coef: float = setting(1 / 32, not_negative, "the weight of AuxK")
    support_dropout: float = setting(
        None,
        below_one,
        "probability that a stream has no say in which latents a batch uses, so that each learns to choose them alone "
        f"({SUPPORT_DROPOUT}; 0 under local selection)",
    )

    zero_rows: str = setting(
        "absent", choice("absent", "keep"), "a stream's rows of zeros are absent (an image that failed), or as they are"
    )
    normalize: str | Mapping[str, str] = setting(
        "none", norms, "l2: rows get unit norm, of all streams or of those in a table"
    )
    calibrate: bool = setting(True, flag, "measure the streams first, so that none outweighs the others")
    whiten: str = setting(
        "none", choice("none", "diag"), "diag: calibration scales each dimension, so that no large one hides the others"
    )
    calibration_rows: int = setting(100_000, integer(1), "rows measured, at most one epoch")

    log_every: int = setting(50, integer(1), "steps from one line of metrics to the next, each a mean over them")
    validate_every: int = setting(1000, integer(1), "steps from one validation to the next")
    checkpoint_every: int = setting(1000, integer(1), "steps from one checkpoint to the next", free=True)
    keep: int = setting(2, integer(1), "checkpoints kept, beside the best", free=True)
    best_by: str = setting(
        "single_loss",
        choice("loss", "single_loss"),
        "the validation figure whose lowest is the best: of each stream given alone, or of all together",
    )

    memory: int = setting(2**31, size, 'bytes the loader may take, or a size such as "4GiB"', free=True)
    reading_threads: int = setting(0, integer(0), "threads that read files; 0: the loader chooses", free=True)
    device: str = setting("auto", text, "auto (a GPU where there is one), cpu, cuda or cuda:1", free=True)
    backend: str = setting("auto", text, "auto, or one of sparc_fast.available_backends()", free=True)
    replicas: int = setting(
        1, integer(1), "of torchrun's ranks: each has all latents, and a part of a batch", free=True
    )
    tensorboard: bool = setting(False, flag, "also write TensorBoard's event files", free=True)
    wandb: str = setting("", text, "also log to this project at Weights & Biases", free=True)

    def __post_init__(self) -> None:
        if self.support_dropout is None:
            object.__setattr__(self, "support_dropout", 0.0 if self.selection in LOCAL else SUPPORT_DROPOUT)
        for f in fields(self):
            value = getattr(self, f.name)
            kind = f.metadata["kind"]
            try:
                object.__setattr__(self, f.name, kind.convert(value))
            except (TypeError, ValueError):
                raise ValueError(f"{f.name} must be {kind.expected}, got {value!r}") from None
        self._check_together()

    @property
    def micro_batch(self) -> int:
        """The most rows that pass through the model at a time."""
        return -(-self.batch_size // self.accumulate)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Config:
        """From a mapping, as a file holds it; ValueError names unknown settings, and what they may have meant."""
        return cls(**known_settings(cls, settings))

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return asdict(self)

    def with_paths_from(self, folder: Path) -> Config:
        """The same, its relative paths those of `folder`."""
        return replace(self, **_from_folder({f.name: getattr(self, f.name) for f in fields(self)}, folder))

    def going_on_from(self, there: Config) -> Config:
        """The same, but where a default has changed since a run began `there`, and nobody says otherwise, its own."""
        if self.selection != there.selection:
            return self
        today: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in NEW_DEFAULTS}
        as_now = replace(self, **today)
        kept = [name for name in NEW_DEFAULTS if getattr(self, name) == getattr(as_now, name)]
        return replace(self, **{name: getattr(there, name) for name in kept})

    def differences(self, other: Config) -> list[str]:
        """Settings in which the two would give different results."""
        theirs = other.bound()
        return [name for name, value in self.bound().items() if value != theirs[name]]

    def bound(self) -> dict[str, Any]:
        """The settings on which a run's results depend."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["free"]}

    def _check_together(self) -> None:
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"steps or epochs must be given, and only one, got {self.steps} and {self.epochs}")
        if self.join != "none" and not self.ids:
            raise ValueError(f"ids must be given for join to match rows by, got join {self.join!r} without ids")
        if self.join == "none" and self.repeated != "none":
            raise ValueError(f"join must be inner or outer with repeated={self.repeated!r}, got none")
        if self.whiten != "none" and not self.calibrate:
            raise ValueError(f"calibrate must be true with whiten={self.whiten!r}, got false")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must be at most batch_size={self.batch_size}, got {self.accumulate}")
        if self.accumulate > 1 and self.lazy and self.moments == "bfloat16":
            raise ValueError(f"accumulate must be 1 with lazy and bfloat16 moments, got {self.accumulate}")
        if self.accumulate > 1 and self.selection == "batch":
            raise ValueError(f'accumulate must be 1 with selection="batch", got {self.accumulate}')
        if self.k > self.n_latents:
            raise ValueError(f"k must be between 1 and n_latents={self.n_latents}, got {self.k}")
        nested_sizes(self.matryoshka, self.n_latents, self.private)  # or an error
        if bool(self.private) != bool(self.private_k):
            raise ValueError(f"private and private_k must be given together, got {self.private} and {self.private_k}")
        shared = self.n_latents - sum(self.private.values())
        if self.private and max(self.k, self.k_start) > shared:
            most = max(self.k, self.k_start)
            raise ValueError(f"private must leave at least k={most} of n_latents={self.n_latents}, got {self.private}")
        if (self.k_start > 0) != (self.k_ramp > 0):
            raise ValueError(f"k_start and k_ramp must be given together, got {self.k_start} and {self.k_ramp}")
        if self.k_start > self.n_latents:
            raise ValueError(f"k_start must be at most n_latents={self.n_latents}, got {self.k_start}")
        if self.cross_loss_start > 0 and self.cross_loss_ramp == 0:
            raise ValueError(f"cross_loss_ramp must be > 0 with cross_loss_start={self.cross_loss_start}, got 0")
        if self.support_dropout and self.selection in LOCAL:
            raise ValueError("support_dropout must be 0 under local selection: each stream chooses its own support")
        if self.validation_rows and self.validation_data:
            raise ValueError("validation_rows and validation_data must not both be given: they say the same")
        streams = [list(data) for data in (self.data, self.validation_data) if data and not isinstance(data, str)]
        if len(streams) == 2 and streams[0] != streams[1]:
            raise ValueError(f"validation_data must name the streams of data, {streams[0]}, got {streams[1]}")


NEW_DEFAULTS = ("best_by", "support_dropout")
"""Settings whose default was another before, with which runs began that may go on."""

ELSEWHERE = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "topk_type": "selection",
    "dead_steps_threshold": "dead_after (in samples, not batches)",
    "lambda": "cross_loss_coef",
    "lambda_cross": "cross_loss_coef",
    "scheduler": "decay",
}
"""What other programs call some settings."""


def _hint(name: str, known: list[str]) -> str:
    if "accumulate" in known and ("accum" in name or "micro" in name):
        return "; did you mean accumulate, into how many micro-batches the batch_size rows of a step are split?"
    meant = ELSEWHERE.get(name, "")
    if meant.partition(" ")[0] not in known:
        meant = next(iter(difflib.get_close_matches(name, known, 1, 0.5)), "")
    return f"; did you mean {meant}?" if meant else f"; the settings are {', '.join(known)}"


def known_settings(cls: Any, given: Mapping[str, Any], at: str = "", left_out: Collection[str] = ()) -> dict[str, Any]:
    """Those given of a class of settings, called `at` + their names; ValueError where one is unknown or missing."""
    known = [f for f in fields(cls) if f.name not in left_out]
    names = [f.name for f in known]
    for name in given:
        if name not in names:
            raise ValueError(f"{at}{name} is not a setting{_hint(str(name), names)}")
    required = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    if missing := [f"{at}{name}" for name in required if name not in given]:
        raise ValueError(f"{' and '.join(missing)} must be given")
    return dict(given)


def read_config(path: str | Path) -> Config:
    """The settings in a TOML, JSON or YAML file, checked; paths in it are relative to its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a setting is unknown or out of range, or the file is not what its suffix says.
        ImportError: the library that reads it is missing.
    """
    return Config.of(read_settings(path))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings a file holds, not yet checked; paths in it are relative to its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what its suffix says.
        ImportError: the library that reads it is missing.
    """
    path = as_path(path, "path")
    settings = read_table(path, "config")
    for f in fields(Config) if path.suffix in (".yaml", ".yml") else ():
        if f.metadata["kind"].parse is float and isinstance(value := settings.get(f.name), str):
            settings[f.name] = _as_number(value)  # YAML takes 1e-3 for text
    return {**settings, **_from_folder(settings, path.parent)}


def _from_folder(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Those of settings, by name, that are paths; relative ones are of this folder."""
    kinds = {f.name: f.metadata["kind"] for f in fields(Config)}
    return {
        name: kinds[name].from_folder(value, folder)
        for name, value in settings.items()
        if value and name in kinds and kinds[name].from_folder is not None
    }


def open_files(config: Config, validation: bool = False) -> AlignedFiles:
    """The files of ``config.data``, or those to validate on."""
    sources_ = config.validation_data if validation else config.data
    ids = config.validation_ids or (config.ids if isinstance(config.ids, str) else "") if validation else config.ids
    if validation and config.join != "none" and not ids:
        raise ValueError("validation_ids must be given with validation_data, where ids is a table")
    return data.open(
        sources_, split="held_out" if validation else "train", ids=ids or None,
        join=None if config.join == "none" else cast(Any, config.join),
        repeated=None if config.repeated == "none" else cast(Any, config.repeated),
    )  # fmt: skip


def streams_of(sources: str | Sources) -> list[str]:
    """Their names, in order."""
    return list(FeatureFolder(sources).streams if isinstance(sources, str) else sources)


def read_table(path: Path, what: str) -> dict[str, Any]:
    """The settings that a TOML, JSON or YAML file holds; `what` they are of, for messages."""
    if not path.is_file():
        raise FileNotFoundError(f"{what} must be a file of settings, but there is no file {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{what} must end in one of {', '.join(SUFFIXES)}, got {path}")
    content = _parsed(path, what)
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} must hold a table of settings, got {type(content).__name__} in {path}")
    return dict(content)


def _parsed(path: Path, what: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            library = "tomllib" if find_spec("tomllib") else "tomli"  # before Python 3.11
            return _library(library, "tomli", path).loads(text)
        if path.suffix == ".json":
            return json.loads(text)
        return _library("yaml", "PyYAML", path).safe_load(text)
    except (ImportError, OSError):
        raise
    except Exception as error:  # every library has its own
        raise ValueError(f"{what} must be {path.suffix[1:].upper()}, but {path} is not: {error}") from error


def _library(module: str, package: str, path: Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs {package}: pip install 'sparc_fast[train]', or write it as JSON"
        ) from error


def _as_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text

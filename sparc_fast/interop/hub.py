"""Models on the Hugging Face Hub: a folder with the model's file, its configuration and a model card, and back.

`SPARC.save_pretrained`, `push_to_hub` and `from_pretrained` are these. They take what huggingface_hub's ModelHubMixin
takes, which `SPARC` is not: that package is needed to reach the Hub, not to import this one or to write a folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from sparc_fast.checkpoint import FORMAT
from sparc_fast.files import as_path, read_object, write_text
from sparc_fast.selection import BY_THRESHOLD
from sparc_fast.version import __version__

__all__ = ["Card", "fetch", "push_to_hub", "save_pretrained"]

MODEL, CONFIG, CARD, EVALUATION = "model.safetensors", "config.json", "README.md", "evaluation.json"
TAGS = ("sparse-autoencoder", "sparc", "interpretability", "multimodal")
PAPER = "arXiv [2507.06265](https://arxiv.org/abs/2507.06265)"


class Model(Protocol):
    """What is written of a `SPARC`."""

    @property
    def is_calibrated(self) -> bool: ...

    def config(self) -> dict[str, Any]: ...

    def save(self, path: str | Path) -> None: ...


class Evaluation(Protocol):
    """What is written of a `sparc_fast.evaluate.Evaluation`."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Card:
    """What people should know of a model, beside what its file says."""

    title: str = "SPARC"
    data: str = ""
    """What it was trained on, in Markdown."""
    evaluation: Mapping[str, Evaluation | Mapping[str, Any]] = field(default_factory=dict)
    """By model, this one first, what `evaluate` found, or what ``sparc-fast eval --json`` printed."""
    picture: str | Path | None = None
    """A file, shown below the table."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the training run, such as its config.json; look through the paths in it."""
    license: str | None = None
    """As the Hub names it, such as "apache-2.0"."""
    datasets: Sequence[str] = ()
    """Their names on the Hub."""

    def scores(self) -> dict[str, dict[str, float | None]]:
        """Model -> score -> value."""
        return {name: dict(found["scores"]) for name, found in self._found().items()}

    def _found(self) -> dict[str, Mapping[str, Any]]:
        """The evaluation, as ``sparc-fast eval --json`` prints it."""
        found = {name: e.to_dict() if hasattr(e, "to_dict") else e for name, e in self.evaluation.items()}
        for name, one in found.items():
            if not (isinstance(one, Mapping) and isinstance(one.get("scores"), Mapping)):
                raise ValueError(
                    "evaluation must be of models by name, as sparc-fast eval --json prints it, "
                    f"got {type(one).__name__} for {name!r}"
                )
        return found

    def as_text(self, model: Model, repository: str) -> str:
        """The model card, in Markdown; `repository` is what `SPARC.from_pretrained` takes."""
        about: dict[str, Any] = {"library_name": "sparc_fast", "license": self.license}
        about |= {"tags": list(TAGS), "datasets": list(self.datasets)}
        config = model.config()
        d_streams, normalize, k = config["d_streams"], config.get("normalize", {}), config["k"]
        streams = [[name, f"{width:,}", normalize.get(name, "none")] for name, width in d_streams.items()]
        first = next(iter(d_streams))
        usually = " on average" if config["selection"] in BY_THRESHOLD else ""
        private = _private(config.get("private", {}))
        calibrated = "centred and scaled by the model" if model.is_calibrated else "taken as they are"
        parts = [
            # JSON is YAML
            "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in about.items() if value), "---"]),
            f"# {self.title}",
            f"A sparse autoencoder over {len(streams)} {'stream' if len(streams) == 1 else 'streams'} that share "
            f"{config['n_latents']:,} latents, {k} of them active a sample{usually} ({config['selection']} selection): "
            f"SPARC, {PAPER}, by sparc_fast {__version__}. Inputs are {calibrated}.{private}",
            _table(["stream", "width", "rows normalized"], streams),
            "## Use",
            "```python\nimport sparc_fast as sf\n\n"
            f"model = sf.SPARC.from_pretrained({json.dumps(repository)})  # pip install 'sparc_fast[hub]'\n"
            f"codes = model.encode({{{json.dumps(first)}: x}})  "
            f"# x [N, {d_streams[first]}]; values and indices of {k} latents a sample{usually}\n```",
        ]
        if self.data:
            parts += ["## Data", self.data]
        if self.evaluation:
            parts += ["## Evaluation", *self._evaluation()]
        if self.picture is not None:
            parts.append(f"![{self.title}]({Path(self.picture).name})")
        if self.settings:
            parts += ["## Training", _code(self.settings)]
        parts += ["## Configuration", _code(config)]
        return "\n\n".join(parts) + "\n"

    def _evaluation(self) -> list[str]:
        """A row a score, a column a model."""
        found, scores = self._found(), self.scores()
        names = {key: name for one in found.values() for key, name in one.get("names", {}).items()}
        keys = list(dict.fromkeys(key for of_model in scores.values() for key in of_model))
        rows = [[names.get(key, key), *(_number(of_model.get(key)) for of_model in scores.values())] for key in keys]
        n = next(iter(found.values()))["n_samples"]
        return [f"Of {n:,} samples; `{EVALUATION}` has all figures.", _table(["", *scores], rows)]


def save_pretrained(model: Model, folder: str | Path, card: Card | None = None, *, repository: str = "") -> None:
    """Write a folder as the Hub shows it: model.safetensors, config.json, README.md, and what the card holds.

    Args:
        folder: is made; files of these names in it are replaced.
        repository: what the card says is to be loaded; by default the folder's name.

    Raises:
        FileNotFoundError: the card's picture is not there.
        ValueError: the folder holds the configuration of something else, such as a training run.
        OSError: the folder cannot be written.
    """
    folder, card = as_path(folder, "folder"), card or Card()
    if (folder / CONFIG).is_file() and read_object(folder / CONFIG, "folder").get("format") != FORMAT:
        raise ValueError(f"folder must not hold another {CONFIG}, such as a training run's, got {folder}")
    if card.picture is not None and not Path(card.picture).is_file():
        raise FileNotFoundError(f"picture must be a file, but there is none at {card.picture}")
    texts = {
        CONFIG: json.dumps({"format": FORMAT, "sparc_fast_version": __version__, **model.config()}, indent=2) + "\n",
        CARD: card.as_text(model, repository or folder.resolve().name),
    }
    if card.evaluation:
        texts[EVALUATION] = json.dumps(card._found(), indent=2) + "\n"
    model.save(folder / MODEL)
    if card.picture is not None and Path(card.picture).resolve() != (folder / Path(card.picture).name).resolve():
        shutil.copyfile(card.picture, folder / Path(card.picture).name)
    for name, text in texts.items():
        write_text(folder / name, text)


def push_to_hub(
    model: Model,
    repo_id: str,
    card: Card | None = None,
    *,
    commit_message: str = "Upload a SPARC model",
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """`save_pretrained` into a repository of the Hub, made if need be, in one commit; returns the commit's address.

    Raises:
        ImportError: huggingface_hub is not installed.
    """
    api = _hub().HfApi(token=token)
    repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, card, repository=repo_id)
        commit = api.upload_folder(
            repo_id=repo_id, repo_type="model", folder_path=folder, commit_message=commit_message, revision=branch,
            create_pr=create_pr,
        )  # fmt: skip
        return str(commit)


def fetch(
    name: str | Path, *, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None, force_download: bool = False, local_files_only: bool = False,
) -> Path:  # fmt: skip
    """The file of a model: of a folder that is there, or of a repository of the Hub, downloaded if need be."""
    if Path(name).is_dir():
        return Path(name) / MODEL
    file = _hub().hf_hub_download(
        str(name), MODEL, revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
        local_files_only=local_files_only,
    )  # fmt: skip
    return Path(file)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hugging Face Hub needs huggingface_hub: pip install 'sparc_fast[hub]'") from error
    return huggingface_hub


def _private(counts: Mapping[str, int]) -> str:
    own = ", ".join(f"{stream} {count:,}" for stream, count in counts.items())
    return f" Of the latents these are of one stream alone, and fire beside the others: {own}." if own else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(content: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(dict(content), indent=2)}\n```"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"

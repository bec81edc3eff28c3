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
from typing import TYPE_CHECKING, Any

from sparc_fast.checkpoint import FORMAT
from sparc_fast.files import write_text
from sparc_fast.model import SPARC
from sparc_fast.selection import BY_THRESHOLD
from sparc_fast.version import __version__

if TYPE_CHECKING:
    from sparc_fast.evaluate import Evaluation

__all__ = ["Card", "fetch", "push_to_hub", "save_pretrained"]

MODEL, CONFIG, CARD, EVALUATION = "model.safetensors", "config.json", "README.md", "evaluation.json"
TAGS = ("sparse-autoencoder", "sparc", "interpretability", "multimodal")
PAPER = "arXiv [2507.06265](https://arxiv.org/abs/2507.06265)"


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
        """The evaluation, as the command prints it."""
        return {name: e if isinstance(e, Mapping) else e.to_dict() for name, e in self.evaluation.items()}

    def as_text(self, model: SPARC, repository: str) -> str:
        """The model card, in Markdown; `repository` is what `SPARC.from_pretrained` takes."""
        about: dict[str, Any] = {"library_name": "sparc_fast", "license": self.license}
        about |= {"tags": list(TAGS), "datasets": list(self.datasets)}
        streams = [[name, f"{width:,}", model.normalize.get(name, "none")] for name, width in model.d_streams.items()]
        first = model.streams[0]
        usually = " on average" if model.selection in BY_THRESHOLD else ""
        calibrated = "centred and scaled by the model" if model.is_calibrated else "taken as they are"
        parts = [
            # JSON is YAML
            "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in about.items() if value), "---"]),
            f"# {self.title}",
            f"A sparse autoencoder over {len(streams)} {'stream' if len(streams) == 1 else 'streams'} that share "
            f"{model.n_latents:,} latents, {model.k} of them active a sample{usually} ({model.selection} selection): "
            f"SPARC, {PAPER}, by sparc_fast {__version__}. Inputs are {calibrated}.{_private(model)}",
            _table(["stream", "width", "rows normalized"], streams),
            "## Use",
            "```python\nimport sparc_fast as sf\n\n"
            f"model = sf.SPARC.from_pretrained({json.dumps(repository)})  # pip install 'sparc_fast[hub]'\n"
            f"codes = model.encode({{{json.dumps(first)}: x}})  "
            f"# x [N, {model.d_streams[first]}]; values and indices of {model.k} latents a sample{usually}\n```",
        ]
        if self.data:
            parts += ["## Data", self.data]
        if self.evaluation:
            parts += ["## Evaluation", *self._evaluation()]
        if self.picture is not None:
            parts.append(f"![{self.title}]({Path(self.picture).name})")
        if self.settings:
            parts += ["## Training", _code(self.settings)]
        parts += ["## Configuration", _code(model.config())]
        return "\n\n".join(parts) + "\n"

    def _evaluation(self) -> list[str]:
        """A row a score, a column a model."""
        from sparc_fast.evaluate import table

        scores = self.scores()
        names = {row.key: row.name for row in table({})}
        keys = list(dict.fromkeys(key for of_model in scores.values() for key in of_model))
        rows = [[names.get(key, key), *(_number(of_model.get(key)) for of_model in scores.values())] for key in keys]
        n = next(iter(self._found().values()))["n_samples"]
        return [f"Of {n:,} samples; `{EVALUATION}` has all figures.", _table(["", *scores], rows)]


def save_pretrained(model: SPARC, folder: str | Path, card: Card | None = None, *, repository: str = "") -> None:
    """Write a folder as the Hub shows it: model.safetensors, config.json, README.md, and what the card holds.

    Args:
        folder: is made; files of these names in it are replaced.
        repository: what the card says is to be loaded; by default the folder's name.

    Raises:
        FileNotFoundError: the card's picture is not there.
        OSError: the folder cannot be written.
    """
    folder, card = Path(folder), card or Card()
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
    model: SPARC,
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


def _private(model: SPARC) -> str:
    own = [f"{stream} {some.stop - some.start:,}" for stream, some in model.private_latents.items()]
    return (
        f" Of the latents these are of one stream alone, and fire beside the others: {', '.join(own)}." if own else ""
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(content: Mapping[str, Any]) -> str:
    return f"```json\n{json.dumps(dict(content), indent=2)}\n```"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"

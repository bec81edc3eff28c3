"""Models as the Hugging Face Hub holds them: a folder that loads offline, with a card that says what is in it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import in_fork

import sparc_fast as sf
from sparc_fast.evaluate import evaluate
from sparc_fast.interop import hub

D = {"dino": 6, "clip | txt": 4}


@pytest.fixture
def model() -> sf.SPARC:
    torch.manual_seed(0)
    model = sf.SPARC(D, 12, 3, auxk=4, normalize={"dino": "l2"})
    model.calibrate(batch())
    return model


def batch(n: int = 20) -> dict[str, torch.Tensor]:
    return {s: torch.randn(n, d) for s, d in D.items()}


def same(a: sf.SPARC, b: sf.SPARC) -> bool:
    return a.config() == b.config() and all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def front_matter(text: str) -> dict[str, Any]:
    lines = text.split("---\n")[1].splitlines()
    return {name: json.loads(value) for name, value in (line.split(": ", 1) for line in lines)}


def test_a_folder_comes_back_as_the_same_model(model: sf.SPARC, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert same(sf.SPARC.from_pretrained(tmp_path / "mine"), model)
    assert same(sf.SPARC.from_pretrained(str(tmp_path / "mine"), device="cpu", backend="reference"), model)
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert model.config().items() <= config.items()
    assert 'from_pretrained("mine")' in (tmp_path / "mine" / "README.md").read_text()


def test_a_batchtopk_model_comes_back_with_thresholds_in_eval_mode(tmp_path: Path) -> None:
    model = sf.SPARC(D, 12, 3, selection="batch")
    inputs = {name: torch.randn(20, width) for name, width in D.items()}
    model.learn_thresholds(inputs)
    model.save_pretrained(tmp_path / "model")
    found = sf.SPARC.from_pretrained(str(tmp_path / "model"))
    whole = found.encode(inputs)
    one = found.encode({name: x[:1] for name, x in inputs.items()})
    assert torch.equal(whole.dense("dino")[:1], one.dense("dino"))  # whoever else is in the batch
    assert "3 of them active a sample on average (batch selection)" in (tmp_path / "model" / "README.md").read_text()


def test_the_card_says_what_was_given_and_what_the_model_is(model: sf.SPARC, tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(b"\x89PNG")
    found = evaluate(model, batch())
    printed = {"untrained": {**found.to_dict(), "scores": {"r1": 0.125, "mine": None}}}
    card = hub.Card(
        title="Glyphs",
        data="9,000 glyphs.",
        evaluation={"SPARC": found, **json.loads(json.dumps(printed))},
        picture=tmp_path / "figure.png",
        settings={"lr": 1e-3},
        license="apache-2.0",
        datasets=["me/glyphs"],
    )
    model.save_pretrained(tmp_path / "out", card)
    text = (tmp_path / "out" / "README.md").read_text()
    about = front_matter(text)
    assert (about["library_name"], about["license"], about["datasets"]) == ("sparc_fast", "apache-2.0", ["me/glyphs"])
    for line in (
        "# Glyphs",
        "9,000 glyphs.",
        "| dino | 6 | l2 |",
        r"| clip \| txt | 4 | none |",
        "Of 20 samples; `evaluation.json` has all figures.",
        "|  | SPARC | untrained |",
        "![Glyphs](figure.png)",
        '  "lr": 0.001',
        '  "n_latents": 12,',
    ):
        assert line in text.splitlines(), line
    assert "Inputs are centred and scaled by the model." in text
    scores = found.scores()
    assert re.search(rf"^\| .* \| {scores['r1']:.4g} \| 0\.125 \|$", text, re.MULTILINE)
    assert "| mine | – | – |" in text.splitlines()
    assert (tmp_path / "out" / "figure.png").read_bytes() == b"\x89PNG"
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert kept == {"SPARC": json.loads(json.dumps(found.to_dict())), **printed}


def test_the_code_on_the_card_runs(model: sf.SPARC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path / "mine")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "mine" / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"x": batch()["dino"]}
    exec(code[1], names)
    assert names["codes"].values.shape == (20, 1, 3)


def test_a_repository_is_found_in_the_cache_without_a_network(model: sf.SPARC, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--me--glyphs"
    model.save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    assert same(sf.SPARC.from_pretrained("me/glyphs", cache_dir=tmp_path, local_files_only=True), model)
    assert same(
        sf.SPARC.from_pretrained("me/glyphs", cache_dir=tmp_path, local_files_only=True, revision=commit), model
    )


def test_pushing_uploads_the_folder_in_one_commit(
    model: sf.SPARC, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, **asked: Any) -> SimpleNamespace:
            calls.append(("create", asked))
            return SimpleNamespace(repo_id=f"me/{asked['repo_id']}")

        def upload_folder(self, folder_path: str, **asked: Any) -> str:
            calls.append(("upload", asked))
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return "https://there/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = model.push_to_hub("glyphs", private=True, token="secret", branch="trial")
    assert address == "https://there/commit/1"
    assert [name for name, _ in calls] == ["token", "create", "upload"]
    assert calls[1][1] == {"repo_id": "glyphs", "private": True, "exist_ok": True}
    assert calls[2][1]["repo_id"] == "me/glyphs"
    assert (calls[2][1]["revision"], calls[2][1]["repo_type"]) == ("trial", "model")
    assert same(sf.SPARC.from_pretrained(tmp_path / "uploaded"), model)
    text = (tmp_path / "uploaded" / "README.md").read_text()
    assert 'from_pretrained("me/glyphs")' in text
    assert "secret" not in text


def test_what_is_missing_is_said_before_anything_is_written(model: sf.SPARC, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"picture must be a file, but there is none at .*none\.png"):
        model.save_pretrained(tmp_path / "out", hub.Card(picture=tmp_path / "none.png"))
    assert not (tmp_path / "out").exists()
    for evaluation in ({"n_samples": 3}, {"run": {"nmse": 0.5}}):
        with pytest.raises(
            ValueError, match="evaluation must be of models by name, as sparc-fast eval --json prints it"
        ):
            model.save_pretrained(tmp_path / "out", hub.Card(evaluation=evaluation))
    assert not (tmp_path / "out").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"n_latents": 64}')
    with pytest.raises(ValueError, match=r"folder must not hold another config\.json, such as a training run's, got"):
        model.save_pretrained(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*empty/model\.safetensors"):
        sf.SPARC.from_pretrained(tmp_path / "empty")
    with pytest.raises(TypeError, match="revison"):
        sf.SPARC.from_pretrained(tmp_path / "empty", revison="main")


def without_huggingface_hub(folder: Path) -> list[str]:
    assert "huggingface_hub" not in sys.modules
    sys.modules["huggingface_hub"] = None  # type: ignore[assignment]
    model, said = sf.SPARC.load(folder / "model.safetensors"), []
    model.save_pretrained(folder / "out")
    sf.SPARC.from_pretrained(folder / "out")
    for call in (lambda: model.push_to_hub("me/glyphs"), lambda: sf.SPARC.from_pretrained("me/glyphs")):
        with pytest.raises(ImportError) as error:
            call()
        said.append(str(error.value))
    return said


def test_without_huggingface_hub_folders_work_and_the_hub_says_what_to_install(model: sf.SPARC, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    words = "the Hugging Face Hub needs huggingface_hub: pip install 'sparc_fast[hub]'"
    assert in_fork(without_huggingface_hub, tmp_path) == [words] * 2

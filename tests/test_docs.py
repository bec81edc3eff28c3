"""What the README and the docs show is what the program takes: commands, settings, and code that runs as it stands."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch

import sparc_fast as sf
from sparc_fast.cli import _parser
from sparc_fast.extract.config import read_extraction
from sparc_fast.training import Config
from sparc_fast.training.config import read_settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(lines: list[str]) -> Iterator[list[str]]:
    """The words of each `sparc-fast …`, `python -m …` and `torchrun … -m sparc_fast …`."""
    for line in lines:
        for part in re.split(r"&&|;", line.partition(" #")[0]):
            start = re.match(r"\s*(?:\S*bin/)?(?=sparc-fast |python3? -m )|\s*torchrun .*?-m (?=sparc_fast )", part)
            if start is not None:
                yield shlex.split(part[start.end() :])


def is_there(module: str) -> bool:
    return find_spec(re.sub("^benchmarks", "sparc_fast.benchmarks", module)) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_docs_is_one_that_the_program_takes(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for block in blocks("sh", page) for line in block.replace("\\\n", " ").splitlines()]
    refused = []
    for program, *words in commands(lines):
        if program.startswith("python"):
            refused += [] if is_there(words[1]) else [words[1]]
        elif words[0] != "bench":  # whose options are its own
            try:
                _parser(words[0]).parse_args([word for word in words if word != "…"])
            except SystemExit:
                refused.append(f"{shlex.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")
    assert refused == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_and_module_that_a_sentence_names_is_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    missing = []
    for program, *words in commands(lines):
        if program.startswith("python"):
            missing += [] if is_there(words[1]) else [words[1]]
        elif words[0] != "bench" and not words[0].startswith("--"):
            subcommands: Any = _parser(words[0])._subparsers
            flags = subcommands._group_actions[0].choices[words[0]]._option_string_actions
            missing += [f"{words[0]} {word}" for word in words[1:] if word.startswith("--") and word not in flags]
    assert missing == []


def test_every_table_of_settings_in_the_docs_is_one_that_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    for table in blocks("toml", ROOT / "docs" / "your_models.md"):
        file.write_text(table)
        read_extraction(file)
    streams = {"dino": "dino.npy", "clip": "clip.npy", "clip_img": "img.npy", "clip_txt": "txt.npy"}
    for table in blocks("toml", ROOT / "docs" / "training.md"):
        file.write_text(table)
        few = {"n_latents": 8192, "k": 56, "data": streams}  # of which some tables show others
        settings = read_settings(file)
        Config.of({**few, **settings, "epochs": settings.get("epochs", 1)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_code_in_the_docs_imports_is_there(page: Path) -> None:
    for block in blocks("python", page):
        for line in ast.walk(ast.parse(block)):
            if isinstance(line, ast.Import | ast.ImportFrom):
                of = [line.module or ""] if isinstance(line, ast.ImportFrom) else [name.name for name in line.names]
                if all(name.partition(".")[0] == "sparc_fast" for name in of):
                    exec(ast.unparse(line), {})


# ---- code that runs


def run(page: str, block: int, names: dict[str, Any]) -> dict[str, Any]:
    """`names` and those that the block gives, with a dictionary and epochs that take no minutes and no other change."""
    code = blocks("python", ROOT / page)[block]
    for large, small in (
        ("131072", "512"),
        ("n_latents=8192", "n_latents=512"),
        ("2**20", "512"),
        ("range(50)", "(0, 1)"),
        ("epochs=50", "epochs=2"),
    ):
        code = code.replace(large, small)
    exec(compile(code, f"block {block} of {page}", "exec"), names)
    return names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def files(here: Path) -> Path:
    """The files that the pages of data and training open."""
    n, generator = 4200, torch.Generator().manual_seed(0)
    x = {name: torch.randn(n, 8, generator=generator).numpy() for name in ("dino", "clip_img", "clip_txt")}
    with h5py.File("dino.h5", "w") as file:
        file["features"], file["indices"] = x["dino"], np.arange(n)
    np.save("clip_img.npy", x["clip_img"])
    safetensors.numpy.save_file({"embeddings": x["clip_txt"]}, "texts.safetensors")
    for folder in ("clip", "shards"):
        Path(folder).mkdir()
    for part, rows in enumerate(np.array_split(np.arange(n - 10), 2)):
        np.save(f"clip/img_emb_{part}.npy", x["clip_img"][rows])
        np.save(f"clip/ids_{part}.npy", rows)
    twice = np.repeat(np.arange(n)[::-1], 2)
    pq.write_table(pa.table({"image_id": twice, "features": list(x["clip_txt"][twice])}), "captions.parquet")
    np.save("shards/0.npy", x["clip_txt"])
    return here


def test_the_readme_trains_encodes_decodes_and_saves(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("README.md", 0, {})
    assert names["x_hat"].shape == (4096, 1024)
    assert capsys.readouterr().out.count("total ") == 4
    assert sf.SPARC.load("model.safetensors").n_latents == 512


def test_features_are_read_in_their_order_and_joined_by_ids(files: Path) -> None:
    names = run("docs/data.md", 0, {})
    assert not names["model"].dead.any()
    names = run("docs/data.md", 1, names)
    assert int((~names["files"].present).sum()) == 10


@pytest.mark.filterwarnings("ignore:a run of 2 steps is short")
def test_a_run_is_made_and_watched(files: Path) -> None:
    names = run("docs/training.md", 0, {})
    assert names["outcome"].stopped_by is None
    assert names["trainer"].model.n_latents == 512
    run("docs/training.md", 1, names)


def test_metrics_of_ones_own_and_changed_codes_are_told(here: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = dict.fromkeys(("dino", "clip", "image", "text", "clip_text", "clip_image"), 8)
    torch.manual_seed(0)
    model = sf.SPARC(widths, 1300, 4)
    inputs = {name: torch.randn(1200, width, generator=generator) for name, width in widths.items()}
    with torch.no_grad():
        single, codes = {name: model.encode({name: x}).stream(name) for name, x in inputs.items()}, model.encode(inputs)
    labels = torch.rand(1200, 3, generator=generator) < 0.4
    names = {"model": model, "inputs": inputs, "labels": labels, "single": single, "embeddings": inputs["clip"]}
    names |= {"codes": codes, "sparc_fast": sf}
    for block in range(3):
        run("docs/evaluation.md", block, names)
        if block == 1:
            assert names["found"].candidates.shape == (5, 10)
    known = run("docs/evaluation.md", 3, {"model": sf.SPARC({"a": 256, "b": 128}, 64, 4)})
    assert known["found"].mean_joint < known["found"].mean_max < 1
    Path("codes").mkdir()
    codes.save("codes/codes.safetensors")
    for block in (4, 5):
        run("docs/evaluation.md", block, names)
    assert names["twice"].shape == (1200, 8)


def test_a_model_goes_to_the_hub_s_format_with_a_card_and_back(here: Path) -> None:
    torch.manual_seed(0)
    model, x = sf.SPARC({"a": 8, "b": 6}, 32, 4), {"a": torch.randn(40, 8), "b": torch.randn(40, 6)}
    found = sf.evaluate.evaluate(model, x)
    Path("sparc_report").mkdir()
    shutil.copy(ROOT / "docs" / "alignment.png", "sparc_report")
    names = run("docs/formats.md", 0, {"model": model, "evaluation": found, "baseline": found})
    assert torch.equal(names["model"].W_enc, model.W_enc)
    assert "9,000 characters" in Path("glyphs/README.md").read_text()


@pytest.mark.distributed
def test_latents_are_shared_sent_for_and_saved_by_ranks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one, which has all: what several do, their own tests tell."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {**there, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    batches = [torch.randn(16, 1024 + 768) for _ in range(3)]
    try:
        names = run("docs/distributed.md", 0, {"inputs": batches[0]})
        assert sf.SPARC.load("model.safetensors").n_latents == 512
        run("docs/distributed.md", 1, {**names, "batches": iter(batches)})
        state = {name: weights.clone() for name, weights in names["model"].state_dict().items()}
        run("docs/distributed.md", 2, names)
        for name, weights in names["model"].state_dict().items():
            assert torch.equal(weights, state[name])
    finally:
        torch.distributed.destroy_process_group()

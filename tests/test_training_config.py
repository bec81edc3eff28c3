"""Settings: every one is documented and checked, from Python, files and flags alike."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparc_fast import planning, training
from sparc_fast.training import Config, read_config, read_settings
from sparc_fast.training.config import parse_source

LEAST: dict[str, Any] = {"n_latents": 16, "k": 2, "steps": 10}
DOCUMENTATION = Path(__file__).parents[1] / "docs" / "training.md"


def test_every_setting_is_documented() -> None:
    page = DOCUMENTATION.read_text(encoding="utf-8")
    table = page[page.index("| setting | default |") :].partition("\n\n")[0]
    settings = "".join(line.split("|")[1] for line in table.splitlines())
    for f in fields(Config):
        assert f.metadata["help"]
        assert f"`{f.name}`" in settings, f"docs/training.md does not have {f.name} among its settings"


def test_settings_survive_json() -> None:
    config = Config(**LEAST, data={"a": "a.npy", "b": ("b.h5", "rows")}, lr=1)
    again = Config.of(json.loads(json.dumps(config.as_dict())))
    assert again == config
    assert isinstance(again.lr, float)
    assert again.data["b"] == ("b.h5", "rows")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"k": 0}, "k must be an integer >= 1, got 0"),
    ({"k": 2.0}, "k must be an integer >= 1, got 2.0"),
    ({"k": True}, "k must be an integer >= 1, got True"),
    ({"lr": 0}, "lr must be a number > 0, got 0"),
    ({"lr": float("nan")}, "lr must be a number > 0, got nan"),
    ({"lr": "1e-3"}, "lr must be a number > 0, got '1e-3'"),
    ({"warmup": 1.5}, "warmup must be a number from 0 to 1, got 1.5"),
    ({"beta_2": 1.0}, "beta_2 must be a number >= 0 and < 1, got 1.0"),
    ({"decay": "exponential"}, "decay must be one of cosine, linear, constant, got 'exponential'"),
    ({"moments": "float16"}, "moments must be one of float32, bfloat16, got 'float16'"),
    ({"lazy": "yes"}, "lazy must be true or false, got 'yes'"),
    ({"data": ["a.npy"]}, r"data must be a table of streams, each a path, a list of files or \[path, name\], or a folder of features, got \['a.npy'\]"),
    ({"data": {"a": 3}}, "data must be a table of streams"),
    ({"data": {"a": {"path": "a.h5", "nam": "x"}}}, "data must be a table of streams"),
    ({"ids": 3}, "ids must be the name of a data set in every file, or a table of streams as for data, got 3"),
    ({"join": "inner"}, "ids must be given for join to match rows by, got join 'inner' without ids"),
    ({"repeated": "all"}, "join must be inner or outer with repeated='all', got none"),
    ({"join": "left"}, "join must be one of none, inner, outer, got 'left'"),
    ({"memory": "4 apples"}, 'memory must be an integer >= 1, in bytes, or a size such as "4GiB", got \'4 apples\''),
    ({"wandb": 3}, "wandb must be text, got 3"),
    ({"accumulate": 0}, "accumulate must be an integer >= 1, got 0"),
    ({"accumulate": 9, "batch_size": 8}, "accumulate must be at most batch_size=8, got 9"),
    ({"k": 17}, "k must be between 1 and n_latents=16, got 17"),
    ({"epochs": 2.0}, "steps or epochs must be given, and only one, got 10 and 2.0"),
    ({"steps": 0}, "steps or epochs must be given, and only one, got 0 and 0.0"),
    ({"k_start": 4}, "k_start and k_ramp must be given together, got 4 and 0.0"),
    ({"k_start": 17, "k_ramp": 0.5}, "k_start must be at most n_latents=16, got 17"),
    ({"cross_loss_start": 1.0}, "cross_loss_ramp must be > 0"),
    ({"selection": "local", "support_dropout": 0.5}, "support_dropout must be 0 under local selection"),
    ({"data": {"a": "x"}, "validation_data": {"b": "y"}}, r"validation_data must name the streams of data, \['a'\], got"),
    ({"data": {"a": "x"}, "validation_data": {"a": "y"}, "validation_rows": 3}, "must not both be given"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_setting_out_of_range_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.of({**LEAST, **changes})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n_latent", "n_latent is not a setting; did you mean n_latents?"),
        ("learning_rate", "did you mean lr?"),
        ("topk_type", "did you mean selection?"),
        ("qqq", "qqq is not a setting; the settings are data, "),
        ("gradient_accumulation_steps", "did you mean accumulate, into how many micro-batches the batch_size rows"),
        ("micro_batch_size", "did you mean accumulate"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_one_it_may_have_meant(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.of({**LEAST, name: 1})


def test_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match="n_latents and k must be given"):
        Config.of({"steps": 3})


FILES = {
    "c.toml": 'n_latents = 16\nk = 2\nsteps = 10\nlr = 1e-3\n[data]\na = "sub/a.npy"\nb = ["b.h5", "rows"]\n',
    "c.json": '{"n_latents": 16, "k": 2, "steps": 10, "lr": 1e-3, "data": {"a": "sub/a.npy", "b": ["b.h5", "rows"]}}',
}


def test_sources_of_every_shape_survive_json_and_are_made_absolute(tmp_path: Path) -> None:
    data = {
        "file": "a.npy", "named": ("a.h5", "rows"), "shards": ["a_1.npy", "a_2.npy"], "named shards": (["1.h5", "2.h5"], "rows"),
        "folder": "shards", "pattern": "shards/*.npy", "named folder": ("shards", "rows"),
    }  # fmt: skip
    config = Config(**LEAST, data=data, ids={"file": "ids.txt", "shards": ["1.txt", "2.txt"]}, join="inner")
    assert dict(config.data) == data
    assert Config.of(json.loads(json.dumps(config.as_dict()))) == config
    moved = config.with_paths_from(tmp_path)
    assert moved.data["named shards"] == ([str(tmp_path / "1.h5"), str(tmp_path / "2.h5")], "rows")
    assert moved.data["pattern"] == str(tmp_path / "shards" / "*.npy")
    assert isinstance(moved.ids, dict)
    assert moved.ids["shards"] == [str(tmp_path / "1.txt"), str(tmp_path / "2.txt")]
    assert moved.with_paths_from(Path("/elsewhere")) == moved
    assert Config(**LEAST, ids="id", join="outer").with_paths_from(tmp_path).ids == "id"
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for link, target in (("linked.npy", "blob"), ("latest", "folder")):
        (tmp_path / link).symlink_to(target)
    linked = Config(**LEAST, data={"a": "linked.npy", "b": "latest"}).with_paths_from(tmp_path)
    assert linked.data == {"a": str(tmp_path / "linked.npy"), "b": str(tmp_path / "folder")}, "a file as it is named"
    tables = {"a": {"path": "a.h5", "name": "rows"}, "b": {"path": ["1.npy", "2.npy"]}}
    assert Config(**LEAST, data=tables).data == {"a": ("a.h5", "rows"), "b": ["1.npy", "2.npy"]}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a=b.npy", "b.npy"),
        ("a=b.h5#rows", ("b.h5", "rows")),
        ("a=b=c.npy", "b=c.npy"),
        ("a=b#1.npy", "b#1.npy"),
        ("a=b#1.h5#group/rows", ("b#1.h5", "group/rows")),
        ("a=shards", "shards"),
        ("a=shards#rows", ("shards", "rows")),
        ("a=shards/*.h5#rows", ("shards/*.h5", "rows")),
        ("a=1.h5,2.h5#rows", (["1.h5", "2.h5"], "rows")),
        ("a=one, two.npy", "one, two.npy"),
        ("a=here#1", "here#1"),
        ("a=here.h5#1", "here.h5#1"),
    ],
)
def test_a_hash_or_comma_in_a_path_does_not_cut_it(
    text: str, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here#1").mkdir()
    (tmp_path / "here.h5#1").touch()
    assert parse_source(text) == ("a", source)


def test_sizes_have_units_and_integers_may_be_of_numpy() -> None:
    assert Config(**LEAST, memory="4GiB").memory == 2**32
    config = Config(n_latents=np.int64(64), k=np.uint8(4), steps=1, lr=np.float32(0.5))  # type: ignore[arg-type]
    assert [type(value) for value in (config.n_latents, config.k, config.lr)] == [int, int, float]


@pytest.mark.parametrize("name", FILES)
def test_files_hold_the_same_settings_with_paths_beside_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    data = {"a": str(tmp_path / "sub" / "a.npy"), "b": (str(tmp_path / "b.h5"), "rows")}
    assert read_config(tmp_path / name) == Config(**LEAST, lr=1e-3, data=data)


class Yaml:
    """What PyYAML makes of a file: numbers such as 1e-3 are text to it."""

    content: object = {**LEAST, "lr": "1e-3", "wandb": "2026", "data": {"a": "a.npy"}}

    @classmethod
    def safe_load(cls, _: str) -> object:
        return cls.content


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", Yaml)  # type: ignore[arg-type]
    (tmp_path / "c.yaml").write_text("read by another")
    config = read_config(tmp_path / "c.yaml")
    assert (config.lr, config.wandb, config.data) == (1e-3, "2026", {"a": str(tmp_path / "a.npy")})


def test_a_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("sparc_fast.training.config.import_module", missing)
    for name, library in (("c.yaml", "PyYAML"), ("c.toml", "tomli")):
        (tmp_path / name).write_text("k = 2")
        with pytest.raises(
            ImportError, match=rf"needs {library}: pip install 'sparc_fast\[train\]', or write it as JSON"
        ):
            read_config(tmp_path / name)


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    for name, text, message in (
        ("c.toml", "k = ", "config must be TOML, but .* is not"),
        ("c.json", "{", "config must be JSON, but .* is not"),
        ("c.json", "[1]", "config must hold a table of settings, got list"),
        ("c.ini", "", "config must end in one of .toml, .json"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / name)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config must be TOML, but .*latin\.toml is not: 'utf-8' codec"):
        read_config(tmp_path / "latin.toml")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_settings(tmp_path / "nothing.toml")


def test_public_names() -> None:
    classes = ["Config", "Outcome", "Sink", "Trainer"]
    functions = ["best_display", "load_model", "read_config", "read_metrics", "read_settings"]
    assert training.__all__ == classes + functions
    assert all(hasattr(training, name) for name in classes + functions)
    assert (training.Machine, training.Plan, training.plan) == (planning.Machine, planning.Plan, planning.plan)
    with pytest.raises(AttributeError, match=r"module 'sparc_fast\.training' has no attribute 'Planner'"):
        training.Planner  # noqa: B018

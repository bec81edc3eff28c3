"""`sparc-fast eval`: the demo's table for any model, and errors in one line."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import D, rows

import sparc_fast as sf
from sparc_fast import cli
from sparc_fast.cli import eval as evaluation
from sparc_fast.evaluate import evaluate, retrieval_scores

N = 60
AsJson = Callable[..., tuple[dict[str, Any], str]]
Refused = Callable[..., str]
FLAGS = ["--n-latents", "64", "--k", "3", "--batch-size", "32", "--progress", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 30 steps, `run`, and held-out samples with labels, `held_out`."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "held_out").mkdir()
    for stream, x in rows(400 + N).items():
        np.save(folder / f"{stream}.npy", x[:400].numpy())
        np.save(folder / "held_out" / f"{stream}.npy", x[400:].numpy())
    np.save(folder / "held_out" / "labels.npy", np.arange(N)[:, None] % 5 == np.arange(5))
    data = [f"{stream}={folder / stream}.npy" for stream in D]
    assert (
        cli.main(["train", "--out", str(folder / "run"), *FLAGS, "--steps", "30", "--lr", "1e-2", "--data", *data]) == 0
    )
    return folder


def held_out() -> dict[str, torch.Tensor]:
    return {stream: x[400:] for stream, x in rows(400 + N).items()}


def run(*arguments: object) -> int:
    return cli.main(["eval", *(str(argument) for argument in arguments)])


@pytest.fixture
def as_json(capsys: pytest.CaptureFixture[str]) -> AsJson:
    """(what is printed as JSON, what is said)."""

    def of(*arguments: object) -> tuple[dict[str, Any], str]:
        assert run(*arguments, "--json") == 0, capsys.readouterr().err
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    return of


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """What is said, in a line."""

    def of(*arguments: object) -> str:
        assert run(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("sparc-fast: ")
        assert error.count("\n") == 1
        return error

    return of


def test_the_table_has_a_column_for_every_model_and_an_untrained_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = next((folder / "run" / "checkpoints").iterdir())
    assert run(folder / "run", f"early [b]={last}", "--data", folder / "held_out") == 0
    printed = capsys.readouterr().out
    head = next(line for line in printed.splitlines() if "samples" in line)
    assert head.split() == ["60", "samples", "run", "early", "[b]", "untrained"]
    for words in ("Concept alignment", "Retrieval R@1", "a → b", "Own error (NMSE)"):
        assert words in printed


@pytest.mark.parametrize("selection", ["batch", "jumprelu", "local_jumprelu"])
def test_a_model_of_thresholds_stands_beside_an_untrained_one_that_fires_as_many_latents(
    selection: str, folder: Path, tmp_path: Path, as_json: AsJson
) -> None:
    model = sf.SPARC(D, 64, 3, selection=selection)  # type: ignore[arg-type]
    x = {stream: x[:400] for stream, x in rows(400 + N).items()}
    model.calibrate(x)
    model.learn_thresholds(x)
    model.save(tmp_path / "model.safetensors")
    found = as_json(f"run={tmp_path / 'model.safetensors'}", "--data", folder / "held_out")[0]
    for name in ("run", "untrained"):
        assert found[name]["scores"]["active"] == pytest.approx(3, rel=0.3), name


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_table_can_be_read_on_every_terminal(folder: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert run(folder / "run", "--data", folder / "held_out") == 0
    sys.stdout.flush()
    printed = written.getvalue().decode(encoding).splitlines()
    lines = printed[: next(n for n, line in enumerate(printed) if "95 % interval over samples" in line)]
    assert any("a > b" in line for line in lines)
    squared = "R²" if encoding == "cp1252" else "R2"
    assert any(f"Own variance explained ({squared})" in line for line in lines)
    assert len({len(line.rstrip()) for line in lines if line.strip()}) == 1, "columns are aligned"


def test_json_has_the_figures_of_evaluate(folder: Path, as_json: AsJson) -> None:
    found = as_json(folder / "run", "--data", folder / "held_out")[0]
    model = sf.SPARC.load(folder / "run" / "model.safetensors")
    labels = torch.from_numpy(np.load(folder / "held_out" / "labels.npy"))
    assert found["run"] == evaluate(model, held_out(), labels).to_dict()
    assert found["untrained"]["nmse"]["a -> a"] > 1.5 * found["run"]["nmse"]["a -> a"]
    assert found["untrained"]["scores"]["jaccard_single"] is not None


def test_the_untrained_model_is_of_the_same_shape_and_calibration_and_its_seed(folder: Path) -> None:
    trained = sf.SPARC.load(folder / "run" / "model.safetensors")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    untrained, again, other = (evaluation.untrained(trained, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected), "it takes from nobody's random numbers"
    assert untrained.config() == trained.config()
    assert untrained.is_calibrated
    assert torch.equal(untrained.input_mean, trained.input_mean)
    assert torch.equal(untrained.input_rms, trained.input_rms)
    assert torch.equal(untrained.W_enc, again.W_enc)
    assert not torch.equal(untrained.W_enc, other.W_enc)
    assert not torch.equal(untrained.W_enc, trained.W_enc)


def test_files_of_any_format_serve_and_labels_may_be_missing(folder: Path, tmp_path: Path, as_json: AsJson) -> None:
    import h5py

    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("rows", data=held_out()["b"].numpy())
    files = [f"b={tmp_path / 'b.h5'}#rows", f"a={folder / 'held_out' / 'a.npy'}"]
    without = as_json(folder / "run" / "model.safetensors", "--data", *files)[0]["run"]
    with_labels = as_json(folder / "run", "--data", *files, "--labels", folder / "held_out" / "labels.npy")[0]["run"]
    assert without["scores"]["jaccard_single"] is None
    assert with_labels["scores"]["jaccard_single"] > 0
    assert without["nmse"] == with_labels["nmse"]


def test_labels_are_class_names_in_a_table_and_groups_a_column_of_it(
    folder: Path, tmp_path: Path, as_json: AsJson
) -> None:
    lines = ["image,kind", *(f"{n // 5},kind {n % 5}" for n in range(N))]
    (tmp_path / "samples.csv").write_text("\n".join(lines))
    expected = as_json(folder / "run", "--data", folder / "held_out")[0]["run"]
    table = ["--labels", f"{tmp_path / 'samples.csv'}:kind", "--groups", f"{tmp_path / 'samples.csv'}:image"]
    found = as_json(folder / "run", "--data", folder / "held_out", *table)[0]["run"]
    labelled = [key for key in expected["scores"] if key.startswith("jaccard")]
    assert all(found["scores"][key] == pytest.approx(expected["scores"][key]) for key in labelled)
    model = sf.SPARC.load(folder / "run" / "model.safetensors")
    grouped = evaluate(model, held_out(), groups=[n // 5 for n in range(N)]).to_dict()
    assert found["retrieval"] == grouped["retrieval"] != expected["retrieval"]


def test_rows_in_another_order_are_joined_by_ids_with_labels_and_groups_of_theirs(
    folder: Path, tmp_path: Path, as_json: AsJson
) -> None:
    x, order = held_out(), np.random.default_rng(0).permutation(N)
    names = np.array([f"image {n}" for n in range(N)])
    for stream, rows_of, of in (("a", x["a"].numpy(), names), ("b", x["b"].numpy()[order][:50], names[order][:50])):
        np.save(tmp_path / f"{stream}.npy", rows_of)
        (tmp_path / f"{stream}.txt").write_text("\n".join(of))
    lines = ["id,kind,group", *(f"image {n},kind {n % 5},{n // 4}" for n in range(N - 1, -1, -1))]
    (tmp_path / "samples.csv").write_text("\n".join([*lines, "image 0,kind 0,0", "image 99,kind 9,99"]))
    table = tmp_path / "samples.csv"
    joined = ["--ids", f"a={tmp_path / 'a.txt'}", f"b={tmp_path / 'b.txt'}", "--join"]
    known = ["--labels", f"{table}:kind", "--groups", f"{table}:group", "--label-ids", f"{table}:id"]
    common = [folder / "run", "--data", tmp_path, *known]
    found, said = as_json(*common, *joined, "inner")
    found = found["run"]
    assert "50 samples joined by id: 50 of 60 rows of 'a'; 50 of 50 rows of 'b'" in said
    there = np.sort(order[:50])
    model = sf.SPARC.load(folder / "run" / "model.safetensors")
    expected = evaluate(
        model, {stream: rows_of[there] for stream, rows_of in x.items()}, there % 5, groups=there // 4
    ).to_dict()
    assert found["retrieval"] == expected["retrieval"]
    assert found["scores"] == pytest.approx(
        {**expected["scores"], "jaccard_chance": found["scores"]["jaccard_chance"]}
    )  # the order of a draw is that of the rows
    outer, said = as_json(*common, *joined, "outer")
    assert "left out for lack of a stream: 10 of 60 samples" in said
    assert outer["run"]["scores"] == pytest.approx(found["scores"])


def test_rows_of_zeros_are_left_out_unless_they_are_kept_and_retrieval_may_be(
    folder: Path, tmp_path: Path, as_json: AsJson
) -> None:
    for stream, x in held_out().items():
        x = x.clone()
        x[7 if stream == "a" else 9] = 0
        np.save(tmp_path / f"{stream}.npy", x.numpy())
    found, said = as_json(folder / "run", "--data", tmp_path, "--no-retrieval", "--memory", "1GiB")
    found = found["run"]
    assert found["n_samples"] == N - 2
    assert "retrieval" not in found
    assert said == "left out for lack of a stream: 2 of 60 samples\n"
    found, said = as_json(folder / "run", "--data", tmp_path, "--zero-rows", "keep", "--device", "cpu")
    assert found["run"]["n_samples"] == N
    assert said == ""


def test_metrics_are_chosen_by_name_and_an_unknown_one_is_a_line(
    folder: Path, as_json: AsJson, refused: Refused
) -> None:
    command = [folder / "run", "--data", folder / "held_out", "--metrics"]
    found = as_json(*command, "retrieval,agreement", "--resamples", "0")[0]["run"]
    assert list(found["scores"]) == ["r1", "r5", "r10", "median_rank", "mrr", "agreement"]
    assert "intervals" not in found
    assert "nmse" not in found
    assert as_json(*command, "retrieval", "agreement", "--resamples", "0")[0]["run"] == found
    assert "got 'retreival' (near: retrieval" in refused(*command, "retreival")


def test_tables_are_printed_and_written_in_every_format(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    files = [tmp_path / f"table{ending}" for ending in (".json", ".csv", ".tex", ".md")]
    command = [folder / "run", "--data", folder / "held_out", "--resamples", "20"]
    assert run(*command, "--markdown", "--out", *files, "--plots", tmp_path / "plots") == 0
    printed = capsys.readouterr().out
    assert printed == files[3].read_text()
    assert "| Retrieval R@1 | **" in printed
    assert "± 95 % interval over samples, of one seed." in printed
    found = json.loads(files[0].read_text())
    assert set(found["run"]["intervals"]) == set(found["run"]["scores"])
    lines = list(csv.DictReader(files[1].read_text().splitlines()))
    by_key = {(line["key"], line["model"]): line for line in lines}
    assert float(by_key["r1", "run"]["value"]) == found["run"]["scores"]["r1"]
    assert float(by_key["r1", "run"]["half_width_95"]) == found["run"]["intervals"]["r1"]
    assert by_key["nmse_self", "untrained"]["better"] == "lower"
    assert r"\textbf{Reconstruction: NMSE / R\textsuperscript{2}}" in files[2].read_text()
    made = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert made == [f"{name}.{ending}" for name in ("latents", "r2", "retrieval") for ending in ("png", "svg")]
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "plots").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", *sorted(path.name for path in files)]
    odd = [f"$|<b>$={folder / 'run'}", f"_={folder / 'run'}", *command[1:], "--metrics", "retrieval"]
    assert run(*odd, "--out", tmp_path / "odd.md", "--plots", tmp_path / "odd") == 0
    assert (tmp_path / "odd.md").read_text().splitlines()[0] == r"|  | $\|\<b\>$ | \_ | untrained |"
    drawn = (tmp_path / "odd" / "retrieval.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("$|&lt;b&gt;$", " _"))
    assert "must be written to a file that ends in .json, .csv, .tex, .md, got" in refused(
        *command, "--out", tmp_path / "table.xlsx"
    )


def test_runs_that_differ_in_their_seed_alone_are_one_column_with_an_interval_over_seeds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: AsJson, refused: Refused
) -> None:
    data = [f"{stream}={folder / stream}.npy" for stream in D]
    for name, more in (
        ("one", []),
        ("two", ["--seed", "1"]),
        ("other", ["--lr", "1e-2"]),
        ("alone", ["--selection", "local", "--cross-loss-coef", "0"]),
    ):
        assert cli.main(["train", "--out", str(tmp_path / name), *FLAGS, "--steps", "10", *more, "--data", *data]) == 0
    capsys.readouterr()
    runs = [tmp_path / name for name in ("one", "two", "other", "alone")]
    command = ["--compare", *runs, "--data", folder / "held_out", "--train-data", folder, "--resamples", "20"]
    found = as_json(*command)[0]
    assert list(found) == ["one (2 seeds)", "other", "alone", "alone, matched", "untrained"]
    both = found["one (2 seeds)"]
    one, two = (of_seed["scores"]["nmse_self"] for of_seed in both["runs"])
    assert both["scores"]["nmse_self"] == pytest.approx((one + two) / 2)
    assert both["intervals"]["nmse_self"] >= 12.7 * abs(one - two) / 2
    alone, after = found["alone"]["scores"], found["alone, matched"]["scores"]
    assert after["nmse_self"] == pytest.approx(alone["nmse_self"])
    assert after["agreement"] > alone["agreement"]
    found, said = as_json(*runs, "--data", folder / "held_out", "--metrics", "latents")
    assert list(found) == ["one", "two", "other", "alone", "untrained"]
    assert "give --train-data to see alone with its latents matched afterwards" in said
    assert "models must be at least one, got none" in refused("--data", folder / "held_out")


def test_a_hierarchy_of_the_labels_names_gives_alignment_by_depth_as_table_and_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    (tmp_path / "kinds.csv").write_text("\n".join(["label", *(f"kind {n % 5}" for n in range(N))]))
    parents = {f"kind {n}": f"group {n % 2}" for n in range(5)} | {"group 0": "all", "group 1": "all"}
    (tmp_path / "tree.json").write_text(json.dumps(parents))
    command = [folder / "run", "--data", folder / "held_out", "--metrics", "concepts_by_depth"]
    known = ["--hierarchy", tmp_path / "tree.json", "--labels", tmp_path / "kinds.csv"]
    assert run(*command, *known, "--plots", tmp_path / "plots", "--resamples", "0") == 0
    printed = capsys.readouterr().out
    assert all(f"Depth {depth}" in printed for depth in range(3))
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["depth.png", "depth.svg"]
    assert "metric 'concepts_by_depth' must be given a hierarchy, got none" in refused(*command)
    assert "concepts must be in the hierarchy, but 5 of 5 are not: ['0', '1', '2']" in refused(*command, *known[:2])
    data = [f"{stream}={folder / 'held_out' / stream}.npy" for stream in D]
    named = [folder / "run", "--data", *data, "--metrics", "concepts_by_depth", *known[:2]]
    assert "--hierarchy must be of --labels that are names" in refused(*named)
    for stream in D:
        shutil.copy(folder / "held_out" / f"{stream}.npy", tmp_path)
    np.save(tmp_path / "labels.npy", [f"kind {n % 5}" for n in range(N)])
    command[2] = tmp_path
    assert run(*command, *known[:2], "--resamples", "0") == 0
    assert capsys.readouterr().out == printed


def test_raw_features_are_compared_where_streams_have_one_width(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: AsJson, refused: Refused
) -> None:
    assert "inputs must have two streams of one width, got {'a': 300, 'b': 200}" in refused(
        folder / "run", "--data", folder / "held_out", "--raw"
    )
    torch.manual_seed(0)
    model = sf.SPARC({"a": 5, "b": 5, "c": 3}, 16, 2)
    model.save(tmp_path / "model.safetensors")
    x = torch.randn(N, 5)
    for stream, rows_of in {"a": x, "b": 2 * x, "c": x[:, :3]}.items():
        np.save(tmp_path / f"{stream}.npy", rows_of.numpy())
    raw = as_json(f"run={tmp_path / 'model.safetensors'}", "--data", tmp_path, "--raw")[0]["raw features"]
    assert list(raw["retrieval"]) == ["a -> b", "b -> a"]
    assert raw["scores"]["r1"] == 1
    noisy = x + torch.randn(N, 5)
    noisy[::2] = 0  # of whom there is a zero row the models say nothing either
    np.save(tmp_path / "b.npy", noisy.numpy())
    ids = np.arange(N) // 4
    for n, more in enumerate(
        ([], ["--ids", *(f"{s}={tmp_path / 'ids.txt'}" for s in "abc"), "--join", "inner", "--repeated", "all"])
    ):
        (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in ids))
        found = as_json(f"run={tmp_path / 'model.safetensors'}", "--data", *(f"{s}={tmp_path / s}.npy" for s in "abc"),
                        "--metrics", "retrieval", "--raw", "--resamples", "0", *more)[0]  # fmt: skip
        groups = torch.from_numpy(ids[1::2].copy()) if n else None
        expected = retrieval_scores(x[1::2], noisy[1::2], groups=groups)
        raw = found["raw features"]["retrieval"]["a -> b"]
        assert (raw["n"], raw["r1"]) == (N // 2, pytest.approx(expected.r1))
        assert found["run"]["n_samples"] == N // 2
    assert run(f"run={tmp_path / 'model.safetensors'}", "--data", tmp_path, "--raw") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("a → c"))
    assert line.split()[-1] == "–"


def test_a_model_called_untrained_keeps_its_column(folder: Path, as_json: AsJson) -> None:
    found = as_json(f"untrained={folder / 'run'}", "--data", folder / "held_out")[0]
    assert list(found) == ["untrained", "untrained (2)"]
    assert found["untrained"]["nmse"]["a -> a"] < found["untrained (2)"]["nmse"]["a -> a"]


def test_errors_are_one_line_that_says_what_is_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    finished, unseen = folder / "run", folder / "held_out"
    (tmp_path / "going").mkdir()
    (tmp_path / "text.safetensors").write_text("not a model")
    np.save(tmp_path / "a.npy", np.zeros((N, 300), np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((N, 7), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    sf.SPARC({"a": 300, "c": 2}, 8, 2).save(tmp_path / "other.safetensors")
    (tmp_path / "ids.txt").write_text("\n".join(map(str, range(N))))
    rows_of = [f"{n},{n}" for n in range(N)]
    (tmp_path / "ids.csv").write_text("\n".join(["id,g", *rows_of[:-1]]))
    (tmp_path / "twice.csv").write_text("\n".join(["id,g", *rows_of, "3,4"]))
    ids = [f"{stream}={tmp_path / 'ids.txt'}" for stream in D]
    joined = [finished, "--data", unseen, "--ids", *ids, "--join", "inner"]
    of_ids = {
        name: ["--label-ids", f"{tmp_path / name}.csv:id", "--groups", f"{tmp_path / name}.csv:g"]
        for name in ("ids", "twice")
    }
    a, b = f"a={unseen / 'a.npy'}", f"b={unseen / 'b.npy'}"
    for arguments, message in (
        ([tmp_path / "going", "--data", unseen], "has no model.safetensors, which a run gets when"),
        ([tmp_path / "no.safetensors", "--data", unseen], "there is no file"),
        ([tmp_path / "text.safetensors", "--data", unseen], "truncated or foreign"),
        ([finished, finished, "--data", unseen], "got two called run: give NAME=MODEL"),
        ([finished, tmp_path / "other.safetensors", "--data", unseen], "models must have the same streams, got"),
        ([finished, "--data", tmp_path], f"there is no b.npy in {tmp_path}"),
        ([finished, "--data", "a.npy"], "a source must be stream=path or stream=path#name, got 'a.npy'"),
        ([finished, "--data", a], "--data must give the streams a, b, got a"),
        ([finished, "--data", a, f"b={tmp_path / 'wide.npy'}"], "--data must have the widths {'a': 300,"),
        ([finished, "--data", unseen, "--join", "inner"], "ids must be given for join to match rows by"),
        ([finished, "--data", unseen, "--memory", "1MiB"], "memory must be at least"),
        ([finished, "--data", unseen, "--label-ids", tmp_path / "ids.csv"], "--label-ids must be matched with --ids"),
        ([*joined, *of_ids["ids"]], "--label-ids must hold the id of every sample, but '59' is missing"),
        ([*joined, *of_ids["twice"]], "groups must be the same in all rows of one id, got others in row 60"),
        ([*joined, "--label-ids", tmp_path / "none.csv"], "--label-ids must be a file, but there is none at"),
        ([finished, "--data", a, b, "--labels", unseen / "a.npy"], "or names [N], got float32 [60, 300] in"),
        ([finished, "--data", a, b, "--labels", tmp_path / "objects.npy"], "or holds objects: save array.astype(str)"),
        ([finished, "--data", a, b, "--labels", tmp_path / "none.npy"], "labels must be a file, but there is none at"),
        ([finished, "--data", a, b, "--groups", tmp_path / "none.csv:image"], "groups must be a file, but"),
    ):
        assert message in refused(*arguments)
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    assert "the table needs rich: pip install 'sparc_fast[train]', or ask for --json" in refused(
        finished, "--data", unseen
    )

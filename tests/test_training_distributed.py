"""Runs that several processes train together: the run of one process, whoever goes on with it."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import NEED_RANKS, Ranks
from training_runs import D, config, files, save_rows, trained

import sparc_fast as sf
from sparc_fast import cli
from sparc_fast.objective import Objective
from sparc_fast.training import Trainer, load_model, read_metrics
from sparc_fast.training.metrics import flat

pytestmark = NEED_RANKS


def train(folder: Path, **changes: Any) -> int:
    """Steps made."""
    with Trainer(config(**changes), folder, files=files()) as trainer:
        return trainer.run().step


def stopped_at(folder: Path, step: int, rank: int, **changes: Any) -> int:
    """The same, but that one rank is asked to stop; of several, the others hear of it in the step after."""
    with Trainer(config(**changes), folder, files=files()) as trainer:
        made = trainer._train_on

        def asked(*arguments: Any) -> None:
            made(*arguments)
            shards = trainer.model._shards
            if trainer.step == step - (not shards.is_whole) and shards.rank == rank:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer._train_on = asked  # type: ignore[method-assign]
        outcome = trainer.run()
        assert outcome.stopped_by is not None
        return outcome.step


def assert_same_figures(found: Path, expected: Path) -> None:
    """To rounding, of two runs."""
    for one, other in zip(read_metrics(found), read_metrics(expected), strict=True):
        assert one["step"] == other["step"]
        assert dict(flat(one)) == pytest.approx(dict(flat(other)), rel=1e-4, nan_ok=False)


def assert_same_run(found: Path, expected: Path) -> None:
    """To rounding: figures, the model and the best one."""
    assert_same_figures(found, expected)
    for file in ("model.safetensors", "best.safetensors"):
        one, other = (sf.SPARC.load(folder / file) for folder in (expected, found))
        assert one.config() == other.config()
        for (key, tensor), same in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(same, tensor, rtol=0, atol=2e-4, msg=key)


VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "accumulated and clipped": {"accumulate": 3, "max_grad_norm": 0.5},
    "lazy, local, fvu": {"lazy": True, "selection": "local", "support_dropout": 0.0, "loss": "fvu"},
    "jumprelu, nested": {"selection": "jumprelu", "matryoshka": (9, 30)},
    "private": {"private": {"a": 12, "b": 25}, "private_k": 2, "lazy": True},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the run of one process, by the name of the variant."""

    @cache
    def run(name: str) -> Path:
        return trained(tmp_path_factory.mktemp("alone"), **VARIANTS[name]).folder.path

    return run


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_several_ranks_is_that_of_one_process_to_rounding(
    two: Ranks, alone: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    assert two(train, tmp_path / "two", **VARIANTS[name]) == [40, 40]
    assert_same_run(tmp_path / "two", alone(name))
    assert len((tmp_path / "two" / "sessions.jsonl").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


OVER_BATCH = {"selection": "batch", "loss": "fvu"}  # who fires, and what errors are told by, is all replicas' affair


def test_replicas_train_and_go_on_as_one_process(four: Ranks, tmp_path: Path) -> None:
    trained(tmp_path / "one", **OVER_BATCH)
    assert four(stopped_at, tmp_path / "four", 13, 2, replicas=2, **OVER_BATCH) == [13] * 4
    assert four(train, tmp_path / "four", replicas=2, **OVER_BATCH) == [40] * 4
    assert_same_run(tmp_path / "four", tmp_path / "one")


def refused_three(folder: Path) -> None:
    with pytest.raises(ValueError, match="replicas must divide the number of ranks, 4, got 3"):
        train(folder, replicas=3)


def test_replicas_that_cannot_be_are_refused(four: Ranks, tmp_path: Path) -> None:
    four(refused_three, tmp_path)


@pytest.mark.parametrize("name", ["dense", "jumprelu, nested", "private"])
def test_a_checkpoint_is_read_by_any_number_of_ranks(
    two: Ranks, three: Ranks, four: Ranks, alone: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "many"
    assert two(stopped_at, folder, 11, 0, **VARIANTS[name]) == [11, 11]
    before = load_model(sorted((folder / "checkpoints").iterdir())[-1])
    assert three(stopped_at, folder, 19, 2, **VARIANTS[name]) == [19] * 3
    assert stopped_at(folder, 25, 0, **VARIANTS[name]) == 25
    assert four(train, folder, **VARIANTS[name]) == [40] * 4
    assert_same_figures(folder, alone(name))
    assert not torch.equal(before.W_enc, sf.SPARC.load(folder / "model.safetensors").W_enc)


def test_a_damaged_checkpoint_is_set_aside_by_all(two: Ranks, tmp_path: Path) -> None:
    two(stopped_at, tmp_path, 13, 1)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    piece = next(newest.glob("__1_*"))
    piece.write_bytes(b"?" + piece.read_bytes()[1:])
    assert two(starts_at, tmp_path) == [10, 10]
    assert newest.with_suffix(".damaged").is_dir()


def starts_at(folder: Path) -> int:
    with Trainer(config(), folder, files=files()) as trainer:
        return trainer.step


def refused(folder: Path, name: str) -> None:
    """Where rank 1 has another of this name."""
    other = name if torch.distributed.get_rank() == 1 else ""
    settings, rows = config(**{"lr": 1e-3} if other == "lr" else {}), files(5000 if other == "data" else 6000)
    with pytest.MonkeyPatch.context() as patch:
        if other == "sparc_fast":
            patch.setattr("sparc_fast.distributed.launch.__version__", "0.0.1")
        with pytest.raises(ValueError, match=f"^every rank must have the {name} of rank 0.*rank 1 has"):
            Trainer(settings, folder, files=rows)


@pytest.mark.parametrize("name", ["lr", "sparc_fast", "data"])
def test_a_rank_that_is_there_for_something_else_is_refused_by_name(two: Ranks, tmp_path: Path, name: str) -> None:
    two(refused, tmp_path, name)


def evaluated(folder: Path, out: str) -> tuple[int, str]:
    """(exit status, what it says)."""
    said = io.StringIO()
    command = ["eval", str(folder / "model.safetensors"), "--data", str(folder), "--out", str(folder / out)]
    with redirect_stdout(said), redirect_stderr(said):
        status = cli.main([*command, "--resamples", "20", "--markdown"])
    return status, said.getvalue()


def test_the_command_eval_has_the_table_of_one_process_and_says_it_once(two: Ranks, tmp_path: Path) -> None:
    save_rows(tmp_path, 90)
    np.save(tmp_path / "labels.npy", np.arange(90)[:, None] % 5 == np.arange(5))
    torch.manual_seed(0)
    sf.SPARC(D, 64, 3).save(tmp_path / "model.safetensors")
    status, said = evaluated(tmp_path, "one.json")
    assert (status, len(said) > 500) == (0, True)
    assert two(evaluated, tmp_path, "two.json") == [(0, said), (0, "")]
    one, other = (
        {key: x for key, x in flat(json.loads((tmp_path / name).read_text())) if isinstance(x, float)}
        for name in ("one.json", "two.json")
    )
    assert len(one) > 50
    assert other == pytest.approx(one, rel=1e-4)


def diverges(folder: Path) -> int:
    """The step at which it says so."""
    with Trainer(config(lr=1e20, calibrate=False, max_grad_norm=0.0), folder, files=files()) as trainer:
        with pytest.raises(FloatingPointError, match="was NaN or infinite"):
            trainer.run()
        return trainer.step


def test_a_loss_that_is_not_finite_stops_all_ranks_at_the_same_step(two: Ranks, tmp_path: Path) -> None:
    step, same = two(diverges, tmp_path)
    assert step == same
    assert json.loads((tmp_path / "sessions.jsonl").read_text().splitlines()[-1])["ended"] == "FloatingPointError"


NARROW = {"dtype": "bfloat16", "moments": "bfloat16", "accumulate": 2, "max_grad_norm": 0.5}


def test_a_bfloat16_run_goes_on_to_the_same_bits(two: Ranks, tmp_path: Path) -> None:
    assert two(train, tmp_path / "whole", **NARROW) == [40, 40]
    assert two(stopped_at, tmp_path / "parts", 13, 1, **NARROW) == [13, 13]
    assert two(train, tmp_path / "parts", **NARROW) == [40, 40]
    for file in ("metrics.jsonl", "model.safetensors", "best.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sf.SPARC.load(tmp_path / "whole" / "model.safetensors").W_enc.dtype == torch.bfloat16
    trained(tmp_path / "one", **NARROW)
    # moments are rounded by other random numbers: it trains like another seed
    for record, rel in ((0, 0.002), (-1, 0.2)):
        found, expected = (dict(flat(read_metrics(tmp_path / name)[record])) for name in ("whole", "one"))
        assert found.keys() == expected.keys()
        losses = [name for name in expected if name.endswith(("/loss", "/self", "/cross", "/total"))]
        assert losses
        for name in losses:
            assert found[name] == pytest.approx(expected[name], rel=rel)


def first_supports(folder: Path) -> list[list[int]]:
    """[sample] -> the latents here that it uses in the first step."""
    found: list[Any] = []
    with Trainer(config(**NARROW | {"accumulate": 1}, steps=1), folder, files=files()) as trainer:
        choose = Objective.choose

        def chosen(objective: Objective, batch: Any) -> Any:
            parts = choose(objective, batch)
            found.extend(part.supports.indices.clone() for part in parts if objective.shards is trainer.model._shards)
            return parts

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Objective, "choose", chosen)
            trainer.run()
        first = trainer.model._shards.rows(trainer.model.n_latents).start
    return [[first + i for i in sample if i >= 0] for sample in found[0].tolist()]


def test_the_first_supports_of_a_bfloat16_run_are_those_of_one_process(two: Ranks, tmp_path: Path) -> None:
    expected = first_supports(tmp_path / "one")
    low, high = two(first_supports, tmp_path / "two")
    assert [sorted(a + b) for a, b in zip(low, high, strict=True)] == [sorted(of_sample) for of_sample in expected]
    assert any(low)
    assert any(high)

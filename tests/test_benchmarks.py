"""The baselines do the work they stand for, and the command runs; nothing here is timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import context
from torch import Tensor

import sparc_fast as sf
from sparc_fast.benchmarks import distributed, memory
from sparc_fast.benchmarks.cases import SMALL, SMALL_SINGLE, STEP, Place
from sparc_fast.benchmarks.experiments import training
from sparc_fast.benchmarks.figures import ON_CPU, reached
from sparc_fast.benchmarks.main import main
from sparc_fast.benchmarks.operators import OPERATORS, disagreement, measure
from sparc_fast.benchmarks.record import Record, Row
from sparc_fast.benchmarks.rivals import Dense, EagerSAE, Lean, Tuned
from sparc_fast.benchmarks.table import figures_table
from sparc_fast.benchmarks.timing import Clock, ratio
from sparc_fast.planning.roofline import Cost, Roofline

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors, and perhaps a busy machine: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


RIVALS: dict[str, Callable[[sf.SPARC], Dense | Lean | Tuned]] = {
    "Dense": lambda model: Dense(model, auxk_coef=0),
    "Lean": Lean,
    "Tuned": Tuned,
}


def distance(weights: Tensor, expected: Tensor, start: Tensor) -> float:
    """Of two sets of weights, in units of how far they came."""
    return float((weights - expected).norm() / (expected - start).norm())


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_trains_as_ours_does(rival: str) -> None:
    # Dense renormalises before Adam's step as the research code does, so it drifts from ours by the step size
    of_weights, of_loss = (5e-3, 1e-5) if rival == "Dense" else (1e-6, 1e-12)
    model = SMALL.model("reference").double()
    start = model.W_enc.detach().clone(), model.W_dec.detach().clone()
    contender, optimizer, x = RIVALS[rival](model), sf.SparcAdam(model), SMALL.inputs().double()
    for _ in range(4):
        torch.testing.assert_close(contender.step(x), optimizer.step(x).total, rtol=of_loss, atol=0)
    for weights, expected, begin in zip(contender.weights(), (model.W_enc, model.W_dec), start, strict=True):
        assert distance(weights, expected.detach(), begin) < of_weights


def test_auxk_of_dense_is_1_while_no_latent_is_dead() -> None:
    model, inputs = SMALL.model(), SMALL.inputs()
    with_auxk, without = (Dense(model, auxk_coef=coef).step(inputs) for coef in (0.5, 0.0))
    torch.testing.assert_close(with_auxk - without, torch.tensor(0.5))


def test_auxk_of_dense_reaches_dead_latents_only() -> None:
    inputs, gradients = list(SMALL.inputs().split(SMALL.d_streams, dim=1)), []
    for auxk_coef in (1.0, 0.0):
        dense = Dense(SMALL.model(), auxk_coef=auxk_coef, dead_after_steps=1)
        dense.steps_since_fired += 1  # one more silent step, and a latent is dead
        dense.loss(inputs).backward()
        gradients.append(dense.W_enc[0].grad)
    reached = (gradients[0] != gradients[1]).any(1)
    assert reached.any()
    assert not (reached & (dense.steps_since_fired[0] == 1)).any()


def test_eager_sae_has_the_gradients_of_a_single_stream() -> None:
    model = SMALL_SINGLE.model("reference").double()
    rival, x = EagerSAE(model), SMALL_SINGLE.inputs().double()
    rival.loss(x).backward()
    model.loss(x).total.backward()
    for name in ("W_enc", "W_dec", "pre_bias"):
        torch.testing.assert_close(getattr(rival, name).grad, getattr(model, name).grad)
    torch.testing.assert_close(rival.latent_bias.grad, model.latent_bias.grad[0])


@pytest.mark.parametrize("op", OPERATORS)
def test_every_baseline_computes_the_operator(op: str) -> None:
    record = Record("", Place(CPU, {"ours": "reference"}))
    measure(record, SMALL, "float32", [op], 0.0)
    operator = OPERATORS[op]
    assert {row.contender for row in record.rows} == {"ours", *operator.cpu, *operator.cpu_yardsticks}
    assert all(len(row.seconds) >= 3 and row.value and row.work and not row.error for row in record.rows)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = replace(OPERATORS["sparse_decode"], cpu={"off by a bit": lambda o: lambda: o.x[:, None] * 1.01})
    monkeypatch.setitem(OPERATORS, "sparse_decode", broken)
    assert main(["--quick", "--threads", "1", "--op", "sparse_decode", "--backend", "reference"]) == 1
    assert "WRONG, not timed" in capsys.readouterr().out


def test_disagreement_says_what_is_wrong() -> None:
    x = torch.arange(4.0)
    assert disagreement(x, x.clone()) is None
    assert disagreement((x, x[:3]), (x, x)) == "shape [3], expected [4]"
    assert disagreement(x.int(), x.int() + 1) == "4 entries differ"
    assert "of the largest entry" in str(disagreement(x, x + 1))


def test_quick_run_writes_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    torch.set_num_threads(2)
    paths = tmp_path / "run.json", tmp_path / "run.png"
    chosen = [part for op in ("step", "sae", "sparse_decode", "invert_indices", "moments") for part in ("--op", op)]
    command = ["--quick", "--threads", "1", *chosen, "--json", str(paths[0]), "--plot", str(paths[1])]
    assert main(command) == 0
    assert torch.get_num_threads() == 2
    record = json.loads(paths[0].read_text())
    assert record["environment"]["sparc_fast"] == sf.__version__
    assert set(record["roofs"]) == {"copy", "float32", "bfloat16"}
    rows = record["rows"]
    assert {row["contender"] for row in rows if row["what"] == "step"} >= {"Dense", "Lean", "Tuned"}
    moments = {row["contender"].split(", ")[1]: row["role"] for row in rows if row["what"] == "moments"}
    assert moments == {"bfloat16 moments": "ours", "float32 moments": "baseline"}
    assert all(len(row["seconds"]) == 3 and row["value"] > 0 and row["floor"] > 0 for row in rows)
    assert paths[1].stat().st_size > 1000
    assert "roofs: copy" in capsys.readouterr().out


def test_ways_of_training_are_compared_a_line_a_run_and_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    arguments = ["digits", "--rules", "global", "local, nested", "--steps", "5", "--seeds", "0", "--prefixes", "16"]
    assert training.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    runs = [f"digits, {rule}, seed 0, {n} latents: " for rule in ("global", "local, nested") for n in (16, 256)]
    assert all(line.startswith(run + "single_loss ") for run, line in zip(runs, lines, strict=False))
    assert any(line.startswith("| Retrieval R@1 |") and line.count("|") == 6 for line in lines)


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    # Dense forms at least its three logits and codes, and gradients of all weights
    least = 4 * (6 * SMALL.N * SMALL.L + 2 * SMALL.L * SMALL.D)
    assert least / 2 < memory.extra_bytes("Dense", SMALL) < 100 * least


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "topk"], "invalid choice: 'topk'"),
        (["--shape", "N1"], "invalid choice: 'N1'"),
        (["--backend", "tpu"], "invalid choice: 'tpu'"),
        (["--op", "sae", "--shape", "rows-8k"], "sae has S1-N384-L8192, small"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_an_unknown_name_says_what_there_is(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("goals", [True, False])
def test_what_the_project_asks_of_itself_is_printed_where_asked_for(goals: bool) -> None:
    rows = [
        Row("", "step", STEP[0].name, name, "float32", seconds[0], seconds=seconds, role=role)
        for name, role, seconds in (("cpu", "ours", (1.0, 2.0, 9.0)), ("Dense", "baseline", (20.0, 40.0, 9.0)))
    ]
    figure = next(figure for figure in ON_CPU if "Dense" in figure.what)
    printed = figures_table(reached(rows, [figure]), goals)
    assert "Dense ÷ ours" in printed
    assert "20.00×" in printed
    assert ("must" in printed) is ("≥ 9" in printed) is goals


def test_contenders_take_turns() -> None:
    order: list[str] = []
    wait = torch.randn(600, 600)

    def contender(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            (wait @ wait @ wait).sum()

        return run

    times = Clock(Place(CPU, {})).operators({"a": contender("a"), "b": contender("b")}, seconds=0)
    assert [len(taken) for taken in times.values()] == [3, 3]
    assert "".join(order).replace("aa", "a").replace("bb", "b").startswith("ab")
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == 2.0


def test_the_floor_is_the_slowest_resource_of_each_phase() -> None:
    roofs = Roofline(copy=10.0, float32=100.0, bfloat16=400.0, gather=20.0)
    assert roofs.floor([Cost(100, 20), Cost(300, 10), Cost(400, 10, "bfloat16"), Cost(gathered=100)]) == 2 + 3 + 1 + 5
    assert Roofline(10.0, 100.0, 400.0).floor([Cost(gathered=100)]) == 0


@pytest.mark.distributed
def test_processes_that_share_latents_are_timed_once_they_train_as_one_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "mp", SimpleNamespace(get_context=lambda _: context()))  # nothing is loaded again
    assert main(["--quick", "--threads", "1", "--op", "distributed"]) == 0
    printed = capsys.readouterr().out
    assert "2 processes, 1 thread" in printed
    assert "of the formula" in printed

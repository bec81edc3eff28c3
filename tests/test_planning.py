"""`sparc-fast plan`: its peak is the one that a run has, and what it says of a change is what that change gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import in_fork

import sparc_fast as sf
from sparc_fast import cli
from sparc_fast.planning import Machine, Plan, Roofline, memory, plan, process_memory
from sparc_fast.planning.text import as_text, show_bytes
from sparc_fast.sizes import parse_bytes
from sparc_fast.training import Config, Trainer

ROOFS = Roofline(copy=2e10, float32=1e11, bfloat16=4e11)
MACHINE = Machine("a machine", "cpu", 2**33, 400 * 2**20, 400 * 2**20, 2, ROOFS)
WIDTHS = {"dino": 1024, "clip": 768}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")


def config(**changes: Any) -> Config:
    settings: dict[str, Any] = {"n_latents": 65536, "k": 32, "steps": 100, "batch_size": 4096}
    return Config(**{**settings, **changes})


def planned(*, machine_memory: int = MACHINE.memory, **changes: Any) -> Plan:
    return plan(config(**changes), WIDTHS, 10**6, replace(MACHINE, memory=machine_memory))


def bytes_of(found: Plan, name: str) -> int:
    return sum(part.bytes for part in found.parts if part.name.startswith(name))


# ---- against real runs

TRAIN = """
import json, sys, torch
from sparc_fast.planning import process_memory
from sparc_fast.training import Config, Trainer
torch.set_num_threads(1)
with Trainer(Config(**json.loads(sys.argv[1])), sys.argv[2]) as trainer:
    trainer.run()
print(process_memory.resident("VmHWM"), "torch._dynamo" in sys.modules)
"""


def train(settings: dict[str, Any], folder: Path, goes_on: bool = False) -> tuple[int, int]:
    """Bytes of this process before the run, and at its peak, or that of steps after going on."""
    torch.set_num_threads(1)
    overhead = process_memory.after_training_steps()
    with Trainer(Config(**settings), folder) as trainer:
        if goes_on:
            process_memory.forget_peak()
        trainer.run()
    return overhead, process_memory.resident("VmHWM")


@pytest.fixture(scope="module")
def one_thread_here() -> Machine:
    return Machine.here(roofs=ROOFS)


def write_streams(folder: Path, widths: Sequence[int], n_rows: int, concepts: int) -> dict[str, str]:
    """Gaussian rows; with `concepts`, so many directions and little noise, so that most latents never fire."""
    random, data = np.random.default_rng(0), {}
    for s, width in enumerate(widths):
        x = random.standard_normal((n_rows, width), dtype=np.float32)
        if concepts:
            directions = random.standard_normal((concepts, width), dtype=np.float32)
            x = directions[np.arange(n_rows) % concepts] + x / 100
        np.save(folder / f"{s}.npy", x)
        data[f"stream{s}"] = str(folder / f"{s}.npy")
    return data


RUNS: dict[str, dict[str, Any]] = {
    "few samples, many latents": {
        "widths": (128, 64), "n_rows": 2000, "n_latents": 65536, "k": 16, "batch_size": 64,
    },
    "many latents, held-out rows, the best of which comes from its checkpoint": {
        "widths": (128, 64), "n_rows": 2000, "n_latents": 65536, "k": 16, "batch_size": 64, "validation_rows": 500,
        "validate_every": 1,
    },
    "many samples, few latents, held-out rows": {
        "widths": (256, 128, 128), "n_rows": 26000, "n_latents": 1024, "k": 16, "batch_size": 12288,
        "validation_rows": 1000, "validate_every": 1,
    },
    "bfloat16, lazy, local": {
        "widths": (128, 128), "n_rows": 4000, "n_latents": 32768, "k": 16, "batch_size": 1024, "dtype": "bfloat16",
        "lazy": True, "selection": "local",
    },
    "AuxK on nearly all latents": {
        "widths": (128, 128), "n_rows": 26000, "n_latents": 4096, "k": 4, "batch_size": 12288, "auxk": 64,
        "dead_after": 0, "concepts": 8,
    },
    "nested dictionaries": {
        "widths": (256, 128, 128), "n_rows": 26000, "n_latents": 2048, "k": 16, "batch_size": 8192,
        "matryoshka": [128, 512, 1024],
    },
    "nested dictionaries, AuxK": {
        "widths": (128, 128), "n_rows": 26000, "n_latents": 4096, "k": 4, "batch_size": 8192, "auxk": 64,
        "dead_after": 0, "concepts": 8, "matryoshka": [128, 512], "steps": 3,
    },
    "micro-batches": {
        "widths": (256, 128, 128), "n_rows": 26000, "n_latents": 12288, "k": 16, "batch_size": 8192, "accumulate": 4,
        "validation_rows": 1000, "validate_every": 1, "support_dropout": 0.0,
    },
    "support dropout, which copies columns": {
        "widths": (192, 64, 192), "n_rows": 3000, "n_latents": 32768, "k": 8, "batch_size": 512, "steps": 8,
        "support_dropout": 0.5,
    },
    "private latents": {
        "widths": (192, 64, 192), "n_rows": 3000, "n_latents": 32768, "k": 8, "batch_size": 1024, "lazy": True,
        "private": {"stream0": 4096, "stream2": 2048}, "private_k": {"stream0": 8, "stream2": 4},
        "support_dropout": 0.0,
    },
}  # fmt: skip


@LINUX
@pytest.mark.parametrize("name", RUNS)
def test_the_peak_of_a_real_run_is_within_15_percent_of_what_is_planned(
    name: str, tmp_path: Path, one_thread_here: Machine
) -> None:
    settings = {"steps": 2, "auxk": 0, "lr": 1e-3, **RUNS[name]}
    concepts = settings.pop("concepts", 0)
    settings["data"] = write_streams(tmp_path, settings.pop("widths"), settings.pop("n_rows"), concepts)
    if name == next(iter(RUNS)):  # in a process as a user's
        machine = one_thread_here
        told = process_memory.in_own_process("-c", TRAIN, json.dumps(settings), str(tmp_path / "run")).split()
        measured, loads_compiler = int(told[0]), told[1]
        assert loads_compiler == "False", "a second and 140 MiB, for nothing"
    else:
        overhead, measured = in_fork(train, settings, tmp_path / "run")
        machine = replace(one_thread_here, overhead=overhead)
    found = plan(Config(**settings), machine=machine, dead=1.0)
    assert found.peak == pytest.approx(measured, rel=memory.ACCURACY)
    # and so is what the run adds to the libraries, without which any plan of a small run would be right
    beyond = measured - machine.overhead
    assert beyond > 200 * 2**20
    in_run = max(bytes for phase, bytes in found.phases.items() if phase != memory.GOING_ON)
    assert in_run - machine.overhead == pytest.approx(beyond, rel=memory.ACCURACY)


@LINUX
def test_going_on_in_bfloat16_takes_what_is_planned_for_it(tmp_path: Path) -> None:
    data = write_streams(tmp_path, (256, 128), 3000, 0)
    settings = {
        "data": data, "n_latents": 24576, "k": 8, "auxk": 0, "steps": 2, "batch_size": 64, "dtype": "bfloat16",
        "calibrate": False, "decay": "constant", "warmup": 0.0,
    }  # fmt: skip
    in_fork(train, settings, tmp_path / "run")
    kept = tmp_path / "run" / "config.json"  # as if two steps had been all that were made of four
    settings["steps"] = 4
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "steps": 4}))
    overhead, measured = in_fork(train, settings, tmp_path / "run", True)
    found = plan(Config(**settings), machine=replace(MACHINE, overhead=overhead))
    assert found.peak_phase == memory.GOING_ON
    assert found.peak - overhead == pytest.approx(measured - overhead, rel=0.15)


# ---- the sums


@pytest.mark.parametrize(
    "settings", [{}, {"moments": "bfloat16"}, {"dtype": "bfloat16"}], ids=["float32", "moments", "weights"]
)
def test_weights_moments_and_masters_are_exactly_those_of_the_tensors(settings: dict[str, Any]) -> None:
    model = sf.SPARC(WIDTHS, 512, 8, dtype=getattr(torch, settings.get("dtype", "float32")))
    optimizer = sf.SparcAdam(model, moments=settings.get("moments", "float32"))
    optimizer.step(torch.randn(16, 1792))
    found = planned(n_latents=512, k=8, **settings)
    assert bytes_of(found, "weights") == sum(t.nbytes for t in model.state_dict().values())
    kept = [(name, tensor.nbytes) for state in optimizer.state.values() for name, tensor in state.items()]
    for part, names in (("Adam's moments", ("exp_avg", "exp_avg_sq")), ("float32 masters", ("master",))):
        assert bytes_of(found, part) == sum(size for name, size in kept if name in names)


def test_the_peak_is_the_sum_of_the_parts_of_the_largest_phase() -> None:
    found = planned()
    assert found.phases[found.peak_phase] == found.peak == max(found.phases.values())
    assert found.peak == sum(part.bytes for part in found.parts if found.peak_phase in part.phases)


def test_what_is_off_takes_nothing() -> None:
    names = {part.name for part in planned(auxk=0, calibrate=False).parts}
    assert not [name for name in names if name.startswith(("AuxK", "measuring", "float32 masters", "replay"))]
    names = {part.name for part in planned(auxk=8, lazy=True, dtype="bfloat16").parts}
    for start in ("AuxK", "measuring", "float32 masters", "replay"):
        assert any(name.startswith(start) for name in names)


def test_the_loader_takes_all_its_memory_where_the_rows_are_not_known_and_no_more_where_they_are() -> None:
    unknown = plan(config(memory=2**28), WIDTHS, machine=MACHINE)
    assert bytes_of(unknown, "loader") == 2**28
    for n_rows in (5000, 10**6):
        assert bytes_of(plan(config(memory=2**28), WIDTHS, n_rows, MACHINE), "loader") <= 2**28
    with pytest.raises(ValueError, match="memory must be at least"):
        plan(config(memory=2**20), WIDTHS, 10**6, MACHINE)


# ---- changes


def test_each_change_gives_what_the_plan_says_of_it() -> None:
    found = planned(machine_memory=2**32)
    assert not found.fits
    said = {tuple(change.settings) for change in found.changes}
    assert {("lazy",), ("memory",), ("dtype",), ("auxk",), ("batch_size",), ("n_latents",)} <= said
    for change in found.changes:
        other = plan(replace(found.config, **change.settings), WIDTHS, 10**6, found.machine)
        assert found.peak - change.saves == other.peak
        assert change.fits == other.fits == (other.peak <= 2**32)
        assert change.step_seconds == other.step_seconds


def test_latents_are_reduced_to_the_most_that_fit() -> None:
    found = planned(machine_memory=2**32)
    change = next(change for change in found.changes if "n_latents" in change.settings)
    most = change.settings["n_latents"]
    assert change.fits
    assert not planned(machine_memory=2**32, n_latents=most + 64).fits


def test_a_large_batch_beside_few_latents_is_taken_in_micro_batches() -> None:
    found = planned(n_latents=1024, k=16, batch_size=65536)
    change = next(change for change in found.changes if "accumulate" in change.settings)
    assert change.saves == found.peak - planned(n_latents=1024, k=16, batch_size=65536, **change.settings).peak > 0
    assert not any("accumulate" in change.settings for change in planned(n_latents=2**20, batch_size=64).changes)


def test_a_change_that_the_other_settings_exclude_is_not_said() -> None:
    for found in (planned(lazy=True, accumulate=4), planned(machine_memory=2**25, lazy=True, batch_size=65536)):
        assert found.changes
        assert all(replace(found.config, **change.settings) for change in found.changes)


def test_bfloat16_moments_save_half_of_them_and_bfloat16_weights_take_more_with_their_masters() -> None:
    wide = planned()
    assert next(change for change in wide.changes if change.settings == {"dtype": "bfloat16"}).saves < 0
    change = next(change for change in wide.changes if change.settings == {"moments": "bfloat16"})
    assert change.saves > 0.25 * bytes_of(wide, "Adam's moments")
    assert not any("moments" in change.settings for change in planned(moments="bfloat16").changes)


# ---- time


def test_the_time_of_a_run_follows_the_roofs_and_its_steps() -> None:
    found = plan(config(steps=0, epochs=3.0, validation_rows=1000), WIDTHS, 42960, MACHINE)
    assert found.steps == 3 * 10
    assert found.step_seconds is not None
    assert found.hours == found.steps * found.step_seconds / 3600
    fast = replace(MACHINE, roofs=Roofline(2 * ROOFS.copy, 2 * ROOFS.float32, 2 * ROOFS.bfloat16))
    faster = plan(found.config, WIDTHS, 42960, fast)
    assert faster.step_seconds == pytest.approx(found.step_seconds / 2)
    assert plan(config(steps=0, epochs=3.0), WIDTHS, machine=MACHINE).hours is None


def test_the_time_of_a_run_is_said_in_the_largest_unit_it_fills() -> None:
    for steps, roofs, unit in ((1, 10**6, "second"), (1, 1, "seconds"), (100, 1, "minutes"), (10**4, 1, "hours")):
        roofs = Roofline(roofs * ROOFS.copy, roofs * ROOFS.float32, roofs * ROOFS.bfloat16)
        text = as_text(plan(config(steps=steps), WIDTHS, 42960, replace(MACHINE, roofs=roofs)))
        said = next(line for line in text.splitlines() if "without reading" in line).split(", without")[0]
        assert said.endswith(f" {unit}")
        assert " 0." not in said


def test_the_product_is_counted_in_the_faster_type_and_lazy_steps_move_less() -> None:
    def seconds(roofs: Roofline = ROOFS, **changes: Any) -> float:
        found = plan(config(**changes), WIDTHS, 10**6, replace(MACHINE, roofs=roofs))
        return sum(roofs.floor([cost]) for cost in found.time.values())

    assert seconds(replace(ROOFS, bfloat16=ROOFS.float32 / 2)) == seconds(replace(ROOFS, bfloat16=ROOFS.float32))
    assert seconds() < seconds(replace(ROOFS, bfloat16=ROOFS.float32))
    assert seconds(lazy=True, batch_size=256) < seconds(batch_size=256)


def test_micro_batches_multiply_all_rows_of_a_step_and_add_up_gradients() -> None:
    whole, parted = (planned(n_latents=4096, batch_size=32768, accumulate=turns).time for turns in (1, 8))
    for phase, cost in whole.items():
        assert parted[phase].flops == cost.flops
        assert parted[phase].bytes > cost.bytes


def test_nested_dictionaries_write_and_read_a_gradient_each() -> None:
    plain, nested = (planned(matryoshka=sizes).time for sizes in ([], [1024, 8192]))
    choosing, *others = plain
    assert nested[choosing] == plain[choosing]
    for phase in others:
        assert nested[phase].flops == plain[phase].flops
        assert nested[phase].bytes == plain[phase].bytes + 2 * 4 * 4096 * len(WIDTHS) * sum(WIDTHS.values())


def test_private_latents_are_multiplied_and_updated_in_their_stream_alone() -> None:
    plain, private = planned().time, planned(private={"clip": 32768}, private_k=8).time
    choosing, reconstructing, updating = plain
    assert private[choosing].flops == 2 * 4096 * (32768 * 1792 + 32768 * 768)
    assert private[choosing].bytes < plain[choosing].bytes
    assert private[updating].bytes < plain[updating].bytes
    assert private[updating].flops - plain[updating].flops == 4 * 4096 * 8 * 768
    assert private[reconstructing].flops == plain[reconstructing].flops * (32 + 8) / 32
    plans = [plan(config(private={"clip": 32768}, private_k=8), WIDTHS, 10**6, MACHINE, ranks=r) for r in (1, 4)]
    whole, share = (sum(cost.flops for cost in found.time.values()) for found in plans)
    assert share == whole / 4
    with pytest.raises(ValueError, match=r"private must name streams of .*'dino', 'clip'.*, got 'text'"):
        planned(private={"text": 64}, private_k=8)


@pytest.mark.parametrize("selection", ["batch", "jumprelu"])
def test_time_goes_by_the_mean_number_of_latents_that_fire(selection: str) -> None:
    assert planned(selection=selection).time == planned().time


# ---- the command


@pytest.fixture
def roofs_file(tmp_path: Path) -> Path:
    MACHINE.save(tmp_path / "roofs.json")
    return tmp_path / "roofs.json"


FLAGS = ["--n-latents", "4096", "--k", "16", "--steps", "50"]
TO_COME = ["--d-streams", "dino=1024", "clip=768"]


def test_a_run_that_fits_ends_with_status_0_and_shows_every_part(
    roofs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *FLAGS, *TO_COME, "--roofs", str(roofs_file)]) == 0
    printed = capsys.readouterr().out
    found = plan(Config(n_latents=4096, k=16, steps=50), WIDTHS, machine=MACHINE)
    assert printed == as_text(found) + "\n"
    for part in found.parts:
        line = next(line for line in printed.splitlines() if line.startswith(f"{part.name:52} "))
        assert show_bytes(part.bytes) in line
    assert "It fits, with" in printed
    assert "what changes it" not in printed
    assert "50 steps: " in printed


def test_a_run_that_does_not_fit_ends_with_status_3_and_says_what_to_change(
    roofs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", *FLAGS, *TO_COME, "--roofs", str(roofs_file), "--machine-memory", "1200MiB"]
    assert cli.main(command) == 3
    printed = capsys.readouterr().out
    assert "It does not fit: " in printed
    assert "what changes it, cheapest first" in printed
    assert "memory = " in printed


def test_changes_are_shown_on_request(roofs_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *FLAGS, *TO_COME, "--roofs", str(roofs_file), "--changes"]) == 0
    assert "lazy = true" in capsys.readouterr().out
    assert "lazy = true" in str(planned())


def test_a_peak_near_the_memory_is_said_to_be_near(roofs_file: Path) -> None:
    peak = planned().peak
    assert "less than the 15%" in as_text(planned(machine_memory=round(1.1 * peak)))
    assert "less than the 15%" in as_text(planned(machine_memory=round(0.9 * peak)))
    assert "less than the 15%" not in as_text(planned(machine_memory=2 * peak))


def test_files_say_what_flags_would_and_the_same_file_of_settings_trains_and_plans(
    tmp_path: Path, roofs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, width in (("a", 24), ("b", 16)):
        np.save(tmp_path / f"{name}.npy", np.ones((500, width), np.float32))
    settings = 'n_latents = 64\nk = 3\nepochs = 2\nbatch_size = 32\n[data]\na = "a.npy"\nb = "b.npy"\n'
    (tmp_path / "train.toml").write_text(settings)
    command = ["plan", str(tmp_path / "train.toml"), "--roofs", str(roofs_file)]
    assert cli.main(command) == 0
    from_files = capsys.readouterr().out
    assert "500 rows" in from_files
    assert cli.main([*command, "--d-streams", "a=24", "b=16", "--rows", "500"]) == 0
    assert capsys.readouterr().out == from_files
    assert cli.main([*command, "--validation-rows", "100", "--dtype", "bfloat16"]) == 0
    assert "400 rows" in (changed := capsys.readouterr().out)
    assert "float32 masters" in changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "d_streams (--d-streams) must give the width of every stream, or data (--data) name their files"),
        (["--data", "a=/nowhere/a.npy"], "there is none at /nowhere/a.npy; widths of data to come are given by d_str"),
        (["--data", "a=a.npy", "--d-streams", "b=3"], "d_streams must name the streams of data, ['a'], got ['b']"),
        (["--d-streams", "a"], "--d-streams must be stream=width, got 'a'"),
        (["--d-streams", "a=0"], "each an integer width >= 1, got {'a': 0}"),
        (["--d-streams", "a=3", "--rows", "many"], "--rows must be a number, got 'many'"),
        (
            ["--d-streams", "a=3", "--rows", "20"],
            "n_rows (--rows) must be at least a batch beside the held-out rows, got 20",
        ),
        (["--rows", "20"], "n_rows (--rows) must be left to the files where d_streams is, got 20"),
        (["--d-streams", "a=3", "--machine-memory", "much"], "--machine-memory must be a size such as 80GiB or 64GB"),
        (["--d-streams", "a=3", "--copy-rate", "1e9"], "must be given together, got ['copy']"),
        (["--d-streams", "a=3", "--dead", "2"], "dead must be a number from 0 to 1, got 2.0"),
        (["--d-streams", "a=3", "--backend", "reference"], "backend must be cpu to plan for cpu, got reference"),
        (["--d-streams", "a=3", "--device", "cuda"], "machine must be one to train on cuda, got a machine, cpu"),
        (["--d-streams", "a=3", "--roofs", "/nowhere.json"], "there is no file /nowhere.json"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str], message: str, roofs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *FLAGS, "--roofs", str(roofs_file), *arguments]) == 1
    assert message in capsys.readouterr().err


# ---- the machine


def test_a_machine_is_the_same_after_a_file(roofs_file: Path) -> None:
    assert Machine.load(roofs_file) == MACHINE
    without = replace(MACHINE, roofs=None)
    without.save(roofs_file)
    assert Machine.load(roofs_file) == without


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": None}, "memory, overhead and threads must be integers"),
        ({"device": "tpu"}, "device cpu or cuda"),
        ({"roofs": {"copy": 0, "float32": 1, "bfloat16": 1}}, "roofs must be numbers > 0"),
        ({"roofs": {"copy": 1}}, "required"),
        ({"speed": 1}, "expected name, device, memory"),
    ],
)
def test_a_file_that_describes_no_machine_is_refused(changes: dict[str, Any], message: str, roofs_file: Path) -> None:
    roofs_file.write_text(json.dumps({**json.loads(roofs_file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        Machine.load(roofs_file)
    roofs_file.write_text("{")
    with pytest.raises(ValueError, match="roofs must describe a machine"):
        Machine.load(roofs_file)


def test_this_machine_is_measured_and_can_be_kept(
    one_thread_here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 50 * 2**20 < one_thread_here.overhead < 2**31
    monkeypatch.setattr("sparc_fast.planning.machine.measure_roofs", lambda: ROOFS)
    monkeypatch.setattr(process_memory, "in_own_process", lambda *_: str(one_thread_here.overhead))  # measured once
    command = ["plan", *FLAGS, *TO_COME, "--device", "cpu", "--save-roofs", str(tmp_path / "here.json")]
    assert cli.main(command) in (0, 3)
    here = Machine.load(tmp_path / "here.json")
    assert here.roofs == ROOFS
    assert here.threads == torch.get_num_threads()
    assert here.overhead == one_thread_here.overhead
    assert here.memory > 2**26
    assert here.name in capsys.readouterr().out


@LINUX
def test_the_limit_of_a_control_group_is_what_there_is(tmp_path: Path) -> None:
    two = tmp_path / "a" / "b"
    two.mkdir(parents=True)
    (two / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text(f"{2**21}\n")
    (tmp_path / "a" / "memory.current").write_text(f"{2**20}\n")
    (tmp_path / "a" / "memory.stat").write_text(f"anon 5\ninactive_file {2**19}\n")
    (tmp_path / "groups").write_text("0::/a/b\n")
    assert process_memory.available_bytes(tmp_path, tmp_path / "groups") == 2**20 + 2**19
    one = tmp_path / "memory" / "c"
    one.mkdir(parents=True)
    (one / "memory.limit_in_bytes").write_text(f"{2**18}\n")
    (one / "memory.usage_in_bytes").write_text(f"{2**17}\n")
    (tmp_path / "groups").write_text("4:memory,hugetlb:/c\n1:cpu:/c\n")
    assert process_memory.available_bytes(tmp_path, tmp_path / "groups") == 2**17
    free = process_memory.available_bytes(tmp_path, tmp_path / "none")
    assert free is not None
    assert free > 2**26


def test_a_gpu_that_is_not_here_is_planned_from_what_is_said_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(process_memory, "in_own_process", lambda *_: str(2**28))
    command = ["plan", *FLAGS, *TO_COME, "--device", "cuda"]
    assert cli.main(command) == 1
    assert "--machine-memory" in capsys.readouterr().err
    assert cli.main(["plan", *FLAGS, *TO_COME, "--device", "tpu"]) == 1
    assert "device must be auto, cpu, cuda or cuda:1 to plan for, got 'tpu'" in capsys.readouterr().err
    assert cli.main([*command, "--machine-memory", "80GB"]) == 0
    printed = capsys.readouterr().out
    assert "nothing of it has been measured on a GPU" in printed
    assert "No times" in printed
    assert "loader" not in printed
    rates = ["--copy-rate", "3e12", "--float32-rate", "4e13", "--bfloat16-rate", "7e14"]
    assert cli.main([*command, "--machine-memory", "80GB", *rates]) == 0
    assert "at the roofs: the least it can take" in capsys.readouterr().out


def test_steps_captured_on_a_gpu_keep_their_scratch() -> None:
    gpu = replace(MACHINE, device="cuda", memory=2**36)
    settings = {"validation_rows": 4096, "validate_every": 1, "support_dropout": 0.0, "auxk": 0}

    def on_gpu(**changes: Any) -> Plan:
        return plan(config(**{**settings, **changes}), WIDTHS, 10**6, gpu)

    batch, one = 4 * 4096 * sum(WIDTHS.values()), on_gpu()
    for other in ({"lazy": True}, {"accumulate": 2}, {"selection": "batch"}, {"private": {"dino": 64}, "private_k": 2}):
        assert not bytes_of(on_gpu(**other), "captured steps")
    scratch = bytes_of(one, "captured steps: scratch of all")
    assert bytes_of(one, "captured steps: samples of 1 graph") == batch
    assert bytes_of(one, "captured steps: scratch of those not replayed") == 0
    named = {"batch", "batch as", "weights", "Adam's", "CUDA's", "captured"}
    flows = [part for part in one.parts if not part.name.startswith(tuple(named))]
    assert scratch == max(sum(p.bytes for p in flows if phase in p.phases) for phase in memory.STEP)
    # who chooses is drawn among three sets of two streams, and with AuxK latents are dead or not: four are kept
    for changes, graphs in (({"support_dropout": 0.3}, 3), ({"support_dropout": 0.3, "auxk": 8}, 4), ({"auxk": 8}, 2)):
        found = on_gpu(**changes)
        assert bytes_of(found, f"captured steps: samples of {graphs} graphs") == graphs * batch
        whole = bytes_of(found, "captured steps: scratch of all")
        assert bytes_of(found, "captured steps: scratch of those") == whole // graphs * (graphs - 1)


def test_sizes_are_read_and_shown() -> None:
    assert [parse_bytes(text) for text in ("80GiB", "1.5KiB", "64GB", "512")] == [80 * 2**30, 1536, 64 * 10**9, 512]
    shown = [show_bytes(n) for n in (512, 1536, 250 * 2**20, -(2**31))]
    assert shown == ["512 bytes", "1.5 KiB", "250 MiB", "-2.0 GiB"]
    for text in ("", "GiB", "-1GiB", "1e30", "nan"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_bytes(text)


def test_ranks_share_weights_and_moments_and_each_receives_what_does_not_grow_with_latents() -> None:
    settings = {"k": 32, "steps": 10, "batch_size": 512, "device": "cpu", "memory": 2**26}
    plans = {
        (L, P): plan(Config(n_latents=L, **settings), {"a": 96, "b": 64}, machine=MACHINE, ranks=P)
        for L in (2**14, 2**17) for P in (1, 8)
    }  # fmt: skip

    def held(L: int, P: int) -> int:
        return sum(part.bytes for part in plans[L, P].parts if part.name.startswith(("weights", "Adam's moments")))

    assert held(2**17, 8) == pytest.approx(held(2**17, 1) / 8, rel=0.001)
    assert plans[2**14, 8].received == plans[2**17, 8].received
    saved = plans[2**17, 1].peak - plans[2**17, 8].peak
    assert saved > held(2**17, 1) / 2
    assert "each of 8 ranks" in str(plans[2**17, 8])
    assert "ranks" not in str(plans[2**17, 1])
    with pytest.raises(ValueError, match="ranks must be at least 1, and n_latents=16384 enough for each, got 0"):
        plan(Config(n_latents=2**14, **settings), {"a": 96}, machine=MACHINE, ranks=0)

"""What a run computes: the steps it says, the means it logs, the rows it validates on."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from training_runs import D, Recorder, config, files, rows, trained

import sparc_fast as sf
from sparc_fast import data
from sparc_fast.data import Loader
from sparc_fast.training import Trainer, load_model, read_metrics
from sparc_fast.training.metrics import flat
from sparc_fast.training.progress import Bar, Lines
from sparc_fast.training.trainer import calibrate
from sparc_fast.training.validation import hold_out, validate


class Run(NamedTuple):
    trainer: Trainer
    recorder: Recorder
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recorder, out = Recorder(), io.StringIO()
    folder = tmp_path_factory.mktemp("run")
    with Trainer(config(), folder, files=files(), sinks=[recorder], progress=Lines(out)) as trainer:
        trainer.run()
    return Run(trainer, recorder, out.getvalue())


def test_a_run_is_the_loop_one_would_write_by_hand(tmp_path: Path) -> None:
    plain = {"support_dropout": 0.0, "k_start": 0, "k_ramp": 0.0, "cross_loss_ramp": 0.0, "validation_rows": 0}
    trainer = trained(tmp_path, decay="linear", warmup=0.0, log_every=20, **plain)
    torch.manual_seed(0)
    model = sf.SPARC(D, 64, 3, auxk=8, dead_after=400)
    with Loader(files(), 32, seed=0, memory=config().memory, last="drop") as loader:
        batches = list(islice(loader, 40))
    model.calibrate(torch.cat(batches)[:500])
    optimizer = sf.SparcAdam(model)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 40)
        losses.append(optimizer.step(batch))
    measured = ("input_mean", "input_rms")  # summed in another order
    for name, tensor in model.state_dict().items():
        close = torch.allclose(trainer.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
        assert close, f"{name} differs{' already' if name in measured else ''}"
    for record, part in zip(read_metrics(tmp_path / "metrics.jsonl"), (losses[:20], losses[20:]), strict=True):
        logged = record["train"]
        assert logged["loss"] == pytest.approx(sum(float(loss.total) for loss in part) / 20, rel=1e-4)
        assert logged["self"] == pytest.approx(sum(float(loss.self) for loss in part) / 20, rel=1e-4)
        assert logged["cross"] == pytest.approx(
            sum(float(loss.cross) for loss in part if loss.cross is not None) / 20, rel=1e-4
        )
        assert logged["nmse"]["a -> b"] == pytest.approx(sum(float(loss.nmse[0, 1]) for loss in part) / 20, rel=1e-4)
        with_auxk = [float(loss.auxk) for loss in part if loss.auxk is not None]
        assert logged["auxk"] == (pytest.approx(sum(with_auxk) / len(with_auxk), rel=1e-3) if with_auxk else None)
    assert any(loss.auxk is not None for loss in losses), "latents should have died"
    assert logged["dead"] == int(model.dead.sum())


def test_accumulated_steps_are_those_of_whole_batches_to_rounding(tmp_path: Path) -> None:
    plain, parted = (trained(tmp_path / str(parts), steps=12, accumulate=parts).model.state_dict() for parts in (1, 5))
    assert torch.equal(plain["silence"], parted["silence"])
    for name in ("W_enc", "W_dec", "pre_bias", "latent_bias"):
        torch.testing.assert_close(parted[name], plain[name], rtol=1e-3, atol=1e-4)
    assert not torch.equal(plain["W_enc"], parted["W_enc"]), "sums in another order should show"


def test_training_learns(tmp_path: Path) -> None:
    trained(tmp_path, steps=100, log_every=50, validate_every=50)
    figures = [r["validation"]["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "validation" in r]
    assert figures[-1] < 0.5 * figures[0]
    model, x = sf.SPARC.load(tmp_path / "model.safetensors"), rows()
    assert sf.fvu(model.translate({"a": x["a"]}, "a", "b"), x["b"]) < 0.6


def test_every_record_goes_to_the_file_and_to_the_sinks(finished: Run) -> None:
    recorder = finished.recorder
    assert recorder.records == read_metrics(finished.trainer.folder.metrics)
    assert recorder.closed == 1
    kinds = [(r["step"], "validation" if "validation" in r else "train") for r in recorder.records]
    logged = [(step, "train") for step in (7, 14, 21, 28, 35, 40)]
    assert kinds == sorted([*logged, (16, "validation"), (32, "validation"), (40, "validation")])
    first = recorder.records[0]["train"]
    assert first["k"] == 5
    assert 0 < first["cross_loss_coef"] < 1
    assert first["epoch"] == 7 / (5900 // 32)


def test_epochs_are_steps(tmp_path: Path) -> None:
    with Trainer(config(steps=0, epochs=1.5, batch_size=100), tmp_path, files=files()) as trainer:
        assert trainer.steps == round(1.5 * 59)


@pytest.mark.parametrize("n_rows", [77, 500, 10**6])
def test_calibration_over_batches_is_calibration_in_one_piece(n_rows: int) -> None:
    shifted = data.open({"a": rows()["a"] * 3 + 100, "b": torch.full((6000, 4), 2.0)})
    streamed, whole = (sf.SPARC({"a": 300, "b": 4}, 8, 2) for _ in range(2))
    with Loader(shifted, 64, last="drop") as loader:
        before = loader.state_dict()
        calibrate(streamed, loader, n_rows)
        assert loader.state_dict() == before
        whole.calibrate(torch.cat(list(loader))[:n_rows])
    assert streamed.is_calibrated
    assert torch.allclose(streamed.input_mean, whole.input_mean, rtol=1e-6)
    assert torch.allclose(streamed.input_rms, whole.input_rms, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("selection", ["global", "local"])
def test_validation_is_the_loss_on_all_rows_together_and_of_each_stream_alone(selection: Any) -> None:
    model = sf.SPARC(D, 64, 3, selection=selection)
    files_, x = files(150), torch.cat(list(rows(150).values()), 1)
    model.calibrate(x)
    silence = model.silence.clone()
    found = validate(model.train(), files_, 40, cross_loss_coef=0.5)
    assert model.training
    assert torch.equal(model.silence, silence)
    joint = model.eval().loss(x)
    assert found["self"] == pytest.approx(float(joint.self))
    assert joint.cross is not None
    assert found["cross"] == pytest.approx(float(joint.cross))
    assert found["loss"] == pytest.approx(float(joint.self) + 0.5 * float(joint.cross))
    calibrated = (x - model.input_mean) / model.input_rms.repeat_interleave(torch.tensor([300, 200]))
    truth = dict(zip(D, calibrated.split(list(D.values()), 1), strict=True))
    bare = sf.SPARC(D, 64, 3, selection=selection).eval()  # sees what the model sees after its calibration
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("input")}, strict=False)
    alone = {(s, t): float(sf.nmse(bare.translate({s: truth[s]}, s, t), truth[t])) for s in D for t in D}
    assert found["single_self"] == pytest.approx((alone["a", "a"] + alone["b", "b"]) / 2, rel=1e-5)
    assert found["single_cross"] == pytest.approx((alone["a", "b"] + alone["b", "a"]) / 2, rel=1e-5)
    assert found["rows"] == 150
    one = sf.SPARC({"a": 300}, 64, 3)
    assert validate(one, data.open({"a": rows(20)["a"]}), 8, 1.0)["cross"] is None


def test_validation_rows_are_never_trained_on_and_validation_files_are_read(tmp_path: Path) -> None:
    everything = files(600)
    with Trainer(config(validation_rows=100), tmp_path / "rows", files=everything) as trainer:
        assert trainer.loader.files.n_rows == 500
        assert trainer.validation_files is not None
        expected = hold_out(everything, 100)[1].rows(0, 100)
        assert torch.equal(trainer.validation_files.rows(0, 100), expected)
    with Trainer(
        config(validation_rows=0), tmp_path / "files", files=everything, validation_files=files(50)
    ) as trainer:
        assert trainer.loader.files.n_rows == 600
        trainer.run()
    records = read_metrics(tmp_path / "files" / "metrics.jsonl")
    assert {r["validation"]["rows"] for r in records if "validation" in r} == {50}


def test_a_run_whose_loss_is_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    def poison() -> None:
        with torch.no_grad():
            trainer.model.pre_bias[3] = torch.nan

    with Trainer(config(), tmp_path, files=files(), sinks=[Recorder(7, poison)]) as trainer:
        message = r"the loss was NaN or infinite by step 8: the last good checkpoint is .*step-000000005\.safetensors"
        with pytest.raises(FloatingPointError, match=message):
            trainer.run()
    assert trainer.folder.steps() == [5]
    assert load_model(trainer.folder.checkpoint(5)).pre_bias.isfinite().all()
    (session,) = read_metrics(tmp_path / "sessions.jsonl")
    assert (session["ended"], session["to_step"]) == ("FloatingPointError", 8)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    def poison() -> None:  # seen in no loss before step 16
        trainer.optimizer.state[trainer.model.latent_bias]["exp_avg"][1, 4] = torch.inf

    with (
        Trainer(config(), tmp_path, files=files(), sinks=[Recorder(14, poison)]) as trainer,
        pytest.raises(FloatingPointError, match=r"latent_bias.* was NaN or infinite by step 15: the last good .*10"),
    ):
        trainer.run()
    assert trainer.folder.steps() == [5, 10]


def test_a_run_is_the_same_whatever_the_default_device_is(tmp_path: Path) -> None:
    expected = trained(tmp_path / "plain", steps=5, device="cpu").model.state_dict()
    opened = files()
    with torch.device("meta"), Trainer(config(steps=5, device="cpu"), tmp_path / "meta", files=opened) as trainer:
        trainer.run()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    with Trainer(config(steps=8), tmp_path, files=files()) as trainer:
        thread = threading.Thread(target=trainer.run)
        thread.start()
        thread.join()
        assert trainer.step == 8


def test_another_order_of_streams_is_refused_when_a_run_goes_on(finished: Run) -> None:
    same_shape = {"b": torch.randn(6000, 300), "a": torch.randn(6000, 200)}
    with pytest.raises(ValueError, match=r"data must have the streams \{'a': 300, 'b': 200\}, got \{'b': 300"):
        Trainer(config(), finished.trainer.folder.path, files=data.open(same_shape))


def test_data_must_be_given_once_and_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must name the streams' files, or files be given"):
        Trainer(config(), tmp_path)
    with pytest.raises(ValueError, match="and not both"):
        Trainer(config(data={"a": "a.npy"}), tmp_path, files=files())
    other = data.open({"a": torch.ones(3, 300)})
    with pytest.raises(ValueError, match="validation_data must have the streams of data"):
        Trainer(config(validation_rows=0), tmp_path, files=files(), validation_files=other)
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:1, got 'abacus'"):
        Trainer(config(device="abacus"), tmp_path, files=files())
    with pytest.raises(ValueError, match="device must be one that is here and can compute, got 'meta'"):
        Trainer(config(device="meta"), tmp_path, files=files())
    with pytest.raises(ValueError, match="backend must be one of"):
        Trainer(config(backend="abacus"), tmp_path, files=files())
    assert not list(tmp_path.iterdir()), "nothing should be written before all is known to fit"


class Board:
    """Stands for torch.utils.tensorboard and wandb alike: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def SummaryWriter(self, folder: str, purge_step: int) -> Board:
        self.told.append((folder, purge_step))
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((step, name, value))

    def init(self, **arguments: Any) -> Board:
        self.told.append(arguments)
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.told += [(step, name, value) for name, value in figures.items()]

    def close(self) -> None:
        self.told.append("closed")

    finish = close


def test_tensorboard_and_wandb_are_told_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards = {"torch.utils.tensorboard": Board(), "wandb": Board()}
    for name, board in boards.items():
        monkeypatch.setitem(sys.modules, name, board)  # type: ignore[arg-type]
    trained(tmp_path, tensorboard=True, wandb="glyphs")
    records = read_metrics(tmp_path / "metrics.jsonl")
    figures = [(record["step"], name, value) for record in records for name, value in flat(record)]
    assert (40, "validation/loss", records[-1]["validation"]["loss"]) in figures
    assert any(name == "train/nmse/a -> b" for _, name, _ in figures)
    tensorboard, wandb = (board.told for board in boards.values())
    assert tensorboard == [(str(tmp_path / "tensorboard"), 1), *figures, "closed"]
    assert wandb[1:] == [*figures, "closed"]
    started = wandb[0]
    assert (started["project"], started["resume"], started["config"]["lr"]) == ("glyphs", "allow", 1e-2)
    assert (tmp_path / "wandb_id").read_text() == started["id"]


@pytest.mark.parametrize(
    ("setting", "module"), [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "p"}, "wandb")]
)
def test_a_missing_board_says_what_to_install(
    setting: dict[str, Any], module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"pip install 'sparc_fast\[(tensorboard|wandb)\]'"):
        trained(tmp_path / "run", **setting)
    assert not (tmp_path / "run").exists(), "a run that could not begin binds nobody to its settings"


def test_lines_tell_how_far_it_is_and_how_fast(finished: Run) -> None:
    lines = finished.printed.splitlines()
    assert lines[0] == "calibrating on up to 500 rows"
    assert len(lines) == 1 + len(finished.recorder.records)
    pattern = r"step 7 of 40, [\d,]+ rows/s, \d:\d\d:\d\d left: loss \d\.\d{4}, self \d\.\d{4}, cross \d\.\d{4}, 0 dead"
    assert re.fullmatch(pattern, lines[1])


def test_the_bar_shows_steps_speed_and_figures(tmp_path: Path) -> None:
    from rich.console import Console

    out = io.StringIO()
    bar = Bar(Console(file=out, force_terminal=True, width=160))
    with Trainer(config(), tmp_path, files=files(), progress=bar) as trainer:
        trainer.run()
    for words in ("40/40", "rows/s", "0:00:0", "loss 0.", "validation loss"):
        assert words in out.getvalue()


def test_a_session_says_where_and_how_fast(finished: Run) -> None:
    folder = finished.trainer.folder
    session, *_ = read_metrics(folder.sessions)
    assert (session["from_step"], session["to_step"], session["ended"]) == (0, 40, "finished")
    assert session["rows_per_second"] == pytest.approx(40 * 32 / session["seconds"], rel=0.1)
    assert json.loads(folder.config.read_text())["n_latents"] == 64


def test_random_numbers_of_others_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trained(tmp_path)
    assert torch.equal(torch.rand(3), expected)

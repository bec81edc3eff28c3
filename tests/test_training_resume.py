"""A run that was killed, stopped or damaged ends with the bits of one that was not."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
from ranks import in_fork
from training_killer import killed_run
from training_runs import RUNS, Recorder, Said, assert_same_results, config, files, trained

from sparc_fast.training import Trainer, read_metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that nobody disturbed."""
    return trained(tmp_path_factory.mktemp("whole")).folder.path


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    ends = in_fork(killed_run, name, tmp_path / "killed")
    assert ends[:4] == [(place, -signal.SIGKILL) for place in ("step", "replace", "unlink", "step")]
    assert ends[-1] == ("time", 0)
    trained(tmp_path / "whole", **RUNS[name])
    assert_same_results(tmp_path / "killed", tmp_path / "whole")
    *_, last = read_metrics(tmp_path / "killed" / "sessions.jsonl")  # who is killed writes none, but at its very end
    assert last["from_step"] > 0, "the last session should have gone on from a checkpoint"


def signals(number: signal.Signals, step: int, times: int = 1) -> Recorder:
    """A sink that sends this process a signal, as somebody at a terminal would."""
    return Recorder(step, lambda: [os.kill(os.getpid(), number) for _ in range(times)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_a_run_after_a_checkpoint_and_it_goes_on(
    number: signal.Signals, whole: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    with Trainer(config(), tmp_path / "stopped", files=files(), sinks=[signals(number, 7)]) as trainer:
        outcome = trainer.run()
        assert (outcome.step, outcome.stopped_by) == (7, number)
        assert signal.getsignal(number) is before
        assert not trainer.folder.model.exists()
        assert trainer.folder.steps()[-1] == 7
        outcome = trainer.run()  # the same object goes on too
        assert (outcome.step, outcome.stopped_by) == (40, None)
    assert_same_results(tmp_path / "stopped", whole)
    ended = [line["ended"] for line in read_metrics(tmp_path / "stopped" / "sessions.jsonl")]
    assert ended == [number.name, "finished"]


class Impatient(Said):
    """A display whose user stops the run when it begins."""

    def start(self, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_the_first_step_of_a_session_loses_nothing(whole: Path, tmp_path: Path) -> None:
    for at_step, words in ((0, "before the first step; the same command begins again"), (7, "after step 7; the same")):
        display = Impatient()
        with Trainer(config(), tmp_path / "stopped", files=files(), progress=display) as trainer:
            outcome = trainer.run()
            assert (outcome.step, outcome.stopped_by) == (at_step, signal.SIGTERM)
            assert any(words in line for line in display.words)
        if at_step == 0:
            sinks = [signals(signal.SIGINT, 7)]
            with Trainer(config(), tmp_path / "stopped", files=files(), sinks=sinks) as trainer:
                trainer.run()
    trained(tmp_path / "stopped")
    assert_same_results(tmp_path / "stopped", whole)


def test_a_second_signal_ends_a_run_at_once(tmp_path: Path) -> None:
    sinks = [signals(signal.SIGINT, 7, times=2)]
    with Trainer(config(), tmp_path, files=files(), sinks=sinks) as trainer, pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.folder.steps() == [5]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(whole: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "hurt", sinks=[signals(signal.SIGTERM, 14)]).folder
    newest, older = (folder.checkpoint(step) for step in reversed(folder.steps()))
    content = bytearray(newest.read_bytes())
    content[-1000] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"is damaged: its content has another hash; it is now .*14\.damaged"):
        trainer = Trainer(config(), tmp_path / "hurt", files=files())
    with trainer:
        assert trainer.step == 10
        assert older.exists()
        trainer.run()
    assert_same_results(tmp_path / "hurt", whole)


def test_settings_no_result_depends_on_may_change_on_the_way(whole: Path, tmp_path: Path) -> None:
    trained(tmp_path / "changed", sinks=[signals(signal.SIGTERM, 14)])
    trained(tmp_path / "changed", lazy=True, checkpoint_every=9, keep=1, reading_threads=2, memory=2**28)
    assert (tmp_path / "changed" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert json.loads((tmp_path / "changed" / "config.json").read_text())["checkpoint_every"] == 9


def test_other_settings_may_not_change_on_the_way(tmp_path: Path) -> None:
    trained(tmp_path, steps=3)
    with pytest.raises(
        ValueError, match=r"goes on with the settings it began with; .* has steps 3, not 4, lr 0.01, not"
    ):
        trained(tmp_path, steps=4, lr=1e-3)
    with pytest.raises(ValueError, match=r"has moments 'float32', not 'bfloat16'"):
        trained(tmp_path, steps=3, moments="bfloat16")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_no_other_process(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", without)
    with pytest.warns(UserWarning, match=r"the file system of .* has no locks \(.*\): see to it that one process"):
        trained(tmp_path, steps=2)


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    trained(tmp_path)
    content = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "sessions" not in path.name
    }
    trained(tmp_path)
    for path, before in content.items():
        assert path.read_bytes() == before
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")].count(40) == 2


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="Windows has no such lock")
    with Trainer(config(), tmp_path, files=files()), pytest.raises(OSError, match="another process is training in"):
        Trainer(config(), tmp_path, files=files())
    Trainer(config(), tmp_path, files=files()).close()


def test_a_run_that_began_with_another_default_keeps_it(tmp_path: Path) -> None:
    trained(tmp_path, best_by="loss", support_dropout=0.0, sinks=[signals(signal.SIGTERM, 14)])
    said = Said()
    with Trainer(config(support_dropout=None), tmp_path, files=files(), progress=said) as trainer:
        assert (trainer.config.best_by, trainer.config.support_dropout) == ("loss", 0.0)
        trainer.run()
    began = f"with which the run in {tmp_path} began"
    assert set(said.words[:2]) == {f"best_by stays 'loss', {began}", f"support_dropout stays 0.0, {began}"}
    figures = [r["validation"]["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "validation" in r]
    assert trainer.best is not None
    assert trainer.best[1] == min(figures)
    assert json.loads((tmp_path / "config.json").read_text())["best_by"] == "loss"


def test_a_run_that_began_with_todays_default_does_not_take_the_one_before(tmp_path: Path) -> None:
    trained(tmp_path, steps=3)
    with pytest.raises(ValueError, match="has best_by 'single_loss', not 'loss'"):
        trained(tmp_path, steps=3, best_by="loss")
    with pytest.raises(ValueError, match=r"has selection 'global', not 'local', support_dropout 0\.3, not 0\.0"):
        trained(tmp_path, steps=3, selection="local", support_dropout=None)

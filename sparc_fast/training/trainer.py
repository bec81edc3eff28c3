"""The training loop, and going on with it after any interruption as if there had been none."""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sparc_fast import distributed
from sparc_fast.batch import measure
from sparc_fast.checkpoint import load_tensors, tensors_of, under
from sparc_fast.data import AlignedFiles, Loader
from sparc_fast.data.absence import mark_zero_rows, present_of, without_empty_samples
from sparc_fast.files import Closing
from sparc_fast.model import SPARC
from sparc_fast.ops import backends
from sparc_fast.ops.huge_pages import give_back_freed
from sparc_fast.optim import Coming, SparcAdam
from sparc_fast.version import __version__

from .checkpoints import find_not_finite, load_model, read, save_model_of
from .config import Config, open_files
from .metrics import Means, MetricsFile, Record, Sink, TensorBoard, WandB, summary_writer, wandb_for
from .progress import Display
from .run_folder import RunFolder, Session
from .schedules import Schedule, advice_on_few_steps
from .validation import hold_out, pairs_of, validate

MEANS = "metrics.sums"


@dataclass(frozen=True)
class Outcome:
    """How a session ended."""

    step: int
    """Steps made in all sessions."""
    stopped_by: signal.Signals | None
    """The signal that ended it early, after a checkpoint; None when the run is finished."""
    best: tuple[int, float] | None
    """(step, validation figure) of the best checkpoint; None without validation."""


class Trainer(Closing):
    """Train a SPARC in a folder; in a folder where a run was interrupted, go on with it.

    What a run computes is a function of its configuration and data: killed at any moment and started again with the
    same arguments, it ends with the same bits in weights, moments and metrics.jsonl (on one machine and torch).

    Args:
        config: the settings; when a run goes on, those it began with, but for ones no result depends on.
        folder: config.json, metrics.jsonl, sessions.jsonl, checkpoints/, and in the end model.safetensors, and with
            validation best.safetensors.
        model: one to start from, instead of ``config.start_from``; it stays as it is.
        files: what `sparc_fast.data.open` gave, instead of ``config.data``.
        validation_files: the same for ``config.validation_data``.
        sinks: objects that are given every record (`Sink`).
        progress: shows how far it is; nothing by default.

    Raises:
        ValueError: the folder holds a run with other settings, or settings and data do not fit together.
        OSError: the folder cannot be written, or another process trains in it.
    """

    def __init__(
        self,
        config: Config,
        folder: str | Path,
        *,
        model: SPARC | None = None,
        files: AlignedFiles | None = None,
        validation_files: AlignedFiles | None = None,
        sinks: Sequence[Sink] = (),
        progress: Display | None = None,
    ) -> None:
        if not isinstance(config, Config):
            raise ValueError(f"config must be a Config, such as read_config gives, got {type(config).__name__}")
        if not isinstance(model, SPARC | None):
            raise ValueError(f"model must be a SPARC, got {type(model).__name__}")
        if not isinstance(sinks, Sequence) or not all(isinstance(sink, Sink) for sink in sinks):
            raise ValueError(f"sinks must be a list of objects that have record and close, got {sinks!r}")
        for name, some in (("files", files), ("validation_files", validation_files)):
            if not isinstance(some, AlignedFiles | None):
                raise ValueError(f"{name} must be what sparc_fast.data.open gave, got {type(some).__name__}")
        self._shared = distributed.is_running()
        self.leads = not self._shared or distributed.leads()
        if self.leads and config.tensorboard:  # before there is a folder
            summary_writer()
        if self.leads and config.wandb:
            wandb_for(config.wandb)
        self.folder = RunFolder(folder)
        self._sinks, self._progress = list(sinks), (progress if self.leads else None) or Display()
        given = config.with_paths_from(Path.cwd())
        self.config = config = self.folder.going_on(given)
        for name in given.differences(config):
            self._progress.say(
                f"{name} stays {getattr(config, name)!r}, with which the run in {self.folder.path} began"
            )
        device = device_of(config.device)
        with ExitStack() as opened:
            files, self.validation_files = _open(config, files, validation_files, opened)
            self.model = _new_model(config, files, device, self._shared)
            if self._shared:
                distributed.check_same(self.model._shards, config.bound(), files)
            self.optimizer = SparcAdam(
                self.model, config.lr, (config.beta_1, config.beta_2), config.eps,
                lazy="replay" if config.lazy else None,
                moments="bfloat16" if config.moments == "bfloat16" else "float32", seed=config.seed,
                freeze=config.freeze, max_grad_norm=config.max_grad_norm or None,
            )  # fmt: skip
            shards = self.model._shards
            self.loader = opened.enter_context(Loader(
                files, config.batch_size, memory=config.memory, seed=config.seed, last="drop",
                n_threads=config.reading_threads or None, part=(shards.rank, shards.ranks),
            ))  # fmt: skip
            self.steps = config.steps or max(1, round(config.epochs * len(self.loader)))
            self.schedule = Schedule(config, self.steps)
            self.step = 0
            self._uncalibrated = self.model.streams if config.calibrate else ()
            self.best: tuple[int, float] | None = None
            self._means = Means(self.model.streams, device, self.model.matryoshka)
            start = None if self.folder.steps() else self._start(model)
            with shards.agreed("begin"):
                if self.leads:
                    opened.enter_context(self.folder.locked())
                    self.folder.agree_on(config)
            if not self._go_on() and (start := start or self._start(model)) is not None:
                self.model._take_over(start)  # with its calibration; streams that it has not begin as ever
                self._uncalibrated = tuple(name for name in self._uncalibrated if name not in start.streams)
            self._opened = opened.pop_all()

    def run(self) -> Outcome:
        """Train until all steps are made, or SIGINT or SIGTERM asks to stop: then after a checkpoint.

        Raises:
            FloatingPointError: a loss or a weight was NaN or infinite; the checkpoints are from before.
            OSError: data cannot be read, or a checkpoint or metrics cannot be written; the last checkpoint is whole.
        """
        device = self.model.W_enc.device
        backend = self.config.backend if self.config.backend != "auto" else backends.available(device)[0]
        session = Session(self.step, device, backend)
        how = "error"
        try:
            with stop_on_signals(self._shared) as stop, ExitStack() as closing:
                self._run(stop, closing)
            how = stop.signal.name if stop.signal and self.step < self.steps else "finished"
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            if self.leads:
                session.end(self.folder.sessions, self.step, self.config.batch_size, how)
        return Outcome(self.step, stop.signal if self.step < self.steps else None, self.best)

    def close(self) -> None:
        """Close what was opened, and let others train in the folder."""
        self._opened.close()

    def _run(self, stop: Stop, closing: ExitStack) -> None:
        config, progress, device = self.config, self._progress, self.model.W_enc.device
        self._metrics = MetricsFile(self.folder.metrics, self.step) if self.leads else None
        if self._metrics is not None:
            closing.callback(self._metrics.close)
        sinks = [*self._sinks, *self._asked_for()] if self.leads and self.step < self.steps else []
        for sink in sinks:
            closing.callback(sink.close)
        self._receivers: list[Any] = [*sinks, progress]
        if self.step == 0 and (advice := advice_on_few_steps(config, self.loader.files.n_rows)) is not None:
            warnings.warn(advice, stacklevel=3)
        if self.step == 0 and self._uncalibrated:
            progress.say(f"calibrating on up to {config.calibration_rows:,} rows")
            found = calibrate(
                self.model, self.loader, config.calibration_rows, config.zero_rows, config.whiten, self._uncalibrated
            )
            for stream, rows in found.items() if self.leads else ():
                _report_zero_rows(self.loader.files, stream, rows, config.zero_rows)
        closing.callback(progress.close)
        progress.start(self.step, self.steps, config.batch_size)
        self.model.train()
        self.model.check_finite = device.type == "cpu"  # the loader has looked; a GPU would wait
        self._loader_state, batches = self.loader.state_dict(), self._batches()
        while self.step < self.steps and stop.signal is None:
            self._train_on(next(batches), stop)
            progress.advance(self.step)
            self._after_step(stop)
        if stop.signal is not None and self.step < self.steps:
            self.loader.load_state_dict(self._loader_state)  # ranks were sent what comes next
            where = f"after step {self.step:,}; the same command goes on from there"
            where = where if self.step else "before the first step; the same command begins again"
            progress.say(f"stopped by {stop.signal.name} {where}")
            return
        self.model.k, self.model.check_finite = config.k, True
        self.model.eval()
        self.model.save(self.folder.model)
        if self.best is not None:
            self._save_best(self.folder.checkpoint(self.best[0]))

    def _batches(self) -> Iterator[_Sent]:
        """Of the steps that are left; of ranks, which are sent each before the step on the one before it."""
        given = chain.from_iterable(self.loader.batches() for _ in count())
        ahead = 1 if self._shared else 0
        sent: deque[_Sent] = deque()
        for step in range(self.step, self.steps):
            while len(sent) <= min(ahead, self.steps - step - 1):
                sent.append(self._send(*next(given)))
            self._loader_state = sent[0].loader_state
            yield sent.popleft()

    def _send(self, batch: Tensor, present: Tensor | None) -> _Sent:
        model, parts = self.model, self.config.accumulate
        present, zero = present_of(batch, present, model.d_streams, self.config.zero_rows)
        batch, present = without_empty_samples(batch, present)
        inputs = batch.to(model.W_enc.device, non_blocking=True)
        coming = self.optimizer.send(
            inputs if parts == 1 else inputs.tensor_split(parts),
            present if parts == 1 or present is None else present.tensor_split(parts),
        )
        zero_rows = None if zero is None else zero.sum(0)
        pairs = None if present is None else pairs_of(present, len(batch), len(model.streams))
        return _Sent(coming, pairs, zero_rows, self.loader.state_dict())

    def _save_best(self, path: Path) -> None:
        if not self._shared:
            save_model_of(path, self.folder.best)
            return
        tensors, state = read(path, self.model._shards)
        self.model._shards.save(self.folder.best, under("model.", tensors), state["model"])

    def _train_on(self, sent: _Sent, stop: Stop) -> None:
        step, model = self.step, self.model
        model.k = self.schedule.k(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(step)
        loss = self.optimizer.step(
            sent.batch,
            self.schedule.cross_loss_coef(step),
            self.config.auxk_coef,
            self.schedule.support_from(step, model.streams),
        )
        pairs, zero_rows = sent.pairs, sent.zero_rows
        if self._shared:
            pairs, zero_rows = self._of_all(pairs, zero_rows, sent.batch.n_samples, stop)
        self._means.add(loss, pairs, zero_rows)
        self.step += 1
        if loss.total.device.type == "cpu" and not math.isfinite(loss.total.item()):
            self._diverged("the loss")  # on a GPU this waits until the means are read

    def _of_all(
        self, pairs: Tensor | None, zero_rows: Tensor | None, n_rows: int, stop: Stop
    ) -> tuple[Tensor | None, Tensor]:
        """The counts of all ranks; a signal that one was sent stops all after the same step."""
        S = len(self.model.streams)
        here = torch.tensor([pairs is not None, stop.asked], dtype=torch.int64, device="cpu")
        counts = pairs_of(None, n_rows, S) if pairs is None else pairs
        zero = torch.zeros(S, dtype=torch.int64, device="cpu") if zero_rows is None else zero_rows
        each = self.model._shards.each(torch.cat([here, counts.long().reshape(-1).cpu(), zero.cpu()])).cpu()
        if sent := int(each[:, 1].max()):
            stop.signal = signal.Signals(sent)
        total = each.sum(0)
        return total[2 : 2 + S * S].view(S, S) if total[0] else None, total[2 + S * S :]

    def _after_step(self, stop: Stop) -> None:
        config, last = self.config, self.step == self.steps
        logs = last or self.step % config.log_every == 0
        validates = self.validation_files is not None and (last or self.step % config.validate_every == 0)
        saves = last or self.step % config.checkpoint_every == 0 or stop.signal is not None
        if (logs or validates or saves) and not self._means.is_finite():
            self._diverged("the loss")
        if logs:
            self._record("train", self._train_record())
        if validates:
            saves |= self._validate()
        if saves or stop.signal is not None:
            self._save()

    def _train_record(self) -> Record:
        done = self.step - 1  # steps made before the last one
        return {
            **(self._means.take() or {}),
            "dead": self.model._shards.total(int(self.model.dead.sum())),
            "epoch": self.step / len(self.loader),
            "lr": self.schedule.lr(done),
            "cross_loss_coef": self.schedule.cross_loss_coef(done),
            "k": self.schedule.k(done),
        }

    def _validate(self) -> bool:
        """Whether it is the best so far. With the final k, so that figures of all steps can be compared."""
        config = self.config
        assert self.validation_files is not None
        self.model.k = config.k
        give_back_freed()  # steps have lent each other more than validation takes
        found = validate(
            self.model, self.validation_files, config.micro_batch, config.cross_loss_coef, config.zero_rows
        )
        self._record("validation", found)
        figure = found[config.best_by]
        if not math.isfinite(figure):
            self._diverged("the validation loss")
        if self.best is not None and figure >= self.best[1]:
            return False
        self.best = self.step, figure
        return True

    def _record(self, kind: str, content: Record) -> None:
        record = {"step": self.step, kind: content}
        if self._metrics is not None:
            self._metrics.append(record)
        for receiver in self._receivers:
            receiver.record(record)

    def _save(self) -> None:
        tensors = tensors_of(self.model, self.optimizer)
        with self.model._shards.agreed("save"):
            if (name := find_not_finite(tensors)) is not None:
                self._diverged(name)
            if self._metrics is not None:
                self._metrics.sync()
        state = {
            "sparc_fast": __version__,
            "step": self.step,
            "best": self.best,
            "loader": self._loader_state,
            "model": {**self.model.config(), "k": self.config.k, "check_finite": True},
            "config": self.config.as_dict(),
        }
        best = -1 if self.best is None else self.best[0]
        self.folder.save(
            self.step, {**tensors, MEANS: self._means.sums}, state, self.config.keep, best, self.model._shards
        )

    def _start(self, given: SPARC | None) -> SPARC | None:
        """The model to start from, if there is one; ValueError where it does not fit the settings or the data."""
        config, model = self.config, self.model
        if given is not None and config.start_from:
            raise ValueError("start_from must be empty where a model is given to Trainer")
        start = load_model(config.start_from) if config.start_from else given
        if start is None:
            return None
        missing = [name for name, width in start.d_streams.items() if model.d_streams.get(name) != width]
        if missing:
            raise ValueError(f"data must have the streams of start_from, {start.d_streams}, got {model.d_streams}")
        if start.n_latents != model.n_latents:
            raise ValueError(f"n_latents must be that of start_from, {start.n_latents}, got {model.n_latents}")
        if start.private_latents != model.private_latents:
            was, now = start.config().get("private", {}), model.config().get("private", {})
            raise ValueError(f"private must be that of start_from, {was}, got {now}")
        for name in start.streams:
            if start.normalize.get(name) != model.normalize.get(name):
                was, now = start.normalize.get(name, "none"), model.normalize.get(name, "none")
                raise ValueError(f"normalize must be that of start_from, {was!r} for {name!r}, got {now!r}")
        return start

    def _go_on(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        found = self.folder.newest(self.model._shards)
        if found is None:
            return False
        tensors, state = found
        if state["model"]["d_streams"] != self.model.d_streams:
            raise ValueError(f"data must have the streams {state['model']['d_streams']}, got {self.model.d_streams}")
        self._means.load(tensors.pop(MEANS))
        load_tensors(self.model, self.optimizer, tensors)
        self.loader.load_state_dict(state["loader"])
        self.step, self.best = state["step"], tuple(state["best"]) if state["best"] else None
        return True

    def _asked_for(self) -> list[Sink]:
        config, folder = self.config, self.folder.path
        sinks: list[Sink] = [TensorBoard(folder, self.step)] if config.tensorboard else []
        return [*sinks, WandB(folder, config.wandb, config.as_dict())] if config.wandb else sinks

    def _diverged(self, what: str) -> None:
        steps = self.folder.steps()
        left = f"the last good checkpoint is {self.folder.checkpoint(steps[-1])}" if steps else "there is no checkpoint"
        raise FloatingPointError(
            f"{what} was NaN or infinite by step {self.step}: {left}. "
            "A lower lr, a longer warmup or a look at the data (sparc_fast.data.open(..., scan=True)) may help"
        )


class _Sent(NamedTuple):
    """A batch for a step."""

    batch: Coming
    pairs: Tensor | None
    zero_rows: Tensor | None
    loader_state: dict[str, Any]
    """Behind it."""


@dataclass
class Stop:
    """Whether somebody asked to stop."""

    signal: signal.Signals | None = None
    asked: int = 0
    """The number of what this process was sent; ranks that train together stop when all know of it."""


@contextmanager
def stop_on_signals(together: bool = False) -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request; a second one raises KeyboardInterrupt.

    Only the main thread can catch signals; in any other they keep their meaning.
    """
    stop = Stop()

    def ask(number: int, _: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = number
        if not together:
            stop.signal = signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def calibrate(
    model: SPARC,
    loader: Loader,
    n_rows: int,
    zero_rows: str = "absent",
    whiten: str = "none",
    streams: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """`SPARC.calibrate` on the first `n_rows` rows that the loader gives, at most one epoch; the loader stands still.

    Of each stream over the samples that have it; with `zero_rows` "absent", zero rows are none.

    Returns:
        stream -> numbers in the files of the zero rows that were met, ascending, where there were any.
    """
    files, state, part = loader.files, loader.state_dict(), loader.part
    loader.part = (0, 1)  # all ranks measure the same rows, each as one process would
    zero: list[Tensor] = []

    def pieces() -> Iterator[tuple[Tensor, Tensor | None]]:
        left = n_rows
        for batch, numbers in loader.numbered_batches():
            batch, numbers = batch[:left], numbers[:left]
            left -= len(batch)
            has = None if files.present is None else files.present[numbers]
            filled, is_zero = mark_zero_rows(batch, has, files.d_streams)
            if is_zero is not None:
                zero.append(torch.where(is_zero, numbers[:, None], -1))
            yield model._unit_rows(batch.double(), model.streams), filled if zero_rows == "absent" else has
            if not left:
                break

    mean, rms, counts = measure(pieces(), tuple(files.d_streams.values()), whiten)
    loader.load_state_dict(state)
    loader.part = part
    for stream, n in zip(files.d_streams, counts, strict=True):
        if not n:
            raise ValueError(f"data must have rows of {stream!r} that are not zero to be calibrated, got none")
    model._calibrate_streams(mean, rms, model.streams if streams is None else streams)
    found = zip(files.d_streams, torch.cat(zero).T if zero else [], strict=False)
    return {stream: rows[rows >= 0].sort().values for stream, rows in found if (rows >= 0).any()}


def _report_zero_rows(files: AlignedFiles, stream: str, rows: Tensor, zero_rows: str) -> None:
    """Warn of rows that no image or text has."""
    places = [files.readers[stream].origin(row) for row in rows[:3].tolist()]
    named = ", ".join(f"row {row} of {title}" for title, row in places) + ", …" * (len(rows) > len(places))
    then = "they count as absent" if zero_rows == "absent" else "they are trained on"
    warnings.warn(f"{len(rows):,} of the rows measured of {stream!r} are zero ({named}): {then}", stacklevel=2)


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:1, got {name!r}") from error
    try:
        torch.empty(1, dtype=torch.float32, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each device says it in its own way
        reason = str(error).partition(". ")[0]
        raise ValueError(f"device must be one that is here and can compute, got {name!r}: {reason}") from error
    return device


def _open(
    config: Config, files: AlignedFiles | None, validation_files: AlignedFiles | None, opened: ExitStack
) -> tuple[AlignedFiles, AlignedFiles | None]:
    """(files to train on, files to validate on); closes in the end those that are opened here."""
    if (files is not None and config.data) or (files is None and not config.data):
        raise ValueError("data must name the streams' files, or files be given to Trainer instead, and not both")
    if files is None:
        files = opened.enter_context(open_files(config))
    if validation_files is None and config.validation_data:
        validation_files = opened.enter_context(open_files(config, validation=True))
    if config.validation_rows:
        return hold_out(files, config.validation_rows)
    if validation_files is not None and validation_files.d_streams != files.d_streams:
        raise ValueError(
            f"validation_data must have the streams of data, {files.d_streams}, got {validation_files.d_streams}"
        )
    return files, validation_files


def _new_model(config: Config, files: AlignedFiles, device: torch.device, shared: bool) -> SPARC:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # on the CPU, so that every device begins with the same weights
        model = SPARC(
            files.d_streams, config.n_latents, config.k,
            selection=cast(Any, config.selection), auxk=config.auxk,
            private=config.private or None, private_k=config.private_k or None,
            dead_after=config.dead_after, normalize=cast(Any, config.normalize),
            loss="fvu" if config.loss == "fvu" else "nmse", matryoshka=config.matryoshka, backend="auto",
            sparsity_coef=config.sparsity_coef, bandwidth=config.bandwidth,
            dtype=getattr(torch, config.dtype), device="meta" if shared else "cpu",
        )  # fmt: skip
        model = distributed.shard(model, distributed.mesh_of(device, config.replicas)) if shared else model
    backends.resolve(config.backend, device)
    model.backend = config.backend
    return model.to(device) if device.type != "cpu" else model

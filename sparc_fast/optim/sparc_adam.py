"""SparcAdam: a whole SPARC training step, with no gradient of a weight matrix in memory."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from inspect import unwrap
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sparc_fast.batch import AllStreams, Arrays, Batch, Inputs, Presence, columns_of, stack, streams_of
from sparc_fast.model import SPARC
from sparc_fast.objective import Objective, SparcLoss, fired, of_all_replicas
from sparc_fast.ops import autograd, backends, reference
from sparc_fast.ops.huge_pages import empty_rows
from sparc_fast.ops.layout import by_group, wide, wide_type
from sparc_fast.ops.row_step import AdamStep, Bias, DecoderRows, Rows, Samples
from sparc_fast.optim.freezing import BY_STREAM, Run, Trained
from sparc_fast.optim.lazy_rows import Behind
from sparc_fast.optim.micro_batches import MicroBatches, OneBatch
from sparc_fast.optim.private_rows import decoder_blocks
from sparc_fast.optim.step_graphs import Made, Quiet, StepGraphs, can_capture
from sparc_fast.selection import BY_THRESHOLD
from sparc_fast.sizes import is_integer, is_number

MomentType = Literal["float32", "bfloat16"]
T = TypeVar("T")
Parts = Inputs | Arrays | Sequence[Inputs | Arrays]
"""A batch, or several that are parts of one."""
PresenceOfParts = Presence | Sequence[Presence | None] | None


class Coming:
    """The parts of a batch, of which other ranks are sent the next while one is worked on."""

    def __init__(self, model: SPARC, parts: Sequence[tuple[Inputs, Presence | None]], n_samples: int) -> None:
        self.parts, self.n_samples, self._model = parts, n_samples, model
        self._first: Callable[[], Batch] | None = None

    def begin(self, into: Tensor | None = None) -> Coming:
        """Sends the first part, if it has not been sent. `into`: where samples of one part that are copied may be, if a
        step takes them before others are sent."""
        if self._first is None:
            with autograd.without_autocast(self._model.W_enc):
                self._first = self._model._begin_batch(*self.parts[0], into=into if len(self.parts) == 1 else None)
        return self

    def batches(self) -> Iterator[Batch]:
        assert self._first is not None
        coming, here = self._first, deque[Batch]()  # which no variable holds while it is worked on
        for part in self.parts[1:]:
            here.append(coming())
            coming = self._model._begin_batch(*part)
            yield here.popleft()
        yield coming()


class SparcAdam(torch.optim.Optimizer):
    """torch.optim.Adam on `model.loss`, with the decoder's gradient projection and unit norm, in one call a step.

    ``opt.step(inputs)`` equals, to rounding::

        loss = model.loss(inputs)
        loss.total.backward()
        model.project_gradients_()
        adam.step()
        model.normalize_decoder_()

    Learning-rate schedulers and `state_dict` work as on any optimizer; the state of each parameter is that of
    torch.optim.Adam. Weights narrower than float32 keep float32 master rows in the state; if their type becomes wider,
    the next step gives them what these hold.

    Args:
        model: the model to train.
        lr, betas, eps: as in torch.optim.Adam (Kingma & Ba, arXiv 1412.6980).
        lazy: "replay" leaves decoder rows that no sample of a batch uses as they are, and runs the steps they missed
            when they are next read: bit for bit the same training, with less memory traffic where latents are many.
            Whoever reads ``model.W_dec`` gets rows that are up to date, which costs the steps that all others missed.
        capturable: as in torch.optim.Adam: the step count stays on the device, ``lr`` may be a tensor there, and a step
            reads nothing on the host, so that a CUDA graph can capture it; captured, rows of zeros are not absent: see
            `SPARC.encode`.
        moments: "bfloat16" keeps Adam's moments of W_enc and W_dec in half the memory, rounded up or down at random so
            that they are right on average; to the nearest, moments that change by less than a rounding would stand
            still. Rows move by the moments before they are rounded. "float32" keeps them as torch.optim.Adam does.
        freeze: what stays as it is, bit for bit, and has no moments: "encoder" (W_enc, latent_bias and pre_bias, with
            every code), "decoder" (W_dec and pre_bias), or names of streams, whose columns of all of these stay.
        max_grad_norm: the most that the norm of all gradients together may be, those of loss.total.backward(); they are
            scaled down to it as torch.nn.utils.clip_grad_norm_ does, before the projection. For this the sums of a step
            are made twice, and W_enc is read once more. None: they are not clipped, which costs nothing.
        graph: on a GPU, steps on whole batches of all streams whose shape stays the same are captured in a CUDA graph
            and replayed, which launches all of a step at once: the same training, bit for bit, without the host's time.
            The graph's scratch stays allocated. What cannot be captured is made as ever: several parts, `present`, zero
            rows of a calibrated model, private latents, matryoshka, ``lazy``, selection="batch", several processes.
            With ``capturable`` you capture the step yourself.
        seed: of that rounding. The same seed gives the same bits, on any number of threads, lazy or not; it is not
            part of the state.
    """

    def __init__(
        self,
        model: SPARC,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        lazy: Literal["replay"] | None = None,
        capturable: bool = False,
        moments: MomentType = "float32",
        seed: int = 0,
        freeze: str | Collection[str] = (),
        max_grad_norm: float | None = None,
        graph: bool = True,
    ) -> None:
        if not isinstance(model, SPARC):
            hint = ": it trains one process's model, and exchanges nothing" if hasattr(model, "module") else ""
            raise ValueError(f"model must be a SPARC, got {type(model).__name__}{hint}")
        if not (_is_number(lr) and lr >= 0 and _is_number(eps) and eps >= 0 and _are_betas(betas)):
            raise ValueError(
                f"lr and eps must be numbers >= 0 and betas two in [0, 1), got lr={lr!r}, eps={eps!r}, betas={betas!r}"
            )
        if lazy not in (None, "replay"):
            raise ValueError(f'lazy must be None or "replay", got {lazy!r}')
        if lazy and capturable:
            raise ValueError('capturable must be False with lazy="replay": which rows to replay is read on the host')
        if capturable and not model._shards.is_whole:
            raise ValueError("capturable must be False where processes share the latents: how many is read on the host")
        if moments not in ("float32", "bfloat16"):
            raise ValueError(f'moments must be "float32" or "bfloat16", got {moments!r}')
        if moments == "bfloat16" and model.W_enc.dtype == torch.float64:
            raise ValueError('moments must be "float32" for a float64 model, whose moments are float64, got "bfloat16"')
        if not is_integer(seed):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
            raise ValueError(f"max_grad_norm must be a number > 0 or None, got {max_grad_norm!r}")
        self.model = model
        self.max_grad_norm = max_grad_norm
        self.capturable = capturable
        self.moments: MomentType = moments
        self.seed = int(seed)
        self.graph = graph
        self._graphs, self._quiet = StepGraphs(), Quiet()
        self._trained = Trained.but(freeze, model.d_streams)
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._seen: dict[Tensor, int] = {}
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "amsgrad": False}
        super().__init__(list(model.parameters()), options)
        self._behind = Behind(len(model.W_enc), model.W_dec.device) if lazy and self._trained.decoder else None
        if self._behind is not None:
            model._before_reading_decoder(self.catch_up)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        inputs: Parts | Coming,
        cross_loss_coef: float = 1.0,
        auxk_coef: float = 1 / 32,
        support_from: Sequence[str] | None = None,
        present: PresenceOfParts = None,
    ) -> SparcLoss:
        """One training step on a batch; returns its loss, before the step. Arguments as in `SPARC.loss`.

        Several batches of the same streams, a list or tuple like ``x.split(4096)``, are parts of one: to rounding, the
        step and the loss are those of all samples together. What grows with samples is held for one part at a time,
        beside the gradients of both weight matrices, and for moments these twice. `present` is then as many.
        """
        if self.model._shards.is_whole and (ranks := _processes()) > 1:
            raise ValueError(
                f"SparcAdam must run in one process, got {ranks}, each of which would train a model of its own: share "
                "its latents between them with sparc_fast.distributed.shard, or wrap the model in "
                "DistributedDataParallel and give its parameters to torch.optim.Adam instead"
            )
        coming = inputs if isinstance(inputs, Coming) else self._given(inputs, present)
        coming.begin(self._graphs.inputs)
        is_fixed = self._is_fixed(coming.parts)
        if is_fixed and self.model.auxk and auxk_coef and self._quiet.holds(self.model.silence, self.model.dead_after):
            auxk_coef = 0.0
        reads_host = not self.capturable and not is_fixed
        objective = self.model._objective(cross_loss_coef, auxk_coef, support_from, reads_host)
        with self.model._rows_left_behind(), autograd.without_autocast(self.model.W_enc):
            self._check_trainable()
            return self._step(coming, objective, is_fixed)

    @torch.no_grad()
    def send(self, inputs: Parts, present: PresenceOfParts = None) -> Coming:
        """What to give to a later `step` in place of inputs and `present`, which other ranks are sent meanwhile.

        Called before the step that comes first, so that samples are exchanged while that works::

            coming = optimizer.send(next(batches))
            for batch in batches:
                now, coming = coming, optimizer.send(batch)
                optimizer.step(now)
            optimizer.step(coming)

        All ranks call it together. It takes memory for the samples of one batch, or of its first part, more. One
        process has nothing to send: its samples must stay as they are until the step, which looks whether they are
        finite.
        """
        coming, shards = self._given(inputs, present), self.model._shards
        return coming if shards.is_whole else coming.begin()

    def _given(self, inputs: Parts, present: PresenceOfParts) -> Coming:
        with self.model._shards.agreed("step"):
            return Coming(self.model, *self._parts(inputs, present))

    def _parts(self, inputs: Parts, present: PresenceOfParts) -> tuple[list[tuple[Inputs, Presence | None]], int]:
        """(the parts of a batch, and which streams their samples have; how many samples these are together)."""
        given = [self.model._tensors(part) for part in (inputs if isinstance(inputs, Sequence) else [inputs])]
        n_samples = self._count_samples(given)
        has = [None] * len(given) if present is None else list(present) if isinstance(present, Sequence) else [present]
        if len(has) != len(given):
            raise ValueError(f"present must be one tensor for each of {len(given)} parts of a batch, got {len(has)}")
        if self.capturable and any(one is not None for one in has):
            raise ValueError("present must be None with capturable=True: who has which streams is read on the host")
        rule = self.model.selection
        if self.capturable and rule in BY_THRESHOLD:
            raise ValueError(
                f'capturable must be False for a model with selection="{rule}": how many latents a sample has is read '
                "on the host"
            )
        if rule == "batch" and len(given) > 1:
            raise ValueError(
                'inputs must be one batch for a model with selection="batch": who fires is decided over all samples of '
                "a step"
            )
        return list(zip(given, has, strict=True)), n_samples

    def _step(self, coming: Coming, objective: Objective, is_fixed: bool) -> SparcLoss:
        model = self.model
        backend = backends.resolve(model.backend, model.W_enc.device)
        parameters = (model.W_enc, model.W_dec, model.latent_bias, model.pre_bias, model.latent_threshold)
        states = [self._state(p) if p is not None and self._is_trained(p) else None for p in parameters]
        trained = [state for state in states if state is not None]
        lr = self.param_groups[0]["lr"]
        step = trained[0]["step"] if self.capturable else int(trained[0]["step"]) + 1

        def one_step(batch: OneBatch | MicroBatches, lr: float | Tensor, step: int | Tensor) -> SparcLoss:
            if objective.jumprelu is not None and batch.of_threshold is not None:
                counts = objective.fired(batch.terms, model.streams)
                batch = batch.with_grad_threshold(objective.jumprelu.gradient(batch.of_threshold, *counts, objective.k))
            biases, adam = self._update(batch, states, backend, lr, step)
            counted = step if isinstance(step, Tensor) and not self.capturable else None
            return self._finish(batch, biases, adam, backend, objective, counted)

        def whole_step(given: Batch, lr: float | Tensor, step: int | Tensor) -> SparcLoss:
            over = objective.over([given])
            if is_fixed and over.dead is not None:
                over = replace(over, dead=model.dead)  # now, not when this was captured
            return one_step(self._flow(given, given.n_samples, over, backend), lr, step)

        if len(coming.parts) == 1:
            (given,) = coming.batches()
            kind = self._kind(given, objective, states) if is_fixed and self.graph else None
            if kind is None:
                loss = whole_step(given, lr, step)
            else:
                of_x: Made = lambda x, lr, step: whole_step(given._replace(x=x), lr, step)  # noqa: E731
                loss, replayed = self._graphs.make(kind, of_x, given.x, lr, int(step))
                if replayed:
                    torch.autograd.graph.increment_version([*self._moved(states), model.silence])
                    for state in trained:
                        state["step"] += 1
            if is_fixed:
                self._quiet.note(model.silence, given.n_samples)
        else:
            n_samples = model._shards.samples(coming.n_samples)
            widths, private = tuple(model.d_streams.values()), model._private_here
            batch = MicroBatches(widths, model.silence, backend, n_samples, private)
            objective = objective.over(coming.batches())
            batches = coming.batches()
            for _ in coming.parts:
                batch.add(self._flow(next(batches), n_samples, objective, backend))
            loss = one_step(batch, lr, step)
        self._seen.update((p, p._version) for p in model.parameters() if "master" in self.state[p])
        return loss

    def _is_fixed(self, parts: Sequence[tuple[Inputs, Presence | None]]) -> bool:
        """Whether such a step may read nothing on the host but which samples it gets."""
        model = self.model
        is_plain = not self.capturable and self._behind is None and not model.silence.is_inference()
        chooses_alike = model.selection in ("global", "local") and model._private is None and not model.matryoshka
        is_one = len(parts) == 1 and parts[0][1] is None
        return is_plain and chooses_alike and is_one and model._shards.is_whole and can_capture(model.W_enc.device)

    def _kind(self, given: Batch, objective: Objective, states: Sequence[dict[str, Tensor] | None]) -> Hashable | None:
        """What a captured step stands on; None where it may not be captured."""
        model, (group,) = self.model, self.param_groups
        lr, x = group["lr"], given.x
        reads = given.present is not None or given.zero_rows is not None
        if reads or given.streams != model.streams or x.dtype == torch.float64 or not len(x):
            return None
        if isinstance(lr, Tensor) and lr.device != x.device:
            return None
        matmul = torch.backends.cuda.matmul
        held = [*self._moved(states), model.silence, *([lr] if isinstance(lr, Tensor) else [])]
        return (
            x.shape, x.stride(), x.dtype, given.of_batch, objective.backend, objective.k, objective.cross_loss_coef,
            None if objective.support_from is None else tuple(objective.support_from), objective.loss,
            objective.dead is None, objective.auxk, objective.auxk_coef, model.dead_after,
            group["betas"], group["eps"], self.max_grad_norm, self._seed_of_rows, matmul.allow_fp16_accumulation,
            matmul.allow_bf16_reduced_precision_reduction, tuple(tensor.data_ptr() for tensor in held),
        )  # fmt: skip

    def _moved(self, states: Sequence[dict[str, Tensor] | None]) -> list[Tensor]:
        """All that a step of these states writes, but the counters of silence."""
        parameters = self.model.W_enc, self.model.W_dec, self.model.latent_bias, self.model.pre_bias
        of_states = [
            state[key] for state in states if state for key in ("exp_avg", "exp_avg_sq", "master") if key in state
        ]
        return [*parameters, *of_states]

    def _flow(self, given: Batch, n_samples: int, objective: Objective, backend: backends.Backend) -> OneBatch:
        """A batch, or a part of one of `n_samples`, through the objective."""
        model = self.model
        model._learn_threshold(given)
        parts = objective.choose(given)
        among = [AllStreams(model.d_streams, part.batch) for part in parts]
        used = [a.streams(indices) for a, part in zip(among, parts, strict=True) for indices in part.supports.used()]
        supports = stack(used)
        inverse = backend.invert_indices(supports, len(model.W_enc))
        if self._behind is not None:
            self._replay(inverse[0].diff().nonzero()[:, 0], backend)
            W_decs = [columns_of(model.W_dec, part.batch.streams, model.d_streams) for part in parts]
            parts = [p._replace(batch=p.batch._replace(W_dec=W)) for p, W in zip(parts, W_decs, strict=True)]
        flows = [part.measure(n_samples) for part in parts]
        # what AuxK reconstructed counts as further samples of the same inputs
        passes = [
            (a, part.batch.x, one) for a, part, flow in zip(among, parts, flows, strict=True) for one in flow.passes()
        ]
        values = [a.streams(one.values) for a, _, one in passes]
        recons = [a.columns(a.streams(one.grad_recons.flatten(0, -3))) for a, _, one in passes]
        samples = Samples(
            stack([a.columns(x) for a, x, _ in passes]),
            model.pre_bias,
            stack(values),
            stack([a.streams(one.grad_values) for a, _, one in passes]),
            stack(recons),
            *inverse,
        )
        of_decoder = groups = None
        if sizes := model._shards.nested(objective.sizes):
            nested = [one.prefixes is not None for _, _, one in passes]  # AuxK's is not
            groups = stack([by_group(some, sizes) if here else some for some, here in zip(used, nested, strict=True)])
            repeated = [
                some.repeat(len(sizes), 1, 1) if here else some for some, here in zip(values, nested, strict=True)
            ]
            inverse = backend.invert_indices(groups, len(model.W_enc))
            of_decoder = samples._replace(values=stack(repeated), offsets=inverse[0], entries=inverse[1])
            samples = samples._replace(grad_recons=samples.grad_recons[:0])  # what moves W_enc is in grad_values
        grad_pre_bias = [a.columns(flow.reconstruction.grad_pre_bias) for a, flow in zip(among, flows, strict=True)]
        terms = {part.batch.streams: flow.terms() for part, flow in zip(parts, flows, strict=True)}
        every = model.d_streams if model._shards.has_replicas else None
        of_pre_bias = sum(grad_pre_bias[1:], grad_pre_bias[0])
        of_threshold = [a.rows(flow.jump.both) for a, flow in zip(among, flows, strict=True) if flow.jump is not None]
        one = OneBatch(
            given.streams, terms, *fired(parts, flows, every), samples, of_pre_bias, supports, given.zero_rows,
            of_decoder, model._private_here,
            sum(of_threshold[1:], of_threshold[0]) if of_threshold else None,
        )  # fmt: skip
        return self._with_replicas(one, groups, backend)

    def _with_replicas(self, one: OneBatch, groups: Tensor | None, backend: backends.Backend) -> OneBatch:
        """Of all the batch, where replicas have taken other samples of it; `groups` are the supports of the decoder."""
        shards = self.model._shards
        if not shards.has_replicas:
            return one
        values, support = shards.of_replicas(one.values, one.support)
        x, of_values, grad_values, used = shards.of_replicas(
            one.samples.x, one.samples.values, one.samples.grad_values, one.used
        )
        inverse = backend.invert_indices(used, len(self.model.W_enc))
        if self._behind is not None:
            self._replay(inverse[0].diff().nonzero()[:, 0], backend)
        (grad_recons,) = shards.of_replicas(one.samples.grad_recons)
        samples = Samples(x, one.samples.pre_bias, of_values, grad_values, grad_recons, *inverse)
        of_decoder = one.of_decoder
        if of_decoder is not None and groups is not None:
            nested = shards.of_replicas(of_decoder.values, of_decoder.grad_recons, groups)
            inverse = backend.invert_indices(nested[2], len(self.model.W_enc))
            of_decoder = samples._replace(
                values=nested[0], grad_recons=nested[1], offsets=inverse[0], entries=inverse[1]
            )
        (grad_pre_bias,) = shards.sum_of_replicas(one.grad_pre_bias)
        return one._replace(
            terms=of_all_replicas(one.terms, shards, x.device), values=values, support=support, samples=samples,
            used=used, grad_pre_bias=grad_pre_bias, of_decoder=of_decoder,
        )  # fmt: skip

    def _update(
        self,
        batch: OneBatch | MicroBatches,
        states: Sequence[dict[str, Tensor] | None],
        backend: backends.Backend,
        lr: float | Tensor,
        step: int | Tensor,
    ) -> tuple[list[Bias], AdamStep]:
        """A step of the rows; returns the biases that are left to move, and how."""
        model, group = self.model, self.param_groups[0]
        eps = group["eps"]
        betas: tuple[float, float] = group["betas"]
        of_runs = [(run, self._rows_of(run, states)) for run in self._runs()]
        if self.max_grad_norm is not None:
            waits = model.W_enc.device.type == "cpu" and not isinstance(step, Tensor)
            batch = self._clipped(batch, of_runs, backend, self.max_grad_norm, waits)
        if self.capturable or not isinstance(step, Tensor):  # else a graph counts, and whoever replays it
            for state in states:
                if state is not None:
                    state["step"] += 1
        if self._behind is not None:
            self._behind.record(float(lr), *betas, float(eps))
        adam = AdamStep(lr, betas, eps, step, self._seed_of_rows)
        biases = []
        for run, rows in of_runs:
            grad_latent_bias, grad_pre_bias = batch.update(rows, run, adam, backend)
            if states[2] is not None:
                biases.append(self._bias(model.latent_bias, [grad_latent_bias], states[2], run))
            if states[3] is not None:
                through_decoder = batch.grad_pre_bias if run is None else batch.grad_pre_bias[run.columns]
                both = [model._shards.sum(grad_pre_bias), through_decoder]
                biases.append(self._bias(model.pre_bias, both, states[3], run))
            if model.latent_threshold is not None and batch.grad_threshold is not None and states[4] is not None:
                of_run = batch.grad_threshold if run is None else batch.grad_threshold[run.streams]
                biases.append(self._bias(model.latent_threshold, [of_run], states[4], run))
        return biases, adam

    def _finish(
        self,
        batch: OneBatch | MicroBatches,
        biases: list[Bias],
        adam: AdamStep,
        backend: backends.Backend,
        objective: Objective,
        counted: Tensor | None,
    ) -> SparcLoss:
        """What is left of a step when its rows have moved; `counted`, the number of the step, grows where given."""
        silence = self.model.silence
        if self.model._shards.is_whole and isinstance(batch, OneBatch) and tuple(batch.terms) == (batch.streams,):
            at_once = partial(backend.finish_step, biases, adam, silence, batch.values, batch.support, counted)
            return objective.summarize(batch.terms, batch.streams, batch.zero_rows, at_once)
        backend.step_biases(biases, adam)
        batch.count_silence(silence, backend)
        if counted is not None:
            counted.add_(1)
        return objective.summarize(batch.terms, batch.streams, batch.zero_rows)

    def _clipped(
        self,
        batch: OneBatch | MicroBatches,
        of_runs: Sequence[tuple[Run | None, Rows]],
        backend: backends.Backend,
        most: float,
        waits: bool,
    ) -> OneBatch | MicroBatches:
        """The batch with its gradients scaled so that their norm is at most this.

        Raises:
            FloatingPointError: the norm is NaN or infinite, and the host `waits` to hear of it; nothing has moved.
        """
        shards = self.model._shards
        total = torch.zeros((), dtype=torch.float64, device=self.model.W_enc.device)
        for run, rows in of_runs:
            squares, grad_latent_bias = batch.squared_norm(rows, run, backend)
            total += shards.sum(squares)
            if rows.W_enc is None:
                continue
            total += shards.sum(grad_latent_bias.double().square().sum())
            if batch.grad_threshold is not None:
                of_run = batch.grad_threshold if run is None else batch.grad_threshold[run.streams]
                total += shards.sum(of_run.double().square().sum())
            if rows.W_dec is not None:
                of_decoder = batch.grad_pre_bias if run is None else batch.grad_pre_bias[run.columns]
                of_encoder = reference.pre_bias_gradient(grad_latent_bias, rows.W_enc, rows.d_streams)
                total += (shards.sum(of_encoder) + of_decoder).double().square().sum()
        norm = total.sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1)
        if waits and not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"gradients must be finite to be clipped, got a norm of {norm.item()}: no step made"
            )
        return batch if waits and factor.item() == 1 else batch.scaled(factor)

    def _runs(self) -> tuple[Run | None, ...]:
        """Streams to train that are neighbours; None: all streams together."""
        return (None,) if self._trained.everything else self._trained.runs

    def _of_run(
        self, parameter: Tensor, state: dict[str, Tensor], run: Run | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(what Adam moves, its two moments, the copy of it that follows) of these streams."""
        there: Any = ...
        own: Any = ...
        if run is not None:
            is_by_stream = self._names[parameter] in BY_STREAM
            there, own = (run.streams, run.own_streams) if is_by_stream else ((..., run.columns), (..., run.own))
        moments = state["exp_avg"][own], state["exp_avg_sq"][own]
        if "master" in state:
            return state["master"][own], *moments, parameter[there]
        return parameter[there], *moments, None

    def _bias(self, parameter: Tensor, gradients: Sequence[Tensor], state: dict[str, Tensor], run: Run | None) -> Bias:
        exact, mean, square, copy = self._of_run(parameter, state, run)
        return Bias(exact, gradients, [mean, square], copy)

    def _rows_of(self, run: Run | None, states: Sequence[dict[str, Tensor] | None]) -> Rows:
        model, nothing = self.model, (None, None, None, None)
        encoder, decoder = (
            nothing if state is None else self._of_run(W, state, run)
            for W, state in ((model.W_enc, states[0]), (model.W_dec, states[1]))
        )
        widths = tuple(model.d_streams.values()) if run is None else run.d_streams
        last_step = self._behind.last_step if self._behind is not None else None
        copies = [encoder[3], decoder[3]]
        has_copies = any(copy is not None for copy in copies)
        moments = [*encoder[1:3], *decoder[1:3]]
        return Rows(encoder[0], decoder[0], moments, widths, copies if has_copies else None, last_step)

    @torch.no_grad()
    def catch_up(self) -> None:
        """With ``lazy="replay"``: bring every decoder row up to date. Otherwise they always are."""
        if self._behind is None or not self._behind.is_any:
            return
        with self.model._rows_left_behind():
            W_dec = self.model.W_dec
            if self.state[W_dec]:
                self._state(W_dec)
                every = torch.arange(len(W_dec), device=W_dec.device)
                self._replay(every, backends.resolve(self.model.backend, W_dec.device))
                self._behind.is_any = False

    def _replay(self, latents: Tensor, backend: backends.Backend) -> None:
        assert self._behind is not None
        W_dec, behind = self.model.W_dec, self._behind
        runs = self._runs()
        before = behind.last_step.clone() if len(runs) > 1 else behind.last_step
        for run in runs:
            behind.last_step.copy_(before)  # the run before has caught up
            of_run = self._rows_of(run, [None, self.state[W_dec]])
            (exact,), moments = of_run.weights, of_run.their_moments
            copy = of_run.copies[1] if of_run.copies else None
            rows = DecoderRows(exact, moments, of_run.d_streams, behind.last_step, copy)
            for some, here in decoder_blocks(rows, run, latents, self.model._private_here):
                backend.replay_rows(some, here, behind.history, self._seed_of_rows)
        if len(runs) > 1:  # the last has no private latents of the others
            behind.last_step[latents] = len(behind.history)
        if "master" in self.state[W_dec]:
            self._seen[W_dec] = W_dec._version

    @property
    def _seed_of_rows(self) -> int:
        return self.model._shards.seed(self.seed)

    def _moment_dtype(self, parameter: Tensor) -> torch.dtype:
        if self.moments == "bfloat16" and (parameter is self.model.W_enc or parameter is self.model.W_dec):
            return torch.bfloat16
        return torch.float64 if parameter.dtype == torch.float64 else torch.float32

    def _count_samples(self, parts: Sequence[Inputs]) -> int:
        if not parts:
            raise ValueError("inputs must be a batch, or parts of one, got no part")
        given = [streams_of(part, self.model.d_streams) for part in parts]
        first = tuple(given[0])
        for streams in map(tuple, given):
            if streams != first:
                got = f"{first} and {streams}"
                raise ValueError(f"inputs must hold the same streams in every part of a batch, got {got}")
        return sum(math.prod(streams[first[0]].shape[:-1]) for streams in given)

    def _check_trainable(self) -> None:
        if not self.model.training:
            raise ValueError("model must be in training mode to step, got eval mode: call model.train()")
        frozen = [name for name, p in self.model.named_parameters() if self._is_trained(p) and not p.requires_grad]
        if frozen:
            raise ValueError(
                f"SparcAdam trains every weight of the model, but {', '.join(frozen)} is frozen: "
                "name what stays in freeze"
            )

    def _is_trained(self, parameter: Tensor) -> bool:
        return self._trained.has(self._names[parameter])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the model's own weights, given to the constructor, can be trained."""
        if self.param_groups:
            raise ValueError("SparcAdam has one parameter group, the model's weights, and takes no other")
        _eager(torch.optim.Optimizer.add_param_group)(self, param_group)

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        mine = (
            "model",
            "capturable",
            "graph",
            "moments",
            "seed",
            "max_grad_norm",
            "_trained",
            "_names",
            "_seen",
            "_behind",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._graphs, self._quiet = StepGraphs(), Quiet()
        if state.get("_behind") is not None:  # a copy, not a state that is being loaded
            self.model._before_reading_decoder(self.catch_up)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        name, is_narrow = self._names[parameter], parameter.dtype != wide_type(parameter.dtype)
        if not state:
            rows = self._trained.of(name, parameter.detach())
            device = parameter.device if self.capturable else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            dtype = self._moment_dtype(parameter)
            state["exp_avg"], state["exp_avg_sq"] = _zeros_like(rows, dtype), _zeros_like(rows, dtype)
        if "master" not in state:
            if is_narrow:
                state["master"] = wide(self._trained.of(name, parameter.detach()))
            return state
        master, is_ours = state["master"], self._seen.get(parameter) == parameter._version
        if is_narrow and not is_ours:
            # somebody else wrote the weights: where they did, their rounding is all there is
            trained = self._trained.of(name, parameter)
            master.copy_(torch.where(trained == master.to(parameter.dtype), master, trained))
        elif not is_narrow:  # any more
            for run in self._runs() if is_ours else ():
                exact, _, _, weights = self._of_run(parameter, state, run)
                assert weights is not None
                weights.copy_(exact)
            del state["master"]
        return state

    def _all_states(self) -> None:
        """Those that the first step makes are there."""
        with self.model._rows_left_behind():
            for parameter in filter(self._is_trained, self._names):
                self._state(parameter)

    def _all_current(self) -> None:
        """The decoder's rows were written as its steps say."""
        if self._behind is not None:
            state = self.state[self.model.W_dec]
            self._behind.all_current(int(state["step"]) if state else 0)

    def state_dict(self) -> dict[str, Any]:
        """As on any optimizer; decoder rows are brought up to date first."""
        self.catch_up()
        return _eager(torch.optim.Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As on any optimizer; master rows keep their float32. torch.optim.Adam's state loads too.

        Master rows that narrow weights need and the state lacks are made of the weights, by the next step.
        Moments take the type of this optimizer's ``moments``: float32 ones are rounded to the nearest bfloat16,
        bfloat16 ones widened to the same float32.
        """
        for group in state_dict["param_groups"]:
            if group.get("weight_decay") or group.get("amsgrad"):
                raise ValueError("state_dict must be of an Adam without weight decay and amsgrad")
        parameters = [p for group in self.param_groups for p in group["params"]]
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(names) != len(parameters):
            raise ValueError(f"state_dict must be of {len(parameters)} parameters, got {len(names)}")
        states = [self._checked(p, state_dict["state"].get(i, {})) for i, p in zip(names, parameters, strict=True)]
        self.catch_up()
        with self.model._rows_left_behind():
            # without the state: torch.optim.Optimizer would copy it in its parameters' type first
            _eager(torch.optim.Optimizer.load_state_dict)(self, {**state_dict, "state": {}})
            for parameter, state in zip(parameters, states, strict=True):
                for key, value in state.items():
                    device = torch.device("cpu") if key == "step" and not self.capturable else parameter.device
                    dtype = self._moment_dtype(parameter) if key in ("exp_avg", "exp_avg_sq") else value.dtype
                    self.state[parameter][key] = value.to(device, dtype, copy=True)
            self._all_current()

    def _checked(self, parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter, if it is one; ValueError says what is not."""
        name = self._names[parameter]
        if not state or not self._trained.has(name):
            return {}
        shape = list(self._trained.of(name, parameter).shape)
        shapes = {"step": [], "exp_avg": shape, "exp_avg_sq": shape}
        if "master" in state and parameter.dtype in (torch.bfloat16, torch.float16):
            shapes["master"] = shapes["exp_avg"]
        for key, shape in shapes.items():
            value = state.get(key)
            value = torch.as_tensor(value, device="cpu") if isinstance(value, int | float) else value
            if not isinstance(value, Tensor) or value.is_complex() or list(value.shape) != shape:
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"state_dict must hold a float {key} {shape} of {name}, got {got}")
        return {key: torch.as_tensor(state[key]) for key in shapes}


def _is_number(value: Any) -> bool:
    return is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)


def _are_betas(values: Any) -> bool:
    return (
        isinstance(values, Sequence) and len(values) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in values)
    )


def _processes() -> int:
    """Of torch.distributed, if it is at work."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _zeros_like(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if rows.ndim != 2:
        return torch.zeros_like(rows, dtype=dtype)
    return empty_rows(*rows.shape, dtype=dtype, device=rows.device).zero_()


def _eager(method: Callable[..., T]) -> Callable[..., T]:
    """torch keeps some methods from its compiler, and loads that for it: a second, for nothing where nobody has."""
    return method if "torch._dynamo" in sys.modules else unwrap(method)

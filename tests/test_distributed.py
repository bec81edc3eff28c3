"""Latents shared between processes: the supports of one process bit for bit, its sums to rounding."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import NEED_RANKS, Ranks, here
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import sparc_fast as sf
from sparc_fast.distributed import received, shard
from sparc_fast.distributed.layout import exchanged_bytes
from sparc_fast.planning.process_memory import forget_peak, resident
from sparc_fast.selection import BY_THRESHOLD, select
from sparc_fast.selection.jumprelu import means_of_latents
from sparc_fast.whole import WHOLE

pytestmark = NEED_RANKS
WIDTHS = {"a": 16, "b": 7}
D = sum(WIDTHS.values())
PRIVATE: dict[str, Any] = {"private": {"a": 9, "b": 6}, "private_k": {"a": 3, "b": 2}}
MOST_PRIVATE: dict[str, Any] = {"private": {"a": 26, "b": 18}, "private_k": {"a": 2, "b": 3}}
"""So many that ranks have no shared ones."""


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param)
    yield processes
    processes.close()


@cache
def two_by_two() -> DeviceMesh:
    """Replicas by latents, of four ranks."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "latents"))


def own(x: Any, uneven: bool = False) -> Any:
    """This rank's rows: as evenly as can be, or the last rank none and the first all that is left."""
    rank, n = here()
    if isinstance(x, dict):
        return {name: own(part, uneven) for name, part in x.items()}
    if uneven and n > 1:
        few = len(x) // (2 * n)
        sizes = [len(x) - few * (n - 2), *[few] * (n - 2), 0]
        return x.split(sizes)[rank]
    return x.tensor_split(n)[rank]


def model_of(seed: int = 0, n_latents: int = 50, k: int = 4, **options: Any) -> sf.SPARC:
    torch.manual_seed(seed)
    model = sf.SPARC(WIDTHS, n_latents, k, **options)
    with torch.no_grad():
        model.latent_bias.uniform_(-0.1, 0.1)
        model.pre_bias.uniform_(-0.1, 0.1)
    model._clear_private()
    return model


def samples(n: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hard_model(case: str) -> tuple[sf.SPARC, Tensor]:
    """(a model, samples) of which the support is hard to tell."""
    x = samples(13)
    if case == "random":
        return model_of(), x
    if case == "float64":
        return model_of(dtype=torch.float64), x.double()
    if case == "bfloat16":
        return model_of(dtype=torch.bfloat16), x.bfloat16()
    if case == "local":
        return model_of(selection="local"), x
    if case.startswith("batch"):
        return hard_batch(case)
    if case.startswith(("jumprelu", "local_jumprelu")):
        return hard_jump(case)
    if case.startswith(("private", "most private")):
        return hard_private(case)
    if case == "k above a share":
        return model_of(n_latents=13, k=11), x
    if case == "all latents":
        return model_of(n_latents=10, k=10), x
    model = model_of()
    with torch.no_grad():
        if case == "all equal":  # equal scores go to the lower latent, on whatever rank
            model.W_enc.copy_(model.W_enc[:1].expand_as(model.W_enc))
            model.latent_bias.zero_()
        elif case == "two values":
            model.W_enc.copy_(model.W_enc[torch.arange(50) % 2])
            model.latent_bias.zero_()
        elif case == "all winners on one rank":
            model.latent_bias[:, -5:] += 100
        else:
            infinite_or_nan(case, model, x)
    return model, x


def infinite_or_nan(case: str, model: sf.SPARC, x: Tensor) -> None:
    if case.endswith("infinities"):
        model.latent_bias[:, ::3] = torch.inf
        model.latent_bias[:, 1::3] = -torch.inf
    elif case.endswith("NaN rows"):
        model.check_finite = False
        x[3], x[7, 2] = torch.nan, torch.nan


def hard_batch(case: str) -> tuple[sf.SPARC, Tensor]:
    """The same for BatchTopK."""
    options: dict[str, Any] = {"k above a share": {"n_latents": 13, "k": 9}, "float64": {"dtype": torch.float64}}
    model, x = model_of(selection="batch", **options.get(case[7:], {})), samples(13)
    with torch.no_grad():
        if case == "batch, all equal":  # equal scores go to the earlier sample, then to the lower latent
            model.W_enc.zero_()
            model.latent_bias.zero_()
        elif case == "batch, two values":
            model.W_enc.copy_(model.W_enc[torch.arange(50) % 2])
            model.latent_bias.zero_()
        elif case == "batch, one sample has all":  # more than any pool of a few times k holds
            x[5] *= 1e4
            model.latent_bias.zero_()
        elif case == "batch, one sample has all, on one rank":
            x[5] *= 1e4
            model.latent_bias[:, :-13] = -1e6
        elif case == "batch, nothing but -infinity":
            model.latent_bias[:] = -torch.inf
        else:
            infinite_or_nan(case, model, x)
    return model, x.to(model.W_enc.dtype)


def hard_jump(case: str) -> tuple[sf.SPARC, Tensor]:
    """The same for JumpReLU, as after some training."""
    rule, _, about = case.partition(", ")
    model, x = model_of(selection=rule, dtype=torch.float64 if about == "float64" else torch.float32), samples(13)
    with torch.no_grad():
        if about == "all equal":
            model.W_enc.zero_()
            model.latent_bias.zero_()
        elif about == "one sample has all":
            x[5] *= 1e4
    model.learn_thresholds(x)
    if about != "all equal":
        with torch.no_grad():
            model.latent_threshold.uniform_(-0.2, 0.2)
    return model, x.to(model.W_enc.dtype)


def hard_private(case: str) -> tuple[sf.SPARC, Tensor]:
    """The same for latents of one stream each, of which there may be nearly all."""
    about, _, rule = case.partition(", ")
    of_each = MOST_PRIVATE if about == "most private" else PRIVATE
    model, x = model_of(selection=rule or "global", **of_each), samples(13)
    if rule in ("jumprelu", "local_jumprelu"):
        model.learn_thresholds(x)
    with torch.no_grad():
        x[4] *= 1e4
    return model, x


CASES = [
    "random", "float64", "bfloat16", "local", "k above a share", "all latents", "all equal", "two values",
    "all winners on one rank", "infinities", "NaN rows", "batch", "batch, float64", "batch, k above a share",
    "batch, all equal", "batch, two values", "batch, one sample has all", "batch, one sample has all, on one rank",
    "batch, infinities", "batch, nothing but -infinity", "batch, NaN rows", "jumprelu", "jumprelu, float64",
    "jumprelu, all equal", "jumprelu, one sample has all", "local_jumprelu", "private", "private, local",
    "private, batch", "private, local_jumprelu", "most private", "most private, local", "most private, batch",
    "most private, jumprelu",
]  # fmt: skip


def supports_differ(case: str, uneven: bool) -> int:
    whole, x = hard_model(case)
    sharded = shard(whole)
    given = sharded._batch(own(x, uneven))
    assert torch.equal(given.x.view(torch.uint8), x.to(given.x.dtype).view(torch.uint8))
    operators = sharded._shards.backend("auto", x.device)
    expected, found = (
        select(m.selection, inputs, m.k, thresholds=m._thresholds(), private=m._private_here, backend=backend)
        for m, inputs, backend in ((whole, whole._batch(x), "auto"), (sharded, given, operators))
    )
    rows = sharded._shards.rows(whole.n_latents)
    mine = torch.where((expected >= rows.start) & (expected < rows.stop), expected - rows.start, -1)
    compact = sharded._shards.compact(found)
    assert torch.equal(compact[compact >= 0], found[found >= 0])
    return int((found != mine).sum())


@pytest.mark.covering(2)
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("case", CASES)
def test_supports_are_those_of_one_process_bit_for_bit(ranks: Ranks, case: str, uneven: bool) -> None:
    assert ranks(supports_differ, case, uneven) == [0] * ranks.n


def bands_differ(rule: str) -> int:
    """In how many samples and latents here."""
    whole, x = hard_jump(rule)
    sharded = shard(whole)
    rows, differ, near = sharded._shards.rows(whole.n_latents), 0, 0
    jumps = [
        model._objective(1.0).choose(model._batch(part))[0].supports.jump
        for model, part in ((whole, x), (sharded, own(x)))
    ]
    for part in ("fires", "slope"):
        dense = []
        for jump, n in zip(jumps, (whole.n_latents, rows.stop - rows.start), strict=True):
            into = torch.zeros(*jump.indices.shape[:-1], n + 1)
            at = jump.indices.long().where(jump.indices >= 0, n)
            dense.append(into.scatter_(-1, at, getattr(jump, part).float())[..., :-1])
        differ += int((dense[0][..., rows] != dense[1]).sum())
        near = int((dense[0] > 0).sum())
    assert near > 5
    return differ


@pytest.mark.parametrize("rule", ["jumprelu", "local_jumprelu"])
def test_latents_near_their_thresholds_are_those_of_one_process_bit_for_bit(ranks: Ranks, rule: str) -> None:
    assert ranks(bands_differ, rule) == [0] * ranks.n


def hot_shard() -> None:
    """OpenAI's sharded TopK keeps a share of k of each rank, Llamascopium's twice as many as k."""
    whole, x = hard_model("all winners on one rank")
    found = shard(whole).encode(own(x))
    assert (found.indices >= 45).sum() == found.indices.numel()
    assert torch.equal(found.indices, whole.encode(own(x)).indices)


def offset_by_k() -> None:
    """clt-training's GroupMax numbers a rank's latents from rank k on, not from those of the ranks before."""
    whole, x = model_of(), samples(13)
    found, P = shard(whole).encode(own(x)), here()[1]
    assert int(max(gathered(int(found.indices.max()) if len(found) else 0))) > P * whole.k
    assert torch.equal(found.indices, whole.encode(own(x)).indices)


def four_k_a_sample() -> None:
    """Its BatchTopK has candidates for 4 k latents a sample."""
    whole, x = model_of(k=1, selection="batch"), samples(40)
    x[7] *= 1e5
    with torch.no_grad():
        whole.latent_bias.zero_()
    sharded = shard(whole)
    expected = select("batch", whole._batch(x), 1)
    found = select("batch", sharded._batch(own(x)), 1, backend=sharded._shards.backend("auto", x.device))
    assert (expected >= 0).sum(1).max() > 8
    assert (found >= 0).sum() == ((expected >= sharded._shards.first) & (expected < sharded._shards.last)).sum()


def received_in_float32() -> None:
    """The same receives into float32, whatever was sent."""
    model, x = shard(model_of(dtype=torch.bfloat16)), samples(40, dtype=torch.bfloat16)
    given = model._batch(own(x))
    assert torch.equal(given.x, x)
    others = 40 - len(own(x))
    assert received(model)["x"] in range(others * D * 2, (others + here()[1]) * D * 2)


def counted_by_every_rank() -> None:
    """Counters of dead latents that each rank moves by the whole batch reach their limit P times as early, or late."""
    model = shard(training_model(dead_after=10**6))
    optimizer = sf.SparcAdam(model, 0.0)
    for _ in range(3):
        optimizer.step(own(samples(17, dtype=torch.float64)))
    assert set(torch.cat(gathered(model.silence)).tolist()) == {0, 3 * 17}


@pytest.mark.parametrize(
    "defect", [hot_shard, offset_by_k, four_k_a_sample, received_in_float32, counted_by_every_rank]
)
def test_what_goes_wrong_in_other_trainers_goes_right_here(ranks: Ranks, defect: Callable[[], None]) -> None:
    ranks(defect)


def draws_differ() -> bool:
    torch.manual_seed(5)
    whole = sf.SPARC(WIDTHS, 50, 4)
    torch.manual_seed(5)
    mine = shard(sf.SPARC(WIDTHS, 50, 4, device="meta"))
    rows = mine._shards.rows(50)
    same = [torch.equal(getattr(mine, name), getattr(whole, name)[rows]) for name in ("W_enc", "W_dec", "silence")]
    return (
        all(same) and torch.equal(mine.latent_bias, whole.latent_bias[:, rows]) and mine.pre_bias.device.type == "cpu"
    )


def test_a_model_without_weights_draws_those_of_one_process(ranks: Ranks) -> None:
    assert all(ranks(draws_differ))


def training_model(learned: bool = False, **options: Any) -> sf.SPARC:
    settings = {"n_latents": 50, "k": 4, "auxk": 6, "dead_after": 60, "dtype": torch.float64, **options}
    model = model_of(**settings)
    with torch.no_grad():
        model.latent_bias[:, ::3] -= 0.9  # some die
    model._clear_private()
    if learned:
        model.learn_thresholds(samples(40, dtype=torch.float64))
    return model


SHARED = {"W_enc": 0, "W_dec": 0, "silence": 0, "latent_bias": 1, "latent_threshold": 1}
"""Name -> the dimension along which ranks share it; each holds all of the others."""


def as_held(parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The model of each rank's own, whole by the shares of all."""
    whole = {name: torch.cat([part[name] for part in parts], dim) for name, dim in SHARED.items() if name in parts[0]}
    return [{**part, **whole} for part in parts]


def gathered(mine: Any) -> list[Any]:
    found = [None] * here()[1]
    torch.distributed.all_gather_object(found, mine)
    return found


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(torch.stack([(one[name].double() - other[name].double()).abs().max() for name in one]).max())


def train(
    options: dict[str, Any], of_optimizer: dict[str, Any], of_step: dict[str, Any], steps: int, replicas: int = 0
) -> dict[str, Any]:
    """What a rank of so many replicas is told and holds in the end, or where there are none, one process."""
    model, share, of_step = training_model(**options), own if replicas else lambda x, uneven: x, dict(of_step)
    absent, parts, n = of_step.pop("absent", False), of_step.pop("parts", 1), of_step.pop("n_samples", 17)
    if replicas:
        model = shard(model, two_by_two() if replicas > 1 else None)
    optimizer = sf.SparcAdam(model, 3e-3, **of_optimizer)
    losses, bits, most_dead = [], [], 0
    for step in range(steps):
        x, present, uneven = samples(n, 100 + step, torch.float64), None, step % 2 == 1 and parts == 1
        if absent:
            present = torch.rand(n, 2, generator=torch.Generator().manual_seed(step)) < 0.6
            present[:, 0] |= ~present.any(1)
            present = share(present, uneven)
        most_dead = max(most_dead, int(model.dead.sum()))
        x = share(x, uneven)
        losses.append(optimizer.step(x if parts == 1 else x.tensor_split(parts), present=present, **of_step))
        if replicas > 1 and (step == steps - 1 or "lazy" not in of_optimizer):  # looking brings rows up to date
            held = b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())
            bits.append(hashlib.sha256(held).digest())
    losses.append(model.eval().loss(share(samples(19, dtype=torch.float64), True)))
    parts_of = [part for loss in losses for part in loss]
    return {
        "has": [part is not None for part in parts_of],
        "losses": torch.cat([part.detach().reshape(-1) for part in parts_of if part is not None]),
        "held": model.state_dict(),
        "bits": bits,
        "dead": most_dead,
        "with AuxK": sum(loss.auxk is not None for loss in losses),
    }


def assert_that_of_one_process(of_ranks: list[dict[str, Any]], alone: dict[str, Any], replicas: int = 1) -> None:
    n = len(of_ranks) // replicas
    for number, rank in enumerate(of_ranks):
        assert rank["has"] == alone["has"]
        assert float((rank["losses"] - alone["losses"]).abs().max()) < 1e-12
        assert rank["bits"] == of_ranks[number % n]["bits"]
    for first in range(0, len(of_ranks), n):
        model, *others = as_held([rank["held"] for rank in of_ranks[first : first + n]])
        assert farthest(model, alone["held"]) < 1e-12
        assert torch.equal(model["silence"], alone["held"]["silence"])
        # where each rank clips by a norm of its own, the biases that all hold drift apart
        assert all(torch.equal(other[name], part) for other in others for name, part in model.items())
    assert alone["dead"] > 6


TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "global": ({}, {}, {}),
    "local": ({"selection": "local"}, {}, {}),
    "batch, absent streams": ({"selection": "batch"}, {"lazy": "replay", "max_grad_norm": 0.05}, {"absent": True}),
    "jumprelu": ({"selection": "jumprelu"}, {}, {}),
    "jumprelu, absent streams": (
        {"selection": "jumprelu"},
        {"lazy": "replay", "max_grad_norm": 0.05},
        {"absent": True},
    ),
    "jumprelu, one stream chooses": ({"selection": "jumprelu", "loss": "fvu"}, {}, {"support_from": ["b"]}),
    # what is learned from a part's first samples is of others here
    "local jumprelu, accumulated": (
        {"selection": "local_jumprelu", "learned": True},
        {"max_grad_norm": 0.05},
        {"parts": 3},
    ),
    "local jumprelu, absent streams": ({"selection": "local_jumprelu"}, {}, {"absent": True}),
    "nested": ({"matryoshka": [7, 20]}, {}, {}),
    "nested, four": ({"matryoshka": [3, 7, 20]}, {"lazy": "replay", "max_grad_norm": 0.05}, {"absent": True}),
    "nested, local, accumulated": ({"matryoshka": [20], "selection": "local"}, {"max_grad_norm": 0.05}, {"parts": 3}),
    "nested, on other backends": ({"matryoshka": [7, 20], "selection": "batch", "backend": "reference"}, {}, {}),
    "nested, jumprelu": ({"matryoshka": [7, 20], "selection": "jumprelu", "loss": "fvu"}, {}, {}),
    "nested, batch": ({"matryoshka": [7, 20], "selection": "batch"}, {"freeze": "a", "max_grad_norm": 0.05}, {}),
    "private": (PRIVATE, {}, {}),
    "private, local": ({**PRIVATE, "selection": "local"}, {"lazy": "replay", "max_grad_norm": 0.05}, {"absent": True}),
    "private, batch": ({**PRIVATE, "selection": "batch"}, {"freeze": "a", "max_grad_norm": 0.05}, {}),
    "private, jumprelu": ({**PRIVATE, "selection": "jumprelu", "loss": "fvu"}, {}, {"absent": True}),
    "private, accumulated": (PRIVATE, {"max_grad_norm": 0.05, "freeze": "b"}, {"parts": 3}),
    "private, most, on other backends": ({**MOST_PRIVATE, "backend": "reference"}, {"max_grad_norm": 0.05}, {}),
    "private, most": (MOST_PRIVATE, {"max_grad_norm": 0.05}, {"absent": True}),
    "private, most, batch": ({**MOST_PRIVATE, "selection": "batch"}, {"lazy": "replay", "freeze": "a"}, {}),
    "private, most, jumprelu": ({**MOST_PRIVATE, "selection": "local_jumprelu"}, {"freeze": "encoder"}, {}),
    "fvu": ({"loss": "fvu"}, {}, {}),
    "replay": ({}, {"lazy": "replay"}, {}),
    "clipped": ({}, {"max_grad_norm": 0.05}, {}),
    "accumulated": ({}, {}, {"parts": 3}),
    "accumulated and clipped": ({}, {"max_grad_norm": 0.05}, {"parts": 3}),
    "one stream chooses": ({}, {}, {"support_from": ["b"]}),
    "absent streams": ({}, {}, {"absent": True}),
    "absent streams, local": ({"selection": "local"}, {}, {"absent": True}),
    "frozen decoder": ({}, {"freeze": "decoder"}, {}),
    "frozen stream": ({}, {"freeze": "a", "max_grad_norm": 0.05}, {}),
    "no cross terms": ({}, {}, {"cross_loss_coef": 0.0}),
}


# each rule of selection, and what it is combined with for fewer steps
FOR_FIFTY = {
    "global", "absent streams, local", "batch, absent streams", "jumprelu", "local jumprelu, absent streams", "nested",
    "private",
}  # fmt: skip
FEWER = 14


@cache
def train_alone(name: str, steps: int) -> dict[str, Any]:
    return train(*TRAININGS[name], steps)


@pytest.mark.parametrize("name", TRAININGS)
def test_fifty_steps_of_any_rule_are_those_of_one_process_to_1e_12(ranks: Ranks, name: str) -> None:
    if ranks.n != 3 and name not in ("global", "absent streams, local", "nested", "private"):
        pytest.skip("three ranks are the hardest; each costs its processes")
    steps = 50 if name in FOR_FIFTY else FEWER
    alone = train_alone(name, steps)
    assert_that_of_one_process(ranks(train, *TRAININGS[name], steps, 1), alone)
    assert alone["with AuxK"] > steps / 2.5


def trained(
    steps: int, seed: int, options: dict[str, Any], of_optimizer: dict[str, Any], late: float = 0
) -> tuple[sf.SPARC, list[Tensor]]:
    """The last rank comes late to every step."""
    model = shard(training_model(seed=seed, **options))
    optimizer = sf.SparcAdam(model, 3e-3, **of_optimizer)
    losses = []
    for step in range(steps):
        if here()[0] == here()[1] - 1:
            time.sleep(late)
        losses.append(optimizer.step(own(samples(17, 100 + step).to(model.W_enc.dtype))).total)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return model, [*losses, *moments]


def same_bits_twice(options: dict[str, Any], of_optimizer: dict[str, Any]) -> bool:
    one, other = (trained(FEWER, 0, options, of_optimizer, late) for late in (0, 0.01))
    everything = [[*model.state_dict().values(), *rest] for model, rest in (one, other)]
    replicated = gathered([one[0].pre_bias.detach(), one[1][0]])
    return all(torch.equal(a, b) for a, b in zip(*everything, strict=True)) and all(
        torch.equal(a, b) for rank in replicated for a, b in zip(rank, replicated[0], strict=True)
    )


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    "of_optimizer", [{"max_grad_norm": 0.05}, {"lazy": "replay", "moments": "bfloat16", "seed": 3}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_run_has_the_same_bits_however_late_a_rank_is_and_what_all_hold_is_the_same(
    ranks: Ranks, dtype: torch.dtype, of_optimizer: dict[str, Any]
) -> None:
    assert all(ranks(same_bits_twice, {"dtype": dtype}, of_optimizer))


RULES: dict[str, dict[str, Any]] = {
    "jumprelu": {"selection": "jumprelu"},
    "local_jumprelu": {"selection": "local_jumprelu"},
    "nested": {"matryoshka": [7, 20]},
    "private": PRIVATE,
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_the_same_bits_in_every_run(ranks: Ranks, rule: str) -> None:
    if ranks.n != 3:
        pytest.skip("three ranks are the hardest; each costs its processes")
    assert all(ranks(same_bits_twice, {**RULES[rule], "dtype": torch.float32}, {"max_grad_norm": 0.05}))


def far_from_truth(dtype: torch.dtype) -> list[float]:
    """How far ranks, and one process, of this type are from a float64 process after a step, in float64."""
    models = [training_model(dtype=torch.float64), training_model(dtype=dtype), shard(training_model(dtype=dtype))]
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "pre_bias", "latent_bias"):
            getattr(models[0], name).copy_(getattr(models[1], name))
    x = samples(40, dtype=dtype)
    grads = []
    for model in models:
        optimizer = sf.SparcAdam(model, 1.0, betas=(0.0, 0.0), eps=1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sparc_fast.optim.sparc_adam._processes", lambda: 1)
            optimizer.step(x.double() if model is models[0] else x if model is models[1] else own(x))
        moments = {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
        if not model._shards.is_whole:
            parts = gathered(moments)
            dims = {"W_enc": 0, "W_dec": 0, "latent_bias": 1}
            moments = {n: torch.cat([p[n] for p in parts], dims[n]) if n in dims else moments[n] for n in moments}
        grads.append(moments)
    truth, *others = grads
    return [farthest(other, truth) / max(float(t.abs().max()) for t in truth.values()) for other in others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_accurate_as_those_of_one_process(ranks: Ranks, dtype: torch.dtype) -> None:
    for alone, shared in ranks(far_from_truth, dtype):
        assert shared <= 2 * alone + torch.finfo(torch.float32).eps


def codes_differ(options: dict[str, Any], absent: bool) -> dict[str, float]:
    whole = model_of(dtype=torch.float64, **options)
    x = samples(23, dtype=torch.float64)
    if whole.selection in BY_THRESHOLD:
        learns = shard(whole)
        learns.learn_thresholds(own(x, uneven=True))
        whole.learn_thresholds(x)
        assert torch.equal(learns.threshold, whole.threshold)
        whole.eval()
    sharded = shard(whole)
    present = None
    if absent:
        present = torch.rand(23, 2, generator=torch.Generator().manual_seed(3)) < 0.6
        present[:, 0] |= ~present.any(1)
    expected = whole.encode(x, present)
    mine = own(torch.arange(23), uneven=True)
    found = sharded.encode(x[mine], None if present is None else present[mine])
    assert torch.equal(found.indices, expected.indices[mine])
    assert torch.equal(found.values, expected.values[mine])
    decoded = whole.decode(expected, "a", "b")[mine] - sharded.decode(found, "a", "b")
    given = {"a": x[:, :16]}
    translated = whole.translate(given, "a", "b")[mine] - sharded.translate({"a": given["a"][mine]}, "a", "b")
    losses = (
        whole.eval().loss(x, present=present),
        sharded.eval().loss(x[mine], present=None if present is None else present[mine]),
    )
    return {
        "decode": float(decoded.detach().abs().max()) if len(mine) else 0.0,
        "translate": float(translated.detach().abs().max()) if len(mine) else 0.0,
        "loss": float((losses[0].total - losses[1].total).detach().abs()),
    }


CODES: dict[str, dict[str, Any]] = {
    **{rule: {"selection": rule} for rule in ("global", "local", "batch", "jumprelu", "local_jumprelu")},
    "private": PRIVATE,
    "most private, local": {**MOST_PRIVATE, "selection": "local"},
    "most private, batch": {**MOST_PRIVATE, "selection": "batch"},
    "most private, jumprelu": {**MOST_PRIVATE, "selection": "jumprelu"},
    "nested": {"matryoshka": [7, 20]},
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("absent", [False, True], ids=["all present", "streams absent"])
@pytest.mark.parametrize("rule", CODES)
def test_codes_are_those_of_one_process_and_reconstructions_to_rounding(ranks: Ranks, rule: str, absent: bool) -> None:
    for differ in ranks(codes_differ, CODES[rule], absent):
        assert max(differ.values()) < 1e-13


def many_samples_differ() -> bool:
    """More than are encoded together, on one rank alone."""
    whole = model_of()
    sharded, x = shard(whole), samples(4500)
    mine = x if here()[0] == 0 else x[:3]
    expected, found = whole.encode(mine), sharded.encode(mine)
    return torch.equal(expected.indices, found.indices) and torch.equal(expected.values, found.values)


def test_ranks_may_encode_different_numbers_of_pieces(ranks: Ranks) -> None:
    assert all(ranks(many_samples_differ))


def streams_of(x: Tensor) -> dict[str, Tensor]:
    return dict(zip(WIDTHS, x.split(list(WIDTHS.values()), dim=1), strict=True))


DECODED = ("reconstruction", "retrieval_by_reconstruction", "ablations")  # sums over ranks; all others are of codes
METRICS = ("concepts", "concepts_joint", "agreement", "cofiring", "purity", "monosemanticity", "retrieval", "latents")


def ready_model(options: dict[str, Any]) -> sf.SPARC:
    """As after some training."""
    model = model_of(**options)
    if model.latent_threshold is not None:
        model.learn_thresholds(samples(40))
        with torch.no_grad():
            model.latent_threshold.uniform_(-0.2, 0.2)
    return model


def evaluation_of(options: dict[str, Any], shared: bool = True) -> tuple[dict[str, float], list[Tensor]]:
    """(figures, the codes of single streams)"""
    model, x = ready_model(options), streams_of(samples(61))
    model = shard(model) if shared else model
    labels = torch.rand(61, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    found = sf.evaluate.evaluate(
        model, x, labels, metrics=(*METRICS, *DECODED), batch_size=17, resamples=5, say=lambda _: None
    )
    assert model.training
    rounded = {score.key for metric in found.metrics if metric.key in DECODED for score in metric.scores}
    widths = {f"± {key}": width for key, width in found.intervals().items()}
    figures = {
        key: pytest.approx(figure, rel=1e-4, abs=1e-6) if not shared and key.removeprefix("± ") in rounded else figure
        for key, figure in {**found.scores(), **widths}.items()
    }
    return figures, [part for codes in found.single_codes.values() for part in codes]


evaluation_alone = cache(lambda rule: evaluation_of(RULES.get(rule, {}), shared=False))


@pytest.mark.parametrize("rule", ["global", *RULES])
def test_an_evaluation_has_the_figures_of_one_process_on_every_rank(ranks: Ranks, rule: str) -> None:
    """The same numbers, or to rounding where reconstructions are summed."""
    if ranks.n != 3 and rule != "global":
        pytest.skip("three ranks are the hardest; each costs its processes")
    expected, codes = evaluation_alone(rule)
    for found, theirs in ranks(evaluation_of, RULES.get(rule, {})):
        assert found == expected
        assert all(torch.equal(one, other) for one, other in zip(theirs, codes, strict=True))


def directions_differ() -> dict[str, float]:
    """How far what is told of all rows of the decoder is from one process's: none of them is exchanged."""
    torch.manual_seed(0)
    whole = sf.SPARC({"a": 9, "b": 9}, 50, 4, dtype=torch.float64)
    x, labels = samples(61, dtype=torch.float64), torch.rand(61, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    x = {"a": x[:, :9], "b": x[:, 9:18]}
    whole.calibrate(x)
    sharded = shard(whole)
    options: dict[str, Any] = {"metrics": ("bridge", "ablations", "probe_ablations"), "resamples": 0}
    expected, found = (sf.evaluate.evaluate(model, x, labels, **options) for model in (whole, sharded))
    one, other = expected["bridge"]["a", "b"], found["bridge"]["a", "b"]
    apart = {name: (getattr(one, name) - getattr(other, name)).abs().max() for name in ("own", "of_a", "of_b")}
    for pair, mine in expected["ablations"].items():
        theirs = found["ablations"][pair]
        apart[f"ablations {pair}"] = torch.stack([(mine.worse - theirs.worse), (mine.moved - theirs.moved)]).abs().max()
        assert torch.equal(mine.fired, theirs.fired)
    for pair, both in expected["probe_ablations"].items():
        for one, other in zip(both, found["probe_ablations"][pair], strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            apart[f"probe {pair}"] = (one - other).nan_to_num().abs().max()
    return {name: float(distance) for name, distance in apart.items()}


def test_metrics_of_directions_need_no_row_of_another_rank(ranks: Ranks) -> None:
    for apart in ranks(directions_differ):
        assert max(apart.values()) < 1e-6, apart


def means_of_thresholds(n_latents: int) -> tuple[list[float], list[float], int]:
    """(the means of one process, those of ranks, how often these exchange something for them)."""
    whole = model_of(n_latents=n_latents, selection="local_jumprelu")
    with torch.no_grad():
        whole.latent_threshold.normal_()
        whole.latent_threshold[0, :3] = torch.tensor([1e5, -1e-5, 3.0])
    sharded = shard(whole)
    own, exchange = sharded.latent_threshold.detach(), sharded._shards.exchange
    with pytest.MonkeyPatch.context() as patch:
        calls: list[str] = []
        for name in ("begin_gather", "begin_numbers"):
            begin = getattr(exchange, name)
            patch.setattr(exchange, name, lambda *given, begin=begin: (calls.append(""), begin(*given))[1])
        found = means_of_latents([own[:1], own[1:], own], sharded._shards)
    everything = whole.latent_threshold.detach()
    return means_of_latents([everything[:1], everything[1:], everything], WHOLE), found, len(calls)


@pytest.mark.parametrize("n_latents", [50, 53])
def test_the_mean_thresholds_of_all_streams_are_exchanged_together_and_are_the_bits_of_one_process(
    ranks: Ranks, n_latents: int
) -> None:
    for expected, found, calls in ranks(means_of_thresholds, n_latents):
        assert found == expected
        assert calls == (2 if ranks.n > 1 else 1)


def exchanged(n_latents: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, int]:
    model = shard(model_of(n_latents=n_latents, dtype=dtype, auxk=0, **options))
    optimizer = sf.SparcAdam(model)
    x = samples(360, dtype=dtype)
    optimizer.step(own(x))
    before = received(model)
    optimizer.step(own(x))
    return dict(received(model) - before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_exchanges_what_the_formula_says_and_nothing_that_grows_with_latents(
    ranks: Ranks, dtype: torch.dtype
) -> None:
    N, S, k, P, w = 360, 2, 4, ranks.n, dtype.itemsize
    expected = {
        "x": N * D * w * (P - 1) / P,
        "candidates": N * k * 8 * (P - 1),
        "reconstructions": N * S * D * 4 * (P - 1) / P,
        "G": N * S * D * w * (P - 1) / P,
    }
    assert exchanged_bytes(N, list(WIDTHS.values()), k, P, weight=w) == expected
    few, many = (ranks(exchanged, n_latents, dtype, {}) for n_latents in (50, 800))
    assert few == many
    for came in few:
        assert sum(came.values()) == pytest.approx(sum(expected.values()), rel=0.02)
        for what in expected if P > 1 else ():
            assert came[what] == pytest.approx(expected[what], rel=0.01)


def test_a_step_of_private_latents_exchanges_candidates_for_each_stream(ranks: Ranks) -> None:
    few, many = (ranks(exchanged, n_latents, torch.float32, PRIVATE) for n_latents in (50, 800))
    expected = exchanged_bytes(360, list(WIDTHS.values()), 4, ranks.n, private_k=5)
    assert few == many
    for came in few if ranks.n > 1 else ():
        for what, n_bytes in expected.items():
            assert came[what] == pytest.approx(n_bytes, rel=0.01)


def test_a_step_of_nested_dictionaries_exchanges_what_ranks_have_of_each_group(ranks: Ranks) -> None:
    few, many = (
        ranks(exchanged, 50 * times, torch.float32, {"matryoshka": [7 * times, 20 * times]}) for times in (1, 16)
    )
    assert few == many
    expected = exchanged_bytes(360, list(WIDTHS.values()), 4, ranks.n, sizes=(7, 20, 50))
    plain = exchanged_bytes(360, list(WIDTHS.values()), 4, ranks.n)
    for what in expected if ranks.n > 1 else ():
        assert max(came[what] for came in few) == pytest.approx(expected[what], rel=0.01)
        assert sum(came[what] for came in few) < 0.7 * 3 * ranks.n * plain[what]  # if each were told of each group


@pytest.mark.parametrize(("rule", "counts"), [("batch", 2), ("jumprelu", 0), ("local_jumprelu", 0)])
def test_a_step_of_latents_above_a_threshold_exchanges_counts_and_no_candidates(
    ranks: Ranks, rule: str, counts: int
) -> None:
    S, P, N = len(WIDTHS), ranks.n, 360
    expected = exchanged_bytes(N, list(WIDTHS.values()), 4, P, counts=counts)
    assert expected["candidates"] == N * 4 * counts * (P - 1)
    looks = 4 * (2**11 + 2**11 + 2**10) * (P - 1)  # how many scores begin with each of the digits
    few, many = (ranks(exchanged, n_latents, torch.float32, {"selection": rule}) for n_latents in (50, 800))
    for came in (*few, *many):
        assert came.get("sums", 0) < 20 * looks + 1000 * S
        for what in expected if P > 1 else ():
            assert came.get(what, 0) == pytest.approx(expected[what], rel=0.01)


def few_samples_differ(options: dict[str, Any]) -> float:
    """Of fewer samples than ranks, and of one that all are given by one rank."""
    whole, sharded = training_model(**options), shard(training_model(**options))
    apart = 0.0
    for step in range(3):
        x = samples(2 - step % 2, seed=step, dtype=torch.float64)
        mine = x if here()[0] == here()[1] - 1 else x[:0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sparc_fast.optim.sparc_adam._processes", lambda: 1)
            losses = [sf.SparcAdam(model).step(part).total for model, part in ((whole, x), (sharded, mine))]
        apart = max(apart, float((losses[0] - losses[1]).abs()))
    return apart


@pytest.mark.parametrize("rule", ["global", *RULES])
def test_there_may_be_fewer_samples_than_ranks(ranks: Ranks, rule: str) -> None:
    assert max(ranks(few_samples_differ, RULES.get(rule, {}))) < 1e-13


def held() -> tuple[int, int, int]:
    """Bytes of weights and moments, here and in one process, and of a row of all of them."""
    model = shard(training_model())
    optimizer = sf.SparcAdam(model)
    optimizer.step(own(samples(8, dtype=torch.float64)))
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    mine = sum(tensor.nbytes for tensor in (*model.parameters(), *moments))
    row = 3 * 8 * (2 * D + 2)  # of both matrices and the biases, with two moments each
    return mine, 50 * row + 3 * 8 * D, row


def test_a_rank_holds_its_share_of_weights_and_moments(ranks: Ranks) -> None:
    for mine, of_all, row in ranks(held):
        assert mine <= of_all / ranks.n + row + 3 * 8 * D


def saved_in_pieces(folder: Path, options: dict[str, Any]) -> int:
    """How many pieces of another's rows the first rank was sent at a time."""
    sent, receive = [], torch.distributed.recv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparc_fast.distributed.model_file.PIECE", 3 * D * 4)
        patch.setattr(torch.distributed, "recv", lambda rows, **more: sent.append(len(rows)) or receive(rows, **more))
        shard(ready_model(options)).save(folder / f"{here()[1]}.safetensors")
    assert all(n <= 3 * D * 4 for n in sent)
    return len(sent)


@pytest.mark.parametrize("rule", ["global", *RULES])
def test_a_model_file_is_written_a_piece_at_a_time_and_is_that_of_one_process(
    ranks: Ranks, rule: str, tmp_path: Path
) -> None:
    options = RULES.get(rule, {})
    first, *others = ranks(saved_in_pieces, tmp_path, options)
    assert (first > 2 * (ranks.n - 1), others) == (ranks.n > 1, [0] * (ranks.n - 1))
    found, expected = sf.SPARC.load(tmp_path / f"{ranks.n}.safetensors"), ready_model(options)
    assert found.config() == expected.config()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def peak(n_latents: int) -> int:
    """Bytes that a rank takes at most to make a model and train it for two steps."""
    forget_peak()
    before = resident("VmRSS")
    model = shard(sf.SPARC({"a": 256, "b": 256}, n_latents, 8, device="meta"))
    optimizer = sf.SparcAdam(model)
    for _ in range(2):
        optimizer.step({name: samples(64)[:, :1].expand(-1, 256) for name in model.streams})
    return resident("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is told by Linux alone")
def test_the_memory_of_a_rank_is_its_share_of_weights_and_moments_and_buffers(ranks: Ranks) -> None:
    n_latents = 8192 * ranks.n
    held = 2 * 3 * 4 * 8192 * 512  # of both matrices with two moments each
    for taken in ranks(peak, n_latents):
        assert 0.9 * held < taken < 1.1 * held + 2**26


def refused(case: str) -> str:
    rank, _ = here()
    model = shard(model_of())
    optimizer = sf.SparcAdam(model)
    x = samples(4)
    try:
        if case == "NaN":
            x[2, 3] = torch.nan if rank == 1 else 0.0
            optimizer.step(x)
        elif case == "width":
            optimizer.step(x[:, :-1] if rank == 1 else x)
        elif case == "other streams":
            optimizer.step({"a": x[:, :16]} if rank == 1 else x)
        elif case == "other calls":
            model.encode(x) if rank == 1 else optimizer.step(x)
        elif case == "other models":
            shard(model_of(k=3 if rank == 1 else 4))
        elif case == "too few latents":
            shard(model_of(n_latents=here()[1] + 1, k=1)) if here()[1] > 2 else shard(model_of(n_latents=1, k=1))
        elif case == "forward":
            model(x)
        elif case == "other samples":
            sf.evaluate.evaluate(model, streams_of(samples(9, seed=rank)))
        elif case == "labels":
            labels = torch.zeros(4 if rank == 1 else 9, 2, dtype=torch.bool)
            sf.evaluate.evaluate(model, streams_of(samples(9)), labels)
        elif case == "capturable":
            sf.SparcAdam(model, capturable=True)
        elif case == "prefix":
            model.prefix(7)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


REFUSALS = {
    "NaN": "must be finite", "width": r"must be \[..., D=23\]", "other streams": "of the streams that rank 0 has",
    "other calls": "ranks must make the same calls", "other models": "model must be the same on every rank",
    "too few latents": "n_latents must be enough", "forward": "forward must be of a whole model",
    "capturable": "capturable must be False",
    "prefix": r"prefix must be of a whole model, .*: save the model, and take SPARC.load\(path\).prefix\(7\)",
    "other samples": "inputs must be the same on every rank", "labels": "labels must be",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(ranks: Ranks, case: str) -> None:
    if ranks.n == 1:
        pytest.skip("one rank agrees with itself")
    said = ranks(refused, case)
    for rank, text in enumerate(said):
        assert re.search(REFUSALS[case], text), said
        if case in ("NaN", "width"):
            assert text.startswith("inputs" if rank == 1 else "rank 1: inputs")


def needs_four(ranks: Ranks) -> None:
    if ranks.n != 4:
        pytest.skip("two replicas of two ranks are four")


REPLICATED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "global": ({}, {}, {}),
    "local, replayed, absent": ({"selection": "local"}, {"lazy": "replay"}, {"absent": True}),
    "accumulated and clipped": ({}, {"max_grad_norm": 0.05}, {"parts": 3}),
    "clipped, absent": ({}, {"max_grad_norm": 0.05}, {"absent": True}),
    "batch, replayed, absent": ({"selection": "batch"}, {"lazy": "replay"}, {"absent": True}),
    "jumprelu, replayed, absent": ({"selection": "jumprelu"}, {"lazy": "replay"}, {"absent": True}),
    "local jumprelu, accumulated": (
        {"selection": "local_jumprelu", "learned": True},
        {"max_grad_norm": 0.05},
        {"parts": 3},
    ),
    "nested, absent": ({"matryoshka": [7, 20, 30]}, {}, {"absent": True}),
    "nested, accumulated": ({"matryoshka": [7, 20]}, {"max_grad_norm": 0.05}, {"parts": 3}),
    "nested, local, a replica has no samples": (
        {"matryoshka": [7, 20], "selection": "local", "dead_after": 8},
        {},
        {"n_samples": 2},
    ),
    "private, absent": ({**PRIVATE, "selection": "local"}, {"max_grad_norm": 0.05}, {"absent": True}),
    "private, most, accumulated": (MOST_PRIVATE, {"lazy": "replay"}, {"parts": 3}),
    "fvu, absent": ({"loss": "fvu"}, {}, {"absent": True}),
    "fvu, accumulated": ({"loss": "fvu"}, {}, {"parts": 3}),
}


BATCHES = ("batch", "batch, float64", "batch, all equal", "batch, two values", "batch, one sample has all")


def supports_of_replicas_differ(uneven: bool) -> list[str]:
    """Cases in which the batch of all replicas has other pairs of samples and latents than that of one process."""
    wrong = []
    for case in BATCHES:
        whole, x = hard_model(case)
        sharded = shard(whole, two_by_two())
        expected = select("batch", whole._batch(x), whole.k)
        given = sharded._batch(own(x, uneven))
        found = select("batch", given, whole.k, backend=sharded._shards.backend("auto", x.device))
        of_replicas = [n for n, *_ in gathered((len(given.x), here()[0]))][::2]
        first = 0 if here()[0] < 2 else of_replicas[0]
        expected = expected[first : first + len(found)]
        rows, width = sharded._shards.rows(whole.n_latents), found.shape[1]
        mine = torch.where((expected >= rows.start) & (expected < rows.stop), expected - rows.start, -1)
        if not torch.equal(found, mine[:, :width]) or (mine[:, width:] >= 0).any():
            wrong.append(case)
    return wrong


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_the_batch_of_batch_topk_is_that_of_all_replicas(ranks: Ranks, uneven: bool) -> None:
    needs_four(ranks)
    assert ranks(supports_of_replicas_differ, uneven) == [[]] * 4


@pytest.mark.parametrize("name", REPLICATED)
def test_replicas_are_equal_bit_for_bit_and_train_as_one_process(ranks: Ranks, name: str) -> None:
    needs_four(ranks)
    assert_that_of_one_process(ranks(train, *REPLICATED[name], FEWER, 2), train(*REPLICATED[name], FEWER), 2)

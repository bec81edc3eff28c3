"""A model in several processes: DistributedDataParallel computes what one process would, and what cannot is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks

import sparc_fast as sf

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]
WIDTHS = {"a": 16, "b": 12}


def of_a_replica() -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    rank, generator = torch.distributed.get_rank(), torch.Generator().manual_seed(0)
    x = {name: 3 + torch.randn(64, width, generator=generator) for name, width in WIDTHS.items()}
    mine = {name: part[rank * 32 :][:32] for name, part in x.items()}
    torch.manual_seed(0)
    model, whole = (sf.SPARC(WIDTHS, 64, 4) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    whole.calibrate(x)
    if rank == 0:
        model.calibrate(x)
    replica = DistributedDataParallel(model)
    found: dict[str, Any] = {}
    for _ in range(2):
        replica(mine).loss.total.backward()
        whole(x).loss.total.backward()
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    found["gradients differ by"] = max(float((p.grad - q.grad).abs().max()) for p, q in pairs)
    found["silence"] = torch.equal(model.silence, whole.silence) and bool((whole.silence == 128).any())
    found["calibrated"] = model.is_calibrated
    for rule in ("batch", "jumprelu", "local_jumprelu"):
        torch.manual_seed(0)
        model = sf.SPARC(WIDTHS, 64, 4, selection=rule)
        replica = DistributedDataParallel(model, broadcast_buffers=False)
        adam = torch.optim.Adam(replica.parameters(), 1e-2)
        for _ in range(3):
            adam.zero_grad()
            replica(mine).loss.total.backward()
            adam.step()
            model.normalize_decoder_()
        fires = float((model.eval().encode(x).indices >= 0).sum(-1).float().mean())
        found[rule] = fires, model.threshold, model.threshold_count, list(model.parameters())
    for name, wrong in (("step", lambda: sf.SparcAdam(model).step(mine)), ("wrapped", lambda: sf.SparcAdam(replica))):
        with pytest.raises(ValueError, match="must") as error:
            wrong()
        found[name] = str(error.value)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    two = Ranks(2)
    try:
        return two(of_a_replica)
    finally:
        two.close()


def test_gradients_and_dead_latents_are_those_of_all_samples(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["gradients differ by"] < 1e-6
        assert of_rank["silence"]


@pytest.mark.parametrize("rule", ["batch", "jumprelu", "local_jumprelu"])
def test_thresholds_are_learned_and_the_same_in_all_processes(found: list[dict[str, Any]], rule: str) -> None:
    (fires, *one), (_, *other) = (of_rank[rule] for of_rank in found)
    assert 1 < fires < 8
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert one[1].min() >= 1


def test_a_calibration_in_one_process_reaches_all(found: list[dict[str, Any]]) -> None:
    assert [of_rank["calibrated"] for of_rank in found] == [True, True]


def test_the_fused_optimizer_refuses_to_train_replicas_apart(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["step"].startswith("SparcAdam must run in one process, got 2")
        assert of_rank["wrapped"].startswith("model must be a SPARC, got DistributedDataParallel")

"""One process of two that train replicas of a model: `python replica.py <rank> <file to meet at>` prints what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparc_fast as sf

WIDTHS = {"a": 16, "b": 12}


def main(rank: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    x = {name: 3 + torch.randn(64, width, generator=generator) for name, width in WIDTHS.items()}
    mine = {name: part[rank * 32 :][:32] for name, part in x.items()}
    torch.manual_seed(0)
    model, whole = (sf.SPARC(WIDTHS, 64, 4) for _ in range(2))
    whole.load_state_dict(model.state_dict())
    whole.calibrate(x)
    if rank == 0:
        model.calibrate(x)
    replica = DistributedDataParallel(model)
    found: dict[str, object] = {}
    for _ in range(2):
        replica(mine).loss.total.backward()
        whole(x).loss.total.backward()
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    found["gradients differ by"] = max(float((p.grad - q.grad).abs().max()) for p, q in pairs)
    found["silence"] = torch.equal(model.silence, whole.silence) and bool((whole.silence == 128).any())
    found["calibrated"] = model.is_calibrated
    for name, wrong in (("step", lambda: sf.SparcAdam(model).step(mine)), ("wrapped", lambda: sf.SparcAdam(replica))):
        try:
            wrong()
        except ValueError as error:
            found[name] = str(error)
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

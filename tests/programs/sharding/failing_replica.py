"""A replica that fails in a call, and others without a tracker."""

import torch
import torch.distributed as dist
from groups import SETTINGS, Net, close, equal, go, held, process, refused, spread

from posthoc_cli import PostHocEMA
from posthoc_cli.tracker import processes

rank, _, folder, _ = process()

processes.PATIENCE = 0.5
model = spread(Net(), "ddp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
go(ema, model, 1, 8)
raw = held(model)
dist.barrier()
refused(ema.model(torch.nn.Linear(2, 2) if rank == 1 else model, sigma_rel=0.15).__enter__)
assert model.training and equal(held(model), raw)
dist.barrier()
alone = dist.new_group([0], use_local_synchronization=True) if rank == 0 else None
for group in (None, alone) if rank == 0 else ():
    one = PostHocEMA.from_model(model, folder / f"one-{group is None}", **SETTINGS, group=group)
    go(one, model, 1, 8)
    if group is None:
        refused(one.model(model, 0.2).__enter__)
        continue
    with one.model(model, 0.2):
        close(model, folder / "truth-8.pt")
dist.barrier()

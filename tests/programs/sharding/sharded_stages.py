"""Stages of a pipeline on two processes each: a training, a resume from snapshots, and one from the
exact state."""

import groups
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from groups import move, process, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from posthoc_cli import PostHocEMA

rank, world, folder, _ = process()

exact = torch.load(folder / "truth.pt")
mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "dp"))


def stage():
    model = groups.Net()
    for name in ("second", "odd") if rank < world // 2 else ("first", "short"):
        delattr(model, name)
    return fully_shard(model, mesh=mesh["dp"])


def check(model, ema):
    with ema.model(model, 0.2):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                own = groups.local(parameter, exact[name])
                assert torch.allclose(groups.own_part(parameter).double(), own, atol=1e-6), name
    with ema.model(model, 0.15):
        pass
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names <= {*ema.state_dict(0.15)} <= names | {"mean", "count"}


model = stage()
with PostHocEMA.from_model(model, folder / "run", **groups.SETTINGS) as ema:
    train(model, 1, 6, ema)
    dcp.save({"ema": ema}, checkpoint_id=folder / "state")
    train(model, 7, 8, ema)
    check(model, ema)
model = stage()  # from the snapshots of step 4
for part in sorted((folder / "run").glob("*8-0.*/*")) if rank == 0 else ():
    part.unlink()
dist.barrier()
move(model, 4)
with PostHocEMA.from_model(model, folder / "run", resume="auto", **groups.SETTINGS) as ema:
    train(model, 5, 8, ema)
    check(model, ema)
model = stage()  # from the exact state of step 6
move(model, 6)
with PostHocEMA.from_model(model, folder / "run", resume="auto", **groups.SETTINGS) as ema:
    dcp.load({"ema": ema}, checkpoint_id=folder / "state")
    train(model, 7, 8, ema)
    assert ema.step == 8
    check(model, ema)

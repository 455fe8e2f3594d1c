"""Calls that processes of a sharded model refuse."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from groups import SETTINGS, Net, process, refused, spread
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from posthoc_cli import PostHocEMA
from posthoc_cli.tracker import snapshotter

rank, _, folder, _ = process()

model = spread(Net(), "fsdp")


def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS | options)


refused(lambda: tracker("taken"))
for change in ({"sigma_rels": (0.1,)}, {"checkpoint_dir": folder / "other"}, {"include": "first*"}):
    options = {"checkpoint_dir": folder / "run"} | (change if rank else {})
    refused(partial(PostHocEMA.from_model, model, **options))

mesh, grid = (
    init_device_mesh("cpu", (2,)),
    init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp")),
)
unreduced, strided, uneven = (nn.Linear(4, rows, bias=False) for rows in (4, 8, 7))
unreduced.weight = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh, [Partial()]))
strided.weight = nn.Parameter(
    DTensor.from_local(
        torch.zeros(4, 4),
        mesh,
        [_StridedShard(0, split_factor=2)],
        shape=torch.Size((8, 4)),
        stride=(4, 1),
    )
)
parallelize_module(uneven, grid["tp"], ColwiseParallel())
fully_shard(uneven, mesh=grid["dp"])
for one in (unreduced, strided, uneven):
    refused(partial(PostHocEMA.from_model, one, folder / "run"))

other = Net()
with PostHocEMA.from_model(other, folder / "other", update_every=1, checkpoint_every=1) as ema:
    dist.barrier()  # as a step of a training waits for all
    ema.update_(other)
    ema.flush()
    dist.barrier()
    spread(other, "fsdp")
    refused(lambda: ema.update_(other))
    refused(lambda: PostHocEMA.from_path(folder / "other").load_into(other, 0.28))

if Path("/proc/self/cwd").exists():  # a path that is another directory in each process
    import os

    snapshotter.PATIENCE = 0.5
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    ema = PostHocEMA.from_model(model, "/proc/self/cwd/run", **SETTINGS)
    refused(lambda: ema.update_(model))

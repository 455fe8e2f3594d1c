"""A training that ends in one process before the other one has written."""

import time

import torch.distributed as dist
from groups import SETTINGS, Net, process, spread, train

from posthoc_cli import PostHocEMA, files
from posthoc_cli.tracker.snapshotter import Snapshotter

rank, _, folder, arguments = process()

model = spread(Net(), "fsdp")


def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS | options)


own = files.system.fsync
thin = Snapshotter._thin


def held_up(descriptor):
    while not (folder / "thinned").exists():
        time.sleep(0.01)
    own(descriptor)


def noted(snapshotter):
    is_done = thin(snapshotter)
    if len(snapshotter._find_complete()) < len(snapshotter._stored):
        (folder / "thinned").touch()
    return is_done


last = int(arguments[0])
ema = tracker("run", max_checkpoints=4)
train(model, 1, 20, ema)
ema.flush()
dist.barrier()
if rank == 1:
    files.system.fsync = held_up
else:
    Snapshotter._thin = noted
train(model, 21, last, ema)
ema.close()

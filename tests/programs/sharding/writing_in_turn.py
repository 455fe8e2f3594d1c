"""Processes that write their parts of snapshots one after the other."""

import time

import torch.distributed as dist
from groups import SETTINGS, Net, process, spread, train

from posthoc_cli import PostHocEMA, Run, files

rank, _, folder, _ = process()

model = spread(Net(), "fsdp")


def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS | options)


def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)


with tracker("one by one", max_checkpoints=2) as ema:
    train(model, 1, 1, ema)
    dist.barrier()
    if rank == 0:
        wait_for("done")
    train(model, 2, 24, ema)
    ema.flush()
    (folder / "done").touch()
own, calls = files.system.fsync, []


def held_up(descriptor):  # rank 1 between its two parts, of which rank 0 sees the first one
    calls.append(rank)
    if calls == [1, 1]:
        (folder / "first").touch()
        wait_for("go")
    elif rank == 0:
        wait_for("first")
    own(descriptor)


with tracker("late", max_checkpoints=1) as ema:
    train(model, 1, 4, ema)
    ema.flush()
    dist.barrier()
    files.system.fsync = held_up
    train(model, 5, 8, ema)
    if rank == 0:
        ema.flush()
        print([snapshot.t for snapshot in Run(folder / "late").snapshots])
        (folder / "go").touch()
    ema.flush()
    dist.barrier()
    train(model, 9, 12, ema)

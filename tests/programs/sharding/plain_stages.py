"""Stages that are not sharded: of a kind, and if `late` with trackers made one after the other."""

import torch
import torch.distributed as dist
from groups import process

from posthoc_cli import PostHocEMA, PostHocError
from posthoc_cli.tracker import processes

rank, world, folder, arguments = process()

kind, late = arguments
model = torch.nn.ModuleDict({f"layer{rank}": torch.nn.Linear(2, 2)})
if kind == "shape":
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2 + rank)})
if kind == "same":
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2)})
directory = folder / "run"
if kind == "directories":
    directory = folder / f"run-{rank}"
    processes.PATIENCE = 0.5
options = {"update_every": 1, "checkpoint_every": 2}
for turn in range(world):  # one makes its tracker and first update after the other, or all at once
    if turn == rank or late == "False":
        ema = PostHocEMA.from_model(model, directory, **options)
        if late == "True":
            try:
                ema.update_(model)
                print("updated")
            except PostHocError as error:
                print(type(error).__name__, error)
    dist.barrier()
    if late == "False":
        break
try:
    for _ in range(2):
        ema.update_(model)
    ema.close()
    print("closed", ema.keeps_averages)
except PostHocError as error:
    print(type(error).__name__, error)

"""A training that finds a part of a process which has outlived an earlier one."""

import shutil

import torch.distributed as dist
from groups import SETTINGS, Net, move, process, spread

from posthoc_cli import PostHocEMA, Run

rank, _, folder, arguments = process()

model = spread(Net(), "fsdp")
late = [f"0000000000000008-{sigma_rel}/part-00002-of-00002.safetensors" for sigma_rel in (0.1, 0.2)]
if int(arguments[0]):
    move(model, 4)
with PostHocEMA.from_model(
    model, folder / "run", **SETTINGS, resume=4 if int(arguments[0]) else None
) as ema:
    for step in range(ema.step + 1, 9):
        move(model, step if step <= 4 else step + int(arguments[0]))
        if step == 8 and int(arguments[0]) and rank == 1:
            dist.barrier()
            for part in late:  # written by a process that has outlived the first training
                shutil.copy(folder / "late" / part, folder / "run" / part)
            print(*Run(folder / "run").info()["notes"], sep="\n")
        ema.update_(model)
        if step == 8 and int(arguments[0]) and rank == 0:
            ema.flush()
            dist.barrier()

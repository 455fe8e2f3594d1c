"""Print the peaks of memory of tracking, of an evaluation and of a resume, in units of a process's
share of the parameters."""

import gc
from pathlib import Path

from groups import process
from torch import nn
from torch.distributed.fsdp import fully_shard

from posthoc_cli import PostHocEMA
from posthoc_cli.tracker.processes import local_part

_, _, folder, _ = process()


def memory(key):
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    work()
    return (memory("VmHWM") - before) / share


def change():
    for _ in range(4):
        for parameter in model.parameters():
            local_part(parameter).data.add_(1)
        ema.update_(model)
    ema.flush()


def evaluate():
    with ema.model(model, sigma_rel=0.15):
        pass


def go_on():
    global ema
    ema = PostHocEMA.from_path(directory, model)
    ema.update_(model)


for rows in (8, 1536):  # the first, small model loads modules and makes caches
    model = fully_shard(nn.Sequential(*(nn.Linear(1024, rows, bias=False) for _ in range(16))))
    share = sum(4 * local_part(parameter).numel() for parameter in model.parameters())
    directory = folder / str(rows)
    ema = PostHocEMA.from_model(model, directory, update_every=1, checkpoint_every=2)
    found = [measure(change), measure(evaluate)]
    ema.close()
    ema = None
    found.append(measure(go_on))
    ema.close()
print(*found)

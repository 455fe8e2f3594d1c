"""Print the most memory that evaluation blocks and snapshots take."""

import sys
from pathlib import Path

import torch

from posthoc_cli import PostHocEMA

model = torch.nn.Linear(4096, 4096, bias=False)
model.more = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(2048, 1024)) for _ in range(8)])
count = sum(p.numel() for p in model.parameters())


def resident(what):
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def run(path, model, steps):
    with PostHocEMA.from_model(
        model, path, update_every=1, checkpoint_every=4, device=sys.argv[2]
    ) as tracker:
        for _ in range(steps):
            tracker.update_(model)
        tracker.flush()
        return tracker.metrics()["bytes"]


run(sys.argv[1] + "/small", torch.nn.Linear(300, 300), 4)  # what torch and the threads take once
before = resident("VmRSS")
held, kept = run(sys.argv[1] + "/large", model, 8), 16 * count
print((resident("VmHWM") - before - kept) / count, (held - kept) / count)

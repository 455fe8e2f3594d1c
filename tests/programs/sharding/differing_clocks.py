"""A training whose clock differs between its processes."""

import torch.distributed as dist
from groups import SETTINGS, Net, move, process, refused, spread

from posthoc_cli import PostHocEMA

rank, _, folder, arguments = process()

model = spread(Net(), "fsdp")
ema = PostHocEMA.from_model(model, folder / "run", t_unit="tokens", **SETTINGS)
last = int(arguments[0])
for step in range(1, last + 1):
    move(model, step)
    tokens = 10 * step - (rank == 1 and step > 5)  # its own, of sequences of any length
    if (rank, step) == (1, last):
        dist.barrier()
    ema.update_(model, t=tokens)
if rank == 0:
    ema.snapshot()
    dist.barrier()
    ema.flush()
else:
    refused(ema.snapshot)

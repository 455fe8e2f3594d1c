"""Errors of one process of a sharded training, in its calls and in a block."""

import errno

import torch
import torch.distributed as dist
from groups import SETTINGS, Net, equal, held, process, refused, spread, train

from posthoc_cli import PostHocEMA, files

rank, _, folder, _ = process()

model = spread(Net(), "fsdp")


def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS | options)


x = torch.arange(12.0).reshape(2, 6)

ema = tracker("run")
train(model, 1, 8, ema)
ema.flush()
raw = held(model)
dist.barrier()
if rank == 1:
    for part in sorted((folder / "run").glob("*4-*/part-00002*")):
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
dist.barrier()
refused(ema.model(model, sigma_rel=0.15, t=4).__enter__)
assert equal(held(model), raw) and model.training
refused(ema.model(spread(Net(), "tp"), 0.2).__enter__)
try:
    with ema.model(model, 0.2):
        model(x)
        if rank == 1:
            raise KeyError("of the evaluation")
except KeyError:
    pass
assert equal(held(model), raw) and model.training
assert ema.state_dict(0.2)


def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left")


if rank == 0:
    train(model, 9, 12, ema)
dist.barrier()
if rank == 1:
    own, files.system.fsync = files.system.fsync, full
    train(model, 9, 12, ema)
    refused(ema.flush)
    files.system.fsync = own
dist.barrier()
ema.close()

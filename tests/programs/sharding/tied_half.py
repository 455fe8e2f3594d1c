"""Tied parameters of a sharded model in bfloat16."""

import torch
import torch.distributed as dist
from groups import equal, filled, held, process, refused, train
from torch import nn
from torch.distributed.fsdp import fully_shard

from posthoc_cli import PostHocEMA, Run

_, _, folder, _ = process()

model = nn.Sequential(
    nn.Linear(5, 7, bias=False), nn.Linear(7, 5), nn.Linear(5, 7, bias=False)
).bfloat16()
model[2].weight = model[0].weight
fully_shard(model)
other = PostHocEMA.from_model(
    model,
    folder / "tied",
    update_every=1,
    checkpoint_every=2,
    checkpoint_dtype="float32",
    device="cpu",
)
train(model, 1, 3, other)
other.snapshot()
raw = held(model)
with other.model(model, sigma_rel=0.15):
    assert filled(model, Run(folder / "tied").average(0.15))
    assert model[0].weight is model[2].weight and model[0].weight.dtype == torch.bfloat16
assert equal(held(model), raw)
weights = other.state_dict(0.15, dtype=torch.float32)
assert weights["0.weight"].dtype == torch.float32
assert torch.equal(weights["0.weight"].full_tensor(), weights["2.weight"].full_tensor())
other.close()
dist.barrier()
dist.destroy_process_group()
refused(lambda: other.state_dict(0.15))

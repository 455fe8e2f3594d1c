"""Averages of a sharded model with a backend and a device, which are the arguments."""

import groups
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from groups import SETTINGS, Net, held, process, spread, train

from posthoc_cli import PostHocEMA

rank, world, folder, arguments = process()

backend, device = arguments
dist.destroy_process_group()
if device == "cuda":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, init_method=f"file://{folder}/again", rank=rank, world_size=world)
model = spread(Net().to(device), "hsdp" if world == 4 else "fsdp")
ema = PostHocEMA.from_model(model, folder / "run", **SETTINGS)
exact = torch.load(folder / "truth.pt")
train(model, 1, 8, ema)
dcp.save({"ema": ema}, checkpoint_id=folder / "dcp")
dcp.load({"ema": ema}, checkpoint_id=folder / "dcp")
with ema.model(model, 0.2):
    found = held(model)
    for name, right in exact.items():
        own = groups.local(dict(model.named_parameters())[name], right)
        assert torch.allclose(found[name].cpu().double(), own, rtol=1e-6, atol=1e-6), name
with ema.model(model, sigma_rel=0.15):
    assert model(torch.ones(2, 6, device=device)).isfinite()
ema.close()

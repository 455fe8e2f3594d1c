"""Averages of replicas, of which the first process keeps them, through a resume."""

import torch
import torch.distributed as dist
from groups import (
    SETTINGS,
    Net,
    close,
    equal,
    go,
    held,
    move,
    process,
    refused,
    same_in_all,
    spread,
)

from posthoc_cli import PostHocEMA

rank, _, folder, _ = process()

bare = Net()
ema = PostHocEMA.from_model(bare, folder / "run", **SETTINGS)
model = spread(bare, "ddp")
refused(ema.model(model, 0.2).__enter__)  # before the first update
go(ema, model, 1, 10)
ema.snapshot()
raw = held(model)
single = torch.load(folder / "average-10.pt")
for label, block in ema.models(model, [0.2, 0.15, "window:1000"]).items():
    with block:
        assert not model.training
        close(model, folder / {"0.2": "truth-10.pt", "0.15": "average-10.pt"}[label])
        same_in_all(model)
    assert model.training and equal(held(model), raw)
weights = ema.state_dict(0.15, dtype="float64")
assert weights.keys() == single.keys() and weights.predicted_error is not None
assert all(
    torch.allclose(one.double(), single[name].double(), atol=1e-6) for name, one in weights.items()
)
try:
    with ema.model(model, sigma_rel=0.15):
        if rank == 1:
            raise KeyError("of the evaluation")
except KeyError:
    pass
assert model.training and equal(held(model), raw)
ema.load_into(model, 0.15)
close(model, folder / "average-10.pt")
same_in_all(model)
state = ema.state_dict()
assert (state == {}) == (rank == 1)
ema.close()
dist.barrier()

move(model, 10)
ema = PostHocEMA.from_path(folder / "run", model)
read = ema.state_dict(
    sigma_rel=0.15
)  # every process may read the snapshots, until training continues
assert all(
    torch.allclose(one.double(), single[name].double(), atol=1e-6) for name, one in read.items()
)
ema.load_state_dict(state)
assert ema.step == 10
with ema.model(model, 0.2):
    close(model, folder / "truth-10.pt")
go(ema, model, 11, 14)
assert (ema.step, ema.t, ema.state_dict() == {}) == (14, 14.0, rank == 1)
with ema.model(model, 0.2):
    close(model, folder / "truth-14.pt")
    same_in_all(model)
ema.close()

"""States of a tracker that a sharded one loads, or refuses."""

import copy
import json

import groups
import torch
import torch.distributed as dist
from groups import SETTINGS, Net, process, refused, spread, train
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from posthoc_cli import PostHocEMA

rank, _, folder, _ = process()

model = spread(Net(), "fsdp")


def tracker(name, **options):
    return PostHocEMA.from_model(model, folder / name, **SETTINGS | options)


ema = tracker("run")
train(model, 1, 5, ema)
ema.flush()
dist.barrier()
own = ema.state_dict()
ema.load_state_dict(own)
info = json.loads(torch.load(folder / "state.pt")["info"])
info |= {"run_id": json.loads(own["info"])["run_id"]}
complete = torch.load(folder / "state.pt") | {"info": json.dumps(info)}
ema.load_state_dict(complete)
again = ema.state_dict()
assert again["high"].keys() == {"0.1", "0.2"}
for kind in ("high", "mean"):
    for name, tensor in again[kind]["0.2"].items():
        parameter = dict(model.named_parameters())[name]
        assert isinstance(tensor, DTensor) and tensor.placements == parameter.placements
        assert tensor.shape == parameter.shape and tensor.stride() == parameter.stride()
        assert torch.equal(tensor.to_local(), groups.local(tensor, complete[kind]["0.2"][name]))
assert (again["copies"].keys() == {"mean", "count"}) == (rank == 0)
changed = copy.deepcopy(complete)
changed["high"]["0.1"]["more.weight"] = torch.zeros(2)
refused(lambda: ema.load_state_dict(changed))
changed = copy.deepcopy(complete)
changed["high"]["0.2"]["odd"] = torch.zeros(7, 3)
refused(lambda: ema.load_state_dict(changed))
changed = copy.deepcopy(complete)
changed["high"]["0.2"]["odd"] = distribute_tensor(
    torch.zeros(5, 3), model.odd.device_mesh, [Shard(1)]
)
refused(lambda: ema.load_state_dict(changed))
refused(lambda: ema.load_state_dict({}) if rank else ema.load_state_dict(complete))
ema.flush()
dist.barrier()
figure = ema.reconstruction_error()
print(*figure.axes[0].get_legend().get_texts()[0].get_text().split())
ema.close()
dist.destroy_process_group()
refused(ema.state_dict)

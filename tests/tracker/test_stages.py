"""Stages of a pipeline: processes whose models have different tensors."""

import re

import torch
from checking import heavy
from groups import check_group, truth
from tracker.runs import assert_near, steps

from posthoc_cli import Run

SHARDED = """
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

exact = torch.load(folder / "truth.pt")
mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "dp"))

def stage():
    model = groups.Net()
    for name in ("second", "odd") if rank < world // 2 else ("first", "short"):
        delattr(model, name)
    return fully_shard(model, mesh=mesh["dp"])

def check(model, ema):
    with ema.model(model, 0.2):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                own = groups.local(parameter, exact[name])
                assert torch.allclose(groups.own_part(parameter).double(), own, atol=1e-6), name
    with ema.model(model, 0.15):
        pass
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names <= {*ema.state_dict(0.15)} <= names | {"mean", "count"}

model = stage()
with PostHocEMA.from_model(model, folder / "run", **groups.SETTINGS) as ema:
    train(model, 1, 6, ema)
    dcp.save({"ema": ema}, checkpoint_id=folder / "state")
    train(model, 7, 8, ema)
    check(model, ema)
model = stage()  # from the snapshots of step 4
for part in sorted((folder / "run").glob("*8-0.*/*")) if rank == 0 else ():
    part.unlink()
dist.barrier()
move(model, 4)
with PostHocEMA.from_model(model, folder / "run", resume="auto", **groups.SETTINGS) as ema:
    train(model, 5, 8, ema)
    check(model, ema)
model = stage()  # from the exact state of step 6
move(model, 6)
with PostHocEMA.from_model(model, folder / "run", resume="auto", **groups.SETTINGS) as ema:
    dcp.load({"ema": ema}, checkpoint_id=folder / "state")
    train(model, 7, 8, ema)
    assert ema.step == 8
    check(model, ema)
"""


@heavy
def test_sharded_stages_are_tracked_together_and_continue(tmp_path):
    """Two stages on two processes each, which have a buffer in common."""
    exact = truth(0.2, [2, 4, 6, 8])
    torch.save(dict(exact), tmp_path / "truth.pt")
    check_group(SHARDED, 4, tmp_path)
    assert steps(tmp_path / "run") == [4, 4, 8, 8]
    assert_near(Run(tmp_path / "run").average(0.2), exact)


PLAIN = """
from posthoc_cli.tracker import processes

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
"""


def stages(folder, kind, late=False):
    return check_group(PLAIN, 2, folder, kind, late)


def test_stages_that_are_not_sharded_are_refused_at_the_first_update(tmp_path):
    """By every process that sees the other's tracker, and so by at least one."""
    for out in stages(tmp_path / "names", "names"):
        assert re.search(r"RankError rank \d: tracks a model of other tensors", out)
    first, second = stages(tmp_path / "shape", "shape", late=True)
    assert first.startswith("updated\n")
    assert second.startswith("RankError rank 0: tracks a model of other tensors")


def test_a_process_that_only_counts_needs_one_that_writes(tmp_path):
    """Of stages in directories of their own only the first process's would be written."""
    first, second = stages(tmp_path, "directories")
    assert first == "closed True\n"
    assert second.startswith("RankError rank 0: has no tracker of ")


OWN_MODELS = """
own = [0, 0, 1, 2][rank]
groups = [dist.new_group(ranks) for ranks in ([0, 1], [2], [3])]
model = torch.nn.Linear(2, 2 + own)
torch.nn.init.constant_(model.weight, own)
wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=groups[own])
options = {"update_every": 1, "checkpoint_every": 2}
with PostHocEMA.from_model(wrapped, folder / f"run-{own}", **options) as ema:
    ema.update_(wrapped)
    with ema.model(wrapped, 0.05):
        assert torch.all(model.weight == own)
    ema.snapshot()
    assert torch.all(ema.state_dict(0.15)["weight"] == own)
"""


def test_models_in_directories_of_their_own_wait_for_their_replicas_alone(tmp_path):
    """One has two replicas; two others are trained by one process each."""
    check_group(OWN_MODELS, 4, tmp_path)
    for own in range(3):
        run = Run(tmp_path / f"run-{own}")
        assert len(run.snapshots) == 2
        assert run.average(0.1).keys() == {"weight", "bias"}


def test_replicas_are_no_stages(tmp_path):
    first, second = stages(tmp_path, "same", late=True)
    assert first.endswith("closed True\n")
    assert second.endswith("closed False\n")
    assert "Error" not in first + second

"""Stages of a pipeline: processes whose models have different tensors."""

import re

import torch
from checking import heavy
from forked import program
from groups import check_group, truth
from tracker.runs import assert_near, steps

from posthoc_cli import Run


@heavy
def test_sharded_stages_are_tracked_together_and_continue(tmp_path):
    """Two stages on two processes each, which have a buffer in common."""
    exact = truth(0.2, [2, 4, 6, 8])
    torch.save(dict(exact), tmp_path / "truth.pt")
    check_group(program("sharding/sharded_stages"), 4, tmp_path)
    assert steps(tmp_path / "run") == [4, 4, 8, 8]
    assert_near(Run(tmp_path / "run").average(0.2), exact)


def stages(folder, kind, late=False):
    return check_group(program("sharding/plain_stages"), 2, folder, kind, late)


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

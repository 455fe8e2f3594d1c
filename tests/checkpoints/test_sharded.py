"""Checkpoints that a group of processes wrote in chunks."""

from pathlib import Path

import pytest
import torch
from checkpoint_layouts import check_average
from groups import Net, check_group, move

from posthoc_cli import Mean, Run

TRAIN = """
import warnings
import torch
import torch.distributed.checkpoint as dcp
warnings.simplefilter("ignore")
model = groups.spread(groups.Net(), arguments[0])
for step in range(1, 4):
    groups.move(model, step)
    state, out = dict(model.state_dict()), str(folder / "run" / f"step-{step}")
    if arguments[1] == "own":
        dcp.save({"model": state, "optimizer": {"x": torch.ones(3)}}, checkpoint_id=out)
    else:
        writer = dcp.HuggingFaceStorageWriter(out, save_distributed=True)
        dcp.save(state, storage_writer=writer)
"""


@pytest.mark.parametrize("writer", ["own", "safetensors"])
@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 3), ("fsdp-tp", 4)])
def test_chunks_of_processes_make_the_tensors(kind: str, ranks: int, writer: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    check_group(TRAIN, ranks, tmp_path, kind, writer)
    run, single = Run(tmp_path / "run"), Net()
    states = {}
    for step in range(1, 4):
        move(single, step)
        states[step] = {name: value.clone() for name, value in single.state_dict().items()}
    check_average(run, states, 0.25, exact=1e-6)
    last = run.average(Mean(1))
    assert all(torch.equal(last[name], value) for name, value in single.state_dict().items())

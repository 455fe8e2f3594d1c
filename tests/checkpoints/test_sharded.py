"""Checkpoints that a group of processes wrote in chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
    plan = run.plan(0.25)
    states = {}
    for step in range(1, 4):
        move(single, step)
        states[step] = {name: value.double() for name, value in single.state_dict().items()}
    average = run.average(0.25, dtype="float64")
    assert set(average) == set(states[1])
    for name, value in average.items():
        terms = [
            c * states[source.info.step][name]
            for source, c in zip(plan.sources, plan.reconstruction.coefficients[:, 0], strict=True)
        ]
        wanted = torch.stack(terms).sum(0) if value.is_floating_point() else states[3][name]
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
    last = run.average(Mean(1))
    assert all(torch.equal(last[name], value) for name, value in single.state_dict().items())

"""DeepSpeed ZeRO-1 and ZeRO-2 on the CPU, with the real library: `update_` after each step is all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="deepspeed is not installed: make integrations installs it")

from integrations.truth import distance, exact

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the library's own
    pytest.mark.skipif("EMA_HEAVY" not in os.environ, reason="make integrations runs it"),
]

HERE = Path(__file__).resolve().parent

PROGRAM = """
import sys, torch, deepspeed
from integrations.truth import recorded
from posthoc_cli import PostHocEMA
folder, stage = sys.argv[1], int(sys.argv[2])
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1))
config = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": stage}}
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
ema = PostHocEMA.from_model(engine.module, f"{folder}/ema", (0.1, 0.2), update_every=1, checkpoint_every=4)
weights, rank = [], torch.distributed.get_rank()
for number in range(12):
    x = torch.randn(2, 4, generator=torch.manual_seed(2 * number + rank))
    engine.backward(engine(x).square().mean())
    stepped = engine.is_gradient_accumulation_boundary()
    engine.step()
    if stepped:
        ema.update_(engine.module)
        weights.append(recorded(engine.module))
average = {name: value for name, value in ema.state_dict(0.2).items()}  # in every process
if rank == 0:
    torch.save([weights, ema.step, average], f"{folder}/made.pt")
ema.close()
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_updates_are_exact(tmp_path: Path, stage: int) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE.parent)])
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), str(stage)]
    processes = [
        subprocess.Popen(command, env=os.environ | group | {"PYTHONPATH": paths, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [process.wait(250) for process in processes] == [0, 0]
    weights, step, average = torch.load(tmp_path / "made.pt")
    assert step == len(weights) == 6
    assert distance(average, exact(weights, 0.2)) < 1e-6

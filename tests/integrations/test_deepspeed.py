"""DeepSpeed ZeRO-1 and ZeRO-2 on the CPU, with the real library: `update_` after each step, and a
state to resume."""

import signal

import pytest
import torch

pytest.importorskip("deepspeed")

from checking import heavy
from integrations.programs import exit_codes_of_two
from truth import distance, exact

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the library's own
    heavy,
]

PROGRAM = """
import os, signal, sys, torch, deepspeed
from truth import recorded
from posthoc_cli import PostHocEMA

folder, stage, resumes, killed_at = sys.argv[1], *map(int, sys.argv[2:])
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1))
config = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": stage},
}
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
options = {"update_every": 1, "checkpoint_every": 4, "resume": "auto"}
ema = PostHocEMA.from_model(engine.module, f"{folder}/ema", (0.1, 0.2), **options)
weights, rank, first = [], torch.distributed.get_rank(), 0
if resumes:
    engine.load_checkpoint(f"{folder}/saved", tag="4")
    ema.load_state_dict(torch.load(f"{folder}/saved/4/ema-{rank}.pt"))
    weights, first = torch.load(f"{folder}/weights.pt"), 8
for number in range(first, 12):
    x = torch.randn(2, 4, generator=torch.manual_seed(2 * number + rank))
    engine.backward(engine(x).square().mean())
    engine.step()
    if engine.was_step_applied():
        ema.update_(engine.module)
        weights.append(recorded(engine.module))
    if number == 7 and not resumes:
        engine.save_checkpoint(f"{folder}/saved", tag="4")
        torch.save(ema.state_dict(), f"{folder}/saved/4/ema-{rank}.pt")
        if rank == 0:
            torch.save(weights, f"{folder}/weights.pt")
        torch.distributed.barrier()
    if number == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
average = {name: value for name, value in ema.state_dict(0.2).items()}  # in every process
if rank == 0:
    torch.save([weights, ema.step, average], f"{folder}/made.pt")
ema.close()
"""


def train(folder, stage, resumes=0, killed_at=-1):
    return exit_codes_of_two(PROGRAM, folder, stage, resumes, killed_at, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("stage", [1, 2])
def test_updates_are_exact_and_a_killed_training_resumes(tmp_path, stage):
    assert train(tmp_path, stage, killed_at=9) == [-signal.SIGKILL, -signal.SIGKILL]
    assert train(tmp_path, stage, resumes=1) == [0, 0]
    weights, step, average = torch.load(tmp_path / "made.pt")
    assert step == len(weights) == 6
    assert distance(average, exact(weights, 0.2)) < 1e-6

"""A training of two processes with DeepSpeed, which may be killed and resumed."""

import os
import signal
import sys

import deepspeed
import torch
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
average = dict(ema.state_dict(0.2).items())  # in every process
if rank == 0:
    torch.save([weights, ema.step, average], f"{folder}/made.pt")
ema.close()

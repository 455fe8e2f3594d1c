"""A training within accelerate, also as a program that kills itself."""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from integrations.programs import end, task, use_fsdp_on_the_cpu
from torch import nn
from truth import EVERY, recorded

from posthoc_cli.integrations.accelerate import prepare

X = torch.randn(60, 4, generator=torch.manual_seed(5))


def batch(number):
    return X[4 * number : 4 * number + 4]


class Training:
    """A training of fifteen batches with a step after every third one, which saves after the second
    step."""

    def __init__(self, folder, before=False, sharded=False, resume=None, **arguments):
        torch.manual_seed(0)
        every = EVERY | {"resume": resume}
        if sharded:
            use_fsdp_on_the_cpu()
            arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                cpu_ram_efficient_loading=False,
            )
        self.accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True, **arguments)
        self.folder = folder
        layers = nn.Linear(4, 5), nn.Linear(5, 1)
        bare = nn.Sequential(*layers)
        plain = torch.optim.Adam(bare.parameters(), lr=0.05)
        if before:
            self.ema = prepare(self.accelerator, bare, folder / "ema", plain, **every)
        self.model, self.optimizer = self.accelerator.prepare(bare, plain)
        if not before:
            self.ema = prepare(
                self.accelerator, self.model, folder / "ema", self.optimizer, **every
            )
        self.weights = []

    def run(self, first=0, killed_at=0):
        for number in range(first, 15):
            with self.accelerator.accumulate(self.model):
                output = self.model(batch(number))
                self.accelerator.backward(output.square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
                self.weights.append(recorded(self.accelerator.unwrap_model(self.model)))
            if number == 5:
                self.accelerator.save_state(str(self.folder / "saved"))
            if number == killed_at > 0:
                self.ema.flush()
                end(self.folder, self.weights)


if __name__ == "__main__":
    folder, kind, resumes = task()
    training = Training(folder, sharded=kind == "sharded", resume="auto")
    if resumes:
        training.accelerator.load_state(str(folder / "saved"))
        training.run(first=6)
    else:
        training.run(killed_at=13)
    with training.ema.model(training.model, 0.2) as averaged:
        average = recorded(training.accelerator.unwrap_model(averaged))
    made = [training.weights, average, training.ema.step, average]
    torch.save(made, folder / f"made-{training.accelerator.process_index}.pt")

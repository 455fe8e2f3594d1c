"""The trainings of `evidence`: each is recorded once, with all the averages that it is measured with.

Each training has a folder. A training that was killed starts again; one that is complete is kept.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from evidence_tasks import Task
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.sweep import sweep
from posthoc_cli.targets import Decay

WEIGHTS, MEASURED = "weights.pt", "measured.json"
"""Written last, when the records and the measurements of a folder are complete."""

CHECKPOINTS = 40
"""Evenly spaced checkpoints of a training; snapshots are written at the same steps."""

LAST = 5
"""Checkpoints of the weights themselves, whose mean is measured."""

LENGTHS = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)
"""Lengths that are measured in every training."""

SHORT = (0.002, 0.003, 0.005, 0.007, 0.01, 0.014, 0.02)
"""Lengths that are also measured where the learning rate falls to zero."""

TRACKED = (0.002, 0.005, 0.01, 0.05, 0.28)
"""There, at every step; elsewhere the default."""

BUDGET = 12
"""Lengths that a search may measure."""

TIMES = (0.125, 0.25, 0.5, 1.0)
"""Fractions of training at which LENGTHS are measured where every snapshot is kept."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Training:
    """One training of a task, recorded in its folder."""

    task: str
    schedule: str
    seed: int

    @property
    def falls(self) -> bool:
        """Whether the learning rate falls to zero."""
        return self.schedule in ("decayed", "cosine")

    def folder(self, root: Path) -> Path:
        """The folder of the records."""
        return root / f"{self.task}-{self.schedule}-{self.seed}"


def copied(model: nn.Module) -> Tensors:
    """Return copies of the current weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train(task: Task, training: Training, root: Path) -> None:
    """Train and record, unless that is done."""
    folder = training.folder(root)
    if (folder / WEIGHTS).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(training.seed)
    model = task.model()
    optimizer = task.optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    classical = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    checkpoints: deque[Tensors] = deque(maxlen=LAST)
    every = max(10, task.steps // CHECKPOINTS)
    tracking: dict[str, Any] = {"sigma_rels": TRACKED, "update_every": 1} if training.falls else {}
    kept = None if task.keep_all else 20
    ema = PostHocEMA.from_model(model, folder / "ema", checkpoint_every=every, max_checkpoints=kept, **tracking)
    random = torch.Generator()
    for step in range(1, task.steps + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * task.rate(training.schedule, step)
        loss = task.loss(model, random.manual_seed(1_000_003 * training.seed + step))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        ema.update_(model)
        classical.update_parameters(model)
        if step % every == 0:
            checkpoints.append(copied(model))
            print(f"{folder.name}: {step} of {task.steps}, loss {float(loss.detach()):.4f}", flush=True)
    ema.close()
    weights = {"last": copied(model), "0.999": copied(classical.module), f"mean-{LAST}": mean(checkpoints)}
    torch.save(weights, folder / WEIGHTS)


def mean(checkpoints: Sequence[Tensors]) -> Tensors:
    """Return the mean of each tensor; of integer tensors the last."""
    return {
        name: torch.stack([one[name] for one in checkpoints]).mean(dim=0) if last.is_floating_point() else last
        for name, last in checkpoints[-1].items()
    }


def measure(task: Task, training: Training, root: Path) -> None:
    """Measure every average of a training on the test data, unless that is done."""
    folder, model, batches = training.folder(root), task.model(), task.batches()
    if (folder / MEASURED).exists():
        return

    def measured(weights: Mapping[str, torch.Tensor], part: str = "test", renew: bool = True) -> dict[str, float]:
        model.load_state_dict(weights)
        if renew:
            update_bn(batches, model)
        return task.measure(model, part)

    run, weights = Run(folder / "ema"), torch.load(folder / WEIGHTS)
    rows = {name: measured(one, renew=name != "last") for name, one in weights.items()}
    lengths = SHORT + LENGTHS if training.falls else LENGTHS
    low = min(SHORT) if training.falls else 0.02
    found = sweep(run, lambda averaged: measured(averaged, "validation")["loss"], low=low, high=0.28, budget=BUDGET)
    best = found.found.best
    rows["best"] = measured(run.average(best))
    rows |= {f"{length:g}": measured(run.average(length)) for length in lengths}
    if "decayed" in task.schedules and training.schedule == "constant":
        rows["linear"] = measured(run.average(Decay("linear", over=0.2)))
    measurements: dict[str, Any] = {**asdict(training), "rows": rows, "best": best}
    if task.keep_all:
        steps = [round(fraction * task.steps / 10) * 10 for fraction in TIMES]
        measurements["over_time"] = {
            step: {f"{length:g}": measured(run.average(length, step=step)) for length in LENGTHS} for step in steps
        }
    (folder / MEASURED).write_text(json.dumps(measurements))
    print(f"{folder.name}: measured", flush=True)

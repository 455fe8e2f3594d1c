"""The trainings of `evidence`, recorded and measured: all that people average with runs beside the same training.

A training is a folder; one that was killed is made anew, one that is done is left alone. The decayed run of a language
model goes on from the constant one's state where its rate begins to fall, with all that averages there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ema_pytorch import EMA
from evidence_tasks import STABLE, Task
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.sweep import sweep
from posthoc_cli.targets import Decay

TRAINED, MEASURED = "trained.json", "measured.json"
"""Written last, when a folder's records and its measurements are whole."""

DECAYS = (0.999, 0.9999)
CHECKPOINTS = 40
"""In a training, evenly; snapshots come with them."""

LAST = 10
"""Checkpoints kept of the weights themselves."""

MEANS = (3, 5, 10)
"""Of so many last checkpoints, as scripts that merge models make them."""

LENGTHS = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)
"""Measured at every training; a search may take any from 0.02 to 0.28."""

BUDGET = 12
"""Lengths that a search may measure."""

TIMES = (0.125, 0.25, 0.5, 1.0)
"""Fractions of training at which LENGTHS are measured where every snapshot is kept."""

TRACKED = {"ema": (0.05, 0.28), "ema-short": (0.05, 0.10)}
"""Folders of snapshots and what they track: the default, and two lengths nearer to each other."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Training:
    """One training of a task, recorded in a folder of its own."""

    task: str
    schedule: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Of its records."""
        return root / f"{self.task}-{self.schedule}-{self.seed}"


def copied(model: nn.Module) -> Tensors:
    """The weights as they are now, buffers too."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Recorder:
    """All that averages beside one training.

    Arguments:
        model: at its first weights.
        folder: for the snapshots.
        steps: of the training.
        keep_all: whether to keep every snapshot, for averages at earlier times.
    """

    def __init__(self, model: nn.Module, folder: Path, steps: int, keep_all: bool) -> None:
        self.model, self.folder, self.every = model, folder, max(10, steps // CHECKPOINTS)
        self.ours = [
            PostHocEMA.from_model(
                model, folder / name, widths, checkpoint_every=self.every, max_checkpoints=None if keep_all else 20
            )
            if not (folder / name).exists()
            else PostHocEMA.from_path(folder / name, model)
            for name, widths in TRACKED.items()
        ]
        self.peer = EMA(model)
        self.classical = {
            str(decay): AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) for decay in DECAYS
        }
        self.checkpoints: deque[Tensors] = deque(maxlen=LAST)

    def update(self, step: int) -> None:
        """After an optimizer step."""
        for tracker in self.ours:
            tracker.update_(self.model)
        self.peer.update()
        for average in self.classical.values():
            average.update_parameters(self.model)
        if step % self.every == 0:
            self.checkpoints.append(copied(self.model))

    def averages(self) -> dict[str, Tensors]:
        """The weights of the other libraries' averages, by name."""
        classical = {name: copied(average.module) for name, average in self.classical.items()}
        return {"ema-pytorch": copied(self.peer.ema_model), **classical}

    def state(self) -> dict[str, Any]:
        """Of all that is not in our snapshots."""
        others = [self.peer.state_dict(), *(average.state_dict() for average in self.classical.values())]
        return {"others": others, "checkpoints": list(self.checkpoints)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`; our trackers have gone on from their snapshots."""
        for other, held in zip([self.peer, *self.classical.values()], state["others"], strict=True):
            other.load_state_dict(held)
        self.checkpoints.extend(state["checkpoints"])

    def close(self) -> None:
        """Write what our trackers have due."""
        for tracker in self.ours:
            tracker.close()


def train(task: Task, training: Training, root: Path) -> None:
    """Train and record, unless that is done."""
    folder = training.folder(root)
    if (folder / TRAINED).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started, spent = time.perf_counter(), time.process_time()
    torch.manual_seed(training.seed)
    model = task.model()
    optimizer = task.optimizer(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    first, turn = 1, round(STABLE * task.steps)
    branch = Training(training.task, "constant", training.seed).folder(root) / "branch"
    if training.schedule == "decayed":
        shutil.copytree(branch, folder, dirs_exist_ok=True)
        state = torch.load(folder / "state.pt")
        (folder / "state.pt").unlink()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = turn + 1
    recorder = Recorder(model, folder, task.steps, task.keep_all)
    if training.schedule == "decayed":
        recorder.load(state["recorder"])
    random, losses = torch.Generator(), []
    for step in range(first, task.steps + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * task.rate(training.schedule, step)
        loss = task.loss(model, random.manual_seed(1_000_003 * training.seed + step))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        recorder.update(step)
        losses.append(float(loss.detach()))
        if step == turn and training.schedule == "constant" and "decayed" in task.schedules:
            branch.mkdir()
            for tracker in recorder.ours:
                tracker.flush()
                held = branch / tracker.checkpoint_dir.name
                shutil.copytree(tracker.checkpoint_dir, held, ignore=shutil.ignore_patterns(".*"))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recorder": recorder.state()}
            torch.save(state, branch / "state.pt")
        if step % recorder.every == 0:
            done = f"{training.task} {training.schedule} {training.seed}: {step} of {task.steps}"
            print(f"{done}, loss {sum(losses[-recorder.every :]) / recorder.every:.4f}", flush=True)
    recorder.close()
    weights = {"last": copied(model), **recorder.averages()}
    torch.save({"weights": weights, "checkpoints": list(recorder.checkpoints)}, folder / "weights.pt")
    record = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": task.steps,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - spent,
        "torch": torch.__version__,
    }
    (folder / TRAINED).write_text(json.dumps(record))
    if training.schedule == "decayed":
        shutil.rmtree(branch)


def mean(checkpoints: Sequence[Tensors]) -> Tensors:
    """Of each tensor; of integers the last."""
    return {
        name: torch.stack([one[name] for one in checkpoints]).mean(dim=0) if last.is_floating_point() else last
        for name, last in checkpoints[-1].items()
    }


def measure(task: Task, training: Training, root: Path) -> None:
    """Measure every average of a training on the test part, unless that is done."""
    folder, model, batches = training.folder(root), task.model(), task.batches()
    if (folder / MEASURED).exists():
        return

    def measured(weights: Mapping[str, torch.Tensor], part: str = "test", renew: bool = True) -> dict[str, float]:
        model.load_state_dict(weights)
        if renew:
            update_bn(batches, model)
        return task.measure(model, part)

    record = torch.load(folder / "weights.pt")
    weights, checkpoints, run = record["weights"], record["checkpoints"], Run(folder / "ema")
    rows = {name: measured(one, renew=name != "last") for name, one in weights.items()}
    rows |= {f"mean-{count}": measured(mean(checkpoints[-count:])) for count in MEANS}
    found = sweep(run, lambda averaged: measured(averaged, "validation")["loss"], low=0.02, high=0.28, budget=BUDGET)
    best = found.value_of(found.found.best)
    averaged = run.average(best)
    rows["best"] = measured(averaged)
    if batches:
        copies = {name: value for name, value in weights["last"].items() if ".running_" in name}
        rows["best-copied"] = measured({**averaged, **copies}, renew=False)
    rows |= {str(length): measured(run.average(length)) for length in LENGTHS}
    if "decayed" in task.schedules and training.schedule == "constant":
        rows |= {shape: measured(run.average(Decay(shape, over=0.2))) for shape in ("1-sqrt", "linear")}
    times = [round(fraction * task.steps / 10) * 10 for fraction in TIMES] if task.keep_all else []
    measurements = {
        **vars(training),
        **json.loads((folder / TRAINED).read_text()),
        "rows": rows,
        "best": best,
        "equal": [found.value_of(found.found.low), found.value_of(found.found.high)],
        "searched": len(found.trials),
        "over_time": {step: {length: measured(run.average(length, step=step)) for length in LENGTHS} for step in times},
        "predicted_errors": {name: _predicted_errors(Run(folder / name)) for name in TRACKED},
        "short": measured(Run(folder / "ema-short").average(best)),
    }
    (folder / MEASURED).write_text(json.dumps(measurements))
    print(f"{folder.name}: measured", flush=True)


def _predicted_errors(run: Run) -> dict[float, float | None]:
    plan = run.plan(LENGTHS)
    return {length: plan.predicted_error(index) for index, length in enumerate(LENGTHS)}

"""Measure what averaging gains in three trainings that people know, against what they do today.

    python scripts/evidence.py [--out evidence] [--processes 2] [--quick] [--record] [--tables]

- A language model on the source text of Python's standard library: a decoder of 3.4 M parameters, AdamW in bfloat16,
  with a constant learning rate, with one that falls over the last fifth, and cosine.
- A diffusion model on scikit-learn's digits: the denoiser of `ema demo`, larger and longer.
- A classifier of digits with BatchNorm, SGD with momentum, constant rate and cosine.

Each is trained with three seeds. What is compared averages the same training, so that differences are taken seed by
seed; the length of ours is searched by the loss on validation data, and all are measured on test data. Where the rate
falls to zero, lengths from 0.002 are measured, too, of averages that are tracked at every step.

Trainings and measurements are kept in the folder `--out`, some 4 GB; a call that was stopped goes on with what is not
there. `--record` keeps the result for the guide, `--tables` prints the kept one and draws its pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_tasks import TASKS, Language, Task
from fidelity_report import markdown
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from posthoc_cli import PostHocEMA, Run, plots
from posthoc_cli.sweep import sweep
from posthoc_cli.targets import Decay

SEEDS = 3
TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
RECORD = Path(__file__).with_name("evidence.json")
PICTURES = Path(__file__).parent.parent / ".assets"

ROWS = {
    "last": "last weights",
    "mean-5": "mean of the last 5 checkpoints",
    "0.999": "EMA of decay 0.999",
    "0.05": "ours, `sigma_rel` 0.05",
    "best": "ours, best length by a sweep",
}
SCHEDULES = {"constant": "constant rate", "decayed": "warm-up, stable, decay", "cosine": "cosine"}

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

Tensors = dict[str, torch.Tensor]

Measured = dict[str, Any]
"""The measurements of one training."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder for all records (evidence)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, a thread each (2)")
    parser.add_argument("--quick", action="store_true", help="tiny trainings of one seed: does everything run?")
    parser.add_argument("--record", action="store_true", help="keep the result and its pictures in the repository")
    parser.add_argument("--tables", action="store_true", help="print and draw the kept result, and train nothing")
    options = parser.parse_args(arguments)
    if options.tables:
        found, folders = json.loads(RECORD.read_text()), [PICTURES]
    else:
        folder = options.out / "quick" if options.quick else options.out
        found = run(folder, options.processes, options.quick)
        folders = [folder, PICTURES] if options.record else [folder]
        for file in [folder / RECORD.name, *[RECORD] * options.record]:
            file.write_text(json.dumps(_rounded(found)))
    for folder in folders:
        draw(found, folder)
    print("\n\n".join(tables(found)))


def _rounded(value: Any) -> Any:
    """Return measurements with numbers rounded to six digits."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- one training ------------------------------------------------------------------------------------


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
    kept: dict[str, Any] = {"max_checkpoints": task.max_checkpoints}
    kept |= {"sigma_rels": TRACKED, "update_every": 1} if training.falls else {}
    ema = PostHocEMA.from_model(model, folder / "ema", checkpoint_every=every, **kept)
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
    (folder / MEASURED).write_text(json.dumps({**asdict(training), "rows": rows, "best": best}))
    print(f"{folder.name}: measured", flush=True)


# --- all trainings -----------------------------------------------------------------------------------


def run(root: Path, processes: int, quick: bool) -> dict[str, Any]:
    """Make what is missing in the folder `root`; return all measurements."""
    root.mkdir(parents=True, exist_ok=True)
    Language(root, quick)  # makes the text once, before the processes need it
    jobs = [
        (root, quick, Training(name, schedule, seed))
        for seed in range(1 if quick else SEEDS)
        for name, task in TASKS.items()
        for schedule in task.schedules
    ]
    if processes == 1:
        for job in jobs:
            _work(*job)
    else:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            for future in [pool.submit(_work, *job) for job in jobs]:
                future.result()
    trainings = [json.loads((training.folder(root) / MEASURED).read_text()) for _, _, training in jobs]
    return {"python": platform.python_version(), "torch": torch.__version__, "trainings": trainings}


def _work(root: Path, quick: bool, training: Training) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task = TASKS[training.task](root, quick)
    train(task, training, root)
    measure(task, training, root)
    torch.set_num_threads(threads)


def _of(found: dict[str, Any], task: str, schedule: str) -> list[Measured]:
    return [one for one in found["trainings"] if (one["task"], one["schedule"]) == (task, schedule)]


# --- tables ------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> list[str]:
    """Return Markdown: a table of averages for each task, and one of differences for the language model."""
    language = {schedule: _of(found, "language", schedule) for schedule in SCHEDULES}
    diffusion, constant, cosine = (
        _of(found, *name)
        for name in (("diffusion", "inverse-sqrt"), ("classifier", "constant"), ("classifier", "cosine"))
    )
    return [
        _table("test loss, nats a token", {SCHEDULES[name]: (runs, "loss", 1, 3) for name, runs in language.items()}),
        _differences(language["constant"], language["decayed"]),
        _table(
            "denoiser",
            {"test loss, 1e-3": (diffusion, "loss", 1e3, 1), "Frechet distance": (diffusion, "frechet", 1, 3)},
        ),
        _table("error, %", {"constant rate": (constant, "error", 100, 2), "cosine": (cosine, "error", 100, 2)}),
    ]


Column = tuple[list[Measured], str, float, int]
"""Trainings, one a seed; a measure, its factor in the table, and its decimals."""


def _table(corner: str, columns: dict[str, Column]) -> str:
    """Return means with standard errors over seeds; in parentheses the difference from the last weights, by seed."""

    def cell(row: str, runs: list[Measured], metric: str, scale: float, digits: int) -> str:
        value = _mean([scale * one["rows"][row][metric] for one in runs], digits)
        return value if row == "last" else f"{value} ({_paired(runs, row, runs, 'last', metric, scale, digits)})"

    lines = [(title, *(cell(row, *column) for column in columns.values())) for row, title in ROWS.items()]
    lengths = [" ".join(f"{one['best']:.3g}" for one in runs) for runs, *_ in columns.values()]
    return markdown([(corner, *columns), *lines, ("best length, by seed", *lengths)])


def _differences(constant: list[Measured], decayed: list[Measured]) -> str:
    """Return what another average of the language model gains or loses at a constant rate."""

    def less(row: str, others: list[Measured], other: str) -> str:
        return _paired(constant, row, others, other, "loss", 1, 4)

    return markdown(
        [
            ("constant rate", "difference of test losses"),
            ("best length minus the mean of 5 checkpoints", less("best", constant, "mean-5")),
            ("best length minus `sigma_rel` 0.05", less("best", constant, "0.05")),
            ("best length minus the decayed run", less("best", decayed, "last")),
            ("`decay:linear:20%` minus the decayed run", less("linear", decayed, "last")),
        ]
    )


def _paired(
    runs: list[Measured], row: str, others: list[Measured], other: str, metric: str, scale: float, digits: int
) -> str:
    pairs = zip(runs, others, strict=True)
    return _mean([scale * (a["rows"][row][metric] - b["rows"][other][metric]) for a, b in pairs], digits, sign="+")


def _mean(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return the mean and its standard error."""
    error = f" ± {_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{error}"


def _error(values: Any) -> Any:
    """Return the standard error of the mean over the first axis; 0 for a single value."""
    return (
        np.std(values, axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros(np.shape(values)[1:])
    )


# --- pictures ----------------------------------------------------------------------------------------


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the pictures."""
    (folder / "gain-language.svg").write_bytes(plots.as_file(partial(_language, found), ".svg"))


def _panels(count: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
    panels = list(figure.subplots(1, count))
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks(LENGTHS, [f"{length:g}" for length in LENGTHS], fontsize=6)
        axes.minorticks_off()
        axes.set_xlabel("sigma_rel")
        axes.grid(True, color="0.9", linewidth=0.6)
    return figure, panels


def _curve(axes: Any, index: int, values: dict[float, Any], label: str) -> None:
    """Draw means over seeds with their standard errors against the length."""
    axes.errorbar(
        [*values], [*map(np.mean, values.values())], [*map(_error, values.values())], color=plots.COLOURS[index],
        linestyle=plots.STYLES[index], marker=plots.MARKERS[index], markersize=3.5, capsize=2, label=label,
    )  # fmt: skip


def _language(found: dict[str, Any]) -> Figure:
    """Draw the loss less that of the last weights, seed by seed, against the length."""
    figure, panels = _panels(3)
    for axes, (schedule, title) in zip(panels, SCHEDULES.items(), strict=True):
        runs = [one["rows"] for one in _of(found, "language", schedule)]
        ours = {
            length: [rows[f"{length:g}"]["loss"] - rows["last"]["loss"] for rows in runs if f"{length:g}" in rows]
            for length in SHORT + LENGTHS
            if any(f"{length:g}" in rows for rows in runs)
        }
        if min(ours) < min(LENGTHS):
            axes.set_xticks(TICKS, [f"{length:g}" for length in TICKS], fontsize=6)
        others = [rows["mean-5"]["loss"] - rows["last"]["loss"] for rows in runs]
        mean, error = np.mean(others), _error(others)
        _curve(axes, 0, ours, "ours")
        axes.axhline(mean, color=plots.COLOURS[1], linestyle=plots.STYLES[1], label=ROWS["mean-5"])
        axes.axhspan(mean - error, mean + error, color=plots.COLOURS[1], alpha=0.2, linewidth=0)
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("loss less the last weights', nats a token", fontsize=9)
    panels[0].legend(fontsize=6, loc="upper left")
    return figure


if __name__ == "__main__":
    main()

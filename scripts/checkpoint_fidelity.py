"""Measure averages of ordinary checkpoints, and of averages that other libraries stored.

The truth is summed in float64 over every step of a recorded run; averages come from the folder alone, through the
public interface.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_peers import distances, ema_pytorch, posthoc_ema, true_averages
from fidelity_report import markdown, ratios, share, summary, within
from fidelity_runs import made, oracle, quiet
from safetensors.torch import save_file
from trajectories import NAMES, Replay, Trajectory, record

from posthoc_cli import Between, Decay, Run, import_checkpoints
from posthoc_cli.targets import as_target

COUNTS = (8, 20, 64)
"""Checkpoints of a run."""

WIDTHS = (0.05, 0.10, 0.15, 0.20, 0.25)
PART = 0.2
"""The fraction of training with an emulated decay; the uniform mean is over the last quarter of the checkpoints."""

UNEVEN = ("denoiser-adam", "cnn-batch-norm")
"""Runs that are also measured with checkpoints at random steps."""

REPAIRED = "denoiser-adam"
STRIDES = (1, 10, 100)
PEER_WIDTHS = (0.05, 0.28)
WARM_UP = 100
"""Steps that `posthoc_ema` passes over by default."""


@dataclass(frozen=True)
class Job:
    """A recorded run, and whether its checkpoints are unevenly spaced."""

    name: str
    uneven: bool = False

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"{self.name}-uneven" if self.uneven else self.name


JOBS = (*map(Job, NAMES), *(Job(name, True) for name in UNEVEN))


@dataclass(frozen=True)
class Cell:
    """One average of checkpoints. Errors are L2 distances from the truth, relative to its norm.

    Attributes:
        run, checkpoints, target: which average.
        error, predicted: of what the package made, and said.
        raw: of the weights at the end.
        oracle: see `fidelity_runs.oracle`.
    """

    run: str
    checkpoints: int
    target: str
    error: float
    predicted: float
    raw: float
    oracle: float


@dataclass(frozen=True)
class Repair:
    """An average stored by another library; `own` is the error of that library's synthesis."""

    library: str
    update_every: int
    sigma_rel: float
    own: float
    raw: float
    error: float
    predicted: float


def measure(job: Job, steps: int, cache: Path | None = None) -> list[Cell]:
    """Measure all cells of one run."""
    run, cells = record(job.name, steps, cache), []
    for count in COUNTS:
        times = _times(job, steps, count)
        first = int(times[-1 - max(2, count // 4)])
        wanted = [*map(as_target, WIDTHS), Between(first, steps), Decay("linear", PART), Decay("1-sqrt", PART)]
        truth = true_averages(Trajectory(run.name, run.weights, run.shapes), wanted)  # all in steps
        raw = np.broadcast_to(run.weights[-1].astype(np.float64), truth.shape)
        replay = Replay(run)
        with tempfile.TemporaryDirectory() as folder, quiet():
            for step in times.tolist():
                replay.go_to(step - 1)
                weights = {name: value.detach().clone() for name, value in replay.named_parameters()}
                save_file(weights, Path(folder) / f"step{step}.safetensors")
            averages, predicted = made(Run(folder).plan(wanted, dtype="float64"))
        best = oracle(run.weights[times - 1].astype(np.float64), truth)
        rows = zip(wanted, distances(averages, truth), predicted, distances(raw, truth), best, strict=True)
        cells += [Cell(job.label, count, target.title, *values) for target, *values in rows]
    return cells


def _times(job: Job, steps: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the steps of the checkpoints, ending with the last step."""
    if job.uneven:
        inner = np.random.default_rng(count).choice(np.arange(1, steps), count - 1, replace=False)
        return np.append(np.sort(inner), steps)
    return np.round(steps * np.arange(1, count + 1) / count).astype(np.int64)


def repairs(steps: int, cache: Path | None = None) -> list[Repair]:
    """Measure both libraries' averages at each stride of one run: 20 checkpoints in float16."""
    run, found = record(REPAIRED, steps, cache), []
    targets = [as_target(width) for width in WIDTHS]
    truth = true_averages(run, targets)
    raw = distances(np.broadcast_to(run.weights[-1].astype(np.float64), truth.shape), truth)
    libraries: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
        "ema-pytorch": (ema_pytorch, {}),
        "posthoc-ema": (posthoc_ema, {"update_after_step": WARM_UP}),
    }
    for update_every in STRIDES:
        for library, (start, more) in libraries.items():
            replay, imported = Replay(run), {"sigma_rels": PEER_WIDTHS, "update_every": update_every, **more}
            with tempfile.TemporaryDirectory() as folder, quiet():
                update, average = start(replay, Path(folder), update_every, steps // 20, torch.float16, **more)
                for index in range(steps):
                    replay.go_to(index)
                    update()
                flat = [torch.cat([one.detach().flatten() for one in average(width)]) for width in WIDTHS]
                own = distances(torch.stack(flat).double().numpy(), truth)
                import_checkpoints(folder, Path(folder) / "run", kind=library, **imported)
                averages, predicted = made(Run(Path(folder) / "run").plan(targets, dtype="float64"))
            rows = zip(WIDTHS, own, raw, distances(averages, truth), predicted, strict=True)
            found += [Repair(library, update_every, *row) for row in rows]
    return found


# --- tables ----------------------------------------------------------------------------------------


def tables(cells: Sequence[Cell], repaired: Sequence[Repair]) -> str:
    """Return both tables."""
    groups = {f"{count} checkpoints": [cell for cell in cells if cell.checkpoints == count] for count in COUNTS}
    kinds = ("sigma_rel", "between", "decay")
    groups |= {kind: [cell for cell in cells if cell.target.startswith(kind)] for kind in kinds} | {"all": list(cells)}
    header = ("", "averages", "error", "max", "raw", "error/oracle", "actual/predicted", "min", "max", "in [1/2, 2]")
    lines = [header, *((label, *_row(group)) for label, group in groups.items())]
    second = [("library", "update_every", "sigma_rel", "its own", "raw weights", "here", "predicted")]
    for r in repaired:
        errors = (f"{error:.1e}" for error in (r.own, r.raw, r.error, r.predicted))
        second.append((r.library, str(r.update_every), f"{r.sigma_rel:.2f}", *errors))
    return "\n\n".join(map(markdown, (lines, second)))


def _row(cells: Sequence[Cell]) -> list[str]:
    error, raw = np.array([(cell.error, cell.raw) for cell in cells]).T
    held = ratios(cells, "predicted")
    shown = (f"{one:.1e}" for one in (np.median(error), error.max(), np.median(raw)))
    return [
        *(str(len(cells)), *shown, *summary(ratios(cells, "oracle"), "median")),
        *(*summary(held, "median", "min", "max"), share(within(held, 2))),
    ]

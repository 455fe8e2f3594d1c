"""Averages of ordinary checkpoints, and of averages that other libraries stored: how near, and whether the bar holds.

The truth is computed here from the definitions, in float64, over every step of a recorded run; averages come from the
folder alone, through the public interface.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_peers import averages, distances, gamma_of
from fidelity_report import aligned, markdown, number
from fidelity_runs import FloatArray, quiet
from safetensors.torch import save_file
from trajectories import NAMES, Replay, Trajectory, record

from posthoc_cli import Between, Decay, Run, import_checkpoints, synthesize
from posthoc_cli.targets import Target, as_target

COUNTS = (8, 20, 64)
"""Checkpoints of a run."""

WIDTHS = (0.05, 0.10, 0.15, 0.20, 0.25)
PART = 0.2
"""Of training, that the decays are emulated over; the uniform mean is over the last quarter of the checkpoints."""

UNEVEN = ("denoiser-adam", "cnn-batch-norm")
"""Runs that are measured once more with checkpoints at random steps."""

REPAIRED = "denoiser-adam"
STRIDES = (1, 10, 100)
PEER_WIDTHS = (0.05, 0.28)
WARM_UP = 100


@dataclass(frozen=True)
class Job:
    """A recorded run, and whether its checkpoints are unevenly spaced."""

    name: str
    uneven: bool = False

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.name}-uneven" if self.uneven else self.name


JOBS = (*map(Job, NAMES), *(Job(name, True) for name in UNEVEN))


@dataclass(frozen=True)
class Cell:
    """One average of checkpoints; errors are distances from the truth, relative to its norm.

    Attributes:
        run, checkpoints, target: which average.
        error, predicted: of what the package made, and said.
        raw: of the weights at the end.
        oracle: of the best combination with sum 1 of these checkpoints, found by knowing the truth.
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
    """One average of another library's; `own` is the error of the library's own synthesis."""

    library: str
    update_every: int
    sigma_rel: float
    own: float
    raw: float
    error: float
    predicted: float


# --- checkpoints


def measure(job: Job, steps: int, cache: Path | None = None) -> list[Cell]:
    """All cells of one run."""
    run = record(job.name, steps, cache)
    cells = []
    for count in COUNTS:
        times = _times(job, steps, count)
        first = int(times[-1 - max(2, count // 4)])
        targets = [*map(as_target, WIDTHS), Between(first, steps), Decay("linear", PART), Decay("1-sqrt", PART)]
        truth = averages(run, np.array([_counts(target, steps) for target in targets]))
        with tempfile.TemporaryDirectory() as folder, quiet():
            _write(run, times, Path(folder))
            made, predicted = _made(Run(folder), targets)
        raw = np.broadcast_to(run.weights[-1].astype(np.float64), truth.shape)
        best = _oracle(run.weights[times - 1].astype(np.float64), truth)
        found = zip(
            distances(made, truth), predicted, distances(raw, truth), distances(best, truth), targets, strict=True
        )
        cells += [Cell(job.label, count, target.title, *values) for *values, target in found]
    return cells


def _times(job: Job, steps: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Steps of the checkpoints, the last one at the end."""
    if job.uneven:
        inner = np.random.default_rng(count).choice(np.arange(1, steps), count - 1, replace=False)
        return np.append(np.sort(inner), steps)
    return np.round(steps * np.arange(1, count + 1) / count).astype(np.int64)


def _counts(target: Target, steps: int) -> FloatArray:
    """How much each step's weights count, by the definition: shape [steps]."""
    ends = np.arange(steps + 1)
    if isinstance(target, Between):
        return np.diff(np.clip((ends - target.start) / (target.end - target.start), 0, 1))
    if isinstance(target, Decay):
        x = np.clip((ends - (1 - PART) * steps) / (PART * steps), 0, 1)
        rate = 1 - x if target.shape == "linear" else 1 - np.sqrt(x)
        # A scheduler takes its rate at the start of a step.
        return np.append(rate[:-2] - rate[1:-1], rate[-2])
    assert target.sigma_rel is not None
    return np.diff((ends / steps) ** (gamma_of(target.sigma_rel) + 1))


def _write(run: Trajectory, times: Iterable[int], folder: Path) -> None:
    replay = Replay(run)
    for step in times:
        replay.go_to(int(step) - 1)
        save_file(
            {name: value.detach().clone() for name, value in replay.named_parameters()},
            folder / f"step{step}.safetensors",
        )


def _made(run: Run, targets: Sequence[Target]) -> tuple[FloatArray, list[float]]:
    plan = run.plan(list(targets), dtype="float64")
    tensors = dict(synthesize(plan))
    rows = [[tensors[str(name)][index] for name in range(len(tensors))] for index in range(len(targets))]
    predicted = [plan.predicted_error(index) for index in range(len(targets))]
    return _flat(rows), [math.nan if error is None else error for error in predicted]


def _oracle(stored: FloatArray, truth: FloatArray) -> FloatArray:
    """The nearest combinations with sum 1 of the stored rows: shape [targets, parameters]."""
    others = (stored[:-1] - stored[-1]).T
    coefficients, *_ = np.linalg.lstsq(others, (truth - stored[-1]).T, rcond=None)
    return np.asarray(stored[-1] + (others @ coefficients).T)


# --- averages of other libraries


def repairs(steps: int, cache: Path | None = None) -> list[Repair]:
    """Both libraries at each stride, on one run, stored as float16 twenty times."""
    run = record(REPAIRED, steps, cache)
    targets = [as_target(width) for width in WIDTHS]
    truth = averages(run, np.array([_counts(target, steps) for target in targets]))
    raw = distances(np.broadcast_to(run.weights[-1].astype(np.float64), truth.shape), truth)
    found = []
    for update_every in STRIDES:
        for library, track in (("ema-pytorch", _ema_pytorch), ("posthoc-ema", _posthoc_ema)):
            with tempfile.TemporaryDirectory() as folder, quiet():
                own = distances(track(run, update_every, Path(folder)), truth)
                more = {"update_after_step": WARM_UP} if library == "posthoc-ema" else {}
                settings = {"sigma_rels": PEER_WIDTHS, "update_every": update_every, **more}
                imported = Path(folder) / "run"
                import_checkpoints(folder, imported, kind=library, **settings)
                made, predicted = _made(Run(imported), targets)
            rows = zip(WIDTHS, own, raw, distances(made, truth), predicted, strict=True)
            found += [Repair(library, update_every, *row) for row in rows]
    return found


def _ema_pytorch(run: Trajectory, update_every: int, folder: Path) -> FloatArray:
    from ema_pytorch import PostHocEMA

    replay = Replay(run)
    ema = PostHocEMA(
        replay, sigma_rels=PEER_WIDTHS, update_every=update_every, checkpoint_every_num_steps=run.steps // 20,
        checkpoint_folder=str(folder), checkpoint_dtype=torch.float16,
    )  # fmt: skip
    _follow(run, replay, ema.update)
    return _flat(list(ema.synthesize_ema_model(sigma_rel=width).ema_model.parameters()) for width in WIDTHS)


def _posthoc_ema(run: Trajectory, update_every: int, folder: Path) -> FloatArray:
    from posthoc_ema import PostHocEMA

    replay = Replay(run)
    ema = PostHocEMA.from_model(
        replay, folder, sigma_rels=PEER_WIDTHS, update_every=update_every, checkpoint_every=run.steps // 20,
        update_after_step=WARM_UP, checkpoint_dtype=torch.float16,
    )  # fmt: skip
    _follow(run, replay, lambda: ema.update_(replay))
    rows = []
    for width in WIDTHS:
        with ema.state_dict(sigma_rel=width) as state:
            rows.append([value.clone() for value in state.values()])
    return _flat(rows)


def _follow(run: Trajectory, replay: Replay, update: Callable[[], object]) -> None:
    for index in range(run.steps):
        replay.go_to(index)
        update()


def _flat(rows: Iterable[Sequence[torch.Tensor]]) -> FloatArray:
    return np.array([torch.cat([value.detach().double().flatten() for value in row]).numpy() for row in rows])


# --- tables


def tables(cells: Sequence[Cell], repaired: Sequence[Repair], as_markdown: bool) -> str:
    """Both tables, and the share of the predictions that hold."""
    groups = {f"{count} checkpoints": [cell for cell in cells if cell.checkpoints == count] for count in COUNTS}
    kinds = ("sigma_rel", "between", "decay")
    groups |= {kind: [cell for cell in cells if cell.target.startswith(kind)] for kind in kinds}
    header = ("", "averages", "error", "max", "raw", "error/oracle", "actual/predicted", "min", "max", "in [1/2, 2]")
    lines = [header, *(_row(label, group) for label, group in (groups | {"all": list(cells)}).items() if group)]
    second = [("library", "update_every", "sigma_rel", "its own", "raw weights", "here", "predicted")]
    for r in repaired:
        errors = (f"{error:.1e}" for error in (r.own, r.raw, r.error, r.predicted))
        second.append((r.library, str(r.update_every), f"{r.sigma_rel:.2f}", *errors))
    return "\n\n".join(_table(one, as_markdown) for one in (lines, second))


def _row(label: str, cells: Sequence[Cell]) -> tuple[str, ...]:
    columns = np.array([(cell.error, cell.predicted, cell.raw, cell.oracle) for cell in cells])
    error, predicted, raw, oracle = columns.T
    ratios = error / predicted
    return (
        label, str(len(cells)), f"{np.median(error):.1e}", f"{error.max():.1e}", f"{np.median(raw):.1e}",
        number(np.median(error / oracle)), number(np.median(ratios)), number(ratios.min()), number(ratios.max()),
        f"{100 * np.mean((ratios >= 0.5) & (ratios <= 2)):.1f} %",
    )  # fmt: skip


def _table(lines: Sequence[Sequence[str]], as_markdown: bool) -> str:
    if as_markdown:
        return markdown([lines[0], ("---", *["---:"] * (len(lines[0]) - 1)), *lines[1:]])
    return "\n".join(text for _, (_, text) in aligned(lines))

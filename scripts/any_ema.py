"""Measure averages of other lengths that are made from the EMA that a training saved anyway.

An EMA of four time constants follows each recorded training. It is stored 20 times in float16, with
the weights in float32, as a plain loop does; the import finds its decay. *Raw* are least squares
over the weights, which fit the tails of the profiles with coefficients of sum 1. The truth is the
sum over every step in float64; averages come from the folder alone, through the public interface.

    OMP_NUM_THREADS=1 python scripts/any_ema.py [--cache FOLDER] [--steps 6000] [--only TRAINING]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from following import FloatArray, averages, distances, flat, least_squares, mass_until, quiet
from safetensors.torch import save_file
from tables import markdown, ratios, share
from trajectories import NAMES, Replay, Trajectory, add_options, record, step_clock

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.run import Weights
from posthoc_cli.targets import as_target

WIDTHS = (0.05, 0.10, 0.15, 0.25)
LENGTHS = (0.1, 0.3, 0.03, 0.01)
"""Time constants as fractions of the run."""

CHECKPOINTS = 20


@quiet()
def main() -> None:
    """Print the decays that are found, the errors, and whether the predictions hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, 6000, CHECKPOINTS)
    parser.add_argument("--only", choices=NAMES, help="one of the trainings")
    options = parser.parse_args()
    results = []
    for name in NAMES:
        if options.only in (None, name):
            run = record(name, options.steps, options.cache)
            # The EMA is on a clock in steps.
            run = replace(run, times=step_clock(run.steps))
            results += [measure(run, length) for length in LENGTHS]
    print(decay_table(results))
    print()
    print(error_table(results))
    print()
    print(summary(results))


# --- one EMA
# ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """An average of one width: its error, that of the EMA in its place, and of least squares over
    the weights; and the predicted error."""

    width: float
    error: float
    ema: float
    raw: float
    predicted: float


@dataclass(frozen=True)
class Result:
    """What the import of an EMA found.

    Attributes:
        training: the recorded run, and the time constant as a fraction of it.
        true, found: decay.
        uncertainty: of the length.
        asked: whether the import asked for the decay.
        cells: averages of each width.
    """

    training: str
    true: float
    found: float
    uncertainty: float
    asked: bool
    cells: list[Cell]

    @property
    def off(self) -> float:
        """Return how far the length of the average that was found is off."""
        ratio = (1 - self.true) / (1 - self.found)
        return math.log(ratio)


def measure(run: Trajectory, length: float) -> Result:
    """Store an EMA of a training, import it, and compare averages of each width with the truth."""
    decay = 1 - 1 / (length * run.steps)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        files.mkdir()
        ema = follow(run, decay, files)
        imported = Run(Path(folder) / "run")
        asked = import_stored(files, imported.directory, decay)
        (audit,) = imported.audit()
        made = [imported.average(width, dtype="float64") for width in WIDTHS]
    return Result(
        training=f"{run.name}, {length:g} T",
        true=decay,
        found=audit.found or math.nan,
        uncertainty=audit.uncertainty or math.nan,
        asked=asked,
        cells=cells_of(run, made, ema),
    )


def cells_of(run: Trajectory, made: list[Weights], ema: FloatArray) -> list[Cell]:
    """Compare averages of each width, and other ways to them, with the truth."""
    seen = np.arange(1, run.steps + 1)
    wanted = [as_target(width) for width in WIDTHS]
    until = np.array([mass_until(target, seen, run) for target in wanted])
    shares = np.diff(until, prepend=0.0)
    truth = averages(run, shares)
    ours = np.array([flat(average) for average in made])
    raw = of_weights(run, 1 - until + shares)
    errors = (distances(ours, truth), distances(ema, truth), distances(raw, truth))
    predicted = [average.predicted_error or math.nan for average in made]
    return [*map(Cell, WIDTHS, *errors, predicted)]


def checkpoint_times(run: Trajectory) -> list[int]:
    """Return the steps of the checkpoints."""
    every = run.steps // CHECKPOINTS
    return [*range(every, run.steps + 1, every)]


def follow(run: Trajectory, decay: float, folder: Path) -> FloatArray:
    """Let an EMA follow a training, and save it with the weights; return the last one, in
    float64."""
    raw = Replay(run)
    stored = Replay(run).half()
    times = checkpoint_times(run)
    average = run.weights[0].astype(np.float64)
    for step, weights in enumerate(run.weights, 1):
        average = decay * average + (1 - decay) * weights
        if step in times:
            raw.go_to(step - 1)
            stored.take(torch.from_numpy(average).float())
            save_file(stored.state_dict(), folder / f"ema_step{step}.safetensors")
            save_file(raw.state_dict(), folder / f"step{step}.safetensors")
    return average


def import_stored(files: Path, out: Path, decay: float) -> bool:
    """Import checkpoints; return whether the import asked for the decay."""
    try:
        import_checkpoints(files, out)
    except InvalidValueError:
        import_checkpoints(files, out, ema_decay=decay)
        return True
    return False


def of_weights(run: Trajectory, wanted: FloatArray) -> FloatArray:
    """Return the combinations of the stored weights whose tails are nearest to the wanted ones,
    [targets, steps]: [targets, parameters]."""
    times = np.array(checkpoint_times(run))
    is_later = np.arange(run.steps) < times[:, None]
    tails = np.where(is_later, 1.0, 0.0)
    weights = run.weights[times - 1].astype(np.float64)
    return least_squares(tails, wanted) @ weights


# --- the tables
# ---------------------------------------------------------------------------------


def decay_table(results: Sequence[Result]) -> str:
    """Return what the imports found."""
    rows = [("training", "true decay", "found", "of the length: off by", "uncertainty", "import")]
    for result in results:
        row = (
            result.training,
            f"{result.true:.6f}",
            f"{result.found:.6f}",
            f"{result.off:+.2%}",
            f"{result.uncertainty:.2%}",
            "asked for" if result.asked else "",
        )
        rows.append(row)
    return markdown(rows)


def error_table(results: Sequence[Result]) -> str:
    """Return the errors of each width."""
    rows = [["training", "sigma_rel", "that EMA", "from weights", "from EMAs", "predicted"]]
    for result in results:
        for cell in result.cells:
            errors = (cell.ema, cell.raw, cell.error, cell.predicted)
            shown = [f"{error:.1e}" for error in errors]
            rows.append([result.training, f"{cell.width:.2f}", *shown])
    return markdown(rows)


def summary(results: Sequence[Result]) -> str:
    """Return how errors compare with those of weights and with predictions, and lengths with their
    uncertainties."""
    cells = []
    for result in results:
        cells += result.cells
    raw = ratios(cells, "raw")
    predicted = ratios(cells, "predicted")
    bands = [abs(result.off) / result.uncertainty for result in results]
    lines = (
        f"error / from weights: median {np.median(raw):.2f}, most {raw.max():.2f}",
        f"actual / predicted: most {predicted.max():.2f}",
        f"actual above half of predicted: {share(predicted > 0.5)}",
        f"true length, in uncertainties: most {np.nanmax(bands):.2f}",
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

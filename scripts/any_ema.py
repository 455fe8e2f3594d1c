"""Measure averages of other lengths that are made from the EMA that a training saved anyway.

An EMA of four time constants follows each recorded training. It is stored 20 times in float16, with
the weights in float32, as a plain loop does; the import is told its decay where it asks. *Raw* are
least squares over the weights, which fit the tails of the profiles with coefficients of sum 1. The
truth is the sum over every step in float64; averages come from the folder alone, through the public
interface.

    OMP_NUM_THREADS=1 python scripts/any_ema.py [--steps 6000] [--only TRAINING]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from following import distances, flat, least_squares, quiet, shares, true_averages
from safetensors.torch import save_file
from tables import FloatArray, markdown, ratios, share
from trajectories import RECIPES, Replay, Trajectory, record

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.synthesis.weights import Weights
from posthoc_cli.targets import as_target

WIDTHS = (0.05, 0.10, 0.15, 0.25)
TARGETS = [as_target(width) for width in WIDTHS]
LENGTHS = (0.1, 0.3, 0.03, 0.01)
"""Time constants as fractions of the run."""

CHECKPOINTS = 20


@quiet()
def main() -> None:
    """Print how the decays are found, the errors, and whether the predictions hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000, help="of a run, a multiple of 20 (6000)")
    parser.add_argument("--only", choices=RECIPES, help="one of the trainings")
    options = parser.parse_args()
    results = {}
    for name in RECIPES:
        if options.only in (None, name):
            run = record(name, options.steps)
            for length in LENGTHS:
                results[f"{name}, {length:g} T"] = measure(run, length)
    print(decay_table(results))
    print()
    print(error_table(results))
    print()
    print(summary(results))


# --- one EMA
# ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What the import of an EMA found, and averages of its files.

    Attributes:
        off: how far the length of the average that was found is off; nan without one.
        uncertainty: of the length.
        asked: whether the import asked for the decay.
        errors: for each width, of the EMA in its place, of least squares over the weights, and of
            the average; and the predicted error: [4, widths].
    """

    off: float
    uncertainty: float
    asked: bool
    errors: FloatArray


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
    ratio = (1 - decay) / (1 - (audit.found or math.nan))
    return Result(
        off=math.log(ratio),
        uncertainty=audit.uncertainty or math.nan,
        asked=asked,
        errors=errors_of(run, made, ema),
    )


def errors_of(
    run: Trajectory,
    made: list[Weights],
    ema: FloatArray,
) -> FloatArray:
    """Compare averages of each width, and other ways to them, with the truth."""
    truth = true_averages(run, TARGETS)
    ours = np.array([flat(average) for average in made])
    errors = [
        distances(ema, truth),
        distances(of_weights(run), truth),
        distances(ours, truth),
        [average.predicted_error for average in made],
    ]
    return np.array(errors, dtype=np.float64)


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


def of_weights(run: Trajectory) -> FloatArray:
    """Return the combinations of the stored weights whose tails are nearest to those of each width:
    [widths, parameters]."""
    times = np.array(checkpoint_times(run))
    is_later = np.arange(run.steps) < times[:, None]
    coefficients = least_squares(is_later.astype(np.float64), shares(TARGETS, run.steps))
    return coefficients @ run.weights[times - 1].astype(np.float64)


# --- the tables
# ---------------------------------------------------------------------------------


def decay_table(results: Mapping[str, Result]) -> str:
    """Return how well the imports found the length."""
    rows = [("training", "length off by", "uncertainty", "import")]
    for training, result in results.items():
        how = "asked for" if result.asked else ""
        rows.append((training, f"{result.off:+.2%}", f"{result.uncertainty:.2%}", how))
    return markdown(rows)


def error_table(results: Mapping[str, Result]) -> str:
    """Return the errors of each width."""
    rows = [["training", "sigma_rel", "that EMA", "from weights", "from EMAs", "predicted"]]
    for training, result in results.items():
        for width, errors in zip(WIDTHS, result.errors.T, strict=True):
            shown = [f"{error:.1e}" for error in errors]
            rows.append([training, f"{width:.2f}", *shown])
    return markdown(rows)


def summary(results: Mapping[str, Result]) -> str:
    """Return how errors compare with those of weights, and with predictions."""
    all_errors = [result.errors for result in results.values()]
    _, weights, errors, predicted = np.hstack(all_errors)
    relative = ratios(errors, weights)
    actual = ratios(errors, predicted)
    lines = (
        f"error / from weights: median {np.median(relative):.2f}, most {relative.max():.2f}",
        f"actual / predicted: most {actual.max():.2f}",
        f"actual above half of predicted: {share(actual > 0.5)}",
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

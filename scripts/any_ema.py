"""Averages of other lengths from the checkpoints of one ordinary EMA: how near, and whether its decay is found.

Of each recorded run one EMA is kept with a decay, from the first weights on, and stored as float16 twenty times. Plain
least squares fits the tails of the profiles, with coefficients of sum 1. The truth is summed here over every step in
float64; averages come from the folder alone, through the public interface.

    OMP_NUM_THREADS=1 python scripts/any_ema.py --cache DIR [--steps 6000] [--raw] [--markdown]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from compare_peers import averages, distances, gamma_of
from fidelity_report import aligned, markdown
from fidelity_runs import FloatArray, quiet
from safetensors.torch import save_file
from trajectories import NAMES, record

from posthoc_cli import Run, import_checkpoints, synthesize
from posthoc_cli.targets import as_target

WIDTHS = (0.05, 0.10, 0.15, 0.25)
LENGTHS = (0.01, 0.03, 0.1, 0.3)
"""Time constants, as fractions of the run."""

CHECKPOINTS = 20


def least_squares(tails: FloatArray, wanted: FloatArray) -> FloatArray:
    """Coefficients with sum 1 for tails of stored averages, [steps, checkpoints]: [checkpoints, targets]."""
    others, last = tails[:, :-1] - tails[:, -1:], tails[:, -1:]
    found, *_ = np.linalg.lstsq(others, wanted - last, rcond=1e-10)
    return np.vstack([found, 1 - found.sum(axis=0)])


def measure(name: str, length: float, steps: int, raw: bool, cache: Path | None) -> list[tuple[float, ...]]:
    """For each width: error, that of plain least squares, predicted, of the EMA itself, of raw weights; decay found."""
    run = record(name, steps, cache)
    decay = 1 - 1 / (length * steps)
    times = [round(steps * (index + 1) / CHECKPOINTS) for index in range(CHECKPOINTS)]
    average, stored = run.weights[0].astype(np.float64), []
    for step, weights in enumerate(run.weights, 1):
        average = decay * average + (1 - decay) * weights
        if step in times:
            stored.append(average.astype(np.float16))
    at = np.arange(steps)
    truth = averages(run, np.array([np.diff((np.arange(steps + 1) / steps) ** (gamma_of(w) + 1)) for w in WIDTHS]))
    wanted = np.array([1 - (at / steps) ** (gamma_of(width) + 1) for width in WIDTHS]).T
    values = np.array(stored, dtype=np.float64)
    tails = np.array([np.where(at == 0, 1, np.maximum(1 - decay ** (t - at.astype(float)), 0)) for t in times]).T
    plain = distances(least_squares(tails, wanted).T @ values, truth)
    points = np.array([at < t for t in times], dtype=np.float64).T
    weights = run.weights[np.array(times) - 1].astype(np.float64)
    from_raw = distances(least_squares(points, wanted).T @ weights, truth)
    own = distances(np.broadcast_to(values[-1], truth.shape), truth)
    with tempfile.TemporaryDirectory() as folder, quiet():
        place = Path(folder)
        for both in (True, False):
            (place / str(both)).mkdir()
            for step, one in zip(times, stored, strict=True):
                save_file({"w": torch.from_numpy(one)}, place / str(both) / f"ema_step{step}.safetensors")
                if both:
                    save_file(
                        {"w": torch.from_numpy(run.weights[step - 1])}, place / "True" / f"step{step}.safetensors"
                    )
        (audit,) = Run(place / "True").audit()
        import_checkpoints(place / str(raw), place / "run", ema_decay=decay)
        plan = Run(place / "run").plan([as_target(width) for width in WIDTHS], dtype="float64")
        ((_, made),) = synthesize(plan)
    errors = distances(np.array([one.numpy() for one in made]), truth)
    predicted = [plan.predicted_error(index) or np.nan for index in range(len(WIDTHS))]
    found = np.nan if audit.found is None else (1 - decay) / (1 - audit.found)
    unsure = np.nan if audit.uncertainty is None else audit.uncertainty
    return [(*row, found, unsure) for row in zip(errors, plain, predicted, own, from_raw, strict=True)]


def main() -> None:
    """Print the table, and the share of the predictions that hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--raw", action="store_true", help="use the weights beside the averages, too")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    rows = [
        ("run", "time constant", "found / true", "sigma_rel", "error", "EMA itself", "from raw", "plain", "predicted")
    ]
    cells = []
    for name in NAMES:
        for length in LENGTHS:
            for width, values in zip(
                WIDTHS, measure(name, length, options.steps, options.raw, options.cache), strict=True
            ):
                error, plain, predicted, own, from_raw, found, unsure = values
                cells.append((error / plain, error / predicted, error / own, error / from_raw))
                told = "too short to tell" if np.isnan(found) else f"{found:.3f} ± {unsure:.3f}"
                numbers = (f"{value:.1e}" for value in (error, own, from_raw, plain, predicted))
                rows.append((name, f"{length:g} T", told, f"{width:.2f}", *numbers))
    print((markdown if options.markdown else aligned)(rows))
    plain, held, own, raw = np.array(cells).T
    inside = [f"{np.mean((held < k) & (held > 1 / k)):.1%} within {k}" for k in (2, 3)]
    print(f"\nerror / plain least squares: median {np.median(plain):.3f}, most {plain.max():.2f}")
    print(f"error / from raw checkpoints: median {np.median(raw):.3f}, most {raw.max():.2f}")
    print(f"error / the EMA itself: median {np.median(own):.4f}, most {own.max():.2f}")
    print(f"actual / predicted: {', '.join(inside)}; most {held.max():.2f}, {len(cells)} cells")


if __name__ == "__main__":
    main()

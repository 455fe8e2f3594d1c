"""How exact the published reconstruction is, in the weights, on real training runs.

Each recorded run is tracked by the hook and written every 500 steps; targets are synthesized with `--method paper`
and compared with the average summed directly in float64 over the same updates (every 10th step), whose weights follow
from the definition. Printed: relative L2 distance over all parameters, for two pairs of tracked profiles, stored in
float32 and in float16, next to the error of the profile that the method itself states.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from trajectories import PEER_RUNS, Replay, Trajectory, record

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis

TARGETS = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25, 0.28)
PAIRS = ((0.05, 0.10), (0.05, 0.28))
STRIDE = 10


def true_average(run: Trajectory, sigma_rel: float) -> npt.NDArray[np.float64]:
    """The average over every 10th step's weights, from the definition: shape [parameters]."""
    roots = np.roots([1, 4, 5 - sigma_rel**-2, 2])
    exponent = float(max(roots.real))  # gamma + 1
    steps = np.arange(0, run.steps + 1, STRIDE)
    weights = np.diff((steps / run.steps) ** exponent)
    return np.tensordot(weights, run.weights[steps[1:] - 1].astype(np.float64), axes=1)


def track(run: Trajectory, folder: Path, pair: tuple[float, float], dtype: torch.dtype) -> None:
    """Track a run with the hook, snapshots every 500 steps."""
    model = Replay(run)
    every = run.steps // 20
    with PostHocEMA.from_model(
        model, folder, pair, STRIDE, checkpoint_every=every, max_checkpoints=None, checkpoint_dtype=dtype
    ) as tracker:
        for step in range(run.steps):
            if (step + 1) % STRIDE == 0:
                model.go_to(step)
            tracker.update_(model)


def errors(run: Trajectory, folder: Path) -> list[float]:
    """Relative L2 distance of each synthesized target from the true average."""
    tracker = PostHocEMA.from_path(folder)
    found = []
    for sigma_rel in TARGETS:
        state = tracker.state_dict(sigma_rel=sigma_rel, method="paper")
        flat = np.concatenate([tensor.double().reshape(-1).numpy() for tensor in state.values()])
        exact = true_average(run, sigma_rel)
        found.append(float(np.linalg.norm(flat - exact) / np.linalg.norm(exact)))
    return found


def print_row(label: str, values: Sequence[float]) -> None:
    """One line of the table."""
    print(f"{label:<46}" + "".join(f"{value:>9.1e}" for value in values))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="length of the runs, a multiple of 200")
    parser.add_argument("--cache", type=Path, help="folder that keeps recorded runs")
    options = parser.parse_args(arguments)
    if options.steps < 200 or options.steps % 200:
        parser.error("--steps: must be a multiple of 200, so that 20 snapshots fall on updates")
    print(f"20 snapshot times in {options.steps:,} steps, published method; relative L2 distance in the weights")
    print(f"{'':<46}" + "".join(f"{target:>9g}" for target in TARGETS))
    for name in PEER_RUNS:
        run = record(name, options.steps, cache=options.cache)
        for pair in PAIRS:
            for dtype in (torch.float32, torch.float16):
                with tempfile.TemporaryDirectory() as folder:
                    track(run, Path(folder), pair, dtype)
                    print_row(f"{name}, {pair}, {str(dtype).removeprefix('torch.')}", errors(run, Path(folder)))
                    stated = plan_synthesis(disk_sources(folder), TARGETS, method="paper").reconstruction
            print_row(f"  profile error stated for {pair}", stated.profile_error.tolist())


if __name__ == "__main__":
    logging.getLogger("posthoc_cli").setLevel(logging.ERROR)  # poor targets are the point here
    main()

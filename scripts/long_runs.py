"""Measure how far the tracked averages are from sums in float64 in very long runs.

    python scripts/long_runs.py [--steps 1000000]

A random walk whose steps follow a cosine to 0, without and with noise of 3 % that fades with them;
noise of 3 % that stays; a drift on sines. Errors are relative L2 distances from the recursion of
the average in float64. A million steps take some ten minutes a case."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from bench_update import TRACKED, tracker
from following import distances, gamma_of
from numpy.random import Generator, default_rng
from tables import FloatArray
from tasks import half_wave
from torch.nn import Parameter, ParameterDict

from posthoc_cli import PostHocEMA

SIZE = 384


# --- the cases: the weights after every step


def walk(steps: int, random: Generator) -> Iterator[FloatArray]:
    """Walk with steps that follow a cosine to 0."""
    weights = random.standard_normal(SIZE)
    size = 0.5 / math.sqrt(steps)
    for step in range(1, steps + 1):
        move = random.standard_normal(SIZE)
        weights += half_wave(step / steps) * size * move
        yield weights


def noisy_walk(steps: int, random: Generator) -> Iterator[FloatArray]:
    """Add noise of 3 % to a walk, which follows the same cosine."""
    for step, weights in enumerate(walk(steps, random), 1):
        noise = random.standard_normal(SIZE)
        yield weights + 0.03 * half_wave(step / steps) * noise


def still(steps: int, random: Generator) -> Iterator[FloatArray]:
    """Add noise of 3 % to one point."""
    weights = random.standard_normal(SIZE)
    for _ in range(steps):
        noise = random.standard_normal(SIZE)
        yield weights + 0.03 * noise


def drift(steps: int, random: Generator) -> Iterator[FloatArray]:
    """Move each weight along its own slow sine."""
    weights = random.standard_normal(SIZE)
    phase = random.uniform(0, 2 * math.pi, SIZE)
    for step in range(steps):
        angle = 3 * step / steps + phase
        yield weights * (1 + 0.5 * np.sin(angle))


CASES = {
    "walk, cosine to 0": walk,
    "noise of 3 %, cosine to 0": noisy_walk,
    "noise of 3 %": still,
    "drift": drift,
}


# --- the table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000, help="updates (1000000)")
    steps = parser.parse_args().steps
    print(f"| | after {steps:,} updates of 0.05, 0.28 | the largest until then |")
    print("| --- | ---: | ---: |")
    for name, case in CASES.items():
        path = case(steps, default_rng(0))
        last, worst = measure(path, steps)
        print(f"| {name} | {_shown(last)} | {_shown(worst)} |", flush=True)


def measure(
    path: Iterator[FloatArray],
    steps: int,
) -> tuple[list[float], FloatArray]:
    """Return the errors at the end, and the largest of 20 samples in each decade of updates."""
    gammas = np.array([gamma_of(sigma_rel) for sigma_rel in TRACKED])
    powers = gammas[:, None] + 1
    truth = np.zeros((len(TRACKED), SIZE))
    worst = np.zeros(len(TRACKED))
    next_sample = 1.0
    weights = Parameter(torch.zeros(SIZE))
    model = ParameterDict({"weights": weights})
    with tracker(model, "cpu", checkpoint_every=steps) as ema:
        for step, values in enumerate(path, start=1):
            weights.data.copy_(torch.from_numpy(values))
            ema.update_(model)
            beta = ((step - 1) / step) ** powers
            seen = weights.detach().double().numpy()
            truth += (1 - beta) * (seen - truth)
            if step >= next_sample or step == steps:
                next_sample = step * 10**0.05
                errors = distances(averages(ema), truth)
                worst = np.maximum(worst, errors)
    return errors, worst


def averages(ema: PostHocEMA) -> FloatArray:
    """Return the tracked averages, [profiles, SIZE]."""
    rows = []
    for sigma_rel in TRACKED:
        average = ema.state_dict(sigma_rel, dtype=torch.float64)
        rows.append(average["weights"].numpy())
    return np.array(rows)


def _shown(errors: Iterable[float]) -> str:
    return " / ".join(f"{error:.1e}" for error in errors)


if __name__ == "__main__":
    main()

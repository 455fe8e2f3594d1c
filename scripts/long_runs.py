"""Measure how far the tracked averages are from sums in float64 in very long runs.

    python scripts/long_runs.py [--steps 1000000]

Adam on a small regression, with a cosine rate to 0; a random walk with such a rate, without and
with noise of 3 % that fades with the rate; noise of 3 % that stays; a drift on sines. Errors are
relative L2 distances from the recursion of the average in float64. A million steps take some ten
minutes a case."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from compare_peers import distances, gamma_of

from posthoc_cli import PostHocEMA

Weights = npt.NDArray[np.float64]
SIZE = 384
SIGMA_RELS = (0.05, 0.28)


def adam(steps: int, rng: np.random.Generator) -> Iterator[Weights]:
    """Train a network of two layers to reproduce another one's outputs, in batches of 16."""
    shapes = ((8, 32), (32, 4))
    teacher, layers = (
        [rng.standard_normal(shape) / math.sqrt(shape[0]) for shape in shapes] for _ in range(2)
    )
    first, second = ([np.zeros(shape) for shape in shapes] for _ in range(2))
    for step in range(1, steps + 1):
        x = rng.standard_normal((16, 8))
        hidden = np.tanh(x @ layers[0])
        miss = (
            hidden @ layers[1]
            - np.tanh(x @ teacher[0]) @ teacher[1]
            - 0.1 * rng.standard_normal((16, 4))
        ) / 16
        gradients = (x.T @ (miss @ layers[1].T * (1 - hidden**2)), hidden.T @ miss)
        rate = 0.002 * _cosine(step, steps) * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        for layer, gradient, m, v in zip(layers, gradients, first, second, strict=True):
            m += 0.1 * (gradient - m)
            v += 0.001 * (gradient**2 - v)
            layer -= rate * m / (np.sqrt(v) + 1e-8)
        yield np.concatenate([layer.ravel() for layer in layers])


def walk(steps: int, rng: np.random.Generator, noise: float = 0.0) -> Iterator[Weights]:
    """Walk with steps and noise that follow a cosine to 0."""
    weights = rng.standard_normal(SIZE)
    for step in range(1, steps + 1):
        rate = _cosine(step, steps)
        weights += rate * 0.5 / math.sqrt(steps) * rng.standard_normal(SIZE)
        yield weights + noise * rate * rng.standard_normal(SIZE) if noise else weights


def still(steps: int, rng: np.random.Generator) -> Iterator[Weights]:
    """Add noise of 3 % to one point."""
    weights = rng.standard_normal(SIZE)
    for _ in range(steps):
        yield weights + 0.03 * rng.standard_normal(SIZE)


def drift(steps: int, rng: np.random.Generator) -> Iterator[Weights]:
    """Move each weight along its own slow sine."""
    weights = rng.standard_normal(SIZE)
    phase = rng.uniform(0, 2 * math.pi, SIZE)
    for step in range(steps):
        yield weights * (1 + 0.5 * np.sin(3 * step / steps + phase))


CASES = {
    "Adam, cosine to 0": adam,
    "walk, cosine to 0": walk,
    "noise of 3 %, cosine to 0": lambda steps, rng: walk(steps, rng, 0.03),
    "noise of 3 %": still,
    "drift": drift,
}


def _cosine(step: int, steps: int) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    steps = parser.parse_args(arguments).steps
    print(
        f"| | after {steps:,} updates, sigma_rel {' / '.join(map(str, SIGMA_RELS))} | the "
        f"largest until then |"
    )
    print("| --- | ---: | ---: |")
    for name, case in CASES.items():
        last, worst = measure(case(steps, np.random.default_rng(0)), steps)
        print(f"| {name} | {_shown(last)} | {_shown(worst)} |", flush=True)


def measure(path: Iterator[Weights], steps: int) -> tuple[Weights, Weights]:
    """Return the errors at the end, and the largest of 20 samples in each decade of updates."""
    truth = [np.zeros(SIZE) for _ in SIGMA_RELS]
    worst = np.zeros(len(SIGMA_RELS))
    next_sample = 1.0
    model = torch.nn.ParameterDict({"weights": torch.zeros(SIZE)})
    with (
        tempfile.TemporaryDirectory() as folder,
        PostHocEMA.from_model(
            model, folder, SIGMA_RELS, update_every=1, checkpoint_every=steps
        ) as ema,
    ):
        for step, weights in enumerate(path, start=1):
            model["weights"].data.copy_(torch.from_numpy(weights))
            ema.update_(model)
            for sigma_rel, exact in zip(SIGMA_RELS, truth, strict=True):
                beta = ((step - 1) / step) ** (gamma_of(sigma_rel) + 1)
                exact += (1 - beta) * (model["weights"].detach().double().numpy() - exact)
            if step >= next_sample or step == steps:
                next_sample = step * 10**0.05
                averages = [
                    ema.state_dict(one, dtype=torch.float64)["weights"].numpy()
                    for one in SIGMA_RELS
                ]
                errors = distances(np.stack(averages), np.stack(truth))
                worst = np.maximum(worst, errors)
    return errors, worst


def _shown(errors: Weights) -> str:
    return " / ".join(f"{error:.1e}" for error in errors)


if __name__ == "__main__":
    main()

"""How far the tracked averages are from sums in float64, after so many updates.

    python scripts/long_runs.py [--steps 1000000]

Cases: Adam on a small regression, its rate a cosine to 0; a random walk whose steps follow such a cosine; noise of 3 %
that fades with it, around such a walk; noise of 3 % that stays; a drift on sines. All have some hundred weights. Errors
are relative L2 distances; the truth is the recursion of the average in float64. A million steps take some minutes a
case.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.profiles import new_value_share
from posthoc_cli.tracker.layout import Tile, TileReader, lay_out
from posthoc_cli.tracker.running import RunningAverages

Weights = npt.NDArray[np.float64]
SIZE, SIGMA_RELS = 400, (0.05, 0.28)


def adam(steps: int, rng: np.random.Generator) -> Iterator[Weights]:
    """A network of two layers that learns another one's outputs, batches of 16."""
    shapes = ((8, 32), (32, 4))
    teacher, layers = ([rng.standard_normal(shape) / math.sqrt(shape[0]) for shape in shapes] for _ in range(2))
    first, second = ([np.zeros(shape) for shape in shapes] for _ in range(2))
    for step in range(1, steps + 1):
        x = rng.standard_normal((16, 8))
        hidden = np.tanh(x @ layers[0])
        miss = (hidden @ layers[1] - np.tanh(x @ teacher[0]) @ teacher[1] - 0.1 * rng.standard_normal((16, 4))) / 16
        gradients = (x.T @ (miss @ layers[1].T * (1 - hidden**2)), hidden.T @ miss)
        rate = 0.002 * _cosine(step, steps) * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        for layer, gradient, m, v in zip(layers, gradients, first, second, strict=True):
            m += 0.1 * (gradient - m)
            v += 0.001 * (gradient**2 - v)
            layer -= rate * m / (np.sqrt(v) + 1e-8)
        yield np.concatenate([layer.ravel() for layer in layers])


def walk(steps: int, rng: np.random.Generator, noise: float = 0.0) -> Iterator[Weights]:
    """A walk with steps that follow a cosine to 0, and with noise that does, too."""
    weights = rng.standard_normal(SIZE)
    for step in range(1, steps + 1):
        rate = _cosine(step, steps)
        weights += rate * 0.5 / math.sqrt(steps) * rng.standard_normal(SIZE)
        yield weights + noise * rate * rng.standard_normal(SIZE) if noise else weights


def still(steps: int, rng: np.random.Generator) -> Iterator[Weights]:
    """Noise of 3 % around one point."""
    weights = rng.standard_normal(SIZE)
    for _ in range(steps):
        yield weights + 0.03 * rng.standard_normal(SIZE)


def drift(steps: int, rng: np.random.Generator) -> Iterator[Weights]:
    """Each weight on a slow sine of its own."""
    weights, phase = rng.standard_normal(SIZE), rng.uniform(0, 2 * math.pi, SIZE)
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
    print(f"| | after {steps:,} updates, sigma_rel {' / '.join(map(str, SIGMA_RELS))} | the largest until then |")
    print("| --- | ---: | ---: |")
    for name, case in CASES.items():
        last, worst = measure(case(steps, np.random.default_rng(0)), steps)
        print(f"| {name} | {_shown(last)} | {_shown(worst)} |", flush=True)


def measure(path: Iterator[Weights], steps: int) -> tuple[Weights, Weights]:
    """Errors at the end, and the largest of all, looked for 20 times in each factor of 10."""
    averages, truth, worst, looked = RunningAverages.none_yet(SIGMA_RELS), [], np.zeros(len(SIGMA_RELS)), 1.0
    for step, weights in enumerate(path, start=1):
        if step == 1:
            model = torch.empty(len(weights))
            reader = TileReader.of_tensors(lay_out({"weights": model}), {"weights": model})
            truth = [np.zeros(len(weights)) for _ in SIGMA_RELS]
        model.copy_(torch.from_numpy(weights))
        for gamma, exact in zip(averages.gammas, truth, strict=True):
            exact += new_value_share(gamma, step - 1.0, step) * (model.double().numpy() - exact)
        averages.update_(reader, {}, float(step), step)
        if step >= looked or step == steps:
            looked = step * 10**0.05
            tile = Tile(0, 0, 0, len(weights))
            found = [averages.values(tile, profile).double().numpy() for profile in range(len(truth))]
            errors = np.array([np.linalg.norm(f - e) / np.linalg.norm(e) for f, e in zip(found, truth, strict=True)])
            worst = np.maximum(worst, errors)
    return errors, worst


def _shown(errors: Weights) -> str:
    return " / ".join(f"{error:.1e}" for error in errors)


if __name__ == "__main__":
    main()

"""A small real training, all of its weights, and averages of them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import exact_weights, relative_distance
from torch import nn

from posthoc_cli import Run

STEPS = 1500
EVERY = 100
TIMES = range(EVERY, STEPS + 1, EVERY)
Average = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""What an average becomes at a step, from what it was and the weights after the step."""
Weights = dict[str, torch.Tensor]
Form = Callable[[int, Weights, Weights], object]
"""What a training saves at a step, of the weights and their average."""


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Linear(20, 40),
        nn.Tanh(),
        nn.Linear(40, 30),
        nn.Linear(30, 5),
    )
    return nn.Sequential(*layers)


@functools.cache
def train(
    rate: float = 3e-3,
    falls: bool = False,
    optimizer: str = "Adam",
    seed: int = 1,
) -> np.ndarray:
    model = network()
    random = torch.Generator().manual_seed(seed)
    first = nn.Linear(20, 40)
    teacher = nn.Sequential(first, nn.ReLU(), nn.Linear(40, 5))
    parameters = list(model.parameters())
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    chosen = getattr(torch.optim, optimizer)(parameters, rate, **options)
    path = []
    for step in range(STEPS):
        if falls:
            for group in chosen.param_groups:
                group["lr"] = rate * (1 - step / STEPS)
        x = torch.randn(16, 20, generator=random)
        chosen.zero_grad()
        error = model(x) - teacher(x).detach()
        error.square().mean().backward()
        chosen.step()
        weights = nn.utils.parameters_to_vector(parameters)
        path.append(weights.detach().double().numpy())
    return np.array(path)


@functools.cache
def shapes() -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network().named_parameters()}


def named(vector: np.ndarray, dtype: torch.dtype = torch.float32) -> Weights:
    found = {}
    begin = 0
    for name, shape in shapes().items():
        end = begin + shape.numel()
        part = torch.from_numpy(vector[begin:end].copy())
        found[name] = part.reshape(shape).to(dtype)
        begin = end
    return found


def by(decay: Callable[[int], float]) -> Average:
    """Return an EMA whose n-th update keeps decay(n)."""

    def update(
        step: int,
        average: np.ndarray,
        weights: np.ndarray,
    ) -> np.ndarray:
        kept = decay(step)
        return kept * average + (1 - kept) * weights

    return update


def ema(decay: float) -> Average:
    return by(lambda _: decay)


def ratio(n: float) -> float:
    return (1 + n) / (10 + n)


def follow(update: Average, weights: np.ndarray | None = None) -> np.ndarray:
    """Return an average that begins with the first weights after every step: [STEPS,
    parameters]."""
    weights = train() if weights is None else weights
    averages = [weights[0].copy()]
    for step, now in enumerate(weights, 1):
        averages.append(update(step, averages[-1], now))
    return np.array(averages[1:])


def timm(
    step: int,
    weights: Weights,
    average: Weights,
) -> dict[str, Any]:
    return {"state_dict": weights, "state_dict_ema": average, "step": step}


def write(
    folder: Path,
    weights: np.ndarray,
    update: Average,
    dtype: torch.dtype = torch.float32,
    form: Form = timm,
) -> Path:
    folder.mkdir(exist_ok=True)
    averages = follow(update, weights)
    for step in TIMES:
        now = named(weights[step - 1])
        average = named(averages[step - 1], dtype)
        content = form(step, now, average)
        torch.save(content, folder / f"step{step}.pt")
    return folder


def settings_of(run: Path) -> dict[str, Any]:
    """Return the settings in the manifest of an import."""
    manifest = run / "ema-import.json"
    settings: dict[str, Any] = json.loads(manifest.read_text())["settings"]
    return settings


def true_average(weights: np.ndarray, sigma_rel: float) -> np.ndarray:
    """Return the power function's sum over every step, in float64."""
    return exact_weights(sigma_rel, range(1, STEPS + 1)) @ weights


def error_of(
    run: Run,
    sigma_rel: float = 0.15,
    prefix: str = "",
    weights: np.ndarray | None = None,
) -> tuple[float, float]:
    """Return the relative distance of an average from the sum over every step in float64, and the
    predicted error."""
    made = run.average(sigma_rel, dtype="float64")
    tensors = [made[prefix + name] for name in shapes()]
    vector = np.concatenate([tensor.numpy().ravel() for tensor in tensors])
    truth = true_average(train() if weights is None else weights, sigma_rel)
    assert made.predicted_error is not None
    return relative_distance(vector, truth), made.predicted_error


def check(
    run: Run | Path,
    *of: float,
    most: float = 2e-3,
    low: float = 0.3,
    high: float = 2.5,
    **where: Any,
) -> None:
    """Check that an average is exact, and as exact as predicted: its error over the predicted one
    has bounds."""
    if isinstance(run, Path):
        run = Run(run)
    error, predicted = error_of(run, *of, **where)
    assert error < most
    assert low < error / predicted < high

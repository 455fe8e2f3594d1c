"""Small real training runs, recorded: the weights after every step.

What an average of weights is can only be checked against every one of the weights that it averages, and how
far a method is off depends on how a real optimizer moves. `record` trains a network of a few thousand
parameters on scikit-learn's digits in some seconds and keeps all of its path.

`RECIPES` says of each run in one sentence how it is made. They are chosen to move differently: rates that fall
slowly, steadily, in steps, late or never; paths that stay noisy to the end, stand still at it, or wander about a
place; a clock in images; an optimizer that forgets its state on the way. `PEER_RUNS` are the two that the
comparisons use, `HELD_OUT` those that no constant of a method may be chosen by.

The same name and number of steps give the same array on the same machine, whatever state the caller's random
numbers are in; neither that state nor the number of threads is changed.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import trained_networks as networks
from torch import nn

VERSION = 1
"""Part of a cached file's name: raise it with every change that moves a weight."""


@dataclass(frozen=True)
class Trajectory:
    """The path of one training run.

    Attributes:
        name: which run.
        weights: after every step, all parameters in the model's order: float32 [steps, parameters].
        shapes: of the parameters, in the same order.
        times: the run's clock after every step: 1, 2, ..., or the images seen so far: float64 [steps].
        t_unit: of that clock.
        restart: after how many steps a new optimizer began that knows nothing of the steps before; None is never.
    """

    name: str
    weights: npt.NDArray[np.float32]
    shapes: tuple[tuple[int, ...], ...]
    times: npt.NDArray[np.float64] = None  # type: ignore[assignment]  # set below: it is as long as the weights
    t_unit: str = "steps"
    restart: int | None = None

    def __post_init__(self) -> None:
        if self.times is None:
            object.__setattr__(self, "times", np.arange(1, self.steps + 1, dtype=np.float64))

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return int(self.weights.shape[0])


def record(name: str, steps: int = 10_000, cache: str | os.PathLike[str] | None = None) -> Trajectory:
    """Train the run `name` for `steps` steps, or read it from an earlier call's cache.

    Arguments:
        name: one of `NAMES`.
        steps: optimizer steps; the schedules of rate and batch size stretch with them.
        cache: a folder for recorded runs, made when missing; None trains anew and writes nothing.
    """
    recipe = RECIPES[name]
    restart = None if recipe.restart is None else math.ceil(recipe.restart * steps)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(recipe.seed)
        model = recipe.task.model()
        shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
        file = None if cache is None else Path(cache) / f"{name}-{steps}-v{VERSION}.npy"
        if file is not None and file.exists():
            weights = np.load(file, allow_pickle=False)
        else:
            weights = _train(model, recipe, steps, restart)
            if file is not None:
                _save(file, weights)
    return Trajectory(name, weights, shapes, _times(recipe, steps), recipe.t_unit, restart)


class Replay(nn.Module):
    """A module with the weights that the recorded model had after any step.

    Its parameters are ordinary ones, named "0", "1", ... in the recorded order.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__()
        for index, shape in enumerate(trajectory.shapes):
            self.register_parameter(str(index), nn.Parameter(torch.empty(shape)))
        self._weights = torch.from_numpy(trajectory.weights)
        self._sizes = [math.prod(shape) for shape in trajectory.shapes]
        self.go_to(0)

    def go_to(self, index: int) -> None:
        """Set the weights after step `index` + 1."""
        self.take(self._weights[index])

    def take(self, weights: torch.Tensor) -> None:
        """Set other weights, [parameters], in place, as an optimizer does."""
        with torch.no_grad():
            rows = torch.split(weights, self._sizes)
            for parameter, row in zip(self.parameters(), rows, strict=True):
                parameter.copy_(row.view_as(parameter))


# --- how a run is made -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Defines a run.

    What changes during training is a function of the fraction of training, in [0, 1), that a step starts at.

    Attributes:
        description: one sentence.
        task: network and loss.
        optimizer: over the network's parameters, at the highest learning rate.
        rate: learning rate, relative to the highest; by default constant.
        batch: images in a batch.
        t_unit: the run's clock, steps or images.
        restart: the fraction from which on a new optimizer knows nothing of the steps before; None is never.
        seed: of its random numbers; each has its own, so that no two share their batches.
    """

    description: str
    task: networks.Task
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    rate: Callable[[float], float] = lambda _: 1.0
    batch: Callable[[float], int] = lambda _: 64
    t_unit: str = "steps"
    restart: float | None = None
    seed: int = 2312


def _adam(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.Adam(model.parameters(), lr=rate)


def _adamw(rate: float, decay: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Make a fused AdamW: unfused, many small tensors cost as much as the network."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=True)


def _sgd(rate: float, momentum: float, decay: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)


def _warm_up(fraction: float, length: float = 0.05) -> float:
    """Rise linearly from 0 to 1. It is never 0, since such a step would change nothing."""
    return min(max(fraction / length, 1e-3), 1.0)


def _inverse_sqrt(fraction: float) -> float:
    """Stay constant for a twentieth of training, then fall as one over the square root of time."""
    return 1 / math.sqrt(max(20 * fraction, 1))


def _cuts(fraction: float) -> float:
    """Fall to a tenth after 60 % of training, to a hundredth after 85 %."""
    return 1.0 if fraction < 0.6 else 0.1 if fraction < 0.85 else 0.01


def _cosine(floor: float) -> Callable[[float], float]:
    """Warm up, then follow half a cosine wave down to `floor` over all of training."""
    return lambda fraction: _warm_up(fraction) * (floor + (1 - floor) * (1 + math.cos(math.pi * fraction)) / 2)


def _warm_up_stable_decay(fraction: float) -> float:
    """Warm up, stay constant until 80 % of training, then fall linearly to a hundredth."""
    return _warm_up(fraction) * min(1.0, 1 - 0.99 * (fraction - 0.8) / 0.2)


def _warm_up_again(fraction: float) -> float:
    """Warm up and fall as an inverse square root; start again at 60 % of training."""
    since = fraction if fraction < 0.6 else fraction - 0.6
    return _warm_up(since) * _inverse_sqrt(since)


def _growing_batch(fraction: float) -> int:
    """Grow fourfold at 40 % of training and again at 80 %."""
    return 16 if fraction < 0.4 else 64 if fraction < 0.8 else 256


# --- the runs --------------------------------------------------------------------------------------

RECIPES = {
    "denoiser-adam": Recipe(
        "A denoiser preconditioned for all noise levels, Adam, rate falling as one over the square root of time: "
        "the setting that post-hoc averaging was made for; noisy to the end.",
        networks.denoising(32),
        _adam(5e-3),
        _inverse_sqrt,
    ),
    "classifier-sgd": Recipe(
        "A classifier, SGD with momentum and weight decay, rate cut to a tenth at 60 % and 85 %: the path changes "
        "character at the cuts and nearly stands still after the last.",
        networks.classification(48),
        _sgd(0.05, 0.9, 5e-4),
        _cuts,
    ),
    "denoiser-constant": Recipe(
        "A denoiser, Adam, constant rate: as noisy at the end as at the start.",
        networks.denoising(32),
        _adam(3e-3),
        seed=2313,
    ),
    "denoiser-wsd": Recipe(
        "A denoiser, Adam, warm-up over 5 %, constant to 80 %, then linear to a hundredth: it settles late and fast.",
        networks.denoising(32),
        _adam(4e-3),
        _warm_up_stable_decay,
        seed=2314,
    ),
    "classifier-plain": Recipe(
        "A classifier, SGD without momentum, strong weight decay and constant rate: it is pulled back and wanders "
        "about one place, which no random walk does.",
        networks.classification(64),
        _sgd(0.2, 0.0, 1e-2),
        batch=lambda _: 16,
        seed=2315,
    ),
    "denoiser-cosine": Recipe(
        "A wider denoiser, AdamW, warm-up and cosine to a thousandth: the path slows down smoothly and stops.",
        networks.denoising(48),
        _adamw(5e-3, 0.01),
        _cosine(1e-3),
        seed=2316,
    ),
    "denoiser-restart": Recipe(
        "A denoiser, Adam, whose state is lost at 60 %, where the rate warms up again from zero: two runs in one.",
        networks.denoising(40),
        _adam(5e-3),
        _warm_up_again,
        restart=0.6,
        seed=2317,
    ),
    "classifier-images": Recipe(
        "A classifier on a clock in images, SGD with momentum at a constant rate, batches of 16, of 64 from 40 % of "
        "the steps, of 256 from 80 %: the last fifth of the steps is most of the time.",
        networks.classification(80),
        _sgd(0.02, 0.9, 5e-4),
        batch=_growing_batch,
        t_unit="images",
        seed=2318,
    ),
    "cnn-batch-norm": Recipe(
        "A convolutional classifier with batch norm, SGD with momentum and weight decay, rate cut to a tenth at 60 % "
        "and 85 %: weights whose size does not matter, next to scales and biases; running statistics are left out.",
        networks.convolutional_classification(),
        _sgd(0.1, 0.9, 5e-4),
        _cuts,
        batch=lambda _: 32,
        seed=2319,
    ),
    "transformer-adamw": Recipe(
        "A decoder-only transformer of two blocks on digits as tokens, AdamW with weight decay, warm-up and cosine "
        "to a tenth: embeddings, norms and matrices, of different sizes and speeds, in one vector.",
        networks.next_token(),
        _adamw(3e-3, 0.05),
        _cosine(0.1),
        batch=lambda _: 16,
        seed=2320,
    ),
}

NAMES = tuple(RECIPES)
"""All runs."""

PEER_RUNS = ("denoiser-adam", "classifier-sgd")
"""Runs that are compared with the peers and with the published method; the README quotes their figures."""

HELD_OUT = ("denoiser-cosine", "denoiser-restart", "classifier-images", "cnn-batch-norm", "transformer-adamw")
"""Runs by which no constant was chosen: the results on them are to be expected of a new run."""


# --- recording -------------------------------------------------------------------------------------


def _train(model: nn.Module, recipe: Recipe, steps: int, restart: int | None) -> npt.NDArray[np.float32]:
    """Train and record the weights after every step: [steps, parameters]."""
    # The parameters become views of one vector, so that a step is recorded by one copy.
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    weights = np.empty((steps, vector.numel()), dtype=np.float32)
    optimizer, loss = recipe.optimizer(model), recipe.task.loss()
    highest = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        if step == restart:
            optimizer = recipe.optimizer(model)
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * recipe.rate(step / steps)
        optimizer.zero_grad()
        loss(model, recipe.batch(step / steps)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        weights[step] = vector.numpy()
    return weights


def _times(recipe: Recipe, steps: int) -> npt.NDArray[np.float64]:
    """Return the clock after every step. It is not recorded, since the recipe determines it."""
    sizes = [recipe.batch(step / steps) if recipe.t_unit == "images" else 1 for step in range(steps)]
    return np.cumsum(sizes, dtype=np.float64)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread of torch in the block: faster for small networks, and the same sums on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(file: Path, weights: npt.NDArray[np.float32]) -> None:
    """Write under a temporary name first: another process may look for the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
        np.save(temporary, weights)
    Path(temporary.name).replace(file)

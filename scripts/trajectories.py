"""Small real training runs, recorded: the weights after every step.

How far a method is off depends on how a real optimizer moves. `record` trains a network of a few
thousand parameters on scikit-learn's digits in some seconds and keeps all of its path. The runs of
`RECIPES` are chosen to move differently: rates that fall slowly, steadily, in steps, late or never;
paths that stay noisy, stand still at the end, or wander about a place; a clock in images; an
optimizer that forgets its state on the way.

The same name and number of steps give the same array on the same machine, whatever state the
caller's random numbers are in; neither that state nor the number of threads is changed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tasks
import torch
from torch import Tensor
from torch.nn import Module, Parameter, utils
from torch.optim import SGD, Adam, AdamW, Optimizer

VERSION = 1
"""Part of a cached file's name: raise it with every change that moves a weight."""


@dataclass(frozen=True)
class Trajectory:
    """The path of one training run.

    Attributes:
        name: which run.
        weights: after every step, all parameters in the model's order: float32 [steps, parameters].
        shapes: of the parameters, in the same order.
        times: the run's clock after every step: 1, 2, ..., or the images seen so far: float64
            [steps].
        t_unit: of that clock.
        restart: after how many steps a new optimizer began that knows nothing of the steps before;
            None is never.
    """

    name: str
    weights: npt.NDArray[np.float32]
    shapes: tuple[tuple[int, ...], ...]
    times: npt.NDArray[np.float64]
    t_unit: str = "steps"
    restart: int | None = None

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return int(self.weights.shape[0])


def add_options(parser: argparse.ArgumentParser, steps: int, unit: int) -> None:
    """Add the options of scripts that record runs."""
    parser.add_argument(
        "--steps",
        type=int,
        default=steps,
        help=f"length of the runs, a multiple of {unit} ({steps})",
    )
    parser.add_argument("--cache", type=Path, help="folder to keep recorded runs in")


def step_clock(steps: int) -> npt.NDArray[np.float64]:
    """Return the times 1, 2, ..., of a run on a clock in steps."""
    return np.arange(1.0, steps + 1)


def record(name: str, steps: int, cache: Path | None = None) -> Trajectory:
    """Train the run `name` for `steps` steps, or read it from an earlier call's cache.

    Arguments:
        name: one of `NAMES`.
        steps: optimizer steps; the schedules of rate and batch size stretch with them.
        cache: a folder for recorded runs, made when missing; None trains anew and writes nothing.
    """
    recipe = RECIPES[name]
    restart = None
    if recipe.restart is not None:
        restart = math.ceil(recipe.restart * steps)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(recipe.seed)
        model = recipe.model()
        shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
        if cache is None:
            weights = _train(model, recipe, steps, restart)
        else:
            file = cache / f"{name}-{steps}-v{VERSION}.npy"
            if not file.exists():
                _save(file, _train(model, recipe, steps, restart))
            weights = np.load(file, allow_pickle=False)
    return Trajectory(name, weights, shapes, _times(recipe, steps), recipe.t_unit, restart)


class Replay(Module):
    """A module with the weights that the recorded model had after any step.

    Its parameters are ordinary ones, named "0", "1", ... in the recorded order.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__()
        for index, shape in enumerate(trajectory.shapes):
            parameter = Parameter(torch.empty(shape))
            self.register_parameter(str(index), parameter)
        self._weights = torch.from_numpy(trajectory.weights)
        self._sizes = [math.prod(shape) for shape in trajectory.shapes]
        self.go_to(0)

    def go_to(self, index: int) -> None:
        """Set the weights after step `index` + 1."""
        self.take(self._weights[index])

    @torch.no_grad()
    def take(self, weights: Tensor) -> None:
        """Set other weights, [parameters], in place, as an optimizer does."""
        rows = torch.split(weights, self._sizes)
        for parameter, row in zip(self.parameters(), rows, strict=True):
            parameter.copy_(row.view_as(parameter))


# --- how a run is made
# -----------------------------------------------------------------------------


MakeOptimizer = Callable[[Iterator[Parameter]], Optimizer]


@dataclass(frozen=True)
class Recipe:
    """Defines a run.

    What changes during training is a function of the fraction of training, in [0, 1), that a step
    starts at.

    Attributes:
        model: makes the network, its first weights drawn.
        loss: draws a batch of so many images and gives the network's mean loss on it.
        optimizer: over the network's parameters, at the highest learning rate.
        rate: learning rate, relative to the highest; by default constant.
        batch: images in a batch.
        t_unit: the run's clock, steps or images.
        restart: the fraction from which on a new optimizer knows nothing of the steps before; None
            is never.
        seed: of its random numbers; each has its own, so that no two share their batches.
    """

    model: Callable[[], Module]
    loss: Callable[[Module, int], Tensor]
    optimizer: MakeOptimizer
    rate: Callable[[float], float] = lambda _: 1.0
    batch: Callable[[float], int] = lambda _: 64
    t_unit: str = "steps"
    restart: float | None = None
    seed: int = 2312


def _adam(rate: float) -> MakeOptimizer:
    return partial(Adam, lr=rate)


def _adamw(rate: float, decay: float) -> MakeOptimizer:
    """Make a fused AdamW: unfused, many small tensors cost as much as the network."""
    return partial(AdamW, lr=rate, weight_decay=decay, fused=True)


def _sgd(rate: float, momentum: float, decay: float) -> MakeOptimizer:
    return partial(SGD, lr=rate, momentum=momentum, weight_decay=decay)


def _warm_up(fraction: float, length: float = 0.05) -> float:
    """Rise linearly from 0 to 1. It is never 0, since such a step would change nothing."""
    return min(max(fraction / length, 1e-3), 1.0)


def _inverse_sqrt(fraction: float) -> float:
    """Stay constant for a twentieth of training, then fall as one over the square root of time."""
    return 1 / math.sqrt(max(20 * fraction, 1))


def _cuts(fraction: float) -> float:
    """Fall to a tenth after 60 % of training, to a hundredth after 85 %."""
    if fraction < 0.6:
        return 1.0
    return 0.1 if fraction < 0.85 else 0.01


def _cosine(floor: float) -> Callable[[float], float]:
    """Warm up, then follow half a cosine wave down to `floor` over all of training."""

    def rate(fraction: float) -> float:
        wave = 1 + math.cos(math.pi * fraction)
        share = floor + (1 - floor) * wave / 2
        return _warm_up(fraction) * share

    return rate


def _warm_up_stable_decay(fraction: float) -> float:
    """Warm up, stay constant until 80 % of training, then fall linearly to a hundredth."""
    falling = 1 - 0.99 * (fraction - 0.8) / 0.2
    return _warm_up(fraction) * min(1.0, falling)


def _warm_up_again(fraction: float) -> float:
    """Warm up and fall as an inverse square root; start again at 60 % of training."""
    since = fraction if fraction < 0.6 else fraction - 0.6
    return _warm_up(since) * _inverse_sqrt(since)


def _growing_batch(fraction: float) -> int:
    """Grow fourfold at 40 % of training and again at 80 %."""
    if fraction < 0.4:
        return 16
    return 64 if fraction < 0.8 else 256


# --- the runs
# --------------------------------------------------------------------------------------

RECIPES = {
    # A denoiser preconditioned for all noise levels, Adam, rate falling as one over the square root
    # of time: the setting that post-hoc averaging was made for; noisy to the end.
    "denoiser-adam": Recipe(
        model=partial(tasks.denoiser, 32),
        loss=tasks.denoising_loss,
        optimizer=_adam(5e-3),
        rate=_inverse_sqrt,
    ),
    # A classifier, SGD with momentum and weight decay, rate cut to a tenth at 60 % and 85 %: the
    # path changes character at the cuts and nearly stands still after the last.
    "classifier-sgd": Recipe(
        model=partial(tasks.classifier, 48),
        loss=tasks.classification_loss,
        optimizer=_sgd(0.05, 0.9, 5e-4),
        rate=_cuts,
    ),
    # A denoiser, Adam, constant rate: as noisy at the end as at the start.
    "denoiser-constant": Recipe(
        model=partial(tasks.denoiser, 32),
        loss=tasks.denoising_loss,
        optimizer=_adam(3e-3),
        seed=2313,
    ),
    # A denoiser, Adam, warm-up over 5 %, constant to 80 %, then linear to a hundredth: it settles
    # late and fast.
    "denoiser-wsd": Recipe(
        model=partial(tasks.denoiser, 32),
        loss=tasks.denoising_loss,
        optimizer=_adam(4e-3),
        rate=_warm_up_stable_decay,
        seed=2314,
    ),
    # A classifier, SGD without momentum, strong weight decay and constant rate: it is pulled back
    # and wanders about one place, which no random walk does.
    "classifier-plain": Recipe(
        model=partial(tasks.classifier, 64),
        loss=tasks.classification_loss,
        optimizer=_sgd(0.2, 0.0, 1e-2),
        batch=lambda _: 16,
        seed=2315,
    ),
    # A wider denoiser, AdamW, warm-up and cosine to a thousandth: the path slows down smoothly and
    # stops.
    "denoiser-cosine": Recipe(
        model=partial(tasks.denoiser, 48),
        loss=tasks.denoising_loss,
        optimizer=_adamw(5e-3, 0.01),
        rate=_cosine(1e-3),
        seed=2316,
    ),
    # A denoiser, Adam, whose state is lost at 60 %, where the rate warms up again from zero: two
    # runs in one.
    "denoiser-restart": Recipe(
        model=partial(tasks.denoiser, 40),
        loss=tasks.denoising_loss,
        optimizer=_adam(5e-3),
        rate=_warm_up_again,
        restart=0.6,
        seed=2317,
    ),
    # A classifier on a clock in images, SGD with momentum at a constant rate, batches of 16, of 64
    # from 40 % of the steps, of 256 from 80 %: the last fifth of the steps is most of the time.
    "classifier-images": Recipe(
        model=partial(tasks.classifier, 80),
        loss=tasks.classification_loss,
        optimizer=_sgd(0.02, 0.9, 5e-4),
        batch=_growing_batch,
        t_unit="images",
        seed=2318,
    ),
    # A convolutional classifier with batch norm, SGD with momentum and weight decay, rate cut to a
    # tenth at 60 % and 85 %: weights whose size does not matter, next to scales and biases; running
    # statistics are left out.
    "cnn-batch-norm": Recipe(
        model=tasks.convolutional_classifier,
        loss=tasks.classification_loss,
        optimizer=_sgd(0.1, 0.9, 5e-4),
        rate=_cuts,
        batch=lambda _: 32,
        seed=2319,
    ),
    # A decoder-only transformer of two blocks on digits as tokens, AdamW with weight decay, warm-up
    # and cosine to a tenth: embeddings, norms and matrices, of different sizes and speeds, in one
    # vector.
    "transformer-adamw": Recipe(
        model=tasks.Transformer,
        loss=tasks.next_token_loss,
        optimizer=_adamw(3e-3, 0.05),
        rate=_cosine(0.1),
        batch=lambda _: 16,
        seed=2320,
    ),
}

NAMES = tuple(RECIPES)
"""All runs."""

PEER_RUNS = ("denoiser-adam", "classifier-sgd")
"""Runs that are compared with the peers and with the published method; the README quotes their
figures."""

HELD_OUT = (
    "denoiser-cosine",
    "denoiser-restart",
    "classifier-images",
    "cnn-batch-norm",
    "transformer-adamw",
)
"""Runs by which no constant was chosen: the results on them are to be expected of a new run."""


# --- recording
# -------------------------------------------------------------------------------------


def _train(
    model: Module,
    recipe: Recipe,
    steps: int,
    restart: int | None,
) -> npt.NDArray[np.float32]:
    """Train and record the weights after every step: [steps, parameters]."""
    # The parameters become views of one vector, so that a step is recorded by one copy.
    vector = utils.parameters_to_vector(model.parameters()).detach()
    utils.vector_to_parameters(vector, model.parameters())
    weights = np.empty((steps, vector.numel()), dtype=np.float32)
    optimizer = recipe.optimizer(model.parameters())
    for step in range(steps):
        if step == restart:
            optimizer = recipe.optimizer(model.parameters())
        fraction = step / steps
        loss = recipe.loss(model, recipe.batch(fraction))
        tasks.descend(optimizer, loss, recipe.rate(fraction))
        weights[step] = vector.numpy()
    return weights


def _times(recipe: Recipe, steps: int) -> npt.NDArray[np.float64]:
    """Return the clock after every step. It is not recorded, since the recipe determines it."""
    if recipe.t_unit != "images":
        return step_clock(steps)
    sizes = [recipe.batch(step / steps) for step in range(steps)]
    return np.cumsum(sizes, dtype=np.float64)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread of torch in the block: faster for small networks, and the same sums on every
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(file: Path, weights: npt.NDArray[np.float32]) -> None:
    """Write under a temporary name first: another process may look for the same file."""
    folder = file.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as temporary:
        np.save(temporary, weights)
    Path(temporary.name).replace(file)

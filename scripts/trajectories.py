"""Small real training runs, recorded: the weights after every step.

How far a method is off depends on how a real optimizer moves. `record` trains a network of a few
thousand parameters on scikit-learn's digits in some seconds and keeps all of its path. The runs of
`RECIPES` are chosen to move differently: rates that fall slowly, steadily, in steps, late or never;
paths that stay noisy, stand still at the end, or wander about a place; batches that grow; an
optimizer that forgets its state on the way.

The same name and number of steps give the same array on the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import tasks
import torch
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList, utils
from torch.optim import SGD, Adam, AdamW, Optimizer


@dataclass(frozen=True)
class Trajectory:
    """The path of one training run.

    Attributes:
        weights: after every step, all parameters in the model's order: float32 [steps, parameters].
        shapes: of the parameters, in the same order.
    """

    weights: npt.NDArray[np.float32]
    shapes: list[tuple[int, ...]]

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return len(self.weights)


def record(name: str, steps: int) -> Trajectory:
    """Train one of `RECIPES`; its schedules of rate and batch size stretch with the steps.

    Torch's random numbers are seeded, and it uses one thread from then on: faster for small
    networks, and the same sums on every machine.
    """
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    model = recipe.model()
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    # The parameters become views of one vector, so that a step is recorded by one copy.
    vector = utils.parameters_to_vector(model.parameters()).detach()
    utils.vector_to_parameters(vector, model.parameters())
    weights = np.empty((steps, vector.numel()), dtype=np.float32)
    optimizer = recipe.optimizer(model.parameters())
    for step in range(steps):
        if step == math.ceil(recipe.restart * steps):
            optimizer = recipe.optimizer(model.parameters())
        fraction = step / steps
        loss = recipe.loss(model, recipe.batch(fraction))
        tasks.descend(optimizer, loss, recipe.rate(fraction))
        weights[step] = vector.numpy()
    return Trajectory(weights, shapes)


class Replay(ParameterList):
    """A module with the weights that the recorded model had after any step.

    Its parameters are named "0", "1", ... in the recorded order.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        super().__init__(torch.empty(shape) for shape in trajectory.shapes)
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
        restart: the fraction from which on a new optimizer knows nothing of the steps before; the
            end is never.
        seed: of its random numbers; each has its own, so that no two share their batches.
    """

    model: Callable[[], Module]
    loss: Callable[[Module, int], Tensor]
    optimizer: Callable[[Iterator[Parameter]], Optimizer]
    rate: Callable[[float], float] = lambda _: 1.0
    batch: Callable[[float], int] = lambda _: 64
    restart: float = 1.0
    seed: int = 2312


def _warm_up(fraction: float) -> float:
    """Rise linearly from 0 to 1 in a twentieth of training. It is never 0, since such a step would
    change nothing."""
    return min(max(fraction / 0.05, 1e-3), 1.0)


def _inverse_sqrt(fraction: float) -> float:
    """Stay constant for a twentieth of training, then fall as one over the square root of time."""
    return 1 / math.sqrt(max(20 * fraction, 1))


def cuts(fraction: float) -> float:
    """Fall to a tenth after 60 % of training, to a hundredth after 85 %."""
    if fraction < 0.6:
        return 1.0
    return 0.1 if fraction < 0.85 else 0.01


def _cosine(floor: float) -> Callable[[float], float]:
    """Warm up, then follow half a cosine wave down to `floor` over all of training."""

    def rate(fraction: float) -> float:
        share = floor + (1 - floor) * tasks.half_wave(fraction)
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
        tasks.denoiser,
        tasks.denoising_loss,
        partial(Adam, lr=5e-3),
        rate=_inverse_sqrt,
    ),
    # A classifier, SGD with momentum and weight decay, rate cut to a tenth at 60 % and 85 %: the
    # path changes character at the cuts and nearly stands still after the last.
    "classifier-sgd": Recipe(
        partial(tasks.classifier, 48),
        tasks.classification_loss,
        partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        rate=cuts,
    ),
    # A denoiser, Adam, constant rate: as noisy at the end as at the start.
    "denoiser-constant": Recipe(
        tasks.denoiser,
        tasks.denoising_loss,
        partial(Adam, lr=3e-3),
        seed=2313,
    ),
    # A denoiser, Adam, warm-up over 5 %, constant to 80 %, then linear to a hundredth: it settles
    # late and fast.
    "denoiser-wsd": Recipe(
        tasks.denoiser,
        tasks.denoising_loss,
        partial(Adam, lr=4e-3),
        rate=_warm_up_stable_decay,
        seed=2314,
    ),
    # A classifier, SGD without momentum, strong weight decay and constant rate: it is pulled back
    # and wanders about one place, which no random walk does.
    "classifier-plain": Recipe(
        partial(tasks.classifier, 64),
        tasks.classification_loss,
        partial(SGD, lr=0.2, weight_decay=1e-2),
        batch=lambda _: 16,
        seed=2315,
    ),
    # A wider denoiser, AdamW, warm-up and cosine to a thousandth: the path slows down smoothly and
    # stops.
    "denoiser-cosine": Recipe(
        partial(tasks.denoiser, 48),
        tasks.denoising_loss,
        partial(AdamW, lr=5e-3, weight_decay=0.01, fused=True),
        rate=_cosine(1e-3),
        seed=2316,
    ),
    # A denoiser, Adam, whose state is lost at 60 %, where the rate warms up again from zero: two
    # runs in one.
    "denoiser-restart": Recipe(
        partial(tasks.denoiser, 40),
        tasks.denoising_loss,
        partial(Adam, lr=5e-3),
        rate=_warm_up_again,
        restart=0.6,
        seed=2317,
    ),
    # A classifier, SGD with momentum at a constant rate, batches of 16, of 64 from 40 % of the
    # steps, of 256 from 80 %: less and less noise.
    "classifier-images": Recipe(
        partial(tasks.classifier, 80),
        tasks.classification_loss,
        partial(SGD, lr=0.02, momentum=0.9, weight_decay=5e-4),
        batch=_growing_batch,
        seed=2318,
    ),
    # A convolutional classifier with batch norm, SGD with momentum and weight decay, rate cut to a
    # tenth at 60 % and 85 %: weights whose size does not matter, next to scales and biases; running
    # statistics are left out.
    "cnn-batch-norm": Recipe(
        tasks.convolutional_classifier,
        tasks.classification_loss,
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        rate=cuts,
        batch=lambda _: 32,
        seed=2319,
    ),
    # A decoder-only transformer of two blocks on digits as tokens, AdamW with weight decay, warm-up
    # and cosine to a tenth: embeddings, norms and matrices, of different sizes and speeds, in one
    # vector.
    "transformer-adamw": Recipe(
        tasks.Transformer,
        tasks.next_token_loss,
        partial(AdamW, lr=3e-3, weight_decay=0.05, fused=True),
        rate=_cosine(0.1),
        batch=lambda _: 16,
        seed=2320,
    ),
}

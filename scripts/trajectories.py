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

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
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
        times: the run's clock after every step: 1, 2, ..., or the images seen so far: float64
            [steps].
        t_unit: of that clock.
        restart: after how many steps a new optimizer began that knows nothing of the steps before;
            None is never.
    """

    name: str
    weights: npt.NDArray[np.float32]
    shapes: tuple[tuple[int, ...], ...]
    times: npt.NDArray[np.float64] = None  # type: ignore[assignment]  # set below: it is as long as the weights
    t_unit: str = "steps"
    restart: int | None = None

    def __post_init__(self) -> None:
        if self.times is None:
            times = np.arange(1.0, self.steps + 1)
            object.__setattr__(self, "times", times)

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return int(self.weights.shape[0])


def record(
    name: str,
    steps: int = 10_000,
    cache: str | os.PathLike[str] | None = None,
) -> Trajectory:
    """Train the run `name` for `steps` steps, or read it from an earlier call's cache.

    Arguments:
        name: one of `NAMES`.
        steps: optimizer steps; the schedules of rate and batch size stretch with them.
        cache: a folder for recorded runs, made when missing; None trains anew and writes nothing.
    """
    recipe = RECIPES[name]
    restart = None if recipe.restart is None else math.ceil(recipe.restart * steps)
    with torch.random.fork_rng(devices=[]), one_thread():
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


# --- networks
# --------------------------------------------------------------------------------------

Loss = Callable[[nn.Module, int], torch.Tensor]
"""Draws a batch of so many images and gives the network's mean loss on it."""


@dataclass(frozen=True)
class Task:
    """Functions that build a network, its first weights drawn, and its loss, its images read."""

    model: Callable[[], nn.Module]
    loss: Callable[[], Loss]


SIDE = 8
"""Pixels in a row, and rows in an image."""

CLASSES = 10

PIXELS = 16
"""Tokens that stand for two neighbouring pixels of four levels each; those from here on stand for a
label."""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the standardised images, [images, 64], and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    standardised = (images - 4.9) / 6.0
    return torch.tensor(standardised, dtype=torch.float32), torch.tensor(labels)


# --- a denoiser
# ------------------------------------------------------------------------------------


def denoising(width: int) -> Task:
    """Make the task of removing Gaussian noise of any level: 5,280 parameters at width 32."""
    return Task(partial(_denoiser, width), _denoising_loss)


def _denoiser(width: int) -> nn.Module:
    """Make a network from a scaled noisy image and its noise level, [batch, 65], to [batch, 64]."""
    return nn.Sequential(
        nn.Linear(65, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, SIDE * SIDE),
    )


def _denoising_loss() -> Loss:
    """Make the loss: log-normal noise levels; input, target and weighting have variance 1 at every
    level."""
    images, _ = digits()

    def loss(model: nn.Module, size: int) -> torch.Tensor:
        chosen = torch.randint(len(images), (size,))
        clean = images[chosen]
        level = torch.exp(1.2 * torch.randn(size, 1) - 0.8)
        noisy = clean + level * torch.randn_like(clean)
        scale = torch.sqrt(level**2 + 1)
        given = torch.cat([noisy / scale, torch.log(level) / 4], dim=1)
        guess = model(given)
        # The best linear guess is noisy / scale**2; the network learns what is left of it, in units
        # of its size.
        left = clean - noisy / scale**2
        target = left * scale / level
        return nn.functional.mse_loss(guess, target)

    return loss


# --- two classifiers
# -------------------------------------------------------------------------------


def classification(width: int) -> Task:
    """Make the task of classifying digits: 3,610 parameters at width 48."""
    return Task(partial(_classifier, width), _classification_loss)


def convolutional_classification() -> Task:
    """Make the same task with two convolutions and batch norm: 4,942 parameters with its weights
    and biases."""
    return Task(_convolutional_classifier, _classification_loss)


def _classifier(width: int) -> nn.Module:
    """Make a network from an image, [batch, 64], to the logits of 10 classes."""
    return nn.Sequential(
        nn.Linear(SIDE * SIDE, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def _convolutional_classifier() -> nn.Module:
    """Make a convolutional network from an image, [batch, 64], to the logits of 10 classes."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, CLASSES),
    )


def _classification_loss() -> Loss:
    """Make the loss: cross-entropy on noisy images. Without noise the gradient would soon
    vanish."""
    images, labels = digits()

    def loss(model: nn.Module, size: int) -> torch.Tensor:
        chosen = torch.randint(len(images), (size,))
        clean = images[chosen]
        noisy = clean + 0.7 * torch.randn_like(clean)
        return nn.functional.cross_entropy(model(noisy), labels[chosen])

    return loss


# --- a transformer
# ---------------------------------------------------------------------------------


def next_token() -> Task:
    """Make the task of predicting the pixels of a digit from its label, two pixels a token: 7,792
    parameters."""
    return Task(_Transformer, _next_token_loss)


def digit_sequences() -> torch.Tensor:
    """Return each digit as tokens, [images, 33]: its label, then its pixels in reading order, two
    to a token.

    Two to a token because the time of a step grows with the length; four levels keep the vocabulary
    at 16.
    """
    images, labels = digits()
    pixels = (images * 6.0 + 4.9).round()  # whole numbers from 0 to 16
    levels = (pixels / 17 * 4).long()
    pairs = 4 * levels[:, ::2] + levels[:, 1::2]
    first = PIXELS + labels[:, None]
    return torch.cat([first, pairs], dim=1)


class _Block(nn.Module):
    """Causal attention with two heads, then an MLP, each with layer norm before and a residual
    connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mixed_in = nn.Linear(width, 3 * width)
        self.mixed_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, [batch, tokens, width], to states of the same shape."""
        mixed = self.mixed_in(self.attention_norm(states))
        parts = mixed.unflatten(2, (3, 2, -1))  # three parts, two heads
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined = seen.transpose(1, 2).flatten(2)
        states = states + self.mixed_out(joined)
        changed: torch.Tensor = states + self.mlp(self.mlp_norm(states))
        return changed


class _Transformer(nn.Module):
    """A transformer from tokens, [batch, 32], to the logits of the next tokens, [batch, 32, 16]."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(PIXELS + CLASSES, width)
        length = SIDE * SIDE // 2
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        layers = [_Block(width) for _ in range(blocks)]
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, PIXELS)
        nn.init.normal_(self.token.weight, std=0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the logits at all positions; none depends on a later token."""
        states = self.token(tokens) + self.place
        changed = self.norm(self.blocks(states))
        logits: torch.Tensor = self.logits(changed)
        return logits


def _next_token_loss() -> Loss:
    """Make the loss: cross-entropy of each pair of pixels given the label and all earlier pairs."""
    sequences = digit_sequences()

    def loss(model: nn.Module, size: int) -> torch.Tensor:
        indices = torch.randint(len(sequences), (size,))
        chosen = sequences[indices]
        logits = model(chosen[:, :-1]).flatten(0, 1)
        following = chosen[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, following)

    return loss


# --- how a run is made
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Defines a run.

    What changes during training is a function of the fraction of training, in [0, 1), that a step
    starts at.

    Attributes:
        task: network and loss.
        optimizer: over the network's parameters, at the highest learning rate.
        rate: learning rate, relative to the highest; by default constant.
        batch: images in a batch.
        t_unit: the run's clock, steps or images.
        restart: the fraction from which on a new optimizer knows nothing of the steps before; None
            is never.
        seed: of its random numbers; each has its own, so that no two share their batches.
    """

    task: Task
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
    return lambda model: torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=decay, fused=True
    )


def _sgd(
    rate: float,
    momentum: float,
    decay: float,
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(
        model.parameters(), lr=rate, momentum=momentum, weight_decay=decay
    )


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
        return _warm_up(fraction) * (floor + (1 - floor) * wave / 2)

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
    "denoiser-adam": Recipe(denoising(32), _adam(5e-3), _inverse_sqrt),
    # A classifier, SGD with momentum and weight decay, rate cut to a tenth at 60 % and 85 %: the
    # path changes character at the cuts and nearly stands still after the last.
    "classifier-sgd": Recipe(classification(48), _sgd(0.05, 0.9, 5e-4), _cuts),
    # A denoiser, Adam, constant rate: as noisy at the end as at the start.
    "denoiser-constant": Recipe(denoising(32), _adam(3e-3), seed=2313),
    # A denoiser, Adam, warm-up over 5 %, constant to 80 %, then linear to a hundredth: it settles
    # late and fast.
    "denoiser-wsd": Recipe(denoising(32), _adam(4e-3), _warm_up_stable_decay, seed=2314),
    # A classifier, SGD without momentum, strong weight decay and constant rate: it is pulled back
    # and wanders about one place, which no random walk does.
    "classifier-plain": Recipe(
        classification(64), _sgd(0.2, 0.0, 1e-2), batch=lambda _: 16, seed=2315
    ),
    # A wider denoiser, AdamW, warm-up and cosine to a thousandth: the path slows down smoothly and
    # stops.
    "denoiser-cosine": Recipe(denoising(48), _adamw(5e-3, 0.01), _cosine(1e-3), seed=2316),
    # A denoiser, Adam, whose state is lost at 60 %, where the rate warms up again from zero: two
    # runs in one.
    "denoiser-restart": Recipe(denoising(40), _adam(5e-3), _warm_up_again, restart=0.6, seed=2317),
    # A classifier on a clock in images, SGD with momentum at a constant rate, batches of 16, of 64
    # from 40 % of the steps, of 256 from 80 %: the last fifth of the steps is most of the time.
    "classifier-images": Recipe(
        classification(80), _sgd(0.02, 0.9, 5e-4), batch=_growing_batch, t_unit="images", seed=2318
    ),
    # A convolutional classifier with batch norm, SGD with momentum and weight decay, rate cut to a
    # tenth at 60 % and 85 %: weights whose size does not matter, next to scales and biases; running
    # statistics are left out.
    "cnn-batch-norm": Recipe(
        convolutional_classification(), _sgd(0.1, 0.9, 5e-4), _cuts, batch=lambda _: 32, seed=2319
    ),
    # A decoder-only transformer of two blocks on digits as tokens, AdamW with weight decay, warm-up
    # and cosine to a tenth: embeddings, norms and matrices, of different sizes and speeds, in one
    # vector.
    "transformer-adamw": Recipe(
        next_token(), _adamw(3e-3, 0.05), _cosine(0.1), batch=lambda _: 16, seed=2320
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
    model: nn.Module,
    recipe: Recipe,
    steps: int,
    restart: int | None,
) -> npt.NDArray[np.float32]:
    """Train and record the weights after every step: [steps, parameters]."""
    # The parameters become views of one vector, so that a step is recorded by one copy.
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    weights = np.empty((steps, vector.numel()), dtype=np.float32)
    optimizer = recipe.optimizer(model)
    loss = recipe.task.loss()
    highest = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        if step == restart:
            optimizer = recipe.optimizer(model)
        fraction = step / steps
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * recipe.rate(fraction)
        optimizer.zero_grad()
        error = loss(model, recipe.batch(fraction))
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        weights[step] = vector.numpy()
    return weights


def _times(recipe: Recipe, steps: int) -> npt.NDArray[np.float64]:
    """Return the clock after every step. It is not recorded, since the recipe determines it."""
    if recipe.t_unit != "images":
        return np.arange(1.0, steps + 1)
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

"""Small real training runs, recorded: the weights after every step.

What an average of weights is can only be checked against every one of the weights that it averages, and how
far a method is off depends on how a real optimizer moves. `record` trains a network of a few thousand
parameters on scikit-learn's digits in some seconds and keeps all of its path. Two runs, chosen to move
differently:

`denoiser-adam`
    A denoiser of 8x8 images preconditioned for all noise levels, Adam, learning rate falling as one over the
    square root of time: the setting that post-hoc averaging was made for. Its path stays noisy to the end.
`classifier-sgd`
    A classifier with SGD, momentum and weight decay, learning rate cut to a tenth twice: the path changes
    character at the cuts and nearly stands still after the last.

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
from torch import nn

VERSION = 1
"""Part of a cached file's name: raise it with every change that moves a weight."""

_SEED = 2312


@dataclass(frozen=True)
class Trajectory:
    """The path of one training run.

    Attributes:
        name: which run.
        weights: after every step, all parameters in the model's order: float32 [steps, parameters].
        shapes: of the parameters, in the same order.
    """

    name: str
    weights: npt.NDArray[np.float32]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return int(self.weights.shape[0])


def record(name: str, steps: int = 10_000, cache: str | os.PathLike[str] | None = None) -> Trajectory:
    """Train the run `name` for `steps` steps, or read it from an earlier call's cache.

    Arguments:
        name: one of `NAMES`.
        steps: optimizer steps; the learning rate's schedule stretches with them.
        cache: a folder for recorded runs, made when missing; None trains anew and writes nothing.

    Raises:
        ValueError: no such run, or less than one step.
    """
    if name not in _RECIPES:
        raise ValueError(f"{name!r}: no such run; choose from {', '.join(NAMES)}")
    if steps < 1:
        raise ValueError(f"steps {steps}: must be at least 1")
    recipe = _RECIPES[name]
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(_SEED)
        model = recipe.model()
        shapes = tuple(tuple(parameter.shape) for parameter in model.parameters())
        if cache is None:
            return Trajectory(name, _train(model, recipe, steps), shapes)
        file = Path(cache) / f"{name}-{steps}-v{VERSION}.npy"
        if not file.exists():
            _save(file, _train(model, recipe, steps))
        return Trajectory(name, np.load(file, allow_pickle=False), shapes)


class Replay(nn.Module):
    """A module that stands where the recorded model stood after any step.

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
        """Take the weights after step `index` + 1, in place as an optimizer does."""
        with torch.no_grad():
            rows = torch.split(self._weights[index], self._sizes)
            for parameter, row in zip(self.parameters(), rows, strict=True):
                parameter.copy_(row.view_as(parameter))


# --- the runs --------------------------------------------------------------------------------------

Loss = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True)
class _Recipe:
    """How a run is made.

    Attributes:
        model: builds the network; draws from the global random numbers.
        loss: builds the function that draws a batch and gives its loss.
        optimizer: over the network's parameters, at the highest learning rate.
        rate: learning rate at a fraction of training in [0, 1), relative to the highest.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[], Loss]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    rate: Callable[[float], float]


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 images, standardised, [images, 64], and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor((images - 4.9) / 6.0, dtype=torch.float32), torch.tensor(labels)


def _denoiser() -> nn.Module:
    """From a scaled noisy image and its noise level, [batch, 65], to [batch, 64]: 5,280 parameters."""
    return nn.Sequential(nn.Linear(65, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 64))


def _denoising_loss() -> Loss:
    """Log-normal noise levels; input, target and their weights scaled to variance 1 at every level."""
    images, _ = _digits()

    def loss(model: nn.Module) -> torch.Tensor:
        clean = images[torch.randint(len(images), (64,))]
        level = torch.exp(1.2 * torch.randn(len(clean), 1) - 0.8)
        noisy = clean + level * torch.randn_like(clean)
        scale = torch.sqrt(level**2 + 1)
        guess = model(torch.cat([noisy / scale, torch.log(level) / 4], dim=1))
        # The best linear guess is noisy / scale**2; the network learns what is left of it, in units of its size.
        target = (clean - noisy / scale**2) * scale / level
        return nn.functional.mse_loss(guess, target)

    return loss


def _classifier() -> nn.Module:
    """From an image, [batch, 64], to the logits of 10 classes: 3,610 parameters."""
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def _classification_loss() -> Loss:
    """Cross-entropy on noisy images: without the noise the gradient would soon vanish."""
    images, labels = _digits()

    def loss(model: nn.Module) -> torch.Tensor:
        chosen = torch.randint(len(images), (64,))
        noisy = images[chosen] + 0.7 * torch.randn(64, images.shape[1])
        return nn.functional.cross_entropy(model(noisy), labels[chosen])

    return loss


def _inverse_sqrt(fraction: float) -> float:
    """Constant for a twentieth of training, then falling as one over the square root of time."""
    return 1 / math.sqrt(max(20 * fraction, 1))


def _cuts(fraction: float) -> float:
    """A tenth after 60 % of training, a hundredth after 85 %."""
    return 1.0 if fraction < 0.6 else 0.1 if fraction < 0.85 else 0.01


_RECIPES = {
    "denoiser-adam": _Recipe(
        _denoiser,
        _denoising_loss,
        lambda model: torch.optim.Adam(model.parameters(), lr=5e-3),
        _inverse_sqrt,
    ),
    "classifier-sgd": _Recipe(
        _classifier,
        _classification_loss,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
        _cuts,
    ),
}

NAMES = tuple(_RECIPES)
"""The runs there are."""


# --- recording -------------------------------------------------------------------------------------


def _train(model: nn.Module, recipe: _Recipe, steps: int) -> npt.NDArray[np.float32]:
    """Train and copy the weights out after every step: [steps, parameters]."""
    # The parameters become views of one vector, so that a step is recorded by one copy.
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector, model.parameters())
    weights = np.empty((steps, vector.numel()), dtype=np.float32)
    optimizer, loss = recipe.optimizer(model), recipe.loss()
    highest = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * recipe.rate(step / steps)
        optimizer.zero_grad()
        loss(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        weights[step] = vector.numpy()
    return weights


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: faster for networks this small, and the same sums on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(file: Path, weights: npt.NDArray[np.float32]) -> None:
    """Write under another name first: another process may be looking for the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
        np.save(temporary, weights)
    Path(temporary.name).replace(file)

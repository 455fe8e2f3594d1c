"""The demo from end to end: train, search the best length, write that average and a page with
samples. Printing is up to the caller.

It trains a small diffusion model on made-up data, after Karras et al., arXiv 2206.00364, table 1: a
network F with preconditioning is the denoiser

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)),

trained on images with added noise of standard deviation `sigma`, which there is never the width of
an average."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from posthoc_cli import files, plots
from posthoc_cli.errors import InvalidValueError, OutputExistsError
from posthoc_cli.report.page import PAGE, render
from posthoc_cli.resources import ProgressBar
from posthoc_cli.run import Run
from posthoc_cli.sweep import SweepReport, images
from posthoc_cli.tracker import PostHocEMA

Say = Callable[[str], None]  # prints a line

IMAGES = 1400
VALIDATION_IMAGES = 360

TRACKED = (0.05, 0.28)
SIGMA_RELS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28)
"""The lengths to measure, with the tracked ones among them."""


def free_folder() -> Path:
    """Find the first of ema-demo, ema-demo-2, ... that does not exist."""
    folder = Path("ema-demo")
    for number in itertools.count(2):
        if not folder.exists():
            break
        folder = Path(f"ema-demo-{number}")
    return folder


def run(
    out: Path,
    steps: int,
    say: Say,
    watch: ProgressBar,
) -> dict[str, Any]:
    """Train a small diffusion model with the hook, and choose the length of its average afterwards.

    `out` is a new or empty folder, `steps` a multiple of 100; `watch` opens a progress bar of the
    steps. Returns the results as data for JSON.
    """
    started = time.perf_counter()
    if steps < 100 or steps % 100:
        raise InvalidValueError("steps", "must be a multiple of 100, at least 100", value=steps)
    _make_empty(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for so small a network, and the same sums on every machine
    try:
        report = _train_and_search(out, steps, say, watch)
    finally:
        torch.set_num_threads(threads)
    last, *measured = report.trials
    averages = [trial for trial in measured if trial.seed == 0]
    return {
        "out": str(out),
        "steps": steps,
        "tracked": list(TRACKED),
        "raw": last.value,
        "averages": [{"sigma_rel": trial.sigma_rel, "loss": trial.value} for trial in averages],
        "best": report.best,
        "files": list(map(str, sorted(out.iterdir()))),
        "seconds": time.perf_counter() - started,
    }


def _make_empty(out: Path) -> None:
    files.check_parent(out)
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty:
        raise OutputExistsError(out, "exists, and is not an empty folder", "name another one")
    files.make_directory(out)


def _train_and_search(
    out: Path,
    steps: int,
    say: Say,
    watch: ProgressBar,
) -> SweepReport:
    """Train, measure lengths, and write the best average and the page with samples."""
    snapshots = out / "snapshots"
    every = checkpoint_every(steps)
    say(f"training a diffusion model on {IMAGES:,} made-up images, {steps:,} steps; the hook")
    say(f"updates two averages every {UPDATE_EVERY} steps and writes snapshots of both every")
    say(f"{every:,} steps to {snapshots}")
    with watch("training", steps) as advance:
        model = train(steps, make_waves(IMAGES, seed=0), snapshots, advance)
    say(f"measuring {len(SIGMA_RELS)} averages and the last weights on images that training")
    say("never saw")
    run = Run(snapshots)
    report = _search(model, run)
    best = out / "best.safetensors"
    run.write(report.estimate.best, best)
    report = replace(report, outputs=(best,))
    report.write(out / "sweep")
    _draw_samples(model, run, report, out / "sweep")
    page = render(report, out / "sweep")
    files.write_atomically(out / PAGE, page.encode())
    return report


def _search(model: Denoiser, run: Run) -> SweepReport:
    """Measure the loss of the last weights, which the model has, and of averages."""
    data = make_waves(VALIDATION_IMAGES, seed=1)
    validation = Validation(data, seed=0, draws=16)
    averaged = make_denoiser(seed=0)

    def measure(weights: dict[str, torch.Tensor]) -> float:
        averaged.load_state_dict(weights)
        return float(validation(averaged).mean())

    raw = model.state_dict()
    return run.sweep(
        measure, minimize=True, metric="validation loss", sigma_rels=SIGMA_RELS, raw=raw
    )


# --- samples
# ----------------------------------------------------------------------------------------

DRAWN_CLASSES = 8
SAMPLER_STEPS = 18
LOWEST_NOISE = 0.002
HIGHEST_NOISE = 20.0
RHO = 7
"""Of arXiv 2206.00364, table 1, but for the highest: training sees no noise above 20."""
_SCALE = 8  # pixels of a picture a pixel of a sample


@torch.no_grad()
def sample(
    model: nn.Module,
    labels: torch.Tensor,
    seed: int,
) -> torch.Tensor:
    """Draw an image of each class, shape [classes, 64], by Heun's method: arXiv 2206.00364,
    algorithm 1."""
    ramp = torch.linspace(1, 0, SAMPLER_STEPS)
    highest = HIGHEST_NOISE ** (1 / RHO)
    lowest = LOWEST_NOISE ** (1 / RHO)
    levels = (lowest + ramp * (highest - lowest)) ** RHO
    sigmas: list[float] = [*levels.tolist(), 0.0]
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), PIXELS, generator=random)
    images = sigmas[0] * noise

    def slope_at(images: torch.Tensor, sigma: float) -> torch.Tensor:
        levels = torch.full((len(labels), 1), sigma)
        denoised: torch.Tensor = model(images, levels, labels)
        return (images - denoised) / sigma

    for sigma, after in itertools.pairwise(sigmas):
        step = after - sigma
        first = slope_at(images, sigma)
        ahead = images + step * first
        if after > 0:
            second = slope_at(ahead, after)
            ahead = images + step * (first + second) / 2
        images = ahead
    return images


def _draw_samples(
    model: Denoiser,
    run: Run,
    report: SweepReport,
    folder: Path,
) -> None:
    """Draw samples of the last weights and of five lengths, each from the same noise, as images of
    the search."""
    candidates = [report.best, *TRACKED, 0.1, 0.2, 0.025]
    widths = list(dict.fromkeys(candidates))[:5]
    for trial in report.trials:
        if trial.sigma_rel is None:
            weights = model.state_dict()
        elif trial.sigma_rel in widths and trial.seed == 0:
            weights = run.average(trial.sigma_rel)
        else:
            continue
        averaged = make_denoiser(seed=0)
        averaged.load_state_dict(weights)
        samples = sample(averaged, torch.arange(DRAWN_CLASSES), seed=0)
        place = folder / images.FOLDER / trial.name
        files.make_directory(place)
        for number, picture in enumerate(samples.reshape(-1, SIDE, SIDE).numpy()):
            content = plots.as_picture(picture, _SCALE)
            files.write_atomically(place / f"class-{number}.png", content)


# --- the model and its data
# --------------------------------------------------------------------------

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10
STANDARD_DEVIATION = 0.75  # about the standard deviation of the pixels


class Images(NamedTuple):
    """Images, shape [images, 64], in -1 .. 1, and the class of each, shape [images]."""

    images: torch.Tensor
    labels: torch.Tensor


def make_waves(count: int, seed: int) -> Images:
    """Make plane waves of random frequency and phase; the class is their direction, in steps of 18
    degrees."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    angles = math.pi * labels / CLASSES
    direction = angles[:, None, None]
    size = (count, 1, 1)
    frequency = 2.4 + 3.5 * torch.rand(size, generator=random)
    phase = 2 * math.pi * torch.rand(size, generator=random)
    across = torch.linspace(-1, 1, SIDE)
    down = across[:, None]
    along = direction.cos() * across + direction.sin() * down
    waves = (frequency * along + phase).sin()
    return Images(waves.flatten(1), labels)


# of the normal distribution of ln(sigma) in training and validation
LOG_NOISE_MEAN = -0.8
LOG_NOISE_STD = 1.2

_FREQUENCIES = 16
_VARIANCE = STANDARD_DEVIATION**2


class Denoiser(nn.Module):
    """An MLP with residual blocks, conditioned on the noise level and the class."""

    frequencies: torch.Tensor

    def __init__(
        self,
        width: int = 128,
        blocks: int = 3,
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-0.5, 1, _FREQUENCIES))
        self.noise = nn.Linear(2 * _FREQUENCIES, width)
        self.label = nn.Embedding(CLASSES, width)
        self.inward = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.outward = nn.Linear(width, PIXELS)

    def forward(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Denoise images: `noisy` [batch, 64], `sigma` [batch, 1], `labels` [batch] -> [batch,
        64]."""
        total = (sigma**2 + _VARIANCE).sqrt()
        angles = sigma.log() / 4 * self.frequencies
        waves = [angles.cos(), angles.sin()]
        features = torch.cat(waves, dim=-1)
        condition = self.noise(features) + self.label(labels)
        hidden = self.inward(noisy / total)
        for block in self.blocks:
            hidden = block(hidden, nn.functional.silu(condition))
        out: torch.Tensor = self.outward(hidden)
        kept = noisy * _VARIANCE / total**2
        return kept + out * sigma * STANDARD_DEVIATION / total


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, width)
        self.scale = nn.Linear(width, width)
        self.outward = nn.Linear(width, width)

    def forward(
        self,
        hidden: torch.Tensor,
        condition: torch.Tensor,
    ) -> torch.Tensor:
        inner = self.inward(self.norm(hidden))
        inner = inner * (1 + self.scale(condition))
        change: torch.Tensor = self.outward(nn.functional.silu(inner))
        return hidden + change


def make_denoiser(seed: int) -> Denoiser:
    """Make a denoiser with random weights; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser()


def losses(
    model: nn.Module,
    data: Images,
    sigma: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Compute the weighted squared error of each image, shape [images]; for F = 0 its mean is about
    1.

    `sigma` are the noise levels, shape [images, 1]; `noise` is standard normal, shape [images, 64].
    """
    noisy = data.images + sigma * noise
    denoised = model(noisy, sigma, data.labels)
    weight = (sigma**2 + _VARIANCE) / (sigma**2 * _VARIANCE)
    errors: torch.Tensor = denoised - data.images
    weighted = weight * errors**2
    return weighted.mean(dim=-1)


class Validation:
    """The loss on images that training never saw, with the same noise at every call.

    Each image has `draws` of noise, at the quantiles of the noise levels of training.
    """

    def __init__(
        self,
        data: Images,
        seed: int,
        draws: int = 32,
    ) -> None:
        self._data = data
        random = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(draws, *data.images.shape, generator=random)
        middles = (torch.arange(draws) + 0.5) / draws
        quantiles = torch.special.ndtri(middles)
        self._sigmas = _noise_levels(quantiles)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> torch.Tensor:
        count = len(self._data.images)
        rows = []
        for sigma, noise in zip(self._sigmas, self._noise, strict=True):
            sigmas = sigma.expand(count, 1)
            rows.append(losses(model, self._data, sigmas, noise))
        return torch.stack(rows).double().mean(dim=0)


def random_noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels as in training, shape [count, 1]."""
    return _noise_levels(torch.randn(count, 1, generator=generator))


def _noise_levels(normal: torch.Tensor) -> torch.Tensor:
    """Convert standard normal numbers to noise levels."""
    logarithms = LOG_NOISE_MEAN + LOG_NOISE_STD * normal
    return logarithms.exp()


# --- the training
# ------------------------------------------------------------------------------------

UPDATE_EVERY = 10
SNAPSHOTS = 40  # kept a tracked profile

BATCH = 32
LEARNING_RATE = 8e-3
"""It is constant, so that the network circles around good weights, and their mean is better than
any of them. With 12e-3 the best length is 0.05, which is tracked."""


def checkpoint_every(steps: int) -> int:
    """Space the snapshots evenly, SNAPSHOTS of them where there are as many updates."""
    updates = steps // UPDATE_EVERY
    return UPDATE_EVERY * max(1, updates // SNAPSHOTS)


def train(
    steps: int,
    data: Images,
    directory: Path,
    advance: Callable[[int], None],
) -> Denoiser:
    """Train a denoiser with the hook, which writes snapshots to a directory; `advance` is called
    with done steps."""
    model = make_denoiser(seed=0)
    betas = (0.9, 0.99)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, betas, fused=True)
    every = checkpoint_every(steps)
    random = torch.Generator().manual_seed(0)
    with PostHocEMA.from_model(
        model,
        directory,
        sigma_rels=TRACKED,
        update_every=UPDATE_EVERY,
        checkpoint_every=every,
        max_checkpoints=SNAPSHOTS,
    ) as ema:
        for step in range(1, steps + 1):
            chosen = torch.randint(len(data.images), (BATCH,), generator=random)
            sigma = random_noise_levels(BATCH, random)
            batch = Images(data.images[chosen], data.labels[chosen])
            noise = torch.randn(batch.images.shape, generator=random)
            loss = losses(model, batch, sigma, noise).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            ema.update_(model)
            if step % UPDATE_EVERY == 0:
                advance(UPDATE_EVERY)
    return model

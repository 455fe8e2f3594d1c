"""The demo from end to end: train, search the best length, make that average, draw. Printing is up
to the caller.

The training is that of a small diffusion model on made-up data, after Karras et al., arXiv
2206.00364, table 1: a network F with preconditioning is the denoiser

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)),

trained on images with added noise of standard deviation `sigma`, which there is never the width of
an average."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from posthoc_cli import files, plots
from posthoc_cli.errors import InvalidValueError, OutputExistsError, PostHocError
from posthoc_cli.resources import ProgressBar
from posthoc_cli.sweep import sweep
from posthoc_cli.sweep.search import RAW, Trial
from posthoc_cli.tracker import PostHocEMA

Say = Callable[[str], None]  # prints a line

IMAGES, VALIDATION_IMAGES = 1400, 360

# the lengths to measure: 0.025, 0.05, ..., 0.275
SIGMA_RELS = tuple(count * 25 / 1000 for count in range(1, 12))


def run(out: Path, steps: int, say: Say, watch: ProgressBar) -> dict[str, Any]:
    """Train a small diffusion model with the hook, and choose the length of its average afterwards.

    `out` is a new or empty folder, `steps` a multiple of 100; `watch` opens a progress bar of the
    steps. Returns the results as data for JSON.
    """
    started, threads = time.perf_counter(), torch.get_num_threads()
    if steps < 100 or steps % 100:
        raise InvalidValueError("steps", "must be a multiple of 100, from 100", value=steps)
    files.check_parent("out", out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputExistsError(out, "already exists, and is no empty folder", "name another one")
    files.make_directory(out)
    snapshots, every = out / "snapshots", checkpoint_every(steps)
    say(
        f"training a diffusion model on {IMAGES:,} made-up images, {steps:,} steps; the hook "
        f"updates two averages"
    )
    say(
        f"every {UPDATE_EVERY} steps and writes snapshots of both every {every:,} steps to "
        f"{snapshots}"
    )
    torch.set_num_threads(1)  # faster for so small a network, and the same sums on every machine
    try:
        with watch("training", steps) as advance:
            model = train(steps, make_waves(IMAGES, seed=0), snapshots, advance)
        lines = [run_command(say, "info", snapshots)]
        say("")
        say(
            f"measuring {len(SIGMA_RELS)} averages and the raw weights on images that training "
            f"never saw"
        )
        validation = Validation(make_waves(VALIDATION_IMAGES, seed=1), seed=0)

        def loss(measured: Denoiser) -> float:
            return float(validation(measured).mean())

        raw = Trial(RAW, 0.0, 0, loss(model))  # the model has the raw weights
        swept = sweep(snapshots, loss, model=model, values=SIGMA_RELS, name="validation loss")
        swept = replace(swept, trials=(raw, *swept.trials))
    finally:
        torch.set_num_threads(threads)
    swept.write(out / "sweep")
    files.write_atomically(
        out / "loss.png", plots.as_file(partial(plots.sweep_figure, swept.to_dict()), ".png")
    )
    width, best = f"{swept.found.best:.6g}", out / "best.safetensors"
    for words in (
        ("synthesize", snapshots, "--sigma-rel", width, "--out", best),
        ("error-plot", snapshots, "--out", out / "error.png"),
        ("report", snapshots, "--sweep", out / "sweep", "--out", out / "report.html"),
    ):
        lines.append(run_command(say, *words, "--overwrite"))
    found = swept.found
    return {
        "out": str(out),
        "steps": steps,
        "checkpoint_every": every,
        "raw": swept.raw,
        "averages": [
            {"sigma_rel": trial.x, "loss": trial.value} for trial in swept.trials if trial.x
        ],
        "best": found.best,
        "equal_within_noise": [found.low, found.high],
        "commands": lines,
        "files": [str(path) for path in sorted(out.iterdir())],
        "seconds": time.perf_counter() - started,
    }


def run_command(say: Say, *words: str | Path) -> str:
    """Run `ema` in another process, print its output, and return the command line; a PostHocError
    if it fails."""
    arguments = list(map(str, words))
    line = shlex.join(["ema", *arguments])
    say("")
    say(f"$ {line}")
    command = [sys.executable, "-m", "posthoc_cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for printed in (done.stdout + done.stderr).splitlines():
        say(printed)
    if done.returncode != 0:
        raise PostHocError(f"`{line}`", f"ended with exit code {done.returncode}")
    return line


# --- the model and its data
# --------------------------------------------------------------------------

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10
STANDARD_DEVIATION = 0.75  # about that of the pixels


class Images(NamedTuple):
    """Images, shape [images, 64], in -1 .. 1, and the class of each, shape [images]."""

    images: torch.Tensor
    labels: torch.Tensor


def make_waves(count: int, seed: int) -> Images:
    """Return plane waves of random frequency and phase; the class is their direction, in steps of
    18 degrees."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    direction = (math.pi * labels / CLASSES)[:, None, None]
    frequency = 2.4 + 3.5 * torch.rand(count, 1, 1, generator=random)
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=random)
    across = torch.linspace(-1, 1, SIDE)
    waves = (
        frequency * (direction.cos() * across + direction.sin() * across[:, None]) + phase
    ).sin()
    return Images(waves.flatten(1), labels)


# of the normal distribution of ln(sigma) in training and validation
LOG_NOISE_MEAN, LOG_NOISE_STD = (-0.8, 1.2)

_FREQUENCIES = 16
_VARIANCE = STANDARD_DEVIATION**2


class Denoiser(nn.Module):
    """An MLP with residual blocks, conditioned on the noise level and the class."""

    frequencies: torch.Tensor

    def __init__(self, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-0.5, 1, _FREQUENCIES))
        self.noise = nn.Linear(2 * _FREQUENCIES, width)
        self.label = nn.Embedding(CLASSES, width)
        self.inward = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.outward = nn.Linear(width, PIXELS)

    def forward(
        self, noisy: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the denoised images: `noisy` [batch, 64], `sigma` [batch, 1], `labels` [batch] ->
        [batch, 64]."""
        total = (sigma**2 + _VARIANCE).sqrt()
        angles = sigma.log() / 4 * self.frequencies
        condition = self.noise(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label(labels)
        hidden = self.inward(noisy / total)
        for block in self.blocks:
            hidden = block(hidden, nn.functional.silu(condition))
        out: torch.Tensor = self.outward(hidden)
        return noisy * _VARIANCE / total**2 + out * sigma * STANDARD_DEVIATION / total


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, width)
        self.scale = nn.Linear(width, width)
        self.outward = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        inner = self.inward(self.norm(hidden)) * (1 + self.scale(condition))
        out: torch.Tensor = hidden + self.outward(nn.functional.silu(inner))
        return out


def make_denoiser(seed: int) -> Denoiser:
    """Make a denoiser with random weights; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser()


def losses(
    model: nn.Module, data: Images, sigma: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Return the weighted squared error of each image, shape [images]; for F = 0 its mean is about
    1.

    `sigma` are the noise levels, shape [images, 1]; `noise` is standard normal, shape [images, 64].
    """
    denoised = model(data.images + sigma * noise, sigma, data.labels)
    weight = (sigma**2 + _VARIANCE) / (sigma**2 * _VARIANCE)
    weighted: torch.Tensor = weight * (denoised - data.images) ** 2
    return weighted.mean(dim=-1)


class Validation:
    """The loss on images that training never saw, with the same noise at every call.

    Each image has `draws` of noise, at the quantiles of the noise levels of training.
    """

    def __init__(self, data: Images, seed: int, draws: int = 32) -> None:
        self._data = data
        self._noise = torch.randn(
            draws, *data.images.shape, generator=torch.Generator().manual_seed(seed)
        )
        middles = (torch.arange(draws) + 0.5) / draws
        self._sigmas = (LOG_NOISE_MEAN + LOG_NOISE_STD * torch.special.ndtri(middles)).exp()

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> torch.Tensor:
        sigmas = self._sigmas.reshape(-1, 1, 1).expand(-1, len(self._data.images), 1)
        rows = [losses(model, self._data, *draw) for draw in zip(sigmas, self._noise, strict=True)]
        return torch.stack(rows).double().mean(dim=0)


def random_noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return random noise levels as in training, shape [count, 1]."""
    return (LOG_NOISE_MEAN + LOG_NOISE_STD * torch.randn(count, 1, generator=generator)).exp()


# --- the training
# ------------------------------------------------------------------------------------

UPDATE_EVERY = 10
SNAPSHOTS = 40  # kept a tracked profile; no more are taken if the number of steps allows that

BATCH, LEARNING_RATE = 32, 8e-3
"""The learning rate is high and falls late, so that the network circles around good weights, and
their mean is better than any of them."""


def checkpoint_every(steps: int) -> int:
    """Return the steps between snapshots: a divisor of `steps`, so that the last step has one."""
    updates = steps // UPDATE_EVERY
    return UPDATE_EVERY * next(
        n for n in range(max(1, updates // SNAPSHOTS), 0, -1) if updates % n == 0
    )


def train(steps: int, data: Images, directory: Path, advance: Callable[[int], None]) -> Denoiser:
    """Train a denoiser with the hook, which writes snapshots to a directory; `advance` is called
    with done steps."""
    model = make_denoiser(seed=0)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    every, random = checkpoint_every(steps), torch.Generator().manual_seed(0)
    with PostHocEMA.from_model(
        model,
        directory,
        update_every=UPDATE_EVERY,
        checkpoint_every=every,
        max_checkpoints=SNAPSHOTS,
    ) as ema:
        for step in range(1, steps + 1):
            # alpha_ref / sqrt(max(t / t_ref, 1)), the decay of arXiv 2312.02696
            optimizer.param_groups[0]["lr"] = LEARNING_RATE / math.sqrt(
                max(step / (steps * 3 // 10), 1.0)
            )
            chosen = torch.randint(len(data.images), (BATCH,), generator=random)
            sigma = random_noise_levels(BATCH, random)
            images = Images(data.images[chosen], data.labels[chosen])
            loss = losses(
                model, images, sigma, torch.randn(images.images.shape, generator=random)
            ).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            ema.update_(model)
            if step % UPDATE_EVERY == 0:
                advance(UPDATE_EVERY)
    return model

"""The demo from end to end: train, synthesize, measure, export, draw, compare. Printing is up to the caller.

The training is that of a small diffusion model on made-up data, after Karras et al., arXiv 2206.00364, table 1: a
network F with preconditioning is the denoiser

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)),

trained on images with added noise of standard deviation `sigma`, which there is never the width of an average.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn

from posthoc_cli import files, plots
from posthoc_cli.errors import InvalidValueError, OutputExistsError, PostHocError
from posthoc_cli.progress import ProgressBar
from posthoc_cli.sweep import SweepReport, sweep
from posthoc_cli.sweep.results import RAW
from posthoc_cli.sweep.search import Trial
from posthoc_cli.tracker import PostHocEMA

Say = Callable[[str], None]
"""Prints a line."""

IMAGES, VALIDATION_IMAGES = 1400, 360

SIGMA_RELS = tuple(count * 25 / 1000 for count in range(1, 12))
"""The synthesized averages: 0.025, 0.05, ..., 0.275."""

DIRECT_SIGMA_RELS = (0.05, 0.1, 0.15, 0.2, 0.25)
"""Those also tracked directly."""


@dataclass(frozen=True)
class DirectCheck:
    """|| synthesized - tracked || / || tracked || over all parameters, in float64; and the same for the raw weights."""

    sigma_rel: float
    relative_error: float
    raw_distance: float


@dataclass(frozen=True)
class Result:
    """The results of a demo: its files, the measurements, and the `ema` commands that were run."""

    folder: Folder
    settings: TrainingSettings
    sweep: SweepReport
    checks: list[DirectCheck]
    commands: list[str]
    seconds: float

    @property
    def best(self) -> float:
        """The sigma_rel that the sweep chose, as named in the picture and the page."""
        return self.sweep.found.best

    def to_dict(self) -> dict[str, Any]:
        """Return the results as data for JSON."""
        return {
            "out": str(self.folder.root),
            "steps": self.settings.steps,
            "checkpoint_every": self.settings.checkpoint_every,
            "raw": self.sweep.raw,
            "averages": [{"sigma_rel": trial.x, "loss": trial.value} for trial in self.sweep.trials if trial.x],
            "best": self.best,
            "tracked": [vars(check) for check in self.checks],
            "commands": self.commands,
            "files": [str(path) for path in sorted(self.folder.root.iterdir())],
            "seconds": self.seconds,
        }


def run(out: Path, steps: int, overwrite: bool, say: Say, watch: ProgressBar) -> Result:
    """Train a small diffusion model with the hook, and choose the length of its average afterwards.

    The results go to the folder `out`, with `overwrite` in the place of an earlier demo; `steps` is a multiple of 100;
    `watch` opens a progress bar, of the steps of training.

    Raises:
        InvalidValueError, OutputExistsError: see `TrainingSettings`, `Folder.prepare`.
        PostHocError: a command failed.
    """
    started, threads = time.perf_counter(), torch.get_num_threads()
    settings, folder = TrainingSettings(steps), Folder(out)
    folder.prepare(overwrite)
    torch.set_num_threads(1)  # faster for so small a network, and the same sums on every machine
    try:
        model = _train(settings, folder, say, watch)
        listed, over = f"{SIGMA_RELS[0]:g},{SIGMA_RELS[1]:g},...,{SIGMA_RELS[-1]:g}", "--overwrite"
        lines = [
            run_command(say, "info", folder.snapshots),
            run_command(say, "error-plot", folder.snapshots, "--out", folder.error_picture, over),
            run_command(say, "synthesize", folder.snapshots, "--sigma-rel", listed, "--out", folder.averages, over),
        ]
        say("")
        say(f"measuring {len(SIGMA_RELS)} averages and the raw weights on images that training never saw")
        swept = _measure(folder, model)
        best = folder.average(swept.found.best)
        lines.append(run_command(say, "export", best, "--out", folder.best, over))
        files.write_atomically(folder.loss_picture, plots.as_file(partial(plots.sweep_figure, swept.to_dict()), ".png"))
        page = "--sweep", folder.sweep, "--out", folder.page, over
        lines.append(run_command(say, "report", folder.snapshots, *page))
        checks = [compare(folder, width) for width in DIRECT_SIGMA_RELS]
    finally:
        torch.set_num_threads(threads)
    return Result(folder, settings, swept, checks, lines, time.perf_counter() - started)


def _train(settings: TrainingSettings, folder: Folder, say: Say, watch: ProgressBar) -> Denoiser:
    say(
        f"training a diffusion model on {IMAGES:,} made-up images: {settings.steps:,} steps of Adam, learning rate "
        f"{settings.learning_rate:g}, falling from step {settings.decay_start:,} on"
    )
    say(
        f"the hook updates two averages every {UPDATE_EVERY} steps and writes snapshots of both every "
        f"{settings.checkpoint_every:,} steps to {folder.snapshots}"
    )
    started = time.perf_counter()
    with watch("training", settings.steps) as advance:
        model, direct = train(settings, make_waves(IMAGES, seed=0), folder.snapshots, DIRECT_SIGMA_RELS, advance)
    say(f"trained in {time.perf_counter() - started:.0f} s")
    files.write_atomically(folder.raw, safetensors.torch.save(model.state_dict()))
    for average in direct:
        files.write_atomically(folder.tracked(average.sigma_rel), safetensors.torch.save(average.by_name(model)))
    return model


def _measure(folder: Folder, model: Denoiser) -> SweepReport:
    """Measure and record the validation losses of the averages and of the raw weights, which `model` has."""
    validation = Validation(make_waves(VALIDATION_IMAGES, seed=1), seed=0)

    def loss(measured: Denoiser) -> float:
        return float(validation(measured).mean())

    raw = Trial(RAW, 0.0, 0, loss(model))
    swept = sweep(folder.snapshots, loss, model=model, values=SIGMA_RELS, name="validation loss")
    swept = replace(swept, trials=(raw, *swept.trials))
    swept.write(folder.sweep)
    return swept


def run_command(say: Say, *words: str | Path) -> str:
    """Run `ema` with `words` in another process and print its output; return the command line, quoted for a shell.

    Raises:
        PostHocError: it ended with another exit code than 0.
    """
    arguments = list(map(str, words))
    line = shlex.join(["ema", *arguments])
    say("")
    say(f"$ {line}")
    command = [sys.executable, "-m", "posthoc_cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.terminate()  # subprocess.run would kill it, and leave partial files
            raise
    for printed in (out + err).splitlines():
        say(printed)
    if process.returncode != 0:
        raise PostHocError(f"`{line}`", f"ended with exit code {process.returncode}")
    return line


def compare(folder: Folder, sigma_rel: float) -> DirectCheck:
    """Return the distances of the synthesized average and of the raw weights from the directly tracked average."""
    tracked = load_file(folder.tracked(sigma_rel))
    truth = torch.cat([value.reshape(-1) for value in tracked.values()])
    found = [load_file(path) for path in (folder.average(sigma_rel), folder.raw)]
    vectors = [torch.cat([weights[name].double().reshape(-1) for name in tracked]) for weights in found]
    return DirectCheck(sigma_rel, *(float((vector - truth).norm() / truth.norm()) for vector in vectors))


# --- the folder --------------------------------------------------------------------------------------

_MARKER = "made-by-ema-demo.txt"
_MARKER_TEXT = """\
`ema demo` made this folder.

snapshots/        what the hook wrote during training: give it to ema synthesize, ema error-plot, ema info
averages/         averages of many lengths, synthesized from the snapshots after training
tracked/          averages of a few lengths, tracked during training in float64, to compare with
raw.safetensors   the weights as the last step of training left them
best.pt           the best average, as a state dict for torch.load
sweep/            what a search of the best length has measured
report.html       a page about all of it
*.png             pictures

`ema demo --overwrite` removes these files and makes them again. It leaves other files alone.
"""
_MADE = (
    "snapshots/*.safetensors", "snapshots/.ema*", "averages/sigma_rel-*.safetensors", "tracked/sigma_rel-*.safetensors",
    "raw.safetensors", "best.pt", "loss.png", "error.png", "report.html", "sweep/sweep.json",
)  # fmt: skip


class Folder:
    """The files of a demo, in `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.snapshots, self.averages = root, root / "snapshots", root / "averages"
        self.raw, self.best = root / "raw.safetensors", root / "best.pt"
        self.sweep, self.page = root / "sweep", root / "report.html"
        self.loss_picture, self.error_picture = root / "loss.png", root / "error.png"

    def average(self, sigma_rel: float) -> Path:
        """Return the path of an average, as named by `ema synthesize`."""
        return self.averages / f"sigma_rel-{sigma_rel!r}.safetensors"

    def tracked(self, sigma_rel: float) -> Path:
        """Return the path of a directly tracked average."""
        return self.root / "tracked" / f"sigma_rel-{sigma_rel!r}.safetensors"

    def prepare(self, overwrite: bool) -> None:
        """Make the folder, or with `overwrite` delete the files of an earlier demo; else an OutputExistsError."""
        files.check_parent("out", self.root)
        marker = self.root / _MARKER
        is_empty = self.root.is_dir() and not any(self.root.iterdir())
        if self.root.exists() and not (is_empty or marker.is_file()):
            raise OutputExistsError(self.root, "already exists, and no earlier demo made it", "name another folder")
        if marker.is_file() and not overwrite:
            hint = "name another folder, or `overwrite` to replace it"
            raise OutputExistsError(self.root, "holds an earlier demo", hint)
        for folder in (self.snapshots, self.averages, self.root / "tracked", self.sweep):
            if folder.is_symlink():
                raise OutputExistsError(folder, "is a symbolic link, and no demo made it", "remove it")
        with files.reported_as_write_error(self.root):
            for pattern in _MADE:
                for path in self.root.glob(pattern):
                    files.system.unlink(path)
            for folder in (self.root, self.averages, self.root / "tracked"):
                files.make_directory(folder)
        files.write_atomically(marker, _MARKER_TEXT.encode(), overwrite=True)


# --- the model and its data --------------------------------------------------------------------------

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10
STANDARD_DEVIATION = 0.75
"""About that of the pixels."""


@dataclass(frozen=True)
class Images:
    """Images, shape [images, 64], in -1 .. 1, and the class of each, shape [images]."""

    images: torch.Tensor
    labels: torch.Tensor


def make_waves(count: int, seed: int) -> Images:
    """Return plane waves of random frequency and phase; the class is their direction, in steps of 18 degrees."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    direction = (math.pi * labels / CLASSES)[:, None, None]
    frequency = 2.4 + 3.5 * torch.rand(count, 1, 1, generator=random)
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=random)
    across = torch.linspace(-1, 1, SIDE)
    waves = (frequency * (direction.cos() * across + direction.sin() * across[:, None]) + phase).sin()
    return Images(waves.flatten(1), labels)


LOG_NOISE_MEAN, LOG_NOISE_STD = -0.8, 1.2
"""Of the normal distribution of ln(sigma) in training and validation."""

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

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the denoised images: `noisy` [batch, 64], `sigma` [batch, 1], `labels` [batch] -> [batch, 64]."""
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


def losses(model: nn.Module, data: Images, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the weighted squared error of each image, shape [images]; for F = 0 its mean is about 1.

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
        self._noise = torch.randn(draws, *data.images.shape, generator=torch.Generator().manual_seed(seed))
        middles = (torch.arange(draws) + 0.5) / draws
        self._sigmas = (LOG_NOISE_MEAN + LOG_NOISE_STD * torch.special.ndtri(middles)).exp()

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Return the loss of each image, the mean over its draws: float64, shape [images]."""
        sigmas = self._sigmas.reshape(-1, 1, 1).expand(-1, len(self._data.images), 1)
        rows = [losses(model, self._data, *draw) for draw in zip(sigmas, self._noise, strict=True)]
        return torch.stack(rows).double().mean(dim=0)


def random_noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return random noise levels as in training, shape [count, 1]."""
    return (LOG_NOISE_MEAN + LOG_NOISE_STD * torch.randn(count, 1, generator=generator)).exp()


# --- the training ------------------------------------------------------------------------------------

UPDATE_EVERY = 10
SNAPSHOTS = 40
"""Kept a tracked profile; no more are taken if the number of steps allows that."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the training.

    The learning rate is high and falls late, so that the network circles around good weights, and their mean is better
    than any of them.
    """

    steps: int
    batch: int = 32
    learning_rate: float = 8e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 100 or self.steps % 100:
            raise InvalidValueError("steps", "must be a multiple of 100, from 100", value=self.steps)

    @property
    def checkpoint_every(self) -> int:
        """The steps between snapshots: a divisor of `steps`, so that the last step has one."""
        updates = self.steps // UPDATE_EVERY
        return UPDATE_EVERY * next(n for n in range(max(1, updates // SNAPSHOTS), 0, -1) if updates % n == 0)

    @property
    def decay_start(self) -> int:
        """The step from which the learning rate falls: t_ref of `learning_rate_at`."""
        return self.steps * 3 // 10

    def learning_rate_at(self, step: int) -> float:
        """Return alpha_ref / sqrt(max(t / t_ref, 1)), the decay of arXiv 2312.02696."""
        return self.learning_rate / math.sqrt(max(step / self.decay_start, 1.0))


class DirectAverage:
    """The power-function average of one length, tracked in float64.

    It shares no code with the tracker, whose results it checks: gamma from the roots of equation 123, one vector of all
    parameters, the recursion written out.
    """

    def __init__(self, sigma_rel: float) -> None:
        self.sigma_rel = sigma_rel
        # The largest real root of (x + 1)**2 (x + 2) = x / sigma_rel**2 with x = gamma + 1.
        roots = np.roots([1, 4, 5 - sigma_rel**-2, 2])
        self.gamma = float(max(root.real for root in roots if abs(root.imag) < 1e-9)) - 1
        self._t, self._value = 0.0, torch.zeros((), dtype=torch.float64)

    def update_(self, weights: torch.Tensor, t: float) -> None:
        """Average all parameters, as one vector, at time `t`."""
        beta = (self._t / t) ** (self.gamma + 1)  # 0 for the first
        self._t, self._value = t, beta * self._value + (1 - beta) * weights.double()

    def by_name(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the average as float64 tensors by name."""
        parameters = dict(model.named_parameters())
        values = torch.split(self._value, [parameter.numel() for parameter in parameters.values()])
        return {name: value.reshape(parameters[name].shape) for name, value in zip(parameters, values, strict=True)}


def train(
    settings: TrainingSettings, data: Images, directory: Path, direct: Sequence[float], advance: Callable[[int], None]
) -> tuple[Denoiser, list[DirectAverage]]:
    """Train a denoiser with the hook, and track averages directly at the same steps; return both.

    `directory` is for the snapshots, `direct` has the sigma_rel of the averages to track directly; `advance` is called
    with the number of steps since the last call.
    """
    model = make_denoiser(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    averages = [DirectAverage(width) for width in direct]
    every, random = settings.checkpoint_every, torch.Generator().manual_seed(settings.seed)
    with PostHocEMA.from_model(
        model, directory, update_every=UPDATE_EVERY, checkpoint_every=every, max_checkpoints=SNAPSHOTS
    ) as ema:
        for step in range(1, settings.steps + 1):
            optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
            chosen = torch.randint(len(data.images), (settings.batch,), generator=random)
            sigma = random_noise_levels(settings.batch, random)
            images = Images(data.images[chosen], data.labels[chosen])
            loss = losses(model, images, sigma, torch.randn(images.images.shape, generator=random)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            ema.update_(model)
            if step % UPDATE_EVERY == 0:
                weights = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
                for average in averages:
                    average.update_(weights, step)
                advance(UPDATE_EVERY)
    return model, averages

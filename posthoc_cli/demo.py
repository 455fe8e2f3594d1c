"""The demo from end to end: train, search the best length, write that average, a page, and a
picture of samples. Printing is up to the caller.

It trains a small diffusion model on points of three letters in the plane, after Karras et al.,
arXiv 2206.00364, table 1: a network F with preconditioning is the denoiser

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)),

trained on points with added noise of standard deviation `sigma`, which there is never the width of
an average."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import nn

from posthoc_cli import files, plots
from posthoc_cli.errors import InvalidValueError, OutputExistsError
from posthoc_cli.report.page import PAGE, render
from posthoc_cli.resources import ProgressBar
from posthoc_cli.run import Run
from posthoc_cli.sweep import SweepReport, images
from posthoc_cli.tracker import PostHocEMA

Say = Callable[[str], None]  # prints a line

TRACKED = (0.05, 0.28)
SIGMA_RELS = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.28)
"""The lengths to measure, with the tracked ones among them."""

LAST = "last.safetensors"
PICTURE = "samples.png"


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
    """Train, measure lengths, and write the best average, and the page and the picture with
    samples."""
    snapshots = out / "snapshots"
    every = checkpoint_every(steps)
    say(f"training a diffusion model on {POINTS:,} points of the letters EMA, {steps:,} steps; the")
    say(f"hook updates two averages every {UPDATE_EVERY} steps and writes snapshots of both every")
    say(f"{every:,} steps to {snapshots}")
    with watch("training", steps) as advance:
        model = train(steps, snapshots, advance)
    files.write_atomically(out / LAST, safetensors.torch.save(model.state_dict()))
    say(f"measuring {len(SIGMA_RELS)} averages and the last weights on points that training never")
    say("saw, and drawing samples of some")
    run = Run(snapshots)
    report = search(model, run)
    best = out / "best.safetensors"
    run.write(report.estimate.best, best)
    report = replace(report, outputs=(best,))
    report.write(out / "sweep")
    _draw_samples(model, run, report, out)
    page = render(report, out / "sweep")
    files.write_atomically(out / PAGE, page.encode())
    return report


def search(model: Denoiser, run: Run) -> SweepReport:
    """Measure the loss of the last weights, which the model has, and of averages."""
    validation = Validation(make_letters(VALIDATION_POINTS, seed=1), seed=0, draws=16)
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

DRAWN = (0.025, 0.05, 0.15, 0.28)
"""The lengths whose samples are drawn, besides the best one."""

SAMPLES = 1000
SAMPLER_STEPS = 18
LOWEST_NOISE = 0.002
HIGHEST_NOISE = 5.0
RHO = 7
"""Of arXiv 2206.00364, table 1, but for the highest: training hardly sees noise above 5."""


@torch.no_grad()
def sample(
    model: nn.Module,
    labels: torch.Tensor,
    seed: int,
) -> torch.Tensor:
    """Draw a point of each label, shape [labels, 2], by Heun's method: arXiv 2206.00364,
    algorithm 1."""
    ramp = torch.linspace(1, 0, SAMPLER_STEPS)
    highest = HIGHEST_NOISE ** (1 / RHO)
    lowest = LOWEST_NOISE ** (1 / RHO)
    levels = (lowest + ramp * (highest - lowest)) ** RHO
    sigmas: list[float] = [*levels.tolist(), 0.0]
    random = torch.Generator().manual_seed(seed)
    points = sigmas[0] * torch.randn(len(labels), 2, generator=random)

    def slope_at(points: torch.Tensor, sigma: float) -> torch.Tensor:
        levels = torch.full((len(labels), 1), sigma)
        denoised: torch.Tensor = model(points, levels, labels)
        return (points - denoised) / sigma

    for sigma, after in itertools.pairwise(sigmas):
        step = after - sigma
        first = slope_at(points, sigma)
        ahead = points + step * first
        if after > 0:
            second = slope_at(ahead, after)
            ahead = points + step * (first + second) / 2
        points = ahead
    return points


def _draw_samples(
    model: Denoiser,
    run: Run,
    report: SweepReport,
    out: Path,
) -> None:
    """Draw samples of the last weights and of some lengths, all from the same noise, as images of
    the search; and four of them side by side."""
    best = report.estimate.best
    shown = {None, best, *DRAWN}
    losses = {}
    samples = {}
    for trial in report.trials:
        width = trial.sigma_rel
        if trial.seed or width not in shown:
            continue
        weights = model.state_dict() if width is None else run.average(width)
        losses[width] = trial.value
        samples[width] = sample_letters(weights)
        place = out / "sweep" / images.FOLDER / trial.name
        files.make_directory(place)
        draw = partial(plots.points_figure, {"": samples[width]}, STROKES)
        files.write_atomically(place / PICTURE, plots.as_file(draw, ".png"))
    compare = partial(comparison_figure, losses, samples, best)
    files.write_atomically(out / PICTURE, plots.as_file(compare, ".png"))


def sample_letters(weights: Mapping[str, torch.Tensor]) -> plots.FloatArray:
    """Draw points, shape [SAMPLES, 2], of the denoiser with these weights."""
    averaged = make_denoiser(seed=0)
    averaged.load_state_dict(weights)
    strokes = make_letters(SAMPLES, seed=2).strokes
    return sample(averaged, strokes, seed=0).double().numpy()


def comparison_figure(
    losses: Mapping[float | None, float | None],
    samples: Mapping[float | None, plots.FloatArray],
    best: float,
) -> Figure:
    """Draw the samples of the last weights, of the shortest length, of the best and of the longest;
    both arguments have them by sigma_rel, and the last weights by None."""
    shortest, *_, longest = DRAWN
    names = {None: "last weights", shortest: "too short", longest: "too long"}
    names[best] = "best"
    panels = {}
    for width in sorted(names, key=lambda width: width or 0):
        name = names[width] if width is None else f"{names[width]}: {width:g}"
        panels[f"{name}\nloss {losses[width]:.3f}"] = samples[width]
    return plots.points_figure(panels, STROKES)


# --- the data
# ---------------------------------------------------------------------------------------

POINTS = 20_000
VALIDATION_POINTS = 1000

_E = (((0, 0), (0, 2)), ((0, 2), (1, 2)), ((0, 1), (0.8, 1)), ((0, 0), (1, 0)))
_M = (((1.5, 0), (1.5, 2)), ((1.5, 2), (2.25, 0.7)), ((2.25, 0.7), (3, 2)), ((3, 2), (3, 0)))
_A = (((3.4, 0), (4.15, 2)), ((4.15, 2), (4.9, 0)), ((3.7, 0.8), (4.6, 0.8)))
_CENTRE = (2.45, 1)
_SCALE = 0.45  # of a unit above
STROKES = _SCALE * (torch.tensor((*_E, *_M, *_A)) - torch.tensor(_CENTRE))
"""The begin and the end of each stroke of the letters EMA: shape [strokes, 2, 2]."""
STANDARD_DEVIATION = 0.5  # about the standard deviation of the coordinates


class Letters(NamedTuple):
    """Points in the plane, shape [points, 2], and the stroke on which each lies, shape [points]."""

    points: torch.Tensor
    strokes: torch.Tensor


def make_letters(count: int, seed: int) -> Letters:
    """Draw points on the strokes, at the same density everywhere."""
    random = torch.Generator().manual_seed(seed)
    begins, ends = STROKES.unbind(1)
    along = ends - begins
    strokes = torch.multinomial(along.norm(dim=1), count, replacement=True, generator=random)
    places = torch.rand(count, 1, generator=random)
    return Letters(begins[strokes] + places * along[strokes], strokes)


# --- the model
# --------------------------------------------------------------------------------------

# of the normal distribution of ln(sigma) in training and validation
LOG_NOISE_MEAN = -1.8
LOG_NOISE_STD = 1.2

OUTPUT_SCALE = 512
"""Of the last layer, which starts at 0. By it a step of Adam changes the denoiser much, so that a
training of seconds circles widely around good weights, while the other layers learn in peace."""

_FREQUENCIES = 16
_WAVES = (math.pi / 2, math.pi, 2 * math.pi)  # of coordinates: for fine lines
_VARIANCE = STANDARD_DEVIATION**2


class Denoiser(nn.Module):
    """An MLP with residual blocks, conditioned on the noise level and the stroke."""

    frequencies: torch.Tensor
    waves: torch.Tensor

    def __init__(
        self,
        width: int = 128,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-0.5, 1, _FREQUENCIES))
        self.register_buffer("waves", torch.tensor(_WAVES))
        self.noise = nn.Linear(2 * _FREQUENCIES, width)
        self.stroke = nn.Embedding(len(STROKES), width)
        self.inward = nn.Linear(2 + 4 * len(_WAVES), width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.outward = nn.Linear(width, 2)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        strokes: torch.Tensor,
    ) -> torch.Tensor:
        """Denoise points: `noisy` [batch, 2], `sigma` [batch, 1], `strokes` [batch] -> [batch,
        2]."""
        total = (sigma**2 + _VARIANCE).sqrt()
        levels = _as_waves(sigma.log() / 4 * self.frequencies)
        condition = self.noise(levels) + self.stroke(strokes)
        scaled = noisy / total
        angles = (scaled[:, :, None] * self.waves).flatten(1)
        hidden = self.inward(torch.cat([scaled, _as_waves(angles)], dim=-1))
        for block in self.blocks:
            hidden = block(hidden, nn.functional.silu(condition))
        out: torch.Tensor = OUTPUT_SCALE * self.outward(hidden)
        kept = noisy * _VARIANCE / total**2
        return kept + out * sigma * STANDARD_DEVIATION / total


def _as_waves(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


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
    data: Letters,
    sigma: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Compute the weighted squared error of each point, shape [points]; for F = 0 its mean is about
    1.

    `sigma` are the noise levels, shape [points, 1]; `noise` is standard normal, shape [points, 2].
    """
    noisy = data.points + sigma * noise
    denoised = model(noisy, sigma, data.strokes)
    weight = (sigma**2 + _VARIANCE) / (sigma**2 * _VARIANCE)
    errors: torch.Tensor = denoised - data.points
    weighted = weight * errors**2
    return weighted.mean(dim=-1)


class Validation:
    """The loss on points that training never saw, with the same noise at every call.

    Each point has `draws` of noise, at the quantiles of the noise levels of training.
    """

    def __init__(
        self,
        data: Letters,
        seed: int,
        draws: int = 16,
    ) -> None:
        self._data = data
        random = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(draws, *data.points.shape, generator=random)
        middles = (torch.arange(draws) + 0.5) / draws
        quantiles = torch.special.ndtri(middles)
        self._sigmas = _noise_levels(quantiles)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> torch.Tensor:
        count = len(self._data.points)
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

BATCH = 48
LEARNING_RATE = 2e-3
"""It is constant, so that the network circles around good weights, and their mean is better than
any of them. The table of scripts/demo_choice.py chose it, with OUTPUT_SCALE and BATCH."""


def checkpoint_every(steps: int) -> int:
    """Space the snapshots evenly, SNAPSHOTS of them where there are as many updates."""
    updates = steps // UPDATE_EVERY
    return UPDATE_EVERY * max(1, updates // SNAPSHOTS)


def train(
    steps: int,
    directory: Path,
    advance: Callable[[int], None],
    seed: int = 0,
) -> Denoiser:
    """Train a denoiser with the hook, which writes snapshots to a directory; `advance` is called
    with done steps."""
    data = make_letters(POINTS, seed=0)
    model = make_denoiser(seed=0)
    betas = (0.9, 0.99)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, betas, fused=True)
    every = checkpoint_every(steps)
    random = torch.Generator().manual_seed(seed)
    with PostHocEMA.from_model(
        model,
        directory,
        sigma_rels=TRACKED,
        update_every=UPDATE_EVERY,
        checkpoint_every=every,
        max_checkpoints=SNAPSHOTS,
    ) as ema:
        for step in range(1, steps + 1):
            chosen = torch.randint(POINTS, (BATCH,), generator=random)
            batch = Letters(data.points[chosen], data.strokes[chosen])
            sigma = random_noise_levels(BATCH, random)
            noise = torch.randn(BATCH, 2, generator=random)
            loss = losses(model, batch, sigma, noise).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            ema.update_(model)
            if step % UPDATE_EVERY == 0:
                advance(UPDATE_EVERY)
    return model

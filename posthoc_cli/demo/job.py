"""The whole job: train, synthesize, measure, choose, draw, compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors.torch import load_file

from posthoc_cli import files
from posthoc_cli.demo.commands import Commands, Say
from posthoc_cli.demo.denoiser import Denoiser, Validation
from posthoc_cli.demo.digits import Digits, load_digits
from posthoc_cli.demo.folder import Folder
from posthoc_cli.demo.measuring import DirectCheck, Measured, best_of, compare, measure
from posthoc_cli.demo.training import UPDATE_EVERY, Settings, Trained, train

SIGMA_RELS = tuple(count * 25 / 1000 for count in range(1, 12))
"""The averages that are synthesized: 0.025, 0.05, ..., 0.275."""

DIRECT_SIGMA_RELS = (0.05, 0.1, 0.15, 0.2, 0.25)
"""Those of them that are also tracked directly."""

_SEED = 0

Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows progress: of what, and of how many steps; gives a function that is told how many were done."""


@dataclass(frozen=True)
class Result:
    """What a demo found.

    Attributes:
        folder: where everything is.
        parameters: of the network.
        raw, averages: measured on the validation images.
        checks: synthesized against directly tracked averages.
        commands: the `ema` commands that were run, as one would type them.
        seconds: all of it together.
    """

    folder: Folder
    settings: Settings
    parameters: int
    raw: Measured
    averages: list[Measured]
    checks: list[DirectCheck]
    commands: list[str]
    seconds: float

    @property
    def best(self) -> Measured:
        """The average with the lowest validation loss."""
        return best_of(self.averages)


def run(out: Path, steps: int, force: bool, say: Say, watch: Watch) -> Result:
    """Train a small diffusion model with the hook, and choose the length of its average afterwards.

    Arguments:
        out: the folder for everything that is made.
        steps: of training; a multiple of 100.
        force: replace an earlier demo in `out`.
        say: takes what there is to tell meanwhile, line by line.
        watch: shows the progress of the training.

    Raises:
        InvalidValueError: `steps` is not a multiple of 100.
        OutputExistsError: `out` is in the way.
        MissingDependencyError: scikit-learn is not installed.
        PostHocError: a command failed.
    """
    started = time.perf_counter()
    settings, folder, commands = Settings(steps), Folder(out), Commands(say)
    digits = load_digits(_SEED)
    folder.prepare(force)
    with _one_thread():
        trained = _train(settings, digits.training, folder, say, watch)
        _synthesize(folder, commands)
        say("")
        say(f"measuring the validation loss of {len(SIGMA_RELS)} averages and of the raw weights")
        raw, averages = _measure(trained.model, digits.validation, folder)
        best = best_of(averages)
        commands.run("export", str(folder.average(best.sigma_rel)), "--out", str(folder.best), "--force")
        _draw(folder, raw, averages)
        checks = [_check(folder, average.sigma_rel) for average in trained.direct]
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    seconds = time.perf_counter() - started
    return Result(folder, settings, parameters, raw, averages, checks, commands.lines, seconds)


# --- the steps of it -------------------------------------------------------------------------------


def _train(settings: Settings, digits: Digits, folder: Folder, say: Say, watch: Watch) -> Trained:
    """Train, and keep the raw weights and the directly tracked averages as files."""
    say(
        f"training a diffusion model on {len(digits.images):,} images of digits: {settings.steps:,} steps of Adam, "
        f"learning rate {settings.learning_rate:g}, falling from step {settings.decay_start:,} on"
    )
    say(
        f"the hook updates two averages every {UPDATE_EVERY} steps and writes snapshots of both every "
        f"{settings.checkpoint_every:,} steps to {folder.snapshots}"
    )
    started = time.perf_counter()
    with watch("training", settings.steps) as advance:
        trained = train(settings, digits, folder.snapshots, DIRECT_SIGMA_RELS, advance)
    say(f"trained in {time.perf_counter() - started:.0f} s")
    _save(folder.raw, trained.model.state_dict())
    for average in trained.direct:
        _save(folder.tracked(average.sigma_rel), average.by_name(trained.model))
    return trained


def _synthesize(folder: Folder, commands: Commands) -> None:
    snapshots = str(folder.snapshots)
    widths = f"{SIGMA_RELS[0]:g},{SIGMA_RELS[1]:g},...,{SIGMA_RELS[-1]:g}"
    commands.run("info", snapshots)
    commands.run("error-plot", snapshots, "--out", str(folder.picture("error")), "--force")
    commands.run("synthesize", snapshots, "--sigma-rel", widths, "--out", str(folder.averages), "--force")


def _measure(model: Denoiser, digits: Digits, folder: Folder) -> tuple[Measured, list[Measured]]:
    averages = {sigma_rel: load_file(folder.average(sigma_rel)) for sigma_rel in SIGMA_RELS}
    return measure(Validation(digits, _SEED), model, load_file(folder.raw), averages)


def _check(folder: Folder, sigma_rel: float) -> DirectCheck:
    synthesized, tracked = load_file(folder.average(sigma_rel)), load_file(folder.tracked(sigma_rel))
    return compare(sigma_rel, synthesized, tracked, load_file(folder.raw))


def _draw(folder: Folder, raw: Measured, averages: list[Measured]) -> None:
    from posthoc_cli import plots

    widths = np.array([measured.sigma_rel for measured in averages])
    losses = np.array([measured.loss for measured in averages])
    errors = np.array([measured.standard_error for measured in averages])
    of_raw = raw.loss, raw.standard_error
    picture = plots.as_file(lambda: plots.loss_figure(widths, losses, errors, of_raw, "validation loss"), ".png")
    files.write_whole(folder.picture("loss"), picture)


# --- helpers ---------------------------------------------------------------------------------------


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    files.write_whole(path, safetensors.torch.save(dict(tensors)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for the block: so small a network is slower with more, and sums come out alike everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

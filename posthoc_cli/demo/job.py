"""The demo: train, synthesize, measure, export, draw, compare."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors.torch import load_file

from posthoc_cli import files
from posthoc_cli.demo.denoiser import Denoiser, Digits, Validation, load_digits
from posthoc_cli.demo.folder import Folder
from posthoc_cli.demo.training import UPDATE_EVERY, Settings, Trained, train
from posthoc_cli.errors import PostHocError

Say = Callable[[str], None]
"""Prints a line."""

Weights = Mapping[str, torch.Tensor]

RAW = 0.0
"""sigma_rel of the raw weights."""

SIGMA_RELS = tuple(count * 25 / 1000 for count in range(1, 12))
"""The synthesized averages: 0.025, 0.05, ..., 0.275."""

DIRECT_SIGMA_RELS = (0.05, 0.1, 0.15, 0.2, 0.25)
"""Those also tracked directly."""

_SEED = 0

Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows progress, from a title and a number of steps; gives a function that advances it."""


@dataclass(frozen=True)
class Result:
    """The results of a demo.

    Attributes:
        folder: its files.
        parameters: of the network.
        raw, averages: measured on the validation images.
        checks: synthesized against directly tracked averages.
        commands: the `ema` commands that were run, quoted for a shell.
        seconds: of the demo.
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
        return min(self.averages, key=lambda measured: measured.loss)

    def to_dict(self) -> dict[str, Any]:
        """The results as data for JSON."""
        return {
            "out": str(self.folder.root),
            "steps": self.settings.steps,
            "checkpoint_every": self.settings.checkpoint_every,
            "parameters": self.parameters,
            "raw": vars(self.raw),
            "averages": [vars(measured) for measured in self.averages],
            "best": self.best.sigma_rel,
            "tracked": [vars(check) for check in self.checks],
            "commands": self.commands,
            "files": [str(path) for path in self.folder.made()],
            "seconds": self.seconds,
        }


def run(out: Path, steps: int, force: bool, say: Say, watch: Watch) -> Result:
    """Train a small diffusion model with the hook, and choose the length of its average afterwards.

    Arguments:
        out: the folder of the results.
        steps: of training; a multiple of 100.
        force: replace an earlier demo in `out`.
        say: prints what is going on.
        watch: shows the progress of the training.

    Raises:
        InvalidValueError: `steps` is not a multiple of 100.
        OutputExistsError: `out` holds other files, or an earlier demo without `force`.
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
        weights = {sigma_rel: load_file(folder.average(sigma_rel)) for sigma_rel in SIGMA_RELS}
        last = load_file(folder.raw)
        raw, averages = measure(Validation(digits.validation, _SEED), trained.model, last, weights)
        best = min(averages, key=lambda measured: measured.loss)
        commands.run("export", str(folder.average(best.sigma_rel)), "--out", str(folder.best), "--force")
        _draw(folder, raw, averages)
        checks = [compare(width, weights[width], load_file(folder.tracked(width)), last) for width in DIRECT_SIGMA_RELS]
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    seconds = time.perf_counter() - started
    return Result(folder, settings, parameters, raw, averages, checks, commands.lines, seconds)


def _train(settings: Settings, digits: Digits, folder: Folder, say: Say, watch: Watch) -> Trained:
    """Train, and save the raw weights and the directly tracked averages."""
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


def _draw(folder: Folder, raw: Measured, averages: list[Measured]) -> None:
    from posthoc_cli import plots

    widths = np.array([measured.sigma_rel for measured in averages])
    losses = np.array([measured.loss for measured in averages])
    errors = np.array([measured.standard_error for measured in averages])
    of_raw = raw.loss, raw.standard_error
    picture = plots.as_file(lambda: plots.loss_figure(widths, losses, errors, of_raw, "validation loss"), ".png")
    files.write_whole(folder.picture("loss"), picture)


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    files.write_whole(path, safetensors.torch.save(dict(tensors)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for the block: faster for so small a network, and the same sums on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Commands:
    """Runs `ema` in another process.

    Attributes:
        lines: the commands so far, quoted for a shell in the current directory.
    """

    def __init__(self, say: Say) -> None:
        self.lines: list[str] = []
        self._say = say

    def run(self, *arguments: str) -> None:
        """Run `ema` with `arguments` and print its output; a PostHocError for another exit code than 0."""
        line = shlex.join(["ema", *arguments])
        self._say("")
        self._say(f"$ {line}")
        command = [sys.executable, "-m", "posthoc_cli", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                out, err = process.communicate()
            except BaseException:
                process.terminate()  # subprocess.run would kill it, and leave partial files
                raise
        for printed in (out + err).splitlines():
            self._say(printed)
        if process.returncode != 0:
            raise PostHocError(f"`{line}`", f"ended with exit code {process.returncode}")
        self.lines.append(line)


@dataclass(frozen=True)
class Measured:
    """One set of weights on the validation images.

    Attributes:
        sigma_rel: of the average; `RAW` for the raw weights.
        loss: the validation loss.
        above_best: difference to the lowest loss of the averages.
        standard_error: of `above_best`, over the images; both losses are measured with the same noise.
    """

    sigma_rel: float
    loss: float
    above_best: float
    standard_error: float


@dataclass(frozen=True)
class DirectCheck:
    """Synthesized weights against the average of the same length tracked directly, in float64.

    Attributes:
        relative_error: || synthesized - tracked || / || tracked || over all parameters.
        raw_distance: the same for the raw weights.
    """

    sigma_rel: float
    relative_error: float
    raw_distance: float


def measure(
    validation: Validation, model: Denoiser, raw: Weights, averages: Mapping[float, Weights]
) -> tuple[Measured, list[Measured]]:
    """The validation losses of the raw weights and of averages by sigma_rel, each loaded into `model`."""
    losses = {}
    for sigma_rel, weights in {**averages, RAW: raw}.items():
        model.load_state_dict(weights)
        losses[sigma_rel] = validation(model)
    of_raw = losses.pop(RAW)
    best = min(losses.values(), key=lambda loss: float(loss.mean()))
    return _measured(RAW, of_raw, best), [_measured(sigma_rel, loss, best) for sigma_rel, loss in losses.items()]


def compare(sigma_rel: float, synthesized: Weights, tracked: Weights, raw: Weights) -> DirectCheck:
    """Distances to the directly tracked average, over its tensors."""
    return DirectCheck(sigma_rel, _relative_distance(synthesized, tracked), _relative_distance(raw, tracked))


def _measured(sigma_rel: float, loss: torch.Tensor, best: torch.Tensor) -> Measured:
    above = loss - best
    return Measured(sigma_rel, float(loss.mean()), float(above.mean()), float(above.std() / len(above) ** 0.5))


def _relative_distance(weights: Weights, reference: Weights) -> float:
    apart = _flat({name: weights[name].double() - value for name, value in reference.items()})
    return float(apart.norm() / _flat(reference).norm())


def _flat(weights: Weights) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in weights.values()])

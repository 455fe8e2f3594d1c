"""The demo from end to end: train, synthesize, measure, export, draw, compare."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file

from posthoc_cli import files, plots
from posthoc_cli.demo.training import UPDATE_EVERY, Denoiser, Digits, Settings, Validation, load_digits, train
from posthoc_cli.errors import InvalidValueError, OutputExistsError, PostHocError
from posthoc_cli.progress import ProgressBar
from posthoc_cli.sweep import SweepReport, sweep
from posthoc_cli.sweep.results import draw

Say = Callable[[str], None]
"""Prints a line."""

Weights = Mapping[str, torch.Tensor]

RAW = 0.0
"""sigma_rel of the raw weights."""

SIGMA_RELS = tuple(count * 25 / 1000 for count in range(1, 12))
"""The synthesized averages: 0.025, 0.05, ..., 0.275."""

DIRECT_SIGMA_RELS = (0.05, 0.1, 0.15, 0.2, 0.25)
"""Those also tracked directly."""


@dataclass(frozen=True)
class Measured:
    """The validation loss of an average, or of the raw weights (`RAW`).

    `above_best` is its difference to that of the best average, and `standard_error` that of the difference over the
    images: both losses are measured with the same noise.
    """

    sigma_rel: float
    loss: float
    above_best: float
    standard_error: float


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
    settings: Settings
    parameters: int
    raw: Measured
    averages: list[Measured]
    checks: list[DirectCheck]
    sweep: SweepReport
    commands: list[str]
    seconds: float

    @property
    def best(self) -> Measured:
        """The average that the sweep chose, which the picture and the page name, too."""
        return next(measured for measured in self.averages if measured.sigma_rel == self.sweep.chosen["sigma_rel"])

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
            "sweep": self.sweep.to_dict()["best"],
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
        InvalidValueError, OutputExistsError, MissingDependencyError: see `Settings`, `Folder.prepare`, `load_digits`.
        PostHocError: a command failed.
    """
    started, threads = time.perf_counter(), torch.get_num_threads()
    settings, folder, commands = Settings(steps), Folder(out), Commands(say)
    digits = load_digits(seed=0)
    folder.prepare(overwrite)
    torch.set_num_threads(1)  # faster for so small a network, and the same sums on every machine
    try:
        model = _train(settings, digits.training, folder, say, watch)
        listed = f"{SIGMA_RELS[0]:g},{SIGMA_RELS[1]:g},...,{SIGMA_RELS[-1]:g}"
        commands.run("info", folder.snapshots)
        commands.run("error-plot", folder.snapshots, "--out", folder.error_picture, "--overwrite")
        commands.run("synthesize", folder.snapshots, "--sigma-rel", listed, "--out", folder.averages, "--overwrite")
        say("")
        say(
            f"measuring the validation loss of {len(SIGMA_RELS)} averages and of the raw weights, and choosing the best"
        )
        weights = {sigma_rel: load_file(folder.average(sigma_rel)) for sigma_rel in SIGMA_RELS}
        last = load_file(folder.raw)
        validation = Validation(digits.validation, seed=0)
        swept = sweep(
            folder.snapshots, lambda averaged: float(validation(averaged).mean()), model=model, values=SIGMA_RELS,
            name="validation loss",
        )  # fmt: skip
        swept.write(folder.sweep)
        best = swept.chosen["sigma_rel"]
        raw, averages = measure(validation, model, last, weights, best)
        commands.run("export", folder.average(best), "--out", folder.best, "--overwrite")
        figure = partial(draw, {**swept.to_dict(), "raw": raw.loss})
        files.write_whole(folder.loss_picture, plots.as_file(figure, ".png"))
        commands.run("report", folder.snapshots, "--sweep", folder.sweep, "--out", folder.page, "--overwrite")
        checks = [compare(width, weights[width], load_file(folder.tracked(width)), last) for width in DIRECT_SIGMA_RELS]
    finally:
        torch.set_num_threads(threads)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - started
    return Result(folder, settings, parameters, raw, averages, checks, swept, commands.lines, seconds)


def _train(settings: Settings, digits: Digits, folder: Folder, say: Say, watch: ProgressBar) -> Denoiser:
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
        model, direct = train(settings, digits, folder.snapshots, DIRECT_SIGMA_RELS, advance)
    say(f"trained in {time.perf_counter() - started:.0f} s")
    files.write_whole(folder.raw, safetensors.torch.save(model.state_dict()))
    for average in direct:
        files.write_whole(folder.tracked(average.sigma_rel), safetensors.torch.save(average.by_name(model)))
    return model


class Commands:
    """Runs `ema` in another process; `lines` are the commands so far, quoted for a shell in the current directory."""

    def __init__(self, say: Say) -> None:
        self._say, self.lines = say, list[str]()

    def run(self, *words: str | Path) -> None:
        """Run `ema` with `words` and print its output; a PostHocError for another exit code than 0."""
        arguments = list(map(str, words))
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


def measure(
    validation: Validation, model: Denoiser, raw: Weights, averages: Mapping[float, Weights], best: float
) -> tuple[Measured, list[Measured]]:
    """The validation losses of the raw weights and of averages by sigma_rel, each loaded into `model`."""
    losses = {}
    for sigma_rel, weights in {**averages, RAW: raw}.items():
        model.load_state_dict(weights)
        losses[sigma_rel] = validation(model)
    of_raw, of_best = losses.pop(RAW), losses[best]
    return _measured(RAW, of_raw, of_best), [_measured(sigma_rel, loss, of_best) for sigma_rel, loss in losses.items()]


def _measured(sigma_rel: float, loss: torch.Tensor, best: torch.Tensor) -> Measured:
    above = loss - best
    return Measured(sigma_rel, float(loss.mean()), float(above.mean()), float(above.std() / len(above) ** 0.5))


def compare(sigma_rel: float, synthesized: Weights, tracked: Weights, raw: Weights) -> DirectCheck:
    """Distances to the directly tracked average, over its tensors."""
    truth = torch.cat([value.reshape(-1) for value in tracked.values()])
    found = [torch.cat([weights[name].double().reshape(-1) for name in tracked]) for weights in (synthesized, raw)]
    return DirectCheck(sigma_rel, *(float((values - truth).norm() / truth.norm()) for values in found))


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
        """One of the averages, as named by `ema synthesize`."""
        return self.averages / f"sigma_rel-{sigma_rel!r}.safetensors"

    def tracked(self, sigma_rel: float) -> Path:
        """An average that was tracked directly."""
        return self.root / "tracked" / f"sigma_rel-{sigma_rel!r}.safetensors"

    def prepare(self, overwrite: bool) -> None:
        """Make the folder, or with `overwrite` delete the files of an earlier demo; else an OutputExistsError."""
        if not self.root.parent.is_dir():
            raise InvalidValueError("out", "its parent folder does not exist", value=self.root)
        if self.root.exists() and not self.root.is_dir():
            raise OutputExistsError(self.root, "is a file", "name a folder")
        marker = self.root / _MARKER
        if self.root.is_dir() and any(self.root.iterdir()):
            if not marker.is_file():
                raise OutputExistsError(self.root, "is not empty, and no earlier demo made it", "name another folder")
            if not overwrite:
                raise OutputExistsError(
                    self.root, "holds an earlier demo", "name another folder, or overwrite=True to replace it"
                )
        for folder in (self.snapshots, self.averages, self.root / "tracked", self.sweep):
            if folder.is_symlink():
                raise OutputExistsError(folder, "is a symbolic link, and no demo made it", "remove it")
        with files.reported_as_write_error(self.root):
            for pattern in _MADE:
                for path in self.root.glob(pattern):
                    files.system.unlink(path)
            for folder in (self.root, self.averages, self.root / "tracked"):
                files.make_directory(folder)
        files.write_whole(marker, _MARKER_TEXT.encode(), overwrite=True)

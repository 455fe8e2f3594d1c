"""The demo from end to end: train, synthesize, measure, export, draw, compare."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file

from posthoc_cli import files, plots
from posthoc_cli.demo.training import UPDATE_EVERY, Denoiser, Settings, Validation, make_waves, train
from posthoc_cli.errors import OutputExistsError, PostHocError
from posthoc_cli.progress import ProgressBar
from posthoc_cli.sweep import SweepReport, sweep
from posthoc_cli.sweep.results import RAW, draw
from posthoc_cli.sweep.search import Trial

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
    settings: Settings
    sweep: SweepReport
    checks: list[DirectCheck]
    commands: list[str]
    seconds: float

    @property
    def best(self) -> float:
        """The sigma_rel that the sweep chose, which the picture and the page name, too."""
        return self.sweep.chosen["sigma_rel"]

    def to_dict(self) -> dict[str, Any]:
        """The results as data for JSON."""
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
        InvalidValueError, OutputExistsError: see `Settings`, `Folder.prepare`.
        PostHocError: a command failed.
    """
    started, threads = time.perf_counter(), torch.get_num_threads()
    settings, folder, commands = Settings(steps), Folder(out), Commands(say)
    folder.prepare(overwrite)
    torch.set_num_threads(1)  # faster for so small a network, and the same sums on every machine
    try:
        model = _train(settings, folder, say, watch)
        listed = f"{SIGMA_RELS[0]:g},{SIGMA_RELS[1]:g},...,{SIGMA_RELS[-1]:g}"
        commands.run("info", folder.snapshots)
        commands.run("error-plot", folder.snapshots, "--out", folder.error_picture, "--overwrite")
        commands.run("synthesize", folder.snapshots, "--sigma-rel", listed, "--out", folder.averages, "--overwrite")
        say("")
        say(f"measuring {len(SIGMA_RELS)} averages and the raw weights on images that training never saw")
        swept = _measure(folder, model)
        commands.run("export", folder.average(swept.chosen["sigma_rel"]), "--out", folder.best, "--overwrite")
        files.write_whole(folder.loss_picture, plots.as_file(partial(draw, swept.to_dict()), ".png"))
        commands.run("report", folder.snapshots, "--sweep", folder.sweep, "--out", folder.page, "--overwrite")
        checks = [compare(folder, width) for width in DIRECT_SIGMA_RELS]
    finally:
        torch.set_num_threads(threads)
    return Result(folder, settings, swept, checks, commands.lines, time.perf_counter() - started)


def _train(settings: Settings, folder: Folder, say: Say, watch: ProgressBar) -> Denoiser:
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
    files.write_whole(folder.raw, safetensors.torch.save(model.state_dict()))
    for average in direct:
        files.write_whole(folder.tracked(average.sigma_rel), safetensors.torch.save(average.by_name(model)))
    return model


def _measure(folder: Folder, model: Denoiser) -> SweepReport:
    """The validation losses of the averages and of the raw weights, which `model` has; written down for a page."""
    validation = Validation(make_waves(VALIDATION_IMAGES, seed=1), seed=0)

    def loss(measured: Denoiser) -> float:
        return float(validation(measured).mean())

    raw = Trial(RAW, 0.0, 0, loss(model))
    swept = sweep(folder.snapshots, loss, model=model, values=SIGMA_RELS, name="validation loss")
    swept = replace(swept, trials=(raw, *swept.trials))
    swept.write(folder.sweep)
    return swept


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


def compare(folder: Folder, sigma_rel: float) -> DirectCheck:
    """Distances of the synthesized average and of the raw weights to the average that was tracked directly."""
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
        """One of the averages, as named by `ema synthesize`."""
        return self.averages / f"sigma_rel-{sigma_rel!r}.safetensors"

    def tracked(self, sigma_rel: float) -> Path:
        """An average that was tracked directly."""
        return self.root / "tracked" / f"sigma_rel-{sigma_rel!r}.safetensors"

    def prepare(self, overwrite: bool) -> None:
        """Make the folder, or with `overwrite` delete the files of an earlier demo; else an OutputExistsError."""
        files.check_parent("out", self.root)
        marker = self.root / _MARKER
        is_empty = self.root.is_dir() and not any(self.root.iterdir())
        if self.root.exists() and not (is_empty or marker.is_file()):
            raise OutputExistsError(self.root, "is there already, and no earlier demo made it", "name another folder")
        if marker.is_file() and not overwrite:
            hint = "name another folder, or overwrite=True to replace it"
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
        files.write_whole(marker, _MARKER_TEXT.encode(), overwrite=True)

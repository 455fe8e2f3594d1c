"""A run as a user makes it: training with thinning and a resume, synthesis, export into shards, pruning.

The weights of every step are known in advance, so that every snapshot and every output has one right content, which
is computed here from the formula in float64.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from factories import FloatArray, exact_average

from posthoc_cli import PostHocEMA
from posthoc_cli.cli import main
from posthoc_cli.errors import FileFormatError, PostHocError, WriteError
from posthoc_cli.snapshots.check import list_contents, verify, verify_measurements
from posthoc_cli.snapshots.directory import find_snapshots
from posthoc_cli.snapshots.outputs import decode_output
from posthoc_cli.snapshots.reader import TensorFile, read_header, verify_payload

SIGMA_RELS = (0.05, 0.28)
STEPS = 10
STOPS = 7
"""The first training ends here, without a state of its last two steps."""
SAVES = 5
STATE = "state.safetensors"
TARGETS = (0.1, 0.2)


class Network(torch.nn.Module):
    """Two parameters and a buffer, set to what they are at a step."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 4))
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def go_to(self, step: int) -> None:
        """Be what the network is after so many steps."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(weights_at(step)[name]))
            self.count.fill_(step)


@functools.cache
def weights_at(step: int) -> dict[str, FloatArray]:
    """The parameters after so many steps: a walk, in values that float32 holds exactly."""
    steps = np.random.default_rng(7).standard_normal((step + 1, 19)).astype(np.float32)
    at = steps.sum(axis=0, dtype=np.float32).astype(np.float64) + 3.0
    return {"weight": at[:16].reshape(4, 4), "bias": at[16:]}


@functools.cache
def right_average(name: str, t: int, sigma_rel: float) -> FloatArray:
    """What a snapshot holds, in float64."""
    times = range(1, t + 1)
    return exact_average([weights_at(step)[name] for step in times], sigma_rel, [float(step) for step in times])


# --- what the user does


def begin(directory: Path, model: Network) -> PostHocEMA:
    """A tracker that goes on with what is there, in the way that the README says."""
    if (directory / STATE).exists():
        tracker = new_tracker(directory, model)
        tracker.load_state(directory / STATE)
        return tracker
    stored = find_snapshots(directory)
    if {snapshot.info.sigma_rel for snapshot in stored} == set(SIGMA_RELS):
        return PostHocEMA.from_path(directory, model)
    for snapshot in stored:  # the first time of the run is not complete: there is nothing to go on from
        snapshot.path.unlink()
    return new_tracker(directory, model)


def new_tracker(directory: Path, model: Network) -> PostHocEMA:
    return PostHocEMA.from_model(
        model, directory, SIGMA_RELS, update_every=1, checkpoint_every=1, max_checkpoints=3, checkpoint_dtype=None
    )


def train(directory: Path, until: int, note: Callable[..., None] = lambda *_: None) -> list[str]:
    """Train from where the directory is to step `until`; returns the errors of writing that training went past.

    Arguments:
        note: told what is durable, whenever the tracker says that everything is.
    """
    model, errors = Network(), []
    tracker = begin(directory, model)
    try:
        for step in range(tracker.step + 1, until + 1):
            model.go_to(step)
            try:
                tracker.update_(model)
                if step % 2 == 0:
                    tracker.flush()
                    note("durable", contents(directory))
            except WriteError as error:
                errors.append(str(error))
            if step == SAVES:
                tracker.save_state(directory / STATE)
                note("durable", contents(directory))
    finally:
        tracker.close()
    note("durable", contents(directory))
    return errors


def run_ema(*arguments: object) -> tuple[int, str]:
    """Run the command in this process: its exit code, and what it said on stderr."""
    before = sys.argv, sys.excepthook, warnings.showwarning, logging.root.handlers[:], signal.getsignal(signal.SIGTERM)
    sys.argv = ["ema", *map(str, arguments)]
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code, err.getvalue()
    finally:
        sys.argv, sys.excepthook, warnings.showwarning, logging.root.handlers[:], handler = before
        signal.signal(signal.SIGTERM, handler)


@dataclass
class Run:
    """The whole scenario in a folder.

    Attributes:
        errors: what went wrong on the way, each a line.
    """

    root: Path
    note: Callable[..., None] = lambda *_: None
    make_room: Callable[[], None] = lambda: None
    errors: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """The snapshots."""
        return self.root / "run"

    @property
    def outputs(self) -> list[Path]:
        """What is synthesized."""
        return [self.root / "out" / f"sigma_rel-{target:g}.safetensors" for target in TARGETS]

    @property
    def shards(self) -> Path:
        """What is exported."""
        return self.root / "shards"

    def do(self) -> None:
        """Do everything; what fails is done once more."""
        if not (self.directory / STATE).exists():
            self._twice(lambda: self._train(STOPS))
        self._twice(lambda: self._train(STEPS))
        out = ["--out", self.root / "out", "--force"]
        self._twice(lambda: self._ema("synthesize", self.directory, "--sigma-rel", "0.1,0.2", *out))
        self.note("output", *(path.relative_to(self.root).as_posix() for path in self.outputs))
        shards = ["--out", self.shards, "--max-shard-size", "40", "--force"]
        self._twice(lambda: self._ema("export", self.outputs[0], *shards))
        self.note("output", "shards")
        self._twice(lambda: self._ema("prune", self.directory, "--keep", 2, "--yes"))

    def _twice(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except (PostHocError, CommandError) as error:
            self.errors.append(str(error))
            self.make_room()
            stage()
        self.make_room()

    def _train(self, until: int) -> None:
        self.errors += train(self.directory, until, self.note)

    def _ema(self, *arguments: object) -> None:
        code, err = run_ema(*arguments)
        if code:
            raise CommandError(err.strip() or f"exit code {code}")


class CommandError(Exception):
    """A command that ended with an exit code above 0."""


# --- what must be so


def contents(directory: Path) -> dict[str, bytes]:
    """Snapshots and state, by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def tensors_of(path: Path) -> dict[str, bytes]:
    """A file's tensors, verified."""
    with TensorFile(path) as file:
        return {name: file.read(name).tobytes() for name in file.header.tensors}


def alike(tensors: dict[str, bytes], others: dict[str, bytes]) -> bool:
    """Whether two runs hold the same: the averages but for float32's last digits, to which going on from snapshots has
    rounded what was kept in float64. Whether they are right is another question: see `wrong_snapshots`.
    """
    if tensors.keys() != others.keys():
        return False
    for name in tensors.keys() - {"count"}:
        one, other = (np.frombuffer(held[name], dtype=np.float32) for held in (tensors, others))
        if one.shape != other.shape or not np.abs(one - other).max() <= 2.0**-20 * np.abs(one).max():
            return False
    return tensors.get("count") == others.get("count")


def problems_of(directory: Path) -> list[str]:
    """What is wrong in a directory of snapshots, by all that can be verified."""
    if not any(path.suffix == ".safetensors" for path in directory.iterdir()):
        return []
    found = verify_measurements(verify(list_contents(directory)))
    return [*found.problems, *(f"{file.path.name}: {file.detail}" for file in found.files if not file.is_fine)]


def damaged_files(folder: Path) -> list[str]:
    """Safetensors files anywhere under a folder that are not whole, a line each."""
    found = []
    for path in folder.rglob("*.safetensors"):
        try:
            verify_payload(path, read_header(path))
        except FileFormatError as error:
            found.append(str(error))
    return found


def wrong_snapshots(directory: Path) -> list[str]:
    """Snapshots whose content is not the right average. Float32 sums of ten terms: within 4e-6 of the largest."""
    wrong = []
    for snapshot in find_snapshots(directory):
        with TensorFile(snapshot.path) as file:
            for name in ("weight", "bias"):
                right = right_average(name, int(snapshot.info.t), snapshot.info.sigma_rel)
                stored = file.read(name).view(np.float32).reshape(right.shape)
                if not np.abs(stored - right).max() <= 4e-6 * np.abs(right).max():
                    wrong.append(f"{snapshot.path.name}: {name} is not the average that it should be")
    return wrong


def wrong_output(path: Path) -> list[str]:
    """What is wrong with an output, which names its snapshots and coefficients: those have right contents."""
    header = read_header(path)
    verify_payload(path, header)
    info = decode_output(path, header)
    wrong = []
    with TensorFile(path) as file:
        for name in ("weight", "bias"):
            if name not in header.tensors:  # in another shard
                continue
            right = sum(c * right_average(name, *_t_and_sigma_rel(file_name)) for file_name, c in info.snapshots)
            scale = sum(abs(c) for _, c in info.snapshots) * np.abs(right).max()
            found = file.read(name).view(np.float32).reshape(np.shape(right))
            if not np.abs(found - right).max() <= 4e-6 * scale:
                wrong.append(f"{path.name}: {name} is not the sum that it should be")
    return wrong


def _t_and_sigma_rel(file_name: str) -> tuple[int, float]:
    t, _, sigma_rel = file_name.removesuffix(".safetensors").partition("-")
    return int(t), float(sigma_rel)

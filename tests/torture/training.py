"""A network whose weights at every step are known in advance, and a user's script that trains it.

Every snapshot and every output therefore has one correct content, which is computed here from the
formula in float64.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import FloatArray, exact_weights, read_output, snapshots_in
from safetensors.numpy import load_file
from torch import nn

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import PostHocError, WriteError

SIGMA_RELS = (0.05, 0.28)
STATE = "state.pt"


@dataclass
class Tally:
    """The number of faults, kills or hostile inputs that were tried, and a line for each
    failure."""

    tried: int = 0
    # something durable was missing, changed or incomplete
    lost: list[str] = field(default_factory=list)
    # a fault was not found, or not reported as one clear error
    missed: list[str] = field(default_factory=list)
    # foreign code ran, or a file outside was touched
    executed: list[str] = field(default_factory=list)

    @contextmanager
    def judged(self, what: str, named: str = "", refusable: bool = True) -> Iterator[None]:
        """Require that the block ends without an error or with one short error that contains
        `named`."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - any other error is a failure
            text = str(error)
            is_clear = named in text and text.isprintable() and len(text) <= 2_000
            if not (refusable and is_clear and isinstance(error, PostHocError)):
                self.missed.append(
                    f"{what}: {type(error).__name__}: {text[:500]!a}; {named!r} was to be named"
                )


class Network(nn.Module):
    """A network of two parameters, with 4 `rows` and with 3 elements, and a buffer."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, 4))
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def go_to(self, step: int) -> None:
        for parameter in self.parameters():
            values = weights_up_to(step, parameter.numel())[-1]
            parameter.copy_(torch.from_numpy(values).view_as(parameter))
        self.count.fill_(step)


def weights_up_to(step: int, elements: int) -> FloatArray:
    """Return a parameter after the steps 1 to `step`, in exact float32 values: shape [step,
    elements]."""
    steps = 64 if step <= 64 else 4096 * math.ceil(step / 4096)
    return _weights(steps, elements)[:step]


@lru_cache(maxsize=8)
def _weights(steps: int, elements: int) -> FloatArray:
    # A walk: thinning keeps nearly the same snapshots whether or not all of them could be measured.
    moves = np.random.default_rng(7).standard_normal((steps, elements))
    walk = 3.0 + np.cumsum(moves, axis=0)
    return walk.astype(np.float32).astype(np.float64)


@lru_cache(maxsize=1000)
def exact_average(step: int, sigma_rel: float, elements: int, every: int = 1) -> FloatArray:
    """Return a parameter's average at a step with updates `every` so many."""
    shares = exact_weights(sigma_rel, range(every, step + 1, every))
    return shares @ weights_up_to(step, elements)[every - 1 :: every]


# --- what the user does


def begin(directory: Path, network: Network, **settings: object) -> PostHocEMA:
    """Return a tracker that resumes the run in a directory as the README shows."""
    state = directory / STATE
    if times := complete_times(directory):
        network.go_to(max(times))
    defaults = {"update_every": 1, "checkpoint_dtype": torch.float32, "resume": "auto"}
    settings = defaults | settings
    tracker = PostHocEMA.from_model(network, directory, SIGMA_RELS, **settings)  # type: ignore[arg-type]
    if state.exists():
        tracker.load_state_dict(torch.load(state, weights_only=True))
    return tracker


def complete_times(directory: Path) -> list[int]:
    stored = Counter(snapshot.step for snapshot in snapshots_in(directory))
    return [step for step, count in stored.items() if count == len(SIGMA_RELS)]


def remove_half_begun(directory: Path) -> None:
    """Remove the first snapshots of a training that was killed while writing them: it cannot be
    resumed from there."""
    if not (complete_times(directory) or (directory / STATE).exists()):
        for snapshot in snapshots_in(directory):
            snapshot.path.unlink()


def train(
    directory: Path,
    until: int,
    save_at: Collection[int],
    note: Callable[[dict[str, bytes]], None] | None = None,
    rows: int = 4,
    **settings: object,
) -> list[str]:
    """Resume the run in a directory and train to step `until`; return the errors of writing that
    training survived.

    The state is saved at the steps `save_at`. `note` is called with the durable snapshots at every
    second step.
    """
    network = Network(rows)
    errors = []
    remove_half_begun(directory)
    tracker = begin(directory, network, **settings)
    try:
        for step in range(tracker.step + 1, until + 1):
            network.go_to(step)
            try:
                tracker.update_(network)
                if step % 2 == 0 and note:
                    tracker.flush()
                    note(contents(directory))
            except WriteError as error:
                errors.append(str(error))
            if step in save_at:
                torch.save(tracker.state_dict(), directory / "new-state")
                (directory / "new-state").replace(directory / STATE)
    finally:
        tracker.close()
    if note:
        note(contents(directory))
    return errors


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


# --- checks


def problems(path: Path) -> list[str]:
    found = Run(path).check()
    broken = [file for file in found.files if not file.is_fine]
    return [*found.problems, *(f"{file.path.name}: {file.detail}" for file in broken)]


def wrong_snapshots(directory: Path) -> list[str]:
    """Return a line for each snapshot that is damaged, or differs from the average that it
    claims."""
    wrong = list[str]()
    for path in directory.glob("superseded/*.safetensors"):
        wrong += problems(path)
    if not any(directory.glob("*.safetensors")):
        return wrong
    wrong += problems(directory)
    if wrong:
        return wrong
    for snapshot in Run(directory).snapshots:
        values = load_file(snapshot.path)
        name = f"{snapshot.step:016d}-{snapshot.sigma_rel}.safetensors"
        if values.pop("count") != snapshot.step or snapshot.path.name != name:
            wrong.append(f"{snapshot.path.name}: has another count or name at step {snapshot.step}")
        every = snapshot.schedule.update_every
        for name, value in values.items():
            exact = exact_average(snapshot.step, snapshot.sigma_rel, value.size, every)
            wrong += _away(f"{snapshot.path.name}: {name}", value, exact)
    return wrong


def wrong_output(path: Path) -> list[str]:
    """Return what is wrong with an output, or with shards, by the snapshots and coefficients that
    they name."""
    try:
        wrong = problems(path)
        if path.is_dir():
            for shard in path.glob("*.safetensors"):
                wrong += wrong_output(shard)
            return wrong
        info = read_output(path)
    except PostHocError as error:
        return [str(error)]
    if wrong:
        return wrong
    values = load_file(path)
    coefficients = [used.coefficient for used in info.snapshots]
    if abs(sum(coefficients) - 1) > 1e-9:
        wrong.append(f"{path.name}: coefficients add up to {sum(coefficients)}")
    for name in values.keys() & {"weight", "bias"}:
        exact: Any = 0.0
        for used in info.snapshots:
            t, _, sigma_rel = used.file.removesuffix(".safetensors").partition("-")
            average = exact_average(int(t), float(sigma_rel), values[name].size)
            exact += used.coefficient * average
        wrong += _away(f"{path.name}: {name}", values[name], exact, sum(map(abs, coefficients)))
    return wrong


def _away(what: str, value: FloatArray, exact: FloatArray, scale: float = 1.0) -> list[str]:
    """Return a line if values differ by more than updates and sums in float32 can: a missing update
    shows."""
    off = np.abs(value.ravel() - exact)
    away = float(off.max() / np.abs(exact).max())
    if away <= 1e-5 * scale:
        return []
    return [f"{what} is {away:.2g} away from its average"]

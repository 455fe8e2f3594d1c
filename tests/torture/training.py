"""A network whose weights at every step are known in advance, and a user's script that trains it.

Every snapshot and every output therefore has one correct content, which is computed here from the
formula in float64.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from factories import exact_weights, read_output, snapshots_in
from safetensors.numpy import load_file
from torch import nn

from posthoc_cli import PostHocEMA, PostHocError, Run
from posthoc_cli.errors import WriteError

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
    def judged(self, what, named="", refusable=True):
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


WALK = np.random.default_rng(7).standard_normal((50_000, 19)).cumsum(axis=0).astype(np.float32)
"""All weights after each step. Of a walk thinning keeps nearly the same snapshots whether or not
all of them could be measured."""
PLACES = {"weight": slice(0, 16), "bias": slice(16, 19)}
"""Those of each parameter."""


class Network(nn.Module):
    """A network of two parameters and a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def go_to(self, step):
        weights = torch.from_numpy(WALK[step - 1])
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[PLACES[name]].view_as(parameter))
        self.count.fill_(step)


@lru_cache(maxsize=1000)
def exact_average(step, sigma_rel, every=1):
    """Return the average of all weights at a step with updates `every` so many."""
    shares = exact_weights(sigma_rel, range(every, step + 1, every))
    return shares @ WALK[every - 1 : step : every]


# --- what the user does


def begin(directory, network, **settings):
    """Return a tracker that resumes the run in a directory as the README shows."""
    state = directory / STATE
    if times := complete_times(directory):
        network.go_to(max(times))
    defaults = {"update_every": 1, "checkpoint_dtype": torch.float32, "resume": "auto"}
    settings = defaults | settings
    tracker = PostHocEMA.from_model(network, directory, SIGMA_RELS, **settings)
    if state.exists():
        tracker.load_state_dict(torch.load(state, weights_only=True))
    return tracker


def complete_times(directory):
    stored = Counter(snapshot.step for snapshot in snapshots_in(directory))
    return [step for step, count in stored.items() if count == len(SIGMA_RELS)]


def remove_half_begun(directory):
    """Remove the first snapshots of a training that was killed while writing them: it cannot be
    resumed from there."""
    if not (complete_times(directory) or (directory / STATE).exists()):
        for snapshot in snapshots_in(directory):
            snapshot.path.unlink()


def train(directory, until, save_at, note=None, **settings):
    """Resume the run in a directory and train to step `until`; return the errors of writing that
    training survived.

    The state is saved at the steps `save_at`. `note` is called with the durable snapshots at every
    second step.
    """
    network = Network()
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


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


# --- checks


def problems(path):
    found = Run(path).check()
    broken = [file for file in found.files if not file.is_fine]
    return [*found.problems, *(f"{file.path.name}: {file.detail}" for file in broken)]


def wrong_snapshots(directory):
    """Return a line for each snapshot that is damaged, or differs from the average that it
    claims."""
    wrong = []
    for path in directory.glob("superseded/*.safetensors"):
        wrong += problems(path)
    if any(directory.glob("*.safetensors")):
        wrong += problems(directory)
    if wrong:
        return wrong
    for snapshot in snapshots_in(directory):
        values = load_file(snapshot.path)
        file = snapshot.path.name
        if values.pop("count") != snapshot.step:
            wrong.append(f"{file}: has another count at step {snapshot.step}")
        if file != f"{snapshot.step:016d}-{snapshot.sigma_rel}.safetensors":
            wrong.append(f"{file}: is of step {snapshot.step}")
        every = snapshot.schedule.update_every
        exact = exact_average(snapshot.step, snapshot.sigma_rel, every)
        for name, value in values.items():
            wrong += away(f"{file}: {name}", value.ravel(), exact[PLACES[name]], 1e-5)
    return wrong


def wrong_output(path):
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
    coefficients = [used.coefficient for used in info.snapshots]
    if abs(sum(coefficients) - 1) > 1e-9:
        wrong.append(f"{path.name}: coefficients add up to {sum(coefficients)}")
    exact = np.zeros(WALK.shape[1])
    for used in info.snapshots:
        t, _, sigma_rel = used.file.removesuffix(".safetensors").partition("-")
        exact += used.coefficient * exact_average(int(t), float(sigma_rel))
    most = 1e-5 * sum(map(abs, coefficients))
    values = load_file(path)
    for name in values.keys() & PLACES.keys():
        wrong += away(f"{path.name}: {name}", values[name].ravel(), exact[PLACES[name]], most)
    return wrong


def away(what, value, exact, most):
    """Return a line if values differ by more than updates and sums in float32 can: a missing update
    shows."""
    distance = float(np.abs(value - exact).max() / np.abs(exact).max())
    if distance <= most:
        return []
    return [f"{what} is {distance:.2g} away from its average"]

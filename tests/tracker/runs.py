"""Trainings whose steps depend on their numbers only, so that two runs can be compared, and what
they leave on disk."""

from contextlib import suppress
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from factories import averages_in, exact_average
from torch import nn
from truth import distance

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import DirectoryError
from posthoc_cli.snapshots.entry import tensor_bytes

EITHER_DEVICE = pytest.mark.parametrize("device", ["cpu", "model"])
"""Averages on the host or on the model's own device."""


class Training:
    """A network whose steps depend on their numbers and a `salt`; `path` holds its state after each
    step."""

    def __init__(self, seed=0, model=None, size=0.003):
        torch.manual_seed(seed)
        self.model = model
        if model is None:
            layers = nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 4)
            self.model = nn.Sequential(*layers)
        self.path = []
        self.size = size

    def run(self, last, ema=None, salt=0, scale=0.0):
        """Go on to a step; with `scale`, on a clock of that interval."""
        for number in range(len(self.path) + 1, last + 1):
            generator = torch.Generator().manual_seed(1000 * salt + number)
            for tensor in self.model.state_dict().values():
                change = self.size * torch.randn(tensor.shape, generator=generator)
                if tensor.is_floating_point():
                    tensor.copy_(tensor.float() + change)
                else:
                    tensor.add_(1)
            self.path.append(self.state())
            if ema is not None:
                ema.update_(self.model, scale * number or None)
        return self

    def state(self):
        return deepcopy(self.model.state_dict())

    def at(self, number):
        """Return a new training that was restored from the checkpoint of a step."""
        made = Training(seed=3)
        made.path = self.path[:number]
        made.model.load_state_dict(made.path[-1])
        return made

    def exact(self, sigma_rel, updates=()):
        """Return the average of all but counters over updates at these steps, or at every second
        one, in float64."""
        updates = updates or range(2, len(self.path) + 1, 2)
        exact = {}
        for name, value in self.path[0].items():
            if value.is_floating_point():
                values = [self.path[step - 1][name].double() for step in updates]
                average = exact_average(values, sigma_rel, updates)
                exact[name] = torch.from_numpy(average)
        return exact

    def error(self, ema, updates=()):
        """Return the largest relative distance of a tracked average from the exact one."""
        assert ema.step == len(self.path)
        distances = []
        for sigma_rel, found in averages_in(ema.state_dict()).items():
            exact = self.exact(float(sigma_rel), updates)
            distances.append(distance(found, exact))
        return max(distances)


def track(model, folder, *sigma_rels, **settings):
    """Return a tracker that by default takes in every step."""
    return PostHocEMA.from_model(model, folder, *sigma_rels, **{"update_every": 1} | settings)


def update(tracker, model, steps):
    for _ in range(steps):
        tracker.update_(model)


def wait_for_writers(folder):
    """Wait until this process's trackers have written all due snapshots to a folder, or failed
    to."""
    with suppress(DirectoryError):  # the folder has no snapshot yet
        PostHocEMA.from_path(folder)


def times(folder):
    return {snapshot.t for snapshot in Run(folder).snapshots}


def steps(folder):
    """Return the step of each snapshot, in the order of time."""
    return [snapshot.step for snapshot in Run(folder).snapshots]


def superseded(folder):
    return len([*folder.glob("superseded/*")])


def contents(folder):
    """Return the headers, but for the run's id, and the tensors of the snapshots on the
    schedule."""
    result = {}
    for snapshot in Run(folder).snapshots:
        if snapshot.step % snapshot.schedule.checkpoint_every:
            continue
        tensors = {}
        for name in snapshot.entries:
            tensors[name] = bytes(tensor_bytes(snapshot.tensor(name)))
        result[snapshot.path.name] = replace(snapshot, run_id=""), tensors
    return result


def assert_near(found, exact, within=1e-06):
    """Fail unless all exact tensors are found within a relative and absolute tolerance."""
    for name, tensor in exact.items():
        own = found[name].double()
        assert torch.allclose(own, tensor.double(), rtol=within, atol=within), name

"""A run for the commands."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from ema_command import run_ema
from torch import nn

from posthoc_cli import PostHocEMA


@pytest.fixture(scope="session")
def _recorded_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).half())
    model[2].bias.requires_grad_(False)
    settings = {"checkpoint_every": 100, "max_checkpoints": None}
    with PostHocEMA.from_model(model, folder, **settings) as tracker:
        for _ in range(2000):
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            tracker.update_(model)
    return folder


@pytest.fixture
def run(_recorded_run, tmp_path):
    """A copy of a directory with snapshots at 20 times of 2 profiles, up to step 2,000; a test may
    change it."""
    return Path(shutil.copytree(_recorded_run, tmp_path / "run"))


@pytest.fixture
def typed(run, monkeypatch):
    """Return a function that runs `ema` with a line of arguments in the folder of the run."""
    monkeypatch.chdir(run.parent)
    return lambda line: run_ema(*shlex.split(line))

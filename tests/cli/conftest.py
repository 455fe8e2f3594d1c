"""A run for the commands."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from posthoc_cli import PostHocEMA


@pytest.fixture(scope="session")
def _recorded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "run"
    torch.manual_seed(0)
    layers = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).half()
    model = nn.Sequential(*layers)
    model[2].bias.requires_grad_(False)
    settings = {"checkpoint_every": 100, "max_checkpoints": None}
    with PostHocEMA.from_model(model, folder, **settings) as tracker:
        for _ in range(2000):
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            tracker.update_(model)
    return folder


@pytest.fixture
def run(_recorded_run: Path, tmp_path: Path) -> Path:
    """A copy of a directory with snapshots at 20 times of 2 profiles, up to step 2,000; a test may
    change it."""
    return Path(shutil.copytree(_recorded_run, tmp_path / "run"))

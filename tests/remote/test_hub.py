"""Repositories of the Hub, read by its own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from remote.servers import Server, serving
from safetensors.torch import load_file, save_file

from posthoc_cli import Run

STEPS = (1000, 3000, 512000)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    """A server of a repository with one checkpoint in each revision."""
    rng = np.random.default_rng(0)
    for step in STEPS:
        folder = tmp_path / f"served/org/model-160m/step{step}"
        folder.mkdir(parents=True)
        weights = {"w": torch.from_numpy(rng.normal(size=(300, 400)).astype(np.float32))}
        torch.save(weights, folder / "pytorch_model.bin")
        save_file(weights, folder / "model.safetensors")
    (tmp_path / "served/org/model-160m/main").mkdir()
    with serving(tmp_path / "served") as server:
        yield server


def test_revisions_of_a_repository_are_checkpoints_of_a_run(served: Server, tmp_path: Path) -> None:
    home = {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_topsecret"}
    place, out = "hf://org/model-160m@step*", tmp_path / "mean.safetensors"

    def ema(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "posthoc_cli", *map(str, arguments)]
        return subprocess.run(command, env=os.environ | home, capture_output=True, text=True, check=False)

    info = json.loads(ema("info", place, "--json").stdout)
    assert [checkpoint["t"] for checkpoint in info["checkpoints"]] == list(STEPS)
    done = ema("synthesize", place, "--target", "last:2", "--out", out)
    assert done.returncode == 0, done.stderr
    last = [load_file(tmp_path / f"served/org/model-160m/step{step}/model.safetensors")["w"] for step in STEPS[-2:]]
    np.testing.assert_allclose(load_file(out)["w"], torch.stack(last).double().mean(0), rtol=3e-7, atol=1e-8)
    sent = sum(path.stat().st_size for path in (tmp_path / "served").rglob("model.safetensors"))
    assert served.sent < 4 * sent and not any((tmp_path / "home").rglob("*.safetensors"))
    refused = ema("info", "hf://org/model-160m@none")
    assert refused.returncode == 2 and "no such" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert "topsecret" not in refused.stderr
    assert repr(Run("hf://org/model-160m@step1")).startswith("Run('hf://org/model-160m@step1': ")

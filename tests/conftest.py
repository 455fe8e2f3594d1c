"""Fixtures that many tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors: more threads only get in the way of the other test processes."""
    torch.set_num_threads(1)

"""Runs of a real tracker, and failing file operations, for tests that damage runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch

from posthoc_cli import PostHocEMA, files


class Walk:
    """A model whose weights follow the same walk whenever it is trained."""

    def __init__(self, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20)).to(dtype)
        self.scale = scale
        self.generator = torch.Generator().manual_seed(1)

    def train(self, tracker: PostHocEMA, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(self.scale * torch.randn(parameter.shape, generator=self.generator))
            tracker.update_(self.model)


def new_tracker(walk: Walk, folder: Path, **options: object) -> PostHocEMA:
    """Return a tracker that by default writes a snapshot at every tenth step and keeps all."""
    settings = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": None, **options}
    return PostHocEMA.from_model(walk.model, folder, **settings)  # type: ignore[arg-type]


def record(
    folder: Path, steps: int = 60, dtype: torch.dtype = torch.float32, scale: float = 0.1, **options: object
) -> Path:
    """Train for `steps` steps; return the folder with the snapshots."""
    walk = Walk(dtype, scale)
    with new_tracker(walk, folder, **options) as tracker:
        walk.train(tracker, steps)
    return folder


@contextmanager
def failing(operation: str, error: int | BaseException, when: Callable[..., bool] = lambda *_: True) -> Iterator[None]:
    """Let an operation of `files.system` fail within the block at the calls for which `when` returns True."""
    original = getattr(files.system, operation)

    def call(*arguments: object) -> object:
        if when(*arguments):
            raise OSError(error, os.strerror(error)) if isinstance(error, int) else error
        return original(*arguments)

    setattr(files.system, operation, call)
    try:
        yield
    finally:
        delattr(files.system, operation)


def call_number(number: int) -> Callable[..., bool]:
    """Return a condition for `failing` that is true for one call, counted from 0."""
    calls = count()
    return lambda *_: next(calls) == number

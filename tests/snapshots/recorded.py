"""Runs of a real tracker, failing file operations, and small files, for tests that damage them."""

import os
from contextlib import contextmanager
from itertools import count

import numpy as np
import torch
from factories import write_snapshot
from safetensors.torch import load_file
from torch import nn

from posthoc_cli import PostHocEMA, Run, export_file, files
from posthoc_cli.errors import FileFormatError
from posthoc_cli.reconstruction import Measurements, Sketch
from posthoc_cli.snapshots.sketch_text import encode_path
from posthoc_cli.snapshots.source import PathSketch


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20))


def train(tracker, model, steps, scale=0.1):
    """Let the weights follow the same walk whenever they are trained."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
        tracker.update_(model)


def record(folder, steps=60, scale=0.1, **options):
    """Record a run that by default writes a snapshot at every tenth step and keeps all."""
    model = network()
    settings = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": None, **options}
    with PostHocEMA.from_model(model, folder, **settings) as tracker:
        train(tracker, model, steps, scale)
    return folder


@contextmanager
def failing(operation, error, when=lambda *_: True):
    """Let an operation of `files.system` fail within the block at the calls for which `when`
    returns True."""
    original = getattr(files.system, operation)

    if isinstance(error, int):
        error = OSError(error, os.strerror(error))

    def call(*arguments):
        if when(*arguments):
            raise error
        return original(*arguments)

    setattr(files.system, operation, call)
    try:
        yield
    finally:
        delattr(files.system, operation)


def call_number(number):
    """Return a condition for `failing` that is true for one call, counted from 0."""
    calls = count()
    return lambda *_: next(calls) == number


# --- small files

SMALL = {
    "a": torch.tensor([1.0, -2.5]),
    "b": torch.tensor([7], dtype=torch.int16),
}

Content = dict[str, object]


def examine(path):
    """Verify a snapshot, an output, or the shards of an index as `ema verify` does; return the
    headers, or raise."""
    found = Run(path).check()
    for report in found.files:
        if report.header is None or not report.is_fine:
            raise FileFormatError(report.path, report.detail or "is foreign")
    if found.problems:
        raise FileFormatError(path, found.problems[0])
    return {report.path.name: report.header for report in found.files}


def used(source, out):
    """Synthesize the tracked average of a run, or export an output; return the tensors of the
    result."""
    if source.name == "run":
        Run(source).write([0.05], out)
    else:
        export_file(source, out)
    return {name: value.tolist() for name, value in load_file(out).items()}


def small_snapshot(folder, values=SMALL):
    """Write a snapshot with most of what a header can have; return its path, in `folder`/run."""
    means = np.array([[0.0, 0.0], [0.5, 0.25]])
    edges = np.array([1.0, 5.0, 10.0])
    sketch = Sketch(edges, np.ones(2), means, np.zeros(2))
    return write_snapshot(
        folder / "run",
        10,
        0.05,
        "ab12" * 8,
        values,
        sigma_rels=(0.05, 0.28),
        aliases={"tied": "a"},
        left_out=("frozen",),
        measurements=Measurements(7.25, 1e-7),
        sketch=encode_path(PathSketch(1, sketch)),
    )


def small_output(folder):
    used(small_snapshot(folder).parent, folder / "made.safetensors")
    return folder / "made.safetensors"

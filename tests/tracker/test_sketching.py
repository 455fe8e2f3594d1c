"""The sketch of the weights' path that the tracker makes at folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc_cli import PostHocEMA, disk_sources
from posthoc_cli.snapshots.path import decode_path
from posthoc_cli.tracker import measuring
from posthoc_cli.tracker.measuring import Subset
from posthoc_cli.tracker.memory import Reader


def trained(tracker: PostHocEMA, model: torch.nn.Module, first: int, last: int) -> None:
    """Train by steps that depend on their numbers only."""
    for step in range(first, last + 1):
        random = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=random))
        tracker.update_(model)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(70, 50), torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 3))


def tracker_of(net: torch.nn.Module, folder: Path, **options: object) -> PostHocEMA:
    return PostHocEMA.from_model(net, folder, update_every=1, checkpoint_every=50, sigma_rels=(0.05, 0.28), **options)  # type: ignore[arg-type]


def sketches(folder: Path) -> dict[int, str]:
    """Return the encoded sketch of each snapshot, by step."""
    return {source.step: source.sketch for source in disk_sources(folder)}


def test_sketches_in_snapshots_have_the_length_of_the_path(tmp_path: Path) -> None:
    """The error of 64 numbers and 199 steps is within 0.2. Running statistics, which move far, do not count."""
    net = model()
    with tracker_of(net, tmp_path) as tracker:
        for step in range(200):
            net[1].running_mean.fill_(1000.0 * step)  # type: ignore[union-attr, operator]
            trained(tracker, net, step + 1, step + 1)
    path = decode_path(sketches(tmp_path)[200])
    assert path.sketch.edges[0] == 1 and path.sketch.edges[-1] == 200 and path.sketch.folds.sum() == 200
    squared = np.sum(np.diff(path.sketch.means, axis=0) ** 2, axis=1)
    expected = 0.02**2 * sum(p.numel() for p in net.parameters())
    assert squared.mean() == pytest.approx(expected, rel=0.2)


def test_too_many_windows_are_merged_to_half_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for most in (512, 20):
        monkeypatch.setattr(measuring, "MOST_WINDOWS", most)
        net = model()
        with tracker_of(net, tmp_path / str(most)) as tracker:
            trained(tracker, net, 1, 150)
        found[most] = decode_path(sketches(tmp_path / str(most))[150]).sketch
    fine, coarse = found[512], found[20]
    assert 10 <= len(coarse.folds) <= 21 < len(fine.folds)
    assert set(coarse.edges) < set(fine.edges) and coarse.folds.sum() == fine.folds.sum() == 150
    sums = [sketch.folds @ sketch.means for sketch in (fine, coarse)]
    # Differences of 0.3 in float16, 150 of them: 7e-5 each, 9e-4 in a mean, 0.13 in a sum over 150 folds.
    np.testing.assert_allclose(*sums, atol=0.5)
    steps = np.diff(fine.means, axis=0)
    # Of n independent steps of variance v, the spread is v (n - 1 / n) / 6.
    n = coarse.folds[1]
    assert coarse.spread[1:-1].mean() == pytest.approx(np.sum(steps**2, axis=1).mean() * (n - 1 / n) / 6, rel=0.3)


def test_resumed_runs_have_the_same_sketch(tmp_path: Path) -> None:
    """A run resumed from an exact state has the same bits; one from snapshots is within float16's rounding."""
    net = model()
    with tracker_of(net, tmp_path / "straight") as tracker:
        trained(tracker, net, 1, 150)
    for name in ("exact", "snapshots"):
        net = model()
        with tracker_of(net, tmp_path / name) as tracker:
            trained(tracker, net, 1, 100)
            state = tracker.state_dict()
        with PostHocEMA.from_path(tmp_path / name, net) as tracker:
            if name == "exact":
                tracker.load_state_dict(state)
            trained(tracker, net, 101, 150)
    straight, exact, rounded = (sketches(tmp_path / name)[150] for name in ("straight", "exact", "snapshots"))
    assert exact == straight
    one, other = decode_path(straight).sketch, decode_path(rounded).sketch
    assert other.edges[-1] == one.edges[-1] and other.folds.sum() == 150
    np.testing.assert_allclose(one.folds @ one.means / 150, other.folds @ other.means / 150, atol=3e-3)


@pytest.mark.parametrize("elements", [2**15, 2**20])
@pytest.mark.parametrize("kind", ["alike", "columns", "one rank", "one layer", "one row", "gains"])
def test_lengths_are_kept_whatever_the_direction(kind: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subset has half of the elements, or one of 64."""
    monkeypatch.setattr(measuring, "MEASURED_ELEMENTS", elements)
    shapes = {"a": (1024, 1024), "gains": (1024,), "b": (1024, 1024)}
    values = {name: torch.zeros(shape) for name, shape in shapes.items()}
    random = torch.Generator().manual_seed(1)
    if kind == "alike":
        values["a"][:] = 1.0
    elif kind == "columns":
        values["a"][:, ::64] = 1.0
    elif kind == "one rank":
        values["a"][:] = torch.randn(1024, 1, generator=random) * torch.randn(1, 1024, generator=random)
    elif kind == "one layer":
        values["b"].normal_(generator=random)
    elif kind == "one row":
        values["b"][7].normal_(generator=random)
    else:
        values["gains"].normal_(generator=random)
    reader = Reader.of_tensors(values)
    sketcher = measuring.Sketcher(Subset(reader.layout, shapes))
    flat = torch.cat([one.view(-1) for one in values.values()])
    for tile in reader.tiles:
        sketcher.take(tile, reader.values(tile))
    path = sketcher.path(1.0)
    ratio = float(np.sum(path.sketch.means.astype(np.float64) ** 2)) / float(flat.double().square().sum())
    drawn = 1024 if elements == 2**20 or kind == "gains" else 16  # elements of the row that are drawn
    assert abs(ratio - 1) < 3 * np.sqrt(2 / measuring.NUMBERS + (3 / drawn if kind == "one row" else 0))

"""The sketch of the weights' path that the tracker makes at folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tracker.runs import Training

from posthoc_cli import PostHocEMA, disk_sources
from posthoc_cli.snapshots.path import decode_path


def tracker_of(net: torch.nn.Module, folder: Path, **options: object) -> PostHocEMA:
    return PostHocEMA.from_model(net, folder, update_every=1, checkpoint_every=50, sigma_rels=(0.05, 0.28), **options)  # type: ignore[arg-type]


def sketches(folder: Path) -> dict[int, str]:
    """Return the encoded sketch of each snapshot, by step."""
    return {source.step: source.sketch for source in disk_sources(folder)}


@pytest.mark.parametrize(("first", "windows"), [(1500, [1] * 8), (3500, [1, 4, 4, 3]), (300_000, [1, 256, 256, 5])])
def test_the_path_is_of_means_over_a_thousandth_of_training(first: int, windows: list[int], tmp_path: Path) -> None:
    """A window has one value if a thousandth has fewer than two, and at most 256; the last may be open.

    Of independent values of variance 1 a mean of n has 1 / n, in each of 1,000 elements. Statistics do not count.
    """
    net, t = torch.nn.Sequential(torch.nn.Linear(50, 20, bias=False), torch.nn.BatchNorm1d(20, affine=False)), first - 1
    with tracker_of(net, tmp_path, t_unit="images") as tracker:
        for _ in range(sum(windows)):
            torch.nn.init.normal_(net[0].weight)
            net[1].running_mean.fill_(1000.0 * t)
            tracker.update_(net, t := t + 1)
        tracker.snapshot()
    sketch = decode_path(max(sketches(tmp_path).items())[1]).sketch
    np.testing.assert_array_equal(sketch.edges[1:], first - 1 + np.cumsum(windows))
    apart = np.sum(np.diff(sketch.means, axis=0) ** 2, axis=1) / 1000
    variances = 1 / np.array(windows)
    np.testing.assert_allclose(apart, variances[1:] + variances[:-1], rtol=0.6)


def test_too_many_windows_are_merged_to_half_as_many(tmp_path: Path) -> None:
    """More than 1,024 are; the sketch before has all of them."""
    training = Training()
    with tracker_of(training.model, tmp_path, max_checkpoints=None) as tracker:
        training.run(1050, tracker)
    fine, coarse = (decode_path(sketches(tmp_path)[step]).sketch for step in (1000, 1050))
    assert len(fine.folds) == 1000
    assert len(coarse.folds) < 600
    assert fine.folds.sum() == 1000
    assert coarse.folds.sum() == 1050
    known = coarse.edges[1:] <= 1000
    assert set(coarse.edges[1:][known]) < set(fine.edges)
    pairs = fine.means[:200].reshape(100, 2, -1).mean(axis=1)
    # Steps of 0.0075 in float16, 200 of them, are rounded by 2e-6 each, and by 3e-5 in a mean.
    assert np.sqrt(np.mean((coarse.means[:100] - pairs) ** 2)) < 1.5e-4
    steps = np.diff(fine.means, axis=0)
    # Of n independent steps of variance v, the spread is v (n - 1 / n) / 6.
    n = coarse.folds[1]
    assert coarse.spread[1:-1].mean() == pytest.approx(np.sum(steps**2, axis=1).mean() * (n - 1 / n) / 6, rel=0.3)


def test_a_run_that_is_resumed_from_snapshots_continues_the_path(tmp_path: Path) -> None:
    """Within float16's rounding; one that is resumed from its state has the same bits, see `test_continuing`."""
    found = []
    for name in ("straight", "resumed"):
        training = Training()
        with tracker_of(training.model, tmp_path / name) as tracker:
            training.run(100, tracker)
            if name == "resumed":
                tracker.close()
                tracker = PostHocEMA.from_path(tmp_path / name, training.model)
            training.run(150, tracker)
            tracker.close()
        found.append(decode_path(sketches(tmp_path / name)[150]).sketch)
    one, other = found
    assert other.edges[-1] == one.edges[-1]
    assert other.folds.sum() == 150
    np.testing.assert_allclose(one.folds @ one.means / 150, other.folds @ other.means / 150, atol=5e-4)


@pytest.mark.parametrize("kind", ["alike", "columns", "one rank", "one layer", "one row", "gains"])
def test_lengths_are_kept_whatever_the_direction(tmp_path: Path, kind: str) -> None:
    """A quarter of the elements is measured, and all of a small tensor."""
    shapes = {"a": (1024, 1024), "gains": (1024,), "b": (1024, 1024)}
    net = torch.nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})
    random = torch.Generator().manual_seed(1)
    with tracker_of(net, tmp_path) as tracker:
        tracker.update_(net)
        with torch.no_grad():
            if kind == "alike":
                net["a"].fill_(1.0)
            elif kind == "columns":
                net["a"][:, ::64] = 1.0
            elif kind == "one rank":
                net["a"].copy_(torch.randn(1024, 1, generator=random) * torch.randn(1, 1024, generator=random))
            elif kind == "one layer":
                net["b"].normal_(generator=random)
            elif kind == "one row":
                net["b"][7].normal_(generator=random)
            else:
                net["gains"].normal_(generator=random)
        tracker.update_(net)
    (moved,) = np.diff(decode_path(sketches(tmp_path)[2]).sketch.means, axis=0)
    exact = sum(float(one.detach().double().square().sum()) for one in net.values())
    ratio = float(np.sum(moved.astype(np.float64) ** 2)) / exact
    drawn = 256  # elements of the row that are drawn
    assert abs(ratio - 1) < 3 * np.sqrt(2 / 64 + (3 / drawn if kind == "one row" else 0))

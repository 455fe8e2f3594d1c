"""The sketch of the weights' path that the tracker makes at folds."""

import errno

import numpy as np
import pytest
import torch
from device import DEVICE
from factories import sketch_of, tiny_model
from predictions import assert_predicted, tracked, walk
from safetensors.torch import load_file
from snapshots.recorded import call_number, failing
from torch import nn
from tracker.runs import Training, steps, track, update

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import WriteError


def squared_moves(sketch):
    """Return the squared distance of each mean from the one before it."""
    moves = np.diff(sketch.means.astype(np.float64), axis=0)
    return np.sum(moves**2, axis=1)


def sketches(folder):
    return {source.step: sketch_of(source) for source in Run(folder).sources}


@pytest.mark.parametrize(
    ("first", "windows"),
    [
        (1500, [1] * 8),
        (3500, [1, 4, 4, 3]),
        (300_000, [1, 104, 104, 5]),
    ],
)
def test_the_path_is_of_means_over_a_thousandth_of_training(first, windows, tmp_path):
    """A window has one value if a thousandth has fewer than two, and at most 104; the last may be
    open.

    Of independent values of variance 1 a mean of n has 1 / n, in each of 1,000 elements.
    """
    layer = nn.Linear(1000, 1, bias=False)
    end = first + sum(windows)
    with track(layer, tmp_path, t_unit="images") as tracker:
        for t in range(first, end):
            nn.init.normal_(layer.weight)
            tracker.update_(layer, t)
    sketch = sketches(tmp_path)[end - first]
    ends = first - 1 + np.cumsum(windows)
    np.testing.assert_array_equal(sketch.edges[1:], ends)
    apart = squared_moves(sketch) / 1000
    variances = 1 / np.array(windows)
    expected = variances[1:] + variances[:-1]
    np.testing.assert_allclose(apart, expected, rtol=0.6)


def test_too_many_windows_are_merged_to_half_as_many(tmp_path):
    """More than 1,024 are; the sketch before has all of them."""
    training = Training()
    with track(training.model, tmp_path, checkpoint_every=1000) as tracker:
        training.run(1050, tracker)
    fine, coarse = map(sketches(tmp_path).get, (1000, 1050))
    assert len(fine.folds) == 1000
    assert len(coarse.folds) < 600
    assert coarse.folds.sum() == 1050
    ends = coarse.edges[1:]
    assert set(ends[ends <= 1000]) < set(fine.edges)
    # Of n independent steps of variance v, the spread is v (n - 1 / n) / 6.
    n = coarse.folds[1]
    variance = squared_moves(fine).mean()
    expected = variance * (n - 1 / n) / 6
    assert coarse.spread[1:-1].mean() == pytest.approx(expected, rel=0.3)


def clock_with_leaps():
    """Return times one apart, but for a long interval before an update of each 300."""
    intervals = np.ones(1200)
    intervals[292::300] = 40_000
    return np.cumsum(intervals)


def uneven_clock():
    """Return times of which each window of the sketch has one: intervals are alternately 0.2 and 10
    per cent of the time so far."""
    growth = np.tile([1.002, 1.1], 600)
    return np.cumprod(growth)


@pytest.mark.parametrize("times", [clock_with_leaps(), uneven_clock()])
def test_leaps_of_the_clock_are_not_smoothed(times, tmp_path):
    """The path, known at each update, shows the error: where a window had taken the interval of a
    leap for many updates it was 7 to 18 times that of the paper's method."""
    path = walk(np.full(times.size, 0.02))
    training = tracked(tmp_path, path, times, update_every=1, checkpoint_every=100)
    sketch = sketch_of(Run(tmp_path).sources[-1])
    assert len(sketch.folds) <= 1024
    assert_predicted(*training, targets=[0.2], low=1 / 1.5, high=1.5, published=True)


def test_a_run_that_is_resumed_from_snapshots_continues_the_path(tmp_path):
    """Within float16's rounding; one that is resumed from its state has the same bits, see
    `test_continuing`. All steps are of one size, also the first one after the resume."""
    training = Training()
    with track(training.model, tmp_path, checkpoint_every=50) as tracker:
        training.run(100, tracker)
    with PostHocEMA.from_path(tmp_path, training.model) as tracker:
        training.run(150, tracker)
    earlier, later = map(sketches(tmp_path).get, (100, 150))
    assert later.folds.sum() == 150
    np.testing.assert_allclose(later.means[:100], earlier.means, atol=5e-5)
    squares = squared_moves(later)
    assert squares.max() < 2 * squares.mean()


def test_lengths_are_kept_whatever_the_direction(tmp_path):
    """A quarter of the elements is measured."""
    net = nn.ParameterDict({"a": torch.zeros(1024, 1024)})
    net["b"] = torch.zeros(1024, 1024)
    with track(net, tmp_path) as tracker:
        tracker.update_(net)
        net["a"].data[:, ::64] = 1.0
        tracker.update_(net)
    sketch = sketches(tmp_path)[2]
    (moved,) = squared_moves(sketch)
    exact = squares(net["a"])
    assert abs(moved / exact - 1) < 3 * np.sqrt(2 / 64)


# --- the measurements in a snapshot's header agree with a direct computation in float64


def drift(tracker, model, steps, size=0.1):
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += size * torch.randn_like(parameter)
        tracker.update_(model)


def check(tracker, norm=1e-12, rounding=1e-6):
    """Check the measurements of the newest snapshots, which hold the present averages."""
    profiles = len(tracker.settings.sigma_rels)
    for snapshot in tracker.run.snapshots[-profiles:]:
        stored = load_file(snapshot.path)
        average = tracker.state_dict(snapshot.sigma_rel, dtype="float64")
        norms = []
        errors = []
        for name in snapshot.averaged:
            exact = average[name]
            off = exact - stored[name].double()
            norms.append(squares(exact))
            errors.append(squares(off))
        # Differences of float32 are rounded by 2^-24 of themselves; sums are float64.
        found = snapshot.measurements
        assert found.norm == pytest.approx(sum(norms), rel=norm)
        assert found.rounding == pytest.approx(sum(errors), rel=rounding)


def squares(tensor):
    return float(tensor.detach().double().square().sum())


def check_run(model, folder, **settings):
    with track(model, folder, checkpoint_every=5, **settings) as tracker:
        drift(tracker, model, 10)
        check(tracker)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, "float16"),
        (torch.float64, "float32"),
        (torch.bfloat16, "float32"),
    ],
)
def test_measurements_are_those_of_a_direct_computation(tmp_path, dtype, stored):
    """A model with tied parameters, buffers (not measured) and a frozen parameter."""
    model = tiny_model().to(dtype)
    check_run(model, tmp_path, sigma_rels=(0.05, 0.1, 0.28), checkpoint_dtype=stored)


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_a_tensor_that_is_stored_in_float32_counts_as_not_rounded(tmp_path, scale):
    """Its values would be too large or too small in float16."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(scale)
    model.weight.requires_grad_(False)  # constant, but tracked
    check_run(model, tmp_path, include="*")
    for snapshot in Run(tmp_path).snapshots:
        assert snapshot.entries["weight"].dtype == "F32"
        assert snapshot.entries["bias"].dtype == "F16"


def test_values_that_only_float64_can_hold_are_stored_in_it_and_not_measured(tmp_path):
    model = nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        model.bias.fill_(1e200)
    with track(model, tmp_path, checkpoint_every=1) as tracker:
        update(tracker, model, 2)
    for snapshot in Run(tmp_path).snapshots:
        assert snapshot.entries["bias"].dtype == "F64"
        assert snapshot.measurements is None
        assert torch.equal(load_file(snapshot.path)["bias"], model.bias)


def test_a_profile_that_could_not_be_written_is_written_later(tmp_path):
    """Writing the second of two files fails: the first is complete, and nothing is left of the
    second."""
    model = tiny_model()
    with track(model, tmp_path, checkpoint_every=5) as tracker:
        drift(tracker, model, 9)
        tracker.flush()
        with failing("fsync", errno.ENOSPC, call_number(1)), pytest.raises(WriteError):
            drift(tracker, model, 1)
            tracker.flush()
        assert steps(tmp_path) == [5, 5, 10]
        assert not list(tmp_path.glob(".ema-*.tmp"))
        tracker.snapshot()
        check(tracker)


@pytest.mark.parametrize(
    ("stored", "size"),
    [
        ("bfloat16", 1e-2),
        ("float16", 1e-5),
    ],
)
def test_measurements_of_a_subset_are_those_of_all_elements(tmp_path, size, stored):
    """Steps are from far above the rounding to far below it. Sums of n squares of normal numbers
    have a relative standard error of (2 / n)^(1/2): four times that is allowed."""
    outer = nn.Linear(1500, 600)
    inner = nn.Linear(600, 1500)
    model = nn.Sequential(outer, nn.LayerNorm(600), inner)
    off = 4 * (2 / 2**17) ** 0.5
    with track(model, tmp_path, checkpoint_every=5, checkpoint_dtype=stored) as tracker:
        drift(tracker, model, 10, size)
        check(tracker, norm=off, rounding=2 * off)  # larger in each binade


@pytest.mark.cuda
def test_averages_on_a_device_are_measured_there(tmp_path):
    """All elements of a small model, and a subset of one of several tiles."""
    check_run(nn.Linear(123, 45).to(DEVICE), tmp_path / "small")
    model = nn.Linear(2100, 2100).to(DEVICE)
    with track(model, tmp_path / "large", checkpoint_every=5) as tracker:
        drift(tracker, model, 10)
        check(tracker, norm=0.01, rounding=0.02)

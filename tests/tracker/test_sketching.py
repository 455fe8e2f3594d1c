"""The sketch of the weights' path that the tracker makes at folds."""

import base64
import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import FloatArray, exact_average, relative_distance, sketch_of, tiny_model
from safetensors.torch import load_file
from snapshots.recorded import call_number, failing
from torch import nn
from tracker.runs import Training, track, update

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import WriteError
from posthoc_cli.reconstruction import Sketch
from posthoc_cli.snapshots.snapshot import decode_path, encode_path
from posthoc_cli.snapshots.sources import PathSketch


def squared_lengths(vectors: FloatArray) -> FloatArray:
    return np.sum(vectors.astype(np.float64) ** 2, axis=1)


def squared_moves(sketch: Any) -> FloatArray:
    """Return the squared distance of each mean from the one before it."""
    return squared_lengths(np.diff(sketch.means, axis=0))


def sketches(folder: Path) -> dict[int, Any]:
    return {source.step: sketch_of(source) for source in Run(folder).sources}


@pytest.mark.parametrize(
    ("first", "windows"),
    [
        (1500, [1] * 8),
        (3500, [1, 4, 4, 3]),
        (300_000, [1, 104, 104, 5]),
    ],
)
def test_the_path_is_of_means_over_a_thousandth_of_training(
    first: int,
    windows: list[int],
    tmp_path: Path,
) -> None:
    """A window has one value if a thousandth has fewer than two, and at most 104; the last may be
    open.

    Of independent values of variance 1 a mean of n has 1 / n, in each of 1,000 elements. Statistics
    do not count.
    """
    layer = nn.Linear(50, 20, bias=False)
    norm = nn.BatchNorm1d(20, affine=False)
    net = nn.Sequential(layer, norm)
    end = first + sum(windows)
    with track(net, tmp_path, t_unit="images") as tracker:
        for t in range(first, end):
            nn.init.normal_(layer.weight)
            norm.running_mean.fill_(1000.0 * t)
            tracker.update_(net, t)
    sketch = sketches(tmp_path)[end - first]
    ends = first - 1 + np.cumsum(windows)
    np.testing.assert_array_equal(sketch.edges[1:], ends)
    apart = squared_moves(sketch) / 1000
    variances = 1 / np.array(windows)
    expected = variances[1:] + variances[:-1]
    np.testing.assert_allclose(apart, expected, rtol=0.6)


def test_too_many_windows_are_merged_to_half_as_many(tmp_path: Path) -> None:
    """More than 1,024 are; the sketch before has all of them."""
    training = Training()
    with track(training.model, tmp_path, checkpoint_every=1000) as tracker:
        training.run(1050, tracker)
    fine, coarse = map(sketches(tmp_path).get, (1000, 1050))
    assert len(fine.folds) == 1000
    assert len(coarse.folds) < 600
    assert fine.folds.sum() == 1000
    assert coarse.folds.sum() == 1050
    ends = coarse.edges[1:]
    assert set(ends[ends <= 1000]) < set(fine.edges)
    pairs = fine.means[:200].reshape(100, 2, -1)
    off = coarse.means[:100] - pairs.mean(axis=1)
    # Steps of 0.0075 in float16 are rounded by 2e-6; these errors do not add up, to 2e-5 in 100
    # means.
    assert np.sqrt(np.mean(off**2)) < 6e-6
    variance = squared_moves(fine).mean()
    # Of n independent steps of variance v, the spread is v (n - 1 / n) / 6.
    n = coarse.folds[1]
    expected = variance * (n - 1 / n) / 6
    spread = coarse.spread[1:-1].mean()
    assert spread == pytest.approx(expected, rel=0.3)


def clock_with_leaps() -> FloatArray:
    """Return times one apart, but for a long interval before an update of each 300."""
    numbers = np.arange(1, 1201)
    is_leap = numbers % 300 == 293
    return np.cumsum(np.where(is_leap, 40_000.0, 1.0))


def uneven_clock() -> FloatArray:
    """Return times of which each window of the sketch has one: intervals are alternately 0.2 and 10
    per cent of the time so far."""
    growth = np.tile([1.002, 1.1], 600)
    return np.cumprod(growth)


@pytest.mark.parametrize("times", [clock_with_leaps(), uneven_clock()])
def test_leaps_of_the_clock_are_not_smoothed(times: FloatArray, tmp_path: Path) -> None:
    """The path, known at each update, shows the error: where a window had taken the interval of a
    leap for many updates it was 7 to 18 times that of the paper's method."""
    moves = 0.02 * torch.randn(times.size, 500)
    moves[0] += torch.randn(500)
    path = moves.cumsum(dim=0)
    net = nn.ParameterDict({"w": torch.zeros(500)})
    with track(net, tmp_path, t_unit="images", checkpoint_every=100) as tracker:
        for t, weights in zip(times.tolist(), path, strict=True):
            net["w"].data.copy_(weights)
            tracker.update_(net, t)
    run = Run(tmp_path)
    sketch = sketch_of(run.sources[-1])
    assert len(sketch.folds) <= 1024
    exact = exact_average(path.double(), 0.2, times.tolist())
    best = run.average(0.2)
    error = relative_distance(best["w"], exact)
    by_profile = run.average(0.2, method="paper")
    assert error < 1.1 * relative_distance(by_profile["w"], exact)
    assert 1 / 1.5 < error / best.predicted_error < 1.5


def test_a_run_that_is_resumed_from_snapshots_continues_the_path(tmp_path: Path) -> None:
    """Within float16's rounding; one that is resumed from its state has the same bits, see
    `test_continuing`."""
    training = Training()
    with track(training.model, tmp_path / "straight", checkpoint_every=50) as tracker:
        training.run(150, tracker)
    training = Training()
    with track(training.model, tmp_path / "resumed", checkpoint_every=50) as tracker:
        training.run(100, tracker)
    with PostHocEMA.from_path(tmp_path / "resumed", training.model) as tracker:
        training.run(150, tracker)
    one = sketches(tmp_path / "straight")[150]
    other = sketches(tmp_path / "resumed")[150]
    assert other.edges[-1] == one.edges[-1]
    assert other.folds.sum() == 150
    mean = one.folds @ one.means / 150
    resumed = other.folds @ other.means / 150
    np.testing.assert_allclose(mean, resumed, atol=5e-4)


KINDS = ("columns", "one rank", "one row", "gains")


def move(net: nn.ParameterDict, kind: str) -> None:
    if kind == "columns":
        net["a"][:, ::64] = 1.0
    elif kind == "one rank":
        column = torch.randn(1024, 1)
        net["a"].copy_(column * torch.randn(1, 1024))
    elif kind == "one row":
        net["b"][7].normal_()
    else:
        net["gains"].normal_()


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_kept_whatever_the_direction(tmp_path: Path, kind: str) -> None:
    """A quarter of the elements is measured, and all of a small tensor."""
    net = nn.ParameterDict({"a": torch.zeros(1024, 1024)})
    net["gains"] = torch.zeros(1024)
    net["b"] = torch.zeros(1024, 1024)
    with track(net, tmp_path) as tracker:
        tracker.update_(net)
        with torch.no_grad():
            move(net, kind)
        tracker.update_(net)
    (moved,) = squared_moves(sketches(tmp_path)[2])
    exact = sum(map(squares, net.values()))
    variance = 2 / 64
    if kind == "one row":
        variance += 3 / 256  # of the elements that are drawn
    assert abs(moved / exact - 1) < 3 * np.sqrt(variance)


# --- the measurements in a snapshot's header agree with a direct computation in float64

Tensors = dict[str, torch.Tensor]
Exact = dict[tuple[float, float], Tensors]


def train(tracker: PostHocEMA, model: nn.Module, last: int, size: float = 0.1) -> Exact:
    """Train up to a step; return the exact averages at the times of snapshots, by t and
    sigma_rel."""
    exact: Exact = {}
    while tracker.step < last:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += size * torch.randn_like(parameter)
        tracker.update_(model)
        if tracker.step % 5 == 0:
            exact |= exact_now(tracker)
    tracker.flush()
    return exact


def exact_now(tracker: PostHocEMA) -> Exact:
    averages = {}
    for sigma_rel in tracker.settings.sigma_rels:
        averages[tracker.t, sigma_rel] = tracker.state_dict(sigma_rel, dtype="float64")
    return averages


def check(folder: Path, known: Exact, norm: float = 1e-12, rounding: float = 1e-6) -> None:
    for snapshot in Run(folder).snapshots:
        stored = load_file(snapshot.path)
        average = known[snapshot.t, snapshot.sigma_rel]
        norms = []
        errors = []
        for name in snapshot.averages:
            exact = average[name].cpu()
            norms.append(squares(exact))
            errors.append(squares(exact - stored[name].double()))
        # Differences of float32 are rounded by 2^-24 of themselves; sums are float64.
        found = snapshot.measurements
        assert found.norm == pytest.approx(sum(norms), rel=norm)
        assert found.rounding == pytest.approx(sum(errors), rel=rounding)


def squares(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().sum())


def check_run(
    model: nn.Module,
    folder: Path,
    *rels: tuple[float, ...],
    **settings: Any,
) -> None:
    with track(model, folder, *rels, checkpoint_every=5, **settings) as tracker:
        exact = train(tracker, model, 10)
    check(folder, exact)


@pytest.mark.parametrize(
    ("dtype", "stored", "sigma_rels"),
    [
        (torch.float32, "float16", (0.05, 0.1, 0.28)),
        (torch.float32, "bfloat16", (0.05, 0.28)),
        (torch.float32, "float64", (0.05, 0.28)),
        (torch.float64, None, (0.1,)),
        (torch.float64, "float32", (0.1,)),
        (torch.bfloat16, None, (0.05, 0.28)),
        (torch.bfloat16, "float32", (0.05, 0.28)),
    ],
)
def test_measurements_are_those_of_a_direct_computation(
    tmp_path: Path,
    dtype: torch.dtype,
    stored: str | None,
    sigma_rels: tuple[float, ...],
) -> None:
    """A model with tied parameters, buffers (not measured) and a frozen parameter."""
    check_run(tiny_model().to(dtype), tmp_path, sigma_rels, checkpoint_dtype=stored)
    assert Run(tmp_path).snapshots[-1].sigma_rels == sigma_rels


@pytest.mark.parametrize("scale", [1e6, 1e-6, 2e-8])
def test_a_tensor_that_is_stored_in_float32_counts_as_not_rounded(
    tmp_path: Path,
    scale: float,
) -> None:
    """Its values would be too large, too small (subnormal) or zero in float16."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(scale)
    model.weight.requires_grad_(False)  # constant, but tracked
    check_run(model, tmp_path, include="*")
    for snapshot in Run(tmp_path).snapshots:
        assert snapshot.entries["weight"].dtype == "F32"
        assert snapshot.entries["bias"].dtype == "F16"


def test_values_that_only_float64_can_hold_are_stored_in_it_and_not_measured(
    tmp_path: Path,
) -> None:
    model = nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        model.bias.fill_(1e200)
    with track(model, tmp_path, checkpoint_every=1) as tracker:
        update(tracker, model, 2)
    for snapshot in Run(tmp_path).snapshots:
        assert snapshot.entries["bias"].dtype == "F64"
        assert snapshot.measurements is None
        assert torch.equal(load_file(snapshot.path)["bias"], model.bias)


def test_a_profile_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    """Writing the second of two files fails: the first is complete, and nothing is left of the
    second."""
    model = tiny_model()
    with track(model, tmp_path, checkpoint_every=5) as tracker:
        exact = train(tracker, model, 9)
        refused = pytest.raises(WriteError, match="no space left")
        with failing("fsync", errno.ENOSPC, call_number(1)), refused:
            exact |= train(tracker, model, 10)
        *first, last = Run(tmp_path).snapshots
        assert [snapshot.t for snapshot in first] == [5, 5]
        assert last.t == 10
        assert last.sigma_rel == 0.05
        assert not list(tmp_path.glob(".ema-*"))
        tracker.snapshot()
        check(tmp_path, exact | exact_now(tracker))


@pytest.mark.parametrize(
    ("stored", "size"),
    [
        ("bfloat16", 1e-2),
        ("float16", 1e-5),
    ],
)
def test_measurements_of_a_subset_are_those_of_all_elements(
    tmp_path: Path,
    size: float,
    stored: str,
) -> None:
    """Steps are from far above the rounding to far below it. Sums of n squares of normal numbers
    have a relative standard error of (2 / n)^(1/2): four times that is allowed."""
    outer = nn.Linear(1500, 600)
    inner = nn.Linear(600, 1500)
    model = nn.Sequential(outer, nn.LayerNorm(600), inner)
    with track(model, tmp_path, checkpoint_every=5, checkpoint_dtype=stored) as tracker:
        exact = train(tracker, model, 10, size)
    off = 4 * (2 / 2**19) ** 0.5
    check(tmp_path, exact, norm=off, rounding=2 * off)  # larger in each binade
    for snapshot in Run(tmp_path).snapshots:
        average = exact[snapshot.t, snapshot.sigma_rel]
        assert snapshot.measurements.norm != sum(map(squares, average.values()))


@pytest.mark.cuda
def test_averages_on_a_device_are_measured_there(tmp_path: Path) -> None:
    """All elements of a small model, and a subset of one of several tiles."""
    check_run(nn.Linear(123, 45).cuda(), tmp_path / "small")
    model = nn.Linear(2100, 2100).cuda()
    with track(model, tmp_path / "large", checkpoint_every=5) as tracker:
        exact = train(tracker, model, 10)
    check(tmp_path / "large", exact, norm=0.01, rounding=0.02)


def steps_of(folder: Path) -> FloatArray:
    newest = Run(folder).sources[-1]
    return decode_path(newest.sketch).steps


def masses_of(target: str, ages: FloatArray) -> FloatArray:
    """Return the mass of values of these ages in steps, the first of which has all earlier mass."""
    if target == "window:90":
        return (ages < 90) / 90
    masses = 0.01 * 0.99**ages
    masses[0] = 0.99 ** ages[0]
    return masses


@pytest.mark.parametrize("target", ["beta:0.99", "window:90"])
def test_averages_over_steps_count_them_across_a_late_leap_of_the_clock(
    target: str,
    tmp_path: Path,
) -> None:
    """The clock of the snapshots alone spreads their steps over the leap: errors of 5 times the
    predicted ones and more."""
    count = 800
    numbers = np.arange(1, count + 1)
    images = np.where(numbers == 750, 64.0 * count, 64.0)
    times = np.cumsum(images).tolist()
    random = np.random.default_rng(0)
    moves = 0.02 * random.standard_normal((count, 300))
    path = np.cumsum(moves, axis=0).astype(np.float32)
    net = nn.ParameterDict({"w": torch.zeros(300)})
    with track(net, tmp_path, t_unit="images", checkpoint_every=100) as tracker:
        for t, weights in zip(times, path, strict=True):
            net["w"].data.copy_(torch.from_numpy(weights))
            tracker.update_(net, t)
    truth = masses_of(target, count - numbers) @ path.astype(np.float64)
    average = Run(tmp_path).average(target)
    error = relative_distance(average["w"], truth)
    predicted = average.predicted_error
    assert predicted / 3 < error < 2 * predicted


def test_the_steps_of_windows_are_stored_and_kept_if_they_are_not_their_times(
    tmp_path: Path,
) -> None:
    net = tiny_model()
    with track(net, tmp_path / "equal", t_unit="images") as tracker:
        for step in range(1, 51):
            tracker.update_(net, step)
    assert np.isnan(steps_of(tmp_path / "equal")).all()
    with track(net, tmp_path, t_unit="images") as tracker:
        for step in range(1, 51):
            tracker.update_(net, 64 * step)
        state = tracker.state_dict()
    with PostHocEMA.from_path(tmp_path, net) as tracker:
        tracker.load_state_dict(state)
        for step in range(51, 101):
            tracker.update_(net, 6400 * step)
    steps = steps_of(tmp_path)
    sketch = sketches(tmp_path)[100]
    ends = sketch.edges[1:]
    images = np.where(steps <= 50, 64, 6400)
    np.testing.assert_array_equal(steps, ends / images)


def test_a_path_without_steps_is_that_of_an_earlier_version() -> None:
    edges = np.array([10.0, 20.0, 30.0])
    sketch = Sketch(edges, np.ones(2), np.eye(2), np.zeros(2))
    for exact in (False, True):
        path = PathSketch(7, sketch, np.array([2.0, 3.0]))
        data = base64.b64decode(encode_path(path, exact))
        found = decoded(data)
        np.testing.assert_array_equal(found.steps, [2, 3])
        without = decoded(data[:-16])
        np.testing.assert_array_equal(without.sketch.means, sketch.means)
        assert np.isnan(without.steps).all()


def decoded(data: bytes) -> PathSketch:
    text = base64.b64encode(data).decode()
    return decode_path(text)

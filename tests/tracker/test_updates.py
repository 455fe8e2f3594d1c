"""The running averages hold exactly the profile, for any stride, warm-up and clock."""

import math
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checking import assert_same_tensors
from factories import averages_in, exact_average, exact_gamma, relative_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tracker.runs import contents, track, update

from posthoc_cli import PostHocEMA, Run, disk_sources, plan_synthesis, profiles
from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    NotReadyError,
)
from posthoc_cli.tracker.memory import Reader

Tensors = dict[str, dict[str, torch.Tensor]]
"""Tensors by kind and name."""


class Scalar(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))

    def set(self, values: torch.Tensor) -> None:
        self.weight.data.copy_(values)

    def values(self) -> np.ndarray:
        return self.weight.detach().double().numpy()


def tracked(tracker: PostHocEMA, sigma_rel: float) -> np.ndarray:
    average = tracker.state_dict(sigma_rel, dtype="float64")
    return average["weight"].numpy()


def walk(steps: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.cumsum(random.standard_normal((steps, 3)), axis=0)


@given(
    update_every=st.integers(1, 12),
    warm_up=st.integers(0, 40),
    more=st.integers(0, 60),
    sigma_rel=st.sampled_from([0.02, 0.05, 0.15, 0.28]),
    unit=st.sampled_from(["steps", "images"]),
)
@settings(max_examples=20, deadline=None)
def test_any_stride_warm_up_and_clock_give_the_exact_profile(
    tmp_path_factory: pytest.TempPathFactory,
    update_every: int,
    warm_up: int,
    more: int,
    sigma_rel: float,
    unit: str,
) -> None:
    steps = (warm_up // update_every + 1) * update_every + more
    values = walk(steps)
    numbers = np.arange(1, steps + 1)
    times = numbers.astype(float)
    if unit == "images":
        times = np.cumsum(np.random.default_rng(1).uniform(0.5, 200, steps))
    settings = {
        "update_every": update_every,
        "checkpoint_every": 1000 * update_every,
        "update_after_step": warm_up,
        "t_unit": unit,
    }
    model = Scalar()
    folder = tmp_path_factory.mktemp("run")
    with track(model, folder, (sigma_rel,), **settings) as tracker:
        for value, t in zip(values, times.tolist(), strict=True):
            model.set(torch.from_numpy(value))
            tracker.update_(model, t if unit == "images" else None)
        is_update = (numbers % update_every == 0) & (numbers > warm_up)
        exact = exact_average(values[is_update], sigma_rel, times[is_update])
        # float64: a rounding of 1e-16 an update, of values up to about 100.
        np.testing.assert_allclose(tracked(tracker, sigma_rel), exact, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float32, 1e-4),
        (torch.bfloat16, 2**-7),
    ],
)
def test_folds_do_not_lose_steps_below_half_a_last_digit(
    tmp_path: Path,
    dtype: torch.dtype,
    change: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At t = 10^6 a fold of 104 steps moves an average by 0.1 last digits of a change of 1e-4:
    rounded to nearest, by none."""
    monkeypatch.setattr(profiles, "WINDOW", 8)
    base = torch.linspace(1, 1.9, 1000).to(dtype)
    begin = 1e6 * change / 1e-4
    every = 13
    updates = 400
    model = Scalar(dtype, size=1000)
    model.set(base)
    with track(model, tmp_path, (0.28,), checkpoint_every=10**6, t_unit="images") as tracker:
        tracker.update_(model, t=begin)
        model.weight.data.add_(change)
        for k in range(1, updates + 1):
            tracker.update_(model, t=begin + every * k)
        found = tracked(tracker, 0.28)
    earlier = begin / (begin + every * updates)
    moved = change * (1 - earlier ** (exact_gamma(0.28) + 1))
    off = found - base.double().numpy() - moved
    # last digits; the change itself is rounded to one, which is 0.1 % of it
    assert moved > 4 * 2**-23
    assert np.abs(off).max() < 2 * 2**-23


@pytest.mark.parametrize(
    ("begin", "every", "sigma_rels"),
    [
        (0, 1, (0.01, 0.1, 0.2886)),
        (40_000, 10, (0.05,)),
        (1_000_000, 64, (0.01, 0.1, 0.2886)),
    ],
)
def test_float32_averages_are_right_wherever_windows_end(
    tmp_path: Path,
    begin: int,
    every: int,
    sigma_rels: tuple[float, ...],
) -> None:
    """Windows have 1 to 104 updates; averages are read at each point of one, after a pause and with
    another clock."""
    model = Scalar(torch.float32, size=2000)
    path = []
    times = []
    t = float(begin)
    model.set(torch.randn(2000))
    with track(model, tmp_path, sigma_rels, checkpoint_every=10_000, t_unit="images") as tracker:
        for k in range(1, 151):
            t += every
            if k == 70:
                t += 49 * every
            model.weight.data += 0.01 * torch.randn(2000)
            tracker.update_(model, t=t)
            path.append(model.values())
            times.append(t)
            if k not in (1, 2, 3, 35, 69, 70, 71, 150):
                continue
            # One rounding is 0.2 * 2^-23 of the norm. Each update leaves at most one, in the mean
            # or the average, and reading one more; a window's weights of what moves in it, 0.01 an
            # update, are up to 1/60 wrong.
            roundings = 0.2 * 2**-23 * math.sqrt(1 + k)
            moved = 0.01 * min(1, every * k / t) ** 1.5 / 4
            for sigma_rel in sigma_rels:
                exact = exact_average(path, sigma_rel, times)
                found = tracked(tracker, sigma_rel)
                assert relative_distance(found, exact) < roundings + moved / 60


@pytest.mark.parametrize("kept", [(0.15,), (0.05, 0.15)])
def test_averages_stay_exact_when_profiles_begin_to_share_a_mean(
    tmp_path: Path,
    kept: tuple[float, ...],
) -> None:
    """They share it from t = 104,000 on; a run resumes within a window before, from a state with
    more profiles."""
    model = Scalar(torch.float32, size=500)
    model.set(torch.randn(500))
    path = []
    times = []

    def train(tracker: PostHocEMA, updates: int) -> None:
        for _ in range(updates):
            t = 103_601.0 + len(times)
            model.weight.data += 1e-3 * torch.randn(500)
            tracker.update_(model, t=t)
            path.append(model.values())
            times.append(t)

    with track(model, tmp_path / "all", (0.05, 0.15, 0.28), checkpoint_every=10**6) as tracker:
        train(tracker, 200)
        before = tracker.metrics()["bytes"]
        state = tracker.state_dict()
    assert state["standing"]["window"] > 0
    for folder in ("fewer", "again"):  # from a state with own means, and from one with a shared one
        with track(model, tmp_path / folder, kept, checkpoint_every=10**6) as tracker:
            tracker.load_state_dict(state)
            shared = []
            for updates in (0, 150, 250):
                train(tracker, updates)
                state = tracker.state_dict()
                shared.append(state["standing"]["shared"])
                for sigma_rel in kept:
                    exact = exact_average(path, sigma_rel, times)
                    assert relative_distance(tracked(tracker, sigma_rel), exact) < 1.5e-7
            assert tracker.metrics()["bytes"] <= before
            assert state["standing"]["window"] > 0
        begins = folder == "again"
        assert shared == [begins, begins, True]


def test_the_predicted_error_counts_the_error_of_a_shared_mean(tmp_path: Path) -> None:
    """The worst case is noise, here of 100 %, when profiles begin to share a mean; with twenty
    float32 snapshots."""
    model = Scalar(torch.float32, size=1000)
    path = []
    times = range(104_001, 106_501)
    center = torch.randn(1000)
    with track(model, tmp_path, checkpoint_every=125, checkpoint_dtype=torch.float32) as tracker:
        for t in times:
            model.set(center + torch.randn(1000))
            tracker.update_(model, float(t))
            path.append(model.values())
    exact = exact_average(path, 0.28, times)
    found = tracked(PostHocEMA.from_path(tmp_path), 0.28)
    error = relative_distance(found, exact)
    predicted = plan_synthesis(disk_sources(tmp_path), [0.28]).predicted_error(0)
    assert error > 5e-7
    assert 0.4 < error / predicted < 2.5


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    settings = PostHocEMA.from_model(Scalar(), tmp_path / "run").settings
    assert settings.sigma_rels == (0.05, 0.28)
    assert settings.t_unit == "steps"
    schedule = settings.schedule
    assert schedule.update_every == 10
    assert schedule.checkpoint_every == 1000
    assert schedule.update_after_step == 0
    assert schedule.max_checkpoints == 20
    assert schedule.checkpoint_dtype == "F16"
    assert not (tmp_path / "run").exists()  # making a tracker locks and writes nothing
    warning = "update_every is 5, so that checkpoint_every 15 is a multiple of it"
    with pytest.warns(RuntimeWarning, match=warning):
        ema = PostHocEMA.from_model(Scalar(), tmp_path, checkpoint_every=15)
    assert ema.settings.schedule.update_every == 5


def test_snapshots_are_kept_for_the_averages_between_the_tracked_ones(tmp_path: Path) -> None:
    """Short averages need late snapshots, long ones also early ones; a resumed run keeps its
    range."""
    kept = []
    for sigma_rels in ((0.02, 0.04), (0.2, 0.28)):
        model = nn.Linear(30, 30)
        folder = tmp_path / f"{sigma_rels}"
        with track(model, folder, sigma_rels, checkpoint_every=5, max_checkpoints=5) as tracker:
            for _ in range(60):
                model.weight.data += torch.randn(30, 30)
                tracker.update_(model)
        snapshots = Run(folder).snapshots
        kept.append(np.mean([snapshot.t for snapshot in snapshots]))
        assert snapshots[0].schedule.sigma_range == sigma_rels
        assert PostHocEMA.from_path(folder).settings.schedule.sigma_range == sigma_rels
    short, long = kept
    assert short > 1.3 * long


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("checkpoint_every", 1005, "1005: must be a multiple of update_every 4"),
        ("update_every", 0, "update_every 0"),
        ("sigma_rels", 0.1, "sigma_rels 0.1: must be a sequence"),
        ("sigma_rels", ("abc",), "sigma_rel 'abc': must be a number, and lie in"),
        ("sigma_rels", (0.05, 0.05), "must be a sequence of different numbers"),
        ("sigma_rels", (0.05, 0.3), "sigma_rel 0.3: must lie in"),
        ("t_unit", "a\nb", "t_unit"),
        ("update_after_step", -1, "update_after_step -1"),
        ("max_checkpoints", 0, "max_checkpoints 0"),
        ("checkpoint_dtype", "int8", "dtype 'int8': must be one of"),
        ("device", "cuda", "'cuda': must be 'cpu', or 'model' for the model's own device"),
    ],
)
def test_an_impossible_setting_is_a_value_error_that_names_it(
    tmp_path: Path,
    argument: str,
    value: object,
    message: str,
) -> None:
    arguments: Any = {"update_every": 4, argument: value}
    with pytest.raises(InvalidValueError, match=re.escape(message)) as caught:
        PostHocEMA.from_model(Scalar(), tmp_path / "run", **arguments)
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "run").exists()


NO_LATER_TIMES: list[Any] = [
    64,
    63,
    math.nan,
    math.inf,
    "abc",
    [1],
    1j,
    10**400,
    1e101,
    torch.ones(2),
]


def test_a_clock_must_grow_and_stay_the_same_clock(tmp_path: Path) -> None:
    model = Scalar()
    with track(model, tmp_path) as tracker:
        too_small = r"t 1e-101: must lie between 1e-100 and 1e\+100"
        with pytest.raises(InvalidValueError, match=too_small):
            tracker.update_(model, t=1e-101)
        tracker.update_(model, t=64)
        for bad in NO_LATER_TIMES:
            passed = re.escape(repr(bad)[:40])
            refused = rf"t {passed}: must lie between .*larger than at the last call"
            with pytest.raises(InvalidValueError, match=refused):
                tracker.update_(model, t=bad)
        with pytest.raises(InvalidValueError, match="at every call or at none"):
            tracker.update_(model)
        tracker.update_(model, t=128)
        assert tracker.step == 2
        assert tracker.t == 128


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("dtype", "device", "begin", "bad"),
    [
        (torch.float32, "model", 0, torch.nan),
        (torch.float32, "cpu", 10**6, -torch.inf),
        (torch.bfloat16, "model", 10**6, -torch.inf),
        (torch.float64, "model", 10**6, torch.nan),
    ],
)
def test_a_refused_update_leaves_the_averages_as_they_are(
    tmp_path: Path,
    dtype: torch.dtype,
    device: str,
    begin: int,
    bad: float,
) -> None:
    """The bad value is in the last of many tiles, at first beside values so large that a trace of
    them would show."""
    model = Scalar(dtype, size=1000)
    weight = model.weight.data
    model.register_buffer("count", torch.zeros(()))
    largest = 0.0
    with track(model, tmp_path, device=device) as tracker:
        for step in range(1, 76):
            weight.normal_()
            largest = max(largest, float(weight.abs().max()))
            model.count += 1
            if step not in (2, 3, 20, 37, 50, 51, 70):
                tracker.update_(model, begin + step)
                continue
            before = tracker.state_dict()
            if step < 40:
                weight.mul_(1e30)
            weight[999] = bad
            named = f"'weight': holds nan or infinity at step {step}"
            with pytest.raises(NonFiniteError, match=named):
                tracker.update_(model, begin + step)
                tracker.flush()
            within = 0.0
            # Right after a refusal all values are checked first, so that errors do not add up.
            if step not in (3, 51):
                # With |f| <= 1 an interpolation of values up to A rounds by at most u 7 A; its
                # inverse, with the share f / (f - 1) down to -3, magnifies that by four, and rounds
                # by u 19 A itself.
                rounding = 2.0**-53 if dtype == torch.float64 else 2.0**-24
                within = 47 * largest * rounding
            check_same_averages(before, tracker.state_dict(), within)


def check_same_averages(before: dict[str, Any], after: dict[str, Any], within: float) -> None:
    """Fail unless two states differ in the counts alone, and means by rounding."""
    # the model's own weights have changed
    changed = {"mean", "high", "copies", "step", "t", "weights"}
    for name in before.keys() - changed:
        assert after[name] == before[name]
    assert_same_tensors(after["copies"], before["copies"])
    for key in before["mean"]:
        assert_same_tensors(after["high"][key], before["high"][key])
        earlier = before["mean"][key]["weight"]
        later = after["mean"][key]["weight"]
        torch.testing.assert_close(later, earlier, rtol=0, atol=within)


def test_an_infinity_among_the_largest_float64_values_is_refused(tmp_path: Path) -> None:
    """Twice their norm is infinite itself."""
    model = Scalar()
    model.weight.data.fill_(1e308)
    with track(model, tmp_path) as tracker:
        update(tracker, model, 20)
        model.weight.data[0] = torch.inf
        with pytest.raises(NonFiniteError, match="'weight': holds nan or infinity at step 21"):
            tracker.update_(model)
            tracker.flush()
        means = tracked(tracker, 0.28)
        np.testing.assert_allclose(means, 1e308, rtol=1e-7)


def parameter(elements: int) -> nn.Parameter:
    return Scalar(size=elements).weight


CHANGES: list[tuple[Callable[[Any], object], str]] = [
    (
        lambda m: m.register_parameter("weight", parameter(4)),
        r"'weight': is .* \[4\], and was .* \[3\] when tracking",
    ),
    (
        lambda m: m.register_parameter("extra", parameter(1)),
        "'extra': is averaged, .*, and was not tracked",
    ),
    (lambda m: delattr(m, "weight"), "'weight': is not tracked, and was averaged"),
    (
        lambda m: m.half(),
        "'weight': is .*float16 .*, and was .*float64 .* torch.autocast, .*a new directory",
    ),
    (
        lambda m: m.weight.requires_grad_(False),
        r"'weight': is left out, as .* no gradients, .*include='\*'.*directory",
    ),
    (
        lambda m: m.frozen.requires_grad_(True),
        r"'frozen': is averaged, .*, and was left out.*include='\*'.*directory",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_model_that_changes_is_refused_and_nothing_written(
    tmp_path: Path,
    change: Any,
    message: str,
) -> None:
    model = Scalar()
    model.other_weight = parameter(2)
    model.frozen = parameter(2).requires_grad_(False)
    with track(model, tmp_path, checkpoint_every=2) as tracker:
        tracker.update_(model)
        change(model)
        with pytest.raises(ModelMismatchError, match=message):
            tracker.update_(model)
        tracker.flush()
        assert tracker.step == 2
        assert not list(tmp_path.glob("*.safetensors"))


def test_a_step_that_a_cuda_graph_captures_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would count once, however often the graph is replayed."""
    model = nn.Linear(2, 2)
    ema = track(model, tmp_path)
    ema.update_(model)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_initialized", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(NotReadyError, match=r"graph is being captured.*graph\.replay"):
            ema.update_(model)
    ema.update_(model)
    assert ema.step == 2


class Permuted(nn.Module):
    """Weights of a convolution, of a layer that was transposed, and of one between two others."""

    def __init__(self, permutes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 10, 3)
        self.turned = nn.Parameter(torch.randn(5, 7, 4))
        self.piece = nn.Parameter(torch.randn(9, 6))
        if permutes:
            self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            turned = self.turned.permute(2, 0, 1).contiguous()
            self.turned.data = turned.permute(1, 2, 0)
            wide = torch.randn(9, 8)
            wide[:, 1:7] = self.piece.data
            self.piece.data = wide[:, 1:7]


def record_permuted(folder: Path, permutes: list[bool], options: dict[str, Any]) -> Tensors:
    """Return what 40 steps leave; step 30 is followed by a resumption, perhaps with weights in
    another order."""
    model, again = map(Permuted, permutes)
    tracker = track(model, folder, resume="auto", **options)
    for step in range(1, 41):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        tracker.update_(model)
        if step == 30:
            state = tracker.state_dict()
            tracker.close()
            again.load_state_dict(model.state_dict())
            model = again
            tracker = track(model, folder, resume="auto", **options)
            tracker.load_state_dict(state)
    found = {"0.05": tracker.state_dict(0.05)}
    with tracker.model(model, 0.28):
        found["in the model"] = deepcopy(model.state_dict())
    for sigma_rel, average in averages_in(tracker.state_dict()).items():
        found[f"tracked {sigma_rel}"] = average
    tracker.close()
    return found


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("model", None),
        ("cpu", torch.float16),
    ],
)
def test_weights_in_another_order_of_memory_have_the_same_averages(
    tmp_path: Path,
    device: str,
    dtype: torch.dtype | None,
) -> None:
    """And the same snapshots, with their samples and paths, also if the order changes in
    mid-run."""
    options = {"checkpoint_every": 20, "checkpoint_dtype": dtype, "device": device}
    expected = record_permuted(tmp_path / "rows", [False, False], options)
    found = record_permuted(tmp_path / "permuted", [True, False], options)
    for kind, tensors in expected.items():
        assert_same_tensors(found[kind], tensors)
    assert contents(tmp_path / "permuted") == contents(tmp_path / "rows")


def test_weights_in_another_order_of_memory_are_read_in_place() -> None:
    """A transposition took an update 1.9 times as long."""
    model = Permuted(permutes=True)
    reader = Reader.of_tensors(dict(model.named_parameters()))
    places = []
    for tile in reader.tiles:
        places += [part.data_ptr() for part in reader.current(tile)]
    assert model.conv.weight.data_ptr() in places
    assert model.turned.data_ptr() in places

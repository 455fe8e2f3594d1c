"""The running averages hold exactly the profile, for any stride, warm-up and clock."""

import math

import mpmath
import numpy as np
import pytest
import torch
from checking import refused
from factories import exact_average, exact_gamma, info_of, relative_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tracker.runs import track

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import (
    ModelMismatchError,
    NonFiniteError,
    RefusedCallError,
)
from posthoc_cli.snapshots.snapshot import TrackingSchedule
from posthoc_cli.tracker import folding


class Scalar(nn.Module):
    def __init__(self, dtype=torch.float64, size=3):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))

    def values(self):
        return self.weight.detach().double().numpy().copy()


def test_the_share_of_a_new_value_keeps_its_digits_late_in_training():
    gamma = exact_gamma(0.28)
    t = 10**12
    with mpmath.workdps(50):
        passed = mpmath.mpf(t - 1) / t
        beta = passed ** (mpmath.mpf(gamma) + 1)
        exact = float(1 - beta)
    share = folding.new_value_share(gamma, t - 1, t)
    assert share == pytest.approx(exact, rel=1e-14, abs=0)


def tracked(tracker, sigma_rel):
    average = tracker.state_dict(sigma_rel, dtype="float64")
    return average["weight"].numpy()


@given(
    update_every=st.integers(1, 12),
    warm_up=st.integers(0, 40),
    more=st.integers(0, 60),
    sigma_rel=st.sampled_from([0.02, 0.05, 0.15, 0.28]),
)
@settings(max_examples=20)
def test_any_stride_warm_up_and_clock_give_the_exact_profile(
    tmp_path_factory,
    update_every,
    warm_up,
    more,
    sigma_rel,
):
    count = (warm_up // update_every + 1) * update_every + more
    random = np.random.default_rng(0)
    values = np.cumsum(random.standard_normal((count, 3)), axis=0)
    times = np.cumsum(random.uniform(0.5, 200, count))
    schedule = {
        "update_every": update_every,
        "checkpoint_every": 1000 * update_every,
        "update_after_step": warm_up,
    }
    model = Scalar()
    folder = tmp_path_factory.mktemp("run")
    with track(model, folder, (sigma_rel,), t_unit="images", **schedule) as tracker:
        for value, t in zip(values, times.tolist(), strict=True):
            model.weight.data.copy_(torch.from_numpy(value))
            tracker.update_(model, t)
        numbers = np.arange(1, count + 1)
        is_update = (numbers % update_every == 0) & (numbers > warm_up)
        exact = exact_average(values[is_update], sigma_rel, times[is_update])
        # float64: a rounding of 1e-16 an update, of values up to about 100.
        np.testing.assert_allclose(tracked(tracker, sigma_rel), exact, atol=1e-11)


def test_folds_do_not_lose_steps_below_half_a_last_digit(tmp_path, monkeypatch):
    """At t = 10^6 a fold of 104 steps moves an average by 0.1 last digits of a change of 1e-4:
    rounded to nearest, by none."""
    monkeypatch.setattr(folding, "WINDOW", 8)
    base = torch.linspace(1, 1.9, 1000)
    model = Scalar(torch.float32, size=1000)
    model.weight.data.copy_(base)
    with track(model, tmp_path, (0.28,), checkpoint_every=10**6, t_unit="images") as tracker:
        tracker.update_(model, t=1_000_000)
        model.weight.data += 1e-4
        for t in range(1_000_013, 1_005_201, 13):
            tracker.update_(model, t)
        found = tracked(tracker, 0.28)
    moved = 1e-4 * (1 - (1_000_000 / 1_005_200) ** (exact_gamma(0.28) + 1))
    off = found - base.double().numpy() - moved
    # last digits; the change itself is rounded to one, which is 0.1 % of it
    assert moved > 4 * 2**-23
    assert np.abs(off).max() < 2 * 2**-23


def test_averages_of_weights_that_do_not_change_are_their_bits(tmp_path):
    """Folds add less than half a last digit, of which a power of two has a smaller one below it."""
    powers = 2.0 ** torch.arange(-120, 121)
    weights = torch.cat([powers, -powers, torch.zeros(1), powers * torch.rand(len(powers))])
    model = Scalar(torch.float32, size=len(weights))
    model.weight.data.copy_(weights)
    with track(model, tmp_path, (0.05, 0.28), checkpoint_every=10**6) as tracker:
        for _ in range(300):
            tracker.update_(model)
        for sigma_rel in (0.05, 0.28):
            assert np.array_equal(tracked(tracker, sigma_rel), weights.double().numpy())


def test_averages_stay_exact_when_profiles_begin_to_share_a_mean(tmp_path):
    """They share it from t = 10,000 on; the run is resumed with fewer profiles within a window
    before, and again within one after that."""
    model = Scalar(torch.float32, size=500)
    nn.init.normal_(model.weight)
    path = []
    times = []
    state = {}
    for updates, sigma_rels in ((200, (0.05, 0.15, 0.28)), (452, (0.05, 0.15)), (55, (0.05, 0.15))):
        with track(model, tmp_path / f"{updates}", sigma_rels, checkpoint_every=10**6) as tracker:
            if state:
                tracker.load_state_dict(state)
            for _ in range(updates):
                model.weight.data += 1e-3 * torch.randn(500)
                path.append(model.values())
                times.append(9_601.0 + len(times))
                tracker.update_(model, times[-1])
            for sigma_rel in sigma_rels:
                exact = exact_average(path, sigma_rel, times)
                assert relative_distance(tracked(tracker, sigma_rel), exact) < 1.5e-7
            state = tracker.state_dict()
        assert info_of(state)["standing"]["window"] > 0
    assert info_of(state)["standing"]["shared"]


def test_defaults_are_those_of_the_contract(tmp_path, caplog):
    settings = PostHocEMA.from_model(Scalar(), tmp_path / "run").settings
    assert settings.sigma_rels == (0.05, 0.28)
    assert settings.t_unit == "steps"
    assert settings.schedule == TrackingSchedule(10, 1000, 0, 20, "F16", (0.05, 0.28))
    assert not (tmp_path / "run").exists()  # making a tracker locks and writes nothing
    ema = PostHocEMA.from_model(Scalar(), tmp_path, checkpoint_every=15)
    assert "update_every is 5" in caplog.text
    assert ema.settings.schedule.update_every == 5


@pytest.mark.parametrize(
    ("argument", "value", "subject"),
    [
        ("checkpoint_every", 1005, "checkpoint_every 1005"),
        ("checkpoint_every", 100.0, "checkpoint_every 100.0"),
        ("update_every", 0, "update_every 0"),
        ("sigma_rels", 0.1, "sigma_rels 0.1"),
        ("sigma_rels", (0.05, 0.05), "sigma_rels (0.05, 0.05)"),
        ("sigma_rels", (0.05, 0.3), "sigma_rel 0.3"),
        ("t_unit", "a\nb", r"t_unit 'a\nb'"),
        ("max_checkpoints", 0, "max_checkpoints 0"),
        ("checkpoint_dtype", "int8", "checkpoint_dtype 'int8'"),
        ("device", "cuda", "device 'cuda'"),
    ],
)
def test_an_impossible_setting_is_a_value_error_that_names_it(tmp_path, argument, value, subject):
    arguments = {"update_every": 4, argument: value}
    with refused(subject):
        PostHocEMA.from_model(Scalar(), tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


NO_LATER_TIMES = [
    64,
    math.nan,
    "abc",
    [1],
    1j,
    10**400,
    1e101,
    torch.ones(2),
]


def test_a_clock_must_grow_and_stay_the_same_clock(tmp_path):
    model = Scalar()
    with track(model, tmp_path) as tracker:
        with refused("t 1e-101"):
            tracker.update_(model, t=1e-101)
        tracker.update_(model, t=64)
        for bad in NO_LATER_TIMES:
            with refused(f"t {repr(bad)[:40]}"):
                tracker.update_(model, t=bad)
        with refused("t"):
            tracker.update_(model)
        tracker.update_(model, t=128)
        assert tracker.step == 2
        assert tracker.t == 128


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("device", "bad"),
    [
        ("model", torch.nan),
        ("cpu", -torch.inf),
    ],
)
def test_a_refused_update_leaves_the_averages_as_they_are(tmp_path, device, bad):
    """The bad value is in the last of many tiles, at first beside values so large that a trace of
    them would show. The clock leaps, so that windows have one update and later many."""
    model = Scalar(torch.float32, size=1000)
    path = []
    times = []
    with track(model, tmp_path, device=device, t_unit="images") as tracker:
        for step in range(1, 101):
            t = step if step < 25 else 10**6 + step
            nn.init.normal_(model.weight)
            if step not in (2, 3, 13, 16, 18, 20, 23, 50, 51):
                tracker.update_(model, t)
                path.append(model.values())
                times.append(t)
                if step in (24, 100):
                    for sigma_rel in (0.05, 0.28):
                        exact = exact_average(path, sigma_rel, times)
                        assert relative_distance(tracked(tracker, sigma_rel), exact) < 1e-6
                continue
            if 30 < step < 60:
                model.weight.data *= 1e30
            model.weight.data[999] = bad
            with refused("parameter 'weight'", f" step {step}", kind=NonFiniteError):
                tracker.update_(model, t)
                tracker.flush()


def test_an_average_that_overflows_is_not_written(tmp_path):
    model = Scalar(torch.float32)
    tracker = track(model, tmp_path, checkpoint_every=2)
    for value in (3e38, -3e38):
        model.weight.data.fill_(value)
        tracker.update_(model)
    with refused("average of 'weight'", kind=NonFiniteError):
        tracker.close()


def parameter(elements):
    return Scalar(size=elements).weight


CHANGES = [
    (lambda m: m.register_parameter("weight", parameter(4)), "weight", "[4]"),
    (lambda m: m.register_parameter("extra", parameter(1)), "extra", "not tracked"),
    (lambda m: delattr(m, "weight"), "weight", "not tracked"),
    (lambda m: m.half(), "weight", "float16"),
    (lambda m: m.weight.requires_grad_(False), "weight", "include='*'"),
    (lambda m: m.frozen.requires_grad_(True), "frozen", "include='*'"),
    (lambda m: m.scale.resize_(4), "scale", "exclude='scale'"),
]


@pytest.mark.parametrize(("change", "name", "fact"), CHANGES)
def test_a_model_that_changes_is_refused_and_nothing_written(tmp_path, change, name, fact):
    model = Scalar()
    model.other_weight = parameter(2)
    model.frozen = parameter(2).requires_grad_(False)
    model.register_buffer("scale", torch.ones(1))
    with track(model, tmp_path, checkpoint_every=2) as tracker:
        tracker.update_(model)
        change(model)
        with refused(f"tensor '{name}'", fact, kind=ModelMismatchError):
            tracker.update_(model)
        tracker.flush()
        assert tracker.step == 2
        assert not list(tmp_path.glob("*.safetensors"))


def test_a_step_that_a_cuda_graph_captures_is_refused(tmp_path, monkeypatch):
    """It would count once, however often the graph is replayed."""
    model = nn.Linear(2, 2)
    ema = track(model, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with refused("update_", "graph.replay()", kind=RefusedCallError):
        ema.update_(model)


def test_a_frozen_model_is_refused_until_it_is_trained_again(tmp_path):
    """As the generator of a GAN while the discriminator is trained."""
    model = nn.Linear(2, 2)
    with track(model, tmp_path) as ema:
        ema.update_(model)
        model.requires_grad_(False)
        with refused("tensor 'weight'", kind=ModelMismatchError):
            ema.update_(model)
        model.requires_grad_(True)
        ema.update_(model)


def test_another_model_is_refused_at_its_first_call(tmp_path):
    """Which is not counted, though no update is due."""
    model = nn.Linear(2, 2)
    with track(model, tmp_path, update_every=10) as ema:
        ema.update_(model)
        with refused("tensor 'weight'", "[3, 2]", kind=ModelMismatchError):
            ema.update_(nn.Linear(2, 3))
        assert ema.step == 1

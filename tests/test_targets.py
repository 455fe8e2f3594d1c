"""Targets: the right profile for each target, and an error that names each impossible one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from checking import refused

from posthoc_cli.profiles import Clock, Point, PowerFunction
from posthoc_cli.targets import (
    Beta,
    Between,
    Decay,
    GivenProfile,
    Groups,
    HalfLife,
    Mean,
    SigmaRel,
    Target,
    Window,
    as_target,
    parse_targets,
)

STEPS = Clock.of_steps()
IMAGES = Clock((10, 10_000), (1_280.0, 1_000_000.0))


NINE = Between(0, 9).profile(9.0, STEPS, 1.0)


@pytest.mark.parametrize(
    ("target", "label", "title", "sigma_rel"),
    [
        (SigmaRel(0.15), "0.15", "sigma_rel 0.15", 0.15),
        (Beta(0.9999), "beta-0.9999", "beta:0.9999", None),
        (Window(1000), "window-1000", "window:1000", None),
        (Between(5e4, 8e4), "between-50000-80000", "between:50000:80000", None),
        (Decay("linear", 0.2), "decay-linear-20%", "decay:linear:20%", None),
        (Decay("1-sqrt", (5e4, 8e4)), "decay-1-sqrt-50000-80000", "decay:1-sqrt:50000:80000", None),
        (GivenProfile(NINE, "mine"), "mine", "profile mine", None),
    ],
)
def test_each_target_has_its_names(target: Target, label: str, title: str, sigma_rel: float | None) -> None:
    assert (target.label, target.title, target.sigma_rel) == (label, title, sigma_rel)
    assert as_target(target) is target
    if target.kind != "profile":
        assert as_target(target.title.removeprefix("sigma_rel ")) == target


def test_the_mean_of_a_span_weighs_its_times_the_same_and_a_decay_over_a_part_ends_with_the_run() -> None:
    times = np.linspace(-1, 1.1e6, 1000)
    profile = Between(5e4, 8e4).profile(1e6, IMAGES, 1280.0)
    np.testing.assert_allclose(profile.tail(times), np.clip((8e4 - times) / 3e4, 0, 1), atol=1e-12)
    part, span = (Decay("1-sqrt", over).profile(1e6, IMAGES, 1280.0) for over in (0.2, (8e5, 1e6)))
    np.testing.assert_allclose(part.tail(times), span.tail(times), atol=1e-12)


def test_a_number_is_a_sigma_rel_and_an_object_with_tail_a_profile() -> None:
    for value in (0.15, np.float32(0.15), np.array(0.15)):
        assert as_target(value) == SigmaRel(float(value))
    assert as_target(NINE) == GivenProfile(NINE)
    assert Beta(1 - 1e-12).label != Beta(1 - 2e-12).label
    assert SigmaRel(0.1500001).label == "0.1500001"


@pytest.mark.parametrize(
    ("make", "subject", "words"),
    [
        (lambda: as_target(None), "target", "None"),
        (lambda: Groups({1: 0.1}), "group", "{1: 0.1}: must be globs on names"),  # type: ignore[dict-item]
        (lambda: as_target("abc"), "target", "abc: must be a sigma_rel in (0, 0.2887), or one of beta:0.9999, "),
        (lambda: as_target("beta:0.99,0.999"), "target", "must name one average, not 2"),
        (lambda: Beta("0.9"), "beta", "'0.9'"),  # type: ignore[arg-type]
        (lambda: Decay("linear", ()), "over", "two ascending times"),  # type: ignore[arg-type]
        (lambda: Mean(2.5), "last", "must be a whole number of checkpoints"),  # type: ignore[arg-type]
        (lambda: Mean(3).profile(1e6, IMAGES, 1280.0), "target", "target last:3: names checkpoints"),
        (lambda: as_target("0.9"), "target", "for a decay of 0.9 per step use beta:0.9"),
        (lambda: as_target("between:50:20"), "target", "target between:50:20: must start at 0 or later"),
        (lambda: as_target("between:5%:20%"), "target", "target between:5%:20%: must be START:END, two training times"),
        (lambda: Between(5, 2e6).profile(1e6, IMAGES, 1280.0), "target", "target between:5:2000000: ends after t"),
        (lambda: Between(0, 1e-300).profile(1e6, IMAGES, 1280.0), "target", "between:0:1e-300: must span at least"),
        (lambda: Window(10**4 + 1).profile(1e6, IMAGES, 1280.0), "target", "target window:10001: the run has 10,000"),
        (lambda: GivenProfile(NINE, "../a b"), "profile", "'../a b'"),
        (lambda: GivenProfile(NINE, "mine").profile(9 - 9e-6, STEPS, 1.0), "profile mine",
         "tail is 1e-06 at s = 8.999991; must be 1 before 0"),
    ],
)  # fmt: skip
def test_an_impossible_target_is_refused(make: Callable[[], object], subject: str, words: str) -> None:
    with refused(subject, words):
        make()


@dataclasses.dataclass
class Written:
    """A profile that is uniform on (0, 100], unless a test replaces its tail."""

    tail: Callable = Between(0, 100).profile(100.0, STEPS, 1.0).tail


def test_valid_profiles_are_used_unchanged() -> None:
    rounded = Written(lambda s: (np.clip(1 - s / 100, 0, 1) + 1e-12).tolist())
    for profile in (Written(), PowerFunction.from_sigma_rel(0.01, 100.0), rounded):
        assert as_target(profile).profile(100.0, STEPS, 1.0) is profile


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (Written(lambda s: s * np.nan), "tail is nan at s = -100"),
        (Written(lambda _: 0.01), "times of shape (1150,) give the shape ()"),
        (Written(tail=lambda s: 1 - s / 100), "tail is 2 at s = -100"),
        (Written(tail=lambda s: np.clip(1 - s / 200, 0, 1)), "tail is 0.5 at s = 100; must be 1 before 0"),
        (Written(tail=lambda s: np.where(abs(s - 50) < 10, 1, np.clip(1 - s / 100, 0, 1))),
         "tail is 1 at s = 40.0390625"),
        (Written(tail=lambda _: 1 / 0), "tail fails for an array of times: division by zero"),
    ],
)  # fmt: skip
def test_the_fault_of_a_given_profile_is_named(profile: object, words: str) -> None:
    with refused("profile given", words):
        as_target(profile).profile(100.0, STEPS, 1.0)


def test_the_mean_is_of_the_last_checkpoints() -> None:
    stored = [Point(30), PowerFunction(5.0, 40.0), Point(10), Point(20)]
    assert Mean(2).coefficients_of(stored).tolist() == [0.5, 0, 0, 0.5]
    averages = [PowerFunction(5.0, 10.0), PowerFunction(5.0, 20.0)]
    assert Mean(1).coefficients_of(averages).tolist() == [0, 1]
    with refused("target", "last:4: the run has only 3 up to this time"):
        Mean(4).coefficients_of(stored)
    with refused("target", "last:1", "this run has none, but more than one average at each time"):
        Mean(1).coefficients_of([PowerFunction(5.0, 10.0), PowerFunction(6.0, 10.0)])


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("0.05,0.1", [SigmaRel(0.05), SigmaRel(0.1)]),
        (" beta: 0.99 , 0.999,0.99", [Beta(0.99), Beta(0.999)]),
        ("half-life:100,200,...,400", [HalfLife(100), HalfLife(200), HalfLife(300), HalfLife(400)]),
        ("window:500:1500:500", [Window(500), Window(1000), Window(1500)]),
        ("between:0:1e3,500:2000", [Between(0, 1000), Between(500, 2000)]),
        ("last:10", [Mean(10)]),
        ("decay:1-sqrt:5%:15%:5%", [Decay("1-sqrt", 0.05), Decay("1-sqrt", 0.1), Decay("1-sqrt", 0.15)]),
        ("decay:cosine:100:200", [Decay("cosine", (100, 200))]),
    ],
)
def test_a_text_names_targets(text: str, targets: list[Target]) -> None:
    assert parse_targets(text) == targets


def test_a_half_life_is_a_decay_in_steps_and_a_power_function_in_percent() -> None:
    """Then an update at step n keeps 2^(-1 / (share n)), as (1 - 1 / n)^(gamma + 1) does for many steps."""
    assert HalfLife(2000).beta == pytest.approx(0.5 ** (1 / 2000), rel=1e-15)
    (target,) = parse_targets("half-life:5%")
    assert target.title == "half-life:5%"
    assert target.sigma_rel == pytest.approx(0.0629, abs=5e-5)
    assert 1 - target.profile(1000.0, STEPS, 1.0).tail(999.0) == pytest.approx(2 ** (-1 / 50), rel=2e-5)

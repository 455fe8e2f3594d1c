"""Targets: the right profile for each, and an error that names each impossible one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checking import refused
from hypothesis import given
from hypothesis import strategies as st

from posthoc_cli.profiles import (
    ClassicalEMA,
    Clock,
    EmulatedDecay,
    Point,
    PowerFunction,
    StepWindow,
    Tabulated,
    Uniform,
    others,
)
from posthoc_cli.targets import (
    Beta,
    Between,
    Coefficients,
    Decay,
    GivenProfile,
    Groups,
    Mean,
    ProfileFile,
    SigmaRel,
    Target,
    Window,
    as_target,
)

STEPS = Clock.of_steps()
IMAGES = Clock((10, 10_000), (1_280.0, 1_000_000.0))


@pytest.mark.parametrize(
    ("target", "label", "title", "sigma_rel", "profile"),
    [
        (SigmaRel(0.15), "0.15", "sigma_rel 0.15", 0.15, PowerFunction.from_sigma_rel(0.15, 1e6)),
        (Beta(0.9999), "beta-0.9999", "beta 0.9999", None, ClassicalEMA(0.9999, 1e6, IMAGES, start=1280.0)),
        (Window(1000), "window-1000", "window 1000", None, StepWindow(1000, 1e6, IMAGES)),
        (Between(5e4, 8e4), "between-50000-80000", "between 50000:80000", None, Uniform(5e4, 8e4)),
        (Decay("linear", 0.2), "decay-linear-0.2", "decay linear over 20%", None, EmulatedDecay(8e5, 1e6, "linear")),
        (
            Decay("1-sqrt", (5e4, 8e4)),
            "decay-1-sqrt-50000-80000",
            "decay 1-sqrt over 50000:80000",
            None,
            EmulatedDecay(5e4, 8e4, "1-sqrt"),
        ),
        (GivenProfile(Uniform(0, 9.0), "mine"), "mine", "profile mine", None, Uniform(0, 9.0)),
    ],
)
def test_each_target_has_its_names_and_its_profile(
    target: Target, label: str, title: str, sigma_rel: float | None, profile: object
) -> None:
    assert (target.label, target.title, target.sigma_rel) == (label, title, sigma_rel)
    assert target.profile(1e6, IMAGES, 1280.0) == profile
    assert as_target(target) is target


def test_a_number_is_a_sigma_rel_and_an_object_with_density_and_tail_a_profile() -> None:
    for value in (0.15, np.float32(0.15), np.array(0.15)):
        assert as_target(value) == SigmaRel(float(value))
    assert as_target(Uniform(0.0, 5.0)) == GivenProfile(Uniform(0.0, 5.0))
    assert Beta(1 - 1e-12).label != Beta(1 - 2e-12).label
    assert SigmaRel(0.1500001).label == "0.1500001"


def test_a_target_of_the_users_own_is_taken_as_it_is() -> None:
    class Half:
        label, title, sigma_rel = "half", "the last half", None

        def profile(self, t: float, clock: Clock, t_first: float) -> Uniform:  # noqa: ARG002
            return Uniform(t / 2, t)

    own = Half()
    assert as_target(own) is own


@pytest.mark.parametrize(
    ("make", "subject", "words"),
    [
        (lambda: as_target(None), "target", "None"),
        (lambda: as_target([0.1, 0.2]), "target", "[0.1, 0.2]"),
        (lambda: as_target(Beta), "target", "must be a sigma_rel in (0, 0.2887), a target such as Beta(0.9999)"),
        (lambda: Groups({1: 0.1}), "group", "1: must be a glob on names"),  # type: ignore[dict-item]
        (lambda: as_target("abc"), "sigma_rel", "'abc'"),
        (lambda: as_target(0.99999999), "sigma_rel", "use Beta(0.99999999)"),
        (lambda: Beta(0.0), "beta", "0.0: must lie in (0, 1)"),
        (lambda: Beta(math.nan), "beta", "finite"),
        (lambda: Beta("0.9"), "beta", "'0.9'"),  # type: ignore[arg-type]
        (lambda: Window(True), "window", "True"),
        (lambda: Between(5, 5), "between", "5:5"),
        (lambda: Between(0, math.inf), "between", "finite"),
        (lambda: Decay("sqrt"), "decay", "sqrt: must be 1-sqrt, linear, cosine or a file"),
        (lambda: Decay("linear", 0), "over", "0: must be a part of training in (0, 1]"),
        (lambda: Decay("linear", (5, 3)), "over", "two growing times"),
        (lambda: Decay("linear", (1, 2, 3)), "over", "two growing times"),  # type: ignore[arg-type]
        (lambda: Decay("linear", (5, 2e6)).profile(1e6, IMAGES, 1280.0), "over", "ends after t = 1,000,000"),
        (lambda: Mean(2.5), "mean", "must be a whole number of checkpoints"),  # type: ignore[arg-type]
        (lambda: Mean(3).profile(1e6, IMAGES, 1280.0), "mean of the last 3", "names coefficients"),
        (lambda: GivenProfile(Uniform(0, 1), "../a b"), "profile", "'../a b'"),
        (lambda: GivenProfile(Uniform(0, 1e6 + 1), "mine").profile(1e6, IMAGES, 1280.0), "profile mine",
         "9.99999e-07 of its mass lies after"),
    ],
)  # fmt: skip
def test_an_impossible_target_is_refused(make: Callable[[], object], subject: str, words: str) -> None:
    with refused(subject, words):
        make()


@dataclasses.dataclass
class Written:
    """A profile that is uniform on (0, 100], but for what a test replaces."""

    density: Callable = Uniform(0, 100).density
    tail: Callable = Uniform(0, 100).tail


@pytest.mark.parametrize(
    "profile",
    [
        Written(), PowerFunction.from_sigma_rel(0.01, 100.0), ClassicalEMA(0.999, 100.0, STEPS),
        Tabulated((0, 1, 2), (0, 1, 0)), Written(tail=lambda s: (np.clip(1 - s / 100, 0, 1) + 1e-12).tolist()),
    ],
)  # fmt: skip
def test_sound_profiles_are_taken_as_they_are(profile: object) -> None:
    assert as_target(profile).profile(100.0, STEPS, 1.0) is profile


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (Written(tail=None), "has no tail"),
        (Written(density=lambda s: s * np.nan), "density is nan at s = 1e-07"),
        (Written(density=lambda s: np.where(s > 50, -1.0, 1.0)), "density is -1 at s = 50."),
        (Written(density=lambda _: 0.01), "shape (1146,) has shape ()"),
        (Written(density=lambda s: math.exp(s)), "density fails for an array of times: only "),
        (Written(tail=lambda s: np.full(s.shape, np.inf)), "tail is inf at s = -100"),
        (Written(tail=lambda s: 1 - s / 100), "tail is 2 at s = -100"),
        (Written(tail=lambda s: np.clip(0.5 - s / 200, 0, 0.5)), "0.5 of its mass lies before 0"),
        (Written(tail=lambda s: np.clip(1 - s / 200, 0, 1)), "0.5 of its mass lies after t = 100"),
        (Written(tail=lambda s: np.where(abs(s - 50) < 10, 1, np.clip(1 - s / 100, 0, 1))), "grows after s = 39.94140"),
        (Written(tail=lambda _: 1 / 0), "tail fails for an array of times: division by zero"),
    ],
)
def test_the_fault_of_a_given_profile_is_named(profile: object, words: str) -> None:
    with refused("profile given", words):
        as_target(profile).profile(100.0, STEPS, 1.0)


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "curve.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "time,density\n0,0\n50,1\n100,0.25",
        "\ufeff# a curve, drawn by hand\r\n\r\ntime, density\r\n 0 , 0\r\n50,1e0\r\n# the end:\r\n100,.25\r\n",
        "0,0\r50,4\r100,1\r",
        "\ufeff0,0\n50,4\n100,1\n",
    ],
)
def test_a_file_of_points_is_a_profile(tmp_path: Path, content: str) -> None:
    target = ProfileFile(written(tmp_path, content))
    assert (target.label, target.title, target.sigma_rel) == ("curve", "profile curve.csv", None)
    wanted, at = Tabulated((0, 50, 100), (0, 1, 0.25)), np.linspace(-1, 101, 50)
    found = target.profile(100.0, STEPS, 1.0)
    np.testing.assert_allclose(found.tail(at), wanted.tail(at), rtol=1e-14)
    np.testing.assert_allclose(found.density(at), wanted.density(at), rtol=1e-14)
    target.path.unlink()
    assert target.profile(200.0, STEPS, 1.0) is found  # it is read once


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e9), st.floats(1e-6, 1e9)), min_size=2, max_size=20, unique_by=lambda p: p[0])
)
def test_every_digit_of_a_file_counts(tmp_path_factory: pytest.TempPathFactory, points: list) -> None:
    points.sort()
    path = written(tmp_path_factory.mktemp("file"), "".join(f"{time!r},{value!r}\n" for time, value in points))
    assert ProfileFile(path).table.profile == Tabulated(*zip(*points, strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("time,density\n0,1\n", "holds 1 point;"),
        ("0,1\n\n# so\n5,1\n5,2\n", "line 5: time 5 after 5"),
        ("0,1\ninf,1\n", "line 2: time inf"),
        ("0,nan\n5,1\n", "line 1: density nan"),
        ("0,1e999\n5,1\n", "line 1: density inf"),
        ("time,density\n0,0\n\n5,0\n", "lines 2 to 4: its mass is 0"),
        ("0,1\n5\n", "line 2: 1 column in '5'"),
        ("time,density\nt,d\n0,1\n5,1\n", "line 2: 't,d' holds no two numbers"),
        ("0,1\n5,\n", "line 2: '5,' holds no two numbers"),
        ("0,1\n1,1\n150,0\n200,0\n", "line 3: time 150 puts mass outside the run"),
        (b"0,1\n5,\xff\n", "line 2: not a text file in UTF-8"),
        (b"\n0,1\n5,1\n\0\n\n\0", "line 4: not a text file in UTF-8"),
        ("0,1\n5,1\n".encode("utf-16"), "line 1: not a text file in UTF-8"),
        ("1,1\n2,1\n3,1\n4,1\n5,1\n6,1\n", "line 6: at most 5 lines"),
    ],
)
def test_a_file_that_is_no_profile_is_named_with_the_line(
    tmp_path: Path, content: str | bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(others, "MOST_LINES", 5)
    path = written(tmp_path, content)
    with refused("profile", f"{path}: {words}"):
        ProfileFile(path).profile(100.0, STEPS, 1.0)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    huge = tmp_path / "huge.csv"
    huge.touch()
    os.truncate(huge, others.MOST_BYTES + 1)  # sparse
    for path, words in ((Path("a\0b"), "cannot be read"), (huge, "larger than 100 MB")):
        with refused("profile", words):
            _ = ProfileFile(path).table


def test_a_decay_reads_its_tables(tmp_path: Path) -> None:
    shape, rates = tmp_path / "shape.csv", tmp_path / "lr.csv"
    shape.write_text("x,multiplier\n0,1\n0.5,0.25\n1,0\n")
    rates.write_text("time,rate\n0,3e-4\n100,3e-4\n")
    target = Decay(shape, 0.5, rates)
    assert (target.label, target.title) == ("decay-shape-0.5", "decay shape.csv over 50%, rates in lr.csv")
    assert target.profile(100.0, STEPS, 1.0).tail([0, 50, 75, 87.5, 100]) == pytest.approx([1, 1, 0.25, 0.125, 0])
    shape.write_text("0,1\n1,2\n")
    with refused("decay", "must start at 1 or below and never grow"):
        Decay(shape).profile(100.0, STEPS, 1.0)
    rates.write_text("0,1\n50,0\n100,0\n")
    with refused("decay", "the run's own rate falls faster"):
        Decay("linear", 1.0, rates).profile(100.0, STEPS, 1.0)
    rates.write_text("0,1,2\n")
    with refused("lr", "must be two, time,rate"):
        Decay("linear", 1.0, rates).profile(100.0, STEPS, 1.0)
    shape.write_text("80,1\n100,0\n")  # steps, where a part of the decay was due: it would be no decay at all
    with refused("decay", "x is from 80 to 100; must be the part of the decay, 0 to 1"):
        Decay(shape).profile(100.0, STEPS, 1.0)
    rates.write_text("0,1\n90,1\n")
    with refused("lr", "holds rates from t = 0 to 90; must cover the decay, 80 to 100"):
        Decay("linear", 0.2, rates).profile(100.0, STEPS, 1.0)
    rates.write_text("0,1\n99,1\n")  # the rate of the last step that was logged holds to the end
    assert Decay("linear", 0.2, rates).profile(100.0, STEPS, 1.0).tail(90) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_the_density_of_a_decay_is_the_slope_of_its_tail(shape: str) -> None:
    profile = EmulatedDecay(200.0, 1000.0, shape)
    s = np.linspace(300, 990, 24)
    slope = (profile.tail(s - 0.5) - profile.tail(s + 0.5)) / 1.0
    assert profile.density(s) == pytest.approx(slope, rel=1e-4)
    assert not profile.density([100.0, 1001.0]).any()


def test_the_mean_is_of_the_last_checkpoints() -> None:
    stored = [Point(30), PowerFunction(5.0, 40.0), Point(10), Point(20)]
    assert Mean(2).coefficients_of(["a", "b", "c", "d"], stored).tolist() == [0.5, 0, 0, 0.5]
    averages = [PowerFunction(5.0, 10.0), PowerFunction(5.0, 20.0)]
    assert Mean(1).coefficients_of(["a", "b"], averages).tolist() == [0, 1]
    with refused("mean", "only 3 are there"):
        Mean(4).coefficients_of(["a", "b", "c", "d"], stored)
    with refused("mean", "several averages of each time"):
        Mean(1).coefficients_of(["a", "b"], [PowerFunction(5.0, 10.0), PowerFunction(6.0, 10.0)])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a.safetensors;0.5", "line 1: must be name,coefficient"),
        ("# mine\na,0.5\nb,x", "line 3: must be name,coefficient"),
        ("a,0.5\nc,0.5", "line 2: 'c' is not there"),
        ("a,0.5\na,0.5", "line 2: 'a' is named twice"),
        ("a,0.5\nb,0.6", "their sum is 1.1; must be 1"),
        ("a,nan", "line 1: must be name,coefficient"),
        (b"\xff\xfe", "line 1: not a text file in UTF-8"),
    ],
)
def test_coefficients_that_cannot_be_used_are_named(tmp_path: Path, content: str | bytes, words: str) -> None:
    with refused("coefficients", words):
        Coefficients(written(tmp_path, content)).coefficients_of(["a", "b"], [Point(1), Point(2)])


def test_coefficients_are_taken_by_name(tmp_path: Path) -> None:
    target = Coefficients(written(tmp_path, "# mine\nname,coefficient\nb, 1.5\n\na,-0.5\n"))
    assert target.coefficients_of(["a", "b", "x,y"], [Point(1), Point(2), Point(3)]).tolist() == [-0.5, 1.5, 0]
    assert (target.label, target.title) == ("coefficients-curve", "coefficients in curve.csv")

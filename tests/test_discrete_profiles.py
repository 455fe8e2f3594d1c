"""Profiles of checkpoints and of averages over known times."""

import numpy as np
import pytest

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import Discrete, Point


def test_a_checkpoint_has_all_mass_at_its_time() -> None:
    point = Point(100)
    assert point.tail([0, 99.9, 100, 101]).tolist() == [1, 1, 0, 0]
    assert not point.density(np.linspace(0, 200, 9)).any()
    assert (point.t, point.t_first, point.jumps.tolist()) == (100.0, 1.0, [100.0])


def test_a_discrete_average_is_the_sum_that_it_names() -> None:
    rng = np.random.default_rng(0)
    masses = rng.dirichlet(np.ones(7))
    times = np.cumsum(rng.integers(1, 9, 7)).astype(float)
    path = rng.normal(size=60).cumsum()
    # By parts: theta(0) + sum over steps of tail(before the step) times the step's increment.
    increments = np.diff(path, prepend=0.0)
    profile = Discrete(times, masses, t=60)
    by_tail = profile.tail(np.arange(60)) @ increments
    assert by_tail == pytest.approx(masses @ path[times.astype(int) - 1], abs=1e-12)
    assert (profile.t, profile.t_first) == (60.0, times[0])
    assert profile.tail(-1) == profile.tail(0) == 1
    assert profile.tail(times[-1]) == 0


@pytest.mark.parametrize(
    ("times", "masses", "t"),
    [([], [], 0), ([1, 2], [1], 0), ([2, 1], [0.5, 0.5], 0), ([0, 1], [0.5, 0.5], 0), ([1, 2], [0.5, 0.6], 0),
     ([1, 2], [1.5, -0.5], 0), ([1, 2], [0.5, 0.5], 1.5), ([1, float("nan")], [0.5, 0.5], 0)],
)  # fmt: skip
def test_a_discrete_average_names_what_is_wrong(times: list[float], masses: list[float], t: float) -> None:
    with pytest.raises(InvalidValueError, match=r"^times and masses"):
        Discrete(times, masses, t)

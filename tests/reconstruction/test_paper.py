"""The published method against high-precision solutions of the same least-squares problem, and against quadrature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import flint
import numpy as np
import pytest
from checking import refused
from factories import power_functions
from scipy import integrate

from posthoc_cli.profiles import Point, PowerFunction
from posthoc_cli.reconstruction import reconstruct

T = 100_000.0
TARGETS = (0.01, 0.05, 0.07, 0.15, 0.20, 0.28)


def uniform_snapshots(count: int) -> list[PowerFunction]:
    return power_functions(np.linspace(0, T, count // 2 + 1)[1:], (0.05, 0.10))


def product(a: PowerFunction, b: PowerFunction) -> flint.arb:
    """The inner product of two power functions, from equation 151."""
    early, late = (a, b) if a.t <= b.t else (b, a)
    g, h, s, t = (flint.arb(x) for x in (early.gamma, late.gamma, early.t, late.t))
    return (g + 1) * (h + 1) / (g + h + 1) * (s / t) ** h / t


def distances_to_exact(count: int, sigma_rels: Sequence[float]) -> Iterator[tuple[float, float, float]]:
    """Yield the relative distance from the exact reconstruction, the stated error and the exact error, at 50 digits."""
    snapshots, targets = uniform_snapshots(count), power_functions(T, sigma_rels)
    ours = reconstruct(snapshots, targets, "paper")
    flint.ctx.dps = 60
    products = [[product(a, b) for b in (*snapshots, *targets)] for a in (*snapshots, *targets)]
    n, of_targets = len(snapshots), range(len(snapshots), len(products))
    matrix = flint.arb_mat(n, n, [products[i][j] for i in range(n) for j in range(n)])
    solution = matrix.solve(flint.arb_mat(n, len(targets), [products[i][j] for i in range(n) for j in of_targets]))
    root = lambda x: max(float(x.mid()), 0.0) ** 0.5  # noqa: E731
    for k, j in enumerate(of_targets):
        right = flint.arb_mat(n, 1, [products[i][j] for i in range(n)])
        total = sum((solution[i, k] for i in range(n)), flint.arb(0))
        exact = flint.arb_mat(n, 1, [solution[i, k] / total for i in range(n)])
        gap = flint.arb_mat(n, 1, [flint.arb(float(c)) for c in ours.coefficients[:, k]]) - exact
        norm2 = products[j][j]
        apart = (gap.transpose() * matrix * gap)[0, 0] / norm2
        error = ((exact.transpose() * matrix * exact)[0, 0] - 2 * (exact.transpose() * right)[0, 0] + norm2) / norm2
        yield root(apart), float(ours.profile_error[k]), root(error)


@pytest.mark.parametrize(("count", "sigma_rels", "near"), [(8, TARGETS, 1e-5), (128, (0.07, 0.28), 1e-5)])
def test_agrees_with_fifty_digits(count: int, sigma_rels: tuple[float, ...], near: float) -> None:
    for apart, stated, exact in distances_to_exact(count, sigma_rels):
        assert apart <= 1e-9
        assert stated == pytest.approx(exact, rel=near, abs=1e-7)


@pytest.mark.parametrize("target", power_functions((T, 1.05 * T), (0.15,)))
def test_the_stated_error_is_the_distance_of_the_profiles(target: PowerFunction) -> None:
    """The mass of the target after the last snapshot included, which no coefficients reach."""
    snapshots = uniform_snapshots(8)
    result = reconstruct(snapshots, [target], "paper")

    def squared(s: float) -> float:
        made = sum(c * float(p.density(s)) for c, p in zip(result.coefficients[:, 0], snapshots, strict=True))
        return (made - float(target.density(s))) ** 2

    parts = pairwise(sorted({0.0, target.t, *(p.t for p in snapshots)}))
    distance2 = sum(integrate.quad(squared, a, b, epsabs=0, epsrel=1e-9)[0] for a, b in parts)
    norm2 = integrate.quad(lambda s: float(target.density(s)) ** 2, 0, target.t)[0]
    assert result.profile_error[0] == pytest.approx((distance2 / norm2) ** 0.5, rel=1e-6)


def test_a_target_with_no_mass_within_reach_is_refused() -> None:
    """All of a very short average lies after the last snapshot: all combinations are equally far."""
    with refused("target", "none of its mass"):
        reconstruct(power_functions(1000.0), power_functions(1999.0, (0.0005,)), "paper")


def test_a_target_at_one_time_is_as_far_as_its_own_norm_from_any_density() -> None:
    result = reconstruct(power_functions(1000.0), [Point(1000.0)])
    assert result.profile_error[0] == 1.0
    assert np.isfinite(result.predicted_error).all()

"""The choice of the snapshots that a reconstruction uses if there are very many."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from snapshots.recorded import record

from posthoc_cli import Window, disk_sources, plan_synthesis, synthesize
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import MOST_SOLVED, Motion, assumed_prior, reconstruct, thinned_subset
from posthoc_cli.snapshots import prune, sources
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.prune import plan_pruning

SIGMA_RELS = (0.05, 0.28)


def pure(sigma_rel: float, t: float) -> PowerFunction:
    return PowerFunction.from_sigma_rel(sigma_rel, t)


def regular(count: int) -> list[PowerFunction]:
    """Return the profiles of snapshots of two widths at `count` times."""
    return [pure(s, float(t)) for t in range(1, count + 1) for s in SIGMA_RELS]


@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=60, unique=True), st.integers(1, 40), st.integers(1, 3))
@example([999999972.0, 999999973.0], 1, 1)
@settings(max_examples=60)
def test_the_choice_has_the_asked_number_and_the_newest_of_each_profile(
    times: list[float], most: int, profiles: int
) -> None:
    sigma_rels = (0.05, 0.28, 0.1)[:profiles]
    snapshots = [pure(s, t) for t in times for s in sigma_rels]
    found = thinned_subset(snapshots, most)
    assert found == sorted(set(found))
    assert len(found) <= max(most, profiles)
    for sigma_rel in sigma_rels:
        chosen = [snapshots[i].t for i in found if snapshots[i].gamma == pure(sigma_rel, 1.0).gamma]
        assert len(chosen) >= min(max(1, most // profiles), len(times))
        assert max(chosen) == max(times)


def test_the_choice_is_spread_evenly_back_from_the_newest() -> None:
    snapshots = [pure(0.05, float(t)) for t in range(1, 101)] + [pure(0.28, float(t)) for t in (50, 100)]
    found = thinned_subset(snapshots, 20)
    assert found[-1] == 101
    gaps = np.diff([snapshots[i].t for i in found[:-1]])
    assert snapshots[found[-2]].t == 100
    assert (len(gaps), {*gaps.tolist()}) == (18, {5.0, 6.0})
    assert len(thinned_subset(regular(50), 10, keep=20)) == 40  # `keep` of each profile, even beyond `most`
    assert len(thinned_subset(regular(MOST_SOLVED))) == MOST_SOLVED
    assert thinned_subset(regular(50), 100) == list(range(100))


@pytest.mark.parametrize(("rounding", "cooling"), [(2e-4, 2.0), (1.5e-3, 0.0)], ids=["float16", "bfloat16"])
def test_the_choice_loses_little(rounding: float, cooling: float) -> None:
    """With half of the snapshots no average loses much more than what rounding alone would cost, a root of 2."""
    snapshots, t = regular(150), 150.0
    edges = np.linspace(1, t, 33)
    walk = (1.02 - edges[1:] / t) ** cooling
    prior = assumed_prior(snapshots, rounding, Motion(edges, walk * 0.06 / t, np.zeros(32)))
    targets = [pure(s, t) for s in (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.28)]

    def errors(which: Iterable[int]) -> np.ndarray:
        chosen = sorted(which)
        return reconstruct([snapshots[i] for i in chosen], targets, prior=prior.of(chosen), t=t).predicted_error

    everything, found = errors(range(300)), errors(thinned_subset(snapshots, 150))
    assert (found / everything).max() < 1.7


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with snapshots at 40 times x 2 profiles."""
    return record(tmp_path_factory.mktemp("many") / "run", 200, scale=0.01, checkpoint_every=5)


@pytest.fixture
def _twenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let reconstructions use at most 20 snapshots."""
    for module in (sources, prune):
        monkeypatch.setattr(module, "thinned_subset", partial(thinned_subset, most=20))


def chosen_times(run: Path, t: float) -> list[float]:
    profiles = [s.profile for s in read_directory(run) if s.t <= t]
    return [profiles[i].t for i in thinned_subset(profiles, 20)]


@pytest.mark.usefixtures("_twenty")
def test_a_synthesis_uses_the_choice_up_to_its_time_whatever_its_targets(run: Path) -> None:
    sources = disk_sources(run)
    alone, company = (
        plan_synthesis(given, targets, 143.0)
        for given, targets in ((sources, [0.15]), (sources[::-1], [0.02, 0.15, Window(30)]))
    )
    for plan in (alone, company):
        assert (plan.solved, plan.available) == (20, 56)
        assert plan.choice == "20 of 56 snapshots up to t = 143, evenly in time"
        assert [source.t for source in plan.sources] == chosen_times(run, 143.0)
    one, other = dict(synthesize(alone))["0.weight"][0], dict(synthesize(company))["0.weight"][1]
    torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
    few = plan_synthesis(sources, [0.15], 50.0)
    assert (few.solved, few.available, few.choice) == (20, 20, None)


@pytest.mark.usefixtures("_twenty")
def test_pruning_first_deletes_what_no_reconstruction_uses_and_training_does_not_resume_from(run: Path) -> None:
    snapshots = read_directory(run)
    outside = [s.path for s in snapshots if s.t not in chosen_times(run, 200.0)]
    pruned = plan_pruning(snapshots, keep=3)
    assert {s.path for s in pruned.to_delete[:60]} == set(outside)
    assert len(pruned.kept) == 6
    kept = plan_pruning([s for s in snapshots if (s.t, s.sigma_rel) != (200.0, 0.28)], keep=1).kept
    assert {(s.t, s.sigma_rel) for s in kept} == {(200.0, 0.05), (195.0, 0.05), (195.0, 0.28)}

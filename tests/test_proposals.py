"""Proposals fit their budget and are better than even spacing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from checking import refused
from factories import expected_error
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc_cli.planning import Schedule, Task, judge, propose, relative_rounding
from posthoc_cli.planning.proposals import ITEM_BYTES
from posthoc_cli.reconstruction import Motion

TASK = Task(steps=40_000, parameters=10**6, max_bytes=40 * 10**6, sigma_range=(0.05, 0.28), max_error=0.0)
"""Room for 20 snapshots in half precision, and nothing but the least error is good enough."""


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_relative_rounding_is_that_of_rounded_numbers(dtype: str) -> None:
    values = 2.0 ** np.random.default_rng(0).uniform(0, 1, 100_000)  # one octave stands for all
    spacing = 2.0 ** (np.floor(np.log2(values)) - {"float16": 10, "bfloat16": 7, "float32": 23}[dtype])
    rounded = np.round(values / spacing) * spacing
    measured = np.linalg.norm(rounded - values) / np.linalg.norm(values)
    assert relative_rounding(dtype) == pytest.approx(measured, rel=0.05)


@given(
    steps=st.integers(1, 10**6),
    parameters=st.integers(1, 10**10),
    snapshots=st.integers(4, 40),
    dtype=st.sampled_from(["float16", "float32"]),
)
@settings(max_examples=6, deadline=None)
def test_proposals_are_within_the_budget(steps: int, parameters: int, snapshots: int, dtype: str) -> None:
    task = Task(steps, parameters, snapshots * parameters * ITEM_BYTES[dtype], dtype=dtype, sigma_rels=(0.05, 0.28))
    for proposal in propose(task):
        schedule = proposal.schedule
        most = schedule.kept + (schedule.kept < schedule.taken)  # one more before the thinning
        assert proposal.nbytes == 2 * most * parameters * ITEM_BYTES[dtype] <= task.max_bytes
        assert proposal.dtype == dtype
        assert schedule.checkpoint_every % proposal.update_every == 0
        assert 0 < proposal.last_step <= steps
    for max_bytes in (task.max_bytes, 10**20):
        for proposal in propose(replace(task, max_bytes=max_bytes)):  # disk is always bounded
            assert proposal.schedule.max_checkpoints == proposal.schedule.kept


@pytest.mark.parametrize(
    "motion", [None, Motion(np.array([0.0, 20_000.0, 40_000.0]), np.array([8e-6, 1e-7]), np.zeros(2))]
)
def test_the_first_proposal_is_better_than_even_spacing_for_the_same_budget(motion: Motion | None) -> None:
    task = replace(TASK, motion=motion)
    first = propose(task)[0]
    for rels in ((0.05,), (0.05, 0.10), (0.05, 0.28)):
        for dtype in ITEM_BYTES:
            count = task.max_bytes // (len(rels) * task.parameters * ITEM_BYTES[dtype])
            even = Schedule(rels, task.steps, -(-task.steps // count), None, task.rounding_of(dtype))
            assert first.errors.worst < judge(task, even, dtype).errors.worst


def test_the_alternatives_come_best_first_and_are_different() -> None:
    proposals = propose(TASK)
    worst = [proposal.errors.worst for proposal in proposals]
    assert worst == sorted(worst)
    assert {p.dtype for p in proposals} == set(ITEM_BYTES)
    assert {len(p.schedule.sigma_rels) for p in proposals} == {1, 2, 3}
    assert any(p.nbytes <= TASK.max_bytes / 2 for p in proposals)
    assert len({p.label for p in proposals}) == len(proposals) <= 7
    assert all(proposal.last_step == TASK.steps for proposal in proposals)  # where steps can be divided
    assert all(proposal.last_step > 0.98 * 39_989 for proposal in propose(replace(TASK, steps=39_989)))  # a prime
    assert propose(replace(TASK, rounding={"float16": 0.1, "bfloat16": 0.1}))[0].dtype == "float32"


def test_fixed_choices_are_kept() -> None:
    task = replace(TASK, sigma_rels=(0.1, 0.2), dtype="bfloat16", checkpoint_every=1000, max_checkpoints=5)
    (proposal,) = propose(task)
    assert proposal.schedule == Schedule((0.1, 0.2), 40_000, 1000, 5, relative_rounding("bfloat16"))
    assert proposal.dtype == "bfloat16"
    for name, value in (("checkpoint_every", 1000), ("max_checkpoints", 5), ("sigma_rels", (0.1, 0.2))):
        assert all(getattr(p.schedule, name) == value for p in propose(replace(TASK, dtype="float16", **{name: value})))


AMPLE = Task(steps=3_000, parameters=10**5, max_bytes=10**8)
"""Disk for 500 snapshots in half precision of a small network: far more than it needs."""


@pytest.mark.parametrize(("max_error", "dtype"), [(5e-4, None), (2e-3, "bfloat16")])
def test_the_first_proposal_is_good_enough_and_the_cheapest_of_those(max_error: float, dtype: str | None) -> None:
    first, *others = propose(replace(AMPLE, max_error=max_error, dtype=dtype))
    schedule, times = first.schedule, range(first.schedule.checkpoint_every, 3_001, first.schedule.checkpoint_every)
    assert first.errors.worst <= max_error
    for sigma_rel in (0.05, 0.07, 0.14, 0.2, 0.28):
        assert expected_error(sigma_rel, schedule.sigma_rels, times, schedule.rounding) <= max_error
    assert first.update_every == 10
    assert first.nbytes <= 0.1 * AMPLE.max_bytes
    assert schedule.taken >= 10  # a training that is killed has lost at most a tenth
    good = [p for p in others if p.errors.worst <= max_error]
    written = [p.schedule.taken * len(p.schedule.sigma_rels) * ITEM_BYTES[p.dtype] for p in (first, *good)]
    assert written == sorted(written)
    # Those that are not good enough come after, the best of them first.
    worst = [p.errors.worst for p in others if p not in good]
    assert others == [*good, *others[len(good) :]]
    assert worst == sorted(worst)


def test_a_smaller_error_takes_more_snapshots() -> None:
    fixed = replace(AMPLE, sigma_rels=(0.05, 0.28), dtype="float32")
    (coarse,), (fine,) = (propose(replace(fixed, max_error=error)) for error in (2e-3, 5e-5))
    assert fine.errors.worst <= 5e-5 < coarse.errors.worst <= 2e-3
    assert fine.schedule.taken > coarse.schedule.taken


def test_short_averages_are_updated_more_often() -> None:
    for steps, low, every in ((3_000, 0.05, 10), (500, 0.05, 2), (500, 0.2, 10), (20, 0.05, 1)):
        task = replace(AMPLE, steps=steps, sigma_range=(low, 0.28), checkpoint_every=20, dtype="float16")
        assert {p.update_every for p in propose(replace(task, sigma_rels=(low, 0.28)))} == {every}


@pytest.mark.parametrize(
    ("change", "subject"),
    [({"steps": 0}, "steps"), ({"max_bytes": 10**6}, "max_size"), ({"max_error": float("nan")}, "max_error")],
)
def test_an_impossible_task_is_refused(change: dict, subject: str) -> None:
    with refused(subject):
        replace(TASK, **change)

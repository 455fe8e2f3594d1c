"""Whether snapshots are of one run, and what is said where they are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import OTHER_RUN_ID, RUN_ID

from posthoc_cli.snapshots.directory import difference, missing_at_newest, pairs_to_compare
from posthoc_cli.snapshots.format import FileHeader, SnapshotInfo, TensorEntry, TrackedTensor, TrackingSchedule
from posthoc_cli.snapshots.reader import Snapshot

TENSORS = {"a": TrackedTensor("average", "F32"), "b": TrackedTensor("average", "F32")}


def snapshot(t: float = 10.0, shape: tuple[int, ...] = (2,), **fields: Any) -> Snapshot:
    """In memory alone."""
    info = replace(
        SnapshotInfo(RUN_ID, 0.05, 6.94, (0.05, 0.28), t, "steps", int(t), 1.0, 1.0, TrackingSchedule(), TENSORS),
        **fields,
    )
    entries = {name: TensorEntry("F16", shape, 0, 4) for name in info.tensors}
    return Snapshot(Path(f"{t:g}.safetensors"), FileHeader({}, entries, 8), info)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"sigma_rel": 0.28}, {"sigma_rels": (0.05,)}, {"sigma_rels": (0.05, 0.1, 0.28)}, {"segment": 1},
        {"segment": 1, "tensors": {"c": TrackedTensor("copy", "I64")}}, {"segment": 1, "shape": (3,)},
        {"segment": 1, "sigma_rels": (0.05,)},
    ],
)  # fmt: skip
def test_these_belong_together(fields: dict[str, Any]) -> None:
    assert difference(snapshot(), snapshot(20.0, **fields)) is None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"run_id": OTHER_RUN_ID}, f"different runs ({RUN_ID[:8]} and {OTHER_RUN_ID[:8]}); keep one run a directory"),
        ({"t_unit": "im\x1bages"}, "count time in 'steps' and 'im\\x1bages'"),
        ({"sigma_rels": (0.1, 0.28)}, "do not match: their runs track the profiles 0.05, 0.28 and 0.1, 0.28"),
        ({"tensors": {"a": TENSORS["a"]}}, "tensor 'b' is missing in 20.safetensors"),
        ({"tensors": {**TENSORS, "A": TENSORS["a"]}}, "tensor 'A' is missing in 10.safetensors"),
        ({"shape": (1, 2)}, "tensor 'a' has the shapes [2] and [1, 2]"),
        ({"tensors": {**TENSORS, "b": TrackedTensor("copy", "F16")}}, "tensor 'b' is average of F32 and copy of F16"),
        ({"aliases": {"c": "a"}}, "do not match: they tie different names together"),
    ],
)  # fmt: skip
def test_these_do_not_and_it_is_said_why(fields: dict[str, Any], told: str) -> None:
    found = difference(snapshot(), snapshot(20.0, **fields))
    assert found is not None
    assert told in found


@pytest.mark.parametrize(("segments", "times"), [((1, 0), (10, 20)), ((0, 1), (20, 10)), ((0, 1), (10, 10))])
def test_segments_follow_each_other_in_time(segments: tuple[int, int], times: tuple[int, int]) -> None:
    pair = [snapshot(float(t), segment=segment) for t, segment in zip(times, segments, strict=True)]
    found = difference(*pair)
    assert found == f"do not match: the segments {segments[0]} and {segments[1]} do not follow each other in time"


def test_each_is_compared_with_the_first_of_its_segment_and_segments_with_their_neighbours() -> None:
    own = [snapshot(float(t), segment=segment) for t, segment in enumerate((0, 0, 1, 1, 0, 1, 2), 1)]
    pairs = [(own.index(first), own.index(other)) for first, other in pairs_to_compare(own)]
    assert pairs == [(0, 1), (0, 2), (1, 2), (2, 3), (0, 4), (3, 4), (2, 5), (4, 5), (0, 6), (5, 6)]
    assert list(pairs_to_compare([])) == []


def test_a_profile_is_missing_at_the_newest_time_unless_the_run_went_on_without_it() -> None:
    early = [snapshot(10.0, sigma_rel=sigma_rel) for sigma_rel in (0.05, 0.28)]
    assert missing_at_newest([]) == missing_at_newest(early) == []
    assert missing_at_newest([*early, snapshot(20.0)]) == ["t = 20, the newest: no snapshot of sigma_rel 0.28"]
    assert missing_at_newest([*early, snapshot(20.0, sigma_rels=(0.05,))]) == []
    assert missing_at_newest([*early, snapshot(20.0, run_id=OTHER_RUN_ID)]) == []

"""Segments of a run: its averages between two changes of the tensors that it tracks.

Averages of different segments are of different tensors, or were begun at different times; they are never combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from posthoc_cli.snapshots.format import SnapshotInfo


class Described(Protocol):
    """Anything with a snapshot's header."""

    @property
    def info(self) -> SnapshotInfo:
        """What it says about itself."""
        ...


One = TypeVar("One", bound=Described)


def of_newest_segment(items: Sequence[One]) -> list[One]:
    """Those that belong with the newest."""
    newest = max((item.info.segment for item in items), default=0)
    return [item for item in items if item.info.segment == newest]


def of_segment_at(items: Sequence[One], t: float) -> list[One]:
    """Those that belong with the newest one up to the time `t`."""
    segment = max(item.info.segment for item in items if item.info.t <= t)
    return [item for item in items if item.info.segment == segment]


def by_segment(items: Sequence[One]) -> list[list[One]]:
    """All of them, a list a segment, the earliest first."""
    found: dict[int, list[One]] = {}
    for item in items:
        found.setdefault(item.info.segment, []).append(item)
    return [found[segment] for segment in sorted(found)]

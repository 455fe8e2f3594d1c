"""A synthesis divided into parts that share nothing: whole tensors each, chosen from headers alone.

Whoever divides the same plan into the same number of parts gets the same parts, on any machine, so that processes
that each make some of them never need to talk to each other.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.snapshots.format import ITEM_BYTES, SnapshotInfo
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.synthesis.sources import OpenSource, Source

MAX_PARTS = 99_999
"""As many as the five digits in the names of shards can tell apart."""

_T = TypeVar("_T")

_UNITS_A_PART = 64
"""Neighbours below this fraction of a part stay together, so that small tensors are read in runs."""


@dataclass(frozen=True)
class Part:
    """One of the parts of a job: the `number`-th of `of`, counted from 1.

    Raises:
        InvalidValueError: there is no such part.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.of <= MAX_PARTS:
            raise InvalidValueError("shard", f"the number of parts must be from 1 to {MAX_PARTS:,}", value=self)
        if not 1 <= self.number <= self.of:
            raise InvalidValueError("shard", f"there are only the parts 1/{self.of} to {self.of}/{self.of}", value=self)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def divide(plan: Plan, parts: int, written: Mapping[str, int]) -> list[list[str]]:
    """The stored tensors of each part, in the order of the newest snapshot's; a part may have none.

    Parts have nearly equal numbers of bytes to read and write: the largest tensors first, each to the part that has
    the least so far. A tensor is never cut, and goes to one part under all its names.

    Arguments:
        plan: what is to be made.
        parts: their number.
        written: bytes that each stored tensor takes in all outputs.
    """
    units = list(_units(_costs(plan, written), parts))
    loads = [(0, 0, part) for part in range(parts)]
    part_of: dict[str, int] = {}
    for cost, names in sorted(units, key=lambda unit: -unit[0]):
        load, count, part = heapq.heappop(loads)
        part_of |= dict.fromkeys(names, part)
        heapq.heappush(loads, (load + cost, count + len(names), part))
    result: list[list[str]] = [[] for _ in range(parts)]
    for name in plan.newest.info.tensors:
        result[part_of[name]].append(name)
    return result


def plan_of_part(plan: Plan, tensors: Sequence[str]) -> Plan:
    """The same plan for some of its stored tensors."""
    chosen = frozenset(tensors)
    return replace(plan, sources=tuple(PartialSource(source, chosen) for source in plan.sources))


@dataclass(frozen=True, eq=False)
class PartialSource:
    """Some tensors of a source, as a source."""

    whole: Source
    chosen: frozenset[str]

    @property
    def name(self) -> str:
        """That of the whole source."""
        return self.whole.name

    @cached_property
    def info(self) -> SnapshotInfo:
        """What the source says about itself, of the chosen tensors."""
        info = self.whole.info
        aliases = {alias: name for alias, name in info.aliases.items() if name in self.chosen}
        return replace(info, tensors=self._only(info.tensors), aliases=aliases)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the chosen tensors."""
        return self._only(self.whole.shapes)

    @cached_property
    def dtypes(self) -> Mapping[str, str]:
        """Dtypes that the chosen tensors are stored in."""
        return self._only(self.whole.dtypes)

    @property
    def nbytes(self) -> int:
        """Bytes that reading the chosen tensors takes."""
        return sum(math.prod(shape) * ITEM_BYTES[self.dtypes[name]] for name, shape in self.shapes.items())

    def open(self) -> OpenSource:
        """Start reading the source."""
        return self.whole.open()

    def _only(self, tensors: Mapping[str, _T]) -> dict[str, _T]:
        return {name: value for name, value in tensors.items() if name in self.chosen}


def _costs(plan: Plan, written: Mapping[str, int]) -> dict[str, int]:
    """Bytes that each tensor moves: read from all sources and written to all outputs."""
    shapes = plan.newest.shapes
    costs = {name: written[name] for name in plan.newest.info.tensors}
    for source in plan.sources:
        for name, dtype in source.dtypes.items():
            costs[name] += math.prod(shapes[name]) * ITEM_BYTES[dtype]
    return costs


def _units(costs: Mapping[str, int], parts: int) -> Iterator[tuple[int, list[str]]]:
    """Tensors that stay together, with what they cost: neighbours, as long as they are small together."""
    most = sum(costs.values()) / (_UNITS_A_PART * parts)
    total, names = 0, list[str]()
    for name, cost in costs.items():
        if names and total + cost > most:
            yield total, names
            total, names = 0, []
        total += cost
        names.append(name)
    if names:
        yield total, names

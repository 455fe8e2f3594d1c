"""What averages are made from: snapshots on disk, of one file or several parts, and any other stored averages.

What is known of several sources together is here, too: their order and their clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from posthoc_cli.errors import MismatchError
from posthoc_cli.profiles import Clock, Point, PowerFunction, StoredProfile
from posthoc_cli.reconstruction import thinned_subset
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.reading import BackingFile, ElementRange, TensorReader
from posthoc_cli.snapshots.tensor_file import opened_in_turn

if TYPE_CHECKING:
    import torch

_Info = TypeVar("_Info")


ReadRanges = Callable[[Sequence["ElementRange"]], Sequence["torch.Tensor"]]
"""Reads ranges of tensors in memory."""


class Source(Protocol):
    """A stored average: a snapshot or a checkpoint on disk, or a current average in memory."""

    @property
    def name(self) -> str:
        """The file's name, or a description of an average in memory."""

    @property
    def info(self) -> fmt.SourceInfo:
        """What is known of it beside its tensors."""

    @property
    def profile(self) -> StoredProfile:
        """What its averages are of: a power function, one checkpoint (`Point`), or known times (`Discrete`)."""

    @property
    def stored(self) -> Mapping[str, fmt.TensorEntry | fmt.TensorSpec]:
        """Dtype, shape and bytes of each stored tensor."""

    def open(self) -> AbstractContextManager[TensorReader | ReadRanges]:
        """Open it for reading, by any number of threads.

        Of an average in memory it is a function that gives ranges (`name`, `begin`, `end`) of its tensors, flat and on
        the host.
        """


@dataclass(frozen=True)
class Stored(Generic[_Info]):
    """A file, its header, and what it says about itself; or a folder of `parts`, as if they were one file."""

    path: Path
    header: fmt.FileHeader
    info: _Info
    parts: tuple[BackingFile, ...] = ()

    def open(self, boxes: Mapping[str, Box] | None = None) -> TensorReader:
        """Open it, or boxes of some tensors as if these were all; its files must be those whose headers were read."""
        parts = self.parts or (BackingFile(self.path, self.header),)
        return TensorReader(self.path, self.header, parts, boxes)


@dataclass(frozen=True, repr=False)
class FileSource(Stored[fmt.SourceInfo], ABC):
    """A snapshot on disk, or another program's checkpoint."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {len(self.stored)} tensors at t = {self.info.t:,.12g})"

    @property
    def name(self) -> str:
        """The file's or folder's name."""
        return self.path.name

    @property
    @abstractmethod
    def profile(self) -> StoredProfile:
        """What its averages are of."""

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that tell it from others: the checksum of its header."""
        return self.header.metadata["ema.checksum"]

    @property
    def stored(self) -> Mapping[str, fmt.TensorEntry]:
        """Dtype, shape and place of each stored tensor."""
        return self.header.tensors

    def cells(self, name: str) -> int:
        """The number of chunks that rows of a tensor go through; 0 where it is in one file."""
        boxes = [part.boxes[name] for part in self.parts if name in part.boxes and part.boxes[name].size]
        return len(boxes) // max(1, len({box.offset[:1] for box in boxes}))


class Snapshot(FileSource):
    """A snapshot on disk."""

    info: fmt.SnapshotInfo

    @property
    def profile(self) -> PowerFunction:
        """The power function that it holds."""
        return self.info.profile.pure


# --- several sources


@contextmanager
def all_open(sources: Sequence[Source]) -> Iterator[list[TensorReader | ReadRanges]]:
    """All sources, open for the block."""
    stored = [source for source in sources if isinstance(source, FileSource)]
    turn = opened_in_turn(part.path for one in stored for part in one.parts or (one,))
    with ExitStack() as stack:
        opened = []
        for source in sources:
            for _ in (source.parts or (source,)) if isinstance(source, FileSource) else ():
                next(turn)
            opened.append(stack.enter_context(source.open()))
        yield opened


_Source = TypeVar("_Source", bound=Source)


def by_time(items: Sequence[_Source]) -> list[_Source]:
    """By time, then sigma_rel, checkpoints last."""
    return sorted(items, key=_order)


def chosen_up_to(items: Sequence[_Source], t: float) -> tuple[list[_Source], list[_Source]]:
    """Snapshots to combine for time `t`, at or before it; and a choice of the later ones, for the motion.

    Both by time, then sigma_rel; of very many a limited number, see `thinned_subset`.
    """
    ordered = by_time(items)
    usable, later = [o for o in ordered if o.info.t <= t], [o for o in ordered if o.info.t > t]
    return _chosen(usable), _chosen(later)


def _chosen(items: Sequence[_Source]) -> list[_Source]:
    return [items[index] for index in thinned_subset([item.profile for item in items])]


def _order(source: Source) -> tuple[float, float, bool]:
    return source.info.t, source.info.sigma_rel, isinstance(source.profile, Point)


def run_clock(infos: Sequence[fmt.SourceInfo]) -> Clock:
    """The run's steps over its time, from all its snapshots' clocks; a MismatchError if two contradict each other."""
    pairs = sorted({pair for info in infos for pair in info.clock_pairs})
    for (step, t), (next_step, next_t) in pairwise(pairs):
        if step == next_step or t >= next_t:
            raise MismatchError(
                "the snapshots are not of one training",
                f"by their clocks step {step} was at t = {t:,.12g}, and step {next_step} at t = {next_t:,.12g}",
            )
    return Clock([step for step, _ in pairs], [t for _, t in pairs])


def counted(sources: Sequence[Source], count: int | None = None, there: int | None = None) -> str:
    """How many of which kind: "1 snapshot", "43 snapshots and checkpoints", or by numbers, "20 of 80 checkpoints"."""
    count = len(sources) if count is None else count
    there = count if there is None else there
    kinds = sorted({kind_of(source) for source in sources}, reverse=True)
    number = f"{count:,}" if count == there else f"{count:,} of {there:,}"
    return f"{number} {' and '.join(f'{kind}s' if there != 1 else kind for kind in kinds)}"


def kind_of(source: Source) -> str:
    """What it is called: "snapshot" or "checkpoint"."""
    return "checkpoint" if isinstance(source, FileSource) and not isinstance(source, Snapshot) else "snapshot"

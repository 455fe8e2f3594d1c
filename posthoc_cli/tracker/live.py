"""The running averages as they are at one moment, and as sources of a synthesis, beside the snapshots on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from posthoc_cli.dtypes import EPS
from posthoc_cli.planning import Candidate, Schedule, error_curve
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.reconstruction import ROUNDING
from posthoc_cli.snapshots.directory import StoredSnapshot, find_snapshots, newest_before
from posthoc_cli.snapshots.format import SnapshotInfo, TensorSpec, of_newest_segment
from posthoc_cli.snapshots.measurements import chosen_up_to
from posthoc_cli.snapshots.tensors import stored_name
from posthoc_cli.synthesis.sources import DiskSource, Source, source_prior
from posthoc_cli.tracker.averages import Accumulators, RunningAverages, Standing
from posthoc_cli.tracker.layout import FlatTensors, Layout, on_host
from posthoc_cli.tracker.measuring import measure_live
from posthoc_cli.tracker.model_tensors import TrackedModel
from posthoc_cli.tracker.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step, t: the last call and its time; 0 before the first.
        clock: of all calls.
        own_clock: whether the calls pass a time; None while that is not known.
        updated: the last call at which an update was due; 0 before.
    """

    step: int = 0
    t: float = 0.0
    clock: ClockRecorder = field(default_factory=ClockRecorder)
    own_clock: bool | None = None
    updated: int = 0

    def after(self, t: float, own_clock: bool, is_update: bool) -> Progress:
        """That with one call more."""
        step = self.step + 1
        return Progress(step, t, self.clock.add(step, t), own_clock, step if is_update else self.updated)


@dataclass(frozen=True)
class Tracking:
    """What a tracker has; all of it changes in one assignment, so that the parts always belong together.

    Attributes:
        run_id: of its run.
        progress: with which the averages are as they are.
        tracked: what they are of.
        averages: the running ones.
        resumes: whether they are still to be loaded from the directory.
    """

    run_id: str
    progress: Progress
    tracked: TrackedModel
    averages: RunningAverages
    resumes: bool = False


class Values:
    """Averages on the host, one set of tensors a profile, in memory that the system has really given."""

    def __init__(self, layout: Layout, profiles: int, pinned: bool = False) -> None:
        self.layout = layout
        self.tensors = tuple(FlatTensors(layout, wide=True, pinned=pinned) for _ in range(profiles))
        for tensors in self.tensors:
            tensors.zero_()

    def fits(self, kept: Accumulators | None) -> bool:
        """Whether this is room for averages."""
        return kept is not None and self.layout == on_host(kept.layout) and len(self.tensors) == len(kept.totals)


Room = TypeVar("Room", Values, Accumulators)


@dataclass(frozen=True)
class Reading(Generic[Room]):
    """The averages as they were after one update.

    Attributes:
        tracking: what belonged to them; its own averages go on.
        standing: all of them that is no tensor.
        room: their tensors, on the host; None before the first update.
        copies: name -> tensor as it was, on the host.
    """

    tracking: Tracking
    standing: Standing
    room: Room | None
    copies: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, tracking: Tracking, room: Room | None, copies: Mapping[str, torch.Tensor]) -> Reading[Room]:
        """A reading of what there is now."""
        return cls(tracking, tracking.averages.standing, room, copies)


@dataclass(frozen=True)
class LiveSource:
    """One running average, with the copies that belong to it. Reading it copies the copies only."""

    info: SnapshotInfo
    averages: Mapping[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor]

    @property
    def name(self) -> str:
        """A word for it, where a snapshot has a file name."""
        return f"live average of sigma_rel {self.info.sigma_rel:g}"

    @cached_property
    def stored(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of its tensors."""
        tensors = {**self.averages, **self.copies}
        return {n: TensorSpec(n, stored_name(tensor.dtype), tuple(tensor.shape)) for n, tensor in tensors.items()}

    def open(self) -> AbstractContextManager[Mapping[str, torch.Tensor]]:
        """Its tensors."""
        return nullcontext({**self.averages, **self.copies})


def live_sources(settings: Settings, reading: Reading[Values], off_schedule: bool = False) -> list[LiveSource]:
    """The running averages, each with the header that its snapshot would have; none before the first update."""
    if reading.room is None:
        return []
    tracking, standing = reading.tracking, reading.standing
    tracked, averages = tracking.tracked, tracking.averages
    knots = tracking.progress.clock.knots_until(standing.step, standing.t)
    sources = []
    for index, (sigma_rel, gamma) in enumerate(zip(averages.sigma_rels, averages.gammas, strict=True)):
        info = SnapshotInfo(
            run_id=tracking.run_id,
            sigma_rel=sigma_rel,
            gamma=gamma,
            sigma_rels=averages.sigma_rels,
            t=standing.t,
            t_unit=settings.t_unit,
            step=standing.step,
            clock=knots,
            t_first=standing.t_first,
            max_interval=standing.max_interval,
            schedule=settings.schedule,
            tensors=tracked.tensors,
            aliases=tracked.aliases,
            left_out=tracked.left_out,
            selection=settings.selection,
            segment=tracked.segment,
            updates=standing.updates,
            inherited=standing.inherited[index],
            off_schedule=off_schedule,
        )
        sources.append(LiveSource(info, reading.room.tensors[index].views, reading.copies))
    return sources


def current_sources(directory: Path, run_id: str, live: Sequence[LiveSource]) -> list[Source]:
    """Snapshots of a run on disk and, where they are newer, its live averages, measured; none of them twice."""
    snapshots = find_snapshots(directory)
    if snapshots and snapshots[0].info.run_id != run_id:
        snapshots = []
    own = {source.info.segment for source in live}
    alike = [StoredSnapshot.of(snapshot) for snapshot in snapshots if snapshot.info.segment in own]
    sources: list[Source] = list(_measured(live, alike))
    now = live[0].info.t if live else max((snapshot.info.t for snapshot in snapshots), default=0.0)
    held = {source.info.sigma_rel for source in live}
    for snapshot in snapshots:
        info = snapshot.info
        if info.t < now or (info.t == now and info.sigma_rel not in held):
            sources.append(DiskSource(snapshot))
    return sources


def _measured(live: Sequence[LiveSource], stored: Sequence[StoredSnapshot]) -> list[LiveSource]:
    """The same sources, each with its measurements, as a snapshot has them: the earlier ones are read from disk.

    One that was stored just now has what was measured then.
    """
    if not live:
        return []
    known = {(snapshot.t, snapshot.sigma_rel): snapshot.info.measurements for snapshot in stored}
    found = [known.get((source.info.t, source.info.sigma_rel)) for source in live]
    if None in found:
        infos = [source.info for source in live]
        found = measure_live(infos, [source.averages for source in live], newest_before(infos[0], stored))
    return [
        replace(source, info=replace(source.info, measurements=measured and replace(measured, rounding=0.0)))
        for source, measured in zip(live, found, strict=True)
    ]


def reconstruction_figure(
    sources: Sequence[Source], settings: Settings, sigma_range: tuple[float, float], method: str | None
) -> Figure:
    """Reconstruction error of the sources; of the planned schedule, where there are none."""
    from posthoc_cli import plots

    sources = of_newest_segment(sources)
    if sources:
        last = max(source.info.t for source in sources)
        chosen, _ = chosen_up_to(sources, last)
        counted = f"{len(chosen):,} of {len(sources):,}" if len(chosen) < len(sources) else f"{len(sources):,}"
        label = f"{counted} averages up to t = {last:,.12g}"
        profiles = [source.info.profile.pure for source in chosen]
        candidate = Candidate.of_run(label, profiles, source_prior(chosen), settings.t_unit)
    else:
        every = settings.schedule.checkpoint_every
        count = settings.schedule.max_checkpoints or 20
        rounding = ROUNDING * EPS[settings.schedule.checkpoint_dtype or "F32"]
        schedule = Schedule(settings.sigma_rels, count * every, every, count, rounding)
        candidate = Candidate.of_schedule(schedule)
    curve = error_curve(candidate, sigma_range, method=method)
    return plots.error_figure([curve], profile_error=method == "paper")

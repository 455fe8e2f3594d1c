"""Directories of snapshots and schedules not yet run, side by side: how exactly they make any target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning import EVENLY, Candidate, ErrorCurve, ProfileFit, Schedule, error_curve, profile_fit
from posthoc_cli.profiles import Clock
from posthoc_cli.reconstruction import Motion
from posthoc_cli.snapshots.format import SnapshotInfo, of_newest_segment
from posthoc_cli.snapshots.measurements import chosen_up_to, run_clock
from posthoc_cli.synthesis.sources import Source, disk_sources, source_prior
from posthoc_cli.targets import Target


@dataclass(frozen=True)
class Judged:
    """Snapshots, and what a target needs to know of their run.

    Attributes:
        candidate: the snapshots.
        clock: the run's steps over time.
        t_first: time of the first update.
    """

    candidate: Candidate
    clock: Clock
    t_first: float

    @classmethod
    def of_directory(cls, directory: Path, t: float | None = None) -> Judged:
        """What a tracker wrote since the model's tensors changed last.

        Reads a sample of the tensors where headers have no measurements. Of more snapshots than a solve can take those
        are chosen that a synthesis at `t` works with; by default at the time of the last one. Where they are too few to
        tell how the network moved, it is taken to move evenly, as in a schedule.

        Raises:
            InvalidValueError: `t` is not between the first snapshot and the last.
            others: as `read_directory`.
        """
        sources = of_newest_segment(disk_sources(files.expanded(directory)))
        infos = [source.info for source in sources]
        usable, later = chosen_up_to(sources, _checked_time(t, [info.t for info in infos]))
        profiles = [source.info.profile.pure for source in (*usable, *later)]
        label = f"{directory}: {_counted(usable, infos)} {infos[0].t_unit}"
        candidate = Candidate.of_run(label, profiles, source_prior([*usable, *later]), infos[0].t_unit)
        return cls(candidate, run_clock(infos), min(info.t_first for info in infos))

    @classmethod
    def of_schedule(cls, schedule: Schedule, motion: Motion | None = None, assumption: str = EVENLY) -> Judged:
        """What a tracker will write, that updates from the first step on; see `Candidate.of_schedule`."""
        return cls(Candidate.of_schedule(schedule, motion, assumption), Clock.of_steps(), 1.0)

    def curve(
        self, sigma_range: tuple[float, float], others: Sequence[Target], t: float | None, method: str | None
    ) -> ErrorCurve:
        """Errors over a range of sigma_rel, and those of other targets; see `error_curve`."""
        at = self._time(t)
        profiles = [(target.title, target.profile(at, self.clock, self.t_first)) for target in others]
        return error_curve(self.candidate, sigma_range, t=at, method=method, others=profiles)

    def fit(self, target: Target, t: float | None, method: str | None) -> ProfileFit:
        """One target over training time, and what the snapshots make of it."""
        at = self._time(t)
        profile = target.profile(at, self.clock, self.t_first)
        return profile_fit(self.candidate, target.title, profile, at, method=method)

    def _time(self, t: float | None) -> float:
        return _checked_time(t, [profile.t for profile in self.candidate.snapshots])


def _checked_time(t: float | None, times: Sequence[float]) -> float:
    """A time that snapshots of these times reach; the last one for None."""
    if t is None:
        return max(times)
    if not min(times) <= t <= max(times):
        raise InvalidValueError(
            "t",
            f"must lie between the first snapshot, {min(times):,.12g}, and the last, {max(times):,.12g}",
            value=f"{t:.12g}",
        )
    return t


def _counted(usable: Sequence[Source], infos: Sequence[SnapshotInfo]) -> str:
    """How many snapshots there are; up to the time, where only some of those are worked with."""
    count, last = len(infos), max(info.t for info in infos)
    there = sum(info.t <= usable[-1].info.t for info in infos)
    if len(usable) < there:
        return f"{len(usable):,} of {there:,} snapshots up to {usable[-1].info.t:,.12g}"
    return f"{count:,} snapshot{'s' * (count != 1)} up to {last:,.12g}"

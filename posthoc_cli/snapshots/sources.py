"""The sources of a run, as they were read once: what they show together, and what is done with them
while a training removes some."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, overload

import numpy as np
import xxhash

from posthoc_cli.errors import (
    InvalidValueError,
    MismatchError,
    VanishedError,
    at_most_one,
    check_number,
    count_noun,
)
from posthoc_cli.files import Look
from posthoc_cli.planning import check_within
from posthoc_cli.profiles import PowerFunction, StoredProfile
from posthoc_cli.reconstruction import (
    MEASURED,
    SAMPLED,
    Prior,
    Solver,
    StoredAverage,
    choose_evenly,
    measured_prior,
)
from posthoc_cli.run_clock import Clock, EpochClock
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.sampling import sample_values
from posthoc_cli.snapshots.source import PathSketch, Source, by_time
from posthoc_cli.snapshots.tensorfile import KeptOpen, TensorFile
from posthoc_cli.targets import Mean

log = logging.getLogger(__name__)


class _KnownPrior(NamedTuple):
    """A prior, and what its sample shows that speaks against one training."""

    prior: Prior
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False, eq=False)
class Sources(Sequence[Source]):
    """What a run is, as it was read once: its sources by time, and what they show together.

    Facts are of all its sources, whichever of them an average is made of. Only `again` looks at the
    place a second time, and only `prior` reads values, of the same sources once.
    """

    place: Path  # as given: a folder, a file, a glob, a URL or an import
    items: tuple[Source, ...]  # by time, sigma_rel, checkpoints last
    # reads the place again; without it there is nothing but these items
    read: Callable[[], Sources] | None = None
    look: Look = field(default_factory=Look)  # what lay at the place
    settings: Mapping[str, Any] = field(default_factory=dict)  # of an import, given or found
    numbers: str = ""  # what the numbers of files are taken for
    notes: tuple[str, ...] = ()  # what is not used, or left out
    notices: tuple[str, ...] = ()  # what is not used, as is meant
    findings: tuple[str, ...] = ()  # what other programs' files hold, and how decays were found
    _priors: dict[tuple[int, ...], _KnownPrior] = field(default_factory=dict)
    _solvers: dict[tuple[Any, ...], Solver] = field(default_factory=dict)  # the last one

    @classmethod
    def of(cls, items: Iterable[Source], place: Path | None = None) -> Sources:
        """Make sources of some items alone, such as a part of a run."""
        ordered = tuple(by_time(items))
        return cls(ordered[0].path.parent if place is None else place, ordered)

    def __repr__(self) -> str:
        return f"Sources({count_sources(self)} up to {self.t:,.12g} {self.t_unit})"

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Source, ...]: ...
    def __getitem__(self, index: int | slice) -> Source | tuple[Source, ...]:
        return self.items[index]

    def __eq__(self, other: object) -> bool:
        return self.items == other.items if isinstance(other, Sources) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    # --- facts of all

    @property
    def newest(self) -> Source:
        return self.items[-1]

    @property
    def t(self) -> float:
        return self.newest.t

    @property
    def step(self) -> int:
        return self.newest.step

    @property
    def t_unit(self) -> str:
        return self.newest.t_unit

    @property
    def run_id(self) -> str:
        return self.newest.run_id

    @cached_property
    def times(self) -> tuple[float, ...]:
        """The times of the sources, each once, ascending."""
        return tuple(sorted({source.t for source in self.items}))

    @cached_property
    def t_first(self) -> float:
        """The earliest time that has mass in averages of the run."""
        return min(source.t_first for source in self.items)

    @cached_property
    def clock(self) -> Clock:
        """The run's clock from the steps and times of all sources; a MismatchError if two
        contradict each other."""
        return _make_clock(self.items)

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """The sigma_rel of each tracked profile, ascending."""
        widths = set()
        for source in self.items:
            if isinstance(source.profile, PowerFunction):
                widths.add(source.sigma_rel)
        return tuple(sorted(widths))

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """The dtype and shape of every tensor of an average, under all its names."""
        newest = self.newest
        names = {name: name for name in newest.tensors} | newest.aliases
        entries = {}
        for alias, name in names.items():
            entries[alias] = Entry(newest.tensors[name].dtype, newest.entries[name].shape)
        return entries

    @cached_property
    def identity(self) -> str:
        """16 hexadecimal digits that identify the names and the content of all sources."""
        known = [(source.name, source.identity) for source in self.items]
        return xxhash.xxh3_64_hexdigest(repr(known).encode())

    def time(self, t: float | None, step: int | None = None) -> float:
        """Find the training time of averages at `t`, or at `step`, by default of the newest source;
        raise an InvalidValueError if the sources do not surround it."""
        at_most_one(t=t, step=step)
        if t is not None:
            return check_within("t", t, self.times)
        if step is None:
            return self.t
        if self.t_unit == "epochs":
            reason = "does not apply: the numbers of these checkpoints are epochs"
            raise InvalidValueError("step", reason, "give t in epochs", value=step)
        time_at = {source.step: source.t for source in self.items}
        check_within("step", step, time_at.keys())
        check_number("step", step, float.is_integer, "be a whole number")
        if step in time_at:
            return time_at[step]
        if all(t == known for known, t in time_at.items()):
            return float(step)
        before = max(known for known in time_at if known < step)
        after = min(known for known in time_at if known > step)
        reason = f"lies between the snapshots at {before:,} and {after:,}"
        hint = f"take one of them, or give t in {self.t_unit}"
        raise InvalidValueError("step", reason, hint, value=step)

    # --- what a solve takes

    def choose(self, t: float, means: Sequence[Mean] = ()) -> Choice:
        """Choose the sources that a solve at `t` takes, an even choice of very many; also those
        that the coefficients of means refer to."""
        split = sum(source.t <= t for source in self.items)
        profiles = [source.profile for source in self.items]
        usable = {*choose_evenly(profiles[:split])}
        for mean in means:
            usable.update(np.flatnonzero(mean.compute_coefficients(profiles[:split])).tolist())
        later = [split + index for index in choose_evenly(profiles[split:])]
        available = count_files(self.items[:split])
        return Choice(self, t, tuple(sorted(usable)), tuple(later), available)

    def prior(self, indices: Sequence[int] | None = None) -> Prior:
        """Make the prior of some sources, or of all, from headers or a sample of values."""
        key = tuple(range(len(self.items)) if indices is None else indices)
        if key not in self._priors:
            self._priors[key] = _make_prior([self.items[index] for index in key])
        return self._priors[key].prior

    def solver(self, choice: Choice, method: str) -> Solver:
        """Make the solver of a choice; the last one is kept, as a search asks for many targets."""
        key = choice.usable, choice.later, choice.t, method
        solver = self._solvers.get(key)
        if solver is None:
            solver = Solver(choice.profiles, choice.prior, choice.t, method)
            self._solvers.clear()
            self._solvers[key] = solver
        return solver

    @property
    def doubts(self) -> tuple[str, ...]:
        """What the values that priors were made from say against the files being of one run."""
        doubts = dict[str, None]()
        for known in self._priors.values():
            doubts.update(dict.fromkeys(known.doubts))
        return (*doubts,)

    # --- the place

    @property
    def files(self) -> list[TensorFile]:
        """The files of all sources, each once."""
        by_handle = {}
        for source in self.items:
            for file in source.files:
                by_handle[id(file.handle)] = file
        return [*by_handle.values()]

    def again(self) -> Sources:
        """Read the place again."""
        return self if self.read is None else self.read()


@dataclass(frozen=True)
class Choice:
    """The sources that a solve at `t` takes, by their indices: those to combine, at or before `t`,
    and later ones, which show the motion, too."""

    sources: Sources
    t: float
    usable: tuple[int, ...]
    later: tuple[int, ...]
    available: int  # number of all snapshots or checkpoints at or before `t`

    @property
    def usable_sources(self) -> list[Source]:
        return [self.sources[index] for index in self.usable]

    @property
    def profiles(self) -> list[StoredProfile]:
        """The profiles of the sources to combine."""
        return [source.profile for source in self.usable_sources]

    @property
    def known_profiles(self) -> list[StoredProfile]:
        """The profiles of all chosen sources."""
        return [self.sources[index].profile for index in (*self.usable, *self.later)]

    @property
    def known_prior(self) -> Prior:
        """The prior of all chosen sources."""
        return self.sources.prior((*self.usable, *self.later))

    @property
    def prior(self) -> Prior:
        """The prior of the sources to combine."""
        return self.known_prior.subset(range(len(self.usable)))


def count_sources(
    sources: Sequence[Source],
    count: int | None = None,
    total: int | None = None,
) -> str:
    """Name the number and kind of sources: "1 snapshot", or of more of them "20 of 80 checkpoints".
    `count` is their number, as `count_files` finds it, if they are others than `sources`."""
    if count is None:
        count = count_files(sources)
    if total is None:
        total = count
    sources_in_all = count_noun(total, sources[0].word)
    return sources_in_all if count == total else f"{count:,} of {sources_in_all}"


def count_files(sources: Iterable[Source]) -> int:
    """Count snapshots or checkpoints; one that holds weights and an average is one."""
    return len({source.path for source in sources})


def announce(sources: Sources) -> None:
    """Log what is to be known of sources before something is made of them: what was found in other
    programs' files as notices, and what is not used as warnings."""
    if sources.findings:
        log.info("%s: %s", sources.place, "; ".join(sources.findings))
    for text in sources.notices:
        log.info("%s: %s", sources.place, text)
    for text in sources.notes:
        log.warning("%s: %s", sources.place, text)


def announce_doubts(sources: Sources) -> None:
    """Log what the values that were read say against the files being of one run."""
    for text in sources.doubts:
        log.warning("%s: %s", sources.place, text)


# --- the clock and the prior


def _make_clock(sources: Sequence[Source]) -> Clock:
    pairs = sorted({(source.step, source.t) for source in sources})
    for (step, t), (next_step, next_t) in pairwise(pairs):
        if step == next_step or t >= next_t:
            pair = f"step {step} was at t = {t:,.12g}, and step {next_step} at t = {next_t:,.12g}"
            raise MismatchError("the snapshots are not of one training", pair)
    is_of_epochs = any(source.t_unit == "epochs" for source in sources)
    kind = EpochClock if is_of_epochs else Clock
    steps = [step for step, _ in pairs]
    times = [t for _, t in pairs]
    return kind(steps, times)


def _make_prior(sources: Sequence[Source]) -> _KnownPrior:
    """Make the prior: the motion of the network and the rounding of each source, in their order.

    If the header of a file has no measurements, or the newest one no sketch, the measurements of
    all files are estimated from a sample.
    """
    on_disk = [source for source in sources if source.files]
    averages = _make_averages(sources)
    path = _newest_path(sources)
    sketch = None if path is None else path.sketch
    unmeasured = [source for source in on_disk if source.measurements is None]
    if sketch is not None and not unmeasured:
        return _KnownPrior(measured_prior(averages, sketch))
    sample = sample_values(on_disk)
    sampled = iter(sample.measure_sources(on_disk))
    for index, source in enumerate(sources):
        if source.files:
            measured = next(sampled)
            averages[index] = replace(averages[index], measurements=measured)
    prior = measured_prior(averages, sketch)
    if prior.evidence == MEASURED:
        prior = replace(prior, evidence=SAMPLED)
    return _KnownPrior(prior, tuple(sample.doubts))


def _newest_path(sources: Sequence[Source]) -> PathSketch | None:
    """Find the sketched path at the newest time: earlier sketches show a part of it."""
    last = max((source.t for source in sources), default=0.0)
    for source in sources:
        if source.t == last and (path := source.path_sketch):
            return path
    return None


def _make_averages(sources: Sequence[Source]) -> list[StoredAverage]:
    """Describe the averages of one run for a reconstruction, with the clock of all of them."""
    averages = [source.stored_average() for source in sources]
    if all(source.t == source.step for source in sources):
        return averages
    clock = _make_clock(sources)
    if isinstance(clock, EpochClock):
        return averages
    for index, average in enumerate(averages):
        if average.steps:
            steps = replace(average.steps, clock=clock)
            averages[index] = replace(average, steps=steps)
    return averages


# --- sources that vanish


R = TypeVar("R", bound="Readable")


class Readable(Protocol):
    """What was read at a place, and may be read again."""

    @property
    def identity(self) -> str: ...

    @property
    def files(self) -> Iterable[TensorFile]: ...

    def again(self: R) -> R: ...


T = TypeVar("T")

ATTEMPTS = 100  # largest number of plans; no training removes a snapshot after every one of them


def use(sources: R, work: Callable[[R], T], renew: Callable[[R], object] = lambda _: None) -> T:
    """Return `work(sources)`; if sources vanish before they are opened, read them again.

    Readers take no lock, so a tracker may thin away snapshots that were read. Open files stay
    readable when they are removed, and all are opened before they are used. `work` must leave
    nothing when it raises an error. `renew` is called with what was read again; if that is the
    same, the error is raised: nothing was thinned. While `work` goes on, what it opens stays open.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            with KeptOpen() as kept:
                for file in sources.files:
                    kept.keep(file)
                return work(sources)
        except VanishedError as error:
            newer = sources.again()
            if newer.identity == sources.identity:
                raise
            log.warning("%s; planning again with the snapshots that remain", error)
            renew(newer)
            sources = newer
    return work(sources)

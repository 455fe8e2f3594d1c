"""A sweep by a user's command: one search after another, each candidate measured in a process of its own."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, LockedError, OutputExistsError
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.run import Run
from posthoc_cli.snapshots.lock import HOLDER_NAME, LOCK_NAME, DirectoryLock
from posthoc_cli.sweep import search
from posthoc_cli.sweep.metrics import Metric
from posthoc_cli.sweep.processes import Evaluation, end_leftovers, run_all
from posthoc_cli.sweep.results import RAW, RESULT, TRIALS, Record, Records, Refinement, SweepReport
from posthoc_cli.sweep.rounds import TIME, Axis, check_counts, explore, good_range
from posthoc_cli.synthesis.plan import check_groups
from posthoc_cli.targets import Groups, SigmaRel, Target

if TYPE_CHECKING:
    import torch

    from posthoc_cli.sweep.candidates import Candidates

LENGTH, GUIDE, _GROUP = "length", "guide", "group "
"""What is searched, beside the time: the length, the length of a second network's average; that of a group's glob."""
_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|weights:guide|sigma_rel:guide|seed|dir)\}")
_SCRATCH, _LOGS, _KEPT = ".scratch", "logs", "weights"
_TURNS = 3
"""Searches of one thing at most, each with the others as they were found before."""

Say = Callable[[Record], None]
"""Told of every trial as it ends."""


@dataclass(frozen=True)
class Sweep:
    """A request for the best length by a user's command.

    Attributes:
        run: the snapshots.
        command: with `{weights}`, and if wanted `{sigma_rel}`, `{seed}`, `{dir}`; with a guide `{weights:guide}`.
        metric: where the command says it.
        out: folder for the records, logs and the best average.
        axis: the length; by default sigma_rel where the predicted error is below 1 %.
        minimize: whether lower is better.
        repeats: trials of each length, with the seeds 0, 1, ...
        budget: lengths to measure at most, in each search.
        jobs: trials at a time.
        devices: given out as CUDA_VISIBLE_DEVICES.
        timeout: seconds that a trial may take.
        disk: bytes of averages at a time, None for all of a round.
        raw: a file of raw weights to compare with.
        groups: globs on tensors' names, whose lengths are searched one after another when that of all is found.
        times: times of the average; a range or list is searched when the length is found.
        guide: snapshots of a second network, or the same ones for a second length.
        guide_axis: its length, a sigma_rel; by default where the predicted error is below 1 %.
        step, method, dtype, layout, like, component: as in `Run.write`.
        keep: leave the averages in the folder `weights`, for other metrics.
        again: the command line that asks for this.
        progress: opens a progress bar.
        say: called with a line about every trial.
    """

    run: Run
    command: str
    metric: Metric
    out: Path
    axis: Axis | None = None
    minimize: bool = True
    repeats: int = 1
    budget: int = 20
    jobs: int = 1
    devices: tuple[str, ...] = ()
    timeout: float | None = None
    disk: int | None = None
    raw: Path | None = None
    groups: tuple[str, ...] = ()
    times: Axis | None = None
    guide: Run | None = None
    guide_axis: Axis | None = None
    step: int | None = None
    method: str | None = None
    dtype: torch.dtype | str | None = None
    layout: str | None = None
    like: Path | None = None
    component: str | None = None
    keep: bool = False
    again: str = ""
    progress: ProgressBar = no_bar
    say: Say = lambda _: None

    def run_all(self) -> SweepReport:
        """Do it. A call that was stopped is continued by the next one like it.

        Raises:
            InvalidValueError: an argument cannot be used.
            LockedError: another sweep works in this folder.
            PostHocError: too few trials have succeeded.
        """
        words = self._checked_words()
        any_target = SigmaRel(0.2) if self.axis is None else self.axis.target(self.axis.high)
        times = self.times
        main = self._candidates(self.run, any_target, None if times is None else times.high, self.step)
        t = main.plan.t
        times = times or Axis.of_values(TIME, [t])
        if self.times is not None:
            self.run.plan(any_target, t=times.low)  # checks it
        axes = {LENGTH: self.axis or Axis("sigma_rel", *good_range(self.run, t, self.method)), TIME: times}
        guide = None
        if self.guide is not None:
            guide = self._candidates(self.guide, SigmaRel(0.2), None, None)
            axes[GUIDE] = self.guide_axis or Axis("sigma_rel", *good_range(self.guide, None, self.method))
        if all(axis.is_given for axis in axes.values()):
            raise InvalidValueError(axes[LENGTH].kind, "name two lengths or more", value=f"{axes[LENGTH].low:g}")
        check_counts(self.repeats, self.budget, axes.values())
        needed = main.nbytes + (0 if guide is None else guide.nbytes)
        if self.disk is not None and self.disk < needed:
            reason = f"one trial takes {needed:,} bytes of averages"
            raise InvalidValueError("disk", f"must have room for one; {reason}", value=f"{self.disk:,} bytes")
        globs = list(self.groups)
        names = main.plan.names.values()
        if self.groups and any(not any(fnmatchcase(n, glob) for n in some for glob in globs) for some in names):
            globs.append("*")
        if self.groups:
            check_groups(replace(main.plan, targets=(Groups(dict.fromkeys(globs, 0.2)),)))
        if not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
            reason = "its first word is neither a program on the PATH nor an executable file"
            raise InvalidValueError("run", reason, "a script may need its interpreter first: python3", value=words[0])
        with self._folder():
            return _Searches(self, words, axes, main, guide, globs).run_all()

    def _candidates(self, run: Run, target: Target, t: float | None, step: int | None) -> Candidates:
        from posthoc_cli.sweep.candidates import Candidates

        options = {name: getattr(self, name) for name in ("method", "dtype", "layout", "like", "component")}
        planned = run.write(target, None, t=t, step=step, dry_run=True, **options)
        assert planned is not None
        return Candidates(run, planned.plan, options, self.progress)

    def _checked_words(self) -> list[str]:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise InvalidValueError("run", f"cannot be split into words: {error}", value=self.command) from error
        places = ["{weights}"] if self.guide is None else ["{weights}", "{weights:guide}"]
        for place in places:
            if not any(place in word for word in words):
                reason = f"must have {place} where the file goes"
                raise InvalidValueError("run", reason, value=self.command or "(empty)")
        if self.guide is None and (self.guide_axis is not None or "{weights:guide}" in self.command):
            raise InvalidValueError("guide", "is missing: the snapshots of the second network, or the same for both")
        if (self.metric.json or self.metric.csv) and "{dir}" not in self.command:
            reason = "must have {dir}, the folder in which the file with the metric is looked for"
            raise InvalidValueError("run", reason, value=self.command)
        if self.jobs < 1:
            raise InvalidValueError("jobs", "must be at least 1", value=self.jobs)
        if self.groups and self.axis is not None and self.axis.kind != "sigma_rel":
            raise InvalidValueError("groups", "have lengths in sigma_rel", value=", ".join(self.groups))
        if self.groups and self.guide is not None:
            raise InvalidValueError("groups", "do not go with a second network", value=", ".join(self.groups))
        if self.raw is not None and self.guide is not None:
            raise InvalidValueError("raw and guide", "give one of them", "evaluate the two networks' raw weights apart")
        if self.keep and self.disk is not None:
            raise InvalidValueError("keep_weights and disk", "give one of them")
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidValueError("timeout", "must be above 0 seconds", value=f"{self.timeout:g}")
        if self.out.exists() and not self.out.is_dir():
            raise InvalidValueError("out", "is a file", "name a folder", value=self.out)
        if self.raw is not None and not self.raw.exists():
            raise InvalidValueError("raw", "no such file or directory", value=self.raw)
        return words

    @contextmanager
    def _folder(self) -> Iterator[None]:
        """The folder of the sweep, locked; what a killed one has left is ended and removed."""
        if not self.out.parent.is_dir():
            raise InvalidValueError("out", "its parent folder does not exist", value=self.out)
        there = {path.name for path in files.system.list(self.out)} if self.out.is_dir() else set()
        if there - {LOCK_NAME, HOLDER_NAME, _LOGS, _SCRATCH, _KEPT} and not there & {TRIALS, RESULT}:
            # Something in it may be named as what a sweep replaces or removes.
            raise OutputExistsError(self.out, "is not empty, and no sweep made it", "name another folder")
        with files.reported_as_write_error(self.out):
            for folder in (self.out, self.out / _LOGS, *([self.out / _KEPT] if self.keep else [])):
                files.make_directory(folder)
        try:
            lock = DirectoryLock(self.out)
        except LockedError as error:
            raise LockedError(self.out, error.reason, "wait for that sweep, or take another folder") from error
        scratch = self.out / _SCRATCH
        with lock:
            end_leftovers(scratch)
            kept = self.out / _KEPT
            for left in (scratch, *(files.leftovers(kept) if kept.is_dir() else ())):
                _remove(left)
            try:
                yield
            finally:
                end_leftovers(scratch)  # an interruption may come while a process starts
                _remove(scratch)


class _Searches:
    """The searches of a sweep, one after another, each with all else as it was found before."""

    def __init__(
        self, asked: Sweep, words: list[str], axes: dict[str, Axis], main: Candidates, guide: Candidates | None,
        globs: list[str],
    ) -> None:  # fmt: skip
        self._asked, self._words, self._main, self._guide, self._globs = asked, words, main, guide, globs
        self._axes = axes | {_GROUP + glob: axes[LENGTH] for glob in globs}
        self._plain = [name for name, axis in axes.items() if not axis.is_given]
        self._point = {name: axis.high for name, axis in axes.items()}
        if GUIDE in axes:
            self._point[GUIDE] = axes[GUIDE].value(math.sqrt(axes[GUIDE].low * axes[GUIDE].high))
        self._settings = main.settings | {"command": asked.command, "metric": vars(asked.metric)}
        if guide is not None:
            self._settings |= {"guide": guide.settings | {"t": guide.plan.t}}
        self._folder = asked.out / (_KEPT if asked.keep else _SCRATCH)
        self._raw: list[Record] = []
        self._trials: list[Record] = []
        self._found: dict[str, search.Estimate] = {}
        self._refined: list[Refinement] = []
        self._stopped = self._beside = ""

    def run_all(self) -> SweepReport:
        """Search all, measure the raw weights, and write the best."""
        asked, first, point, found = self._asked, self._plain[0], self._point, self._found
        if asked.raw is not None:
            records = Records(asked.out, self._question(first) | {"raw": str(asked.raw.resolve())})
            known = {trial.seed: trial for trial in records.read() if trial.value is not None}
            seeds = [seed for seed in range(asked.repeats) if seed not in known]
            wanted = [(RAW, 0.0, seed, {"weights": asked.raw, "sigma_rel": 0.0}, None) for seed in seeds]
            self._raw = [*known.values(), *self._evaluate(wanted, records)]
        start, stale, turns = dict(point), list(self._plain), Counter[str]()
        while stale:
            name = stale.pop(0)
            why = self._search(name)
            self._stopped = why if name == first else self._stopped
            ends = found[name].low, found[name].best, found[name].high
            low, best, high = map(self._axes[name].value, ends)
            moved = not low <= point[name] <= high
            point[name] = best if moved or name in (first, GUIDE) else point[name]
            turns[name] += 1
            if moved:
                stale += [o for o in self._plain if o not in (name, *stale) and 0 < turns[o] < _TURNS]
        self._refined = [self._refinement(name, start[name]) for name in self._plain[1:]]
        point |= {_GROUP + glob: point[LENGTH] for glob in self._globs}
        for name in (_GROUP + glob for glob in asked.groups):
            before = point[name]
            self._search(name)
            low, best, high = map(self._axes[name].value, (found[name].low, found[name].best, found[name].high))
            point[name] = before if low <= before <= high else best
            self._refined.append(self._refinement(name, before))
        return self._written(self._report(point, self._trials, self._stopped))

    def _report(self, point: dict[str, float], trials: Sequence[Record], stopped: str) -> SweepReport:
        """What was found up to now, with the best at a point."""
        asked, first, length = self._asked, self._plain[0], self._axes[LENGTH]
        named = {LENGTH: length.kind, TIME: TIME, GUIDE: GUIDE}
        grouped = any(one.gains for one in self._refined if one.name.startswith(_GROUP))
        return SweepReport(
            metric=asked.metric.label, minimize=asked.minimize, axis=self._axes[first], searched=named[first],
            trials=(*self._raw, *trials), found=self._found[first], stopped=stopped, best=length.target(point[LENGTH]),
            title=self._title(first, point), kind=length.kind, beside=self._beside, settings=self._question(first),
            chosen={named[name]: point[name] for name in dict.fromkeys((LENGTH, *self._plain))},
            refinements=tuple(self._refined), lengths=self._lengths(point) if grouped else {},
            guide=None if asked.guide is None else asked.guide.directory, again=asked.again,
        )  # fmt: skip

    def _refinement(self, name: str, before: float) -> Refinement:
        found, value = self._found[name], self._point[name]
        low, high = map(self._axes[name].value, (found.low, found.high))
        return Refinement(name, value, low, high, found.mean, found.standard_error, value != before)

    def _written(self, report: SweepReport) -> SweepReport:
        """Write the best averages and the report."""
        out, point, main = self._asked.out, self._point, self._main

        def replaced(candidates: Candidates, path: Path, target: Target, t: float) -> Path:
            if self._asked.like is not None:  # which is made anew only
                _remove(path)
            candidates.write([target], str(path), t, overwrite=self._asked.like is None)
            return path

        best = Groups(report.lengths) if report.lengths else report.best
        outputs = [replaced(main, main.output(out, "best"), best, point[TIME])]
        if self._guide is not None:
            path, target = self._guide.output(out, "best-guide"), SigmaRel(point[GUIDE])
            outputs.append(replaced(self._guide, path, target, self._guide.plan.t))
        report = replace(report, outputs=tuple(outputs))
        report.write(out)
        return report

    # --- one search

    def _search(self, name: str) -> str:
        """Add to the trials and estimates; returns why no more was measured."""
        asked, axis, records = self._asked, self._axes[name], Records(self._asked.out, self._question(name))
        known = _known(records, axis)
        again = asked.repeats > 1 or "{seed}" in asked.command
        measure = functools.partial(self._measure, name, records)
        if name == self._plain[0]:
            # Only the trials of the last search of it are of its curve.
            self._beside = "".join(self._title(name, self._point).partition(", ")[1:])

        def told(trials: Sequence[Record], found: search.Estimate) -> None:
            self._found[name] = found
            point = self._point | {name: axis.value(found.best)}
            self._report(point, [*self._trials, *trials], "it is still measuring").write(asked.out)

        batch = max(search.NEXT, asked.jobs)
        more, _, why = explore(axis, measure, known, asked.minimize, asked.budget, asked.repeats, again, batch, told)
        self._trials += more
        return why

    def _question(self, name: str) -> dict[str, Any]:
        """What makes the trials of a search comparable: all but the value that is searched."""
        point = self._point
        question = self._settings | {"t": None if name == TIME else point[TIME]}
        if name.startswith(_GROUP):
            lengths = self._lengths(point)
            glob = name.removeprefix(_GROUP)
            return question | {"group": glob, "others": {o: width for o, width in lengths.items() if o != glob}}
        others = {o: self._axes[o].title(point[o]) for o in (LENGTH, GUIDE) if o in point and o != name}
        return question | ({"searched": name, "others": others} if others else {})

    def _lengths(self, point: dict[str, float]) -> dict[str, float]:
        return {glob: point[_GROUP + glob] for glob in self._globs}

    def _title(self, name: str, point: dict[str, float]) -> str:
        """Of a trial: the value that is searched, then the others that are, or that a second network has."""
        titles = {o: self._axes[o].title(point[o]) for o in (LENGTH, TIME, GUIDE) if o in point}
        if GUIDE in titles:
            titles[GUIDE] = f"{GUIDE} {titles[GUIDE]}"
        if name.startswith(_GROUP):
            return f"{name.removeprefix(_GROUP)} {self._axes[name].title(point[name])}"
        if TIME not in self._plain:
            del titles[TIME]
        return ", ".join([titles.pop(name), *titles.values()])

    def _make(self, points: Sequence[dict[str, float]], name: str) -> list[tuple[dict[str, Any], float | None]]:
        """The averages of points, for the placeholders of the command, with their predicted errors."""
        is_group, length = name.startswith(_GROUP), self._axes[LENGTH]
        if is_group:
            scratch = self._asked.out / _SCRATCH
            made = self._main.make(scratch, [(Groups(self._lengths(point)), point[TIME]) for point in points])
        else:
            made = self._main.make(self._folder, [(length.target(point[LENGTH]), point[TIME]) for point in points])
        filled: list[tuple[dict[str, Any], float | None]] = [
            ({"weights": path, "sigma_rel": point[name if is_group else LENGTH]}, error)
            for (path, error), point in zip(made, points, strict=True)
        ]
        if self._guide is not None:
            t = self._guide.plan.t
            others = self._guide.make(self._folder, [(SigmaRel(point[GUIDE]), t) for point in points])
            for (words, _), (path, _), point in zip(filled, others, points, strict=True):
                words |= {"weights:guide": path, "sigma_rel:guide": point[GUIDE]}
        return filled

    def _measure(self, name: str, records: Records, wanted: Sequence[tuple[float, int]]) -> Iterator[Record]:
        """Synthesize values in one pass, as many as the disk may hold, and run the command for each."""
        values = list(dict.fromkeys(value for value, _ in wanted))
        size = len(values) or 1
        if self._asked.disk is not None:
            sizes = {LENGTH: self._main.nbytes} | ({} if self._guide is None else {GUIDE: self._guide.nbytes})
            own = GUIDE if name == GUIDE else LENGTH
            size = max(1, (self._asked.disk - sum(sizes.values()) + sizes[own]) // sizes[own])
        scratch = self._asked.out / _SCRATCH
        for begin in range(0, len(values), size):
            some = values[begin : begin + size]
            points = [self._point | {name: value} for value in some]
            with files.reported_as_write_error(scratch):
                files.make_directory(scratch)
            made = dict(zip(some, zip(points, self._make(points, name), strict=True), strict=True))
            jobs = [(self._title(name, made[v][0]), v, seed, *made[v][1]) for v, seed in wanted if v in made]
            yield from self._evaluate(jobs, records)
            _remove(scratch)

    def _evaluate(
        self, wanted: Sequence[tuple[str, float, int, dict[str, Any], float | None]], records: Records
    ) -> Iterator[Record]:
        """Run the command for each (target, value, seed, averages, predicted error), and write the outcomes down."""
        asked, evaluations = self._asked, []
        for target, _, seed, words, _ in wanted:
            name = _file_name(f"{target}-seed-{seed}")
            folder = asked.out / _SCRATCH / f"trial-{name}"
            files.make_directory(folder)
            filled = {"weights:guide": "", "sigma_rel:guide": ""} | words | {"seed": seed, "dir": folder}
            # Absolute paths, since the command may change the directory.
            texts = {name: str(one.absolute() if isinstance(one, Path) else one) for name, one in filled.items()}
            command = [_PLACEHOLDER.sub(lambda found: texts[found[1]], word) for word in self._words]  # noqa: B023
            evaluations.append(Evaluation(command, folder, asked.out / _LOGS / name))
        for index, outcome in run_all(evaluations, asked.metric, asked.jobs, asked.devices, asked.timeout):
            target, value, seed, _, error = wanted[index]
            record = Record(
                target, value, seed, outcome.value, outcome.standard_error, error, outcome.seconds, outcome.error,
                f"{_LOGS}/{evaluations[index].log.name}",
            )  # fmt: skip
            records.append(record)
            _remove(evaluations[index].folder)
            asked.say(record)
            yield record


def _known(records: Records, axis: Axis) -> list[Record]:
    """What was measured before and belongs to the search; of a trial that was made twice the last one."""

    def within(trial: Record) -> bool:
        if f" {axis.kind} " not in f" {trial.target}":
            return False
        return trial.x in axis.values if axis.values else axis.low <= trial.x <= axis.high

    trials = {(trial.target, trial.seed): trial for trial in records.read()}
    return [trial for trial in trials.values() if trial.value is not None and within(trial)]


def _file_name(text: str) -> str:
    """A text as a file's name, shortened where a file system may not take it: file names have at most 255 bytes."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", text)
    return name if len(name) <= 100 else f"{name[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}-{name[-40:]}"


def _remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, where there is one; a WriteError."""
    with files.reported_as_write_error(path, "removed"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            files.unlink_if_there(path)

"""A sweep by a user's command: each candidate is measured by a process of its own."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, LockedError, OutputExistsError, check_alone, check_count, check_number
from posthoc_cli.export.layouts import layout_of, output_exists, output_paths, suffix_of
from posthoc_cli.run import Run
from posthoc_cli.snapshots.writer import HOLDER_NAME, LOCK_NAME, DirectoryLock
from posthoc_cli.sweep.results import RAW, RESULT, TRIALS, Records, SweepReport
from posthoc_cli.sweep.search import NEXT, Axis, Search, Trial, check_counts, good_range
from posthoc_cli.sweep.trials import Command, Metric, run_all
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Mean, SigmaRel, Target

if TYPE_CHECKING:
    import torch

_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|weights:guide|sigma_rel:guide|seed|dir)\}")
_SCRATCH, _LOGS, _KEPT = ".scratch", "logs", "weights"
_TURNS = 3
"""Searches of one length at most, each with the other as it was found before."""


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
        jobs: trials at a time, which share out CUDA_VISIBLE_DEVICES.
        timeout: seconds that a trial may take.
        disk: bytes of averages at a time, None for all of a round.
        raw: a file of raw weights to compare with; by default the run's own checkpoint of that time, where it has one.
        t: the time of the averages; by default that of the newest snapshot.
        guide: snapshots of a second network, or the same ones for a second length.
        guide_axis: its length, a sigma_rel; by default where the predicted error is below 1 %.
        dtype, layout, like, component: as in `Run.write`.
        keep: leave the averages in the folder `weights`, for other metrics.
        again: the command line that asks for this.
        say: called with every trial as it ends.
        watch: called when something begins: what, in words, and how many trials of at most how many have ended.
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
    timeout: float | None = None
    disk: int | None = None
    raw: Path | None = None
    t: float | None = None
    guide: Run | None = None
    guide_axis: Axis | None = None
    dtype: torch.dtype | str | None = None
    layout: str | None = None
    like: Path | None = None
    component: str | None = None
    keep: bool = False
    again: str = ""
    say: Callable[[Trial], None] = lambda _: None
    watch: Callable[[str, int, int], None] = lambda _what, _done, _most: None

    def run_all(self) -> SweepReport:
        """Do it. A call that was stopped is continued by the next one like it.

        Raises:
            InvalidValueError: an argument cannot be used.
            LockedError: another sweep works in this folder.
            PostHocError: too few trials have succeeded, or all have the same metric.
        """
        words = self._checked_words()
        options = {name: getattr(self, name) for name in ("dtype", "layout", "like", "component")}
        networks = [_Network.of(self.run, self.axis, self.t, options, "")]
        if self.guide is not None:
            networks.append(_Network.of(self.guide, self.guide_axis, None, options, "guide"))
        axes = [network.axis for network in networks]
        if all(axis.is_given for axis in axes):
            raise InvalidValueError(axes[0].kind, "name two lengths or more", value=f"{axes[0].low:g}")
        check_counts(self.repeats, self.budget, axes)
        needed = sum(network.nbytes for network in networks)
        if self.disk is not None and self.disk < needed:
            reason = f"one trial takes {needed:,} bytes of averages"
            raise InvalidValueError("disk", f"must have room for one; {reason}", value=f"{self.disk:,} bytes")
        if not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
            reason = "its first word is neither a program on the PATH nor an executable file"
            raise InvalidValueError(
                "command", reason, "a script may need its interpreter first: python3", value=words[0]
            )
        with self._folder():
            return _Job(self, words, networks).run()

    def _checked_words(self) -> list[str]:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise InvalidValueError("command", f"cannot be split into words: {error}", value=self.command) from error
        places = ["{weights}"] if self.guide is None else ["{weights}", "{weights:guide}"]
        for place in places:
            if not any(place in word for word in words):
                reason = f"must have {place} where the file goes"
                raise InvalidValueError("command", reason, value=self.command or "(empty)")
        if self.guide is None and (self.guide_axis is not None or "{weights:guide}" in self.command):
            raise InvalidValueError("guide", "is missing: the snapshots of the second network, or the same for both")
        if self.metric.file is not None and "{dir}" not in self.command:
            reason = "must have {dir}, the folder in which the file with the metric is looked for"
            raise InvalidValueError("command", reason, value=self.command)
        check_count("jobs", self.jobs)
        check_alone(raw=self.raw, guide=self.guide)
        check_alone(keep_weights=self.keep, disk=self.disk)
        if self.timeout is not None:
            check_number("timeout", self.timeout, lambda seconds: seconds > 0, "be above 0 seconds")
        if self.out.exists() and not self.out.is_dir():
            raise InvalidValueError("out", "is a file", "name a folder", value=self.out)
        if self.raw is not None and not self.raw.exists():
            raise InvalidValueError("raw", "no such file or directory", value=self.raw)
        return words

    @contextmanager
    def _folder(self) -> Iterator[None]:
        """The folder of the sweep, locked; the averages that a killed one has left are removed."""
        files.check_parent("out", self.out)
        there = {path.name for path in files.system.list(self.out)} if self.out.is_dir() else set()
        if there - {LOCK_NAME, HOLDER_NAME, _LOGS, _SCRATCH, _KEPT} and not there & {TRIALS, RESULT}:
            # Something in it may be named as what a sweep replaces or removes.
            raise OutputExistsError(self.out, "is not empty, and no sweep made it", "name another folder")
        scratch, kept = self.out / _SCRATCH, self.out / _KEPT
        with files.reported_as_write_error(self.out):
            for folder in (self.out, self.out / _LOGS):
                files.make_directory(folder)
        try:
            lock = DirectoryLock(self.out)
        except LockedError as error:
            raise LockedError(self.out, error.reason, "wait for that sweep, or take another folder") from error
        with lock:
            for left in (scratch, *(files.leftovers(kept) if kept.is_dir() else ())):
                _remove(left)
            try:
                yield
            finally:
                _remove(scratch)


@dataclass(eq=False)
class _Network:
    """A network, and the length of its average.

    Attributes:
        run: its snapshots.
        axis: the length, which is searched or given.
        plan: of any target; says which run it is, at which time, and how large an average.
        options: dtype, layout, like and component, as in `Run.write`.
        name: "guide" for a second network, else empty.
        length: as it was found, or given; before it is searched, the middle of the range.
        search: the last one of the length.
    """

    run: Run
    axis: Axis
    plan: Plan
    options: dict[str, Any]
    name: str
    length: float
    search: Search | None = None

    @classmethod
    def of(cls, run: Run, axis: Axis | None, t: float | None, options: dict[str, Any], name: str) -> _Network:
        """By default with all lengths whose predicted error is good, at the time of the newest snapshot."""
        target = SigmaRel(0.2) if axis is None else axis.target(axis.high)
        planned = run.write(target, None, t=t, dry_run=True, **options)
        assert planned is not None
        axis = axis or good_range(run, planned.plan.t)
        return cls(run, axis, planned.plan, options, name, axis.high if axis.is_given else axis.value_at(0.5))

    @property
    def like(self) -> Path | None:
        """The model folder that averages are made like."""
        like: Path | None = self.options["like"]
        return like

    @property
    def nbytes(self) -> int:
        """Of one average, on the disk."""
        if self.like is None:
            return self.plan.nbytes
        return sum(path.stat().st_size for path in self.like.rglob("*") if path.is_file())

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two averages of one target the same."""
        plan, layout = self.plan, self.options["layout"]
        same = {"run": plan.newest.info.run_id, "t": plan.t, "method": plan.method, "dtype": plan.dtype}
        like = {"like": str(self.like.resolve()), "component": self.options["component"]} if self.like else {}
        return same | {"layout": layout} | like

    def title(self, value: float | None = None) -> str:
        """Of a length, by default its own, for people."""
        return f"{self.name} {self.axis.title(self.length if value is None else value)}".lstrip()

    def make(self, folder: Path, values: Sequence[float]) -> list[tuple[dict[str, Any], float | None]]:
        """Write averages into a folder, in one pass: what placeholders become, and the predicted error of each.

        One that is there already, as after a search by another metric, is used again.
        """
        wanted = {value: self.axis.target(value) for value in values}
        digest = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:8]
        pattern, layout = str(folder / f"{{target}}-{digest}{self._suffix}"), self.options["layout"]
        paths = dict(zip(wanted, output_paths([*wanted.values()], pattern, None)[0], strict=True))
        missing = [
            wanted[value]
            for value, path in paths.items()
            if not (path.exists() if self.like else output_exists(path, layout_of(path, layout)))
        ]
        plan = self._write(missing, pattern) if missing else self.plan
        if len(missing) < len(wanted):
            plan = self.run.plan([*wanted.values()], t=self.plan.t, dtype=self.options["dtype"])
        errors = dict(zip(wanted, map(plan.predicted_error, range(len(wanted))), strict=True))
        names = [f"{one}:{self.name}".rstrip(":") for one in ("weights", "sigma_rel")]
        return [(dict(zip(names, (paths[value], value), strict=True)), errors[value]) for value in values]

    def write(self, folder: Path, name: str, target: Target) -> Path:
        """Write one average under a name, in place of what is there."""
        path = folder / f"{name}{self._suffix}"
        if self.like is not None:  # which is made anew only
            _remove(path)
        self._write([target], str(path), overwrite=self.like is None)
        return path

    @property
    def _suffix(self) -> str:
        return "" if self.like is not None else suffix_of(self.options["layout"])

    def _write(self, targets: Sequence[Target], out: str, overwrite: bool = False) -> Plan:
        made = self.run.write(targets, out, t=self.plan.t, overwrite=overwrite, **self.options)
        assert made is not None
        return made.plan


_Wanted = tuple[Trial, dict[str, Any]]
"""A trial to make, as far as it is known, and what the placeholders become."""


class _Job:
    """The searches of a sweep: of one length, or of two in turn, each with the other as it was found before."""

    def __init__(self, asked: Sweep, words: list[str], networks: list[_Network]) -> None:
        self._asked, self._words, self._networks = asked, words, networks
        self._searched = [network for network in networks if not network.axis.is_given]
        self._settings = networks[0].settings | {"command": asked.command, "metric": asked.metric.text}
        self._settings |= {other.name: other.settings for other in networks[1:]}
        self._scratch = asked.out / _SCRATCH
        self._trials: list[Trial] = []
        self._beside = ""
        self._best: Trial | None = None
        self._ended, self._most = 0, 0

    def run(self) -> SweepReport:
        """Search all, measure the raw weights, and write the best."""
        self._measure_raw()
        waiting, turns = list(self._searched), Counter[str]()
        while waiting:
            network = waiting.pop(0)
            moved = self._search(network)
            turns[network.name] += 1
            others = [other for other in self._searched if other not in (network, *waiting)]
            waiting += [other for other in others if moved and turns[other.name] < _TURNS]
        out = self._asked.out
        outputs = [
            one.write(out, f"best-{one.name}".rstrip("-"), one.axis.target(one.length)) for one in self._networks
        ]
        report = replace(self._report(self._trials), outputs=tuple(outputs))
        report.write(out)
        return report

    def _search(self, network: _Network) -> bool:
        """Find a length; whether that moves it by more than the noise."""
        asked, axis, before = self._asked, network.axis, network.length
        records = Records(asked.out, self._question(network))
        if network is self._searched[0]:
            # Only the trials of the last search of it are of its curve.
            self._beside = "".join(self._title(network).partition(", ")[1:])
        search = network.search = Search(
            axis, network.run, network.plan.t, _known(records), minimize=asked.minimize, budget=asked.budget,
            repeats=asked.repeats, again=asked.repeats > 1 or "{seed}" in asked.command, batch=max(NEXT, asked.jobs),
        )  # fmt: skip
        moved = False
        self._ended, self._most = len(search.trials), asked.repeats * len(axis.values or range(asked.budget))
        for trial in search.trials:
            self._note(trial)
        for found in search.rounds(lambda wanted: self._measure(network, wanted, records)):
            network.length, moved = found.best, not found.low <= before <= found.high
            self._report([*self._trials, *search.trials]).write(asked.out)
        self._trials += search.trials
        return moved

    def _report(self, trials: Sequence[Trial]) -> SweepReport:
        """What was found up to now."""
        asked, main, first, second = self._asked, self._networks[0], self._searched[0], None
        assert first.search is not None
        for other in self._searched[1:]:
            if other.search is not None:
                found = other.search.found
                second = {"value": other.length, "low": found.low, "high": found.high}
                second |= {"estimate": found.mean, "standard_error": found.standard_error}
        return SweepReport(
            metric=asked.metric.label, minimize=asked.minimize, searched=first.name or first.axis.kind,
            trials=tuple(trials), found=first.search.found, stopped=first.search.stopped,
            best=main.axis.target(main.length), title=self._title(first),
            chosen={one.name or main.axis.kind: one.length for one in self._networks}, kind=main.axis.kind,
            beside=self._beside, settings=self._question(first), second=second,
            guide=None if asked.guide is None else asked.guide.directory, again=asked.again,
        )  # fmt: skip

    def _question(self, network: _Network) -> dict[str, Any]:
        """What makes the trials of a search comparable: all but the value that is searched."""
        others = [other.title() for other in self._networks if other is not network]
        return self._settings | {"searched": f"{network.name} {network.axis.kind}".lstrip(), "others": others}

    def _title(self, network: _Network, value: float | None = None) -> str:
        """Of a trial: the value that is searched, then the other."""
        others = [other.title() for other in self._networks if other is not network]
        return ", ".join([network.title(value), *others])

    def _measure_raw(self) -> None:
        """The file that is named, or the run's own, with all seeds that were not measured before."""
        raw, network = self._asked.raw, self._networks[0]
        if raw is None and (self._asked.guide is not None or not network.run.has_raw(network.plan.t)):
            return
        records = Records(self._asked.out, self._settings | {"raw": RAW if raw is None else str(raw.resolve())})
        known = {trial.seed: trial for trial in records.read() if trial.value is not None}
        seeds = [seed for seed in range(self._asked.repeats) if seed not in known]
        if raw is None and seeds:
            with files.reported_as_write_error(self._scratch):
                files.make_directory(self._scratch)
            raw = network.write(self._scratch, RAW, Mean(1))
        wanted = [(Trial(RAW, 0.0, seed), {"weights": raw, "sigma_rel": 0.0}) for seed in seeds]
        self._trials += [*known.values(), *self._evaluate(wanted, records)]

    def _measure(self, network: _Network, wanted: Sequence[tuple[float, int]], records: Records) -> list[Trial]:
        """Synthesize values in one pass, as many as the disk may hold, and run the command for each."""
        values = list(dict.fromkeys(value for value, _ in wanted))
        size, done = len(values) or 1, list[Trial]()
        if self._asked.disk is not None:
            size = 1 + (self._asked.disk - sum(one.nbytes for one in self._networks)) // network.nbytes
        for begin in range(0, len(values), size):
            made = self._make(network, values[begin : begin + size])
            some = [(value, seed) for value, seed in wanted if value in made]
            done += self._evaluate([(replace(made[v][0], seed=seed), made[v][1]) for v, seed in some], records)
            _remove(self._scratch)
        return done

    def _make(self, network: _Network, values: Sequence[float]) -> dict[float, _Wanted]:
        """The averages of some values of a length, each as a trial with seed 0."""
        folder = self._asked.out / _KEPT if self._asked.keep else self._scratch
        self._say(f"making {len(values)} averages")
        with files.reported_as_write_error(folder):
            files.make_directory(folder)
        made = [one.make(folder, values if one is network else [one.length] * len(values)) for one in self._networks]
        trials = {}
        for value, averages in zip(values, zip(*made, strict=True), strict=True):
            filled = {name: text for words, _ in averages for name, text in words.items()}
            _, error = averages[0]
            trials[value] = Trial(self._title(network, value), value, 0, predicted_error=error), filled
        return trials

    def _evaluate(self, wanted: Sequence[_Wanted], records: Records) -> list[Trial]:
        """Run the command for each, and write the outcomes down."""
        asked, commands, done = self._asked, list[Command](), list[Trial]()
        with files.reported_as_write_error(self._scratch):
            files.make_directory(self._scratch)
            for trial, averages in wanted:
                name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{trial.target}-seed-{trial.seed}")
                # A new name: a trial of a killed sweep may still write to its own.
                folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._scratch))
                filled = {"weights:guide": "", "sigma_rel:guide": "", **averages, "seed": trial.seed, "dir": folder}
                # Absolute paths, since the command may change the directory.
                texts = {key: str(one.absolute() if isinstance(one, Path) else one) for key, one in filled.items()}
                words = [_PLACEHOLDER.sub(lambda found: texts[found[1]], word) for word in self._words]  # noqa: B023
                logged = replace(trial, log=f"{_LOGS}/{name}")
                commands.append(Command(logged, words, folder, asked.out / logged.log))

        def tell(command: Command, trial: Trial, is_missing: bool) -> None:
            if is_missing and self._best is None:  # a wrong name, and no reason to try it with all others
                raise InvalidValueError("metric", str(trial.error), value=asked.metric.key or "")
            records.append(trial)
            done.append(trial)
            _remove(command.folder)
            self._ended += 1
            self._note(trial)
            asked.say(trial)

        run_all(commands, asked.metric, tell, asked.jobs, asked.timeout, lambda one: self._say(one.trial.target))
        return done

    def _note(self, trial: Trial) -> None:
        """Remember the best measurement."""
        sign = 1 if self._asked.minimize else -1
        if trial.value is not None and (self._best is None or sign * trial.value < sign * (self._best.value or 0.0)):
            self._best = trial

    def _say(self, what: str) -> None:
        best = "" if self._best is None else f"; best {self._best.value:.6g} at {self._best.target}"
        self._asked.watch(f"trial {self._ended + 1}: {what}{best}", self._ended, max(self._most, self._ended + 1))


def _known(records: Records) -> list[Trial]:
    """What was measured before; of a trial that was made twice the last one."""
    trials = {(trial.x, trial.seed): trial for trial in records.read()}
    return [trial for trial in trials.values() if trial.value is not None]


def _remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, where there is one; a WriteError."""
    with files.reported_as_write_error(path, "removed"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            files.unlink_if_there(path)

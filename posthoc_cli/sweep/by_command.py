"""A sweep by the user's command, which runs as a separate process for each trial."""

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
from posthoc_cli.sweep.trials import Metric, TrialCommand, run_all
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Mean, SigmaRel, Target

if TYPE_CHECKING:
    import torch

_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|weights:guide|sigma_rel:guide|seed|dir)\}")
_SCRATCH, _LOGS, _KEPT = ".scratch", "logs", "weights"
_TURNS = 3
"""The most searches of one length when two are searched in turn."""


@dataclass(frozen=True)
class Sweep:
    """A search for the best length of an average by a user's command.

    Attributes:
        run: the snapshots.
        command: the command line, with `{weights}`, optionally `{sigma_rel}`, `{seed}`, `{dir}`, and with a guide
            `{weights:guide}`.
        metric: where the command prints or writes the metric.
        out: folder for the records, logs and the best average.
        axis: the lengths; by default every sigma_rel whose predicted error is below 1 %.
        minimize: whether lower is better.
        repeats: trials of each length, with the seeds 0, 1, ...
        budget: the most lengths to measure in each search.
        jobs: parallel trials, among which CUDA_VISIBLE_DEVICES are divided.
        timeout: the most seconds that a trial may take.
        disk: the most bytes of averages at a time; None for all of a round.
        raw: a file of raw weights to compare with; by default the run's checkpoint of time `t`, if it has one.
        t: the time of the averages; by default that of the newest snapshot.
        guide: snapshots of a second network, or `run` itself for a second length.
        guide_axis: the sigma_rels of the guide; by default all whose predicted error is below 1 %.
        dtype, layout, like, component: as in `Run.write`.
        keep: keep the averages in the folder `weights`, for other metrics.
        again: the command line that repeats this sweep.
        say: called with every trial when it ends.
        watch: called when an action begins, with its description, the number of finished trials and the most expected.
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
        """Run the sweep, or continue one with the same settings that was stopped.

        Raises:
            InvalidValueError: an argument cannot be used.
            LockedError: another sweep is running in this folder.
            PostHocError: too few trials have succeeded, or all have the same metric.
        """
        words = self._checked_words()
        options = {name: getattr(self, name) for name in ("dtype", "layout", "like", "component")}
        networks = [_Network.of(self.run, self.axis, self.t, options, "")]
        if self.guide is not None:
            networks.append(_Network.of(self.guide, self.guide_axis, None, options, "guide"))
        axes = [network.axis for network in networks]
        if all(axis.is_given for axis in axes):
            raise InvalidValueError(axes[0].kind, "name at least two lengths", value=f"{axes[0].low:g}")
        check_counts(self.repeats, self.budget, axes)
        needed = sum(network.nbytes for network in networks)
        if self.disk is not None and self.disk < needed:
            reason = f"must have room for the averages of one trial, {needed:,} bytes"
            raise InvalidValueError("disk", reason, value=f"{self.disk:,} bytes")
        if not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
            reason = "its first word is neither a program on the PATH nor an executable file"
            hint = "a script may need its interpreter first: python3"
            raise InvalidValueError("command", reason, hint, value=words[0])
        with self._locked_folder():
            return _Searches(self, words, networks).run()

    def _checked_words(self) -> list[str]:
        """Return the words of the command; an InvalidValueError names an argument that cannot be used."""
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise InvalidValueError("command", f"cannot be split into words: {error}", value=self.command) from error
        for placeholder in ["{weights}"] if self.guide is None else ["{weights}", "{weights:guide}"]:
            if not any(placeholder in word for word in words):
                reason = f"must contain {placeholder}, which becomes the path of the average"
                raise InvalidValueError("command", reason, value=self.command or "(empty)")
        if self.guide is None and (self.guide_axis is not None or "{weights:guide}" in self.command):
            raise InvalidValueError("guide", "is missing: name the snapshots of the second network, or the first again")
        if self.metric.file is not None and "{dir}" not in self.command:
            reason = "must contain {dir}, the folder that is searched for the file with the metric"
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
    def _locked_folder(self) -> Iterator[None]:
        """Make and lock the folder of the sweep, and remove averages that a killed sweep has left."""
        files.check_parent("out", self.out)
        names = {path.name for path in files.system.list(self.out)} if self.out.is_dir() else set()
        if names - {LOCK_NAME, HOLDER_NAME, _LOGS, _SCRATCH, _KEPT} and not names & {TRIALS, RESULT}:
            # A sweep might replace or remove files of other programs that have the same names as its own.
            raise OutputExistsError(self.out, "is not empty, and not the folder of a sweep", "name another folder")
        scratch, kept = self.out / _SCRATCH, self.out / _KEPT
        with files.reported_as_write_error(self.out):
            for folder in (self.out, self.out / _LOGS):
                files.make_directory(folder)
        try:
            lock = DirectoryLock(self.out)
        except LockedError as error:
            raise LockedError(self.out, error.reason, "wait for that sweep, or name another folder") from error
        with lock:
            for leftover in (scratch, *(files.leftovers(kept) if kept.is_dir() else ())):
                _remove(leftover)
            try:
                yield
            finally:
                _remove(scratch)


@dataclass(eq=False)
class _Network:
    """A network and the length of its average.

    Attributes:
        run: the snapshots of the network.
        axis: the lengths to search, or one given length.
        plan: a plan of any target, which identifies the run, the time and the size of an average.
        options: dtype, layout, like and component, as in `Run.write`.
        name: "guide" for a second network, else empty.
        length: the given or best length; before the first search, the middle of the range.
        search: the last search of the length.
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
        """Plan averages of a run; defaults are the axis of `good_range` and the time of the newest snapshot."""
        target = SigmaRel(0.2) if axis is None else axis.target(axis.high)
        planned = run.write(target, None, t=t, dry_run=True, **options)
        assert planned is not None
        axis = axis or good_range(run, planned.plan.t)
        return cls(run, axis, planned.plan, options, name, axis.high if axis.is_given else axis.value_at(0.5))

    @property
    def like(self) -> Path | None:
        """The model folder that is copied with averaged weights, if any."""
        like: Path | None = self.options["like"]
        return like

    @property
    def nbytes(self) -> int:
        """The size of one average on the disk."""
        if self.like is None:
            return self.plan.nbytes
        return sum(path.stat().st_size for path in self.like.rglob("*") if path.is_file())

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that two averages of one target must share to be the same."""
        plan, layout = self.plan, self.options["layout"]
        common = {"run": plan.newest.info.run_id, "t": plan.t, "method": plan.method, "dtype": plan.dtype}
        like = {"like": str(self.like.resolve()), "component": self.options["component"]} if self.like else {}
        return common | {"layout": layout} | like

    def title(self, value: float | None = None) -> str:
        """Return a length, by default the present one, as text for people."""
        return f"{self.name} {self.axis.title(self.length if value is None else value)}".lstrip()

    def make(self, folder: Path, values: Sequence[float]) -> list[tuple[dict[str, Any], float | None]]:
        """Write averages into a folder in one pass; return the values of placeholders and the predicted error of each.

        An average that already exists, as after a search by another metric, is not written again.
        """
        targets = {value: self.axis.target(value) for value in values}
        digest = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:8]
        pattern, layout = str(folder / f"{{target}}-{digest}{self._suffix}"), self.options["layout"]
        paths = dict(zip(targets, output_paths([*targets.values()], pattern, None)[0], strict=True))
        missing = [
            targets[value]
            for value, path in paths.items()
            if not (path.exists() if self.like else output_exists(path, layout_of(path, layout)))
        ]
        plan = self._write(missing, pattern) if missing else self.plan
        if len(missing) < len(targets):
            plan = self.run.plan([*targets.values()], t=self.plan.t, dtype=self.options["dtype"])
        errors = dict(zip(targets, map(plan.predicted_error, range(len(targets))), strict=True))
        names = [f"{placeholder}:{self.name}".rstrip(":") for placeholder in ("weights", "sigma_rel")]
        return [(dict(zip(names, (paths[value], value), strict=True)), errors[value]) for value in values]

    def write(self, folder: Path, name: str, target: Target) -> Path:
        """Write one average under a name, replacing an existing one."""
        path = folder / f"{name}{self._suffix}"
        if self.like is not None:  # a model folder is never overwritten
            _remove(path)
        self._write([target], str(path), overwrite=self.like is None)
        return path

    @property
    def _suffix(self) -> str:
        return "" if self.like is not None else suffix_of(self.options["layout"])

    def _write(self, targets: Sequence[Target], out: str, overwrite: bool = False) -> Plan:
        report = self.run.write(targets, out, t=self.plan.t, overwrite=overwrite, **self.options)
        assert report is not None
        return report.plan


_Pending = tuple[Trial, dict[str, Any]]
"""A trial without its metric, and the values of placeholders."""


class _Searches:
    """The searches of a sweep: of one length, or of two in turn, each with the best value so far of the other."""

    def __init__(self, sweep: Sweep, words: list[str], networks: list[_Network]) -> None:
        self._sweep, self._words, self._networks = sweep, words, networks
        self._searched = [network for network in networks if not network.axis.is_given]
        self._settings = networks[0].settings | {"command": sweep.command, "metric": sweep.metric.text}
        self._settings |= {other.name: other.settings for other in networks[1:]}
        self._scratch = sweep.out / _SCRATCH
        self._trials: list[Trial] = []
        self._other_length = ""
        self._best: Trial | None = None
        self._ended, self._most = 0, 0

    def run(self) -> SweepReport:
        """Measure the raw weights, search all lengths, and write the best averages."""
        self._measure_raw()
        waiting, turns = list(self._searched), Counter[str]()
        while waiting:
            network = waiting.pop(0)
            moved = self._search(network)
            turns[network.name] += 1
            others = [other for other in self._searched if other not in (network, *waiting)]
            waiting += [other for other in others if moved and turns[other.name] < _TURNS]
        out = self._sweep.out
        outputs = [
            each.write(out, f"best-{each.name}".rstrip("-"), each.axis.target(each.length)) for each in self._networks
        ]
        report = replace(self._report(self._trials), outputs=tuple(outputs))
        report.write(out)
        return report

    def _search(self, network: _Network) -> bool:
        """Search the best length of a network; return whether it moved by more than the noise."""
        sweep, axis, before = self._sweep, network.axis, network.length
        records = Records(sweep.out, self._question(network))
        if network is self._searched[0]:
            # The curve of the first length consists of the trials of its last search only.
            self._other_length = "".join(self._title(network).partition(", ")[1:])
        search = network.search = Search(
            axis, network.run, network.plan.t, records.read(), minimize=sweep.minimize, budget=sweep.budget,
            repeats=sweep.repeats, again=sweep.repeats > 1 or "{seed}" in sweep.command, batch=max(NEXT, sweep.jobs),
        )  # fmt: skip
        moved = False
        count = sweep.budget if axis.values is None else len(axis.values)
        self._ended, self._most = len(search.trials), sweep.repeats * count
        for trial in search.trials:
            self._update_best(trial)
        for found in search.rounds(lambda wanted: self._measure(network, wanted, records)):
            network.length, moved = found.best, not found.low <= before <= found.high
            self._report([*self._trials, *search.trials]).write(sweep.out)
        self._trials += search.trials
        return moved

    def _report(self, trials: Sequence[Trial]) -> SweepReport:
        """Return the report of the results so far."""
        sweep, main, first, second = self._sweep, self._networks[0], self._searched[0], None
        assert first.search is not None
        for other in self._searched[1:]:
            if other.search is not None:
                found = other.search.found
                second = {"value": other.length, "low": found.low, "high": found.high}
                second |= {"estimate": found.mean, "standard_error": found.standard_error}
        return SweepReport(
            metric=sweep.metric.label, minimize=sweep.minimize, searched=first.name or first.axis.kind,
            trials=tuple(trials), found=first.search.found, stopped=first.search.stopped,
            best=main.axis.target(main.length), title=self._title(first),
            chosen={each.name or main.axis.kind: each.length for each in self._networks}, kind=main.axis.kind,
            other_length=self._other_length, settings=self._question(first), second=second,
            guide=None if sweep.guide is None else sweep.guide.directory, again=sweep.again,
        )  # fmt: skip

    def _question(self, network: _Network) -> dict[str, Any]:
        """Return the settings that comparable trials share: all but the searched value."""
        others = [other.title() for other in self._networks if other is not network]
        return self._settings | {"searched": f"{network.name} {network.axis.kind}".lstrip(), "others": others}

    def _title(self, network: _Network, value: float | None = None) -> str:
        """Return the title of a trial: the searched value, then the length of the other network, if any."""
        others = [other.title() for other in self._networks if other is not network]
        return ", ".join([network.title(value), *others])

    def _measure_raw(self) -> None:
        """Measure the given file of raw weights, or those of the run, with all seeds that were not measured before."""
        raw, network = self._sweep.raw, self._networks[0]
        if raw is None and (self._sweep.guide is not None or not network.run.has_raw(network.plan.t)):
            return
        records = Records(self._sweep.out, self._settings | {"raw": RAW if raw is None else str(raw.resolve())})
        known = records.read()
        seeds = [seed for seed in range(self._sweep.repeats) if seed not in {trial.seed for trial in known}]
        if raw is None and seeds:
            with files.reported_as_write_error(self._scratch):
                files.make_directory(self._scratch)
            raw = network.write(self._scratch, RAW, Mean(1))
        pending = [(Trial(RAW, 0.0, seed), {"weights": raw, "sigma_rel": 0.0}) for seed in seeds]
        self._trials += [*known, *self._evaluate(pending, records)]

    def _measure(self, network: _Network, wanted: Sequence[tuple[float, int]], records: Records) -> list[Trial]:
        """Synthesize lengths in one pass, or in as many as the disk requires, and run the command for each."""
        values = list(dict.fromkeys(value for value, _ in wanted))
        size, trials = len(values) or 1, list[Trial]()
        if self._sweep.disk is not None:
            size = 1 + (self._sweep.disk - sum(each.nbytes for each in self._networks)) // network.nbytes
        for begin in range(0, len(values), size):
            made = self._make(network, values[begin : begin + size])
            pending = [(replace(made[v][0], seed=seed), made[v][1]) for v, seed in wanted if v in made]
            trials += self._evaluate(pending, records)
            _remove(self._scratch)
        return trials

    def _make(self, network: _Network, values: Sequence[float]) -> dict[float, _Pending]:
        """Write the averages of some lengths, and return a pending trial with seed 0 for each."""
        folder = self._sweep.out / _KEPT if self._sweep.keep else self._scratch
        self._announce(f"making {len(values)} averages")
        with files.reported_as_write_error(folder):
            files.make_directory(folder)
        made = [
            each.make(folder, values if each is network else [each.length] * len(values)) for each in self._networks
        ]
        trials = {}
        for value, averages in zip(values, zip(*made, strict=True), strict=True):
            filled = {name: text for words, _ in averages for name, text in words.items()}
            _, error = averages[0]
            trials[value] = Trial(self._title(network, value), value, 0, predicted_error=error), filled
        return trials

    def _evaluate(self, pending: Sequence[_Pending], records: Records) -> list[Trial]:
        """Run the command for each pending trial, and record the results."""
        sweep, commands, finished = self._sweep, list[TrialCommand](), list[Trial]()
        with files.reported_as_write_error(self._scratch):
            files.make_directory(self._scratch)
            for trial, averages in pending:
                name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{trial.target}-seed-{trial.seed}")
                # Each trial has a new folder: the process of a killed sweep may still write to its old one.
                folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._scratch))
                filled = {"weights:guide": "", "sigma_rel:guide": "", **averages, "seed": trial.seed, "dir": folder}
                # Paths are absolute, since the command may change the directory.
                texts = {key: str(text.absolute() if isinstance(text, Path) else text) for key, text in filled.items()}
                words = [_PLACEHOLDER.sub(lambda match: texts[match[1]], word) for word in self._words]  # noqa: B023
                logged = replace(trial, log=f"{_LOGS}/{name}")
                commands.append(TrialCommand(logged, words, folder, sweep.out / logged.log))

        def finish(command: TrialCommand, trial: Trial, is_missing: bool) -> None:
            if is_missing and self._best is None:  # the name is wrong: further trials would fail, too
                raise InvalidValueError("metric", str(trial.error), value=sweep.metric.key or "")
            records.append(trial)
            finished.append(trial)
            _remove(command.folder)
            self._ended += 1
            self._update_best(trial)
            sweep.say(trial)

        def start(command: TrialCommand) -> None:
            self._announce(command.trial.target)

        run_all(commands, sweep.metric, start, finish, sweep.jobs, sweep.timeout)
        return finished

    def _update_best(self, trial: Trial) -> None:
        """Remember the trial if its metric is the best so far."""
        sign = 1 if self._sweep.minimize else -1
        if trial.value is not None and (self._best is None or sign * trial.value < sign * (self._best.value or 0.0)):
            self._best = trial

    def _announce(self, action: str) -> None:
        """Pass an action that begins, with the best trial so far, to the sweep's `watch`."""
        best = "" if self._best is None else f"; best {self._best.value:.6g} at {self._best.target}"
        self._sweep.watch(f"trial {self._ended + 1}: {action}{best}", self._ended, max(self._most, self._ended + 1))


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists; raise a WriteError if that fails."""
    with files.reported_as_write_error(path, "removed"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            files.unlink_if_exists(path)

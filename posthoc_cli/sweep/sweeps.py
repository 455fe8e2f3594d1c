"""A sweep: the user's evaluation of averages of several lengths, with a record of each trial."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from posthoc_cli import files
from posthoc_cli.errors import (
    CommandError,
    InvalidValueError,
    VanishedError,
    argument,
    check_count,
    count_noun,
    list_first,
    percent,
)
from posthoc_cli.export.writing import write_averages
from posthoc_cli.planning import SMALL_LOSS, CurveRequest
from posthoc_cli.profiles import UNIFORM_SIGMA_REL
from posthoc_cli.request import OutputRequest, SweepRequest
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.snapshots.sources import Sources, announce, announce_doubts, count_sources
from posthoc_cli.sweep import images
from posthoc_cli.sweep.evaluation import (
    Command,
    Evaluation,
    Function,
    Measure,
    check_command,
    ending_like,
)
from posthoc_cli.sweep.folder import locked_folder, read_trials, record
from posthoc_cli.sweep.metric import Metric, NoMetricError, TrialError
from posthoc_cli.sweep.report import SweepReport
from posthoc_cli.sweep.search import LEAST_BUDGET, Lengths, Search
from posthoc_cli.sweep.trial import FRESH, RANDOM_WEIGHTS, Spot, Trial
from posthoc_cli.sweep.weights import (
    Candidate,
    HeldSources,
    RandomWeights,
    RunWeights,
    average,
    find_called_best,
    find_checkpoints,
    find_compared,
    find_own_ema,
    hold_until,
)
from posthoc_cli.synthesis.curve import run_curve
from posthoc_cli.synthesis.plan import Plan, note_base

log = logging.getLogger(__name__)

MOST_CHECKPOINTS = 4  # single ones of the user that a search measures
_DIRECTIONS = {True: "minimize", False: "maximize", None: "look"}


@dataclass(eq=False)
class Sweep:
    """A search for the best length of an average by a user's evaluation; or a look at the images
    that it makes of some lengths."""

    sources: Sources
    request: SweepRequest
    rerun_command: str = ""  # the command line that repeats this sweep
    # called with every trial when it ends, its title, its number, and about how many there will be
    on_trial: Callable[[Trial, str, int, int], None] = lambda *_: None
    progress: ProgressBar = no_bar

    def run(self) -> SweepReport:
        """Run the sweep, or continue one with the same settings that was stopped.

        Raises:
            InvalidValueError: an argument cannot be used, or the first trial has printed no metric.
            OutputExistsError: the folder holds something else, such as another sweep.
            LockedError: another sweep is running in this folder.
            CommandError: two trials in a row have failed alike, or all have the same metric, and
                random weights have it, too.
        """
        request = self.request
        self._like = None if request.like is None else files.local_path("like", request.like)
        self._metric = Metric() if request.metric is None else Metric.parse(request.metric)
        self._evaluation = self._make_evaluation()
        lengths, notes = _make_lengths(request), list[str]()
        plan = self._plan(0.2 if lengths is None else lengths.high)
        self._base = plan.base
        self._t = plan.t
        self._held = HeldSources(hold_until(self.sources, self._t))
        if lengths is None:
            lengths = searchable_lengths(self.sources, self._t, notes)
        compared = find_compared(self.sources, self._t, request.raw)
        self._checkpoints = find_checkpoints(self.sources)
        own = find_own_ema(self.sources)
        _, *ends = sorted({*self.sources.times})  # an average of one time is none
        search = Search(
            lengths,
            request.is_lower_better,
            self._t,
            tuple(end for end in ends if end <= self._t),
            self._base is not None,
            self._bound(compared),
        )
        self._report = SweepReport(
            search,
            directory=self.sources.place,
            newest_t=self.sources.t,
            compared=tuple(weights.title for weights in compared),
            own_ema=None if own is None else own.title,
            metric=self._metric.key or "metric",
            settings=self._describe(),
            steps=plan.steps,
            t_unit=self.sources.t_unit,
            rerun_command=self.rerun_command,
            notes=(*self.sources.notes, *self.sources.doubts),
            findings=self.sources.findings,
        )
        self._note(*notes)
        folder = request.folder
        if folder is None:
            self._search(compared)
            return self._report
        with locked_folder(folder):
            recorded = read_trials(folder, self._report.settings, request.look)
            self._report = self._report.with_trials(filter(self._is_asked, recorded))
            self._search(compared)
            if not request.look:
                self._report = replace(self._report, outputs=(self._write_best(folder),))
            self._report.write(folder)
            return self._report

    def _plan(self, length: float) -> Plan:
        """Plan an average, which checks all that is given, and say what is to be known of the
        sources and of the base."""
        request = OutputRequest(
            length,
            t=self.request.t,
            step=self.request.step,
            like=self.request.like,
            dry_run=True,
            base=self.request.base,
            base_share=None if self.request.base is None else 0.5,
        )
        announce(self.sources)
        written = write_averages(lambda: self.sources, request, is_quiet=True)
        assert written is not None  # as of a process other than the first one
        note_base(written.plan)
        announce_doubts(self.sources)
        return written.plan

    def _search(self, compared: Sequence[Candidate]) -> None:
        with (
            self.progress("measuring", self._expected) as advance,
            self._evaluation.executor() as self._executor,
        ):
            self._started = len(self._report.trials)
            advance(self._started)
            for trial in self._measure_all(compared):
                if self.request.folder is not None:
                    record(self.request.folder, trial)
                title = self._report.title(trial)
                self.on_trial(trial, title, len(self._report.trials), self._expected)
                advance(1)
                self._check_latest()
        self._check_failures()
        if self._may_be_unused() and any(trial.is_random for trial in self._report.trials):
            value = self._report.trials[-1].value
            reason = f"every trial has the same metric, {value:.12g}, and random weights, too"
            raise CommandError("the sweep", reason, "does the evaluation use the weights?")

    def _make_evaluation(self) -> Evaluation:
        evaluate = self.request.evaluate
        if callable(evaluate):
            return Function(evaluate)
        assert self.request.folder is not None  # the request says so
        metric = None if self.request.look else self._metric
        check_command(evaluate, metric)
        return Command(evaluate, metric, self.request.folder, self._like, self.request)

    def _bound(self, compared: Sequence[Candidate]) -> int | None:
        """Compute how many averages may be measured beside what they are compared with, and one
        more: your own EMA again, or random weights."""
        if self.request.budget is None:
            return None
        hint = f"at least {LEAST_BUDGET} averages are measured"
        if compared:
            hint += f", and {list_first(weights.title for weights in compared)}"
        check_count("budget", self.request.budget, LEAST_BUDGET + len(compared), hint)
        return max(LEAST_BUDGET, self.request.budget - len(compared) - 1)

    def _is_asked(self, trial: Trial) -> bool:
        search = self._report.search
        if trial.sigma_rel is None:
            checkpoints = [weights.title for weights in self._checkpoints.values()]
            return trial.target in (*self._report.compared, *checkpoints, RANDOM_WEIGHTS)
        has_end = trial.t is None or trial.t in search.ends
        has_share = search.has_base or not trial.base_share
        return trial.sigma_rel in search.lengths and has_end and has_share

    def _describe(self) -> dict[str, Any]:
        """Describe what all trials of the folder have in common."""
        return {
            "run": self.sources.run_id,
            "t": self._t,
            "command": self._evaluation.name,
            "metric": None if self.request.look else self._metric.text,
            "direction": _DIRECTIONS[self.request.is_lower_better],
            "like": None if self._like is None else str(self._like.resolve()),
            "base": None if self._base is None else str(self._base.path),
            "base_hash": None if self._base is None else self._base.identity,
        }

    @property
    def _expected(self) -> int:
        """About how many trials there will be; for a short list, exactly."""
        report = self._report
        planned = len(report.compared) + report.search.expected
        return max(planned, len(report.trials))

    def _write_best(self, out: Path) -> Path:
        ending = ending_like(self._like)
        path = out / f"best{ending}"
        if not ending:  # a folder is never overwritten
            images.remove(path)
        self._find_best().write(path, self._like, overwrite=bool(ending))
        return path

    def _find_best(self) -> RunWeights:
        report = self._report
        own = find_own_ema(self.sources)
        for weights in (own, *self._checkpoints.values()):
            if weights is not None and weights.title == report.kept:
                return weights
        return self._average(report.search.best)

    def _average(self, spot: Spot) -> RunWeights:
        return average(self._held, spot, self._report.search.end_of(spot), self.request.base)

    # --- trials

    def _measure_all(self, compared: Sequence[Candidate]) -> Iterator[Trial]:
        """Yield each trial when it has ended; the report then has it."""
        first = [(weights, 0) for weights in compared]
        while batch := first + self._next_averages():
            first = []
            yield from self._measure(batch)
            self._check_failures()
        if self.request.look:
            return
        yield from self._measure_checkpoints()
        if self._report.estimate.noise > 0 and self._may_go_on():
            # of one measurement, your own EMA would have most of the gain's error
            yield from self._measure([(weights, 1) for weights in compared[:1]])
        for seed in (0, 1):  # one may have this metric by chance
            if self._may_be_unused() and self._may_go_on():
                yield from self._measure([(self._random_weights(seed), seed)])

    def _measure_checkpoints(self) -> Iterator[Trial]:
        """Measure some of the user's own checkpoints, and if the metric is noisy, the best of them
        afresh."""
        search = self._report.search
        times = search.tried_ends
        if (called_best := find_called_best(self.sources)) is not None:
            times = [called_best, *times]
        found = [self._checkpoints[t] for t in dict.fromkeys(times) if t in self._checkpoints]
        left = MOST_CHECKPOINTS
        if self.request.budget is not None:
            claimed = 0 if search.estimate.noise == 0 else 1 + len(FRESH)
            own = {weights.title for weights in found}  # a continued sweep has their trials
            spent = sum(trial.target not in own for trial in self._report.trials)
            left = min(left, max(0, self.request.budget - spent - claimed))
        if self._report.all_tied or not (chosen := found[:left]):
            return
        titles = tuple(weights.title for weights in chosen)
        self._report = replace(self._report, checkpoints=titles)
        yield from self._measure([(weights, 0) for weights in chosen])
        if search.estimate.noise > 0:
            best = self._report.best_checkpoint
            again = [weights for weights in chosen if weights.title == best]
            yield from self._measure([(weights, seed) for weights in again for seed in FRESH])

    def _may_go_on(self) -> bool:
        """Whether the budget leaves an evaluation."""
        return self.request.budget is None or len(self._report.trials) < self.request.budget

    def _may_be_unused(self) -> bool:
        """Whether all have the same metric, also random weights that were measured, as if the
        evaluation did not use the weights."""
        values = set()
        for trial in self._report.trials:
            if trial.value is not None or trial.is_random:
                values.add(trial.value)
        return self._report.all_tied and len(values) == 1

    def _random_weights(self, seed: int) -> RandomWeights:
        """Make random weights that a command can tell from an average by nothing else."""
        others = self._average(self._report.search.at_end)
        return RandomWeights(title=RANDOM_WEIGHTS, text=others.text, others=others, seed=seed)

    def _next_averages(self) -> list[tuple[Candidate, int]]:
        asked = self._report.search.next_measurements()
        return [(self._average(spot), seed) for spot, seed in asked]

    def _measure(self, batch: Sequence[tuple[Candidate, int]]) -> Iterator[Trial]:
        """Measure weights that have no trial yet, `jobs` at a time, and yield each trial when it
        has ended. The report has them in the order of the batch, whichever ends first."""
        before = self._report.trials
        known = {(trial.target, trial.seed) for trial in before}
        waiting = [pair for pair in batch if (pair[0].title, pair[1]) not in known]
        order = [(weights.title, seed) for weights, seed in waiting]
        free = [*range(self.request.jobs)]
        running = dict[Future[tuple[float | None, float | None]], _Running]()
        ended: list[Trial] = []
        while waiting or running:
            while waiting and free:
                started = self._start(*waiting.pop(0), free.pop(0))
                running[self._executor.submit(started.measure)] = started
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                started = running.pop(future)
                free.append(started.job)
                trial = self._finish(started, future)
                ended.append(trial)
                ended.sort(key=lambda trial: order.index((trial.target, trial.seed)))
                self._report = self._report.with_trials([*before, *ended])
                yield trial

    def _start(self, weights: Candidate, seed: int, job: int) -> _Running:
        """Make weights to measure; if their files are gone, the trial fails."""
        trial = Trial(
            weights.title, weights.sigma_rel, seed, t=weights.t, base_share=weights.base_share
        )
        before = self._held.sources
        self._started += 1
        try:
            measure, plan = self._evaluation.prepare(weights, trial, job)
        except VanishedError as vanished:
            return _Running(trial, job, partial(_fail, str(vanished)))
        if self._held.sources is not before:
            self._note_renewal()
        self._note(*weights.notes)
        if plan is not None and weights.sigma_rel is not None:
            error = plan.predicted_error(0)
            trial = replace(trial, predicted_error=error, lost_gain=plan.lost_gain(0))
        return _Running(trial, job, measure)

    def _note_renewal(self) -> None:
        """Note from which trial on averages are made of other sources."""
        left = count_sources(self._held.sources)
        self._note(f"from trial {self._started} on made of the {left} that remain")

    def _note(self, *notes: str) -> None:
        """Log notes, each once, and keep them for the report."""
        for note in notes:
            if note not in self._report.notes:
                log.warning("%s", note)
                self._report = replace(self._report, notes=(*self._report.notes, note))

    def _finish(
        self, started: _Running, future: Future[tuple[float | None, float | None]]
    ) -> Trial:
        """Complete a trial by its metric, or by the reason why it has none."""
        trial = replace(started.trial, seconds=started.seconds)
        try:
            value, error = future.result()
        except NoMetricError as failure:
            if not self._report.trials:
                raise InvalidValueError("evaluate", str(failure), failure.hint) from failure
            return replace(trial, error=str(failure))
        except TrialError as failure:
            return replace(trial, error=str(failure))
        return replace(trial, value=value, standard_error=error)

    def _check_latest(self) -> None:
        """Raise a CommandError after two trials that failed alike, as all others would."""
        trials = [trial for trial in self._report.trials if not trial.is_random]
        last = trials[-1]
        causes = []
        for trial in trials[-2:]:
            cause, _, _ = (trial.error or "").partition(": ")
            causes.append(cause)
        if last.error and causes == causes[:1] * 2:
            reason = f"two trials in a row have failed alike; the last one: {last.target}"
            raise CommandError("the sweep", f"{reason}: {last.error}")
        lengths = [trial for trial in trials if trial.value is not None and trial.sigma_rel]
        if len(lengths) == 2 and self._report.all_tied:
            self._note(
                f"all trials so far have the same metric, {last.value:.12g}: does the evaluation "
                "use the weights? If all others have it, too, random weights will show that"
            )

    def _check_failures(self) -> None:
        """Raise a CommandError if too many lengths have failed; of a look, if it has no image."""
        if self.request.look:
            assert self.request.folder is not None  # the request says so
            if not (self.request.folder / images.FOLDER).is_dir():
                reason = "no trial has left an image in {dir}"
                raise CommandError("the sweep", f"{reason}: {', '.join(images.ENDINGS)}")
            return
        report = self._report
        grid = report.search.first_grid
        measured = {trial.sigma_rel for trial in report.trials if trial.value is not None}
        failed = [trial for trial in report.trials if trial.error]
        # those that have no trial yet may still be measured
        possible = measured.union(grid) - {None}
        possible -= {trial.sigma_rel for trial in failed} - measured
        least = min(3, max(2, len(grid) - 1))  # of three one may fail
        if len(possible) < least:
            reason = f"{len(failed)} of {len(report.trials)} trials have failed, too many to choose"
            last = f"the last one: {failed[-1].target}: {failed[-1].error}"
            raise CommandError("the sweep", f"{reason}; {last}")


@dataclass
class _Running:
    """A trial that is being measured, and how long that took."""

    trial: Trial
    job: int
    _measure: Measure
    seconds: float = 0.0

    def measure(self) -> tuple[float | None, float | None]:
        began = time.monotonic()
        try:
            return self._measure()
        finally:
            self.seconds = time.monotonic() - began


def _fail(reason: str) -> NoReturn:
    raise TrialError(reason)


def _make_lengths(request: SweepRequest) -> Lengths | None:
    """Make the lengths that are asked for; None to search all that are exact enough."""
    if request.sigma_range is not None:
        return Lengths(*request.sigma_range)
    if request.sigma_rels is not None:
        return Lengths.from_list(request.sigma_rels)
    return None


def searchable_lengths(sources: Sources, t: float, notes: list[str]) -> Lengths:
    """Find the widest range of sigma_rel whose lost gain is below SMALL_LOSS.

    Without one, take the range from the mean of the last two stored times to the mean of all, and
    add what they lose to the notes.
    """
    curve = run_curve(sources, CurveRequest(t=t))
    ranges = curve.ranges_below(SMALL_LOSS)
    if ranges:
        low, high = max(ranges, key=lambda ends: ends[1] / ends[0])
        return Lengths(round(low, 4), round(high, 4))
    times = [time for time in sources.times if time <= t]
    if len(times) < 3:
        reason = f"has {count_noun(len(times), 'stored time')}, too few to search"
        raise InvalidValueError(sources.place, reason, f"name lengths with {argument('sigma_rel')}")
    # the width of a uniform mean over a window, as a fraction of t
    spacing = UNIFORM_SIGMA_REL * (t - times[-3]) / t
    whole = UNIFORM_SIGMA_REL * (t - times[0] + t - times[-2]) / t
    lengths = Lengths(round(spacing, 4), min(round(whole, 4), 0.28))
    is_searched = (curve.sigma_rels >= lengths.low) & (curve.sigma_rels <= lengths.high)
    losses = curve.lost_gain[is_searched]
    least, most = percent(float(losses.min())), percent(float(losses.max()))
    notes.append(
        f"{sources.place}: searching sigma_rel {lengths.low:g} to {lengths.high:g}, from the mean "
        f"of the last two files to the mean of all: lost gain at most about {least} to {most}; "
        "`ema guide exactness` says what that costs"
    )
    return lengths

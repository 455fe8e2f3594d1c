"""The plan of a synthesis: its snapshots, their coefficients and the content of the outputs, from
headers alone."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.settings import UNSPECIFIED
from posthoc_cli.dtypes import EPS, parse_dtype
from posthoc_cli.errors import (
    InexactError,
    InvalidValueError,
    at_most,
    at_most_one,
    check_number,
    list_first,
    percent,
)
from posthoc_cli.planning import SMALL_LOSS, check_within, error_curve
from posthoc_cli.profiles import FloatArray, PowerFunction
from posthoc_cli.reconstruction import (
    ROUNDING,
    Prior,
    Reconstruction,
    check_method,
    lost_gain,
    reconstruct,
    seen_from,
)
from posthoc_cli.request import Request
from posthoc_cli.run_clock import Clock, EpochClock
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.output_info import OutputInfo, Used
from posthoc_cli.snapshots.sampling import source_prior
from posthoc_cli.snapshots.selection import Selection, check_globs
from posthoc_cli.snapshots.sources import (
    Source,
    StoredTensors,
    TrackedTensor,
    by_time,
    choose_sources,
    count_files,
    count_sources,
    run_clock,
)
from posthoc_cli.targets import Mean, Target, name_equal_length

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Tensors to make of sources: copies of the newest source's; in a `Plan`, sums.

    Tensors that a source stores in fewer bytes than float32 are summed in float32, all others and
    parameters in float64 in float64: large coefficients of both signs would cost a float32 sum too
    many digits.
    """

    sources: tuple[StoredTensors, ...]  # by time
    # safetensors name of the averages' dtype in the outputs; None for each parameter's own
    dtype: str | None = None
    # dtypes of outputs that do not follow from `dtype`
    dtypes: Mapping[str, str] = field(default_factory=dict)
    subset: frozenset[str] | None = None  # the stored tensors to make; None for all
    # what to make in place of complete tensors
    boxes: Mapping[str, Box] = field(default_factory=dict)

    @property
    def coefficients(self) -> FloatArray | None:
        """The coefficients of sums, [sources, targets]."""
        return None

    @property
    def newest(self) -> StoredTensors:
        """The newest source, from which copies (buffers) are taken."""
        return self.sources[-1]

    @cached_property
    def tensors(self) -> dict[str, TrackedTensor]:
        """The stored tensors to make."""
        stored = self.newest.tensors
        if self.subset is None:
            return dict(stored)
        return {name: stored[name] for name in stored if name in self.subset}

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """All names of each tensor to make, the stored name first."""
        names = {name: [name] for name in self.tensors}
        for alias, name in self.newest.aliases.items():
            if name in names:
                names[name].append(alias)
        return names

    @property
    def read_bytes(self) -> int:
        total = 0
        for source in self.sources:
            total += sum(source.entries[name].nbytes for name in self.tensors)
        return total

    def box(self, name: str) -> Box:
        if name in self.boxes:
            return self.boxes[name]
        return Box.full(self.newest.entries[name].shape)

    def output_dtype(self, name: str) -> str:
        """Find the safetensors name of a tensor's dtype in the outputs: copies and statistics keep
        their own."""
        tensor = self.tensors[name]
        own = self.dtype if tensor.role == "average" and self.dtype else tensor.dtype
        return self.dtypes.get(name, own)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The dtype and shape of the tensors of each output, under all names."""
        entries = dict[str, Entry]()
        for name, aliases in self.names.items():
            entry = Entry(self.output_dtype(name), self.box(name).shape)
            entries |= dict.fromkeys(aliases, entry)
        return entries


def nbytes(entries: Mapping[str, Entry]) -> int:
    """Sum the bytes of all tensors."""
    return sum(entry.nbytes for entry in entries.values())


@dataclass(frozen=True, kw_only=True)
class Plan(Combination):
    """The snapshots and the coefficients that make the targets."""

    # the sources in use, all at or before `t`; if there are copies, also the newest one
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    t: float
    method: str
    reconstruction: Reconstruction  # coefficients [sources, targets], errors [targets]
    # snapshots or checkpoints, as `count_files` counts them, that were solved for
    solved: int = 0
    available: int = 0  # number of all of them at or before `t`
    run_end: float = 0.0  # time of the newest source, used or not
    steps: float | None = None  # of the run at `t`; None if its clock is not in one ratio to steps

    def __repr__(self) -> str:
        parts = []
        for index, target in enumerate(self.targets):
            error = percent(self.predicted_error(index))
            parts.append(f"{target.title} (predicted error {error})")
        return f"Plan(at t = {self.t:,.12g} from {self.counts}: {list_first(parts)})"

    @property
    def counts(self) -> str:
        """How many of the snapshots or checkpoints at or before `t` have a coefficient, in
        words."""
        return count_sources(self.sources, total=self.available)

    @property
    def choice(self) -> str | None:
        """A text that says how many of very many sources were used; None if all were used."""
        if self.solved == self.available:
            return None
        counts = count_sources(self.sources, self.solved, self.available)
        return f"{counts} up to t = {self.t:,.12g}, evenly in time"

    @property
    def coefficients(self) -> FloatArray:
        return self.reconstruction.coefficients

    @cached_property
    def output_rounding(self) -> float:
        """The relative error of rounding the averages to the outputs' dtypes, if all elements are
        equally large."""
        total = 0
        squares = 0.0
        for name, tensor in self.tensors.items():
            if tensor.role == "average":
                size = self.newest.entries[name].size
                total += size
                spacing = EPS.get(self.output_dtype(name), 0.0)
                squares += size * (ROUNDING * spacing) ** 2
        return math.sqrt(squares / max(1, total))

    def predicted_error(self, target: int) -> float | None:
        """Predict the expected relative L2 error of a target's output weights; None if the motion
        of the run is not known."""
        error = self.reconstruction.known_error(target)
        return None if error is None else math.hypot(error, self.output_rounding)

    def lost_gain(self, target: int) -> float | None:
        """Predict the share of what averaging gains in a metric that the error is expected to lose;
        None if the motion of the run is not known."""
        if self.reconstruction.known_error(target) is None:
            return None
        return float(self.lost_gains[target])

    @cached_property
    def lost_gains(self) -> FloatArray:
        """The expected loss of gain of each target, with the rounding of the outputs."""
        errors = np.hypot(self.reconstruction.predicted_error, self.output_rounding)
        return lost_gain(errors, self.reconstruction.distance)

    def profile_error(self, target: int) -> float:
        """Compute the relative L2 distance between a target's profile and the reconstructed one."""
        return float(self.reconstruction.profile_error[target])

    def output_info(self, target: int) -> OutputInfo:
        """Make the metadata of a target's output."""
        wished = self.targets[target]
        gamma = None
        if wished.sigma_rel is not None:
            gamma = PowerFunction.from_sigma_rel(wished.sigma_rel, self.t).gamma
        files = [source.name for source in self.sources]
        used = map(Used, files, self.coefficients[:, target].tolist())
        copies = list[str]()
        for name, tensor in self.tensors.items():
            if tensor.role == "copy":
                copies += self.names[name]
        return OutputInfo(
            run_id=self.sources[-1].run_id,
            profile=wished.title,
            sigma_rel=wished.sigma_rel,
            gamma=gamma,
            t=self.t,
            t_unit=self.sources[-1].t_unit,
            method=self.method,
            profile_error=self.profile_error(target),
            predicted_error=self.predicted_error(target),
            snapshots=tuple(used),
            copies=tuple(copies),
        )

    def to_dict(self) -> dict[str, Any]:
        """Describe the run, its motion, and each target's coefficients and errors, as plain values
        for JSON."""
        prior = self.reconstruction.prior
        motion = prior.motion
        targets = []
        for index in range(len(self.targets)):
            info = self.output_info(index)
            values: dict[str, Any] = {
                "target": info.profile,
                "as": name_equal_length(self.targets[index], self.steps),
            }
            for name in ("sigma_rel", "t", "method", "profile_error", "predicted_error"):
                values[name] = getattr(info, name)
            values["lost_gain"] = self.lost_gain(index)
            values["snapshots"] = [vars(used) for used in info.snapshots]
            targets.append(values)
        return {
            "run": self.sources[-1].run_id,
            "movement": {
                "source": prior.evidence,
                "pieces": motion.walk.size,
                "has_noise": bool(motion.noise.any()),
            },
            "solved_with": self.solved,
            "available": self.available,
            "targets": targets,
        }


def plan_synthesis(sources: Sequence[Source], request: Request) -> Plan:
    """Choose snapshots and coefficients. No tensor is read, except a sample if headers have no
    measurements.

    Arguments:
        sources: averages of one run, in any order. If more than `reconstruction.MOST_SOLVED` are at
            or before the time of the targets, that many are used, chosen by their times alone, so
            for any targets alike (`Plan.choice`).
        request: what to make of them.

    Raises:
        InvalidValueError: the request does not fit the run: its time, its names of tensors, or a
            target that is longer than the run.
        InexactError: the predicted error of a target exceeds `max_error`, or is not known.
    """
    wished = request.wished
    method = check_method(request.method)
    time = _target_time(sources, request.t, request.step)
    clock = run_clock(sources)
    check_steps(wished, clock, time, sources)
    usable, later = _choose_sources(sources, wished, time)
    known = [*usable, *later]  # later snapshots also measure the motion
    prior = source_prior(known)
    profiles = _profiles(wished, usable, clock, time)
    result = reconstruct(
        [source.profile for source in usable],
        profiles,
        method,
        prior.subset(range(len(usable))),
        time,
    )
    used = np.flatnonzero(np.any(result.coefficients != 0, axis=1)).tolist()
    newest = usable[-1]
    if usable[used[-1]].t < newest.t and newest.copies:  # which the output has
        used.append(len(usable) - 1)
    plan = Plan(
        sources=tuple(usable[i] for i in used),
        targets=wished,
        t=time,
        method=method,
        reconstruction=result.subset(snapshots=used),
        dtype=parse_dtype(request.dtype),
        solved=count_files(usable),
        available=count_files(source for source in sources if source.t <= time),
        run_end=max(source.t for source in sources),
        steps=float(clock.step_at(time)) if clock.is_even else None,
    )
    plan = _select_tensors(plan, request.selection)
    _check_errors(plan, request.max_error)
    _warn_of_poor_targets(plan, known, prior)
    return plan


def _select_tensors(plan: Plan, selection: Selection) -> Plan:
    """Make only the tensors with a name that is selected."""
    names = plan.names
    check_globs(selection, chain(*names.values()))
    chosen = set()
    for name, aliases in names.items():
        if any(map(selection.names, aliases)):
            chosen.add(name)
    if not chosen:
        raise InvalidValueError("exclude", "leaves no tensor")
    return plan if len(chosen) == len(names) else replace(plan, subset=frozenset(chosen))


def check_steps(
    targets: Sequence[Target],
    clock: Clock,
    t: float,
    sources: Sequence[Source],
) -> None:
    """Raise an InvalidValueError, with the command to use in its place, for a target in steps if
    steps and times are not in one ratio.

    Between two snapshots nobody knows then when a step was: with batches of random size the errors
    of the last 20 steps were 200 to 990 times the predicted ones.
    """
    if clock.is_even:
        return
    folder = sources[0].path.parent
    for target in targets:
        if not target.counts_steps:
            continue
        if isinstance(clock, EpochClock):
            reason = f"must be given: {target.title} counts steps, and the numbers of these "
            command = UNSPECIFIED.command(folder, steps_per_epoch="N")
            reason += "checkpoints are epochs"
            raise InvalidValueError("steps_per_epoch", reason, f"paste: {command}")
        reason = f"counts steps, and this run's steps are not equally long in {sources[0].t_unit}"
        same = target.on_clock(t, clock).split(" ", 1)
        words = ["ema", "synthesize", str(folder), *same, "--out", "average.safetensors"]
        hint = f"for the same length on the run's clock, paste: {shlex.join(words)}"
        raise InvalidValueError("target", reason, hint, value=target.title)


def _choose_sources(
    sources: Sequence[Source],
    targets: Sequence[Target],
    t: float,
) -> tuple[list[Source], list[Source]]:
    """Choose the sources to combine, at or before `t`, which the coefficients of a `Mean` refer to,
    too; and later ones."""
    available = [source for source in sources if source.t <= t]
    usable, later = choose_sources(sources, t)
    chosen = {id(source): source for source in usable}
    for target in targets:
        if isinstance(target, Mean):
            coefficients = target.compute_coefficients([source.profile for source in available])
            for index in np.flatnonzero(coefficients):
                source = available[index]
                chosen[id(source)] = source
    return by_time(chosen.values()), later


def _profiles(
    targets: Sequence[Target],
    usable: Sequence[Source],
    clock: Clock,
    t: float,
) -> list[Any]:
    """Find the profile of each target, or the coefficients of a `Mean`."""
    first = min(source.t_first for source in usable)
    profiles = list[Any]()
    for target in targets:
        if isinstance(target, Mean):
            profiles.append(target.compute_coefficients([source.profile for source in usable]))
        else:
            profiles.append(target.profile(t, clock, first))
    return profiles


def _check_errors(plan: Plan, max_error: float | None) -> None:
    """Raise an InexactError for a target whose predicted error is larger than a limit, or
    unknown."""
    if max_error is None:
        return
    for index, target in enumerate(plan.targets):
        error = plan.predicted_error(index)
        if error is None:
            reason = "its error cannot be predicted: too few snapshots to measure the motion of "
            hint = "set no limit on the error, or take more snapshots"
            raise InexactError(target.title, f"{reason}the network", hint)
        if error > max_error:
            predicted = f"the predicted error is {100 * error:.3g} %"
            accepted = f"above the accepted {100 * max_error:.3g} %"
            hint = "the error curve shows what these snapshots can make"
            raise InexactError(target.title, f"{predicted}, {accepted}", hint)


def _target_time(
    sources: Sequence[Source],
    t: float | None,
    step: int | None,
) -> float:
    """Find the time of the targets, by default of the newest source, or raise an
    InvalidValueError."""
    times = {source.step: source.t for source in sources}
    at_most_one(t=t, step=step)
    if t is not None:
        return check_within("t", t, times.values())
    if step is not None and sources[0].t_unit == "epochs":
        reason = "does not apply: the numbers of these checkpoints are epochs"
        raise InvalidValueError("step", reason, "give t in epochs", value=step)
    if step is None:
        return max(times.values())
    check_within("step", step, times.keys())
    check_number("step", step, float.is_integer, "be a whole number")
    if step in times:
        return times[step]
    if all(t == s for s, t in times.items()):
        return float(step)
    before = max(s for s in times if s < step)
    after = min(s for s in times if s > step)
    reason = f"lies between the snapshots at {before:,} and {after:,}"
    raise InvalidValueError(
        "step",
        reason,
        f"take one of them, or give t in {sources[0].t_unit}",
        value=step,
    )


def _warn_of_poor_targets(
    plan: Plan,
    known: Sequence[Source],
    prior: Prior,
) -> None:
    """Log the targets whose errors lose more than SMALL_LOSS of the gain, and the sigma_rels that
    lose less."""
    losses = plan.lost_gains
    titles = [plan.targets[index].title for index in np.flatnonzero(losses > SMALL_LOSS)]
    if not titles:
        return
    errors = np.hypot(plan.reconstruction.predicted_error, plan.output_rounding)
    error = percent(float(errors.max()))
    if len(titles) > 1:
        error = f"up to {error}"
    snapshots = [source.profile for source in known]
    curve = error_curve("", snapshots, prior, t=plan.t, method=plan.method)
    sources = count_sources(plan.sources, plan.solved)
    origin = f"from the {sources} up to t = {plan.t:,.12g}"
    first = seen_from(0.0, [source.profile for source in plan.sources])
    if first > plan.t / 2:
        origin += f", which show nothing of the training before t = {first:,.4g}"
    if curve.assumption:
        origin += f", if {curve.assumption}"
    log.warning(
        "%s: predicted error %s %s; it loses %s of the gain; %s",
        list_first(titles),
        error,
        origin,
        at_most(float(losses.max())),
        curve.good_range,
    )

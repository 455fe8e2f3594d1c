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
    list_first,
    percent,
)
from posthoc_cli.files import check_path
from posthoc_cli.planning import SMALL_LOSS, CurveRequest, error_curve
from posthoc_cli.profiles import FloatArray, PowerFunction
from posthoc_cli.reconstruction import (
    ROUNDING,
    Reconstruction,
    check_method,
    lost_gain,
    seen_from,
)
from posthoc_cli.request import Request
from posthoc_cli.run_clock import EpochClock
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.output_info import OutputInfo, Used
from posthoc_cli.snapshots.selection import Selection, check_globs
from posthoc_cli.snapshots.source import Source, StoredTensors, TrackedTensor
from posthoc_cli.snapshots.sources import (
    Choice,
    Sources,
    announce_doubts,
    count_files,
    count_sources,
)
from posthoc_cli.synthesis.base import (
    Base,
    Mixing,
    find_base,
    measure_mixing,
    mixed_names,
    note_lacking,
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
    def opened(self) -> Sequence[StoredTensors]:
        """All that is read."""
        return self.sources

    def summed(self, name: str) -> Sequence[StoredTensors]:  # noqa: ARG002
        """Find the sources that a tensor is a sum of."""
        return self.sources

    def factors(self, name: str) -> FloatArray | None:  # noqa: ARG002
        """Find the factors of these sources, [sources, targets]."""
        return self.coefficients

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
        for name in self.tensors:
            total += sum(source.entries[name].nbytes for source in self.summed(name))
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
    chosen: Choice = field(repr=False, compare=False)  # the sources that were solved for
    t: float
    method: str
    reconstruction: Reconstruction  # coefficients [sources, targets], errors [targets]
    # snapshots or checkpoints, as `count_files` counts them, that were solved for
    solved: int = 0
    available: int = 0  # number of all of them at or before `t`
    run_end: float = 0.0  # time of the newest source, used or not
    steps: float | None = None  # of the run at `t`; None if its clock is not in one ratio to steps
    base: Base | None = None  # pretrained weights that the averages are mixed with

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

    @property
    def opened(self) -> Sequence[StoredTensors]:
        return self.sources if self.base is None else (*self.sources, self.base)

    def summed(self, name: str) -> Sequence[StoredTensors]:
        if self.base is None or name not in self.base.entries:
            return self.sources
        return (*self.sources, self.base)

    def factors(self, name: str) -> FloatArray:
        if self.base is None or name not in self.base.entries:
            return self.coefficients
        kept = (1 - self.base.share) * self.coefficients
        return np.vstack([kept, np.full((1, len(self.targets)), self.base.share)])

    @cached_property
    def _mixings(self) -> list[Mixing]:
        if self.base is None:
            return [Mixing(1.0, 0.0) for _ in self.targets]
        columns = self.coefficients.T
        names = self.mixed_names
        return [measure_mixing(self.base, names, self.sources, each) for each in columns]

    @property
    def mixed_names(self) -> list[str]:
        """The tensors to make that a base may have a share in."""
        return [name for name in mixed_names(self.newest) if name in self.tensors]

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
        if error is None:
            return None
        mixing = self._mixings[target]
        return math.hypot(mixing.scale * error, mixing.rounding, self.output_rounding)

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

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """A line about the targets whose errors lose more than SMALL_LOSS of the gain, and the
        sigma_rels that lose less."""
        losses = self.lost_gains
        titles = [self.targets[index].title for index in np.flatnonzero(losses > SMALL_LOSS)]
        if not titles:
            return ()
        errors = np.hypot(self.reconstruction.predicted_error, self.output_rounding)
        error = percent(float(errors.max()))
        if len(titles) > 1:
            error = f"up to {error}"
        profiles = self.chosen.known_profiles
        request = CurveRequest(t=self.t, method=self.method)
        curve = error_curve("", profiles, self.chosen.known_prior, request)
        sources = count_sources(self.sources, self.solved)
        origin = f"from the {sources} up to t = {self.t:,.12g}"
        first = seen_from(0.0, [source.profile for source in self.sources])
        if first > self.t / 2:
            origin += f", which show nothing of the training before t = {first:,.4g}"
        if curve.assumption:
            origin += f", if {curve.assumption}"
        lost = f"it costs {at_most(float(losses.max()))} of what averaging gains"
        return (
            f"{list_first(titles)}: predicted error {error} {origin}; {lost}; {curve.good_range}",
        )

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
            base=None if self.base is None else str(self.base.path),
            base_hash=None if self.base is None else self.base.identity,
            base_share=None if self.base is None else self.base.share,
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
            if self.base is not None:
                values |= {
                    name: getattr(info, name) for name in ("base", "base_hash", "base_share")
                }
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
    sources = sources if isinstance(sources, Sources) else Sources.of(sources)
    check_known(sources)
    wished = request.wished
    method = check_method(request.method)
    time = sources.time(request.t, request.step)
    check_steps(wished, sources, time)
    choice = sources.choose(time, [target for target in wished if isinstance(target, Mean)])
    result = sources.solver(choice, method).reconstruct(_find_profiles(wished, choice))
    usable = choice.usable_sources
    used = np.flatnonzero(np.any(result.coefficients != 0, axis=1)).tolist()
    newest = usable[-1]
    if usable[used[-1]].t < newest.t and newest.copies:  # which the output has
        used.append(len(usable) - 1)
    plan = Plan(
        sources=tuple(usable[i] for i in used),
        targets=wished,
        chosen=choice,
        t=time,
        method=method,
        reconstruction=result.subset(snapshots=used),
        dtype=parse_dtype(request.dtype),
        solved=count_files(usable),
        available=choice.available,
        run_end=sources.t,
        steps=float(sources.clock.step_at(time)) if sources.clock.is_even else None,
    )
    plan = _select_tensors(plan, request.selection)
    if request.base is not None and request.base_share is not None:
        base = find_base(
            check_path("base", request.base), request.base_share, plan.newest, plan.names
        )
        plan = replace(plan, base=base)
    _check_errors(plan, request.max_error)
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


def check_known(sources: Sources) -> None:
    """Raise an InvalidValueError for an average whose decay was not looked for."""
    for source in sources:
        if not source.is_known:
            reason = f"{source.name} is an average of unknown decay"
            raise InvalidValueError("sources", reason, "open them with `Run(place).sources`")


def check_steps(targets: Sequence[Target], sources: Sources, t: float) -> None:
    """Raise an InvalidValueError, with the command to use in its place, for a target in steps if
    steps and times are not in one ratio.

    Between two snapshots nobody knows then when a step was: with batches of random size the errors
    of the last 20 steps were 200 to 990 times the predicted ones.
    """
    clock = sources.clock
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
        reason = f"counts steps, and this run's steps are not equally long in {sources.t_unit}"
        same = target.on_clock(t, clock).split(" ", 1)
        words = ["ema", "synthesize", str(folder), *same, "--out", "average.safetensors"]
        hint = f"for the same length on the run's clock, paste: {shlex.join(words)}"
        raise InvalidValueError("target", reason, hint, value=target.title)


def _find_profiles(targets: Sequence[Target], choice: Choice) -> list[Any]:
    """Find the profile of each target, or the coefficients of a `Mean`."""
    sources = choice.sources
    profiles = list[Any]()
    for target in targets:
        if isinstance(target, Mean):
            profiles.append(target.compute_coefficients(choice.profiles))
        else:
            profiles.append(target.profile(choice.t, sources.clock, sources.t_first))
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


def note_base(plan: Plan) -> None:
    """Say which averages have no share of the base."""
    if plan.base is not None:
        note_lacking(plan.base, plan.mixed_names)


def announce_plan(plan: Plan) -> None:
    """Log what speaks against averages before they are used."""
    announce_doubts(plan.chosen.sources)
    note_base(plan)
    for warning in plan.warnings:
        log.warning("%s", warning)

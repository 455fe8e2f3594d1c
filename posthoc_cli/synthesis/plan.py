"""The plan of a synthesis: its snapshots, their coefficients and the content of the outputs, from
headers alone."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_cli.dtypes import EPS, parse_dtype
from posthoc_cli.errors import (
    InexactError,
    InvalidValueError,
    check_alone,
    check_max_error,
    check_number,
    first_of,
    percent,
    shown,
)
from posthoc_cli.planning import GOOD_ERROR, check_within, error_curve
from posthoc_cli.profiles import Clock, FloatArray, PowerFunction, Profile
from posthoc_cli.reconstruction import (
    ROUNDING,
    Prior,
    Reconstruction,
    check_method,
    reconstruct,
    seen_from,
)
from posthoc_cli.snapshots.snapshot import OutputInfo, Used
from posthoc_cli.snapshots.sources import (
    Source,
    StoredTensors,
    TrackedTensor,
    by_time,
    chosen_up_to,
    counted,
    source_prior,
    target_clock,
)
from posthoc_cli.snapshots.tensorfile import Box, Entry
from posthoc_cli.targets import Groups, Mean, Target, as_target, separate

if TYPE_CHECKING:
    import torch


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Tensors to make of sources: those of the newest one as they are; in a `Plan`, sums.

    Tensors that a source stores in fewer bytes than float32 are summed in float32, all others and
    parameters in float64 in float64: large coefficients of both signs would cost a float32 sum too
    many digits.
    """

    sources: tuple[StoredTensors, ...]  # by time
    # safetensors name of the averages' dtype in the outputs; None for each parameter's own
    dtype: str | None = None
    # those of outputs that do not follow from `dtype`
    dtypes: Mapping[str, str] = field(default_factory=dict)
    subset: frozenset[str] | None = None  # the stored tensors to make; None for all
    # what to make in place of complete tensors
    boxes: Mapping[str, Box] = field(default_factory=dict)
    # the beginning of stored names, and what replaces it
    strip_prefix: str = ""
    prefix: str = ""

    @property
    def coefficients(self) -> FloatArray | None:
        """Those of sums, [sources, targets]."""
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
        """All names of each tensor to make, that of the stored one first."""
        names = {name: [self._renamed(name)] for name in self.tensors}
        for alias, name in self.newest.aliases.items():
            if name in names:
                names[name].append(self._renamed(alias))
        return names

    def _renamed(self, name: str) -> str:
        return self.prefix + name.removeprefix(self.strip_prefix)

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
        """Return the safetensors name of a tensor's dtype in the outputs: copies and statistics
        keep their own."""
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
    """Return the bytes of all tensors."""
    return sum(entry.nbytes for entry in entries.values())


@dataclass(frozen=True, kw_only=True)
class Plan(Combination):
    """The snapshots and the coefficients that make the targets."""

    # those in use, all at or before `t`; if there are copies, also the newest one
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    t: float
    method: str
    # coefficients [sources, columns], errors [columns]; `Groups` has a column per group
    reconstruction: Reconstruction
    # number of sources at or before `t` that were solved for, at most `reconstruction.MOST_SOLVED`
    solved: int = 0
    available: int = 0  # number of all sources at or before `t`
    last: float = 0.0  # time of the newest source, used or not

    def __repr__(self) -> str:
        parts = []
        for index, target in enumerate(self.targets):
            error = percent(self.predicted_error(index))
            parts.append(f"{target.title} (predicted error {error})")
        return f"Plan(at t = {self.t:,.12g} from {counted(self.sources)}: {first_of(parts)})"

    @property
    def choice(self) -> str | None:
        """A text that says how many of very many sources were used; None if all were used."""
        if self.solved == self.available:
            return None
        counts = counted(self.sources, self.solved, self.available)
        return f"{counts} up to t = {self.t:,.12g}, evenly in time"

    @property
    def coefficients(self) -> FloatArray:
        return self.reconstruction.coefficients

    @cached_property
    def columns(self) -> list[dict[str, int]]:
        """For each target the index of its column by glob on tensor names; only targets of `Groups`
        have several."""
        numbers = count()
        columns = []
        for target in self.targets:
            globs = target.widths if isinstance(target, Groups) else "*"
            columns.append({glob: next(numbers) for glob in globs})
        return columns

    def passes(self) -> list[Plan]:
        """Return plans with one column per target, each for some of the tensors, which together
        make all tensors.

        Raises an InvalidValueError if a tensor is in no group, or a group has no tensor.
        """
        if not any(isinstance(target, Groups) for target in self.targets):
            return [self]
        subsets = defaultdict[tuple[int, ...], list[str]](list)
        for name in self.names:
            columns = tuple(self._column(name, globs) for globs in self.columns)
            subsets[columns].append(name)
        if self.subset is None:
            self._check_groups(set().union(*subsets))
        separated = separate(self.targets)
        passes = list[Plan]()
        for columns, names in subsets.items():
            plan = replace(
                self,
                targets=tuple(separated[column] for column in columns),
                subset=frozenset(names),
                reconstruction=self.reconstruction.of(targets=columns),
            )
            passes.append(plan)
        return passes

    def _column(
        self,
        name: str,
        columns: Mapping[str, int],
    ) -> int:
        """Return the column of a target for a tensor: that of the first glob that matches."""
        for glob, column in columns.items():
            if any(fnmatchcase(alias, glob) for alias in self.names[name]):
                return column
        reason = f"tensor {shown(name)} matches no group"
        hint = "add '*=0.1' for the rest"
        raise InvalidValueError("group", reason, hint, value=", ".join(columns))

    def _check_groups(self, used: set[int]) -> None:
        for columns in self.columns:
            for glob, column in columns.items():
                if column not in used:
                    examples = first_of(map(shown, self.names), 3)
                    reason = "matches no tensor that is not in a group before it; there are "
                    raise InvalidValueError("group", reason + examples, value=repr(glob))

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
        """Return the expected relative L2 error of a target's output weights, for `Groups` the
        largest of the groups; None if the motion of the run is not known."""
        largest = 0.0
        for column in self.columns[target].values():
            error = self.reconstruction.known_error(column)
            if error is None:
                return None
            largest = max(largest, error)
        return math.hypot(largest, self.output_rounding)

    def profile_error(self, target: int) -> float:
        """Return the relative L2 distance between a target's profile and the one made, for `Groups`
        the largest."""
        columns = list(self.columns[target].values())
        errors = self.reconstruction.profile_error[columns]
        return float(errors.max())

    def output_info(self, target: int) -> OutputInfo:
        """Return the metadata of a target's output; the snapshots of groups are listed one group
        after another."""
        wished = self.targets[target]
        gamma = None
        if wished.sigma_rel is not None:
            gamma = PowerFunction.from_sigma_rel(wished.sigma_rel, self.t).gamma
        used = list[Used]()
        for column in self.columns[target].values():
            coefficients = self.coefficients[:, column].tolist()
            used += map(Used, (source.name for source in self.sources), coefficients)
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
        """Return the run, its motion, and each target's coefficients and errors, as plain values
        for JSON."""
        prior = self.reconstruction.prior
        motion = prior.motion
        targets = []
        for index in range(len(self.targets)):
            info = self.output_info(index)
            values: dict[str, Any] = {"target": info.profile}
            for name in ("sigma_rel", "t", "method", "profile_error", "predicted_error"):
                values[name] = getattr(info, name)
            values["snapshots"] = [vars(used) for used in info.snapshots]
            targets.append(values)
        return {
            "run": self.sources[-1].run_id,
            "movement": {
                "source": prior.source,
                "pieces": motion.walk.size,
                "has_noise": bool(motion.noise.any()),
            },
            "solved_with": self.solved,
            "available": self.available,
            "targets": targets,
        }


def plan_synthesis(
    sources: Sequence[Source],
    targets: Sequence[Target | Profile | float | str],
    t: float | None = None,
    step: int | None = None,
    method: str | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | str | None = None,
) -> Plan:
    """Choose snapshots and coefficients. No tensor is read, except a sample if headers have no
    measurements.

    Arguments:
        sources: averages of one run, in any order. If more than `reconstruction.MOST_SOLVED` are at
            or before the time of the targets, that many are used, chosen by their times alone, so
            for any targets alike (`Plan.choice`).
        targets: at least one; each a sigma_rel in (0, 0.2887), a `targets.Target`, or an object
            with a function `tail` over training time.
        t: time of the targets; sources at or before it are used. By default the time of the newest
            source.
        step: the same in calls of `update_`; if the run's clock does not count steps, it must be
            that of a snapshot.
        method: the solver; None for the default one.
        max_error: the largest predicted error to accept.
        dtype: dtype of the averages in the outputs; None for each parameter's own. Buffers keep
            their own.

    Raises:
        InvalidValueError: an argument is invalid; the error names it and what would be accepted.
        InexactError: the predicted error of a target exceeds `max_error`, or is not known.
    """
    method = check_method(method)
    output_dtype = parse_dtype(dtype)
    check_max_error(max_error)
    wished = _wished(targets)
    time = _target_time(sources, t, step)
    usable, later = _chosen(sources, wished, time)
    known = [*usable, *later]  # later snapshots also measure the motion
    prior = source_prior(known)
    result = _solved(wished, usable, target_clock(sources), time, method, prior)
    used = _used(result, usable)
    times = [source.t for source in sources]
    plan = Plan(
        sources=tuple(usable[i] for i in used),
        targets=wished,
        t=time,
        method=method,
        reconstruction=result.of(snapshots=used),
        dtype=output_dtype,
        solved=len(usable),
        available=sum(each <= time for each in times),
        last=max(times),
    )
    plan.passes()  # raises an error if groups and tensors do not fit
    _check_errors(plan, max_error)
    _warn_of_poor_targets(plan, known, prior)
    return plan


def _wished(targets: Sequence[Target | Profile | float | str]) -> tuple[Target, ...]:
    if not targets:
        raise InvalidValueError("sigma_rel", "at least one value is needed, in (0, 0.2887)")
    return tuple(map(as_target, targets))


def _used(
    result: Reconstruction,
    usable: Sequence[Source],
) -> list[int]:
    """Return the indices of the sources with coefficients, and of the newest one, whose copies are
    those of the output."""
    has_coefficient = np.any(result.coefficients != 0, axis=1)
    used: list[int] = np.flatnonzero(has_coefficient).tolist()
    newest = usable[-1]
    if usable[used[-1]].t < newest.t and newest.copies:
        used.append(len(usable) - 1)
    return used


def _chosen(
    sources: Sequence[Source],
    targets: Sequence[Target],
    t: float,
) -> tuple[list[Source], list[Source]]:
    """Return the sources to combine, at or before `t`, which are those of a `Mean`, too; and later
    ones."""
    available = [source for source in sources if source.t <= t]
    usable, later = chosen_up_to(sources, t)
    chosen = {id(source): source for source in usable}
    for target in separate(targets):
        if isinstance(target, Mean):
            profiles = [source.profile for source in available]
            column = target.coefficients_of(profiles)
            for index in np.flatnonzero(column):
                source = available[index]
                chosen[id(source)] = source
    return by_time(chosen.values()), later


def _solved(
    targets: Sequence[Target],
    usable: Sequence[Source],
    clock: Clock,
    t: float,
    method: str,
    prior: Prior,
) -> Reconstruction:
    """Return the coefficients of the usable sources; errors contain what targets may also be, as
    far as the clock is unknown."""
    snapshots = [source.profile for source in usable]
    first = min(source.t_first for source in usable)
    bent = clock.bent()
    profiles = list[Any]()
    others = dict[int, Profile]()
    for index, target in enumerate(separate(targets)):
        if isinstance(target, Mean):
            profiles.append(target.coefficients_of(snapshots))
            continue
        profiles.append(target.profile(t, clock, first))
        if bent is not clock and target.counts_steps:
            others[index] = target.profile(t, bent, first)
    known = prior.of(range(len(usable)))
    return reconstruct(snapshots, profiles, method, known, t, others)


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
    """Return the time of the targets, by default of the newest source, or raise an
    InvalidValueError."""
    times = {source.step: source.t for source in sources}
    check_alone(t=t, step=step)
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
    """Log the targets with a predicted error above GOOD_ERROR, and the sigma_rels with a smaller
    one."""
    errors = np.hypot(plan.reconstruction.predicted_error, plan.output_rounding)
    targets = separate(plan.targets)
    titles = [targets[index].title for index in np.flatnonzero(errors > GOOD_ERROR)]
    if not titles:
        return
    worst = percent(float(errors.max()))
    if len(titles) > 1:
        worst = f"up to {worst}"
    snapshots = [source.profile for source in known]
    curve = error_curve("", snapshots, prior, t=plan.t, method=plan.method)
    sources = counted(plan.sources, plan.solved)
    origin = f"from the {sources} up to t = {plan.t:,.12g}"
    first = seen_from(0.0, [source.profile for source in plan.sources])
    if first > plan.t / 2:
        origin += f", which show nothing of the training before t = {first:,.4g}"
    if curve.assumption:
        origin += f", if {curve.assumption}"
    log.warning("%s: predicted error %s %s; %s", first_of(titles), worst, origin, curve.good_range)

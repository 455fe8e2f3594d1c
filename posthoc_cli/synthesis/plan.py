"""What will be made of what, known from headers alone."""

from __future__ import annotations

import logging
import math
import numbers
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from posthoc_cli.dtypes import EPS, ITEM_BYTES, parse_dtype
from posthoc_cli.errors import InexactError, InvalidValueError, VanishedError
from posthoc_cli.planning import Candidate, error_curve
from posthoc_cli.profiles import PowerFunction, Profile
from posthoc_cli.reconstruction import ROUNDING, Reconstruction, check_method, reconstruct
from posthoc_cli.snapshots.format import SnapshotInfo, TensorSpec, of_segment_at
from posthoc_cli.snapshots.measurements import chosen_up_to, run_clock
from posthoc_cli.snapshots.outputs import OutputInfo
from posthoc_cli.synthesis.sources import Source, distinct_dtypes, source_prior
from posthoc_cli.targets import Target, as_target

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

POOR_ERROR = 0.01
"""Predicted error above which a synthesis is made with a warning."""


@dataclass(frozen=True)
class Plan:
    """What will be made of what, known before the tensors are read.

    Attributes:
        sources: the averages in use, all at or before `t`, and the newest one where there are copies.
        targets: what is wanted.
        t: its time.
        method: the solver.
        reconstruction: coefficients [sources, targets] and errors [targets].
        output_rounding: root mean square error of rounding the results to the outputs' dtype, relative to them.
        places: of each source among those that were solved with, by time; its number here where there are none.
        aside: how many sources are not used since they are of other tensors: from before the model changed, or after.
        solved: how many sources, all at or before `t`, the coefficients were sought for.
        there: how many there are; of more than `planning.MOST_SOLVED` some are chosen, see `planning.choose`.
        last: time of the newest source, used or not.
        coarse: tensors that one of those solved with stores in fewer bytes than float32 has. The others are summed in
            float64: large coefficients of both signs would leave of a float32 sum fewer digits than they have.
    """

    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    t: float
    method: str
    reconstruction: Reconstruction
    output_rounding: float = 0.0
    places: tuple[int, ...] = ()
    aside: int = 0
    solved: int = 0
    there: int = 0
    last: float = 0.0
    coarse: frozenset[str] = frozenset()

    @property
    def choice(self) -> str | None:
        """What was chosen of very many sources, in words; None where all were worked with."""
        if self.solved == self.there:
            return None
        counts = f"{self.solved:,} of {self.there:,} snapshots up to t = {self.t:,.12g}"
        return f"{counts}, spread as thinning would leave them"

    @property
    def newest(self) -> Source:
        """The last source: copies (buffers) come from it."""
        return max(self.sources, key=lambda source: source.info.t)

    @property
    def read_bytes(self) -> int:
        """Bytes that a synthesis reads."""
        return sum(source.nbytes for source in self.sources)

    def specs(self, dtype: torch.dtype | str | None = None) -> list[TensorSpec]:
        """The output's tensors, under every name. `dtype`: see `synthesize`."""
        dtypes = {
            name: output_dtype(tensor.role, tensor.dtype, dtype) for name, tensor in self.newest.info.tensors.items()
        }
        names, shapes = names_by_tensor(self.newest.info), self.newest.shapes
        return [TensorSpec(alias, dtypes[name], shapes[name]) for name in dtypes for alias in names[name]]

    def only(self, targets: Sequence[int]) -> Plan:
        """The same plan for some of the targets."""
        chosen = list(targets)
        return replace(
            self,
            targets=tuple(self.targets[i] for i in chosen),
            reconstruction=self.reconstruction.of(targets=chosen),
        )

    def predicted_error(self, target: int) -> float | None:
        """Expected relative L2 error of one target's weights as they are put out.

        None where nothing is known of the run's movement.
        """
        error = self.reconstruction.known_error(target)
        return None if error is None else math.hypot(error, self.output_rounding)

    def output_info(self, target: int) -> OutputInfo:
        """What the output for one target will say about itself."""
        info = self.newest.info
        wanted = self.targets[target]
        column = self.reconstruction.coefficients[:, target]
        width = wanted.sigma_rel
        return OutputInfo(
            run_id=info.run_id,
            profile=wanted.title,
            sigma_rel=width,
            gamma=None if width is None else PowerFunction.from_sigma_rel(width, self.t).gamma,
            t=self.t,
            t_unit=info.t_unit,
            method=self.method,
            profile_error=float(self.reconstruction.profile_error[target]),
            predicted_error=self.predicted_error(target),
            snapshots=tuple((source.name, float(c)) for source, c in zip(self.sources, column, strict=True)),
            copies=tuple(
                alias
                for name, names in names_by_tensor(info).items()
                for alias in names
                if info.tensors[name].role == "copy"
            ),
        )


def plan_synthesis(
    sources: Sequence[Source],
    targets: Sequence[Target | Profile | float],
    t: float | None = None,
    step: int | None = None,
    method: str | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | str | None = None,
) -> Plan:
    """Choose snapshots and coefficients. Reads no tensor, but a sample where headers have no measurements.

    Arguments:
        sources: averages of one run, in any order. Of more than `planning.MOST_SOLVED` at or before the time of the
            targets so many are worked with, by their times alone: the same for any targets (`Plan.choice`).
        targets: at least one; each a sigma_rel in (0, 0.2887), a `targets.Target`, or an object with `density` and
            `tail` over training time.
        t: time of the targets: the average as it stood then, from sources at or before it. By default the
            time of the last one.
        step: the same in calls of the hook; for runs on a clock of their own it must be a snapshot's.
        method: the solver; the default one for None.
        max_error: the largest predicted error to accept.
        dtype: what the results will be rounded to (see `synthesize`); its error is part of the predicted one.

    Raises:
        InvalidValueError: naming the argument and what would be accepted.
        InexactError: a target would have a predicted error above `max_error`, or one that cannot be known.
    """
    method = check_method(method)
    if not targets:
        raise InvalidValueError("sigma_rel", "at least one value is needed, in (0, 0.2887)")
    if max_error is not None and not max_error > 0:
        raise InvalidValueError("max_error", "must be above 0, such as 0.01", value=f"{max_error!r}")
    wanted = tuple(as_target(target) for target in targets)
    time = _target_time(sources, t, step)
    alike = _alike(sources, time)
    usable, later = chosen_up_to(alike, time)
    clock = run_clock([source.info for source in alike])
    first = min(source.info.t_first for source in usable)
    wanted_profiles = [target.profile(time, clock, first) for target in wanted]
    profiles = [source.info.profile.pure for source in usable]
    # All sources tell how the network moved, also those that are too late to be used.
    everything = source_prior([*usable, *later])
    prior = everything.of(range(len(usable)))
    result = reconstruct(profiles, wanted_profiles, method, prior, time)
    used = _used(usable, result)
    rounding = _output_rounding(usable[-1], dtype)
    chosen = tuple(usable[i] for i in used)
    counts = len(sources) - len(alike), len(usable), sum(source.info.t <= time for source in alike)
    last, coarse = max(source.info.t for source in sources), _coarse_tensors(usable)
    plan = Plan(chosen, wanted, time, method, result.of(snapshots=used), rounding, tuple(used), *counts, last, coarse)
    if max_error is not None:
        _check_errors(plan, max_error)
    stored = [source.info.profile.pure for source in (*usable, *later)]
    _warn_of_poor_targets(plan, Candidate.of_run("", stored, everything))
    return plan


def _coarse_tensors(sources: Sequence[Source]) -> frozenset[str]:
    """Tensors that one of the sources stores in fewer bytes than float32 has."""
    return frozenset(
        name for types, _ in distinct_dtypes(sources) for name, dtype in types.items() if ITEM_BYTES[dtype] < 4
    )


def _used(usable: Sequence[Source], result: Reconstruction) -> list[int]:
    """The sources, by time, that a target needs; copies come from the newest, whether its average is needed or not."""
    used: list[int] = np.flatnonzero(np.any(result.coefficients != 0, axis=1)).tolist()
    has_copies = any(tensor.role == "copy" for tensor in usable[-1].info.tensors.values())
    if has_copies and usable[used[-1]].info.t < usable[-1].info.t:
        used.append(len(usable) - 1)
    return used


def _target_time(sources: Sequence[Source], t: float | None, step: int | None) -> float:
    if not sources:
        raise InvalidValueError("snapshots", "there are none to synthesize from")
    times = sorted({source.info.t for source in sources})
    for what, value in (("t", t), ("step", step)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise InvalidValueError(f"{what} {value!r}", "must be a number")
    if t is not None and step is not None:
        raise InvalidValueError("t and step", "give one of them")
    if step is not None:
        return _time_of_step(sources, step)
    if t is None:
        return times[-1]
    if not times[0] <= t <= times[-1]:
        raise InvalidValueError(
            "t",
            f"must lie between the first snapshot, {times[0]:,.12g}, and the last, {times[-1]:,.12g}",
            value=f"{t:.12g}",
        )
    return float(t)


def _alike(sources: Sequence[Source], time: float) -> list[Source]:
    """The sources that have the tensors that the model had at a time."""
    alike = of_segment_at(sources, time)
    last = max(source.info.t for source in alike)
    if time > last:
        after = min(source.info.t for source in sources if source.info.t > time)
        raise InvalidValueError(
            "t",
            f"the model's tensors changed between the snapshots at {last:,.12g} and {after:,.12g}",
            "take one of them",
            value=f"{time:.12g}",
        )
    return alike


def _time_of_step(sources: Sequence[Source], step: int) -> float:
    times = {source.info.step: source.info.t for source in sources}
    first, last = min(times), max(times)
    if step != int(step):
        raise InvalidValueError("step", "must be a whole number", value=f"{step!r}")
    if not first <= step <= last:
        raise InvalidValueError(
            "step", f"must lie between the first snapshot, {first:,}, and the last, {last:,}", value=step
        )
    if step in times:
        return times[step]
    if all(t == s for s, t in times.items()):
        return float(step)
    before, after = max(s for s in times if s < step), min(s for s in times if s > step)
    unit = sources[0].info.t_unit
    raise InvalidValueError(
        "step",
        f"between the snapshots at {before:,} and {after:,}",
        f"take one of them, or give t in {unit}",
        value=step,
    )


def _output_rounding(source: Source, dtype: torch.dtype | str | None) -> float:
    """Of the averages of a source, were they put out in `dtype`; as if elements of all tensors were alike."""
    elements, squares, shapes = 0, 0.0, source.shapes
    for name, tensor in source.info.tensors.items():
        if tensor.role == "average":
            count = math.prod(shapes[name])
            elements += count
            squares += count * (ROUNDING * EPS.get(output_dtype(tensor.role, tensor.dtype, dtype), 0.0)) ** 2
    return math.sqrt(squares / elements) if elements else 0.0


def _check_errors(plan: Plan, max_error: float) -> None:
    for index, target in enumerate(plan.targets):
        error = plan.predicted_error(index)
        if error is None:
            raise InexactError(
                target.title,
                "its error cannot be predicted: too few snapshots to tell how far the network moves",
                "make it without a limit on the error, or from more snapshots",
            )
        if error > max_error:
            raise InexactError(
                target.title,
                f"the predicted error is {100 * error:.3g} %, above the accepted {100 * max_error:.3g} %",
                "ema error-plot shows what these snapshots can make",
            )


def _warn_of_poor_targets(plan: Plan, candidate: Candidate) -> None:
    errors = np.hypot(plan.reconstruction.predicted_error, plan.output_rounding)
    poor = [index for index, error in enumerate(errors) if error > POOR_ERROR]
    if not poor:
        return
    titles = [plan.targets[index].title for index in poor]
    curve = error_curve(candidate, t=plan.t, method=plan.method)
    log.warning(
        "%s: the %d snapshots up to t = %g cannot make it well: predicted error %s%.2g %%%s; "
        "below 1 %% is sigma_rel %s",
        ", ".join(titles[:5]) + (f" and {len(poor) - 5} more" if len(poor) > 5 else ""),
        sum(profile.t <= plan.t for profile in candidate.snapshots),
        plan.t,
        "up to " * (len(poor) > 1),
        100 * float(errors[poor].max()),
        f", if {candidate.assumption}" if candidate.assumption else "",
        curve.ranges_text(POOR_ERROR) or "no value",
    )


def output_dtype(role: str, own: str, dtype: torch.dtype | str | None) -> str:
    """The safetensors name of an output tensor's dtype: copies keep their own."""
    if role == "copy" or dtype is None:
        return own
    return parse_dtype(dtype) or own


def names_by_tensor(info: SnapshotInfo) -> dict[str, list[str]]:
    """Every name that a stored tensor goes by, its own first."""
    names = defaultdict(list, {name: [name] for name in info.tensors})
    for alias, name in info.aliases.items():
        names[name].append(alias)
    return names


# --- Readers take no lock: what they have planned with may be thinned away before they open it. Then they ---


ATTEMPTS = 100
"""Plans at most: a writer that removes a file at each of them is no training."""

_T = TypeVar("_T")


def with_consistent_plan(make: Callable[[], Plan], use: Callable[[Plan], _T]) -> _T:
    """What `use` makes of a plan, made again as long as snapshots of it vanish before they are open.

    A file that is open stays readable when it is removed, and all are opened before anything is made of them.

    Arguments:
        make: plans with what is there; where headers have no measurements it reads tensors itself.
        use: opens the snapshots of the plan; must leave nothing behind when it raises.

    Raises:
        VanishedError: snapshots went away at every attempt.
        others: as `make` and `use`.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return use(make())
        except VanishedError as error:
            log.warning("%s; planning again with what is there", error)
    return use(make())

"""What will be made of what, known from headers alone."""

from __future__ import annotations

import logging
import numbers
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import PowerFunction, check_sigma_rel
from posthoc_cli.reconstruction import Reconstruction, check_method, reconstruct
from posthoc_cli.snapshots.format import OutputInfo, SnapshotInfo, TensorSpec, parse_dtype_word
from posthoc_cli.synthesis.sources import Source

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

POOR_PROFILE_ERROR = 0.1
"""Profile error above which a synthesis is made with a warning."""


@dataclass(frozen=True)
class Plan:
    """What will be made of what, known before any tensor is read.

    Attributes:
        sources: the averages in use, all at or before `t`.
        sigma_rels: the targets.
        t: their time.
        method: the solver.
        reconstruction: coefficients [sources, targets] and errors [targets].
    """

    sources: tuple[Source, ...]
    sigma_rels: tuple[float, ...]
    t: float
    method: str
    reconstruction: Reconstruction

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
        names = names_by_tensor(self.newest.info)
        return [TensorSpec(alias, dtypes[name], self.newest.shapes[name]) for name in dtypes for alias in names[name]]

    def only(self, targets: Sequence[int]) -> Plan:
        """The same plan for some of the targets."""
        chosen = list(targets)
        result = self.reconstruction
        return replace(
            self,
            sigma_rels=tuple(self.sigma_rels[i] for i in chosen),
            reconstruction=Reconstruction(result.coefficients[:, chosen], result.profile_error[chosen]),
        )

    def output_info(self, target: int) -> OutputInfo:
        """What the output for one target will say about itself."""
        info = self.newest.info
        column = self.reconstruction.coefficients[:, target]
        return OutputInfo(
            run_id=info.run_id,
            sigma_rel=self.sigma_rels[target],
            gamma=PowerFunction.from_sigma_rel(self.sigma_rels[target], self.t).gamma,
            t=self.t,
            t_unit=info.t_unit,
            method=self.method,
            profile_error=float(self.reconstruction.profile_error[target]),
            predicted_error=None,
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
    sigma_rels: Sequence[float],
    t: float | None = None,
    step: int | None = None,
    method: str | None = None,
) -> Plan:
    """Choose snapshots and coefficients.

    Arguments:
        sources: averages of one run, in any order.
        sigma_rels: targets, at least one, each in (0, 0.2887).
        t: time of the targets: the average as it stood then, from sources at or before it. By default the
            time of the last one.
        step: the same in calls of the hook; for runs on a clock of their own it must be a snapshot's.
        method: the solver; the default one for None.

    Raises:
        InvalidValueError: naming the argument and what would be accepted.
    """
    method = check_method(method)
    if not sigma_rels:
        raise InvalidValueError("sigma_rel: at least one value is needed, in (0, 0.2887)")
    targets = tuple(check_sigma_rel(sigma_rel) for sigma_rel in sigma_rels)
    time = _target_time(sources, t, step)
    usable = tuple(sorted((s for s in sources if s.info.t <= time), key=lambda s: (s.info.t, s.info.sigma_rel)))
    result = reconstruct(
        [source.info.profile.pure for source in usable],
        [PowerFunction.from_sigma_rel(sigma_rel, time) for sigma_rel in targets],
        method,
    )
    used = np.flatnonzero(np.any(result.coefficients != 0, axis=1))
    needed = Reconstruction(result.coefficients[used], result.profile_error)
    plan = Plan(tuple(usable[i] for i in used), targets, time, method, needed)
    _warn_of_poor_targets(plan)
    return plan


def _target_time(sources: Sequence[Source], t: float | None, step: int | None) -> float:
    if not sources:
        raise InvalidValueError("no snapshots to synthesize from")
    times = sorted({source.info.t for source in sources})
    for what, value in (("t", t), ("step", step)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise InvalidValueError(f"{what} {value!r}: must be a number")
    if t is not None and step is not None:
        raise InvalidValueError("t and step: give one of them")
    if step is not None:
        return _time_of_step(sources, step)
    if t is None:
        return times[-1]
    if not times[0] <= t <= times[-1]:
        raise InvalidValueError(
            f"t {t:g}: must lie between the first snapshot, {times[0]:g}, and the last, {times[-1]:g}"
        )
    return float(t)


def _time_of_step(sources: Sequence[Source], step: int) -> float:
    times = {source.info.step: source.info.t for source in sources}
    first, last = min(times), max(times)
    if step != int(step):
        raise InvalidValueError(f"step {step!r}: must be a whole number")
    if not first <= step <= last:
        raise InvalidValueError(f"step {step}: must lie between the first snapshot, {first}, and the last, {last}")
    if step in times:
        return times[step]
    if all(t == s for s, t in times.items()):
        return float(step)
    before, after = max(s for s in times if s < step), min(s for s in times if s > step)
    unit = sources[0].info.t_unit
    raise InvalidValueError(
        f"step {step}: between the snapshots at {before} and {after}; take one of them, or give t in {unit}"
    )


def _warn_of_poor_targets(plan: Plan) -> None:
    poor = [
        s for s, e in zip(plan.sigma_rels, plan.reconstruction.profile_error, strict=True) if e > POOR_PROFILE_ERROR
    ]
    if poor:
        worst = float(np.max(plan.reconstruction.profile_error))
        log.warning(
            "sigma_rel %s: the %d snapshots up to t = %g cannot make it well (profile error up to %.0f %%); "
            "ema error-plot shows what they can",
            ", ".join(f"{s:g}" for s in poor[:5]) + (f" and {len(poor) - 5} more" if len(poor) > 5 else ""),
            len(plan.sources),
            plan.t,
            100 * worst,
        )


def output_dtype(role: str, own: str, dtype: torch.dtype | str | None) -> str:
    """The safetensors name of an output tensor's dtype: copies keep their own."""
    if role == "copy" or dtype is None:
        return own
    return parse_dtype_word(dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")) or own


def names_by_tensor(info: SnapshotInfo) -> dict[str, list[str]]:
    """Every name that a stored tensor goes by, its own first."""
    names = defaultdict(list, {name: [name] for name in info.tensors})
    for alias, name in info.aliases.items():
        names[name].append(alias)
    return names

"""Coefficients times snapshots: any average of a run, tensor by tensor.

Two steps. `plan_synthesis` chooses snapshots and coefficients from headers alone; `synthesize` streams the
tensors. Every snapshot is read once for all targets together, and what is held at a time is one tensor of one
snapshot and one tensor a target. Sums are float32 (float64 for float64 parameters), whatever is stored.
"""

from __future__ import annotations

import logging
import numbers
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from posthoc_cli.errors import InvalidValueError, NonFiniteError
from posthoc_cli.profiles import PowerFunction, check_sigma_rel
from posthoc_cli.reconstruction import Reconstruction, check_method, reconstruct
from posthoc_cli.snapshots.format import OutputInfo, SnapshotInfo, TensorSpec, parse_dtype_word
from posthoc_cli.snapshots.reader import Snapshot, TensorFile
from posthoc_cli.snapshots.store import read_directory

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

POOR_PROFILE_ERROR = 0.1
"""Profile error above which a synthesis is made with a warning."""

Progress = Callable[[int], None]
"""Called with the number of bytes that were just read."""


# --- where averages come from ----------------------------------------------------------------------


class OpenSource(AbstractContextManager["OpenSource"], Protocol):
    """A source while its tensors are read."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored, on any device."""
        ...


class Source(Protocol):
    """A stored average: a snapshot on disk, or a live average in memory."""

    @property
    def name(self) -> str:
        """The file's name, or a word for an average in memory."""
        ...

    @property
    def info(self) -> SnapshotInfo:
        """What the average says about itself."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its tensors."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that reading all of it takes."""
        ...

    def open(self) -> OpenSource:
        """Start reading."""
        ...


@dataclass(frozen=True)
class DiskSource:
    """A snapshot file as a source."""

    snapshot: Snapshot

    @property
    def name(self) -> str:
        """The file's name."""
        return self.snapshot.path.name

    @property
    def info(self) -> SnapshotInfo:
        """What the snapshot says about itself."""
        return self.snapshot.info

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its tensors."""
        return {name: entry.shape for name, entry in self.snapshot.header.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of its payload."""
        return sum(entry.nbytes for entry in self.snapshot.header.tensors.values())

    def open(self) -> _OpenFile:
        """Open the file; it must still be the one that was planned with."""
        return _OpenFile(self.snapshot)


class _OpenFile:
    def __init__(self, snapshot: Snapshot) -> None:
        self._file = TensorFile(snapshot.path, snapshot.header)

    def read(self, name: str) -> torch.Tensor:
        from posthoc_cli.snapshots.tensors import tensor_from_bytes

        entry = self._file.header.tensors[name]
        return tensor_from_bytes(self._file.read(name), entry.dtype, entry.shape)

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def disk_sources(directory: str | Path) -> list[Source]:
    """The snapshots of a directory as sources; raises what `read_directory` raises."""
    return [DiskSource(snapshot) for snapshot in read_directory(Path(directory))]


# --- the plan --------------------------------------------------------------------------------------


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
            name: _output_dtype(tensor.role, tensor.dtype, dtype) for name, tensor in self.newest.info.tensors.items()
        }
        names = _names_by_tensor(self.newest.info)
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
                for name, names in _names_by_tensor(info).items()
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


# --- the work --------------------------------------------------------------------------------------


def synthesize(
    plan: Plan,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Stream the targets' tensors: (name, one tensor a target), on `device`.

    Arguments:
        plan: from `plan_synthesis`.
        dtype: of the averages; None for each parameter's own. Copies (buffers) keep their own.
        device: where the sums are made.
        progress: told the bytes read so far.

    Raises:
        FileFormatError: a snapshot is damaged, naming it and the tensor.
        NonFiniteError: a result is not finite, or `dtype` cannot hold it, naming the tensor.
    """
    from posthoc_cli.snapshots.tensors import torch_dtype

    info = plan.newest.info
    names = _names_by_tensor(info)
    with ExitStack() as stack:
        opened = [stack.enter_context(source.open()) for source in plan.sources]
        newest = opened[plan.sources.index(plan.newest)]
        for name, tensor in info.tensors.items():
            if tensor.role == "copy":
                values = [newest.read(name).to(device)] * len(plan.sigma_rels)
                if progress is not None:
                    progress(_read_bytes(plan, values[0]))
            else:
                values = _combine(plan, opened, name, device, progress)
                stored = torch_dtype(_output_dtype(tensor.role, tensor.dtype, dtype))
                for index, value in enumerate(values):
                    values[index] = _cast(name, value, stored)
            for alias in names[name]:
                yield alias, values
            del values  # not held while the next tensor is made


def _read_bytes(plan: Plan, value: torch.Tensor) -> int:
    """Progress for a copy: it is read from one source, but counted for all in `Plan.read_bytes`."""
    return len(plan.sources) * value.nbytes


def _combine(
    plan: Plan, opened: Sequence[OpenSource], name: str, device: torch.device | str, progress: Progress | None
) -> list[torch.Tensor]:
    """The sums over all sources, one a target. Each is a tensor of its own: callers keep them."""
    import torch

    wide = torch.float64 if plan.newest.info.tensors[name].dtype == "F64" else torch.float32
    sums = [torch.zeros(plan.newest.shapes[name], dtype=wide, device=device) for _ in plan.sigma_rels]
    for source, row in zip(opened, plan.reconstruction.coefficients, strict=True):
        value = source.read(name)
        nbytes = value.nbytes
        value = value.to(device, wide)
        for total, coefficient in zip(sums, row, strict=True):
            total.add_(value, alpha=float(coefficient))
        if progress is not None:
            progress(nbytes)
    return sums


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    import torch

    result = value.to(dtype)
    if not bool(torch.isfinite(result).all()):
        if bool(torch.isfinite(value).all()):
            largest = float(value.abs().max())
            raise NonFiniteError(
                f"tensor {name!r}: {dtype} cannot hold its largest value, {largest:.6g}; take float32 or bfloat16"
            )
        raise NonFiniteError(f"tensor {name!r}: the result is not finite; a snapshot holds nan or infinity")
    return result


def _output_dtype(role: str, own: str, dtype: torch.dtype | str | None) -> str:
    """The safetensors name of an output tensor's dtype: copies keep their own."""
    if role == "copy" or dtype is None:
        return own
    return parse_dtype_word(dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")) or own


def _names_by_tensor(info: SnapshotInfo) -> dict[str, list[str]]:
    names = defaultdict(list, {name: [name] for name in info.tensors})
    for alias, name in info.aliases.items():
        names[name].append(alias)
    return names


def parse_device(device: str) -> str:
    """The device to make sums on. "auto" is the CPU: for a few targets the bus would be the limit.

    Raises:
        InvalidValueError: not a device, or not there; says what is.
    """
    import torch

    available = ["cpu"]
    available += [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if device == "auto":
        return "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in available:
        raise InvalidValueError(f"device {device!r}: is not there; choose from auto, {', '.join(available)}")
    return wanted

"""Where a run goes on from its directory: snapshots of one time, as rounded as they are, or an exact state of then."""

from __future__ import annotations

import logging
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.reconstruction import ROUNDING, error_after_rounding
from posthoc_cli.snapshots.directory import StoredSnapshot, read_directory
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.reader import Snapshot, TensorFile, read_header
from posthoc_cli.snapshots.states import StateInfo, clock_at, decode_state
from posthoc_cli.snapshots.tensors import tensor_from_bytes, torch_dtype
from posthoc_cli.tracker.averages import Accumulators, RunningAverages, Standing
from posthoc_cli.tracker.layout import FlatTensors
from posthoc_cli.tracker.model_tensors import TrackedModel
from posthoc_cli.tracker.settings import Settings, check_count, check_sigma_rels
from posthoc_cli.tracker.state import TrackerState, check_profiles, host_layout, listed, unpack_state
from posthoc_cli.tracker.state_file import open_state

log = logging.getLogger(__name__)

STATE_NAME = "state.safetensors"
"""The file beside the snapshots that a tracker keeps its exact state in."""


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        snapshots: of one time, one a profile, by sigma_rel.
        kept: what the exact state beside them says, where it is of their time; else None.
    """

    snapshots: Mapping[float, Snapshot]
    kept: StateInfo | None

    @property
    def snapshot(self) -> Snapshot:
        """One of them: they say the same of everything but their averages."""
        return next(iter(self.snapshots.values()))

    @property
    def clock(self) -> ClockRecorder:
        """The run's clock up to the last call, which with a state may have come after the last update."""
        if self.kept is None:
            return ClockRecorder.of_knots(self.snapshot.info.clock_pairs)
        return clock_at(list(self.kept.clock), self.kept.step, self.kept.t)


def find_start(directory: Path, snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> Start | None:
    """The newest time that has a snapshot of every profile; None where no time has."""
    complete = _complete(snapshots, sigma_rels)
    if not complete:
        return None
    newest = complete[max(complete)]
    return Start(newest, _kept_state(directory, newest))


def snapshots_until(snapshots: Sequence[Snapshot], sigma_rels: Sequence[float], step: int | None) -> Sequence[Snapshot]:
    """Those up to a call, which must have a snapshot of every profile; all of them for None.

    Raises:
        InvalidValueError: it has not; names the calls that have.
    """
    if step is None:
        return snapshots
    step = check_count("step", step, 1)
    there = sorted({found[sigma_rels[0]].info.step for found in _complete(snapshots, sigma_rels).values()})
    if step not in there:
        shown = ", ".join(f"{one:,}" for one in there[-_MOST_NAMED:]) or "none"
        some = "..., " * (len(there) > _MOST_NAMED)
        raise InvalidValueError(
            "step",
            f"there are no snapshots of every profile ({listed(sigma_rels)}) of this call of update_; "
            f"of these there are: {some}{shown}",
            value=f"{step:,}",
        )
    return [snapshot for snapshot in snapshots if snapshot.info.step <= step]


_MOST_NAMED = 20


def _complete(snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> dict[float, dict[float, Snapshot]]:
    """The times that have a snapshot of every profile: time -> sigma_rel -> snapshot."""
    by_time: dict[float, dict[float, Snapshot]] = {}
    for snapshot in snapshots:
        if snapshot.info.sigma_rel in sigma_rels:
            by_time.setdefault(snapshot.info.t, {})[snapshot.info.sigma_rel] = snapshot
    return {t: found for t, found in by_time.items() if len(found) == len(sigma_rels)}


def resumed_profiles(
    snapshots: Sequence[Snapshot], chosen: Sequence[float] | types.EllipsisType = ...
) -> tuple[float, ...]:
    """The profiles to go on with: those that the run tracks, or the `chosen` ones, which must have snapshots.

    Raises:
        InvalidValueError: a chosen one has none.
    """
    tracked = snapshots[-1].info.sigma_rels
    if chosen is ...:
        return tracked
    there = {snapshot.info.sigma_rel for snapshot in snapshots}
    wanted = check_sigma_rels(chosen)
    check_profiles([sigma_rel for sigma_rel in tracked if sigma_rel in there], wanted)
    return wanted


# --- an exact state --------------------------------------------------------------------------------


def keeps_state(directory: Path, run_id: str) -> bool:
    """Whether a state of this run lies beside its snapshots."""
    found = _state_info(directory)
    return found is not None and found.run_id == run_id


def _kept_state(directory: Path, snapshots: Mapping[float, Snapshot]) -> StateInfo | None:
    """What the state says, if its averages are those that the snapshots hold, rounded."""
    found = _state_info(directory)
    if found is None:
        return None
    stored = [StoredSnapshot.of(snapshot) for snapshot in snapshots.values()]
    same = all(one.checksum in found.snapshots and one.t == found.averages_t for one in stored)
    if same and set(found.sigma_rels) >= set(snapshots):
        return found
    log.info("%s is not of the snapshots of t = %g; these are gone on from", directory / STATE_NAME, stored[0].t)
    return None


def _state_info(directory: Path) -> StateInfo | None:
    path = directory / STATE_NAME
    try:
        header = read_header(path) if path.is_file() else None
        return None if header is None or file_kind(header) != "state" else decode_state(path, header)
    except FileFormatError as error:
        _tell_of_damage(error)
        return None


def _tell_of_damage(error: FileFormatError) -> None:
    log.warning("%s; the averages go on from the snapshots, rounded as they are", error)


# --- in and out of the directory -------------------------------------------------------------------


def load_start(directory: Path, settings: Settings, tracked: TrackedModel, step: int | None = None) -> TrackerState:
    """What the run goes on with: the exact state, or else what the newest snapshots up to a call hold.

    Raises:
        DirectoryError: at no time are all profiles there.
        InvalidValueError: not at that call.
    """
    everything, sigma_rels = read_directory(directory), settings.sigma_rels
    snapshots = snapshots_until(everything, sigma_rels, step)
    start = find_start(directory, snapshots, sigma_rels)
    if start is None:
        there = sorted({snapshot.info.sigma_rel for snapshot in snapshots[-len(sigma_rels) :]})
        raise DirectoryError(
            directory,
            f"at no time is there a snapshot of every profile ({listed(sigma_rels)}) to go on from: go "
            f"on without some (the newest are of {listed(there)}) with from_path(..., sigma_rels=...), "
            "or begin a new run in another directory",
        )
    if start.kept is not None:
        try:
            with open_state(directory / STATE_NAME) as state:
                return unpack_state(state, settings, tracked)
        except FileFormatError as error:
            _tell_of_damage(error)
    return _rounded_state([start.snapshots[sigma_rel] for sigma_rel in sigma_rels], snapshots)


@torch.inference_mode(False)
@torch.no_grad()
def _rounded_state(chosen: Sequence[Snapshot], snapshots: Iterable[Snapshot]) -> TrackerState:
    """The averages as the `chosen` ones, one a profile, hold them; of `snapshots` those up to then are behind it."""
    last = chosen[0].info
    kept = Accumulators.zeros(host_layout(TrackedModel.of_snapshot(chosen[0])), len(chosen))
    inherited = tuple(_read_total(snapshot, total) for snapshot, total in zip(chosen, kept.totals, strict=True))
    standing = Standing(
        t=last.t,
        step=last.step,
        t_first=last.t_first,
        max_interval=last.max_interval,
        updates=last.updates,
        masses=(0.0,) * len(chosen),
        inherited=inherited,
    )
    sigma_rels = tuple(snapshot.info.sigma_rel for snapshot in chosen)
    averages = RunningAverages(sigma_rels, standing, kept, _read_copies(chosen[0]))
    behind = frozenset(StoredSnapshot.of(snapshot).checksum for snapshot in snapshots if snapshot.info.t <= last.t)
    clock = ClockRecorder.of_knots(last.clock_pairs)
    return TrackerState(last.run_id, last.step, last.t, clock, averages, behind, last.segment)


def _read_total(snapshot: Snapshot, total: FlatTensors) -> float:
    """Fill a total with a snapshot; returns the expected squared norm of the error that it has by then."""
    expected = 0.0
    with TensorFile(snapshot.path, snapshot.header) as file:
        for name, own in total.views.items():
            entry = snapshot.header.tensors[name]
            own.copy_(tensor_from_bytes(file.read(name), entry.dtype, entry.shape))
            if torch_dtype(entry.dtype).itemsize < own.dtype.itemsize:
                eps = torch.finfo(torch_dtype(entry.dtype)).eps
                expected += (ROUNDING * eps) ** 2 * float(torch.linalg.vector_norm(own)) ** 2
    info, measured = snapshot.info, snapshot.info.measurements
    before = [d for d in measured.distances if d.sigma_rel == info.sigma_rel] if measured is not None else []
    last = max(before, key=lambda d: d.t, default=None)
    moved, share = (math.inf, 1.0) if last is None else (last.squared, 1 - (last.t / info.t) ** (info.gamma + 1))
    rounding = expected if measured is None else measured.rounding
    found = error_after_rounding(info.inherited, rounding, expected, moved, share)
    return found if math.isfinite(found) else 0.0


def _read_copies(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    tensors = {}
    with TensorFile(snapshot.path, snapshot.header) as file:
        for name, tensor in snapshot.info.tensors.items():
            if tensor.role == "copy":
                entry = snapshot.header.tensors[name]
                tensors[name] = tensor_from_bytes(file.read(name), entry.dtype, entry.shape)
    return tensors

"""Measurements of snapshots: norms, rounding errors and distances of averages, in one pass over them.

Tensor by tensor, in chunks that stay in the cache. Differences of float32 values are taken in float32 (which rounds
each by up to 2^-24 of itself, up or down), their squares and sums in float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations

import torch

from posthoc_cli.errors import FileFormatError
from posthoc_cli.reconstruction import Distance, Measurements, roundings
from posthoc_cli.snapshots.directory import StoredSnapshot
from posthoc_cli.snapshots.format import SnapshotInfo
from posthoc_cli.snapshots.reader import TensorFile
from posthoc_cli.snapshots.tensors import tensor_from_bytes, torch_dtype
from posthoc_cli.tracker.model_tensors import EIGHT_BITS

log = logging.getLogger(__name__)

CPU_CHUNK = 30_000
"""Elements at a time on the CPU: a chunk stays in the cache, and has fewer than torch splits over threads (32,768),
whose thousands of barriers would wait for seconds beside data loaders that keep every core busy."""

DEVICE_CHUNK = 2**24
"""Elements at a time on an accelerator, where starting a kernel costs more than leaving the cache."""

_SMALL, _SPACING = 2.0**-120, 2.0**-149
"""Values below which float32 has few digits, and the distance between its smallest ones."""

Averages = Sequence[Mapping[str, torch.Tensor]]
"""The averages of one time, one a profile: equal names, shapes and, tensor by tensor, devices."""

Key = tuple[str, int, int]
"""What a sum is of: "norm", "rounding" or "arithmetic" of the average (i, i), its distance from the "network" (i, i),
the "live" distance of the averages (i, j), i < j, or the "earlier" distance of the average i from the snapshot j."""


def measure_live(
    infos: Sequence[SnapshotInfo], averages: Averages, earlier: Sequence[StoredSnapshot]
) -> list[Measurements | None]:
    """Measurements of averages that are not stored, and so not rounded; as `measure_stored`."""
    sums: dict[Key, float] = {}
    with _EarlierFiles(earlier) as files:
        for name in averages[0]:
            exact = dict(enumerate(_flat(average[name]) for average in averages))
            found = _sums_of(exact, {}, files.read(name, exact[0].device))
            _add(sums, found | _lost_below_normal(exact, infos, found))
        return [_measurements(sums, infos, index, files.readable()) for index in range(len(infos))]


def measure_stored(
    infos: Sequence[SnapshotInfo],
    averages: Averages,
    earlier: Sequence[StoredSnapshot],
    network: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Measurements | None], list[dict[str, torch.dtype]]]:
    """Measurements of averages that will be stored, and the dtypes to store them in, by name; one a profile each.

    Measurements are None where a value is not finite, or the squares are too large for float64. A dtype is the
    wanted one, or wider where that would lose more than its rounding, see `_widened`.

    Arguments:
        infos: headers of the averages; all of one time.
        earlier: snapshots to take distances to. They are read from disk and verified; one that is gone or damaged
            is left out, with a warning. Memory: a tensor of each at a time.
        network: its values at that time, where they are known.
    """
    sums: dict[Key, float] = {}
    storage: list[dict[str, torch.dtype]] = [{} for _ in infos]
    with _EarlierFiles(earlier) as files:
        for name in averages[0]:
            exact = {index: _flat(average[name]) for index, average in enumerate(averages)}
            wanted = {i: torch_dtype(o.schedule.checkpoint_dtype or o.tensors[name].dtype) for i, o in enumerate(infos)}
            own = None if network is None else _flat(network[name].detach())
            found = _sums_of(exact, wanted, files.read(name, exact[0].device), own)
            for index, dtypes in enumerate(storage):
                dtypes[name] = _widened(exact, wanted, index, found)
            _add(sums, found | _lost_below_normal(exact, infos, found))
        return [_measurements(sums, infos, index, files.readable()) for index in range(len(infos))], storage


def _measurements(
    sums: Mapping[Key, float], infos: Sequence[SnapshotInfo], index: int, earlier: Mapping[int, StoredSnapshot]
) -> Measurements | None:
    """The measurements of the average of that index, from its sums over all tensors."""
    norm = sums.get(("norm", index, index), 0.0)
    if not math.isfinite(norm):
        return None
    distances = [
        Distance(other.t, other.sigma_rel, sums.get(("live", min(index, j), max(index, j)), 0.0), 0.0)
        for j, other in enumerate(infos)
        if j != index
    ]
    distances += [
        Distance(s.t, s.sigma_rel, sums.get(("earlier", index, j), 0.0), s.info.measurements.rounding)
        for j, s in earlier.items()
        if s.info.measurements is not None
    ]
    # The difference of two large numbers may overflow where neither does.
    finite = tuple(distance for distance in distances if math.isfinite(distance.squared))
    network = sums.get(("network", index, index))
    known = network is not None and math.isfinite(network)
    rounding, arithmetic = (sums.get((kind, index, index), 0.0) for kind in ("rounding", "arithmetic"))
    return Measurements(norm, rounding, finite, network if known else None, arithmetic)


def _add(sums: dict[Key, float], more: Mapping[Key, float]) -> None:
    for key, value in more.items():
        sums[key] = sums.get(key, 0.0) + value


def _sums_of(
    averages: Mapping[int, torch.Tensor],
    stored: Mapping[int, torch.dtype],
    earlier: Mapping[int, torch.Tensor],
    network: torch.Tensor | None = None,
) -> dict[Key, float]:
    """All sums of one tensor, flat in averages, earlier snapshots and the network; `stored` are dtypes of storage."""
    first = averages[min(averages)]
    chunk = CPU_CHUNK if first.device.type == "cpu" else DEVICE_CHUNK
    total: dict[Key, torch.Tensor] = {}
    for begin in range(0, first.numel(), chunk):
        part = slice(begin, begin + chunk)
        cut, cut_earlier = ({index: t[part] for index, t in tensors.items()} for tensors in (averages, earlier))
        for key, square in _squares(cut, stored, cut_earlier, None if network is None else network[part]):
            total[key] = total[key] + square if key in total else square
    # One synchronisation a tensor, not one a sum.
    return dict(zip(total, torch.stack(list(total.values())).tolist(), strict=True)) if total else {}


def _squares(
    averages: Mapping[int, torch.Tensor],
    stored: Mapping[int, torch.dtype],
    earlier: Mapping[int, torch.Tensor],
    network: torch.Tensor | None,
) -> Iterator[tuple[Key, torch.Tensor]]:
    """The sums of one chunk, float64 scalars."""
    for i, average in averages.items():
        yield ("norm", i, i), _square(average)
        if i in stored:
            yield ("rounding", i, i), _square(average - _with_arithmetic(average.to(stored[i])))
        if network is not None:
            yield ("network", i, i), _square(average - network.to(average.device, average.dtype))
    for i, j in combinations(averages, 2):
        yield ("live", i, j), _square(averages[i] - averages[j])
    for j, snapshot in earlier.items():
        for i, average in averages.items():
            yield ("earlier", i, j), _square(average - snapshot)


def _square(values: torch.Tensor) -> torch.Tensor:
    """The squared norm of a vector, float64."""
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _with_arithmetic(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in EIGHT_BITS else tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A vector of the elements, row-major, on a device that has float64: not on Apple's GPUs."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).reshape(-1)


def _widened(
    averages: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.dtype], index: int, sums: dict[Key, float]
) -> torch.dtype:
    """The dtype to store a tensor in: the wanted one, or wider where that would lose more than its rounding.

    Rounding to nearest costs at most half a unit in the last place, eps / 2 relative. More is lost where a value
    is too large (infinity), or where all are so small that they lie among or below the subnormal numbers. The
    rounding in `sums` becomes that of the returned dtype.
    """
    norm, rounding = ("norm", index, index), ("rounding", index, index)
    for dtype in (wanted[index], torch.float32):
        if dtype != wanted[index]:
            again = _sums_of({index: averages[index]}, {index: dtype}, {})
            sums[rounding] = again[rounding]
        lost = sums.get(rounding, 0.0)
        if math.isfinite(lost) and lost <= (torch.finfo(dtype).eps / 2) ** 2 * sums.get(norm, 0.0):
            return dtype
    sums[rounding] = 0.0
    return averages[index].dtype


def _lost_below_normal(
    averages: Mapping[int, torch.Tensor], infos: Sequence[SnapshotInfo], sums: Mapping[Key, float]
) -> dict[Key, float]:
    """Expected squared errors of float32 averages whose values lie among float32's subnormal numbers.

    These have one spacing, whatever their size. A product is rounded at every update; sums of multiples are exact.
    """
    return {
        ("arithmetic", i, i): average.numel() * _SPACING**2 / 12 * roundings(info.gamma, info.updates or info.step)
        for (i, average), info in zip(averages.items(), infos, strict=True)
        if average.dtype == torch.float32 and 0 < sums.get(("norm", i, i), 0.0) < average.numel() * _SMALL**2
    }


class _EarlierFiles(ExitStack):
    """Snapshots that are read beside the averages; one that cannot be read is left out, with a warning."""

    def __init__(self, snapshots: Sequence[StoredSnapshot]) -> None:
        super().__init__()
        self._snapshots = snapshots
        self._files: dict[int, TensorFile] = {}

    def __enter__(self) -> _EarlierFiles:
        for index, snapshot in enumerate(self._snapshots):
            with self._left_out_on_error(index):
                file = self.enter_context(TensorFile(snapshot.path))
                if file.header.metadata.get("ema.checksum") != snapshot.checksum:
                    raise FileFormatError(snapshot.path, "was replaced by another file")
                self._files[index] = file
        return self

    def readable(self) -> dict[int, StoredSnapshot]:
        """Those that have been read without an error so far, by index."""
        return {index: self._snapshots[index] for index in self._files}

    def read(self, name: str, device: torch.device) -> dict[int, torch.Tensor]:
        """One tensor of each that is readable, flat, by index."""
        tensors = {}
        for index, file in list(self._files.items()):
            with self._left_out_on_error(index):
                entry = file.header.tensors[name]
                value = tensor_from_bytes(file.read(name), entry.dtype, entry.shape).reshape(-1)
                tensors[index] = _with_arithmetic(value).to(device)
        return tensors

    @contextmanager
    def _left_out_on_error(self, index: int) -> Iterator[None]:
        try:
            yield
        except FileFormatError as error:
            log.warning("%s; new snapshots are written without their distance to it", error)
            self._files.pop(index, None)

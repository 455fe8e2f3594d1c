"""What snapshots say about themselves: norms, roundings and distances of averages, in one pass over them.

Tensor by tensor, in chunks that stay in the cache. Differences of float32 values are taken in float32 (which
rounds each by up to 2^-24 of itself, either way), their squares and sums in float64.
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
"""Elements at a time on the CPU. They stay in the cache, and are fewer than torch splits over threads (32,768): beside
data loaders that keep every core busy, the thousands of barriers in between would wait for seconds."""

DEVICE_CHUNK = 2**24
"""Elements at a time on an accelerator, where starting a kernel costs more than leaving the cache."""

_SMALL, _SPACING = 2.0**-120, 2.0**-149
"""Values below which float32 has few digits, and the distance between its smallest ones."""

Averages = Sequence[Mapping[str, torch.Tensor]]
"""The averages of one time, one a profile: equal names, shapes and, tensor by tensor, devices."""


def measure_live(
    infos: Sequence[SnapshotInfo], averages: Averages, earlier: Sequence[StoredSnapshot]
) -> list[Measurements | None]:
    """Measurements of averages that are not stored, and so not rounded; as `measure_stored`."""
    sums = _Sums()
    with _EarlierFiles(earlier) as files:
        for name in averages[0]:
            exact = dict(enumerate(_flat(average[name]) for average in averages))
            sums.add(_sums_of(exact, {}, files.read(name, exact[0].device)))
        known = [snapshot if index in files.readable else None for index, snapshot in enumerate(earlier)]
    return [sums.measurements(infos, index, known) for index in range(len(infos))]


def measure_stored(
    infos: Sequence[SnapshotInfo],
    averages: Averages,
    earlier: Sequence[StoredSnapshot],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> tuple[list[Measurements | None], list[dict[str, torch.dtype]]]:
    """Measurements of averages that will be stored, and the dtypes to store them in, by name; one a profile each.

    Measurements are None where a value is not finite, or the squares are too large for float64. A dtype is the
    wanted one, or wider where that would lose more than its rounding, see `_widened`.

    Arguments:
        infos: headers of the averages; all of one time.
        earlier: snapshots to take distances to. They are read from disk and verified; one that is gone or damaged
            is left out, with a warning. Memory: a tensor of each at a time.
        weights: the network's at that time, where they are at hand.
    """
    sums = _Sums()
    storage: list[dict[str, torch.dtype]] = [{} for _ in infos]
    with _EarlierFiles(earlier) as files:
        for name in averages[0]:
            exact = {index: _flat(average[name]) for index, average in enumerate(averages)}
            wanted = {i: torch_dtype(o.schedule.checkpoint_dtype or o.tensors[name].dtype) for i, o in enumerate(infos)}
            own = None if weights is None else _flat(weights[name].detach())
            found = _sums_of(exact, wanted, files.read(name, exact[0].device), own)
            for index, chosen in enumerate(storage):
                chosen[name] = _widened(exact, wanted, index, found)
                lost = _lost_below_normal(exact[index], infos[index], found.get(("norm", index, index), 0.0))
                found["rounding", index, index] = found.get(("rounding", index, index), 0.0) + lost
            sums.add(found)
        known = [snapshot if index in files.readable else None for index, snapshot in enumerate(earlier)]
    return [sums.measurements(infos, index, known) for index in range(len(infos))], storage


# --- sums ------------------------------------------------------------------------------------------

Key = tuple[str, int, int]
"""What a sum is of: "norm" or "rounding" of the average (i, i), its distance to the "weights" (i, i), the "live"
distance of the averages (i, j), i < j, or the "earlier" distance of the average i from the earlier snapshot j."""


class _Sums:
    """Sums of squares over the tensors so far."""

    def __init__(self) -> None:
        self._values: dict[Key, float] = {}

    def add(self, sums: Mapping[Key, float]) -> None:
        """Take in those of one more tensor."""
        for key, value in sums.items():
            self._values[key] = self._values.get(key, 0.0) + value

    def measurements(
        self, infos: Sequence[SnapshotInfo], index: int, earlier: Sequence[StoredSnapshot | None]
    ) -> Measurements | None:
        """What the average of that index says; `earlier` holds None for what could not be read."""
        norm = self._of("norm", index, index)
        if not math.isfinite(norm):
            return None
        distances = [
            Distance(other.t, other.sigma_rel, self._of("live", min(index, j), max(index, j)), 0.0)
            for j, other in enumerate(infos)
            if j != index
        ]
        distances += [
            Distance(s.t, s.sigma_rel, self._of("earlier", index, j), s.info.measurements.rounding)
            for j, s in enumerate(earlier)
            if s is not None and s.info.measurements is not None
        ]
        # The difference of two large numbers may overflow where neither does.
        finite = tuple(distance for distance in distances if math.isfinite(distance.squared))
        weights = self._values.get(("weights", index, index))
        known = weights is not None and math.isfinite(weights)
        return Measurements(norm, self._of("rounding", index, index), finite, weights if known else None)

    def _of(self, what: str, i: int, j: int) -> float:
        return self._values.get((what, i, j), 0.0)


def _sums_of(
    averages: Mapping[int, torch.Tensor],
    stored: Mapping[int, torch.dtype],
    earlier: Mapping[int, torch.Tensor],
    weights: torch.Tensor | None = None,
) -> dict[Key, float]:
    """All sums of one tensor, flat in averages, earlier snapshots and the network; `stored` are dtypes of storage."""
    first = averages[min(averages)]
    chunk = CPU_CHUNK if first.device.type == "cpu" else DEVICE_CHUNK
    total: dict[Key, torch.Tensor] = {}
    for begin in range(0, first.numel(), chunk):
        part = slice(begin, begin + chunk)
        squares = _squares(
            _cut(averages, part), stored, _cut(earlier, part), None if weights is None else weights[part]
        )
        for key, square in squares:
            total[key] = total[key] + square if key in total else square
    # One synchronisation a tensor, not one a sum.
    return dict(zip(total, torch.stack(list(total.values())).tolist(), strict=True)) if total else {}


def _squares(
    averages: Mapping[int, torch.Tensor],
    stored: Mapping[int, torch.dtype],
    earlier: Mapping[int, torch.Tensor],
    weights: torch.Tensor | None,
) -> Iterator[tuple[Key, torch.Tensor]]:
    """The sums of one chunk, float64 scalars."""
    for i, average in averages.items():
        yield ("norm", i, i), _square(average)
        if i in stored:
            yield ("rounding", i, i), _square(average - _promotable(average.to(stored[i])))
        if weights is not None:
            yield ("weights", i, i), _square(average - weights.to(average.device, average.dtype))
    for i, j in combinations(averages, 2):
        yield ("live", i, j), _square(averages[i] - averages[j])
    for j, snapshot in earlier.items():
        for i, average in averages.items():
            yield ("earlier", i, j), _square(average - snapshot)


def _square(values: torch.Tensor) -> torch.Tensor:
    """The squared norm of a vector, float64."""
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _promotable(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a dtype that torch subtracts from any other: not in 8 bits."""
    return tensor.float() if tensor.dtype in EIGHT_BITS else tensor


def _cut(tensors: Mapping[int, torch.Tensor], part: slice) -> dict[int, torch.Tensor]:
    return {index: tensor[part] for index, tensor in tensors.items()}


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A vector of the elements, row-major, where there is float64: not on Apple's GPUs."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).reshape(-1)


# --- how to store ----------------------------------------------------------------------------------


def _widened(
    averages: Mapping[int, torch.Tensor], wanted: Mapping[int, torch.dtype], index: int, sums: dict[Key, float]
) -> torch.dtype:
    """The dtype to store a tensor in: the wanted one, or wider where that would lose more than its rounding.

    Rounding to nearest costs at most half a unit in the last place, eps / 2 relative. More is lost where a value
    is too large (infinity), or where all are so small that they lie among or below the subnormal numbers. The
    rounding in `sums` becomes that of what is chosen.
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


def _lost_below_normal(average: torch.Tensor, info: SnapshotInfo, norm: float) -> float:
    """Expected squared error of a float32 average whose values lie among float32's subnormal numbers; else 0.

    These have one spacing, whatever their size. A product and a sum are rounded at every update.
    """
    if average.dtype != torch.float32 or not 0 < norm < average.numel() * _SMALL**2:
        return 0.0
    return average.numel() * _SPACING**2 / 12 * 2 * roundings(info.gamma, info.updates or info.step)


# --- earlier snapshots -----------------------------------------------------------------------------


class _EarlierFiles(ExitStack):
    """Snapshots that are read beside the averages; whichever cannot be is left out, with a warning."""

    def __init__(self, snapshots: Sequence[StoredSnapshot]) -> None:
        super().__init__()
        self._snapshots = snapshots
        self._files: dict[int, TensorFile] = {}

    def __enter__(self) -> _EarlierFiles:
        for index, snapshot in enumerate(self._snapshots):
            with self._left_out_on_error(index):
                file = self.enter_context(TensorFile(snapshot.path))
                if file.header.metadata.get("ema.checksum") != snapshot.checksum:
                    raise FileFormatError(snapshot.path, "was replaced by another hand")
                self._files[index] = file
        return self

    @property
    def readable(self) -> frozenset[int]:
        """Indices of those of which everything could be read so far."""
        return frozenset(self._files)

    def read(self, name: str, device: torch.device) -> dict[int, torch.Tensor]:
        """One tensor of each that is readable, flat, by index."""
        tensors = {}
        for index, file in list(self._files.items()):
            with self._left_out_on_error(index):
                entry = file.header.tensors[name]
                value = tensor_from_bytes(file.read(name), entry.dtype, entry.shape).reshape(-1)
                tensors[index] = _promotable(value).to(device)
        return tensors

    @contextmanager
    def _left_out_on_error(self, index: int) -> Iterator[None]:
        try:
            yield
        except FileFormatError as error:
            log.warning("%s; the snapshots of now are written without their distance to it", error)
            self._files.pop(index, None)

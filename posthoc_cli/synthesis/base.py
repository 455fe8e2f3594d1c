"""A share of pretrained weights in averages: the tensors that a checkpoint has of a run, and what
mixing makes of the error."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from posthoc_cli.checkpoints.layouts import Stored
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import MismatchError, list_first
from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction import ROUNDING
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.sampling import read_elements
from posthoc_cli.snapshots.selection import running_statistics
from posthoc_cli.snapshots.source import ElementRange, StoredTensors

log = logging.getLogger(__name__)

_SAMPLED = 1024  # elements of a tensor that its norm is estimated from


class Base(StoredTensors):
    """Pretrained weights, by the names of a run, and their share in averages.

    BatchNorm's statistics of a mix are those of neither: the average's own stay.
    """

    knows_buffers = False
    t = 0.0

    def __init__(self, source: Checkpoint, names: Mapping[str, str], share: float) -> None:
        self.path = source.path
        self.files = source.files
        self.entries = {name: source.entries[own] for name, own in names.items()}
        self.tensors = {name: source.tensors[own] for name, own in names.items()}
        self.aliases = {}
        self.share = share
        self.identity = source.identity
        self._source = source
        self._names = names

    @property
    def name(self) -> str:
        return self.path.name

    def cells(self, name: str) -> int:
        return self._source.cells(self._names[name])

    def read_box(
        self, name: str, box: Box, out: memoryview, begin: int = 0, verify: bool = True
    ) -> None:
        self._source.read_box(self._names[name], box, out, begin, verify)

    def read_many(self, names: Sequence[str], out: memoryview) -> None:
        self._source.read_many([self._names[name] for name in names], out)

    def read_together(self, ranges: Sequence[ElementRange]) -> FloatArray | None:
        renamed = [each._replace(name=self._names[each.name]) for each in ranges]
        return self._source.read_together(renamed)


class Mixing(NamedTuple):
    """What a base makes of the error of an average."""

    scale: float  # of the average's relative error
    rounding: float  # the base's, relative to the mix


def find_base(
    path: Path, share: float, newest: StoredTensors, names: Mapping[str, Sequence[str]]
) -> Base:
    """Find the tensors of a checkpoint that averages are mixed with. The averages are of tensors of
    the newest source, by their stored names; `names` has all names of each.

    Raises the errors of `Stored`, and a MismatchError if it has none of them, or one of another
    shape.
    """
    source = Stored(path, raw=True).weights
    known = source.entries.keys() | source.aliases.keys()
    averages = {name: names[name] for name in mixed_names(newest) if name in names}
    (old, new), *others = fit_prefixes(averages.values(), known) or [("", "")]
    if others:
        reason = f"the names of the run fit under {new} and {others[0][1]}"
        raise MismatchError(path, reason, "name a file that holds one model")
    found = {}
    for name, aliases in averages.items():
        fitting = sorted(rename(aliases, old, new) & known)
        if fitting:
            own = source.aliases.get(fitting[0], fitting[0])
            entry = source.entries[own]
            check_shape(path, own, entry.shape, newest.entries[name].shape)
            if entry.dtype not in EPS:
                raise MismatchError(
                    path, f"its weights are quantized: tensor {own!r} is {entry.dtype}"
                )
            found[name] = own
    if not found:
        reason = f"has none of the averages' tensors, such as {min(averages)!r}"
        raise MismatchError(path, f"{reason}; it has tensors such as {min(known)!r}")
    return Base(source, found, share)


def mixed_names(newest: StoredTensors) -> list[str]:
    """List the tensors that a base may have a share in."""
    statistics = running_statistics(newest.tensors)
    names = []
    for name, tensor in newest.tensors.items():
        if tensor.role == "average" and tensor.dtype in EPS and name not in statistics:
            names.append(name)
    return names


def note_lacking(base: Base, names: Collection[str]) -> None:
    """Say which of the averages have no share of the base."""
    lacking = [name for name in names if name not in base.entries]
    if lacking:
        log.info(
            "%s: lacks %d of %d tensors, which stay the average's: %s",
            base.path,
            len(lacking),
            len(names),
            list_first(lacking),
        )


def measure_mixing(
    base: Base, names: Iterable[str], sources: Sequence[StoredTensors], coefficients: FloatArray
) -> Mixing:
    """Estimate what mixing with a base makes of the error of averages of these names, which have a
    coefficient for each source, from the first elements of each tensor."""
    ranges = []
    weights = []
    for name in names:
        size = sources[-1].entries[name].size
        count = min(size, _SAMPLED)
        ranges.append(ElementRange(name, 0, count))
        weights += [size / max(count, 1)] * count
    average = np.zeros(len(weights))
    for source, coefficient in zip(sources, coefficients.tolist(), strict=True):
        average += coefficient * read_elements(source, ranges)
    is_mixed = np.repeat([each.name in base.entries for each in ranges], _sizes(ranges))
    pretrained = np.zeros(len(weights))
    pretrained[is_mixed] = read_elements(
        base, [each for each in ranges if each.name in base.entries]
    )
    spacings = np.repeat([_spacing(base, each.name) for each in ranges], _sizes(ranges))
    kept = np.where(is_mixed, 1 - base.share, 1.0)
    mix = _norm(kept * average + base.share * pretrained, weights)
    if mix == 0:
        return Mixing(1.0, 0.0)
    error = _norm(kept * average, weights) / mix
    return Mixing(error, base.share * ROUNDING * _norm(spacings * pretrained, weights) / mix)


def _sizes(ranges: Iterable[ElementRange]) -> list[int]:
    return [end - begin for _, begin, end in ranges]


def _spacing(base: Base, name: str) -> float:
    return EPS[base.entries[name].dtype] if name in base.entries else 0.0


def _norm(values: FloatArray, weights: Sequence[float]) -> float:
    return math.sqrt(float(np.square(values) @ np.array(weights)))


# --- names


def fit_prefixes(tensors: Iterable[Iterable[str]], known: Collection[str]) -> list[tuple[str, str]]:
    """Find the prefix in the names of tensors, of which each may have several, and the one in its
    place under which most of them are known; several pairs if they fit as many, none without a fit.
    """
    ends: dict[str, list[str]] = {}
    for name in known:
        for end in _ends(name):
            ends.setdefault(end, []).append(name.removesuffix(end))
    counts = Counter[tuple[str, str]]()
    for names in tensors:
        pairs = set()
        for name in names:
            found = next((end for end in _ends(name) if end in ends), "")
            pairs |= {(name.removesuffix(found), new) for new in ends.get(found, [])}
        counts.update(pairs)
    most = max(counts.values(), default=0)
    return sorted(pair for pair, count in counts.items() if count == most)


def _ends(name: str) -> list[str]:
    """List what follows the dots of a name, the longest first."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def rename(names: Iterable[str], old: str, new: str) -> set[str]:
    """Replace the beginning of names."""
    return {new + name.removeprefix(old) if name.startswith(old) else name for name in names}


def check_shape(path: Path, name: str, shape: Sequence[int], average: Sequence[int]) -> None:
    """Raise a MismatchError that names the file if a tensor does not have the shape of its
    average."""
    if tuple(shape) != tuple(average):
        reason = f"tensor {name!r} has the shape {list(shape)}, the average {list(average)}"
        raise MismatchError(path, reason)

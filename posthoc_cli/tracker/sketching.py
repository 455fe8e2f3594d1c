"""The path of the network's weights, projected to a few numbers at every fold: see `reconstruction.Sketch`.

Of the elements that are measured (`measuring.Subset`) each is multiplied by a random sign and the root of how many it
stands for, and added to one of the numbers, which is drawn for its place in a row. It is linear, and depends on the
places of elements alone: not on threads, tiles or devices. Of statistics there is no path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from posthoc_cli.profiles import new_value_share, sketched_window_ends
from posthoc_cli.reconstruction import Sketch
from posthoc_cli.snapshots.format import Path
from posthoc_cli.tracker.layout import Tile
from posthoc_cli.tracker.measuring import Subset, mixed

Numbers = npt.NDArray[np.float64]

NUMBERS = 64
"""D of a projection: squared lengths are right within 1 +- sqrt(2 / D), 0.18."""

ROW = 1021
"""Places in a row, which are added up first: a prime, so that a column of a matrix is not in one place."""

MOST_WINDOWS = 1024
"""Windows of a sketch; where there are more, each two become one."""

_PENDING = 64
"""Windows whose numbers may still be on an accelerator: to fetch them, one waits for it."""


class Sketcher:
    """Projects the weights' means over windows; from any of a crew's threads, one window at a time."""

    def __init__(self, subset: Subset, part: int = 0) -> None:
        """Begin a path of a model, or of the part of this number, whose signs are independent."""
        self.subset = subset
        names = [(bucket.names, bucket.shapes, str(bucket.wide)) for bucket in subset.layout]
        told = repr((part, names, [*subset.sizes], subset.edges.tolist()))
        self._projection = xxhash.xxh3_64_intdigest(told.encode()) >> 1
        self._sketch: Sketch | None = None
        self._values = subset.room()
        factors = np.repeat(np.sqrt(subset.scales), np.diff(subset.edges)) * _signs(int(subset.edges[-1]), part)
        drawn = torch.split(torch.from_numpy(factors), subset.counts)
        self._factors = [own.to(room) for own, room in zip(drawn, self._values, strict=True)]
        self._pending: list[tuple[float, float, bool, list[torch.Tensor]]] = []
        self._begin = self._t = 0.0  # of the open window, and of the last value in it
        self._open: Numbers | None = None  # its mean up to what is pending

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(own.nbytes for own in (*self._values, *self._factors))

    def goes_on(self, path: Path) -> bool:
        """Go on from a path, if it is of the same projection; a last window of no folds is open."""
        is_own = path.projection == self._projection
        if is_own:
            self._sketch, self._open = _opened(path.sketch)
            self._begin, self._t = float(self._sketch.edges[-1]), float(path.sketch.edges[-1])
        return is_own

    def take(self, tile: Tile, values: torch.Tensor) -> None:
        """Take in a tile of a window's mean, or of a value."""
        self.subset.take(tile, values, self._values)

    def end_window(self, t: float) -> None:
        """All tiles of a window's mean have been taken in, whose last update was at time `t`."""
        self._add(t, 1.0, True)

    def end_value(self, gammas: Sequence[float], t: float, is_last: bool) -> None:
        """All tiles of the values at time `t` have been taken in, with which a window may end; the last one does."""
        begin, before = self._begin, self._t
        share = new_value_share(gammas[0], before, t) / new_value_share(gammas[0], begin, t)
        self._add(t, share, is_last or sketched_window_ends(gammas, begin, before, t))

    def path(self, t: float | None = None) -> Path | None:
        """The path so far, where a window is open with a last one of no folds, see `closed`.

        With `t` as if a window ended then, of which all tiles have been taken in.
        """
        self._fetch()
        found = self._sketch
        if t is not None:
            found = _appended(found, t, _numbers(self._projected()))
        elif self._open is not None and found is not None:
            found = _with_window(found, self._t, self._open, 0.0)
        return None if found is None else Path(self._projection, found)

    def _add(self, t: float, share: float, ends: bool) -> None:
        self._t, self._begin = t, t if ends else self._begin
        self._pending.append((t, share, ends, self._projected()))
        if len(self._pending) >= _PENDING:
            self._fetch()

    def _fetch(self) -> None:
        for t, share, ends, sums in self._pending:
            found = _numbers(sums)
            if self._open is not None:
                found = _rounded(self._open + share * (found - self._open))
            self._open = None if ends else found
            if ends:
                self._sketch = _appended(self._sketch, t, found)
        self._pending.clear()

    def _projected(self) -> list[torch.Tensor]:
        """The sums at each place of a row, of each bucket: float64; float32 on Apple's GPUs, which have none."""
        found = []
        for values, factors in zip(self._values, self._factors, strict=True):
            made, rows = values * factors, len(values) // ROW * ROW
            exact = torch.float32 if values.device.type == "mps" else torch.float64
            total = made[:rows].view(rows // ROW, ROW).sum(dim=0, dtype=exact)
            total[: len(made) - rows] += made[rows:]
            found.append(total)
        return found


def closed(path: Path) -> Path:
    """The path as if a window that is open ended now."""
    sketch, is_open = _opened(path.sketch)
    return path if is_open is None else path._replace(sketch=_appended(sketch, path.sketch.edges[-1], is_open))


def _opened(sketch: Sketch) -> tuple[Sketch, Numbers | None]:
    """The ended windows, and the mean of the open one."""
    if sketch.folds[-1] >= 1:
        return sketch, None
    return Sketch(sketch.edges[:-1], sketch.folds[:-1], sketch.means[:-1], sketch.spread[:-1]), sketch.means[-1:]


def _numbers(sums: list[torch.Tensor]) -> Numbers:
    """The numbers of what is projected: shape [1, D]."""
    row = sum((own.cpu().numpy().astype(np.float64) for own in sums), np.zeros(ROW))
    return _rounded(np.bincount(_NUMBER, row, NUMBERS)[None].astype(np.float64))


def _rounded(numbers: Numbers) -> Numbers:
    """As states hold them."""
    with np.errstate(over="ignore", invalid="ignore"):  # of weights near the largest numbers: none is written then
        return numbers.astype(np.float32).astype(np.float64)


def _with_window(sketch: Sketch, t: float, mean: Numbers, folds: float) -> Sketch:
    """A path with one more window."""
    return Sketch(
        np.append(sketch.edges, t), np.append(sketch.folds, folds),
        np.vstack((sketch.means, mean)), np.append(sketch.spread, 0.0),
    )  # fmt: skip


def _appended(sketch: Sketch | None, t: float, mean: Numbers) -> Sketch:
    """A path with one more fold, in a window of its own, or in the last one until this has as many as the others."""
    with np.errstate(over="ignore", invalid="ignore"):
        if sketch is None:
            return Sketch(np.array([t, t]), np.ones(1), mean, np.zeros(1))
        made = _with_window(sketch, t, mean, 1.0)
        if sketch.folds[-1] < sketch.folds.max():
            return _halved(made, len(sketch.folds) - 1)
        return made if len(made.folds) <= MOST_WINDOWS else _halved(made)


def _halved(sketch: Sketch, begin: int = 0) -> Sketch:
    """Each two windows as one, from the one of this index on; an odd last one stays."""
    end = begin + (len(sketch.folds) - begin) // 2 * 2
    values = sketch.folds, sketch.means, sketch.spread
    first, second = ([one[start:end:2] for one in values] for start in (begin, begin + 1))
    folds, apart = first[0] + second[0], second[1] - first[1]
    share = second[0] / folds
    spread = first[2] + share * (second[2] - first[2]) + share * (1 - share) * np.sum(apart**2, axis=1)
    means = (first[1] + share[:, None] * apart).astype(np.float32).astype(np.float64)
    edges = (sketch.edges[:begin], sketch.edges[begin : end + 1 : 2], sketch.edges[end + 1 :])
    joined = [np.concatenate((a[:begin], b, a[end:])) for a, b in zip(values, (folds, means, spread), strict=True)]
    return Sketch(np.concatenate(edges), *joined)


_NUMBER = (mixed(np.arange(ROW, dtype=np.uint64)) % np.uint64(NUMBERS)).astype(np.int64)
"""To which of the numbers each place of a row belongs."""


def _signs(count: int, part: int) -> npt.NDArray[Any]:
    """Signs that never change, of a part's own."""
    numbers = np.arange(count, dtype=np.uint64) + (np.uint64(part) << np.uint64(40))
    return np.asarray(np.where(mixed(~numbers) >> np.uint64(63), np.float32(1), np.float32(-1)))

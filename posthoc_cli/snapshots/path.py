"""Where on a run's path a model's weights are, by a sample of elements that the headers of its snapshots hold.

A header holds, of some 512 elements, the network's weights at the snapshot's time and the snapshot's own average. Which
elements these are follows from names and shapes alone. With d(i) the distance of a model from the weights p(i) of the
snapshot i, D(i) that of p(i + 1) from p(i), squared as all distances here:

- Between two snapshots of a random walk d(i) + d(i + 1) = D(i) is expected, less on a straight line, and up to 2 D(i)
  where the weights are a place and noise that is another one at each time; 3 D(i) where the noise became less.
- What came after the newest snapshot is not further from it than the network moves in `checkpoint_every` steps: as
  far as between neighbours, or, with one snapshot, straight on at the speed which its own average tells of: on a
  straight line through times s the average of exponent gamma is t / (gamma + 2) behind.
- Weights of before the first snapshot a are behind its average, too: with c the component of (model - average) along
  (weights - average), relative to that, a model that has passed the snapshot has c = 1, and initial weights, of this
  run or of another seed, have c = -0.5 on a walk and the widest profile. Where all is noise c = 0 is expected.
- Whether a model has passed the snapshot that it is nearest to shows along the interval that ends there. Noise of
  variance w in each sample moves that component from 1 to 1 - w / D.

On ten recorded trainings (digits; SGD, Adam and AdamW at constant, falling and restarting rates) with 1 to 20
snapshots, also thinned and as bfloat16, 12 of 10,190 models of after the first snapshot were refused, and all of 840
initial ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli.profiles import gamma_from_sigma_rel
from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.format import PLACES, Floats, decode_sample, encode_sample

if TYPE_CHECKING:
    from posthoc_cli.snapshots.sources import Snapshot

Place = tuple[str, int]

_BETWEEN, _AFTER = 4.0, 3.0  # most of d(i) + d(i + 1) in D(i), and of what comes after the newest in what it may be
_MARGIN = 0.1  # by which the component of a model that has passed a snapshot may be below what is expected, or more,
# since that of a step in a random direction is 0 on average, and not in each sample


def places(shapes: Mapping[str, Sequence[int]]) -> list[Place]:
    """The sampled elements of tensors of these names and shapes: name and row-major index, sorted.

    Tensors have about the same number each; of more than `PLACES` tensors so many have one, evenly over their names.
    """
    sizes = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    names = [name for name, size in sizes.items() if size]
    chosen = ((number, names[number * len(names) // PLACES]) for number in range(PLACES if names else 0))
    return sorted(
        {
            (name, xxhash.xxh3_64_intdigest(f"{number}/{name}".encode(errors="replace")) % sizes[name])
            for number, name in chosen
        }
    )


def index_within(box: Box, shape: Sequence[int], index: int) -> int | None:
    """The row-major index, in a box of a tensor, of the element that has this one in the tensor; None if elsewhere."""
    at = [int(one) for one in np.unravel_index(index, tuple(shape))]
    if not all(begin <= one < end for begin, one, end in zip(box.offset, at, box.end, strict=True)):
        return None
    return box.span(Box(tuple(at), (1,) * len(at)))[0]


def joined_sample(parts: Sequence[tuple[str, Sequence[int]]]) -> str:
    """The sample of a snapshot, from those of its parts and the positions that their values have in it; or nothing."""
    samples = [decode_sample(text) for text, _ in parts]
    positions = np.concatenate([np.asarray(own, np.int64) for _, own in parts])
    order = np.argsort(positions)
    if any(len(own) != len(weights) for (_, own), (weights, _) in zip(parts, samples, strict=True)):
        return ""
    if not np.array_equal(positions[order], np.arange(len(order))):
        return ""
    weights, averages = (np.concatenate(values)[order] for values in zip(*samples, strict=True))
    return encode_sample(weights, averages)


@dataclass(frozen=True)
class Moment:
    """What the snapshots of one time tell: the network's weights and their narrowest and widest average, sampled."""

    t: float
    step: int
    weights: npt.NDArray[np.float64]
    narrow: npt.NDArray[np.float64]
    wide: npt.NDArray[np.float64]
    gamma: float
    """Exponent of the widest profile."""
    span: float
    """Training time of `checkpoint_every` steps."""


def path_of(snapshots: Sequence[Snapshot]) -> list[Moment]:
    """The path of a run by its snapshots, in order of time, as far as they hold samples."""
    if not snapshots:
        return []
    last = snapshots[-1]
    shapes = {name: last.header.tensors[name].shape for name in last.info.averages}
    count = len(places(shapes))
    by_time: dict[float, list[tuple[float, Floats, Floats]]] = {}
    infos = {}
    for snapshot in snapshots:
        info = snapshot.info
        if not info.sample:
            continue
        weights, average = decode_sample(info.sample)
        if len(weights) == count and np.isfinite(weights).all() and np.isfinite(average).all():
            by_time.setdefault(info.t, []).append((info.sigma_rel, weights, average))
            infos[info.t] = info
    path = []
    for t, found in sorted(by_time.items()):
        found.sort(key=lambda one: one[0])
        narrow, wide = (found[place][2].astype(np.float64) for place in (0, -1))
        span = t / infos[t].step * infos[t].schedule.checkpoint_every
        weights_then = found[0][1].astype(np.float64)
        path.append(Moment(t, infos[t].step, weights_then, narrow, wide, gamma_from_sigma_rel(found[-1][0]), span))
    return path


@dataclass(frozen=True)
class Found:
    """Where a model is on a path.

    Attributes:
        step: of the newest snapshots at or before it; None where it is not on the path.
        is_there: whether it has exactly the weights of that step.
        is_before: whether it is of before the first snapshot.
        nearest, away: step of the nearest snapshot, and how far that is, relative to the norm of its weights.
        reach: how far models on the path may be from it, relative to the same.
    """

    step: int | None
    is_there: bool
    is_before: bool
    nearest: int
    away: float
    reach: float


def find(model: Floats, path: Sequence[Moment]) -> Found | None:
    """Where the sampled weights of a model are on a path, of at least one moment; None if the network never moved."""
    points = _rounded_as(model, [moment.weights for moment in path])
    own, last = model.astype(np.float64), len(path) - 1
    away = [_square(own - point) for point in points]
    apart = [_square(b - a) for a, b in pairwise(points)]
    near = min(range(len(path)), key=lambda i: (away[i], -i))
    first, nearest = path[0], path[near]
    noise = _square(nearest.weights - nearest.narrow)

    is_between = any(away[i] + away[i + 1] <= _BETWEEN * apart[i] for i in (near - 1, near) if 0 <= i < last)
    behind = _square(first.weights - first.wide)
    is_before = False
    if behind and (near == 0 or not is_between):
        component = float((own - first.wide) @ (first.weights - first.wide)) / behind
        noisy = min(1.0, 2 * _square(first.weights - first.narrow) / behind)
        is_before = component < 0.2 - 0.45 * noisy

    speed = (nearest.gamma + 2) ** 2 * _square(nearest.weights - nearest.wide)
    steps = [max(1.0, b.span / (b.t - a.t)) ** 2 for a, b in pairwise(path)]
    moved = max([speed * min(1.0, nearest.span / nearest.t) ** 2, *(d * s for d, s in zip(apart, steps, strict=True))])
    reach = max(4 * noise, _AFTER * moved if near == last else max(apart[max(near - 1, 0) : near + 1]))
    is_there = away[near] == 0
    if not (is_there or any(apart) or behind):
        return None
    step: int | None = nearest.step
    if not is_there:
        if is_before or not (is_between or away[near] <= reach):
            step = None
        elif near > 0 and not _has_passed(away, apart, points, near, noise):
            step = path[near - 1].step
    norm = _square(points[near]) or 1.0
    return Found(step, is_there, is_before, nearest.step, math.sqrt(away[near] / norm), math.sqrt(reach / norm))


def _has_passed(
    away: Sequence[float], apart: Sequence[float], points: Sequence[npt.NDArray[np.float64]], near: int, noise: float
) -> bool:
    """Whether a model that is nearest to a snapshot is not clearly of before it; `noise` is the most there may be."""
    before = apart[near - 1]
    if not before:
        return True
    if len(points) > 2:
        a = max(near - 2, 0)
        noise = min(noise, max(0.0, apart[a] + apart[a + 1] - _square(points[a + 2] - points[a])) / 2)
    component = 0.5 + (away[near - 1] - away[near]) / (2 * before)
    by_chance = 2 * math.sqrt(away[near] / (before * len(points[near])))
    return component >= 1 - min(1.0, noise / before) - _MARGIN - by_chance


def _rounded_as(model: Floats, points: Sequence[npt.NDArray[np.float64]]) -> list[npt.NDArray[np.float64]]:
    """Points as they are after the rounding that a model's checkpoint has had, if its values show one."""
    import torch  # as the model's caller has

    for dtype in (torch.bfloat16, torch.float16):
        own = torch.from_numpy(model)
        if torch.equal(own.to(dtype).float(), own):
            found = [torch.from_numpy(point).float().to(dtype).double().numpy() for point in points]
            if all(np.isfinite(point).all() for point in found):
                return found
    return list(points)


def _square(values: npt.NDArray[np.float64]) -> float:
    return float(values @ values)

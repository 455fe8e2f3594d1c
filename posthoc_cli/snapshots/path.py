"""Locate a model's weights on the path of a run, from a sample of elements that the headers of its snapshots hold.

A header holds, for some 512 elements, the network's weights at the snapshot's time and the values of the average. Names
and shapes alone determine which elements these are. Let d(i) be the distance of a model from the weights p(i) at
snapshot i, and D(i) the distance of p(i + 1) from p(i); all distances here are squared.

- Between two snapshots, d(i) + d(i + 1) = D(i) is expected for a random walk, less on a straight line, up to 2 D(i)
  for a fixed point with independent noise at each time, and 3 D(i) if the noise has decreased.
- After the newest snapshot, a model is at most as far from it as the network moves in `checkpoint_every` steps: the
  distance between neighbours or, with a single snapshot, straight ahead at the speed that its average implies. On a
  straight line the average of exponent gamma at time t is t / (gamma + 2) behind the weights.
- Before the first snapshot, weights are also behind its average. Let c be the component of (model - average) along
  (weights - average), relative to the length of the latter. A model that has passed the snapshot has c = 1; initial
  weights, of this run or another seed, have c = -0.5 for a walk and the widest profile; pure noise gives c = 0.
- Whether a model has passed its nearest snapshot is decided by its component along the interval that ends there. Noise
  of variance w in each sample moves that component from 1 to 1 - w / D.

In ten recorded trainings (digits; SGD, Adam and AdamW at constant, decaying and restarting rates) with 1 to 20
snapshots, some thinned, some as bfloat16, 12 of 10,190 models from after the first snapshot were refused, and all of
840 initial ones.
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
from posthoc_cli.snapshots.codecs import PLACES, Floats, decode_sample, encode_sample
from posthoc_cli.snapshots.format import SnapshotInfo

if TYPE_CHECKING:
    from posthoc_cli.snapshots.sources import Snapshot

Place = tuple[str, int]

_BETWEEN, _AFTER = 4.0, 3.0  # bounds: d(i) + d(i + 1) relative to D(i); d after the newest relative to the expected
_MARGIN = 0.1  # the least tolerance for the component of a model that has passed a snapshot; more is allowed by chance,
# since the component of a step in a random direction is 0 on average but not in each sample


def places(shapes: Mapping[str, Sequence[int]]) -> list[Place]:
    """Return the sampled elements of tensors with these names and shapes: name and row-major index, sorted.

    All tensors have about equally many; of more than `PLACES` tensors, `PLACES` spread evenly by name have one each.
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
    """Convert a row-major index in a tensor to the index in a box of it; return None if the element is outside."""
    element = Box(tuple(map(int, np.unravel_index(index, tuple(shape)))), (1,) * len(shape))
    return box.span(element)[0] if box.intersection(element).size else None


def joined_sample(parts: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Join the samples of parts, each with its values' positions in the result; return "" if they do not fit."""
    samples = [decode_sample(text) for text, _ in parts]
    positions = np.concatenate([np.asarray(held, np.int64) for _, held in parts])
    order = np.argsort(positions)
    if any(len(held) != len(weights) for (_, held), (weights, _) in zip(parts, samples, strict=True)):
        return ""
    if not np.array_equal(positions[order], np.arange(len(order))):
        return ""
    weights, averages = (np.concatenate(values)[order] for values in zip(*samples, strict=True))
    return encode_sample(weights, averages)


@dataclass(frozen=True)
class Moment:
    """The samples of the snapshots of one time: the network's weights, the narrowest average and the widest one."""

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
    """Return the path of a run from its snapshots' samples, in order of time."""
    if not snapshots:
        return []
    newest = snapshots[-1]
    count = len(places({name: newest.header.tensors[name].shape for name in newest.info.averages}))
    by_time: dict[float, list[tuple[SnapshotInfo, Floats, Floats]]] = {}
    for snapshot in snapshots:
        weights, average = decode_sample(snapshot.info.sample)
        if len(weights) == count > 0 and np.isfinite(weights).all() and np.isfinite(average).all():
            by_time.setdefault(snapshot.info.t, []).append((snapshot.info, weights, average))
    return [_moment(by_time[t]) for t in sorted(by_time)]


def _moment(samples: Sequence[tuple[SnapshotInfo, Floats, Floats]]) -> Moment:
    """Return the moment of one time from its snapshots' metadata, sampled weights and sampled averages."""
    ordered = sorted(samples, key=lambda sample: sample[0].sigma_rel)
    (info, weights, narrow), (widest, _, wide) = ordered[0], ordered[-1]
    span = info.t / info.step * info.schedule.checkpoint_every
    raw, narrow_values, wide_values = (values.astype(np.float64) for values in (weights, narrow, wide))
    return Moment(info.t, info.step, raw, narrow_values, wide_values, gamma_from_sigma_rel(widest.sigma_rel), span)


@dataclass(frozen=True)
class Location:
    """The location of a model on a path.

    Attributes:
        step: the step of the newest snapshots at or before the model; None if it is not on the path.
        is_exact: whether the model has exactly the weights of that step.
        is_before: whether the model is from before the first snapshot.
        nearest, distance: the nearest snapshot's step, and its distance relative to the norm of its weights.
        reach: the largest distance of models on the path from that snapshot, relative to the same norm.
    """

    step: int | None
    is_exact: bool
    is_before: bool
    nearest: int
    distance: float
    reach: float


def locate(model: Floats, path: Sequence[Moment]) -> Location | None:
    """Locate a model's sampled weights on a path of at least one moment; return None if the network never moved."""
    points = _rounded_as(model, [moment.weights for moment in path])
    weights = model.astype(np.float64)
    away = [_square(weights - point) for point in points]
    apart = [_square(b - a) for a, b in pairwise(points)]
    near = min(range(len(path)), key=lambda i: (away[i], -i))
    first, nearest = path[0], path[near]
    noise = _square(nearest.weights - nearest.narrow)
    is_exact = away[near] == 0
    if not (is_exact or any(apart) or _square(first.weights - first.wide)):
        return None
    is_between = any(away[i] + away[i + 1] <= _BETWEEN * apart[i] for i in (near - 1, near) if 0 <= i < len(apart))
    is_before = (near == 0 or not is_between) and _is_before(weights, first)
    reach = max(4 * noise, _reach(path, apart, near))
    step: int | None = nearest.step
    if not is_exact:
        if is_before or not (is_between or away[near] <= reach):
            step = None
        elif near > 0 and not _has_passed(away, apart, points, near, noise):
            step = path[near - 1].step
    norm = _square(points[near]) or 1.0
    return Location(step, is_exact, is_before, nearest.step, math.sqrt(away[near] / norm), math.sqrt(reach / norm))


def _is_before(weights: npt.NDArray[np.float64], first: Moment) -> bool:
    """Return whether weights are behind the widest average of the first moment."""
    ahead = first.weights - first.wide
    if not (squared := _square(ahead)):
        return False
    component = float((weights - first.wide) @ ahead) / squared
    noisy = min(1.0, 2 * _square(first.weights - first.narrow) / squared)
    return component < 0.2 - 0.45 * noisy


def _reach(path: Sequence[Moment], apart: Sequence[float], near: int) -> float:
    """Return how far, squared, a model on the path may be from the moment `near`, apart from noise."""
    if near < len(path) - 1:
        return max(apart[max(near - 1, 0) : near + 1])
    nearest = path[near]
    speed = (nearest.gamma + 2) ** 2 * _square(nearest.weights - nearest.wide)
    steps = [max(1.0, b.span / (b.t - a.t)) ** 2 for a, b in pairwise(path)]
    moved = (distance * step for distance, step in zip(apart, steps, strict=True))
    return _AFTER * max([speed * min(1.0, nearest.span / nearest.t) ** 2, *moved])


def _has_passed(
    away: Sequence[float], apart: Sequence[float], points: Sequence[npt.NDArray[np.float64]], near: int, noise: float
) -> bool:
    """Return whether a model is not clearly before its nearest snapshot; `noise` is an upper bound on the variance."""
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
    """Round points as the model's checkpoint was rounded if all its values are bfloat16 or float16 numbers."""
    import torch  # already loaded: the caller has a model

    values = torch.from_numpy(model)
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            rounded = [torch.from_numpy(point).float().to(dtype).double().numpy() for point in points]
            if all(np.isfinite(point).all() for point in rounded):
                return rounded
    return list(points)


def _square(values: npt.NDArray[np.float64]) -> float:
    return float(values @ values)

"""Compare a model's weights with those of a run, by a sample of elements that the headers of its snapshots hold.

A header holds, for some 512 elements, the network's weights at the snapshot's time and the values of the average. Names
and shapes alone determine which elements these are. A model stands at a time of the run if its values equal the
recorded ones, exactly or after rounding these to float16 or bfloat16, as a checkpoint in half precision has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.codecs import PLACES, Floats, decode_sample, encode_sample

if TYPE_CHECKING:
    from posthoc_cli.snapshots.snapshot import Snapshot

Place = tuple[str, int]


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


def recorded_weights(snapshots: Sequence[Snapshot]) -> dict[int, Floats]:
    """Return the network's sampled weights by step, in order, of the times whose headers hold a complete sample."""
    if not snapshots:
        return {}
    newest = snapshots[-1]
    count = len(places({name: newest.entries[name].shape for name in newest.averages}))
    samples = {snapshot.step: decode_sample(snapshot.sample)[0] for snapshot in snapshots}
    return {step: weights for step, weights in samples.items() if len(weights) == count and np.isfinite(weights).all()}


def are_equal(model: Floats, recorded: Floats) -> bool:
    """Return whether a model's values are the recorded ones, exactly or rounded to float16 or bfloat16."""
    import torch  # already loaded: the caller has a model

    if np.array_equal(model, recorded):
        return True
    values, exact = torch.from_numpy(model), torch.from_numpy(recorded)
    return any(torch.equal(values, exact.to(dtype).float()) for dtype in (torch.float16, torch.bfloat16))


def squared_distance(model: Floats, recorded: Floats, shapes: Mapping[str, Sequence[int]]) -> float:
    """Estimate the squared distance of a model from the recorded weights, over all elements of these tensors."""
    names = [name for name, _ in places(shapes)]
    sizes = {name: math.prod(shapes[name]) for name in shapes}
    share = np.array([sizes[name] / names.count(name) for name in names])
    sampled = sum(sizes[name] for name in dict.fromkeys(names))
    squares: npt.NDArray[np.float64] = (model.astype(np.float64) - recorded) ** 2
    return float(squares @ share) * (sum(sizes.values()) / sampled if sampled else 1.0)

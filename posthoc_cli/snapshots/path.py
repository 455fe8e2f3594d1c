"""What a header says about the path of a run's weights: a sample of elements, and a sketch by
random projections.

A header holds, for some 512 elements, the network's weights at the snapshot's time and the values
of the average. Names and shapes alone determine which elements these are. A model stands at a time
of the run if its values equal the recorded ones, exactly or after rounding these to float16 or
bfloat16, as a checkpoint in half precision has them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction import Sketch
from posthoc_cli.snapshots.tensorfile import Box

# --- the sample

Floats = npt.NDArray[np.float32]

PLACES = 512  # elements in a sample; small models have fewer


def encode_sample(weights: npt.ArrayLike, average: npt.ArrayLike) -> str:
    """Return a sample as stored in headers: float32 values of the network, then of the average, in
    base64."""
    return base64.b64encode(np.concatenate([weights, average]).astype("<f4").tobytes()).decode()


def decode_sample(text: str) -> tuple[Floats, Floats]:
    """Return the values of the network and of the average in a sample; raise ValueError if it is
    invalid."""
    data = base64.b64decode(text, validate=True)
    if len(data) % 8 or len(data) > 8 * PLACES:
        raise ValueError(f"must be two equal numbers of at most {PLACES} float32 values")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    return values[: len(values) // 2], values[len(values) // 2 :]


def places(shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    """Return the sampled elements of tensors with these names and shapes: name and row-major index,
    sorted.

    All tensors have about equally many; of more than `PLACES` tensors, `PLACES` spread evenly by
    name have one each.
    """
    sizes = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    names = [name for name, size in sizes.items() if size]
    chosen = set[tuple[str, int]]()
    for number in range(PLACES if names else 0):
        name = names[number * len(names) // PLACES]
        drawn = xxhash.xxh3_64_intdigest(f"{number}/{name}".encode(errors="replace"))
        chosen.add((name, drawn % sizes[name]))
    return sorted(chosen)


def index_within(box: Box, shape: Sequence[int], index: int) -> int | None:
    """Convert a row-major index in a tensor to the index in a box of it; return None if the element
    is outside."""
    element = Box(tuple(map(int, np.unravel_index(index, tuple(shape)))), (1,) * len(shape))
    return box.span(element)[0] if box.intersection(element).size else None


def joined_sample(
    samples: Sequence[str], boxes: Sequence[Mapping[str, Box]], shapes: Mapping[str, Sequence[int]]
) -> str:
    """Join the samples of parts, which hold these boxes of complete tensors; return "" if one lacks
    values."""
    left = [zip(*decode_sample(sample), strict=True) for sample in samples]
    pairs = list[tuple[float, float]]()
    wanted = places(shapes)
    for name, index in wanted:
        for of_part, own in zip(left, boxes, strict=True):
            if name in own and index_within(own[name], shapes[name], index) is not None:
                pairs += islice(of_part, 1)
                break
    if not wanted or len(pairs) < len(wanted):
        return ""
    return encode_sample(*zip(*pairs, strict=True))


def are_equal(model: Floats, recorded: Floats) -> bool:
    """Return whether a model's values are the recorded ones, exactly or rounded to float16 or
    bfloat16."""
    import torch  # already loaded: the caller has a model

    if np.array_equal(model, recorded):
        return True
    values = torch.from_numpy(model)
    exact = torch.from_numpy(recorded)
    return any(
        torch.equal(values, exact.to(dtype).float()) for dtype in (torch.float16, torch.bfloat16)
    )


def spacing(
    values: FloatArray, mantissa_bits: npt.ArrayLike, lowest_exponent: npt.ArrayLike
) -> FloatArray:
    """Return the distance from each value to the next one of its dtype, see `dtypes.Dtype`."""
    exponent = np.maximum(np.frexp(values)[1] - 1, lowest_exponent)
    return np.asarray(np.ldexp(1.0, exponent - mantissa_bits))


# --- the sketch of the path

MOST_WINDOWS = 4_096
MOST_NUMBERS = 1_024
# the largest difference after scaling to float16: differences down to 2**-28 of it keep all bits
_LARGEST = 2.0**14
_MOST = 1e60  # the bound on usable numbers: products of larger ones overflow
_AND = "|"  # the separator between the sketches of parts; used in memory only


class PathSketch(NamedTuple):
    """A sketch and the identifier of its projection, which depends on the tensors and the random
    signs."""

    projection: int
    sketch: Sketch


def encode_path(path: PathSketch | None, exact: bool = False) -> str:
    """Return a sketch as stored in headers, or in states if `exact`; empty for None or unusable
    numbers."""
    if path is None:
        return ""
    sketch = path.sketch
    means = sketch.means.astype("<f4")
    if not (np.isfinite(means).all() and np.all(sketch.spread < _MOST)):
        return ""
    largest = float(np.abs(np.diff(means.astype(np.float64), axis=0)).max(initial=0.0))
    factor = largest / _LARGEST or 1.0
    counts = np.array([*means.shape, 4 if exact else 2, path.projection], "<i8")
    known = np.concatenate((sketch.edges, sketch.folds, sketch.spread, [factor])).astype("<f8")
    data = counts.tobytes() + known.tobytes()
    data += means.tobytes() if exact else _steps(means / factor, means[0])
    return base64.b64encode(data).decode()


def _steps(places: FloatArray, first: Floats) -> bytes:
    """Return the first mean, and the steps between places, each from the rounded place before, so
    that errors do not add up."""
    steps = np.zeros((len(places) - 1, places.shape[1]), "<f2")
    place = places[0]
    for step, wanted in zip(steps, places[1:], strict=True):
        step[:] = wanted - place
        place = place + step
    return first.tobytes() + steps.tobytes()


def decode_path(text: str) -> PathSketch:
    """Return the path that a sketch encodes, adding up the parts of `joined_paths`; ValueError if
    it is invalid."""
    (projection, total), *others = map(_decoded, text.split(_AND))
    for _, sketch in others:
        total = replace(
            total,
            means=total.means + sketch.means,
            spread=total.spread + sketch.spread,
        )
    return PathSketch(projection, total)


def path_of_part(text: str, part: tuple[int, int] | None) -> PathSketch | None:
    """Return the path of a part (its number, counted from 1, and the count) or a complete model;
    None if unknown."""
    number, count = part or (1, 1)
    texts = text.split(_AND)
    return decode_path(texts[number - 1]) if text and len(texts) == count else None


def joined_paths(texts: Sequence[str]) -> str:
    """Join the sketches of a model's parts; return an empty text unless all have a sketch of the
    same windows."""
    sketches = [_decoded(text).sketch for text in texts if text]
    windows = {(one.means.shape, one.edges.tobytes(), one.folds.tobytes()) for one in sketches}
    return _AND.join(texts) if len(sketches) == len(texts) and len(windows) == 1 else ""


def _decoded(text: str) -> PathSketch:
    """Return the path that the sketch of one part encodes; raise ValueError if it is invalid."""
    data = base64.b64decode(text, validate=True)
    counts = np.frombuffer(data[:32], "<i8") if len(data) >= 32 else np.zeros(4, int)
    windows, numbers, size, projection = counts.tolist()
    is_sketch = 0 < windows <= MOST_WINDOWS and 0 < numbers <= MOST_NUMBERS and size in (2, 4)
    whole = windows if size == 4 else 1  # means as they are; of the others steps
    first = 32 + 8 * (3 * windows + 2)
    rest = first + 4 * numbers * whole
    if not is_sketch or len(data) != rest + 2 * numbers * (windows - whole):
        limits = f"1 to {MOST_WINDOWS:,} windows of 1 to {MOST_NUMBERS:,} numbers, of size 2 or 4"
        raise ValueError(f"must be {limits}")
    known = np.frombuffer(data[32:first], "<f8").astype(np.float64)
    edges, folds, spread, factor = np.split(known, [windows + 1, 2 * windows + 1, 3 * windows + 1])
    means = np.frombuffer(data[first:rest], "<f4").astype(np.float64).reshape(-1, numbers)
    steps = np.frombuffer(data[rest:], "<f2").astype(np.float64).reshape(-1, numbers)
    later = means[:1] + np.cumsum(steps * factor, axis=0)
    return PathSketch(projection, Sketch(edges, folds, np.concatenate((means, later)), spread))

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
from typing import Any, NamedTuple

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
    values = np.concatenate([weights, average])
    data = values.astype("<f4").tobytes()
    return base64.b64encode(data).decode()


def decode_sample(text: str) -> tuple[Floats, Floats]:
    """Return the values of the network and of the average in a sample; raise ValueError if it is
    invalid."""
    data = base64.b64decode(text, validate=True)
    pairs, rest = divmod(len(data), 8)
    if rest or pairs > PLACES:
        raise ValueError(f"must be two equal numbers of at most {PLACES} float32 values")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    weights, average = values.reshape(2, -1)
    return weights, average


def places(shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    """Return the sampled elements of tensors with these names and shapes: name and row-major index,
    sorted.

    All tensors have about equally many; of more than `PLACES` tensors, `PLACES` spread evenly by
    name have one each.
    """
    sizes = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    names = [name for name, size in sizes.items() if size]
    chosen = set[tuple[str, int]]()
    if not names:
        return []
    for number in range(PLACES):
        name = names[number * len(names) // PLACES]
        text = f"{number}/{name}"
        drawn = xxhash.xxh3_64_intdigest(text.encode(errors="replace"))
        chosen.add((name, drawn % sizes[name]))
    return sorted(chosen)


def index_within(box: Box, shape: Sequence[int], index: int) -> int | None:
    """Convert a row-major index in a tensor to the index in a box of it; return None if the element
    is outside."""
    found = np.unravel_index(index, tuple(shape))
    offset = tuple(map(int, found))
    element = Box(offset, (1,) * len(shape))
    if not box.intersection(element).size:
        return None
    begin, _ = box.span(element)
    return begin


def joined_sample(
    samples: Sequence[str],
    boxes: Sequence[Mapping[str, Box]],
    shapes: Mapping[str, Sequence[int]],
) -> str:
    """Join the samples of parts, which hold these boxes of complete tensors; return "" if one lacks
    values."""
    left = []
    for sample in samples:
        of_network, of_average = decode_sample(sample)
        left.append(zip(of_network, of_average, strict=True))
    pairs = list[tuple[float, float]]()
    elements = places(shapes)
    for name, index in elements:
        for of_part, own in zip(left, boxes, strict=True):
            box = own.get(name)
            if box is not None and index_within(box, shapes[name], index) is not None:
                pairs += islice(of_part, 1)
                break
    if not elements or len(pairs) < len(elements):
        return ""
    weights, average = zip(*pairs, strict=True)
    return encode_sample(weights, average)


def are_equal(model: Floats, recorded: Floats) -> bool:
    """Return whether a model's values are the recorded ones, exactly or rounded to float16 or
    bfloat16."""
    import torch  # already loaded: the caller has a model

    if np.array_equal(model, recorded):
        return True
    values = torch.from_numpy(model)
    exact = torch.from_numpy(recorded)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = exact.to(dtype).float()
        if torch.equal(values, rounded):
            return True
    return False


def spacing(
    values: FloatArray,
    mantissa_bits: npt.ArrayLike,
    lowest_exponent: npt.ArrayLike,
) -> FloatArray:
    """Return the distance from each value to the next one of its dtype, see `dtypes.Dtype`."""
    _, above = np.frexp(values)
    exponent = np.maximum(above - 1, lowest_exponent)
    spacings = np.ldexp(1.0, exponent - mantissa_bits)
    return np.asarray(spacings)


# --- the sketch of the path

MOST_WINDOWS = 4_096
MOST_NUMBERS = 1_024
# the largest difference after scaling to float16: differences down to 2**-28 of it keep all bits
_LARGEST = 2.0**14
_MOST = 1e60  # the bound on usable numbers: products of larger ones overflow
_COUNTS_BYTES = 32  # windows, numbers of each, bytes of a number, projection
_LIMITS = f"must be 1 to {MOST_WINDOWS:,} windows of 1 to {MOST_NUMBERS:,} numbers, of size 2 or 4"
_AND = "|"  # the separator between the sketches of parts; used in memory only


class PathSketch(NamedTuple):
    """A sketch, the identifier of its projection, which depends on the tensors and the random
    signs, and the step at the end of each window, nan if unknown: [K]."""

    projection: int
    sketch: Sketch
    steps: FloatArray


def encode_path(path: PathSketch | None, exact: bool = False) -> str:
    """Return a sketch as stored in headers, or in states if `exact`; empty for None or unusable
    numbers."""
    if path is None:
        return ""
    sketch = path.sketch
    means = sketch.means.astype("<f4")
    if not (np.isfinite(means).all() and np.all(sketch.spread < _MOST)):
        return ""
    windows, numbers = means.shape
    whole = windows if exact else 1
    steps = np.diff(means.astype(np.float64), axis=0)
    factor = float(np.abs(steps).max(initial=0.0)) / _LARGEST or 1.0
    moves = _moves(means[: windows - whole + 1] / factor)
    clock = _own_clock(path)
    parts = sketch.edges, sketch.folds, sketch.spread, factor, means[:whole], moves, clock
    counts = np.array([windows, numbers, 4 if exact else 2, path.projection], "<i8")
    stored = np.array(parts, _layout(windows, numbers, whole, len(clock)))
    return base64.b64encode(counts.tobytes() + stored.tobytes()).decode()


def _own_clock(path: PathSketch) -> FloatArray:
    """Return the steps of windows; none if times are just their numbers, as far as they are
    known."""
    known = np.isfinite(path.steps)
    is_usual = np.array_equal(path.steps[known], path.sketch.edges[1:][known])
    return path.steps[:0] if is_usual else path.steps


def _moves(places: FloatArray) -> npt.NDArray[np.float16]:
    """Return the moves between places, each from the rounded place before, so that errors do not
    add up."""
    moves = np.zeros(places[1:].shape, "<f2")
    reached = places[0]
    for move, place in zip(moves, places[1:], strict=True):
        move[:] = place - reached
        reached = reached + move
    return moves


def _layout(windows: int, numbers: int, whole: int, clock: int) -> np.dtype[Any]:
    """Return the layout of a sketch after its counts: whole means, and the moves from each to the
    next, in units of `factor`; and so many steps."""
    fields: list[Any] = [
        ("edges", "<f8", (windows + 1,)),
        ("folds", "<f8", (windows,)),
        ("spread", "<f8", (windows,)),
        ("factor", "<f8"),
        ("means", "<f4", (whole, numbers)),
        ("moves", "<f2", (windows - whole, numbers)),
        ("steps", "<f8", (clock,)),
    ]
    return np.dtype(fields)


def decode_path(text: str) -> PathSketch:
    """Return the path that a sketch encodes, adding up the parts of `joined_paths`; ValueError if
    it is invalid."""
    first, *others = map(_decoded, text.split(_AND))
    total = first.sketch
    for other in others:
        means = total.means + other.sketch.means
        spread = total.spread + other.sketch.spread
        total = replace(total, means=means, spread=spread)
    return first._replace(sketch=total)


def path_of_part(text: str, part: tuple[int, int] | None) -> PathSketch | None:
    """Return the path of a part (its number, counted from 1, and the count) or a complete model;
    None if unknown."""
    number, count = part or (1, 1)
    texts = text.split(_AND)
    if not text or len(texts) != count:
        return None
    return decode_path(texts[number - 1])


def joined_paths(texts: Sequence[str]) -> str:
    """Join the sketches of a model's parts; return an empty text unless all have a sketch of the
    same windows."""
    if not all(texts):
        return ""
    windows = set()
    for text in texts:
        sketch = _decoded(text).sketch
        edges = sketch.edges.tobytes()
        folds = sketch.folds.tobytes()
        windows.add((sketch.means.shape, edges, folds))
    if len(windows) != 1:
        return ""
    return _AND.join(texts)


def _decoded(text: str) -> PathSketch:
    """Return the path that the sketch of one part encodes; raise ValueError if it is invalid."""
    data = base64.b64decode(text, validate=True)
    windows, projection, layout = _checked_layout(data)
    stored = np.frombuffer(data, layout, offset=_COUNTS_BYTES)[0]
    edges, folds, spread, factor, means, moves, steps = (
        stored[name].astype(np.float64) for name in layout.names or ()
    )
    later = means[:1] + np.cumsum(moves * factor, axis=0)
    sketch = Sketch(edges, folds, np.concatenate((means, later)), spread)
    unknown = np.full(windows, np.nan)
    return PathSketch(projection, sketch, steps if steps.size else unknown)


def _checked_layout(data: bytes) -> tuple[int, int, np.dtype[Any]]:
    """Return the number of windows, the projection and the layout of a sketch; raise ValueError if
    it has another length."""
    if len(data) >= _COUNTS_BYTES:
        windows, numbers, size, projection = np.frombuffer(data[:_COUNTS_BYTES], "<i8").tolist()
        are_few = 0 < windows <= MOST_WINDOWS and 0 < numbers <= MOST_NUMBERS
        if are_few and size in (2, 4):
            whole = windows if size == 4 else 1
            for clock in (0, windows):
                layout = _layout(windows, numbers, whole, clock)
                if len(data) == _COUNTS_BYTES + layout.itemsize:
                    return windows, projection, layout
    raise ValueError(_LIMITS)

"""The text in a snapshot's header that shows the path of the weights: a sketch by random
projections, see `reconstruction.Sketch`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction import Sketch
from posthoc_cli.snapshots.source import PathSketch, Rule

MOST_WINDOWS = 4_096
MOST_NUMBERS = 1_024

# the largest difference after scaling to float16: differences down to 2**-28 of it keep all bits
_LARGEST = 2.0**14
_MOST = 1e60  # the bound on usable numbers: products of larger ones overflow
_COUNTS_BYTES = 32  # windows, numbers of each, bytes of a number, projection
_LIMITS = f"must be 1 to {MOST_WINDOWS:,} windows of 1 to {MOST_NUMBERS:,} numbers, of size 2 or 4"

_AND = "|"  # the separator between the sketches of parts; used in memory only


def encode_path(path: PathSketch | None, exact: bool = False) -> str:
    """Encode a sketch as headers store it, or as states do if `exact`; empty for None or unusable
    numbers."""
    if path is None:
        return ""
    sketch = path.sketch
    means = sketch.means.astype("<f4")
    if not (np.isfinite(means).all() and np.all(sketch.spread < _MOST)):
        return ""
    windows, numbers = means.shape
    full = windows if exact else 1
    steps = np.diff(means.astype(np.float64), axis=0)
    factor = float(np.abs(steps).max(initial=0.0)) / _LARGEST or 1.0
    moves = _moves(means[: windows - full + 1] / factor)
    parts = sketch.edges, sketch.folds, sketch.spread, factor, means[:full], moves
    counts = np.array([windows, numbers, 4 if exact else 2, path.projection], "<i8")
    stored = np.array(parts, _layout(windows, numbers, full))
    return base64.b64encode(counts.tobytes() + stored.tobytes()).decode()


def _moves(places: FloatArray) -> npt.NDArray[np.float16]:
    """Round the moves between places, each from the rounded place before, so that errors do not add
    up."""
    moves = np.zeros(places[1:].shape, "<f2")
    reached = places[0]
    for move, position in zip(moves, places[1:], strict=True):
        move[:] = position - reached
        reached = reached + move
    return moves


def _layout(windows: int, numbers: int, full: int) -> np.dtype[Any]:
    """Describe the layout of a sketch after its counts: so many full means, and the moves from each
    to the next, in units of `factor`."""
    fields: list[Any] = [
        ("edges", "<f8", (windows + 1,)),
        ("folds", "<f8", (windows,)),
        ("spread", "<f8", (windows,)),
        ("factor", "<f8"),
        ("means", "<f4", (full, numbers)),
        ("moves", "<f2", (windows - full, numbers)),
    ]
    return np.dtype(fields)


def decode_path(text: str) -> PathSketch:
    """Decode the path in a sketch, adding up the parts of `join_paths`; ValueError if it is
    invalid."""
    first, *others = map(_decode, text.split(_AND))
    total = first.sketch
    for other in others:
        means = total.means + other.sketch.means
        spread = total.spread + other.sketch.spread
        total = replace(total, means=means, spread=spread)
    return first._replace(sketch=total)


def path_of_part(
    text: str,
    part: tuple[int, int] | None,
) -> PathSketch | None:
    """Decode the path of a part (its number, counted from 1, and the count) or of a complete model;
    None if it is unknown."""
    number, count = part or (1, 1)
    texts = text.split(_AND)
    if not text or len(texts) != count:
        return None
    return decode_path(texts[number - 1])


def join_paths(texts: Sequence[str]) -> str:
    """Join the sketches of a model's parts; return an empty text unless all have a sketch of the
    same windows."""
    if not all(texts):
        return ""
    windows = set()
    for text in texts:
        sketch = _decode(text).sketch
        edges = sketch.edges.tobytes()
        folds = sketch.folds.tobytes()
        windows.add((sketch.means.shape, edges, folds))
    if len(windows) != 1:
        return ""
    return _AND.join(texts)


def _decode(text: str) -> PathSketch:
    """Decode the sketch of one part; raise ValueError if it is invalid."""
    data = base64.b64decode(text, validate=True)
    if len(data) < _COUNTS_BYTES:
        raise ValueError(_LIMITS)
    windows, numbers, size, projection = np.frombuffer(data[:_COUNTS_BYTES], "<i8").tolist()
    are_few = 0 < windows <= MOST_WINDOWS and 0 < numbers <= MOST_NUMBERS
    if not (are_few and size in (2, 4)):
        raise ValueError(_LIMITS)
    layout = _layout(windows, numbers, windows if size == 4 else 1)
    if len(data) < _COUNTS_BYTES + layout.itemsize:
        raise ValueError(_LIMITS)
    # Earlier versions appended the step of each window.
    stored = np.frombuffer(data, layout, 1, _COUNTS_BYTES)[0]
    edges, folds, spread, factor, means, moves = (
        stored[name].astype(np.float64) for name in layout.names or ()
    )
    later = means[:1] + np.cumsum(moves * factor, axis=0)
    return PathSketch(projection, Sketch(edges, folds, np.concatenate((means, later)), spread))


SketchText = Annotated[str, Rule("a sketch", lambda text: not text or decode_path(text))]
"""The text in a state, which has no checksum; a sealed header is trusted."""

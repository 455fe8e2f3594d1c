"""The sample of the network's weights in a snapshot's header, by which a resumed model is known.

It holds some 512 elements of the network's weights at the snapshot's time. Names and shapes alone
determine which elements these are. A model stands at a time of the run if its values equal the
recorded ones, exactly or after rounding these to float16 or bfloat16, as a checkpoint in half
precision has them."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli.snapshots.boxes import Box

Floats = npt.NDArray[np.float32]

PLACES = 512  # elements in a sample; small models have fewer


def encode_sample(weights: npt.ArrayLike) -> str:
    """Encode a sample as headers store it: float32 values in base64."""
    data = np.asarray(weights, "<f4").tobytes()
    return base64.b64encode(data).decode()


def decode_sample(text: str) -> Floats:
    """Decode the network's values in a sample."""
    data = base64.b64decode(text, validate=True)
    return np.frombuffer(data, "<f4").astype(np.float32)


def drop_average(sample: str) -> str:
    """Drop the second half of a sample of format 3: the values of the average."""
    values = decode_sample(sample)
    return encode_sample(values[: len(values) // 2])


def places(shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
    """Choose the sampled elements of tensors with these names and shapes: name and row-major index,
    sorted.

    All tensors have about equally many; if there are more than `PLACES` tensors, `PLACES` of them,
    spread evenly by name, have one each.
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


def index_within(
    box: Box,
    shape: Sequence[int],
    index: int,
) -> int | None:
    """Convert a row-major index in a tensor to the index in a box of it; return None if the element
    is outside."""
    indices = np.unravel_index(index, tuple(shape))
    offset = tuple(map(int, indices))
    element = Box(offset, (1,) * len(shape))
    if not box.intersection(element).size:
        return None
    begin, _ = box.span(element)
    return begin


def join_samples(
    samples: Sequence[str],
    boxes: Sequence[Mapping[str, Box]],
    shapes: Mapping[str, Sequence[int]],
) -> str:
    """Join the samples of parts, which hold these boxes of complete tensors; return "" if one lacks
    values."""
    left = [iter(decode_sample(sample)) for sample in samples]
    values = list[float]()
    elements = places(shapes)
    for name, index in elements:
        for of_part, own in zip(left, boxes, strict=True):
            box = own.get(name)
            if box is not None and index_within(box, shapes[name], index) is not None:
                values += islice(of_part, 1)
                break
    return encode_sample(values) if len(values) == len(elements) else ""


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

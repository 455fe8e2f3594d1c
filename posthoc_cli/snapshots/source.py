"""One source of averages: a snapshot on disk, or a checkpoint of another program."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from posthoc_cli.dtypes import DTYPES, ITEM_BYTES
from posthoc_cli.errors import (
    NonFiniteError,
    argument,
    count_noun,
    quote,
)
from posthoc_cli.profiles import FloatArray, Point, StoredProfile
from posthoc_cli.reconstruction import (
    Measurements,
    Sketch,
    StoredAverage,
)
from posthoc_cli.snapshots.boxes import Box, boxes_of_range
from posthoc_cli.snapshots.entry import Entry, decode_values, items, tensor_from_bytes
from posthoc_cli.snapshots.tensorfile import TensorFile

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """A condition on a header's value besides its type: in words, and as a test, which may raise
    ValueError."""

    words: str
    accepts: Callable[[Any], object]


@dataclass(frozen=True)
class TrackedTensor:
    """How a run tracks one tensor.

    Its role is "average", "statistic" or "copy". A statistic is averaged but is not a weight:
    neither measured nor stored in fewer bits.
    """

    role: str
    dtype: str  # in the model, a safetensors name


class ElementRange(NamedTuple):
    """The elements `begin` to `end` of a tensor, row-major."""

    name: str
    begin: int
    end: int


class StoredTensors:
    """Tensors in files, which any thread may read.

    As a context manager it keeps its files open; they must be the files whose headers were read.
    """

    path: Path  # the file or folder
    files: tuple[TensorFile, ...]  # that together hold its tensors
    entries: Mapping[str, Entry]  # dtype and complete shape of each stored tensor
    tensors: dict[str, TrackedTensor]
    # further names of tensors, each with the name under which the tensor is stored
    aliases: dict[str, str]
    t: float
    knows_buffers = True  # which are copied; other programs average theirs, masks too

    @property
    def copies(self) -> list[str]:
        return self._names_with_role("copy")

    @property
    def averaged(self) -> list[str]:
        return self._names_with_role("average")

    def _names_with_role(self, role: str) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.role == role]

    def cells(self, name: str) -> int:
        """Count the chunks that each row of a tensor is spread over."""
        if len(self.files) == 1:
            return 1
        boxes = list[Box]()
        for file in self.files:
            box = file.box(name)
            if box and box.size:
                boxes.append(box)
        rows = {box.offset[:1] for box in boxes}
        return len(boxes) // max(1, len(rows))

    def __enter__(self) -> Any:
        with ExitStack() as stack:
            for file in self.files:
                stack.enter_context(file)
            stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with ExitStack() as stack:
            for file in self.files:
                stack.callback(file.__exit__, kind)

    def read_box(
        self,
        name: str,
        box: Box,
        out: memoryview,
        begin: int = 0,
        verify: bool = True,
    ) -> None:
        """Fill `out` with the row-major elements of a box of a tensor, from element `begin` on,
        verified by default."""
        dtype = self.entries[name].dtype
        for file in self.files:
            if file.box(name) == box and file.entries[name].dtype == dtype:
                offset = begin * ITEM_BYTES[dtype]
                file.read(name, offset, out, verify)
                return
        flat = np.frombuffer(out, items(dtype))
        pieces = list(boxes_of_range(box, begin, begin + flat.size))
        for file in self.files:
            chunk = file.box(name)
            if chunk is None:
                continue
            parts = []
            for piece in pieces:
                part = chunk.intersection(piece)
                if part.size:
                    parts.append(part)
            if parts:
                spans = [chunk.span(part) for part in parts]
                first, _ = min(spans)
                last = max(end for _, end in spans)
                values = self._read(file, name, first, last, verify)
                for part in parts:
                    target = box.view(flat, part, begin)
                    target[...] = chunk.view(values, part, first)

    def _read(
        self,
        file: TensorFile,
        name: str,
        begin: int,
        end: int,
        verify: bool,
    ) -> npt.NDArray[Any]:
        """Read the elements `begin` to `end` of a chunk, in the dtype of the run."""
        stored = file.entries[name].dtype
        dtype = self.entries[name].dtype
        size = ITEM_BYTES[stored]
        count = end - begin
        data = np.empty(count * size, np.uint8)
        file.read(name, begin * size, data.data, verify)
        # parts use a wider dtype for values that are too large or small for the run's dtype
        if stored != dtype:
            values = decode_values(data, stored)
            wide = np.dtype(DTYPES[dtype].torch_name)
            data = values.astype(wide).view(np.uint8)
        return data.view(items(dtype))

    def read_many(self, names: Sequence[str], out: memoryview) -> None:
        """Fill `out` with complete tensors, end to end, verified."""
        first, *others = self.files
        if not (others or first.boxes):
            first.read_many(names, out)
            return
        at = 0
        for name in names:
            entry = self.entries[name]
            end = at + entry.nbytes
            self.read_box(name, Box.full(entry.shape), out[at:end])
            at = end

    def tensor(
        self,
        name: str,
        box: Box | None = None,
    ) -> torch.Tensor:
        """Read a tensor, or a box of it, verified, in its stored dtype."""
        dtype = self.entries[name].dtype
        box = box or Box.full(self.entries[name].shape)
        data = np.empty(box.size * ITEM_BYTES[dtype], np.uint8)
        self.read_box(name, box, data.data)
        return tensor_from_bytes(data, dtype, box.shape)

    def values(
        self,
        name: str,
        begin: int,
        end: int,
    ) -> FloatArray:
        """Read the elements `begin` to `end` of a tensor as float64, unverified, for estimates
        only."""
        entry = self.entries[name]
        count = end - begin
        data = np.empty(count * ITEM_BYTES[entry.dtype], np.uint8)
        box = Box.full(entry.shape)
        self.read_box(name, box, data.data, begin, verify=False)
        return decode_values(data, entry.dtype)

    def read_together(self, ranges: Sequence[ElementRange]) -> FloatArray | None:
        """Read ranges of elements as float64, unverified, by few requests; None if they are not in
        one file, or tensors are in several chunks, or in another order than row-major."""
        if len(self.files) != 1 or self.files[0].boxes:
            return None
        file = self.files[0]
        spans = []
        dtypes = []
        for name, begin, end in ranges:
            entry = file.entries[name]
            if entry.strides:
                return None
            size = ITEM_BYTES[entry.dtype]
            spans.append((entry.begin + begin * size, entry.begin + end * size))
            dtypes.append(entry.dtype)
        data = file.read_spans(spans)
        parts = []
        at = 0
        for dtype, alike in groupby(zip(dtypes, spans, strict=True), key=lambda pair: pair[0]):
            end = at + sum(last - first for _, (first, last) in alike)
            parts.append(decode_values(data[at:end], dtype))
            at = end
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0), *parts])

    def is_mask(self, values: FloatArray) -> bool:
        """Return whether values belong to a buffer that holds infinity, such as an attention
        mask."""
        if self.knows_buffers:
            return False
        lowest, *others = np.unique(values)
        return bool(lowest == -np.inf and len(others) < 2 and np.isfinite(others).all())


class PathSketch(NamedTuple):
    """A sketch, and the identifier of its projection, which depends on the tensors and the random
    signs."""

    projection: int
    sketch: Sketch


class Source(StoredTensors, ABC):
    """A stored average: a snapshot, or a checkpoint of another program."""

    word = "snapshot"
    # a power function, one checkpoint (`Point`), or known times (`Discrete`)
    profile: StoredProfile
    run_id: str  # 32 hexadecimal digits, the same for all sources of a run
    t_unit: str
    step: int
    sigma_rel: float  # the width that the average was tracked for; 0 for other averages
    # the earliest time with mass in averages of the run that this source shows
    t_first: float
    left_out: tuple[str, ...]  # names in the model's state that were not tracked
    measurements: Measurements | None  # None if they must be estimated
    is_known = True  # whether its profile is known, and not a placeholder
    path_sketch: PathSketch | None = None  # of the weights up to `t`; None if unknown

    def __repr__(self) -> str:
        tensors = count_noun(len(self.entries), "tensor")
        return f"{type(self).__name__}({self.name}: {tensors} at t = {self.t:,.12g})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    @abstractmethod
    def identity(self) -> str:
        """16 hexadecimal digits that identify its content."""

    @abstractmethod
    def stored_average(self) -> StoredAverage:
        """Describe the average for a reconstruction."""


# --- several sources


_Source = TypeVar("_Source", bound=Source)


def series_key(source: Source) -> tuple[float, bool]:
    """Return the width of a source, and whether it is a checkpoint."""
    return source.sigma_rel, isinstance(source.profile, Point)


def by_time(items: Iterable[_Source]) -> list[_Source]:
    """Sort sources by time, then sigma_rel, checkpoints last."""
    return sorted(items, key=lambda source: (source.t, *series_key(source)))


def model_difference(one: Source, other: Source) -> str:
    """Say why two sources are of different models, as a phrase to follow their names; empty if they
    are of one model.

    Checkpoints of a model may be stored in several floating-point dtypes.
    """
    if one.aliases != other.aliases:
        return "do not match: they tie different names together"
    unshared = one.tensors.keys() ^ other.tensors.keys()
    for name in sorted(unshared):
        lacking = other if name in one.tensors else one
        return f"do not match: tensor {quote(name)} is missing in {lacking.name}"
    for name, tensor in one.tensors.items():
        second = other.tensors[name]
        differs = tensor.role != second.role
        if one.word == "snapshot":
            differs = tensor != second
        if differs:
            kinds = f"{tensor.role} of {tensor.dtype} and {second.role} of {second.dtype}"
            return f"do not match: tensor {quote(name)} is {kinds}"
        shape = list(one.entries[name].shape)
        second_shape = list(other.entries[name].shape)
        if shape != second_shape:
            return f"do not match: tensor {quote(name)} has the shapes {shape} and {second_shape}"
    return ""


# --- the values of a source


def spacing(
    values: FloatArray,
    mantissa_bits: npt.ArrayLike,
    lowest_exponent: npt.ArrayLike,
) -> FloatArray:
    """Compute the distance from each value to the next one of its dtype, see `dtypes.Dtype`."""
    _, above = np.frexp(values)
    exponent = np.maximum(above - 1, lowest_exponent)
    spacings = np.ldexp(1.0, exponent - mantissa_bits)
    return np.asarray(spacings)


def is_exact(stored: str, own: str) -> bool:
    """Return whether a dtype holds averages of a model's dtype as they are computed."""
    exact = DTYPES["F64" if own == "F64" else "F32"]
    return DTYPES[stored].mantissa_bits >= exact.mantissa_bits


def expected_roundings(values: FloatArray, stored: str, own: str) -> FloatArray:
    """Estimate the expected squared rounding error of each value that was rounded to nearest.

    It is spacing^2 / 12, the variance of a uniform error within half the spacing, also
    if it is subnormal. Zeros contribute 0, since they are almost always exact (biases and gains
    that never moved), as do all values if the stored dtype is as wide as the exact average: float64
    for a model's float64, else float32.

    Weights in half precision count as copies of a float32 training's. A training whose own weights
    are in half precision has exact ones, and an error below the predicted one: both have values of
    this dtype, which move by whole spacings or not at all, so that no file distinguishes them.
    """
    dtype = DTYPES[stored]
    if is_exact(stored, own):
        return np.broadcast_to(0.0, values.shape)
    roundings = np.zeros(values.shape)
    rounded = values != 0
    spacings = spacing(values[rounded], dtype.mantissa_bits, dtype.lowest_exponent)
    roundings[rounded] = spacings**2 / 12
    return roundings


def finite_values(
    source: StoredTensors,
    name: str,
    begin: int,
    end: int,
) -> FloatArray:
    """Read elements of a tensor, zeros for a mask; raise NonFiniteError if another tensor holds nan
    or infinity."""
    part = source.values(name, begin, end)
    if np.isfinite(part).all():
        return part
    if source.is_mask(part):
        return np.zeros_like(part)
    source.tensor(name)  # raises if the file is damaged, for example by a flipped bit
    raise NonFiniteError(
        source.path,
        f"tensor {name!r}: holds nan or infinity",
        f"to leave out a mask or the like, import with {argument('exclude')}",
    )

"""The format of snapshots: its specification, its data as dataclasses, and the encoding of headers.

A snapshot holds one average of one run at one time. It is a safetensors file, which any safetensors reader opens:

    8 bytes     N, the length of the header, unsigned little-endian
    N bytes     the header: one JSON object in UTF-8, padded at the end with spaces to a multiple of 8
    the rest    the payload: tensors in the order of their offsets, little-endian, row-major, without gaps

The header maps each tensor's name to {"dtype", "shape", "data_offsets": [begin, end]} (offsets count from the
start of the payload), and `__metadata__` to an object of strings. N is at most 100,000,000; a file has at most 200,000
tensors.

Metadata of a snapshot. Numbers are decimal and round-trip to the same float64; JSON values are compact. Keys marked
(optional) may be missing.

    key               value
    format            "pt", which readers of PyTorch weights expect
    ema.format        "snapshot"
    ema.version       "1"
    ema.run_id        32 hexadecimal digits; equal in all snapshots of a run, and in no others
    ema.sigma_rel     width of the profile, as the user gave it
    ema.gamma         exponent of the profile
    ema.sigma_rels    JSON list: the widths of all profiles that the run tracks, increasing; includes ema.sigma_rel
    ema.t             training time of the average
    ema.t_unit        what `t` counts: "steps", "images", ...
    ema.step          number of `update_` calls up to `t`
    ema.clock         JSON list of [step, t]: the knots of the clock up to the snapshot; see below (optional)
    ema.t_first       time of the first update; the profile's mass before it applies to the values of that time
    ema.max_interval  the longest interval between two updates since t_first
    ema.updates       number of updates in the average, at least 1 and at most ema.step (optional)
    ema.inherited     expected squared norm of the error that remains in the average from the rounding of the snapshots
                      that the run was resumed from; missing if 0
    ema.schedule      JSON object: update_every, checkpoint_every, update_after_step, max_checkpoints (null: all),
                      checkpoint_dtype (null: the tensor's own), sigma_range (that snapshots are kept for: [low, high])
    ema.tensors       JSON object: name -> {"role": "average", "statistic" or "copy", "dtype": dtype in the model}.
                      "average": the weighted mean of a tensor; "statistic": the same of BatchNorm's running mean or
                      variance, which is not a weight; "copy": the value at `t`
    ema.aliases       JSON object: further names of a tensor -> the name under which it is stored (tied parameters)
    ema.left_out      JSON list: names in the model's state that the run does not track
    ema.selection     JSON object: the fields of `Selection`; copy_only only if it is not empty (optional)
    ema.skip_nonfinite  "true" if the run skips updates with a nan or an infinity (on_nonfinite="skip"), or missing
    ema.off_schedule  "true" for a snapshot between the times of the schedule (at the end of training, or on request),
                      missing otherwise. Later snapshots on the schedule do not depend on it
    ema.measurements  JSON object: norm, rounding, weights, distances; see below (optional)
    ema.motion        JSON object: edges, walk, noise: the motion of the network up to `t`, from the measurements of
                      all snapshots so far, including deleted ones; see below (optional)
    ema.sample        base64 of little-endian float32 values: for some elements of the averaged tensors the network's
                      values at the last update, then as many values of the exact average; see below (optional)
    ema.sketch        base64 of random projections of the network's path up to `t`; see below (optional)
    ema.part          "3/8" in the third of eight parts of a snapshot; see below (optional, as are the next two)
    ema.chunks        JSON object: name -> {"shape": of the complete tensor, "offset": of the chunk's first element},
                      for each tensor of a part
    ema.mesh          JSON object: {"shape": [2, 4], "names": ["dp", "tp"] or null}: the device mesh, for information
    ema.session       in a part: the start of the training process that wrote it, in nanoseconds of a clock (optional);
                      parts of different sessions never form a snapshot
    ema.checksums     JSON object: name -> checksums of the tensor's blocks, 16 hexadecimal digits each, concatenated
    ema.checksum      checksum of the header, 16 hexadecimal digits

Averages may be stored in another dtype than the model's: `checkpoint_dtype`, or F32 if that cannot hold a value.

The knots of a clock are pairs of a step and its time, both increasing, from step 1 and above time 0; at most 1,000. The
last knot is (ema.step, ema.t). From step 0 at time 0 to the first knot, and between two knots, all steps are equally
long, up to a tolerance: half a step where 256 knots suffice for that. The key is missing if `t` is always the step.

Measurements are float64 sums over the elements of all averages in the file (not of statistics and copies). For a large
model they are estimated from a sample of elements, the same for all sums. They are taken from the exact average: `norm`
sums its squares, `rounding` the squares of (stored - exact), `weights` those of (exact - the network's weights at that
time), null or missing if unknown. `distances` is a list of {"t", "sigma_rel", "squared", "rounding"}: `squared` sums
the squares of (this exact average - another average). The other averages are those of the run's other profiles at the
same time, exact (rounding 0), and the two newest earlier snapshots of each profile as stored (rounding: their own), so
at most 3 P - 1 in a run of P profiles. An entry names the other average's t, in [ema.t_first, ema.t], and its
sigma_rel, one of ema.sigma_rels. No average is listed twice, nor is the snapshot itself; a listed snapshot may have
been deleted since. No number is negative.

The motion is constant on intervals of training: `edges` are their ends, increasing, above 0 and at most ema.t, for at
most MAX_INTERVALS intervals; `walk` is the variance of the increments per step, `noise` the variance of the noise times
a step. Both are summed over all elements and have one number per interval, none negative.

The elements of a sample: sort the names of the averaged tensors that have elements and count them from 0 to N - 1. Name
n has, for each k in 0, ..., 511 with k N // 512 = n, the row-major index XXH3("k/name") modulo its number of elements,
without repetitions. The order is by name, then index. A part holds the elements that are in its chunks, where indices
refer to the complete tensors of all parts.

A sketch describes the mean weights of K windows, from the first update to the one at `t`, each projected to D numbers
(see `tracker.measuring`). It begins with four little-endian 8-byte integers: K, D, 2 or 4, and an identifier of the
projection. Float64 values follow: the time of the first update and that of the last update in each window, each
window's number of folds, the mean squared distance of its weights from the window's mean, and a factor. Then, with a
4, come D float32 numbers for each window; with a 2, D float32 numbers for the first window and, for each later one, the
differences from the previous window divided by the factor, in float16. Sketches of parts add up: the projected numbers
and the squared distances.

Checksums are XXH3 (64 bits, seed 0), written as 16 hexadecimal digits, most significant first. A tensor's
bytes are cut into blocks of 4 MiB (4,194,304 bytes), the last one shorter; a tensor without bytes has none. The
header's checksum is computed over the first 8 + N bytes of the file with the 16 digits after
`"ema.checksum":"` replaced by zeros. That text occurs once: inside a JSON string its quotes would be escaped.

A snapshot of a model that several processes hold in chunks is a folder with the name of the file, without the suffix.
Each process that owns a chunk writes one file to it, `part-00003-of-00008.safetensors`, a snapshot of its own tensors:
ema.tensors, ema.aliases, ema.measurements and ema.inherited are those of the part (readers add the latter two, and keep
a distance that all parts have); ema.motion is in the first part. Chunks of one tensor may have different stored dtypes,
of which the widest holds all values exactly; readers use that one. The snapshot is complete if all parts exist, are
equal in the other keys, and the chunks of each tensor hold every element once, as the cells of a grid; otherwise
readers ignore it. Each part also has DCP_SHARDING_INFO, a JSON object: name -> {"saved_offsets": offset} for each of
its tensors, sorted by name, and DCP_VERSION "1.0", which let the HuggingFaceStorageReader of
torch.distributed.checkpoint read the folder.

An *output* (the file that a synthesis writes) has the same form, with ema.format "output", and ema.version, run_id,
t, t_unit, checksums and checksum as a snapshot, and

    ema.profile          the target, for people: "sigma_rel 0.15", "beta 0.9999", ...
    ema.sigma_rel        width of the profile, or "null" if it is not a power function
    ema.gamma            exponent of the profile, or "null"
    ema.method           the solver
    ema.profile_error    relative L2 error between the profiles
    ema.predicted_error  expected relative L2 error of the weights, or "null"
    ema.snapshots        JSON list of {"file", "coefficient"}
    ema.copies           JSON list: names of the tensors that are copies (buffers), not averages
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
import xxhash

from posthoc_cli.dtypes import EPS, ITEM_BYTES
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning import USEFUL_RANGE
from posthoc_cli.profiles import (
    Clock,
    Discrete,
    Point,
    RecordedPowerFunction,
    StoredProfile,
    gamma_from_sigma_rel,
)
from posthoc_cli.reconstruction import Measurements, Motion, Steps, StoredAverage
from posthoc_cli.snapshots.chunks import Chunk
from posthoc_cli.snapshots.codecs import decode_sample, is_path
from posthoc_cli.snapshots.selection import Selection

VERSION = "1"
"""The format version of snapshots, outputs and checkpoints."""
"""The format version of states."""
BLOCK_BYTES = 4 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
"""The largest number of tensors in a file: twice that of the largest models. It bounds the time to read a header."""
MAX_KNOTS = 1_000
MAX_INTERVALS = 1_000
EARLIEST, LATEST = 1e-100, 1e100
"""The range of training times; products of times outside it overflow."""
SUFFIX = ".safetensors"

CHECKSUM_DIGITS = 16
CHECKSUM_MARK = b'"ema.checksum":"'
"""The bytes that precede the header's checksum; a header contains them once."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write: its name, stored dtype (a safetensors name) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The tensor's size in the payload."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor in a file of any format: its dtype, its shape and where its bytes are.

    Attributes:
        begin: offset from the start of the payload; in a file that is not safetensors, from the start of the file.
        nbytes: size of all elements.
        strides: stride of each dimension in elements if the elements are not stored in row-major order, else empty.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    strides: tuple[int, ...] = ()


TensorSpecs = Mapping[str, TensorEntry | TensorSpec]
"""The dtype, shape and size of stored tensors by name."""


@dataclass(frozen=True)
class FileHeader:
    """The header of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    payload_start: int

    @property
    def file_bytes(self) -> int:
        """The size that the file must have."""
        return self.payload_start + sum(entry.nbytes for entry in self.tensors.values())


ROLES = ("average", "statistic", "copy")
"""The roles of tensors. A statistic is averaged but is not a weight: neither measured nor stored in fewer bits."""


class Rule(NamedTuple):
    """A condition on a header's value besides its type: in words, and as a test, which may raise ValueError."""

    words: str
    accepts: Callable[[Any], object]


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


ANY_SIGN = Rule("a finite number", is_number)
"""The rule for numbers that may be negative; all other numbers must not be."""
Time = Annotated[float, Rule("a time of training", lambda t: EARLIEST <= t <= LATEST)]
Count = Annotated[int, Rule("a whole number above 0", lambda count: count > 0)]
RunId = Annotated[str, Rule("32 hexadecimal digits", lambda text: re.fullmatch("[0-9a-f]{32}", text))]
Unit = Annotated[str, Rule("a printable name of what t counts", lambda text: text and text.isprintable())]
Role = Annotated[str, Rule(f"one of {', '.join(ROLES)}", lambda role: role in ROLES)]
Dtype = Annotated[str, Rule(f"one of {', '.join(ITEM_BYTES)}", lambda name: name in ITEM_BYTES)]
Widths = Annotated[tuple[float, ...], Rule("a list of numbers, at least one", len)]
Knots = Annotated[
    tuple[tuple[int, float], ...],
    Rule(f"a list of pairs of a step and its time, at most {MAX_KNOTS:,}", lambda pairs: len(pairs) <= MAX_KNOTS),
]
SampleText = Annotated[str, Rule("a sample", decode_sample)]
SketchText = Annotated[str, Rule("a sketch", is_path)]

_INTERVALS = Rule(
    f"1 to {MAX_INTERVALS:,} values of walk, as many of noise, and one more of edges",
    lambda own: 1 <= len(own.walk) <= MAX_INTERVALS and len(own.walk) == len(own.noise) == len(own.edges) - 1,
)


@dataclass(frozen=True)
class TrackedTensor:
    """How a run tracks one tensor: `role` is one of `ROLES`, `dtype` is the tensor's dtype in the model."""

    role: Role
    dtype: Dtype


class SourceInfo:
    """The metadata of a stored average; for a snapshot it comes from the header.

    Attributes:
        run_id: 32 hexadecimal digits, the same for all sources of a run.
        t: training time of the average.
        t_unit: what `t` counts.
        step: training step at `t`.
        sigma_rel: the width that the average was tracked for; 0 for other averages.
        t_first: the earliest time with mass in averages of the run, as far as this source shows.
        tensors: role and model dtype of each stored tensor.
        aliases: further names of tensors, each with the name under which the tensor is stored.
        left_out: names in the model's state that were not tracked.
        measurements: the measurements of the average; None if they must be estimated.
        sketch: the path of the weights up to `t`, see `codecs.encode_path`; empty if unknown.
    """

    run_id: str
    t: float
    t_unit: str
    step: int
    sigma_rel: float
    t_first: float
    tensors: dict[str, TrackedTensor]
    aliases: dict[str, str]
    left_out: tuple[str, ...]
    measurements: Measurements | None
    sketch: str

    @property
    @abstractmethod
    def clock_pairs(self) -> tuple[tuple[int, float], ...]:
        """The known pairs of step and time, increasing."""

    @abstractmethod
    def average(self, profile: StoredProfile | None = None) -> StoredAverage:
        """Return the average as reconstruction uses it; `profile` replaces a profile that is no power function."""

    @property
    def copies(self) -> list[str]:
        """The names of the copied tensors."""
        return [name for name, tensor in self.tensors.items() if tensor.role == "copy"]

    @property
    def averages(self) -> list[str]:
        """The names of the averaged weights."""
        return [name for name, tensor in self.tensors.items() if tensor.role == "average"]

    @property
    def roles(self) -> dict[str, str]:
        """The role of each tensor by name."""
        return {name: tensor.role for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class TrackingSchedule:
    """When a tracker updates its averages and writes snapshots, and their dtype; see `PostHocEMA.from_model`."""

    update_every: Count = 10
    checkpoint_every: Count = 1000
    update_after_step: int = 0
    max_checkpoints: Count | None = 20
    checkpoint_dtype: Dtype | None = "F16"
    sigma_range: tuple[float, float] = USEFUL_RANGE


@dataclass(frozen=True)
class SnapshotInfo(SourceInfo):
    """The complete metadata of a snapshot, in the order of a header; from `selection` on, each field is optional."""

    run_id: RunId
    sigma_rel: float
    gamma: Annotated[float, ANY_SIGN]
    sigma_rels: Widths
    t: Time
    t_unit: Unit
    step: int
    t_first: Time
    max_interval: float
    schedule: TrackingSchedule
    tensors: dict[str, TrackedTensor]
    aliases: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    selection: Selection | None = None
    skip_nonfinite: bool = False
    clock: Knots = ()
    updates: int | None = None
    inherited: float = 0.0
    off_schedule: bool = False
    measurements: Measurements | None = None
    motion: Annotated[Motion, _INTERVALS] | None = None
    sample: SampleText = ""
    sketch: SketchText = ""
    part: tuple[int, int] | None = None
    chunks: dict[str, Chunk] = field(default_factory=dict)
    mesh: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)
    session: int = 0

    @property
    def clock_pairs(self) -> tuple[tuple[int, float], ...]:
        """The known pairs of step and time, increasing: the clock's knots, or the snapshot's own pair without them."""
        return self.clock or ((self.step, self.t),)

    @property
    def profile(self) -> RecordedPowerFunction:
        """The profile of the average."""
        return RecordedPowerFunction(self.gamma, self.t, self.t_first, self.max_interval)

    def average(self, profile: StoredProfile | None = None) -> StoredAverage:
        """Return the average as reconstruction uses it; a `profile` of points in time replaces the power function."""
        schedule = self.schedule
        skipped_updates = schedule.update_after_step // schedule.update_every
        # Averages of float64 tensors are accumulated in float64, all others in float32.
        is_float64 = {self.tensors[name].dtype for name in self.averages} == {"F64"}
        steps, times = zip(*self.clock_pairs, strict=True)
        (step, t), (last_step, last_t) = [(0, 0.0), *self.clock_pairs][-2:]
        return StoredAverage(
            profile if isinstance(profile, Point | Discrete) else self.profile,
            self.updates or max(self.step // schedule.update_every - skipped_updates, 1),
            EPS["F64" if is_float64 else "F32"], self.measurements, (last_t - t) / (last_step - step),
            Steps(Clock(steps, times), schedule.update_every), self.motion, self.inherited,
            () if is_float64 else tuple(map(gamma_from_sigma_rel, self.sigma_rels)),
        )  # fmt: skip


@dataclass(frozen=True)
class OutputInfo:
    """The complete metadata of an output: `profile` is the target as text, `snapshots` are names and coefficients."""

    run_id: RunId
    profile: str
    sigma_rel: float | None
    gamma: Annotated[float, ANY_SIGN] | None
    t: Time
    t_unit: Unit
    method: str
    profile_error: float
    predicted_error: float | None
    snapshots: tuple[tuple[str, float], ...]
    copies: tuple[str, ...] = ()


OPTIONAL = (*itertools.dropwhile(lambda name: name != "selection", SnapshotInfo.__dataclass_fields__),)
"""The keys of optional metadata of a snapshot."""


def lay_out(specs: Sequence[TensorSpec]) -> dict[str, TensorEntry]:
    """Assign places in a payload: wide items first, so that every tensor is aligned to its item size."""
    entries: dict[str, TensorEntry] = {}
    begin = 0
    for spec in sorted(specs, key=lambda s: -ITEM_BYTES[s.dtype]):
        if spec.name in entries or spec.name == "__metadata__":
            raise InvalidValueError(f"tensor name {spec.name!r}", "must be unique, and not __metadata__")
        entries[spec.name] = TensorEntry(spec.dtype, spec.shape, begin, spec.nbytes)
        begin += spec.nbytes
    return entries


def encode_header(
    entries: Mapping[str, TensorEntry], metadata: Mapping[str, str], checksums: Mapping[str, str]
) -> bytes:
    """Return a file's bytes up to the payload. Their number depends on the lengths of the checksums only."""
    if len(entries) > MAX_TENSORS:
        raise InvalidValueError("header", f"would name {len(entries):,} tensors; at most {MAX_TENSORS:,} are allowed")
    with_checksums = {"ema.checksums": compact(checksums), "ema.checksum": "0" * CHECKSUM_DIGITS}
    header: dict[str, Any] = {"__metadata__": {**metadata, **with_checksums}}
    for name, entry in entries.items():
        offsets = [entry.begin, entry.begin + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    try:
        text = compact(header).encode()
    except UnicodeEncodeError as error:
        near = str(error.object)[max(0, error.start - 40) : error.end + 40]
        raise InvalidValueError("header", f"a name or value cannot be written in UTF-8: {near!r}") from error
    if b"\\u0000" in text:  # readers refuse zero bytes
        raise InvalidValueError("header", "a name or value has a zero byte, which cannot be written")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidValueError("header", f"would take {len(text):,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
    blank = len(text).to_bytes(8, "little") + text
    start = blank.index(CHECKSUM_MARK) + len(CHECKSUM_MARK)
    return blank[:start] + xxhash.xxh3_64_hexdigest(blank).encode() + blank[start + CHECKSUM_DIGITS :]


def header_checksum(start: bytes) -> str:
    """Return the checksum in a header, which identifies the file's content."""
    begin = start.index(CHECKSUM_MARK) + len(CHECKSUM_MARK)
    return start[begin : begin + CHECKSUM_DIGITS].decode()


def encode_metadata(kind: str, values: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata of a file as strings, without checksums: text unchanged, other values as JSON."""
    texts = {f"ema.{key}": value if isinstance(value, str) else compact(value) for key, value in values.items()}
    return {"format": "pt", "ema.format": kind, "ema.version": VERSION, **texts}


def snapshot_metadata(info: SnapshotInfo) -> dict[str, str]:
    """Return the metadata of a snapshot without checksums; a part has the keys of torch.distributed.checkpoint, too."""
    values = {key: value for key, value in vars(info).items() if key not in OPTIONAL or value}
    if info.selection is not None and not info.selection.copy_only:  # older readers do not know this key
        values["selection"] = {key: value for key, value in vars(info.selection).items() if key != "copy_only"}
    if info.part is None:
        return encode_metadata("snapshot", values)
    values["part"] = "{}/{}".format(*info.part)
    offsets = {name: {"saved_offsets": chunk.offset} for name, chunk in sorted(info.chunks.items())}
    for_dcp = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": compact(offsets)}
    return encode_metadata("snapshot", values) | for_dcp


def output_metadata(info: OutputInfo) -> dict[str, str]:
    """Return the metadata of an output as strings, without checksums."""
    listed = [{"file": name, "coefficient": coefficient} for name, coefficient in info.snapshots]
    return encode_metadata("output", vars(info) | {"snapshots": listed})


def block_checksums(data: bytes | bytearray | memoryview) -> list[str]:
    """Return the checksums of the 4 MiB blocks of a tensor's bytes."""
    view = memoryview(data)
    return [xxhash.xxh3_64_hexdigest(view[begin : begin + BLOCK_BYTES]) for begin in range(0, len(view), BLOCK_BYTES)]


class BlockChecksums:
    """Checksums of a tensor's blocks, computed as its bytes arrive in order, in parts of any size, from `position`."""

    def __init__(self, position: int, nbytes: int) -> None:
        self.position, self._nbytes = position, nbytes
        self._hash = xxhash.xxh3_64()

    def of(self, view: memoryview) -> Iterator[tuple[int, str]]:
        """Take in the next bytes; yield the number and the checksum of each block that ends within them."""
        while view:
            left = BLOCK_BYTES - self.position % BLOCK_BYTES
            part, view = view[:left], view[left:]
            self._hash.update(part)
            self.position += len(part)
            if len(part) == left or self.position == self._nbytes:
                yield (self.position - 1) // BLOCK_BYTES, self._hash.hexdigest()
                self._hash.reset()


def blank_checksums(nbytes: int) -> str:
    """Return the placeholder for the checksums of a tensor of `nbytes` bytes."""
    return "0" * (CHECKSUM_DIGITS * -(-nbytes // BLOCK_BYTES))


def compact(value: object) -> str:
    """Return a value as JSON without spaces: arrays as lists, dataclasses as objects."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else vars(value)

"""The format of snapshots: its specification, its data as dataclasses, and the writing of headers.

A snapshot holds one average of one run at one time. It is a safetensors file, which any safetensors reader opens:

    8 bytes     N, the length of the header, unsigned little-endian
    N bytes     the header: one JSON object in UTF-8, padded at the end with spaces to a multiple of 8
    the rest    the payload: tensors in the order of their offsets, little-endian, row-major, without gaps

The header maps each tensor's name to {"dtype", "shape", "data_offsets": [begin, end]} (offsets count from the
start of the payload), and `__metadata__` to an object of strings. N is at most 100,000,000; a file has at most 200,000
tensors.

Metadata of a snapshot. Numbers are decimal and round-trip to the same float64; JSON values are compact.

    key               value
    format            "pt", which readers of PyTorch weights expect
    ema.format        "snapshot"
    ema.version       "1"
    ema.run_id        32 hexadecimal digits; the same in every snapshot of a run, and in no other
    ema.sigma_rel     width of the profile, as the user gave it
    ema.gamma         exponent of the profile
    ema.sigma_rels    JSON list: the widths of all profiles that the run tracks, growing; includes ema.sigma_rel
    ema.t             training time of the average
    ema.t_unit        what `t` counts: "steps", "images", ...
    ema.step          calls of the hook up to `t`
    ema.clock         JSON list of [step, t]: the clock's knots up to the snapshot; see below. May be missing
    ema.t_first       time of the first update: the profile's mass before it is on the values of that time
    ema.max_interval  the longest time between two updates since
    ema.updates       number of updates in the average, at least 1 and at most ema.step. May be missing
    ema.inherited     expected squared norm of the error that the average still has from the rounding of snapshots that
                      the run was resumed from; missing for 0
    ema.schedule      JSON object: update_every, checkpoint_every, update_after_step, max_checkpoints (null: all),
                      checkpoint_dtype (null: each tensor's own), sigma_range (what snapshots are kept for: [low, high])
    ema.tensors       JSON object: name -> {"role": "average", "statistic" or "copy", "dtype": the model's own dtype}.
                      An average is the weighted mean of a tensor, a statistic that of BatchNorm's running means and
                      variances, which are no weights; a copy is its value at `t`
    ema.aliases       JSON object: further names of a tensor -> the name it is stored under (tied parameters)
    ema.left_out      JSON list: names of the model's state that the run does not track
    ema.selection     JSON object: the fields of `Selection`; copy_only only where it has globs. May be missing
    ema.off_schedule  "true" where it was written between the times of the schedule: at the end of training, or on
                      request; else missing. Later snapshots on the schedule do not depend on it
    ema.measurements  JSON object: norm, rounding, weights, distances; see below. May be missing
    ema.motion        JSON object: edges, walk, noise: the motion of the network up to `t`, from the measurements of
                      all snapshots so far, also of those deleted since; see below. May be missing
    ema.sample        base64 of little-endian float32 values: of some elements of the averaged tensors the network's at
                      the time of the last update, then as many of the exact average; see below. May be missing
    ema.sketch        base64 of random projections of the network's path up to `t`; see below. May be missing
    ema.part          "3/8" in the third of eight parts of a snapshot; see below. May be missing, as the next two
    ema.chunks        JSON object: name -> {"shape": of the complete tensor, "offset": of the first element in it},
                      for each tensor of a part
    ema.mesh          JSON object: {"shape": [2, 4], "names": ["dp", "tp"] or null}: of the processes, for people
    ema.session       of a part: when the training that wrote it had been started, in nanoseconds of a clock. May be
                      missing; parts of different ones never make a snapshot
    ema.checksums     JSON object: name -> checksums of the tensor's blocks, 16 hexadecimal digits each, joined
    ema.checksum      checksum of the header, 16 hexadecimal digits

A tensor's stored dtype may differ from its own: averages are stored in `checkpoint_dtype`, but in F32 where values are
too large or too small for that.

The knots are pairs of a call and its time, both growing, from step 1 and above time 0 on; at most 1,000 of them. The
last one is the snapshot's own, ema.step and ema.t. From step 0 at time 0 to the first, and between each two, steps are
equally long, up to a small tolerance: within half a step where 256 knots are enough for that. The key is missing where
`t` is the step throughout.

Measurements are sums over the elements of all averages in the file (no statistics, no copies), in float64, those of a
large model estimated from some of them, which are the same for all its sums; and taken from the exact average: `norm`
its squares, `rounding` the squares of (stored - exact), `weights` those of (exact - the network's weights at that time;
null or missing if unknown), and `distances` a list of {"t", "sigma_rel", "squared", "rounding"}, each the squares of
(this exact average - another one): those of the run's other profiles at the same time, exact (rounding 0), and the two
newest earlier snapshots of each profile as they were stored (rounding: their own). So it has at most 3 P - 1 entries in
a run of P profiles. Each names its partner's t, in [ema.t_first, ema.t], and sigma_rel, one of ema.sigma_rels; none is
named twice, nor is the snapshot itself. A partner may have been deleted since. No number is negative.

The motion is constant on intervals of training: `edges` are their ends, growing, from above 0 to at most ema.t, of at
most MAX_INTERVALS intervals; `walk` is the variance of the increments per step, `noise` the variance of the noise times
a step, summed over all elements, one number an interval each, none negative.

The elements of a sample: of the names of averaged tensors with elements, sorted and counted from 0, number n of N has
for each k in 0, ..., 511 with k N // 512 = n the row-major index XXH3("k/name") modulo its number of elements, each
index once; in the order of names, then indices. A part has those that are in it, by the complete tensors of all parts.

A sketch is of the weights' means over K windows, from the first update to the one at `t`, each projected to D numbers
(see `tracker.measuring`). Little-endian: four 8-byte whole numbers, K, D, 2 or 4, and what tells a projection from
others; in float64 the time of the first update and of the last one in each window, the folds that each is made of, the
mean squared distance of their weights from the window's mean, and a factor; in float32 D numbers for each window, or,
with the 2, for the first one only, and in float16 for each other one its numbers less those of the one before, divided
by the factor. Of parts the numbers and the squares add up.

Checksums are XXH3 (64 bits, seed 0), written as 16 hexadecimal digits, most significant first. A tensor's
bytes are cut into blocks of 4 MiB (4,194,304 bytes), the last one shorter; a tensor without bytes has none. The
header's checksum is taken over the first 8 + N bytes of the file with the 16 digits after
`"ema.checksum":"` replaced by zeros. That text occurs once: inside a JSON string its quotes would be escaped.

A snapshot of a model that several processes hold in chunks is a folder named as a file would be, without the suffix. It
has a file for each process that owns a chunk, `part-00003-of-00008.safetensors`, each a snapshot of its own tensors:
ema.tensors, ema.aliases, ema.measurements and ema.inherited are of these alone (readers add the latter two, and keep a
distance that all parts have), ema.motion is in the first part. Chunks of one tensor may be stored in different dtypes,
of which one holds the values of all; readers take the widest. The snapshot is complete when all parts are there, equal
in the other keys, and the chunks of each tensor hold every element once, as the cells of a grid; else readers ignore
it. Each part also has DCP_SHARDING_INFO, a JSON object: name -> {"saved_offsets": offset} for each of its tensors,
by name, and DCP_VERSION "1.0", so that torch.distributed.checkpoint's HuggingFaceStorageReader reads such a folder.

An *output* (what a synthesis writes) is the same with ema.format "output": it has ema.version, run_id,
t, t_unit, checksums and checksum as above, and

    ema.profile          the target, for people: "sigma_rel 0.15", "beta 0.9999", ...
    ema.sigma_rel        width of the profile, or "null" where it is no power function
    ema.gamma            exponent of the profile, or "null"
    ema.method           the solver
    ema.profile_error    relative L2 error between the profiles
    ema.predicted_error  expected relative L2 error of the weights, or "null"
    ema.snapshots        JSON list of {"file", "coefficient"}
    ema.copies           JSON list: names of the tensors that are copies (buffers), not averages

A *state* (from which a tracker continues exactly) has ema.format "state", and ema.version, run_id, t, t_unit, step,
sigma_rels, schedule, t_first, max_interval, checksums and checksum as a snapshot; t and step are those of
the last call, t_first is 0 before the first update. Its version is "4". An average is kept in three tensors: one
named `<sigma_rel>/<name>` with the sigma_rel as in ema.sigma_rels; what its rounding to F32 took away, the bits of a
BF16 as I16, named `low-<sigma_rel>/<name>` (not of F64); and, for all profiles, the mean of the values after
ema.folded_t, named `mean/<name>`. With m = 1 - (ema.folded_t / ema.averages_t)^(gamma + 1) the average is high + low +
m (mean - high - low), of F64 high alone. Unless ema.folds is "null" there is no low, and the mean is another one
for the first profile, the last, and each in between, by gamma on the line between the two: of the 32 bits of these two,
`mean/` has the upper 16 of the first one as its lower ones, and the upper 16 of the last one, and `low-` of these
profiles the lower 16 of their own; of one profile alone `mean/` has the mean itself. The copies are named
`copy/<name>`. There are no tensors before the first update. And

    ema.averages_t, ema.averages_step  time and calls at the last update; 0 before
    ema.updates          number of updates; "null" if unknown
    ema.window           number of updates in the mean
    ema.folded_t         time of the update at which a mean was last taken into the averages
    ema.folds            how often one was, early in the run; "null" later
    ema.inherited        JSON list: ema.inherited of each profile
    ema.sketch           as of a snapshot, exact, up to ema.folded_t, or, unless ema.folds is "null", to
                         ema.averages_t: a last window of 0 folds is open then; empty where there is none
    ema.clock_state      JSON list: a tolerance and the two slopes (null: no limit) that the clock's next knot may have,
                         then the step and time of each knot, the last one those of the last call
    ema.snapshots        JSON list: header checksums of the snapshots of the training so far

A *checkpoint* (what `ema import --copy` makes of weights, or of an average, that another program stored) has ema.format
"checkpoint", and ema.version, run_id, t, t_unit, step, tensors, aliases, checksums and checksum as a snapshot, and

    ema.sigma_rel        width of the average as that program was asked for it; 0 for the weights at `t` themselves
    ema.gamma            its exponent, or 0
    ema.masses           JSON object: {"times", "masses"}, lists: where the average is no power function, the times of
                         its values, growing, up to `t`, and their shares in it, with sum 1. Else missing
    ema.source           what tells the content that was copied from other content. May be missing

A part of an output has some of its complete tensors, ema.part ("3/8": the third of eight), ema.plan (32 hexadecimal
digits, the same in all parts of a plan) and ema.release (the release that wrote it).
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli.dtypes import EPS, ITEM_BYTES
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning import USEFUL_RANGE
from posthoc_cli.profiles import (
    Clock,
    Discrete,
    FloatArray,
    Point,
    RecordedPowerFunction,
    StoredProfile,
    gamma_from_sigma_rel,
)
from posthoc_cli.reconstruction import Measurements, Motion, Sketch, Steps, StoredAverage
from posthoc_cli.snapshots.chunks import Chunk
from posthoc_cli.snapshots.selection import Selection

VERSION = "1"
"""Of snapshots and outputs."""
STATE_VERSION = "4"
"""Of states."""
BLOCK_BYTES = 4 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
"""Of one file: twice as many as the largest models have. A header of many empty ones would keep a reader busy."""
MAX_KNOTS = 1_000
MAX_INTERVALS = 1_000
EARLIEST, LATEST = 1e-100, 1e100
"""Limits of training times: products of others overflow."""
SUFFIX = ".safetensors"

CHECKSUM_DIGITS = 16
CHECKSUM_MARK = b'"ema.checksum":"'
"""The bytes before the header's checksum; they occur once in a header."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, stored dtype (a safetensors name) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the payload."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorEntry:
    """A stored tensor, of any file: what it is and where its bytes are.

    Attributes:
        begin: counts from the start of the payload; of a file that is no safetensors file from its own.
        nbytes: of all its elements.
        strides: elements from one index to the next, in each dimension, where they are not stored in their order.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class FileHeader:
    """What is where in a file: the header of a safetensors file, or the index of another program's."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    payload_start: int

    @classmethod
    def of_foreign(cls, tensors: Mapping[str, TensorEntry]) -> FileHeader:
        """The index of another program's file, of any format: places count from its beginning, no metadata."""
        return cls({}, dict(tensors), 0)

    @property
    def file_bytes(self) -> int:
        """The size that the file must have."""
        return self.payload_start + sum(entry.nbytes for entry in self.tensors.values())


ROLES = ("average", "statistic", "copy")
"""A statistic is averaged, too, but is no weight: neither measured nor stored in fewer digits."""


class Rule(NamedTuple):
    """What a value in a header must be beside its type, in words and as a test, which may raise a ValueError."""

    words: str
    accepts: Callable[[Any], object]


def is_number(value: object) -> bool:
    """Whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


ANY_SIGN = Rule("a finite number", is_number)
"""Of the other numbers none is negative."""
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
SampleText = Annotated[str, Rule("a sample", lambda text: decode_sample(text))]
SketchText = Annotated[str, Rule("a sketch", lambda text: not text or [*map(_path_arrays, text.split(_AND))])]

_INTERVALS = Rule(
    f"1 to {MAX_INTERVALS:,} values of walk, as many of noise, and one more of edges",
    lambda own: 1 <= len(own.walk) <= MAX_INTERVALS and len(own.walk) == len(own.noise) == len(own.edges) - 1,
)


@dataclass(frozen=True)
class TrackedTensor:
    """How a run tracks one tensor: `role` is one of `ROLES`, `dtype` the model's own."""

    role: Role
    dtype: Dtype


class SourceInfo:
    """What is known of a stored average beside its tensors; of a snapshot its header has it.

    Attributes:
        run_id: 32 hexadecimal digits, the same for all sources of a run.
        t: training time of the average.
        t_unit: what `t` counts.
        step: of the training up to `t`.
        sigma_rel: the width that the average was tracked for; 0 without one.
        t_first: the earliest time that has mass in averages of the run, as far as this source tells.
        tensors: role and own dtype of each stored tensor.
        aliases: further names of tensors, each with the name that it is stored under.
        left_out: names of the model's state that were not tracked.
        measurements: what was measured of it; None where it must be estimated.
        sketch: the weights' path up to its time, see `encode_path`; empty where it is unknown.
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
        """Known pairs of step and time, growing."""

    @abstractmethod
    def average(self, profile: StoredProfile | None = None) -> StoredAverage:
        """What reconstruction uses of it, with this profile where that is no power function."""

    @property
    def copies(self) -> list[str]:
        """Names of the copied tensors."""
        return [name for name, tensor in self.tensors.items() if tensor.role == "copy"]

    @property
    def averages(self) -> list[str]:
        """Names of the averaged weights."""
        return [name for name, tensor in self.tensors.items() if tensor.role == "average"]

    @property
    def roles(self) -> dict[str, str]:
        """How each tensor is treated, by name."""
        return {name: tensor.role for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class TrackingSchedule:
    """When a tracker updates and writes, and how it stores; see `PostHocEMA.from_model`."""

    update_every: Count = 10
    checkpoint_every: Count = 1000
    update_after_step: int = 0
    max_checkpoints: Count | None = 20
    checkpoint_dtype: Dtype | None = "F16"
    sigma_range: tuple[float, float] = USEFUL_RANGE


@dataclass(frozen=True)
class SnapshotInfo(SourceInfo):
    """All metadata of a snapshot, in a header's order; from `selection` on empty where it has none."""

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
        """Known pairs of the run's clock, step and time, growing: the knots, or else the snapshot's own pair."""
        return self.clock or ((self.step, self.t),)

    @property
    def profile(self) -> RecordedPowerFunction:
        """The profile of the average."""
        return RecordedPowerFunction(self.gamma, self.t, self.t_first, self.max_interval)

    def average(self, profile: StoredProfile | None = None) -> StoredAverage:
        """What reconstruction uses of it: of a checkpoint, or an average of known times, with that `profile`."""
        schedule = self.schedule
        before = schedule.update_after_step // schedule.update_every
        own = {self.tensors[name].dtype for name in self.averages}  # float64 accumulates in float64, others in float32
        steps, times = zip(*self.clock_pairs, strict=True)
        (step, t), (last_step, last_t) = [(0, 0.0), *self.clock_pairs][-2:]
        return StoredAverage(
            profile if isinstance(profile, Point | Discrete) else self.profile,
            self.updates or max(self.step // schedule.update_every - before, 1),
            EPS["F64" if own == {"F64"} else "F32"], self.measurements, (last_t - t) / (last_step - step),
            Steps(Clock(steps, times), schedule.update_every), self.motion, self.inherited,
            () if own == {"F64"} else tuple(map(gamma_from_sigma_rel, self.sigma_rels)),
        )  # fmt: skip


@dataclass(frozen=True)
class OutputInfo:
    """All metadata of an output: `profile` is the target in words, `snapshots` their names and coefficients."""

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
"""Metadata that a snapshot may lack."""


def version_of(kind: str | None) -> str:
    """The version that this release writes and reads of a kind of file, as in ema.format."""
    return STATE_VERSION if kind == "state" else VERSION


def lay_out(specs: Sequence[TensorSpec]) -> dict[str, TensorEntry]:
    """Places for tensors: wide items first, so that every tensor is aligned to its own item size."""
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
    """The file's first bytes, up to the payload. Their number depends on the checksums' lengths only."""
    if len(entries) > MAX_TENSORS:
        raise InvalidValueError("header", f"would name {len(entries):,} tensors; at most {MAX_TENSORS:,} are allowed")
    sums = {"ema.checksums": compact(checksums), "ema.checksum": "0" * CHECKSUM_DIGITS}
    header: dict[str, Any] = {"__metadata__": {**metadata, **sums}}
    for name, entry in entries.items():
        offsets = [entry.begin, entry.begin + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    try:
        text = compact(header).encode()
    except UnicodeEncodeError as error:
        near = str(error.object)[max(0, error.start - 40) : error.end + 40]
        raise InvalidValueError("header", f"a name or value cannot be written in UTF-8: {near!r}") from error
    if b"\\u0000" in text:  # readers refuse it
        raise InvalidValueError("header", "a name or value has a zero byte, which cannot be written")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidValueError("header", f"would take {len(text):,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
    blank = len(text).to_bytes(8, "little") + text
    start = blank.index(CHECKSUM_MARK) + len(CHECKSUM_MARK)
    return blank[:start] + xxhash.xxh3_64_hexdigest(blank).encode() + blank[start + CHECKSUM_DIGITS :]


def header_checksum(start: bytes) -> str:
    """The checksum in a header, which identifies the file's content."""
    begin = start.index(CHECKSUM_MARK) + len(CHECKSUM_MARK)
    return start[begin : begin + CHECKSUM_DIGITS].decode()


def encode_metadata(kind: str, values: Mapping[str, object]) -> dict[str, str]:
    """The metadata of a file as strings, without its checksums: text as it is, anything else as JSON."""
    texts = {f"ema.{key}": value if isinstance(value, str) else compact(value) for key, value in values.items()}
    return {"format": "pt", "ema.format": kind, "ema.version": version_of(kind), **texts}


def snapshot_metadata(info: SnapshotInfo) -> dict[str, str]:
    """The metadata of a snapshot, without its checksums; of a part with what torch.distributed.checkpoint reads."""
    values = {key: value for key, value in vars(info).items() if key not in OPTIONAL or value}
    if info.selection is not None and not info.selection.copy_only:  # for readers that do not know it
        values["selection"] = {key: value for key, value in vars(info.selection).items() if key != "copy_only"}
    if info.part is None:
        return encode_metadata("snapshot", values)
    values["part"] = "{}/{}".format(*info.part)
    offsets = {name: {"saved_offsets": chunk.offset} for name, chunk in sorted(info.chunks.items())}
    for_dcp = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": compact(offsets)}
    return encode_metadata("snapshot", values) | for_dcp


def output_metadata(info: OutputInfo) -> dict[str, str]:
    """The metadata of an output as strings, without its checksums."""
    listed = [{"file": name, "coefficient": coefficient} for name, coefficient in info.snapshots]
    return encode_metadata("output", vars(info) | {"snapshots": listed})


def block_checksums(data: bytes | bytearray | memoryview) -> list[str]:
    """Checksums of the 4 MiB blocks of a tensor's bytes."""
    view = memoryview(data)
    return [xxhash.xxh3_64_hexdigest(view[begin : begin + BLOCK_BYTES]) for begin in range(0, len(view), BLOCK_BYTES)]


class BlockChecksums:
    """Checksums of a tensor's blocks, whose bytes go by in order, in parts of any size, from `position` on."""

    def __init__(self, position: int, nbytes: int) -> None:
        self.position, self._nbytes = position, nbytes
        self._hash = xxhash.xxh3_64()

    def of(self, view: memoryview) -> Iterator[tuple[int, str]]:
        """The blocks that end within the bytes that come next, by number, each with its checksum."""
        while view:
            left = BLOCK_BYTES - self.position % BLOCK_BYTES
            part, view = view[:left], view[left:]
            self._hash.update(part)
            self.position += len(part)
            if len(part) == left or self.position == self._nbytes:
                yield (self.position - 1) // BLOCK_BYTES, self._hash.hexdigest()
                self._hash.reset()


def blank_checksums(nbytes: int) -> str:
    """Placeholder for the checksums of a tensor of `nbytes` bytes."""
    return "0" * (CHECKSUM_DIGITS * -(-nbytes // BLOCK_BYTES))


def compact(value: object) -> str:
    """JSON without spaces; of arrays as lists, of dataclasses as objects."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else vars(value)


# --- the sample of the network

Floats = npt.NDArray[np.float32]

PLACES = 512
"""Elements of a sample; of small models fewer."""


def encode_sample(weights: npt.ArrayLike, average: npt.ArrayLike) -> str:
    """A sample as a header has it: float32 values of the network, then of the average, little-endian, in base64."""
    return base64.b64encode(np.concatenate([weights, average]).astype("<f4").tobytes()).decode()


def decode_sample(text: str) -> tuple[Floats, Floats]:
    """The values of the network and of the average; a ValueError if it is no sample."""
    data = base64.b64decode(text, validate=True)
    if len(data) % 8 or len(data) > 8 * PLACES:
        raise ValueError(f"must be two equal numbers of at most {PLACES} float32 values")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    return values[: len(values) // 2], values[len(values) // 2 :]


# --- the sketch of the path

MOST_WINDOWS, MOST_NUMBERS = 4_096, 1_024
_LARGEST = 2.0**14
"""Of differences in float16, which leaves 28 binary orders below with all their digits."""


_AND = "|"
"""Between the sketches of parts, in memory only."""

_MOST = 1e60
"""Larger numbers are not used: products of them overflow."""


class Path(NamedTuple):
    """A sketch, and what tells its projection from others: of which tensors it is, and by which signs."""

    projection: int
    sketch: Sketch


def encode_path(path: Path, exact: bool = False) -> str:
    """A sketch as a header has it, or `exact`, as a state does; nothing where a number is not finite."""
    sketch, means = path.sketch, path.sketch.means.astype("<f4")
    if not (np.isfinite(means).all() and np.all(sketch.spread < _MOST)):
        return ""
    factor = float(np.abs(np.diff(means.astype(np.float64), axis=0)).max(initial=0.0)) / _LARGEST or 1.0
    steps, place = np.zeros((len(means) - 1, means.shape[1]), "<f2"), means[0] / factor
    for step, wanted in zip(steps, means[1:] / factor, strict=True):  # from where the steps before lead
        step[:] = wanted - place
        place = place + step
    counts = np.array([*means.shape, 4 if exact else 2, path.projection], "<i8")
    known = np.concatenate((sketch.edges, sketch.folds, sketch.spread, [factor])).astype("<f8")
    parts = (counts, known, means) if exact else (counts, known, means[:1], steps)
    return base64.b64encode(b"".join(part.tobytes() for part in parts)).decode()


def decode_path(text: str) -> Path:
    """The same; a ValueError if it is no sketch. Those of parts add up, see `joined_paths`."""
    first, *others = (_decoded(part) for part in text.split(_AND))
    for _, other in others:
        first = Path(
            first.projection,
            replace(first.sketch, means=first.sketch.means + other.means, spread=first.sketch.spread + other.spread),
        )
    return first


def _decoded(text: str) -> Path:
    (windows, _, size, projection), (*known, factor), means, steps = _path_arrays(text)
    edges, folds, spread = np.split(np.array(known), [windows + 1, 2 * windows + 1])
    if size == 2:
        means = np.concatenate((means, means + np.cumsum(steps * factor, axis=0)))
    return Path(projection, Sketch(edges, folds, means, spread))


def path_of_part(text: str, part: tuple[int, int] | None) -> Path | None:
    """The path of a part, by its number from 1 and theirs, or of a complete model; None where it is unknown."""
    number, count = part or (1, 1)
    texts = text.split(_AND)
    return decode_path(texts[number - 1]) if text and len(texts) == count else None


def _path_arrays(text: str) -> tuple[list[int], FloatArray, FloatArray, FloatArray]:
    """The four whole numbers, what is known of the windows and the factor, and the numbers in float32 and float16."""
    data = base64.b64decode(text, validate=True)
    counts = np.frombuffer(data[:32], "<i8").tolist() if len(data) >= 32 else [0] * 4
    windows, numbers, size, _ = counts
    first = 32 + 8 * (3 * windows + 2)
    rest = first + 4 * numbers * (windows if size == 4 else 1)
    is_sketch = 0 < windows <= MOST_WINDOWS and 0 < numbers <= MOST_NUMBERS and size in (2, 4)
    if not is_sketch or len(data) != rest + 2 * numbers * (windows - 1) * (size == 2):
        raise ValueError(f"must be 1 to {MOST_WINDOWS:,} windows of 1 to {MOST_NUMBERS:,} numbers, of size 2 or 4")
    pieces = ((data[32:first], "<f8"), (data[first:rest], "<f4"), (data[rest:], "<f2"))
    known, means, steps = (np.frombuffer(piece, dtype).astype(np.float64) for piece, dtype in pieces)
    return counts, known, means.reshape(-1, numbers), steps.reshape(-1, numbers)


def joined_paths(texts: Sequence[str]) -> str:
    """The sketches of a model's parts as one; nothing unless all have one of the same windows."""
    if not texts or not all(texts):
        return ""
    first, *others = (_path_arrays(text) for text in texts)
    windows = 2 * first[0][0] + 1
    alike = all(first[0][:2] == one[0][:2] and np.array_equal(first[1][:windows], one[1][:windows]) for one in others)
    return _AND.join(texts) if alike else ""

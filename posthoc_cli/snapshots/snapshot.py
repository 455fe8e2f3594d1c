"""A snapshot: one average of one run at one time. The dataclass `Snapshot` is the header of its
file, and specifies its content."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import xxhash

from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError
from posthoc_cli.planning import USEFUL_RANGE
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import Measurements, Steps, StoredAverage
from posthoc_cli.run_clock import Clock
from posthoc_cli.snapshots.boxes import Chunk
from posthoc_cli.snapshots.decoding import ANY_SIGN, convert, decode, is_optional
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.selection import Selection
from posthoc_cli.snapshots.sketch_text import decode_path
from posthoc_cli.snapshots.source import PathSketch, Source, TrackedTensor
from posthoc_cli.snapshots.strict_json import compact
from posthoc_cli.snapshots.tensorfile import FORMAT, WITH_AVERAGE, TensorFile
from posthoc_cli.snapshots.weights_sample import Floats, decode_sample, drop_average, places

# the range of training times; products of times outside it overflow
EARLIEST = 1e-100
LATEST = 1e100


@dataclass(frozen=True)
class TrackingSchedule:
    """When a tracker updates its averages and writes snapshots, and their dtype; see
    `PostHocEMA.from_model`."""

    update_every: int = 10
    checkpoint_every: int = 1000
    update_after_step: int = 0
    max_checkpoints: int | None = 20
    checkpoint_dtype: str | None = "F16"  # a safetensors name
    sigma_range: tuple[float, float] = USEFUL_RANGE


@dataclass(frozen=True)
class Moment:
    """A call of `update_`: its number, and what the loop gives. A tracker's progress, averages and
    states hold it as a whole, and the headers of snapshots each of its fields."""

    step: int
    t: float  # the training time, on the run's clock


START = Moment(0, 0.0)
"""Before the first call."""

OUTSIDE_HEADER = ("path", "files", "entries")
"""Fields of a `Snapshot` that say where it is; snapshots with the same header are equal."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Snapshot(Moment, Source):
    """A snapshot: the content of its header, and the files that hold its tensors.

    The header's "ema" is a JSON object of all other fields than `OUTSIDE_HEADER`; fields equal to
    their defaults are left out, and unknown fields are ignored. Dataclasses are objects, tuples
    lists. Numbers are finite, round-trip to the same float64 and, without `ANY_SIGN`, are not
    negative.

    A snapshot of a model that several processes hold in chunks is a folder with the name of the
    file, without the suffix. Each process that owns a chunk writes one file to it,
    `part-00003-of-00008.safetensors`, a snapshot of its own tensors; `directory.join_parts` says
    what parts share. Chunks of one tensor may have different stored dtypes, of which the widest
    holds all values exactly; readers use that one. The snapshot is complete if all parts exist and
    belong
    together, and the chunks of each tensor hold every element once, as the cells of a grid;
    otherwise readers ignore it. For the HuggingFaceStorageReader of torch.distributed.checkpoint,
    the metadata of each part also have DCP_SHARDING_INFO, a JSON object: name -> {"saved_offsets":
    offset} sorted by name, and DCP_VERSION "1.0".
    """

    run_id: str  # 32 hexadecimal digits; equal in all snapshots of a run, and in no others
    sigma_rel: float  # width of the profile, as the user gave it
    gamma: Annotated[float, ANY_SIGN]  # exponent of the profile
    sigma_rels: tuple[float, ...]  # of all profiles that the run tracks, increasing
    t_unit: str  # what `t` counts: "steps", "images", ...
    # of the first update; the profile's mass before it applies to the values of that time
    t_first: float
    max_interval: float  # the longest interval between two updates since `t_first`
    updates: int  # number of updates in the average
    # the tracker's settings; `sigma_range` is what snapshots are kept for
    schedule: TrackingSchedule
    # The role of each tensor and its dtype in the model. "average": the weighted mean of a tensor;
    # "statistic": the same of BatchNorm's running mean or variance, which is not a weight; "copy":
    # the value at `t`. Averages may be stored in another dtype: `checkpoint_dtype`, or F32 if that
    # cannot hold a value. In the header: lists of names by role and dtype, such as {"average F32":
    # ["w", "b"], "copy I64": ["n"]}.
    tensors: Annotated[dict[str, TrackedTensor], ungroup_tensors]
    # of tied parameters: further name -> stored name
    aliases: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # names in the model's state that the run does not track
    selection: Selection | None = None  # which tensors the run tracks
    # Float64 sums over the elements of all averages in the file (not of statistics and copies), for
    # a large model estimated from a sample: of the squares of the exact average, and of (stored -
    # exact).
    measurements: Measurements | None = None
    # Base64 of little-endian float32 values: of the network at the last update, for the elements
    # that `places` names. A part has the elements in its chunks.
    sample: str = ""
    # base64 of random projections of the network's path up to `t`, see `encode_path`
    sketch: str = ""
    part: tuple[int, int] | None = None  # (3, 8) in the third of eight parts
    # of a part: each tensor's complete shape, and its place
    chunks: dict[str, Chunk] = field(default_factory=dict)
    # {"shape": [2, 4], "names": ["dp", "tp"]}
    mesh: dict[str, tuple[Any, ...] | None] = field(default_factory=dict)
    # of a part: when its training began, in nanoseconds of a clock; different ones never join
    session: int = 0
    path: Path = field(default_factory=Path, compare=False)  # the file, or the folder of the parts
    # each with the boxes that it holds
    files: tuple[TensorFile, ...] = field(default=(), compare=False)
    # dtype and complete shape
    entries: Mapping[str, Entry] = field(default_factory=dict, compare=False)

    @property
    def moment(self) -> Moment:
        return Moment(**{each.name: getattr(self, each.name) for each in fields(Moment)})

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that identify the content: the checksum of its header, or of its
        parts' headers."""
        checksums = [file.checksum for file in self.files]
        if len(checksums) == 1:
            return checksums[0]
        return xxhash.xxh3_64_hexdigest("".join(checksums).encode())

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def profile(self) -> PowerFunction:  # type: ignore[override]  # in a frozen class no field can be assigned either
        return PowerFunction(self.gamma, self.t)

    @property
    def path_sketch(self) -> PathSketch | None:  # type: ignore[override]
        return decode_path(self.sketch) if self.sketch else None

    def stored_average(self) -> StoredAverage:
        """Describe the average for a reconstruction."""
        # Averages of float64 tensors are accumulated in float64, all others in float32.
        dtypes = {self.tensors[name].dtype for name in self.averaged}
        eps = EPS["F64"]
        if dtypes != {"F64"}:
            eps = EPS["F32"]
        clock = Clock([self.step], [self.t])
        return StoredAverage(
            profile=self.profile,
            eps=eps,
            measurements=self.measurements,
            steps=Steps(clock, self.schedule.update_every),
            t_first=self.t_first,
        )

    def encode(self) -> dict[str, Any]:
        """Encode the header as a JSON object, without the checksums of blocks."""
        values: dict[str, Any] = {}
        for each in fields(self):
            if each.name in OUTSIDE_HEADER:
                continue
            value = getattr(self, each.name)
            is_zero = value == 0 and each.default is None
            if value or is_zero or not is_optional(each):
                values[each.name] = value
        names = defaultdict(list)
        for name, tensor in self.tensors.items():
            names[f"{tensor.role} {tensor.dtype}"].append(name)
        values["tensors"] = names
        measured = self.measurements
        if measured is not None:
            values["measurements"] = {"norm": measured.norm, "rounding": measured.rounding}
        return {"kind": "snapshot", "format": FORMAT, **values}

    @property
    def for_dcp(self) -> dict[str, str]:
        """The further metadata of a part, for torch.distributed.checkpoint."""
        if self.part is None:
            return {}
        offsets = {}
        for name, chunk in sorted(self.chunks.items()):
            offsets[name] = {"saved_offsets": chunk.offset}
        return {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": compact(offsets)}


def file_bytes(snapshots: Sequence[Snapshot]) -> int:
    """Sum the sizes of the files of all snapshots."""
    return sum(snapshot.nbytes for snapshot in snapshots)


def decode_snapshot(file: TensorFile) -> Snapshot:
    """Decode the snapshot in a file, or the part of one; raise FileFormatError, naming the key, if
    it is invalid."""
    snapshot = decode(file, "snapshot", Snapshot)
    if snapshot.tensors.keys() != file.entries.keys():
        raise FileFormatError(file.path, "ema: tensors: are not the tensors of the file")
    sample = snapshot.sample
    if file.content["format"] == WITH_AVERAGE:
        sample = drop_average(sample)
    return replace(snapshot, sample=sample, path=file.path, files=(file,), entries=file.entries)


def ungroup_tensors(lists: Any) -> dict[str, TrackedTensor]:
    """Decode the tensors of a header from its lists of names by role and dtype."""
    tensors = dict[str, TrackedTensor]()
    for words, names in convert(lists, dict[str, tuple[str, ...]]).items():
        role, _, dtype = words.partition(" ")
        tensors |= dict.fromkeys(names, TrackedTensor(role, dtype))
    return tensors


def recorded_weights(snapshots: Sequence[Snapshot]) -> dict[int, Floats]:
    """Collect the network's sampled weights by step, in order, of the times whose headers hold a
    complete sample."""
    newest = snapshots[-1]
    shapes = {name: newest.entries[name].shape for name in newest.averaged}
    count = len(places(shapes))
    complete = {}
    for snapshot in snapshots:
        weights = decode_sample(snapshot.sample)
        if len(weights) == count:
            complete[snapshot.step] = weights
    return complete

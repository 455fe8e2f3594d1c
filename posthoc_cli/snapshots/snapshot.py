"""The headers of our files. A snapshot is one average of one run at one time: the dataclass
`Snapshot` is its header, and specifies its content; `OutputInfo` is the header of an output.

Two texts of a header show the path of the weights: a sketch by random projections, and a sample.
The sample holds some 512 elements of the network's weights at the snapshot's time. Names and shapes
alone determine which elements these are. A model stands at a time of the run if its values equal
the recorded ones, exactly or after rounding these to float16 or bfloat16, as a checkpoint in half
precision has them.

One small function, `convert`, decodes the JSON of a header by the annotations of the dataclass
that holds it.
"""

from __future__ import annotations

import base64
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli.clock import Clock
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    Log,
    check_word,
    list_first,
    quote,
)
from posthoc_cli.planning import USEFUL_RANGE
from posthoc_cli.profiles import FloatArray, PowerFunction
from posthoc_cli.reconstruction import Measurements, Sketch, Steps, StoredAverage
from posthoc_cli.snapshots.sources import PathSketch, Rule, Source, TrackedTensor
from posthoc_cli.snapshots.tensorfile import (
    FORMAT,
    FORMATS,
    WITH_AVERAGE,
    Box,
    Chunk,
    Entry,
    TensorFile,
    compact,
)

log = Log(__name__)

# --- the sample

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


def _drop_average(sample: str) -> str:
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


# --- the sketch of the path

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


# --- values

# the range of training times; products of times outside it overflow
EARLIEST = 1e-100
LATEST = 1e100
T = TypeVar("T")


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


# of numbers that may be negative; all others must not be
ANY_SIGN = "of any sign"
Count = Annotated[int, Rule("a whole number above 0", lambda count: count > 0)]
RunId = Annotated[
    str, Rule("32 hexadecimal digits", lambda text: re.fullmatch("[0-9a-f]{32}", text))
]
SketchText = Annotated[str, Rule("a sketch", lambda text: not text or decode_path(text))]
"""Values of states and of options, which have no checksums; a sealed header is trusted."""


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


# --- the choice of tensors

BUFFERS = ("statistics", "copy", "average")  # the treatments of buffers
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Selection:
    """A choice of tensors, by globs on their names; see `PostHocEMA.from_model`."""

    only_trainable: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    buffers: str = "statistics"
    copy_only: tuple[str, ...] = ()

    def names(self, name: str) -> bool:
        """Return whether the globs select a name. `*` matches any characters including dots."""
        if self.include and not _matches(name, self.include):
            return False
        return not _matches(name, self.exclude)

    def copies(self, name: str) -> bool:
        return _matches(name, self.copy_only)

    def adapt_to(self, run: Source) -> Selection:
        """Adapt the selection to a run that is resumed: running statistics keep their role."""
        buffers = self.buffers
        if buffers == "copy" and any(each.role == "statistic" for each in run.tensors.values()):
            buffers = "statistics"
        if buffers != "statistics":
            return self
        statistics = sorted(running_statistics(run.copies))
        kept = [name for name in statistics if not self.copies(name)]
        return replace(self, buffers=buffers, copy_only=(*self.copy_only, *kept))


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def make_selection(
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    buffers: str,
) -> Selection:
    """Make a selection from a user's arguments; raise InvalidValueError, naming the argument, if
    one is invalid."""
    check_word("buffers", buffers, BUFFERS)
    included = _globs("include", include)
    return Selection(not included, included, _globs("exclude", exclude), buffers)


def _globs(
    argument: str,
    given: str | Iterable[str] | None,
) -> tuple[str, ...]:
    globs: tuple[Any, ...] = ()
    if isinstance(given, Iterable) and not isinstance(given, str):
        globs = tuple(given)
    elif given is not None:
        globs = (given,)
    if not all(isinstance(glob, str) and glob for glob in globs):
        reason = "must be a glob on names, such as 'decoder.*', or a list"
        raise InvalidValueError(argument, reason, value=repr(given))
    return globs


def check_globs(selection: Selection, names: Iterable[str]) -> None:
    """Raise InvalidValueError if a glob matches none of a model's names: it is usually misspelt."""
    names = list(names)
    examples = list_first(map(quote, names), 3) or "none"
    for argument in ("include", "exclude", "copy_only"):
        for glob in getattr(selection, argument):
            if not any(fnmatchcase(name, glob) for name in names):
                reason = f"matches no tensor of the model; it has names such as {examples}"
                raise InvalidValueError(argument, reason, value=repr(glob))


def running_statistics(names: Iterable[str]) -> frozenset[str]:
    """Find the names of BatchNorm's running means and variances: a layer has both, and a count of
    batches."""
    known = frozenset(names)
    mean = _STATISTICS[0]
    statistics = set[str]()
    for name in known:
        if name.split(".")[-1] == mean:
            layer = name.removesuffix(mean)
            parts = [layer + part for part in _STATISTICS]
            if known.issuperset(parts):
                statistics.update(parts[:2])
    return frozenset(statistics)


def statistics_notice(copies: Iterable[str]) -> str | None:
    """Write advice, in one line, about running statistics among the names of copies; None without
    any."""
    if not running_statistics(copies):
        return None
    return (
        "the running statistics of BatchNorm are copies, which belong to the raw weights: "
        "recompute them with torch.optim.swa_utils.update_bn(loader, model) before you measure or "
        "use an average"
    )


def warn_of_statistics(copies: Iterable[str]) -> None:
    """Warn of BatchNorm statistics that an average has from the raw weights."""
    if notice := statistics_notice(copies):
        log.warning(notice)


# --- the snapshot

OUTSIDE_HEADER = ("path", "files", "entries")
"""Fields of a `Snapshot` that say where it is; snapshots with the same header are equal."""


@dataclass(frozen=True, repr=False)
class Snapshot(Source):
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
    t: float
    t_unit: str  # what `t` counts: "steps", "images", ...
    step: int  # number of `update_` calls up to `t`
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

    def average(self) -> StoredAverage:
        """Describe the average for a reconstruction."""
        # Averages of float64 tensors are accumulated in float64, all others in float32.
        dtypes = {self.tensors[name].dtype for name in self.averages}
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
            if value or is_zero or not _is_optional(each):
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
        sample = _drop_average(sample)
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
    shapes = {name: newest.entries[name].shape for name in newest.averages}
    count = len(places(shapes))
    complete = {}
    for snapshot in snapshots:
        weights = decode_sample(snapshot.sample)
        if len(weights) == count:
            complete[snapshot.step] = weights
    return complete


# --- the header of an output


@dataclass(frozen=True)
class Used:
    """A snapshot that an output was made from."""

    file: str
    coefficient: Annotated[float, ANY_SIGN]


@dataclass(frozen=True)
class OutputInfo:
    """The content of the header of an output, the file that a synthesis writes: `kind` is
    "output"."""

    run_id: str
    profile: str  # the target, for people: "sigma_rel 0.15", "beta 0.9999", ...
    sigma_rel: float | None  # None, like gamma, if the profile is not a power function
    gamma: Annotated[float, ANY_SIGN] | None
    t: float
    t_unit: str
    method: str
    profile_error: float  # relative L2 error between the profiles
    # expected relative L2 error of the weights; None if it is unknown
    predicted_error: float | None
    snapshots: tuple[Used, ...]
    copies: tuple[str, ...] = ()  # names of the tensors that are copies (buffers), not averages

    def encode(self) -> dict[str, Any]:
        """Encode the header as a JSON object, without the checksums of blocks."""
        return {"kind": "output", "format": FORMAT, **vars(self)}


# --- decoding by annotations


def decode(
    file: TensorFile,
    kind: str,
    form: type[T],
) -> T:
    """Decode the content of a file of a kind as the dataclass `form`; raise FileFormatError if it
    is invalid.

    A header with a valid checksum is trusted: checksums guard against accidents and are not
    signatures.
    """
    number = file.content.get("format")
    if file.kind != kind or number not in FORMATS:
        accepted = " or ".join(map(str, FORMATS))
        reason = f"is not of the kind {kind!r} and format {accepted}"
        if file.kind:
            reason += f", but {quote(file.kind)} of format {quote(number)}"
        else:
            reason += " of this package"
        raise FileFormatError(file.path, reason)
    try:
        return cast(T, convert(file.content, form))
    except (ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(file.path, f"ema: {error}") from None


@lru_cache
def field_kinds(form: Any) -> dict[str, Any]:
    """Find the annotations of a dataclass by field name."""
    return get_type_hints(form, include_extras=True)


def convert(value: Any, kind: Any) -> Any:
    """Convert a JSON value to an annotated type: lists to tuples, objects to dataclasses, by their
    fields.

    Raises ValueError, which says what is expected. Numbers must be finite and at least 0, and
    satisfy the annotation's `Rule`, or are converted by the function in its place. Keys that a
    dataclass does not have are ignored: they come from later releases.
    """
    if kind in _PLAIN:
        accepts, words = _PLAIN[kind]
        _check(accepts(value), words, value)
        return float(value) if kind is float else value
    origin = get_origin(kind)
    args = get_args(kind)
    if origin is Annotated:
        return _convert_by_rule(value, *args)
    if type(None) in args:
        return None if value is None else convert(value, args[0])
    if origin is tuple:
        return _convert_list(value, args)
    _check(isinstance(value, dict), "a JSON object", value)
    if is_dataclass(kind):
        return _convert_object(value, kind)
    return {name: _member(name, each, args[-1]) for name, each in value.items()}


def _convert_by_rule(
    value: Any,
    kind: Any,
    rule: Rule | Callable[[Any], Any],
) -> Any:
    if not isinstance(rule, Rule):
        return rule(value)
    result = convert(value, kind)
    _check(bool(rule.accepts(result)), rule.words, value)
    return result


def _convert_list(
    value: Any,
    kinds: tuple[Any, ...],
) -> tuple[Any, ...]:
    words = f"a list of {len(kinds)}"
    is_list = isinstance(value, list | tuple)
    if kinds[-1] is ...:
        words = "a list"
        kinds = kinds[:1] * len(value) if is_list else kinds
    _check(is_list and len(value) == len(kinds), words, value)
    return tuple(map(convert, value, kinds))


def _convert_object(value: Mapping[str, Any], form: Any) -> Any:
    for each in fields(form):
        if each.name not in value and not _is_optional(each):
            raise ValueError(f"{each.name}: is missing")
    members = {}
    for name, kind in field_kinds(form).items():
        if name in value:
            members[name] = _member(name, value[name], kind)
    return form(**members)


def _member(name: str, value: Any, kind: Any) -> Any:
    try:
        return convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{quote(name)[1:-1]}: {error}") from error


def _is_optional(each: Field[Any]) -> bool:
    """Return whether a header may lack a field: one that is empty by default."""
    return each.default_factory is not MISSING or not each.default


def _check(is_right: bool, words: str, value: Any) -> None:
    if not is_right:
        raise ValueError(f"must be {words}, not {quote(value)}")


# The plain types of JSON values, each with a test and its description.
_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    Any: (lambda _: True, ""),
    Annotated[float, ANY_SIGN]: (is_number, "a finite number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    str: (lambda value: isinstance(value, str), "a string"),
    int: (lambda value: type(value) is int and 0 <= value < 2**63, "a whole number, at least 0"),
    float: (lambda value: is_number(value) and value >= 0, "a finite number, at least 0"),
}

"""A checkpoint as a source of averages, and the checks that several belong together."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from posthoc_cli import files
from posthoc_cli.checkpoints.read_model import FoundChunk, names_in, tensor_shape
from posthoc_cli.dtypes import DTYPES, EPS
from posthoc_cli.errors import FileFormatError, MismatchError, shown
from posthoc_cli.profiles import (
    Clock,
    Point,
    PowerFunction,
    RecordedPowerFunction,
    StoredProfile,
    gamma_from_sigma_rel,
)
from posthoc_cli.reconstruction import Steps, StoredAverage
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.outputs import describe_tensors
from posthoc_cli.snapshots.reading import BackingFile
from posthoc_cli.snapshots.sources import FileSource, Snapshot, by_time, read_values, run_clock

_CHOOSE = "name those of one run by a glob, or import with `include`, `exclude` or `prefix`"
_NO_WEIGHTS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names of BatchNorm's statistics, which are copied: a variance must not be extrapolated."""

_COMPARED = 1024
"""Elements of a tensor by which a copy is known."""


@dataclass(frozen=True)
class CheckpointInfo(fmt.SourceInfo):
    """What is known of a checkpoint beside its tensors: see `format.SourceInfo`.

    Attributes:
        profile: what its tensors are of: the weights at one time (`Point`), or an average.
        step: of the training; `t` is that of the profile.
        t_unit: what `t` counts.
        t_first: the earliest time that has mass in averages of this run.
        tensors: role and dtype of each.
        aliases: further names of tensors.
        sigma_rel, gamma: the power function that an average was asked for; 0 for others.
        decay: that of an ordinary EMA, without its warm-up; 0 for others.
        run_id: made of names, shapes and content; empty until checkpoints were compared with each other.
        left_out: names of the model's state that are not used.
    """

    profile: StoredProfile
    step: int
    t_unit: str
    t_first: float
    tensors: dict[str, fmt.TrackedTensor]
    aliases: dict[str, str]
    sigma_rel: float = 0.0
    gamma: float = 0.0
    decay: float = 0.0
    run_id: str = ""
    left_out: tuple[str, ...] = ()
    measurements: None = None
    sketch: str = ""

    @property
    def t(self) -> float:  # type: ignore[override]  # in a frozen class no field can be assigned either
        """Its time."""
        return self.profile.t

    @property
    def clock_pairs(self) -> tuple[tuple[int, float], ...]:
        """Its step and time."""
        return ((self.step, self.t),)

    def average(self, profile: StoredProfile | None = None) -> StoredAverage:
        """What reconstruction uses of it, with another profile if one is given; as if updated at every step."""
        own: Any = profile or self.profile
        if isinstance(own, PowerFunction):
            own = RecordedPowerFunction(own.gamma, own.t, self.t_first, 1.0)
        eps = EPS["F64" if {self.tensors[name].dtype for name in self.averages} == {"F64"} else "F32"]
        return StoredAverage(own, self.step, eps, None, self.t / self.step, Steps(Clock([self.step], [self.t]), 1))

    @property
    def holds(self) -> str:
        """What its tensors are of, for people."""
        if isinstance(self.profile, Point):
            return "weights"
        if self.decay:
            return f"EMA of decay {self.decay:.12g}"
        tracked = f" tracked as sigma_rel {self.sigma_rel:g}," * bool(self.sigma_rel)
        is_power = isinstance(self.profile, PowerFunction)
        return f"average of sigma_rel {self.sigma_rel:g}" if is_power else f"average{tracked} of its own profile"


@dataclass(frozen=True)
class Checkpoint(FileSource):
    """The tensors of a checkpoint, or of an average that another program stored, and what is known about them.

    Its `header` says what is where, as if all were in one file.

    Attributes:
        kind: one of `formats.TABLE`; empty of a copy that an import made.
        label: its name, where that of its file or folder is not enough.
    """

    info: CheckpointInfo
    kind: str = ""
    label: str = ""

    @property
    def name(self) -> str:
        """The name of the file or folder; of several of one name with folders above it; of two in one with a word."""
        return self.label or self.path.name

    @property
    def profile(self) -> StoredProfile:
        """What its tensors are of."""
        return self.info.profile

    @property
    def identity(self) -> str:
        """16 hexadecimal digits of the content of its files."""
        if self.header.metadata:
            return super().identity
        identities = {part.path: part.identity for part in self.parts}
        return xxhash.xxh3_64_hexdigest("".join(identities[file] for file in sorted(identities)).encode())


def make_checkpoint(
    path: Path,
    found: Mapping[str, Callable[[], list[FoundChunk]]],
    profile: StoredProfile,
    step: int,
    kind: str = "checkpoints",
    t_unit: str = "steps",
    sigma_rel: float = 0.0,
    decay: float = 0.0,
) -> Checkpoint:
    """A checkpoint of these tensors; of a power function, or what was meant as one, with its `sigma_rel`.

    One of an ordinary EMA has its `decay`.

    Raises:
        FileFormatError: a tensor has no name that a model's could have, or a dtype that is not read.
    """
    entries: dict[str, fmt.TensorEntry] = {}
    aliases: dict[str, str] = {}
    layers: dict[tuple[Path, int], dict[str, FoundChunk]] = {}
    identities: dict[Path, str] = {}
    known: dict[tuple[Path, fmt.TensorEntry], str] = {}
    for name, find in found.items():
        if name in ("", "__metadata__") or "\0" in name or name.encode("utf-8", "replace").decode() != name:
            raise FileFormatError(path, f"tensor {shown(name)}: a model's tensor cannot have this name")
        chunks = find()
        path_of, _, tensor, _ = chunks[0]
        if len(chunks) == 1 and tensor.nbytes and (other := known.setdefault((path_of, tensor), name)) != name:
            aliases[name] = other  # tied: both are the same bytes
            continue
        dtypes = {chunk.tensor.dtype for chunk in chunks}
        if len(dtypes) > 1:
            raise FileFormatError(path, f"tensor {shown(name)}: its chunks are of several dtypes")
        spec = fmt.TensorSpec(name, dtypes.pop(), tensor_shape(chunks))
        entries[name] = fmt.TensorEntry(spec.dtype, spec.shape, 0, spec.nbytes)
        counts: dict[Path, int] = {}
        for chunk in chunks:
            layer = counts[chunk.path] = counts.get(chunk.path, -1) + 1
            layers.setdefault((chunk.path, layer), {})[name] = chunk
            identities[chunk.path] = chunk.identity
    parts = tuple(
        BackingFile(
            file,
            fmt.FileHeader.of_foreign({name: chunk.tensor for name, chunk in held.items()}),
            {name: chunk.box for name, chunk in held.items()},
            identities[file],
        )
        for (file, _), held in layers.items()
    )
    stored = parts[0].header.tensors if len(parts) == 1 and len(parts[0].header.tensors) == len(entries) else entries
    info = CheckpointInfo(
        profile, step, t_unit, first_time(profile),
        {name: _tracked(name, entry.dtype) for name, entry in entries.items()}, aliases,
        sigma_rel, gamma_from_sigma_rel(sigma_rel) if sigma_rel else 0.0, decay,
    )  # fmt: skip
    return Checkpoint(path, fmt.FileHeader.of_foreign(stored), info, parts, kind)


def first_time(profile: StoredProfile) -> float:
    """The earliest time that has mass in averages of a run with this profile, on a clock of steps or images."""
    return float(getattr(profile, "t_first", min(1.0, profile.t)))


def _tracked(name: str, dtype: str) -> fmt.TrackedTensor:
    """How a synthesis treats a tensor: floating-point numbers are averaged, others copied."""
    is_weight = dtype in EPS and name.rpartition(".")[2] not in _NO_WEIGHTS
    return fmt.TrackedTensor("average" if is_weight else "copy", dtype)


def checked_run(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The same checkpoints by time, as one run: with a common run id, and aliases that all have.

    Of copies, such as a file `last` or `best` beside the numbered ones, it takes the first by name.

    Raises:
        MismatchError: two of them are of different models, or of one time with other values; both are named.
    """
    kept: dict[tuple[float, str], Checkpoint] = {}
    for other in by_time(checkpoints):
        one = kept.setdefault((other.info.t, other.info.holds), other)
        if one is not other and not _is_copy(one, other):
            reason = f"are both of step {one.info.t:,.12g}"
            raise MismatchError(f"{one.path} and {other.path}", reason, "name those of one run, by a glob")
    ordered = _named([*kept.values()])
    first = ordered[0]
    for one in ordered[1:]:
        if (difference := _difference(first, one)) is not None:
            raise MismatchError(f"{first.path} and {one.path}", difference, _CHOOSE)
    if first.info.run_id:
        return ordered
    names = [(name, entry.shape) for name, entry in sorted(first.stored.items())]
    run_id = xxhash.xxh3_128_hexdigest(repr((names, first.identity)).encode())
    return [replace(one, info=replace(one.info, run_id=run_id)) for one in ordered]


def _is_copy(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two hold the same averages, or weights, by the first elements of each tensor."""
    sizes = [{name: math.prod(source.stored[name].shape) for name in source.info.averages} for source in (one, other)]
    if sizes[0] != sizes[1]:
        return False
    with one.open() as a, other.open() as b:
        counts = {name: min(size, _COMPARED) for name, size in sizes[0].items()}
        return all(
            np.array_equal(read_values(a, name, 0, count), read_values(b, name, 0, count), equal_nan=True)
            for name, count in counts.items()
        )


def _named(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The same, each with a name of its own: coefficients and reports refer to it."""
    paths = {one.path for one in checkpoints}
    above = files.as_path(os.path.commonpath([str(path.parent) for path in paths]))
    is_short = len({path.name for path in paths}) == len(paths)
    counts = Counter(one.path for one in checkpoints)
    made = []
    for one in checkpoints:
        name = one.path.name if is_short else one.path.relative_to(above).as_posix()
        of_two = counts[one.path] > 1 and not isinstance(one.profile, Point)
        made.append(replace(one, label=f"{name} (average)" if of_two else name))
    return made


def beside_snapshots(snapshots: Sequence[Snapshot], checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints of the training that wrote these snapshots, to be combined with them.

    Their steps become times of the run, and of their tensors those remain that the newest snapshot has.

    Raises:
        MismatchError: a tensor is missing, has another shape, or cannot be averaged; or two have one time.
    """
    newest = max(snapshots, key=lambda snapshot: snapshot.info.t)
    clock = run_clock([snapshot.info for snapshot in snapshots])
    made = []
    for one in checkpoints:
        pair = f"{newest.path} and {one.path}"
        if not isinstance(one.profile, Point):
            raise MismatchError(pair, "are averages of two libraries", "open one of them")
        for name, tensor in newest.info.tensors.items():
            own, found = newest.stored[name], one.stored.get(name)
            if found is None:
                reason = f"are of different models: {one.name} has no {shown(name)}"
            elif found.shape != own.shape:
                reason = f"have shapes {list(own.shape)} and {list(found.shape)} of tensor {shown(name)}"
            elif tensor.role == "average" and found.dtype not in EPS:
                reason = f"do not match: tensor {shown(name)} is no floating-point number in the latter"
            else:
                continue
            raise MismatchError(pair, reason, _CHOOSE)
        t = float(clock.time_at(one.info.step))
        like = newest.info
        info = replace(
            one.info, profile=Point(t), run_id=like.run_id, t_unit=like.t_unit, t_first=t,
            tensors=like.tensors, aliases=like.aliases, left_out=like.left_out,
        )  # fmt: skip
        made.append(replace(one, info=info))
    return made


def _difference(first: Checkpoint, other: Checkpoint) -> str | None:
    """Why two checkpoints cannot be of one run, to follow their names; None if they can."""
    names = [{*one.stored, *one.info.aliases} for one in (first, other)]
    if differing := sorted(names[0] ^ names[1]):
        only = first if differing[0] in names[0] else other
        more = f", and {len(differing) - 1} more differ" * (len(differing) > 1)
        return f"are of different models: only {only.name} has {names_in(differing[:1])}{more}"
    if first.info.aliases != other.info.aliases:
        tied = sorted(first.info.aliases.keys() ^ other.info.aliases.keys()) or sorted(first.info.aliases)
        return f"differ in what {shown(tied[0])} is tied to"
    for name, entry in first.stored.items():
        found = other.stored[name]
        if entry.shape != found.shape:
            return f"have shapes {list(entry.shape)} and {list(found.shape)} of tensor {shown(name)}"
        if first.info.tensors[name].role != other.info.tensors[name].role:
            words = [DTYPES[dtype].torch_name for dtype in (entry.dtype, found.dtype)]
            return f"do not match: tensor {shown(name)} is of {words[0]} and of {words[1]}"
    return None if first.info.run_id == other.info.run_id else "are of different runs"


def describe_checkpoints(place: Path, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Times, tensors and sizes from the indexes of files alone, for JSON; its kind is "checkpoints"."""
    newest = checkpoints[-1]
    return {
        "kind": "checkpoints",
        "path": str(place),
        "run": newest.info.run_id,
        "t_unit": newest.info.t_unit,
        "t": newest.info.t,
        "step": newest.info.step,
        **describe_tensors(newest),
        "bytes": sum(one.header.file_bytes for one in checkpoints),
        "checkpoints": list_checkpoints(checkpoints),
    }


def list_checkpoints(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """The file, time, content and identity of each, for JSON."""
    return [
        {
            "file": one.name,
            "t": one.info.t,
            "holds": one.info.holds,
            "bytes": one.header.file_bytes,
            "identity": one.identity,
        }
        for one in checkpoints
    ]

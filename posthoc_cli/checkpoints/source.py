"""A checkpoint as a source of averages."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from posthoc_cli.checkpoints.content import Content, StoredChunk, Tensors, refuse_tensor
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.decay_rules import POWER_FUNCTION, UNLIMITED, OrdinaryEMA
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import DirectoryError
from posthoc_cli.profiles import (
    FloatArray,
    Point,
    PowerFunction,
    StoredProfile,
    sigma_rel_from_gamma,
)
from posthoc_cli.reconstruction import Steps, StoredAverage
from posthoc_cli.run_clock import Clock
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.sampling import read_elements
from posthoc_cli.snapshots.selection import STATISTICS
from posthoc_cli.snapshots.source import ElementRange, Source, StoredTensors, TrackedTensor
from posthoc_cli.snapshots.tensorfile import TensorFile

# of a codebook: its vectors are quotients of these sums
_SUMS = ("cluster_size", "embed_avg")
_COMPARED = 1024  # elements of a tensor that are compared with another tensor's
COMPARED_FILES = 5  # newest ones, whose motion is compared
_SLOWER = 0.8  # averages of any length move by a third less than the weights
# Cosine of an average's motion with the way to the weights: 0.90 or more for weights that walk,
# time constants of 3 to 3,000 steps and files 100 steps apart; of two networks that went apart 0.43
# or less.
_TOWARDS = 0.7
_ANY_TIME = Point(1.0)  # where times are of no account


@dataclass(frozen=True, repr=False)
class Checkpoint(Source):
    """A checkpoint, or an average that another program stored; see `Source` for what is not said
    here."""

    word = "checkpoint"
    measurements = None
    knows_buffers = False
    left_out = ()
    path: Path
    files: tuple[TensorFile, ...] = field(compare=False)
    entries: Mapping[str, Entry]
    profile: StoredProfile  # `Point` for weights, or an average's profile; `t` is its time
    step: int
    tensors: dict[str, TrackedTensor]
    aliases: dict[str, str]
    t_unit: str = "steps"
    # the width that the user of another library asked for; 0 for weights and other averages
    sigma_rel: float = 0.0
    # of an ordinary EMA after its warm-up; 0 if it is unknown, and for other tensors
    decay: float = 0.0
    # hash of names, shapes and content; empty until checkpoints were compared with each other
    run_id: str = ""
    name: str = ""  # the name of the file or folder, or more of its path if several have this name
    updates: Updates | None = None  # of an ordinary EMA; None for other tensors
    # whether files or the user say what `step` counts
    is_stated: bool = True
    is_alone: bool = False  # whether its run has no other time, so that no average can be made
    # the names that its tensors have in the file, by their names in the model
    stored: Mapping[str, str] = field(default_factory=dict, compare=False)
    # all files that were read to find it
    opened: Mapping[Path, TensorFile] = field(default_factory=dict, compare=False)

    @property
    def t(self) -> float:  # type: ignore[override]  # in a frozen class no field can be assigned either
        return self.profile.t

    @property
    def t_first(self) -> float:  # type: ignore[override]
        """The earliest time that has mass in averages of a run with this profile: the first step,
        or a thousandth of an epoch."""
        first = 1.0 if self.t_unit != "epochs" else 1e-3
        return float(getattr(self.profile, "t_first", min(first, self.t)))

    @property
    def has_step_unit(self) -> bool:
        """Whether `step` is known to count updates of the weights, or what they take in."""
        return self.is_stated and self.t_unit != "epochs"

    def stored_average(self) -> StoredAverage:
        """Describe this source for a reconstruction.

        Where steps are known, the weights change at every step and not in between; the decay of an
        average counts steps. Otherwise motion is continuous: files whose numbers follow each other
        may be an epoch apart.
        """
        if self.is_alone:
            time = f"{self.t_unit[:-1]} {self.t:,.12g}"
            reason = f"is one checkpoint, of {time}, and an average is made of several"
            hint = "name a folder or a glob with more of them; `ema export` writes what it holds"
            raise DirectoryError(self.path, reason, hint)
        profile: Any = self.profile
        dtypes = {self.tensors[name].dtype for name in self.averaged}
        eps = EPS["F64" if dtypes == {"F64"} else "F32"]
        steps = None
        if self.has_step_unit or not isinstance(profile, Point):
            steps = Steps(Clock([self.step], [self.t]), 1)
        return StoredAverage(profile, eps, None, steps, self.t_first)

    @property
    def holds(self) -> str:
        """A phrase that says what its tensors are."""
        if isinstance(self.profile, Point):
            return "weights"
        if self.decay:
            return f"EMA of decay {self.decay:.7g}"
        if not self.is_known:
            return "EMA of unknown decay"
        known = "of" if isinstance(self.profile, PowerFunction) else "tracked as"
        return f"average {known} sigma_rel {self.sigma_rel:g}"

    @property
    def is_known(self) -> bool:  # type: ignore[override]
        """Whether its profile is known, and not a placeholder for an ordinary EMA's."""
        return self.updates is None or bool(self.decay or self.sigma_rel)

    @property
    def file_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.entries.values())

    def with_settings(self, settings: ImportSettings) -> Checkpoint:
        """Give an ordinary EMA the profile that its file and the settings determine, if any; return
        any other checkpoint as it is."""
        if self.updates is None:
            return self
        profile = self.updates.profile(self.path, self.step, settings)
        checkpoint = replace(self, profile=profile, decay=0.0, sigma_rel=0.0)
        if not self.updates.is_known(settings):
            return checkpoint
        rule = profile.rule
        power = rule.power
        if rule.warm_up != POWER_FUNCTION:
            power = math.log(2) / power
        if rule.decay == UNLIMITED and power > 1:
            return replace(checkpoint, sigma_rel=sigma_rel_from_gamma(power - 1))
        return replace(checkpoint, decay=rule.decay)

    @property
    def identity(self) -> str:
        identities = {file.path: file.checksum for file in self.files}
        return xxhash.xxh3_64_hexdigest(
            "".join(identities[file] for file in sorted(identities)).encode()
        )


def tied_names(tensors: Tensors) -> dict[str, str]:
    """Find the further names of tensors that have several, each with the first one: names of one
    tensor have the same bytes."""
    known = dict[StoredChunk, str]()
    ties = {}
    for name, tensor in tensors.items():
        chunk, *more = tensor.chunks
        is_stored = not more and chunk.entry.nbytes
        if is_stored and known.setdefault(chunk, name) != name:
            ties[name] = known[chunk]
    return ties


def make_checkpoint(
    content: Content,
    tensors: Tensors,
    profile: StoredProfile = _ANY_TIME,
    step: int = 1,
    **fields: Any,
) -> Checkpoint:
    """Make a checkpoint of some tensors of a content, with further fields of `Checkpoint`."""
    path = content.path
    aliases = tied_names(tensors)
    for name in tensors:
        if name in ("", "__metadata__") or "\0" in name or not _is_text(name):
            refuse_tensor(path, name, "a model's tensor cannot have this name")
    stored = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    entries = {}
    roles = {}
    for name, tensor in stored.items():
        dtype, *others = {chunk.entry.dtype for chunk in tensor.chunks}
        if others:
            refuse_tensor(path, name, "its chunks are of several dtypes")
        entries[name] = Entry(dtype, tensor.shape)
        roles[name] = TrackedTensor(_role(name, dtype, tensors), dtype)
    return Checkpoint(
        path,
        _group_files(content, stored),
        entries,
        profile,
        step,
        roles,
        aliases,
        name=path.name,
        stored={name: tensor.name for name, tensor in tensors.items()},
        opened=content.files,
        **fields,
    )


def first_values_of(content: Content, tensors: Tensors) -> FloatArray:
    """Read the first elements of each averaged one of some tensors, in the order of names."""
    return first_values(make_checkpoint(content, tensors))


def first_values(source: Checkpoint) -> FloatArray:
    """Read the first elements of each averaged tensor of a source, in the order of names."""
    ranges = []
    for name in sorted(source.averaged):
        ranges.append(ElementRange(name, 0, min(source.entries[name].size, _COMPARED)))
    values = read_elements(source, ranges, StoredTensors.values)
    return np.nan_to_num(values, posinf=0.0, neginf=0.0)


def are_near(ours: FloatArray, theirs: FloatArray) -> bool:
    """Return whether values are nearer to others than an unrelated network's values would be, whose
    squared distance is the sum of both squared norms. With tied tensors the counts may differ; such
    values count as near."""
    if ours.shape != theirs.shape:
        return True
    norms = np.square(ours).sum() + np.square(theirs).sum()
    return bool(np.square(ours - theirs).sum() <= norms / 2)


def moves_less(ours: FloatArray, theirs: FloatArray) -> bool:
    """Return whether values at some times, [times, elements], are near others and move less from
    time to time, as an average does."""
    motion, other = (float(np.square(np.diff(rows, axis=0)).sum()) for rows in (ours, theirs))
    return 0 < motion <= _SLOWER * other and are_near(ours[-1], theirs[-1])


def moves_towards(ours: FloatArray, theirs: FloatArray) -> bool:
    """Return whether values move towards where others are at the next time, as an average of them
    does, unless they are noise about one place: then it is unclear."""
    motions = np.diff(ours, axis=0)
    gaps = theirs[1:] - ours[:-1]
    product = np.linalg.norm(motions) * np.linalg.norm(gaps)
    return bool((motions * gaps).sum() > _TOWARDS * product)


def is_copy(checkpoint: Checkpoint) -> bool:
    """Return whether an ordinary EMA had not begun, so that it is a copy of the weights."""
    profile = checkpoint.profile
    return isinstance(profile, OrdinaryEMA) and profile.times[0] == profile.t


def _group_files(content: Content, tensors: Tensors) -> tuple[TensorFile, ...]:
    """Group the files of tensors; a file with several chunks of a tensor counts as several."""
    layers = dict[tuple[Path, int], dict[str, StoredChunk]]()
    for name, tensor in tensors.items():
        for number, chunk in enumerate(tensor.chunks):
            layers.setdefault((chunk.path, number), {})[name] = chunk
    grouped = []
    for (path, _), chunks in layers.items():
        boxes = {}
        if len(layers) > 1:  # else all tensors are whole
            boxes = {name: chunk.box for name, chunk in chunks.items()}
        entries = {name: chunk.entry for name, chunk in chunks.items()}
        grouped.append(replace(content.files[path], entries=entries, boxes=boxes))
    return tuple(grouped)


def _is_text(name: str) -> bool:
    return name.encode("utf-8", "replace").decode() == name


def _role(name: str, dtype: str, names: Collection[str]) -> str:
    """Decide whether a tensor is averaged or copied; the vectors of a codebook are a statistic, so
    that predicted errors describe what is trained."""
    outer, dot, last = name.rpartition(".")
    if dtype not in EPS or _is_statistic(name, names):
        return "copy"
    is_codebook = last == "embed" and all(f"{outer}{dot}{each}" in names for each in _SUMS)
    return "statistic" if is_codebook else "average"


def _is_statistic(name: str, names: Collection[str]) -> bool:
    """Return whether a tensor is of BatchNorm, a sum of a codebook, or one of spectral norm's two
    vectors; weight norm's vector is a weight."""
    outer, dot, last = name.rpartition(".")
    if last in _SUMS:
        return all(f"{outer}{dot}{each}" in names for each in _SUMS)
    stem = name[:-1]
    is_vector = name.endswith(("_u", "_v")) and f"{stem}u" in names and f"{stem}v" in names
    is_of_norm = f"{stem}orig" in names or ("parametrizations." in name and stem.endswith("._"))
    is_of_batch_norm = last in STATISTICS  # a variance is not extrapolated
    return is_of_batch_norm or (is_vector and is_of_norm)

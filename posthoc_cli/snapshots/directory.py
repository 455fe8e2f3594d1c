"""A snapshot directory: list it, read the headers of its run, check that they belong together, name new snapshots.

Names are for people (`<t, zero-padded>-<sigma_rel>.safetensors`); the headers alone are authoritative.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import xxhash

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError, PostHocError, RemoteError, shown
from posthoc_cli.reconstruction import Distance, Measurements
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Box, cover_problem
from posthoc_cli.snapshots.codecs import joined_paths
from posthoc_cli.snapshots.headers import DecodeCache, decode_snapshot, file_kind
from posthoc_cli.snapshots.path import index_within, joined_sample, places
from posthoc_cli.snapshots.reading import BackingFile
from posthoc_cli.snapshots.sources import Snapshot
from posthoc_cli.snapshots.tensor_file import opened_in_turn, read_header

SUPERSEDED = "superseded"
"""The name of the folder for snapshots from after the step at which training was resumed."""


PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Suffixes of files that are usually pickles; such files are never opened."""

NAME_A_RUN = "name the directory that a tracker writes its snapshots to"

ON_ONE_FILE_SYSTEM = "all processes of a training write to one directory, on a file system that they share"


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot on disk; the `checksum` of its header identifies it among snapshots of the same time."""

    path: Path
    info: fmt.SnapshotInfo
    checksum: str

    @property
    def t(self) -> float:
        """The training time of the average."""
        return self.info.t

    @property
    def sigma_rel(self) -> float:
        """The width of the snapshot's profile."""
        return self.info.sigma_rel

    @classmethod
    def of(cls, snapshot: Snapshot) -> StoredSnapshot:
        """Return the record of a snapshot whose header was read."""
        return cls(snapshot.path, snapshot.info, snapshot.identity)


# --- listing and reading a directory


@dataclass(frozen=True)
class Listing:
    """The names in a directory, sorted; no file is opened."""

    path: Path
    entries: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        """The visible files that may be snapshots, outputs or states."""
        return [path for path in self.entries if path.suffix == fmt.SUFFIX and not path.name.startswith(".")]

    @property
    def folders(self) -> list[Path]:
        """The folders that, by their names, may be snapshots in several parts."""
        return [path for path in self.entries if is_snapshot_name(path) and path.suffix != fmt.SUFFIX]

    @property
    def leftovers(self) -> list[Path]:
        """The temporary files of interrupted writes, or of writes in progress."""
        return [path for path in self.entries if files.is_temporary(path.name)]

    @property
    def pickles(self) -> list[Path]:
        """The files that, by their names, are pickles."""
        return [path for path in self.entries if path.suffix in PICKLES]


def list_directory(directory: Path) -> Listing:
    """List a directory; raise DirectoryError if it does not exist, is not a directory, or cannot be read."""
    try:
        return Listing(directory, tuple(sorted(files.system.list(directory))))
    except FileNotFoundError as error:
        raise DirectoryError(directory, "no such directory", NAME_A_RUN) from error
    except NotADirectoryError as error:
        raise DirectoryError(directory, "is not a directory", NAME_A_RUN) from error
    except RemoteError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise DirectoryError(f"{str(directory)!r}", f"cannot be read: {reason.lower()}") from error


@dataclass(frozen=True)
class Inspection:
    """The headers of a directory: snapshots by time, then sigma_rel; problems; and notes on unusual entries.

    `incomplete` maps folders that lack parts of a snapshot, left by an interrupted training or still being written, to
    the parts that exist, in words.
    """

    listing: Listing
    snapshots: tuple[Snapshot, ...]
    problems: tuple[PostHocError, ...]
    notes: tuple[str, ...]
    incomplete: Mapping[Path, str]

    @property
    def superseded(self) -> int:
        """The number of snapshots that were set aside; 0 if their folder cannot be read."""
        with suppress(DirectoryError):
            superseded = list_folder(self.listing.path / SUPERSEDED)
            return len(superseded.files) + len(parts_folders(superseded))
        return 0


def inspect_directory(directory: Path) -> Inspection:
    """Read the headers of all snapshots in a directory, continuing after errors; raise errors of `list_directory`."""
    listing = list_directory(directory)
    snapshots: list[Snapshot] = []
    problems: list[PostHocError] = []
    stray_parts: list[str] = []
    cache = DecodeCache()
    for result in _snapshots_in(listing.files, lambda _: cache):
        if isinstance(result, FileFormatError):
            problems.append(result)
        elif result.info.part is None:
            snapshots.append(result)
        else:
            stray_parts.append(f"{result.name}: is a part of a snapshot, outside the folder of the others; not read")
    folders = read_folders(listing)
    snapshots = sorted([*snapshots, *folders.snapshots.values()], key=time_order)
    problems += [*folders.problems.values(), *contradictions(snapshots)]
    notes = (*missing_at_newest(snapshots), *stray_parts, *folders.notes)
    return Inspection(listing, tuple(snapshots), tuple(problems), notes, folders.incomplete)


def _snapshots_in(
    paths: Sequence[Path], cache_of: Callable[[str], DecodeCache]
) -> Iterator[Snapshot | FileFormatError]:
    """Yield the snapshots and parts among files, and an error for each unreadable file that still exists."""
    for path in opened_in_turn(paths):
        try:
            header = read_header(path, cache_of(path.name))
            if file_kind(header) not in (None, "output"):
                yield Snapshot(path, header, decode_snapshot(path, header, cache_of(path.name)))
        except FileFormatError as error:
            if not files.is_absent(path):
                yield error


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot, a file or a folder of parts; raise FileFormatError or MismatchError if it is not one."""
    if not path.is_dir():
        header = read_header(path)
        return Snapshot(path, header, decode_snapshot(path, header))
    content = read_folder(path)
    if isinstance(content, Snapshot):
        return content
    raise FileFormatError(path, f"is no complete snapshot: it has {content or 'no parts'}")


def find_snapshots(directory: Path) -> list[Snapshot]:
    """Read the snapshots of a run like `read_directory`; return none for a missing or empty directory."""
    try:
        return list(_sound(directory).snapshots)
    except DirectoryError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise


def _sound(directory: Path) -> Inspection:
    """Read a directory like `inspect_directory`, but raise the first problem."""
    inspection = inspect_directory(directory)
    if inspection.problems:
        raise inspection.problems[0]
    return inspection


def read_directory(directory: Path) -> list[Snapshot]:
    """Return the snapshots of one run, by time, then sigma_rel. Reads headers only.

    Raises:
        DirectoryError: the directory does not exist, cannot be read, or holds no snapshot.
        FileFormatError: a file in it is damaged.
        MismatchError: two files do not belong together; both are named.
    """
    inspection = _sound(directory)
    if inspection.snapshots:
        return list(inspection.snapshots)
    if inspection.incomplete:
        folder, parts = next(iter(inspection.incomplete.items()))
        reason = f"no complete snapshots here; {folder.name}/ has {parts}"
        raise DirectoryError(directory, reason, ON_ONE_FILE_SYSTEM)
    if is_parts_folder(directory):
        raise DirectoryError(directory, "holds the parts of one snapshot", NAME_A_RUN)
    foreign = [path.name for path in inspection.listing.entries if path.suffix in (fmt.SUFFIX, *PICKLES)]
    example = f"; {foreign[0]} is not a snapshot of this package" if foreign else ""
    raise DirectoryError(directory, f"no snapshots here{example}", NAME_A_RUN)


# --- snapshots of several parts

PART_NAME = re.compile(r"part-\d{5,}-of-\d{5,}\.safetensors")


def is_snapshot_name(path: Path) -> bool:
    """Return whether a path has a name as from `snapshot_path`, of a file or of a folder."""
    t, dash, sigma_rel = path.name.removesuffix(fmt.SUFFIX).partition("-")
    try:
        named = snapshot_path(path.parent, float(t), float(sigma_rel)) if dash else None
    except (ValueError, ArithmeticError):
        return False
    return named is not None and path in (named, named.with_name(named.name.removesuffix(fmt.SUFFIX)))


@dataclass(frozen=True)
class Folders:
    """The content of a directory's folders: complete snapshots, problems, and incomplete snapshots in words."""

    snapshots: dict[Path, Snapshot]
    problems: dict[Path, PostHocError]
    incomplete: dict[Path, str]

    @property
    def notes(self) -> list[str]:
        """A line for each incomplete snapshot."""
        return [f"{folder.name}/: has {parts}" for folder, parts in self.incomplete.items()]


def read_folders(listing: Listing) -> Folders:
    """Read the headers of all folders that may be snapshots, continuing after errors."""
    folders, caches = Folders({}, {}, {}), defaultdict[str, DecodeCache](DecodeCache)
    for folder in listing.folders:
        try:
            content = read_folder(folder, caches)
        except PostHocError as error:
            if not files.is_absent(folder):
                folders.problems[folder] = error
            continue
        if isinstance(content, Snapshot):
            folders.snapshots[folder] = content
        elif content:
            folders.incomplete[folder] = content
    return folders


def list_folder(folder: Path) -> Listing:
    """List a folder like `list_directory`; return nothing for a link, which may lead elsewhere, or for a file."""
    if folder.is_symlink():
        return Listing(folder, ())
    try:
        return list_directory(folder)
    except DirectoryError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return Listing(folder, ())
        raise


def is_parts_folder(path: Path) -> bool:
    """Return whether a path is a folder that, by the names in it, holds parts of one snapshot and nothing else."""
    listing = list_folder(path)
    are_parts = [PART_NAME.fullmatch(file.name) is not None for file in listing.files]
    return bool(are_parts) and all(are_parts) and not listing.folders


def parts_folders(listing: Listing) -> list[Path]:
    """Return the folders of parts, whatever their names: setting one aside may have added a number to its name."""
    return [path for path in listing.entries if path.suffix != fmt.SUFFIX and _may_hold_parts(path)]


def _may_hold_parts(path: Path) -> bool:
    """Return whether a path is a folder of parts, or a folder that cannot be read."""
    try:
        return is_parts_folder(path)
    except DirectoryError:
        return True


def read_folder(folder: Path, caches: dict[str, DecodeCache] | None = None) -> Snapshot | str:
    """Merge the headers of a folder's parts into a snapshot; if it is incomplete, return its content, "2 of 4 parts".

    The text is empty if the path is not a folder of parts. `caches` are by file name, since parts of one name have
    similar headers in all snapshots; the one of "" is for merged parts.

    Raises:
        FileFormatError: a part is damaged, or elements of a tensor are missing.
        MismatchError: two parts do not belong together; both are named.
    """
    caches = defaultdict(DecodeCache) if caches is None else caches
    sets: dict[tuple[int, int], list[Snapshot]] = {}
    for result in _snapshots_in(list_folder(folder).files, caches.__getitem__):
        if isinstance(result, FileFormatError):
            raise result
        if result.info.part is None:
            reason = "is in a folder of parts but is not a part of a snapshot"
            raise FileFormatError(result.path, reason, "move it to the directory")
        sets.setdefault((result.info.part[1], result.info.session), []).append(result)
    for parts in sets.values():
        _check_parts(parts)
    # A snapshot off the schedule may be in the course of being replaced, part by part, by the same one on it.
    complete = [
        parts
        for (count, _), parts in sets.items()
        if len(parts) == count and len({part.info.off_schedule for part in parts}) == 1
    ]
    if len(complete) > 1:
        first, other = complete[0][0], complete[1][0]
        raise MismatchError(f"{first.path} and {other.path}", "are parts of two complete snapshots", "remove one")
    if complete:
        return _merged(folder, complete[0], caches[""])
    if sets:
        counts = [f"{len(parts)} of {count} parts" for (count, _), parts in sorted(sets.items())]
        sessions = {session for _, session in sets}
        return ", ".join(counts + ["of different sessions of the training"] * (len(sessions) > 1))
    return "no parts" if folder.is_dir() and not folder.is_symlink() and not list_directory(folder).files else ""


_OWN = (
    "tensors", "aliases", "inherited", "off_schedule", "measurements", "motion", "sample", "sketch", "part", "chunks",
    "mesh",
)  # fmt: skip
"""The keys of the metadata in which parts may differ."""


def _check_parts(parts: list[Snapshot]) -> None:
    """Sort parts by number; raise MismatchError, naming two of them, if they are not of one snapshot."""
    parts.sort(key=lambda part: (part.info.part or (0, 0), part.path.name))
    for before, part in pairwise(parts):
        if before.info.part == part.info.part:
            reason = "are both part {} of {}".format(*(part.info.part or (0, 0)))
            raise MismatchError(f"{before.path} and {part.path}", reason, "remove one")
    first = parts[0]
    for part in parts[1:]:
        for key, value in vars(first.info).items():
            if key not in _OWN and getattr(part.info, key) != value:
                reason = f"are not of one snapshot: they differ in ema.{key}"
                raise MismatchError(f"{first.path} and {part.path}", reason)


def _merged(folder: Path, parts: Sequence[Snapshot], cache: DecodeCache) -> Snapshot:
    """Return the snapshot that consists of these parts."""
    tensors = [(part.header.tensors, part.info.tensors, part.info.chunks, part.info.aliases) for part in parts]
    joined = cache.once("joined", tensors, lambda: _join(folder, parts))
    checksums = "".join(part.header.metadata["ema.checksum"] for part in parts)
    metadata = {"ema.format": "snapshot", "ema.checksum": xxhash.xxh3_64_hexdigest(checksums.encode())}
    header = fmt.FileHeader(metadata, joined.entries, sum(part.header.payload_start for part in parts))
    info = replace(
        parts[0].info, tensors=joined.tensors, aliases=joined.aliases,
        inherited=sum(part.info.inherited for part in parts),
        measurements=sum_of_parts([part.info.measurements for part in parts]),
        motion=next((part.info.motion for part in parts if part.info.motion is not None), None),
        sample=joined_sample([(part.info.sample, at) for part, at in zip(parts, joined.sampled, strict=True)]),
        sketch=joined_paths([part.info.sketch for part in parts]),
        part=None, chunks={},
    )  # fmt: skip
    both = zip(parts, joined.boxes, strict=True)
    backing = (BackingFile(part.path, part.header.tensors, boxes, part.header) for part, boxes in both)
    return Snapshot(folder, header, info, tuple(backing))


class _Joined(NamedTuple):
    """The tensors of a snapshot, the boxes that each part holds, and the positions of its values in the sample."""

    tensors: dict[str, fmt.TrackedTensor]
    entries: dict[str, fmt.TensorEntry]
    aliases: dict[str, str]
    boxes: list[dict[str, Box]]
    sampled: list[list[int]]


def _join(folder: Path, parts: Sequence[Snapshot]) -> _Joined:
    """Join the tensors of all parts; raise the errors of `read_folder` if their chunks are not complete tensors."""
    boxes = [{n: chunk.box(p.header.tensors[n].shape) for n, chunk in p.info.chunks.items()} for p in parts]
    tensors = {name: tensor for part in parts for name, tensor in part.info.tensors.items()}
    aliases = {alias: name for part in parts for alias, name in part.info.aliases.items()}
    specs: dict[str, fmt.TensorSpec] = {}
    held: dict[str, list[tuple[Path, Box]]] = defaultdict(list)
    for part, held_boxes in zip(parts, boxes, strict=True):
        for name, chunk in part.info.chunks.items():
            dtype = part.header.tensors[name].dtype
            spec = specs.setdefault(name, fmt.TensorSpec(name, dtype, chunk.shape))
            if spec.shape != chunk.shape:
                shapes = f"{list(spec.shape)} and {list(chunk.shape)}"
                reason = f"do not match: tensor {shown(name)} has the shapes {shapes}"
                raise MismatchError(f"{held[name][0][0]} and {part.path}", reason)
            # The widest dtype holds all values exactly: parts have the run's dtype or a wider one.
            specs[name] = replace(spec, dtype=max(spec.dtype, dtype, key=ITEM_BYTES.__getitem__))
            held[name].append((part.path, held_boxes[name]))
    for name, chunks in held.items():
        _check_cover(folder, specs[name], chunks)
    averages = {name: specs[name].shape for name, tensor in tensors.items() if tensor.role == "average"}
    return _Joined(tensors, fmt.lay_out([*specs.values()]), aliases, boxes, _sampled_positions(averages, boxes))


def _check_cover(folder: Path, spec: fmt.TensorSpec, chunks: Sequence[tuple[Path, Box]]) -> None:
    """Raise an error unless the chunks, each with its part's path, hold each element of a tensor exactly once."""
    problem = cover_problem(spec.shape, [box for _, box in chunks])
    if problem is None:
        return
    for (first, box), (other, other_box) in combinations(chunks, 2):
        if box.intersection(other_box).size:
            raise MismatchError(f"{first} and {other}", f"tensor {shown(spec.name)}: both hold some of its elements")
    raise FileFormatError(folder, f"tensor {shown(spec.name)}: {problem}")


def _sampled_positions(shapes: Mapping[str, Sequence[int]], boxes: Sequence[Mapping[str, Box]]) -> list[list[int]]:
    """Return the positions in a snapshot's sample of the elements that each part holds in its boxes."""
    positions: list[list[int]] = [[] for _ in boxes]
    for position, (name, index) in enumerate(places(shapes)):
        for held, of_part in zip(positions, boxes, strict=True):
            if name in of_part and index_within(of_part[name], shapes[name], index) is not None:
                held.append(position)
    return positions


def sum_of_parts(parts: Sequence[Measurements | None]) -> Measurements | None:
    """Return the measurements of all parts together; None if a part has none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    by_partner = [{(distance.t, distance.sigma_rel): distance for distance in part.distances} for part in known]
    distances = [
        Distance(*key, sum(d[key].squared for d in by_partner), sum(d[key].rounding for d in by_partner))
        for key in by_partner[0]
        if all(key in d for d in by_partner)
    ]
    weights = [part.weights for part in known if part.weights is not None]
    return Measurements(
        sum(part.norm for part in known),
        sum(part.rounding for part in known),
        tuple(distances),
        sum(weights) if len(weights) == len(known) else None,
    )


# --- what belongs together


def time_order(snapshot: Snapshot) -> tuple[float, float, str]:
    """Return the key that sorts snapshots by time, then sigma_rel."""
    return snapshot.info.t, snapshot.info.sigma_rel, snapshot.path.name


def contradictions(snapshots: Sequence[Snapshot]) -> list[MismatchError]:
    """Return an error for each pair of snapshots that cannot be in one directory; `snapshots` are in order of time."""
    errors = [
        MismatchError(f"{snapshots[0].path} and {other.path}", reason)
        for other in snapshots[1:]
        if (reason := difference(snapshots[0], other)) is not None
    ]
    seen: dict[tuple[float, float], Snapshot] = {}
    for snapshot in snapshots:
        t, sigma_rel = snapshot.info.t, snapshot.info.sigma_rel
        first = seen.setdefault((t, sigma_rel), snapshot)
        if first is not snapshot:
            reason = f"both hold sigma_rel {sigma_rel:g} at t = {t:,.12g}"
            errors.append(MismatchError(f"{first.path} and {snapshot.path}", reason, "remove one"))
    return errors


def difference(first: Snapshot, other: Snapshot) -> str | None:
    """Return why a snapshot and a later one cannot be in one directory, to follow their names; None if they can."""
    a, b = first.info, other.info
    if a.run_id != b.run_id:
        return f"are of different runs ({a.run_id[:8]} and {b.run_id[:8]}); keep one run a directory"
    if a.t_unit != b.t_unit:
        return f"count time in {shown(a.t_unit)} and {shown(b.t_unit)}"
    # A run that lost all snapshots of a profile may have been resumed without that profile.
    if not (set(a.sigma_rels) <= set(b.sigma_rels) or set(b.sigma_rels) <= set(a.sigma_rels)):
        return f"do not match: their runs track the profiles {_widths(a.sigma_rels)} and {_widths(b.sigma_rels)}"
    is_same = (first.header.tensors, a.tensors) == (other.header.tensors, b.tensors)  # fast: mostly identical objects
    for name in () if is_same else sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in a.tensors or name not in b.tensors:
            missing = other if name in a.tensors else first
            return f"do not match: tensor {shown(name)} is missing in {missing.path.name}"
        shapes = [list(s.header.tensors[name].shape) for s in (first, other)]
        if shapes[0] != shapes[1]:
            return f"do not match: tensor {shown(name)} has the shapes {shapes[0]} and {shapes[1]}"
        if a.tensors[name] != b.tensors[name]:
            kinds = [f"{tensor.role} of {tensor.dtype}" for tensor in (a.tensors[name], b.tensors[name])]
            return f"do not match: tensor {shown(name)} is {kinds[0]} and {kinds[1]}"
    return None if a.aliases == b.aliases else "do not match: they tie different names together"


def missing_at_newest(snapshots: Sequence[Snapshot]) -> list[str]:
    """Return a line about profiles without a snapshot at the newest time, where thinning never removes one.

    Profiles that the run no longer tracks, since it was resumed without them, are not reported.
    """
    infos = [s.info for s in snapshots if s.info.run_id == snapshots[0].info.run_id]
    newest = [info for info in infos if info.t == infos[-1].t]
    tracked = {sigma_rel for info in newest for sigma_rel in info.sigma_rels}
    missing = ({info.sigma_rel for info in infos} & tracked) - {info.sigma_rel for info in newest}
    if not missing:
        return []
    return [f"t = {infos[-1].t:,.12g}, the newest: no snapshot of sigma_rel {_widths(sorted(missing))}"]


def _widths(sigma_rels: Sequence[float]) -> str:
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


# --- adding to a directory


def snapshot_path(directory: Path, t: float, sigma_rel: float, part: tuple[int, int] | None = None) -> Path:
    """Return the path of a new snapshot, or of a part of one. Names sort by time up to 2**53."""
    integer, _, fraction = f"{Decimal(repr(t)):f}".partition(".")
    clock = f"{int(integer):016d}" + (f".{fraction}" if fraction.strip("0") else "")
    if part is None:
        return directory / f"{clock}-{sigma_rel!r}{fmt.SUFFIX}"
    number, parts = part
    return directory / f"{clock}-{sigma_rel!r}" / f"part-{number:05d}-of-{parts:05d}{fmt.SUFFIX}"


def newest_before(info: fmt.SnapshotInfo, stored: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """Return the two newest earlier snapshots of each profile that have measurements; `stored` is in order of time.

    Distances over one interval and over two distinguish a random walk from noise.
    """
    newest: dict[float, list[StoredSnapshot]] = {sigma_rel: [] for sigma_rel in info.sigma_rels}
    for snapshot in reversed(stored):
        of_profile = newest.get(snapshot.sigma_rel, [])
        if snapshot.t < info.t and snapshot.info.measurements and len(of_profile) < 2:
            of_profile.insert(0, snapshot)
        if all(len(of_profile) == 2 for of_profile in newest.values()):
            break
    return [snapshot for of_profile in newest.values() for snapshot in of_profile]

"""A snapshot directory: list it, read the headers of its run, check that they belong together, add to it.

Names are for people (`<t, zero-padded>-<sigma_rel>.safetensors`); only headers are believed.
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
from posthoc_cli.snapshots.headers import DecodeCache, decode_snapshot, file_kind
from posthoc_cli.snapshots.path import index_within, joined_sample, places
from posthoc_cli.snapshots.reading import BackingFile
from posthoc_cli.snapshots.sources import Snapshot
from posthoc_cli.snapshots.tensor_file import opened_in_turn, read_header

SUPERSEDED = "superseded"
"""The folder for snapshots later than the time that training went back to."""

BROKEN = "damaged"
"""The folder for broken files, which a repair moves there."""

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Suffixes of files that are usually pickles, and are never opened."""

OTHERS = (None, "output", "state", "checkpoint")
"""Kinds of files that are no snapshots."""

WANTED = "name the directory that a tracker writes its snapshots to"

ON_ONE_FILE_SYSTEM = "all processes of a training write to one directory, on a file system that they share"


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot on disk; its header's `checksum` distinguishes it from others of the same time."""

    path: Path
    info: fmt.SnapshotInfo
    checksum: str

    @property
    def t(self) -> float:
        """Training time of the average."""
        return self.info.t

    @property
    def sigma_rel(self) -> float:
        """Width of its profile."""
        return self.info.sigma_rel

    @classmethod
    def of(cls, snapshot: Snapshot) -> StoredSnapshot:
        """The same of a snapshot that was read."""
        return cls(snapshot.path, snapshot.info, snapshot.identity)


# --- listing and reading a directory


@dataclass(frozen=True)
class Listing:
    """The names in a directory, sorted; no file is opened."""

    path: Path
    entries: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        """Visible files that may be snapshots, outputs or states."""
        return [path for path in self.entries if path.suffix == fmt.SUFFIX and not path.name.startswith(".")]

    @property
    def folders(self) -> list[Path]:
        """Folders that may be snapshots of several parts, by their names."""
        return [path for path in self.entries if is_snapshot_name(path) and path.suffix != fmt.SUFFIX]

    @property
    def leftovers(self) -> list[Path]:
        """Temporaries of interrupted writes, or of writes in progress."""
        return [path for path in self.entries if files.is_temporary(path.name)]

    @property
    def pickles(self) -> list[Path]:
        """Files that are never opened."""
        return [path for path in self.entries if path.suffix in PICKLES]


def list_directory(directory: Path) -> Listing:
    """List a directory; a DirectoryError if it is absent, no directory, or cannot be read."""
    try:
        return Listing(directory, tuple(sorted(files.system.list(directory))))
    except FileNotFoundError as error:
        raise DirectoryError(directory, "no such directory", WANTED) from error
    except NotADirectoryError as error:
        raise DirectoryError(directory, "is not a directory", WANTED) from error
    except RemoteError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise DirectoryError(f"{str(directory)!r}", f"cannot be read: {reason.lower()}") from error


@dataclass(frozen=True)
class Inspection:
    """The headers of a directory: snapshots by time, then sigma_rel, what is wrong, and what is only unusual.

    `incomplete` are folders without all parts of a snapshot, each with what is there in words: left by an interrupted
    training, or being written.
    """

    listing: Listing
    snapshots: tuple[Snapshot, ...]
    problems: tuple[PostHocError, ...]
    notes: tuple[str, ...]
    incomplete: Mapping[Path, str]

    @property
    def superseded(self) -> int:
        """The number of snapshots set aside; 0 where their folder cannot be read."""
        with suppress(DirectoryError):
            aside = list_folder(self.listing.path / SUPERSEDED)
            return len(aside.files) + len(parts_folders(aside))
        return 0


def inspect_directory(directory: Path) -> Inspection:
    """Read the headers of all snapshots in a directory, and continue after errors. Raises as `list_directory`."""
    listing = list_directory(directory)
    snapshots: list[Snapshot] = []
    problems: list[PostHocError] = []
    apart: list[str] = []
    cache = DecodeCache()
    for found in _snapshots_in(listing.files, lambda _: cache):
        if isinstance(found, FileFormatError):
            problems.append(found)
        elif found.info.part is None:
            snapshots.append(found)
        else:
            apart.append(f"{found.name}: is a part of a snapshot, outside the folder of the others; not read")
    folders = read_folders(listing)
    snapshots = sorted([*snapshots, *folders.snapshots.values()], key=time_order)
    problems += [*folders.problems.values(), *contradictions(snapshots)]
    notes = (*missing_at_newest(snapshots), *apart, *folders.notes)
    return Inspection(listing, tuple(snapshots), tuple(problems), notes, folders.incomplete)


def _snapshots_in(
    paths: Sequence[Path], cache_of: Callable[[str], DecodeCache]
) -> Iterator[Snapshot | FileFormatError]:
    """The snapshots, and parts of them, among files; or what is wrong with a file that has not been thinned away."""
    for path in opened_in_turn(paths):
        try:
            header = read_header(path, cache_of(path.name))
            if file_kind(header) not in OTHERS:
                yield Snapshot(path, header, decode_snapshot(path, header, cache_of(path.name)))
        except FileFormatError as error:
            if not files.is_gone(path):
                yield error


def read_snapshot(path: Path) -> Snapshot:
    """A snapshot: a file, or a folder of parts. A FileFormatError, or a MismatchError of parts, if it is none."""
    if not path.is_dir():
        header = read_header(path)
        return Snapshot(path, header, decode_snapshot(path, header))
    found = read_folder(path)
    if isinstance(found, Snapshot):
        return found
    raise FileFormatError(path, f"is no complete snapshot: it has {found or 'no parts'}")


def find_snapshots(directory: Path) -> list[Snapshot]:
    """As `read_directory`, but an absent or empty directory has no snapshots."""
    try:
        return list(_sound(directory).snapshots)
    except DirectoryError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise


def _sound(directory: Path) -> Inspection:
    """As `inspect_directory`, but raises the first problem."""
    found = inspect_directory(directory)
    if found.problems:
        raise found.problems[0]
    return found


def read_directory(directory: Path) -> list[Snapshot]:
    """The snapshots of one run, by time, then sigma_rel. Reads headers only.

    Raises:
        DirectoryError: the directory is absent, cannot be read, or holds no snapshot.
        FileFormatError: a file in it is damaged.
        MismatchError: two files do not belong together; both are named.
    """
    found = _sound(directory)
    if found.snapshots:
        return list(found.snapshots)
    if found.incomplete:
        folder, there = next(iter(found.incomplete.items()))
        reason = f"no complete snapshots here; {folder.name}/ has {there}"
        raise DirectoryError(directory, reason, ON_ONE_FILE_SYSTEM)
    if is_parts_folder(directory):
        raise DirectoryError(directory, "holds the parts of one snapshot", WANTED)
    if any(file_kind(read_header(path)) == "checkpoint" for path in found.listing.files):
        reason = "holds copies of checkpoints that `ema import` wrote, no snapshots of a tracker"
        raise DirectoryError(directory, reason, "delete the folder to remove them")
    others = [path.name for path in found.listing.entries if path.suffix in (fmt.SUFFIX, *PICKLES)]
    what = f"; {others[0]} is not a snapshot of this package" if others else ""
    raise DirectoryError(directory, f"no snapshots here{what}", WANTED)


# --- snapshots of several parts

PART_NAME = re.compile(r"part-\d{5,}-of-\d{5,}\.safetensors")


def is_snapshot_name(path: Path) -> bool:
    """Whether a name has the form that `snapshot_path` gives, of a file or of a folder."""
    t, dash, sigma_rel = path.name.removesuffix(fmt.SUFFIX).partition("-")
    try:
        named = snapshot_path(path.parent, float(t), float(sigma_rel)) if dash else None
    except (ValueError, ArithmeticError):
        return False
    return named is not None and path in (named, named.with_name(named.name.removesuffix(fmt.SUFFIX)))


@dataclass(frozen=True)
class Folders:
    """What the folders of a directory hold: complete snapshots, what is wrong in others, and incomplete ones."""

    snapshots: dict[Path, Snapshot]
    problems: dict[Path, PostHocError]
    incomplete: dict[Path, str]

    @property
    def notes(self) -> list[str]:
        """A line for each incomplete snapshot."""
        return [f"{folder.name}/: has {there}" for folder, there in self.incomplete.items()]


def read_folders(listing: Listing) -> Folders:
    """Read the headers of all folders that may be snapshots, and continue after errors."""
    found, caches = Folders({}, {}, {}), defaultdict[str, DecodeCache](DecodeCache)
    for folder in listing.folders:
        try:
            held = read_folder(folder, caches)
        except PostHocError as error:
            if not files.is_gone(folder):
                found.problems[folder] = error
            continue
        if isinstance(held, Snapshot):
            found.snapshots[folder] = held
        elif held:
            found.incomplete[folder] = held
    return found


def list_folder(folder: Path) -> Listing:
    """As `list_directory`; nothing where it is no folder, or a link, which would lead out of the directory."""
    if folder.is_symlink():
        return Listing(folder, ())
    try:
        return list_directory(folder)
    except DirectoryError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return Listing(folder, ())
        raise


def is_parts_folder(path: Path) -> bool:
    """Whether a path is a folder of parts of one snapshot, and of nothing else, by their names."""
    listing = list_folder(path)
    named = [PART_NAME.fullmatch(file.name) is not None for file in listing.files]
    return bool(named) and all(named) and not listing.folders


def parts_folders(listing: Listing) -> list[Path]:
    """Folders of parts, whatever their names: one that was set aside may have a number in it."""
    return [path for path in listing.entries if path.suffix != fmt.SUFFIX and _may_hold_parts(path)]


def _may_hold_parts(path: Path) -> bool:
    """Whether it is a folder of parts, or a folder that cannot be read."""
    try:
        return is_parts_folder(path)
    except DirectoryError:
        return True


def read_folder(folder: Path, caches: dict[str, DecodeCache] | None = None) -> Snapshot | str:
    """The snapshot of the parts in a folder, from their headers; else what is there, in words, as "2 of 4 parts".

    That is empty for something else than such a folder. `caches` are by file names of parts, since those of one name
    have similar headers in all snapshots; "" for joined parts.

    Raises:
        FileFormatError: a part is damaged, or elements of a tensor are missing.
        MismatchError: two parts do not belong together; both are named.
    """
    caches = defaultdict(DecodeCache) if caches is None else caches
    found: dict[tuple[int, int], list[Snapshot]] = {}
    for one in _snapshots_in(list_folder(folder).files, caches.__getitem__):
        if isinstance(one, FileFormatError):
            raise one
        if one.info.part is None:
            what = "is no part of a snapshot, in a folder of parts"
            raise FileFormatError(one.path, what, "move it to the directory")
        found.setdefault((one.info.part[1], one.info.session), []).append(one)
    for parts in found.values():
        _check_parts(parts)
    complete = [
        parts
        for (count, _), parts in found.items()  # one off the schedule may be replaced by the same on it, part by part
        if len(parts) == count and len({part.info.off_schedule for part in parts}) == 1
    ]
    if len(complete) > 1:
        first, other = complete[0][0], complete[1][0]
        raise MismatchError(f"{first.path} and {other.path}", "are parts of two complete snapshots", "remove one")
    if complete:
        return _merged(folder, complete[0], caches[""])
    if found:
        there = [f"{len(parts)} of {count} parts" for (count, _), parts in sorted(found.items())]
        sessions = {session for _, session in found}
        return ", ".join([*there, *(["of different sessions of the training"] if len(sessions) > 1 else [])])
    return "no parts" if folder.is_dir() and not folder.is_symlink() and not list_directory(folder).files else ""


_OWN = (
    "tensors", "aliases", "inherited", "off_schedule", "measurements", "motion", "sample", "sketch", "part", "chunks",
    "mesh",
)  # fmt: skip
"""Metadata in which parts may differ."""


def _check_parts(parts: list[Snapshot]) -> None:
    """Sort parts by their numbers; a MismatchError names two that are not of one snapshot."""
    parts.sort(key=lambda part: (part.info.part or (0, 0), part.path.name))
    first = parts[0]
    for before, part in pairwise(parts):
        pair = f"{before.path} and {part.path}"
        if before.info.part == part.info.part:
            raise MismatchError(pair, "are both part {} of {}".format(*(part.info.part or (0, 0))), "remove one")
    for part in parts[1:]:
        pair = f"{first.path} and {part.path}"
        for key, value in vars(first.info).items():
            if key not in _OWN and getattr(part.info, key) != value:
                raise MismatchError(pair, f"are not of one snapshot: they differ in ema.{key}")


def _merged(folder: Path, parts: Sequence[Snapshot], cache: DecodeCache) -> Snapshot:
    """The snapshot of all its parts."""
    alike = [(part.header.tensors, part.info.tensors, part.info.chunks, part.info.aliases) for part in parts]
    joined = cache.once("joined", alike, lambda: _join(folder, parts))
    sums = "".join(part.header.metadata["ema.checksum"] for part in parts)
    metadata = {"ema.format": "snapshot", "ema.checksum": xxhash.xxh3_64_hexdigest(sums.encode())}
    header = fmt.FileHeader(metadata, joined.entries, sum(part.header.payload_start for part in parts))
    info = replace(
        parts[0].info, tensors=joined.tensors, aliases=joined.aliases,
        inherited=sum(part.info.inherited for part in parts),
        measurements=sum_of_parts([part.info.measurements for part in parts]),
        motion=next((part.info.motion for part in parts if part.info.motion is not None), None),
        sample=joined_sample([(part.info.sample, own) for part, own in zip(parts, joined.sampled, strict=True)]),
        sketch=fmt.joined_paths([part.info.sketch for part in parts]),
        part=None, chunks={},
    )  # fmt: skip
    made = (BackingFile(part.path, part.header, boxes) for part, boxes in zip(parts, joined.boxes, strict=True))
    return Snapshot(folder, header, info, tuple(made))


class _Joined(NamedTuple):
    """The tensors of a snapshot, the place of each part's, and which elements of its sample each part has."""

    tensors: dict[str, fmt.TrackedTensor]
    entries: dict[str, fmt.TensorEntry]
    aliases: dict[str, str]
    boxes: list[dict[str, Box]]
    sampled: list[list[int]]


def _join(folder: Path, parts: Sequence[Snapshot]) -> _Joined:
    """The tensors of all parts; an error as of `read_folder` where their chunks do not make complete ones."""
    tensors = {name: tensor for part in parts for name, tensor in part.info.tensors.items()}
    aliases = {alias: name for part in parts for alias, name in part.info.aliases.items()}
    held: dict[str, list[tuple[Path, Box]]] = defaultdict(list)
    joined: dict[str, fmt.TensorSpec] = {}
    for part in parts:
        for name, chunk in part.info.chunks.items():
            stored = part.header.tensors[name]
            known = joined.setdefault(name, fmt.TensorSpec(name, stored.dtype, chunk.shape))
            if known.shape != chunk.shape:
                what = f"do not match: tensor {shown(name)} has the shapes {list(known.shape)} and {list(chunk.shape)}"
                raise MismatchError(f"{held[name][0][0]} and {part.path}", what)
            # The widest dtype holds all values exactly: parts have the run's dtype or a wider one.
            joined[name] = replace(known, dtype=max(known.dtype, stored.dtype, key=ITEM_BYTES.__getitem__))
            held[name].append((part.path, chunk.box(stored.shape)))
    for name, own in held.items():
        problem = cover_problem(joined[name].shape, [box for _, box in own])
        if problem is not None:
            for (first, box), (other, second) in combinations(own, 2):
                if box.meet(second).size:
                    raise MismatchError(f"{first} and {other}", f"tensor {shown(name)}: both hold some of its elements")
            raise FileFormatError(folder, f"tensor {shown(name)}: {problem}")
    boxes = [{n: chunk.box(p.header.tensors[n].shape) for n, chunk in p.info.chunks.items()} for p in parts]
    shapes = {name: joined[name].shape for name, tensor in tensors.items() if tensor.role == "average"}
    sampled: list[list[int]] = [[] for _ in parts]
    for number, (name, index) in enumerate(places(shapes)):
        for numbers, within in zip(sampled, boxes, strict=True):
            if name in within and index_within(within[name], shapes[name], index) is not None:
                numbers.append(number)
    return _Joined(tensors, fmt.lay_out([*joined.values()]), aliases, boxes, sampled)


def sum_of_parts(parts: Sequence[Measurements | None]) -> Measurements | None:
    """The measurements of all parts together; None if one has none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    by_partner = [{(one.t, one.sigma_rel): one for one in part.distances} for part in known]
    distances = [
        Distance(*key, sum(own[key].squared for own in by_partner), sum(own[key].rounding for own in by_partner))
        for key in by_partner[0]
        if all(key in own for own in by_partner)
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
    """The key that sorts snapshots by time, then sigma_rel."""
    return snapshot.info.t, snapshot.info.sigma_rel, snapshot.path.name


def contradictions(snapshots: Sequence[Snapshot]) -> list[MismatchError]:
    """Pairs of snapshots, in order of time, that cannot be of one directory: an error each, which names both."""
    found = [
        MismatchError(f"{snapshots[0].path} and {other.path}", reason)
        for other in snapshots[1:]
        if (reason := difference(snapshots[0], other)) is not None
    ]
    seen: dict[tuple[float, float], Snapshot] = {}
    for snapshot in snapshots:
        t, sigma_rel = snapshot.info.t, snapshot.info.sigma_rel
        first = seen.setdefault((t, sigma_rel), snapshot)
        if first is not snapshot:
            what = f"both hold sigma_rel {sigma_rel:g} at t = {t:,.12g}"
            found.append(MismatchError(f"{first.path} and {snapshot.path}", what, "remove one"))
    return found


def difference(first: Snapshot, other: Snapshot) -> str | None:
    """Why a snapshot and a later one cannot be of one directory, to follow their names; None if they can."""
    a, b = first.info, other.info
    if a.run_id != b.run_id:
        return f"are of different runs ({a.run_id[:8]} and {b.run_id[:8]}); keep one run a directory"
    if a.t_unit != b.t_unit:
        return f"count time in {shown(a.t_unit)} and {shown(b.t_unit)}"
    # A run whose last snapshot of a profile was deleted may have continued without that profile.
    if not (set(a.sigma_rels) <= set(b.sigma_rels) or set(b.sigma_rels) <= set(a.sigma_rels)):
        return f"do not match: their runs track the profiles {_widths(a.sigma_rels)} and {_widths(b.sigma_rels)}"
    same = (first.header.tensors, a.tensors) == (other.header.tensors, b.tensors)  # mostly the same objects
    for name in () if same else sorted(a.tensors.keys() | b.tensors.keys()):
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
    """A line for profiles that are missing at the newest time, where thinning never removes one.

    Not for those that the run no longer tracks: it continued without them.
    """
    own = [s.info for s in snapshots if s.info.run_id == snapshots[0].info.run_id]
    there = [info for info in own if info.t == own[-1].t]
    tracked = {sigma_rel for info in there for sigma_rel in info.sigma_rels}
    missing = ({info.sigma_rel for info in own} & tracked) - {info.sigma_rel for info in there}
    if not missing:
        return []
    return [f"t = {own[-1].t:,.12g}, the newest: no snapshot of sigma_rel {_widths(sorted(missing))}"]


def _widths(sigma_rels: Sequence[float]) -> str:
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


# --- adding to a directory


def snapshot_path(directory: Path, t: float, sigma_rel: float, part: tuple[int, int] | None = None) -> Path:
    """The path of a new snapshot, or of a part of one. Names sort by time up to the largest whole number of a float."""
    integer, _, fraction = f"{Decimal(repr(t)):f}".partition(".")
    clock = f"{int(integer):016d}" + (f".{fraction}" if fraction.strip("0") else "")
    if part is None:
        return directory / f"{clock}-{sigma_rel!r}{fmt.SUFFIX}"
    number, parts = part
    return directory / f"{clock}-{sigma_rel!r}" / f"part-{number:05d}-of-{parts:05d}{fmt.SUFFIX}"


def newest_before(info: fmt.SnapshotInfo, stored: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """The two newest earlier snapshots of each profile that have measurements; `stored` is in order of time.

    Two, since distances over one interval and over two distinguish a random walk from noise.
    """
    newest: dict[float, list[StoredSnapshot]] = {sigma_rel: [] for sigma_rel in info.sigma_rels}
    for snapshot in reversed(stored):
        own = newest.get(snapshot.sigma_rel, [])
        if snapshot.t < info.t and snapshot.info.measurements and len(own) < 2:
            own.insert(0, snapshot)
        if all(len(found) == 2 for found in newest.values()):
            break
    return [snapshot for found in newest.values() for snapshot in found]

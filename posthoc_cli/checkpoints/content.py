"""The content of one checkpoint: its tensors, and the numbers and texts beside them.

A checkpoint is a file, the shards or parts of a model, a folder of torch.distributed.checkpoint, or
a folder of several of these, whose names are then the first keys of their tensors; see `folders`.
Each file is opened once for its content; its tensors are then read in place. It has no checksums: a
file is recognised by its size, the places of its tensors, and a sample of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from posthoc_cli import files
from posthoc_cli.checkpoints.containers import (
    ENDINGS,
    Leaves,
    find_container,
    header_leaves,
    read_leaves,
)
from posthoc_cli.checkpoints.folders import (
    NO_MODEL,
    PART,
    Distributed,
    Layout,
    OneFile,
    Parts,
    Refused,
    Sets,
    Shards,
    missing_parts,
)
from posthoc_cli.checkpoints.pickles import Keys, Node, Programs, read_pickled
from posthoc_cli.checkpoints.trackers import TENSORS, VALUES, TrackerState, find_trackers
from posthoc_cli.errors import FileFormatError, UnsuitableError, list_first, quote
from posthoc_cli.snapshots.boxes import Box, cover_problem
from posthoc_cli.snapshots.entry import Entry, decode_values, is_sizes
from posthoc_cli.snapshots.opened_file import OpenedFile, read_small_file, sampled_identity
from posthoc_cli.snapshots.output_mark import MARK, OutputMark, decode_mark, find_mark
from posthoc_cli.snapshots.outputs import decode_index
from posthoc_cli.snapshots.strict_json import parse_object
from posthoc_cli.snapshots.tensorfile import KeptOpen, TensorFile

# --- tensors


class StoredChunk(NamedTuple):
    """A box of a tensor, and its place in a file."""

    path: Path
    entry: Entry
    part: Box | None = None  # None for the whole tensor

    @property
    def box(self) -> Box:
        return self.part or Box.full(self.entry.shape)


@dataclass(frozen=True, eq=False, slots=True)  # a folder has hundreds of thousands
class StoredTensor:
    """A tensor of a checkpoint."""

    keys: Keys  # that lead to it
    shape: tuple[int, ...]
    # or what finds them, with FileFormatError if it cannot be read
    stored: tuple[StoredChunk, ...] | Callable[[], tuple[StoredChunk, ...]]

    @property
    def name(self) -> str:
        return ".".join(self.keys)

    @property
    def chunks(self) -> tuple[StoredChunk, ...]:
        return self.stored() if callable(self.stored) else self.stored


Tensors = Mapping[str, StoredTensor]
Values = dict[str, Any]
"""Numbers and texts, by their keys."""
Files = dict[Path, TensorFile]
"""The files of a checkpoint, without their tensors: what each is recognised by, and its handle for
all tensors in it. Files of torch.distributed.checkpoint join them when their chunks are looked
for."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds; see `Reader`."""

    path: Path  # the file or folder
    tensors: Tensors  # by their keys, joined by dots
    values: Values = field(default_factory=dict)  # mostly numbers and texts, by their keys
    files: Files = field(default_factory=dict)
    trackers: tuple[TrackerState, ...] = ()  # our own, whose tensors and values are not among these
    mark: OutputMark | None = None  # of an output of this package

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    @cached_property
    def shapes(self) -> list[tuple[Keys, tuple[int, ...]]]:
        """The keys and the shape of each tensor."""
        return [(tensor.keys, tensor.shape) for tensor in self.tensors.values()]

    @property
    def groups(self) -> list[str]:
        """The first keys of its tensors."""
        return [*dict.fromkeys(tensor.keys[0] for tensor in self.tensors.values())]

    @cached_property
    def optimizers(self) -> frozenset[str]:
        """The keys of optimizer states: whatever they are called, `param_groups` lies beside
        them."""
        keys = set()
        for name in self.values:
            outer, is_group, _ = f".{name}".partition(".param_groups.0.")
            if is_group:
                keys.add(f"{outer}.state".removeprefix("."))
        return frozenset(keys)

    @property
    def tracker_averages(self) -> dict[str, str]:
        """The lengths of the averages that a tracker's callback has saved in it, by path."""
        found = dict[str, str]()
        for state in self.trackers:
            found |= state.average_paths
        return found

    def is_of_optimizer(self, name: str) -> bool:
        """Return whether a tensor or a value is part of an optimizer's state."""
        return any(name.startswith(f"{path}.") for path in self.optimizers)


def list_names(names: Sequence[str], most: int = 5) -> str:
    """List a few names, for a message."""
    return list_first(map(quote, names), most)


def refuse_tensor(path: Path, name: str, problem: str, hint: str = "") -> NoReturn:
    """Raise FileFormatError for a tensor of a file."""
    raise FileFormatError(path, f"tensor {quote(name)}: {problem}", hint)


# --- files and folders

_CONFIG = "config.json"  # of a member, such as an average of diffusers, with its settings
_TRAINER_STATE = "trainer_state.json"  # of a Trainer, with the step
_MOST_SETTINGS = 1_000_000_000  # bytes: a Trainer logs each step
COUNTERS = {
    "global_step", "global_steps", "step", "steps", "iteration", "iter", "iters", "num_updates",
    "updates", "decay", "optimization_step", "initted", "n_averaged", "num_batches_seen", "count",
}  # fmt: skip
"""Last keys of values that trainings store as tensors of one element."""
OFFSETS = "DCP_SHARDING_INFO"
"""Key of the text in the header of a file of torch's `HuggingFaceStorageWriter` that says where in
its tensors the chunks begin that the file holds."""


class Reader:
    """Reads checkpoints; a file that belongs to several layouts is read once. What it opens is kept
    open for further reads as `kept` says."""

    def __init__(self, kept: KeptOpen) -> None:
        self._kept = kept
        self._files = dict[Path, Content]()
        self._models = dict[Layout, Content]()
        self._programs = Programs()

    def open(self, path: Path, layout: Layout) -> Content:
        """Open the checkpoint at a path, which is as `layout` says; raise FileFormatError if it
        cannot be read."""
        content = self.read(layout, {})
        if path.is_dir():
            folders = dict.fromkeys((path, layout.path.parent))
            beside = _read_settings(folders, _TRAINER_STATE, content.files)
            if not files.is_url(path):
                beside = _read_counts(path, content.files) | beside
            content = replace(content, values=content.values | beside)
        return replace(content, path=path)

    def read(self, layout: Layout, opened: Files) -> Content:
        """Read what a layout holds; the files that it opens join `opened`."""
        if isinstance(layout, Refused):
            raise layout.error
        if isinstance(layout, Distributed):
            return _read_distributed(layout.path, opened, self._programs, self._kept)
        if isinstance(layout, Sets):
            return self._read_sets(layout, opened)
        if layout not in self._models:
            self._models[layout] = self._read_model(layout)
        content = self._models[layout]
        opened.update(content.files)
        return replace(content, files=opened)

    def read_file(self, path: Path) -> Content:
        """Read what a file holds, which may be a part of a model."""
        if path not in self._files:
            self._files[path] = _read_file(path, self._programs, self._kept)
        return self._files[path]

    def _read_model(self, layout: OneFile | Shards | Parts) -> Content:
        if isinstance(layout, Shards):
            return self._read_shards(layout.path)
        paths = layout.paths if isinstance(layout, Parts) else (layout.path,)
        return _join([self.read_file(path) for path in paths])

    def _read_shards(self, index: Path) -> Content:
        tensors = {}
        mark = None
        opened = {index: identify(index)}
        shards = decode_index(index, ENDINGS)
        _check_complete(index, shards)
        for name, listed in shards.items():
            shard = self.read_file(index.parent / name)
            whole = _join([shard]).tensors
            for tensor in listed:
                if tensor not in whole:
                    refuse_tensor(shard.path, tensor, "is not in it, as the index says")
                tensors[tensor] = whole[tensor]
            mark = mark or shard.mark
            opened |= shard.files
        return Content(index.parent, tensors, files=opened, mark=mark)

    def _read_sets(self, layout: Sets, opened: Files) -> Content:
        tensors = {}
        values = {}
        trackers = []
        marks = []
        for key, member in layout.members.items():
            try:
                content = self.read(member, opened)
            except FileFormatError:
                if is_text(member):
                    continue
                raise
            settings = Values()
            if isinstance(member, Sets) or member.path.parent != layout.path:
                settings = _read_settings([layout.path / key], _CONFIG, opened)
            for tensor in content.tensors.values():
                moved = replace(tensor, keys=(key, *tensor.keys))
                tensors[moved.name] = moved
            for name, value in {**content.values, **settings}.items():
                values[f"{key}.{name}"] = value
            trackers += [state.below(key) for state in content.trackers]
            marks.append(content.mark)
        return Content(layout.path, tensors, values, opened, tuple(trackers), _mark_of_all(marks))


def _check_complete(index: Path, shards: Iterable[str]) -> None:
    """Raise UnsuitableError for an index that names a part of a model, and not all others."""
    by_model = dict[tuple[str, str], list[str]]()
    for name in shards:
        if match := PART.search(name):
            by_model.setdefault((PART.sub("", name), match["total"]), []).append(name)
    for names in by_model.values():
        if missing := missing_parts(names):
            listed = list_first(map(str, missing))
            reason = f"names some parts of a model, and not those with the numbers {listed}"
            raise UnsuitableError(index, reason, "write the model again, or rename its files")


def _mark_of_all(marks: Sequence[OutputMark | None]) -> OutputMark | None:
    """Find the mark of a folder with such members: one of a copied folder stands for all of it."""
    copied = [mark for mark in marks if mark is not None and mark.copied]
    if copied:
        return copied[0]
    return marks[0] if all(marks) else None


def is_text(layout: Layout) -> bool:
    """Return whether a file that cannot be read begins like no file of tensors, in spite of its
    name, and is not an empty one, which a crash may leave."""
    if not isinstance(layout, OneFile) or files.is_url(layout.path):
        return False
    return layout.path.stat().st_size > 0 and find_container(layout.path) is None


_COUNT = re.compile(
    r'(?:^|[{,] *)"?(epoch|step|global_step|optimizer_step)"?: *([0-9]{1,15}) *(?=$|[,}])',
    re.MULTILINE,
)
_MOST_COUNTS = 100_000  # bytes of a file, and
_MOST_FILES = 5


def _read_counts(folder: Path, opened: Files) -> Values:
    """Read the steps or epochs in small files beside a model, as SpeechBrain and OneTrainer write
    them."""
    values = Values()
    for file in [*sorted(folder.glob("*.yaml")), folder / "meta.json"][:_MOST_FILES]:
        if file.is_file() and file.stat().st_size <= _MOST_COUNTS:
            text = read_small_file(file, _MOST_COUNTS).decode(errors="replace")
            found = _COUNT.findall(text)
            for name, digits in found:
                values.setdefault(name, int(digits))
            if found:
                opened[file] = identify(file)
    return values


def _read_settings(folders: Iterable[Path], name: str, opened: Files) -> Values:
    """Read the values of a file beside a model, in the folders that have it. They may be of any
    kind, so that a setting that is no number is not taken for a missing one."""
    values = Values()
    for folder in folders:
        file = folder / name
        if not file.is_file():
            continue
        text = read_small_file(file, _MOST_SETTINGS)
        settings = parse_object(file, text, name, most=_MOST_SETTINGS)
        for key, value in settings.items():
            if value is not None:
                values[key] = value
        opened[file] = identify(file)
    return values


def _read_file(path: Path, programs: Programs, kept: KeptOpen) -> Content:
    values = Values()
    tensors = {}
    header = kept.foreign.get(path)
    with ExitStack() as stack:
        if header is None:
            file = stack.enter_context(OpenedFile(path))
            leaves = read_leaves(file, programs)
        else:
            file = stack.enter_context(header.opened())
            leaves = header_leaves(header)
        mark = decode_mark(leaves.get((MARK,)), path)
        offsets = _read_offsets(path, leaves)
        counts = _read_counters(file, leaves)
        for keys, value in leaves.items():
            name = ".".join(keys)
            if isinstance(value, Node):
                kind = quote(value.name.removeprefix("torch._utils._rebuild_"))
                problem = f"is of a kind that cannot be read ({kind})"
                refuse = partial(refuse_tensor, path, name, problem)
                tensors[name] = StoredTensor(keys, (), refuse)
            elif isinstance(value, Entry):
                box = None if offsets is None else _find_box(path, name, offsets, value)
                chunk = StoredChunk(path, value, box)
                tensors[name] = StoredTensor(keys, value.shape, (chunk,))
                if keys in counts:
                    values[name] = counts[keys]
            else:
                values[name] = value
        identified = _identify(file)
        if header is not None:
            identified.handle = header.handle
        elif kept.take(identified, file):
            stack.pop_all()
        content = Content(path, tensors, values, {path: identified}, mark=mark)
    return _without_trackers(content)


def _without_trackers(content: Content) -> Content:
    """Set the states of trackers aside: they are no part of a model, and no average."""
    states = find_trackers(content.values)
    if not states:
        return content
    own = set[str]()
    beginnings = list[str]()
    for state in states:
        start = f"{state.path}." if state.path else ""
        own.update(start + name for name in VALUES)
        beginnings += [f"{start}{key}." for key in TENSORS]
    tensors = {}
    for name, tensor in content.tensors.items():
        if not name.startswith(tuple(beginnings)):
            tensors[name] = tensor
    values = {name: value for name, value in content.values.items() if name not in own}
    return replace(content, tensors=tensors, values=values, trackers=tuple(states))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def identify(path: Path) -> TensorFile:
    """Return a file without its tensors."""
    with OpenedFile(path) as file:
        return _identify(file)


def _identify(file: OpenedFile) -> TensorFile:
    return TensorFile(file.path, {}, file.stamp, checksum=sampled_identity(file))


def _read_counters(file: OpenedFile, leaves: Leaves) -> dict[Keys, float]:
    """Read the values of the tensors of one element that count something, such as the step of each
    parameter of an optimizer, together."""
    counters = {}
    for keys, entry in leaves.items():
        if isinstance(entry, Entry) and entry.size == 1 and _last_part(keys[-1]) in COUNTERS:
            counters[keys] = entry
    spans = [(entry.begin, entry.begin + entry.nbytes) for entry in counters.values()]
    data = file.read_spans(spans)
    values = {}
    at = 0
    for keys, entry in counters.items():
        end = at + entry.nbytes
        values[keys] = float(decode_values(data[at:end], entry.dtype)[0])
        at = end
    return values


# --- the parts of a model


def _read_offsets(path: Path, leaves: Leaves) -> Values | None:
    """Read what a part says about where its chunks begin; None if it is not such a part."""
    text = leaves.get((OFFSETS,))
    return parse_object(path, text, OFFSETS) if isinstance(text, str) else None


def _find_box(path: Path, name: str, offsets: Values, entry: Entry) -> Box:
    described = offsets.get(name)
    begin = described.get("saved_offsets") if isinstance(described, dict) else None
    if not isinstance(begin, list) or not is_sizes(begin) or len(begin) != len(entry.shape):
        refuse_tensor(path, name, f"{OFFSETS} in the header does not say where it begins")
    return Box(tuple(begin), entry.shape)


def _join(parts: Sequence[Content]) -> Content:
    """Join the parts of a model, or check that a file is none; raise FileFormatError unless each
    element of a tensor is in one of them."""
    first, *more = parts
    if not more and OFFSETS not in first.values:
        return first
    values = Values()
    opened = Files()
    pieces = dict[str, list[StoredTensor]]()
    for part in parts:
        values |= part.values
        opened |= part.files
        for name, tensor in part.tensors.items():
            pieces.setdefault(name, []).append(tensor)
    tensors = {}
    for name, several in pieces.items():
        tensors[name] = several[0]
        if OFFSETS in values or len(several) > 1:
            chunks = list[StoredChunk]()
            for tensor in several:
                chunks += tensor.chunks
            shape = _join_boxes(name, chunks)
            tensors[name] = StoredTensor(several[0].keys, shape, tuple(chunks))
    return Content(first.path, tensors, values, opened, mark=first.mark)


def _join_boxes(name: str, chunks: Sequence[StoredChunk]) -> tuple[int, ...]:
    """Find the shape of the tensor that chunks make."""
    boxes = [chunk.box for chunk in chunks]
    shape = tuple(map(max, zip(*(box.end for box in boxes), strict=False)))
    if all(len(box.shape) == len(shape) for box in boxes) and not cover_problem(shape, boxes):
        return shape
    paths = [chunk.path for chunk in chunks]
    held = list_names([path.name for path in paths])
    problem = f"its chunks in {held} do not hold each element exactly once: parts are missing, or "
    hint = "name a folder with all parts of one, or with the whole model, such as `consolidated`"
    refuse_tensor(paths[0].parent, name, f"{problem}of two saves", hint)


# --- torch.distributed.checkpoint

_Index = tuple[str, tuple[int, ...]]  # the name of an object, and its offset


def _state(value: Any) -> Values:
    """Return the attributes of an object in a pickle; empty if it has none."""
    if isinstance(value, Node) and isinstance(value.state, dict):
        return value.state
    return {}


def _read_distributed(metadata: Path, opened: Files, programs: Programs, kept: KeptOpen) -> Content:
    with OpenedFile(metadata) as file:
        state = _state(read_pickled(file, 0, file.size))
        _, mark = find_mark(file)
        opened[metadata] = _identify(file)
    listed = state.get("state_dict_metadata")
    stored = state.get("storage_data")
    if not (isinstance(listed, dict) and isinstance(stored, dict)):
        raise FileFormatError(metadata, "is not the metadata of torch.distributed.checkpoint")
    objects = _Objects(metadata, stored, opened, programs, kept)
    tensors = {}
    values = {}
    for name, described in listed.items():
        if not isinstance(name, str):
            continue
        about = _state(described)
        if isinstance(about.get("chunks"), list):
            size: Any = about.get("size")
            shape = tuple(size) if is_sizes(size) else ()
            chunks = cache(partial(objects.chunks, name, shape, about["chunks"]))
            keys = _key_path(name, state.get("planner_data"))
            tensors[".".join(keys)] = StoredTensor(keys, shape, chunks)
        elif _is_counter(name) or _is_of_tracker(name, listed):
            values[name] = objects.read(name, ())[1]
    found = Content(metadata.parent, tensors, values, opened, mark=decode_mark(mark, metadata))
    return _without_trackers(found)


def _is_counter(name: str) -> bool:
    return _last_part(name) in COUNTERS and not NO_MODEL.search(name)


def _is_of_tracker(name: str, listed: Collection[Any]) -> bool:
    """Return whether an object may be a value of a tracker's state: both values are there."""
    path = name.removesuffix(_last_part(name))
    return _last_part(name) in VALUES and all(f"{path}{value}" in listed for value in VALUES)


def _key_path(name: str, planned: Any) -> Keys:
    """Find the keys that lead to a tensor, as the plan of a distributed checkpoint gives them."""
    keys = None
    if isinstance(planned, dict):
        keys = planned.get(name)
    if isinstance(keys, tuple) and all(isinstance(key, str | int) for key in keys):
        return tuple(map(str, keys))
    return (name,)


@dataclass
class _Objects:
    """The objects in the files of a distributed checkpoint.

    Together they have no more bytes than their files, so that reading all takes one pass.
    """

    metadata: Path
    stored: Mapping[Any, Any]  # places in files, by objects with the name and the offset
    files: Files
    programs: Programs
    kept: KeptOpen

    @cached_property
    def places(self) -> dict[_Index, Values]:
        places = {}
        for index, place in self.stored.items():
            key = _state(index)
            fqn = key.get("fqn")
            offset = key.get("offset") or ()
            if isinstance(fqn, str) and is_sizes(offset):
                places[fqn, tuple(offset)] = _state(place)
        return places

    @cached_property
    def nbytes(self) -> Counter[str]:
        """The bytes of all objects in a file, by its name."""
        nbytes = Counter[str]()
        for place in self.places.values():
            length: Any = place.get("length")
            if is_sizes((length,)):
                nbytes[str(place.get("relative_path"))] += length
        return nbytes

    def chunks(
        self,
        name: str,
        shape: tuple[int, ...],
        described: Sequence[Any],
    ) -> tuple[StoredChunk, ...]:
        """Find the chunks of a tensor, which the metadata describe."""
        chunks = []
        boxes = []
        for chunk in map(_state, described):
            offset: Any = chunk.get("offsets")
            sizes: Any = chunk.get("sizes")
            is_box = is_sizes(offset) and is_sizes(sizes)
            if not (is_box and len(offset) == len(sizes) == len(shape)):
                problem = "its shape, or the shape of a chunk, is malformed"
                refuse_tensor(self.metadata, name, problem)
            boxes.append(Box(tuple(offset), tuple(sizes)))
        if problem := cover_problem(shape, boxes) or "":
            refuse_tensor(self.metadata, name, problem)
        for box in boxes:
            path, entry = self.read(name, box.offset)
            if not isinstance(entry, Entry) or entry.shape != box.shape:
                refuse_tensor(path, name, f"holds no tensor of shape {list(box.shape)}")
            chunks.append(StoredChunk(path, entry, box))
        return tuple(chunks)

    def read(self, name: str, offset: tuple[int, ...]) -> tuple[Path, Any]:
        """Return the file and the object with a name and an offset, or with the name alone."""
        path, begin, end = self._find(name, offset)
        hint = f"move {path.parent} away to leave it out"
        if path not in self.files:
            self.files[path] = identify(path)
            self.kept.keep(self.files[path])
        with self.files[path].opened() as file:
            if end > file.size:
                refuse_tensor(path, name, "truncated: it would end beyond the file", hint)
            if self.nbytes[path.name] > file.size:
                reason = "is shorter than its objects: truncated or overlapping"
                raise FileFormatError(path, reason, hint)
            return path, read_pickled(file, begin, end, self.programs)

    def _find(self, name: str, offset: tuple[int, ...]) -> tuple[Path, int, int]:
        """Find the file of an object, and its range there."""
        place: Any = self.places.get((name, offset)) or self.places.get((name, ()), {})
        file_name, begin, length = map(place.get, ("relative_path", "offset", "length"))
        if not isinstance(file_name, str) or not is_sizes((begin, length)):
            refuse_tensor(self.metadata, name, "its place is missing")
        if Path(file_name).name != file_name or not file_name.isprintable():
            problem = f"{quote(file_name)} is not the name of a file in its folder"
            refuse_tensor(self.metadata, name, problem)
        if place.get("transform_descriptors"):
            refuse_tensor(self.metadata, name, "is compressed or encrypted, which cannot be read")
        return self.metadata.parent / file_name, begin, begin + length

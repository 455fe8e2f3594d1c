"""The content of one checkpoint: its tensors, and the numbers and texts beside them.

A checkpoint is a file, the shards of a model, a folder of torch.distributed.checkpoint, or a folder
of several of these, whose names are then the first keys of their tensors; see `folders`. Each file
is opened once for its content; its tensors are then read in place. It has no checksums: a file is
recognised by its size, the places of its tensors, and a sample of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from posthoc_cli import files
from posthoc_cli.checkpoints.containers import ENDINGS, KIND, find_container, read_leaves
from posthoc_cli.checkpoints.folders import NO_MODEL, Distributed, Layout, OneFile, Refused, Sets
from posthoc_cli.checkpoints.pickles import Keys, Node, read_pickled
from posthoc_cli.errors import FileFormatError, list_first, quote
from posthoc_cli.snapshots.boxes import Box, cover_problem
from posthoc_cli.snapshots.entry import Entry, decode_values, is_sizes
from posthoc_cli.snapshots.opened_file import OpenedFile, read_small_file, sampled_identity
from posthoc_cli.snapshots.outputs import decode_index
from posthoc_cli.snapshots.strict_json import parse_object
from posthoc_cli.snapshots.tensorfile import Handle

# --- tensors


@dataclass(frozen=True)
class Identity:
    """What a file is recognised by."""

    stamp: tuple[int, int | str]  # its size, and what changes when it is written to
    sample: str  # `sampled_identity`
    handle: Handle = field(default_factory=Handle, compare=False)  # for all tensors in it

    @classmethod
    def from_file(cls, file: OpenedFile) -> Identity:
        return cls(file.stamp, sampled_identity(file))

    @property
    def nbytes(self) -> int:
        return self.stamp[0]


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, and its place in a file."""

    path: Path
    entry: Entry
    box: Box


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a checkpoint."""

    path: Path  # the checkpoint
    keys: Keys  # that lead to it
    shape: tuple[int, ...]
    parts: tuple[StoredChunk, ...] = ()
    problem: str = ""  # why it cannot be read
    find_parts: Callable[[], tuple[StoredChunk, ...]] | None = None  # if they are not known yet

    @property
    def name(self) -> str:
        return ".".join(self.keys)

    @cached_property
    def chunks(self) -> tuple[StoredChunk, ...]:
        if self.problem:
            raise FileFormatError(self.path, f"tensor {quote(self.name)}: {self.problem}")
        if self.find_parts is None:
            return self.parts
        return self.find_parts()

    @property
    def place(self) -> tuple[Path, Entry] | None:
        """The place of the tensor if it is in one piece; tied tensors share it."""
        first, *more = self.chunks
        if more or not first.entry.nbytes:
            return None
        return first.path, first.entry


Tensors = Mapping[str, StoredTensor]
Values = dict[str, Any]
"""Numbers and texts, by their keys."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds; see `Reader`."""

    path: Path  # the file or folder
    tensors: Tensors  # by their keys, joined by dots
    values: Values = field(default_factory=dict)  # mostly numbers and texts, by their keys
    files: dict[Path, Identity] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(identity.nbytes for identity in self.files.values())

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

    def is_of_optimizer(self, name: str) -> bool:
        """Return whether a tensor or a value is part of an optimizer's state."""
        return any(name.startswith(f"{path}.") for path in self.optimizers)


def list_names(names: Sequence[str], most: int = 5) -> str:
    """List a few names, for a message."""
    return list_first(map(quote, names), most)


# --- files and folders

_CONFIG = "config.json"  # of a member, such as an average of diffusers, with its settings
_TRAINER_STATE = "trainer_state.json"  # of a Trainer, with the step
_MOST_SETTINGS = 1_000_000_000  # bytes: a Trainer logs each step
COUNTERS = {
    "global_step", "global_steps", "step", "steps", "iteration", "iter", "num_updates", "updates",
    "decay", "optimization_step", "initted", "n_averaged", "num_batches_seen", "count",
}  # fmt: skip
"""Last keys of values that trainings store as tensors of one element."""


Files = dict[Path, Identity]
"""The files of a checkpoint; files of torch.distributed.checkpoint join them when their chunks are
looked for."""


class Reader:
    """Reads checkpoints; a file that belongs to several layouts is opened once."""

    def __init__(self) -> None:
        self._known = dict[Path, Content]()  # of single files

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
            return _read_distributed(layout.path, opened)
        if isinstance(layout, Sets):
            return self._read_sets(layout, opened)
        if layout.path not in self._known:
            read = _read_file if isinstance(layout, OneFile) else _read_shards
            self._known[layout.path] = read(layout.path, {})
        content = self._known[layout.path]
        opened.update(content.files)
        return replace(content, files=opened)

    def _read_sets(self, layout: Sets, opened: Files) -> Content:
        tensors = {}
        values = {}
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
        return Content(layout.path, tensors, values, opened)


def is_text(layout: Layout) -> bool:
    """Return whether a file that cannot be read begins like no file of tensors, in spite of its
    name, and is not an empty one, which a crash may leave."""
    if not isinstance(layout, OneFile) or files.is_url(layout.path):
        return False
    return layout.path.stat().st_size > 0 and find_container(layout.path) is None


_COUNT = re.compile(r"^(epoch|step|global_step|optimizer_step): *([0-9]{1,15}) *$", re.MULTILINE)
_MOST_COUNTS = 100_000  # bytes of a file, and
_MOST_FILES = 5


def _read_counts(folder: Path, opened: Files) -> Values:
    """Read the steps or epochs in small YAML files beside a model, as SpeechBrain writes them."""
    values = Values()
    for file in sorted(folder.glob("*.yaml"))[:_MOST_FILES]:
        if file.is_file() and file.stat().st_size <= _MOST_COUNTS:
            found = _COUNT.findall(file.read_text(errors="replace"))
            for name, digits in found:
                values.setdefault(name, int(digits))
            if found:
                opened[file] = _identity(file)
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
        opened[file] = _identity(file)
    return values


def _read_file(path: Path, opened: Files) -> Content:
    values = Values()
    tensors = {}
    with OpenedFile(path) as file:
        for keys, value in read_leaves(file).items():
            name = ".".join(keys)
            if not isinstance(value, Entry | Node):
                values[name] = value
                continue
            tensors[name] = _make_tensor(path, keys, value)
            is_counter = _last_part(name) in COUNTERS
            if is_counter and isinstance(value, Entry) and value.size == 1:
                values[name] = _read_number(file, value)
        opened[path] = Identity.from_file(file)
    return Content(path, tensors, values, opened)


def _make_tensor(
    path: Path,
    keys: Keys,
    value: Entry | Node,
) -> StoredTensor:
    if isinstance(value, Node):
        kind = quote(value.name.removeprefix("torch._utils._rebuild_"))
        return StoredTensor(path, keys, (), problem=f"is of a kind that cannot be read ({kind})")
    chunk = StoredChunk(path, value, Box.full(value.shape))
    return StoredTensor(path, keys, value.shape, (chunk,))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _identity(path: Path) -> Identity:
    with OpenedFile(path) as file:
        return Identity.from_file(file)


def _read_number(file: OpenedFile, entry: Entry) -> float:
    """Read the value of a tensor of one element."""
    content = file.read_at(entry.nbytes, entry.begin)
    raw = np.frombuffer(content, np.uint8)
    return float(decode_values(raw, entry.dtype)[0])


def _read_shards(index: Path, opened: Files) -> Content:
    tensors = {}
    values = {}
    opened[index] = _identity(index)
    for name, listed in decode_index(index, ENDINGS).items():
        shard = _read_file(index.parent / name, opened)
        for tensor in listed:
            if tensor not in shard.tensors:
                reason = f"tensor {quote(tensor)}: is not in it, as the index says"
                raise FileFormatError(shard.path, reason)
            tensors[tensor] = shard.tensors[tensor]
        if KIND in shard.values:
            values[KIND] = shard.values[KIND]
    return Content(index.parent, tensors, values, opened)


# --- torch.distributed.checkpoint

_Index = tuple[str, tuple[int, ...]]  # the name of an object, and its offset


def _state(value: Any) -> Values:
    """Return the attributes of an object in a pickle; empty if it has none."""
    if isinstance(value, Node) and isinstance(value.state, dict):
        return value.state
    return {}


def _read_distributed(metadata: Path, opened: Files) -> Content:
    with OpenedFile(metadata) as file:
        state = _state(read_pickled(file, 0, file.size))
        opened[metadata] = Identity.from_file(file)
    listed = state.get("state_dict_metadata")
    stored = state.get("storage_data")
    if not (isinstance(listed, dict) and isinstance(stored, dict)):
        raise FileFormatError(metadata, "is not the metadata of torch.distributed.checkpoint")
    objects = _Objects(metadata, _places_in(stored), opened)
    tensors = {}
    values = {}
    for name, described in listed.items():
        if not isinstance(name, str):
            continue
        if isinstance(_state(described).get("chunks"), list):
            keys = _key_path(name, state.get("planner_data"))
            tensor = objects.make_tensor(name, keys, _state(described))
            tensors[tensor.name] = tensor
        elif _last_part(name) in COUNTERS and not NO_MODEL.search(name):
            values[name] = objects.read(name, ())[1]
    return Content(metadata.parent, tensors, values, objects.files)


def _places_in(stored: Mapping[Any, Any]) -> dict[_Index, Values]:
    places = {}
    for index, place in stored.items():
        key = _state(index)
        fqn = key.get("fqn")
        offset = key.get("offset") or ()
        if isinstance(fqn, str) and is_sizes(offset):
            places[fqn, tuple(offset)] = _state(place)
    return places


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
    # of objects in files, by their names and offsets
    places: Mapping[_Index, Values]
    files: dict[Path, Identity]

    @cached_property
    def nbytes(self) -> Counter[str]:
        """The bytes of all objects in a file, by its name."""
        nbytes = Counter[str]()
        for place in self.places.values():
            length: Any = place.get("length")
            if is_sizes((length,)):
                nbytes[str(place.get("relative_path"))] += length
        return nbytes

    def make_tensor(
        self,
        name: str,
        keys: Keys,
        described: Values,
    ) -> StoredTensor:
        """Return a tensor as the metadata describe it; its chunks are looked for when they are
        needed."""
        size: Any = described.get("size")
        if not is_sizes(size):
            size = ()
        boxes = []
        problem: str | None = None
        for chunk in map(_state, described["chunks"]):
            offset: Any = chunk.get("offsets")
            shape: Any = chunk.get("sizes")
            is_box = is_sizes(offset) and is_sizes(shape)
            if not (is_box and len(offset) == len(shape) == len(size)):
                problem = "its shape, or the shape of a chunk, is malformed"
                break
            boxes.append(Box(tuple(offset), tuple(shape)))
        problem = problem or cover_problem(size, boxes) or ""
        chunks = partial(self.chunks, name, boxes)
        return StoredTensor(self.metadata, keys, tuple(size), (), problem, chunks)

    def chunks(
        self,
        name: str,
        boxes: Sequence[Box],
    ) -> tuple[StoredChunk, ...]:
        chunks = []
        for box in boxes:
            path, entry = self.read(name, box.offset)
            if not isinstance(entry, Entry) or entry.shape != box.shape:
                self._refuse(path, name, f"holds no tensor of shape {list(box.shape)}")
            chunks.append(StoredChunk(path, entry, box))
        return tuple(chunks)

    def read(
        self,
        name: str,
        offset: tuple[int, ...],
    ) -> tuple[Path, Any]:
        """Return the file and the object with a name and an offset, or with the name alone."""
        place: Any = self.places.get((name, offset)) or self.places.get((name, ()), {})
        file_name, begin, length = map(place.get, ("relative_path", "offset", "length"))
        if not isinstance(file_name, str) or not is_sizes((begin, length)):
            self._refuse(self.metadata, name, "its place is missing")
        if Path(file_name).name != file_name or not file_name.isprintable():
            problem = f"{quote(file_name)} is not the name of a file in its folder"
            self._refuse(self.metadata, name, problem)
        if place.get("transform_descriptors"):
            self._refuse(self.metadata, name, "is compressed or encrypted, which cannot be read")
        path = self.metadata.parent / file_name
        with OpenedFile(path) as file:
            if path not in self.files:
                self.files[path] = Identity.from_file(file)
            hint = f"move {path.parent} away to leave it out"
            if begin + length > file.size:
                reason = f"tensor {quote(name)}: truncated: it would end beyond the file"
                raise FileFormatError(path, reason, hint)
            if self.nbytes[file_name] > file.size:
                reason = "is shorter than its objects: truncated or overlapping"
                raise FileFormatError(path, reason, hint)
            return path, read_pickled(file, begin, begin + length)

    def _refuse(
        self,
        path: Path,
        name: str,
        problem: str,
    ) -> NoReturn:
        raise FileFormatError(path, f"tensor {quote(name)}: {problem}")

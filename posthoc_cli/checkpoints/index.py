"""The index of one checkpoint: a file, the shards of a model, or a folder of
torch.distributed.checkpoint.

Files are safetensors, or written by `torch.save` or `pickle.dump`. Each is indexed once, and its
tensors are then read in place. They have no checksums: a file is recognised by its size, the places
of its tensors, and a sample of it.

Tensors are found by the keys that lead to them, since a checkpoint often holds more than the model.
A tensor consists of one chunk or several, each a box of the tensor in a file.

A folder of torch.distributed.checkpoint has a pickle `.metadata`, which names the file and range of
each chunk, where the chunk is an archive itself; or, from its HuggingFaceStorageWriter, safetensors
files with offsets in their metadata.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posthoc_cli.checkpoints.pickles import Keys, Node, read_pickled, read_tensors
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots.directory import PICKLES
from posthoc_cli.snapshots.outputs import decode_index
from posthoc_cli.snapshots.tensorfile import (
    SUFFIX,
    Box,
    Entry,
    OpenedFile,
    cover_problem,
    decode_file,
    decode_values,
    is_sizes,
    named_on_error,
    parse_object,
    read_small_file,
    sampled_identity,
)

ENDINGS = (SUFFIX, *PICKLES, ".pth.tar")
DCP_METADATA = ".metadata"
INDEX_ENDING = ".index.json"
CONFIG = "config.json"
NOT_WEIGHTS = (
    "optimizer", "optim", "scheduler", "lr_scheduler", "rng", "random_state", "scaler",
    "training_args", "training-state", "chained_",
)  # fmt: skip
"""Prefixes of the names of files and groups that do not hold the model."""
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
AVERAGE_WORD = re.compile(
    r"(?<![a-z])(?:ema\d*|averaged?|avg|shadow|polyak)(?![a-z])", re.IGNORECASE
)
"""Pattern of a key, prefix or name that says that its tensors are an average."""
_MODEL_GROUPS = ("current_model_state", "state_dict", "model_state_dict", "model", "module")
"""Keys of the model in a checkpoint; the first present one counts. If Lightning's `state_dict` is
an average, its weights are under `current_model_state`."""
_OTHER_GROUPS = (*NOT_WEIGHTS, "ema_optimizer", "train_state", "dataloader")
_STEP_NAMES = (
    "global_step",
    "global_steps",
    "step",
    "steps",
    "iteration",
    "train_state.step",
    "meta.iter",
    "ss_steps",
)
_CHUNKS = "DCP_SHARDING_INFO"  # key for the places of chunks in the metadata of a safetensors file
_MOST_CONFIG, _MOST_STATE = 10_000_000, 1_000_000_000

# what a file is recognised by: `sampled_identity` and its stamp
Identity = tuple[str, tuple[int, int | str]]


class FoundChunk(NamedTuple):
    """A box of a tensor, and its place in a file."""

    path: Path
    identity: Identity
    tensor: Entry
    box: Box


Find = Callable[[], list[FoundChunk]]  # what returns the chunks of a tensor
Tensors = Mapping[str, Find]


def tensor_shape(chunks: Sequence[FoundChunk]) -> tuple[int, ...]:
    """Return the shape of the tensor that consists of these chunks."""
    return tuple(map(max, zip(*(chunk.box.end for chunk in chunks), strict=True)))


def names_in(names: Sequence[str]) -> str:
    """Return a few names, for a message."""
    return ", ".join(map(shown, names[:5])) + (
        f" and {len(names) - 5} more" if len(names) > 5 else ""
    )


@dataclass(frozen=True)
class IndexedCheckpoint:
    """The index of a checkpoint."""

    path: Path  # the file or folder
    tensors: Mapping[Keys, Find]
    # numbers and texts by their keys, joined by dots
    values: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def names(self) -> dict[str, Find]:
        """The tensors by their keys, joined by dots."""
        return {".".join(keys): find for keys, find in self.tensors.items()}

    @property
    def step(self) -> float | None:
        """The step in the content, or in the state that a Trainer stored next to it; None if there
        is none."""
        state = self.path / "trainer_state.json"
        if self.path.is_dir() and state.is_file():
            of_trainer = parse_object(
                state, read_small_file(state, _MOST_STATE), "state of a Trainer"
            )
            if type(step := of_trainer.get("global_step")) is int:
                return step
        for value in map(self.number, _STEP_NAMES):
            if isinstance(value, str) and value.isdecimal() and len(value) < 20:
                value = int(value)
            if type(value) in (int, float) and value > 0:
                return value  # type: ignore[no-any-return]
        return None

    def number(self, name: str) -> Any:
        """Return the value of a name, or that of a tensor of one real number; None if there is
        neither."""
        value = self.values.get(name)
        chunks = self.names[name]() if value is None and name in self.names else []
        entry = chunks[0].tensor if len(chunks) == 1 else None
        if not entry or entry.nbytes != ITEM_BYTES[entry.dtype] or entry.dtype in ("C64", "BOOL"):
            return value
        with OpenedFile(chunks[0].path) as file:
            raw = np.frombuffer(file.read_at(entry.nbytes, entry.begin), np.uint8)
        return float(decode_values(raw, entry.dtype)[0])

    def groups(self, *outer: str) -> list[str]:
        """Return the next keys after `outer` that are followed by further keys of tensors."""
        level = len(outer)
        return list(
            dict.fromkeys(
                k[level] for k in self.tensors if k[:level] == outer and len(k) > level + 1
            )
        )

    def parents(self, first: str, *others: str) -> list[str]:
        """Return the prefixes, each with a dot at its end, of the groups that have tensors or
        values of these names."""
        named, known = (
            (*self.tensors, *(tuple(name.split(".")) for name in self.values)),
            {*self.names, *self.values},
        )
        places = (
            (".".join((*keys[:at], "")), ".".join(keys[at:]))
            for keys in named
            for at in range(len(keys))
        )
        found = {outer for outer, name in places if name == first}
        return sorted(outer for outer in found if all(outer + name in known for name in others))

    def under(self, prefix: str) -> dict[str, Find]:
        """Return the tensors whose names begin with a prefix, by the rest of their names."""
        return {
            name.removeprefix(prefix): find
            for name, find in self.names.items()
            if name.startswith(prefix)
        }

    def model_group(self, other_than: str = "", within: Keys = ()) -> dict[str, Find]:
        """Return the tensors under the first of `_MODEL_GROUPS` that is there, and is not another
        prefix; else none."""
        groups = self.groups(*within)
        prefixes = (".".join((*within, name, "")) for name in _MODEL_GROUPS if name in groups)
        return next((self.under(prefix) for prefix in prefixes if prefix != other_than), {})

    def model_tensors(self, prefix: str = "") -> dict[str, Find]:
        """Return the tensors of the model by name; all tensors if none of the model's names has a
        prefix.

        The model is in a group, also within the only other group; else it consists of the tensors
        that are in no group, or it is the only group. Raise FileFormatError if it cannot be
        distinguished from the rest.
        """
        groups = self.groups()
        others = [name for name in groups if not name.startswith(_OTHER_GROUPS)]
        only = tuple(others) if len(others) == 1 else ()
        ignored = tuple(name if name.endswith("_") else f"{name}." for name in _OTHER_GROUPS)
        flat = {
            keys[0]: find
            for keys, find in self.tensors.items()
            if not (keys[1:] or keys[0].startswith(ignored))
        }
        nested = (
            self.model_group(within=only) or flat or (self.under(f"{only[0]}.") if only else {})
        )
        named = self.model_group() or nested
        if prefix and not any(name.startswith(prefix) for name in named):
            named = self.names
        if not named:
            unclear = (
                f"which tensors are the model's is unclear: it has tensors under {names_in(groups)}"
            )
            hint = "import with `prefix`, such as 'model.'" * bool(self.tensors)
            raise FileFormatError(
                self.path, unclear if self.tensors else "holds no tensors with names", hint
            )
        return named


# --- files and folders


def index_checkpoint(path: Path) -> IndexedCheckpoint:
    """Return the index of a checkpoint; raise FileFormatError if it cannot be read."""
    if not path.is_dir():
        found = _of_shards(path) if path.name.endswith(INDEX_ENDING) else _of_file(path)
    elif sets := sets_in(path):
        found = _of_sets(path, sets)
    elif (model := model_in(path)) is None:
        raise FileFormatError(
            path, "holds no weights: no safetensors, .bin or .pt file, and no .metadata"
        )
    elif model == path:
        found = _of_chunks(path)
    else:
        found = _of_distributed(model) if model.name == DCP_METADATA else index_checkpoint(model)
    return replace(found, path=path)


def _names_in(folder: Path) -> list[str]:
    with named_on_error(folder, "read"):
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def sets_in(folder: Path) -> dict[str, Path]:
    """Return the models in a folder of which a name says that it is an average, by their names;
    else none.

    They are files, such as `ema.safetensors` and `model.safetensors`, or folders, such as `ema` and
    `model`.
    """
    entries = [folder / name for name in _names_in(folder) if not SHARD.search(name)]
    folders = {
        entry.name: entry
        for entry in entries
        if entry.is_dir() and holds_model(entry, several=False)
    }
    files = {
        entry.name.split(".")[0]: entry
        for entry in entries
        if entry.name.endswith((*ENDINGS, INDEX_ENDING))
    }
    averages = {key: entry for key, entry in (files | folders).items() if AVERAGE_WORD.search(key)}
    if not averages:
        return {}
    weights = model_in(folder, skip=[entry.name for entry in averages.values()])
    return averages | ({"model": weights} if weights else folders)


def holds_model(folder: Path, several: bool = True) -> bool:
    """Return whether a folder seems to hold a model, or only one, and not the checkpoints of a
    training."""
    try:
        return model_in(folder) is not None or (several and bool(sets_in(folder)))
    except FileFormatError:  # raised again when the folder is opened
        return several


def may_be_weights(name: str) -> bool:
    """Return whether a file has a name as of weights, also of a shard; guided-diffusion's
    `opt000050.pt` has not."""
    return (
        name.endswith(ENDINGS) and not name.startswith(NOT_WEIGHTS) and not re.match(r"opt\d", name)
    )


def model_in(folder: Path, skip: Collection[str] = ()) -> Path | None:
    """Return the path of the weights in a folder: an index, a file, `.metadata`, or the folder
    itself if it has chunks.

    Entries whose names are in `skip` are ignored. Raise FileFormatError if there are several
    models.
    """
    names = [name for name in _names_in(folder) if name not in skip]
    if (folder / DCP_METADATA).is_file():
        return folder / DCP_METADATA
    for ending in (SUFFIX, ""):  # safetensors before pickles
        listed = [name for name in names if name.endswith(f"{ending}{INDEX_ENDING}")]
        found = listed or [name for name in names if may_be_weights(name) and name.endswith(ending)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            if (
                ending
                and not listed
                and all(_CHUNKS in _of_file(folder / name).values for name in found)
            ):
                return folder
            raise FileFormatError(
                folder, f"holds several models: {names_in(found)}", "name one by a glob"
            )
    # accelerate's
    inner = [
        folder / name / DCP_METADATA for name in names if name.startswith("pytorch_model_fsdp")
    ]
    return inner[0] if inner and inner[0].is_file() else None


def _of_file(path: Path) -> IndexedCheckpoint:
    """Return the index of a file that is no snapshot or state; the values include the metadata of
    safetensors."""
    values: dict[str, Any] = {}
    with OpenedFile(path) as file:
        if path.suffix == SUFFIX:
            header = decode_file(file)
            if header.kind == "snapshot":
                raise FileFormatError(path, "is a snapshot of this package, no checkpoint")
            values = dict(header.metadata) | (
                {} if header.kind is None else {"ema.format": header.kind}
            )
            content: dict[Keys, Any] = {(name,): entry for name, entry in header.entries.items()}
        else:
            content = read_tensors(file)
        identity = sampled_identity(file), file.stamp
    tensors: dict[Keys, Find] = {}
    for keys, value in content.items():
        if isinstance(value, Entry):
            tensors[keys] = functools.partial(
                list, [FoundChunk(path, identity, value, Box.full(value.shape))]
            )
        elif isinstance(value, Node):
            kind = shown(value.name.removeprefix("torch._utils._rebuild_"))
            tensors[keys] = functools.partial(
                _checked, path, ".".join(keys), f"is of a kind that is not read ({kind})"
            )
        else:
            values[".".join(keys)] = value
    return IndexedCheckpoint(path, tensors, values)


def _checked(path: Path, name: str, problem: str | None, *chunks: FoundChunk) -> list[FoundChunk]:
    """Return the chunks of a tensor; raise FileFormatError if there is a problem with it."""
    if problem:
        raise FileFormatError(path, f"tensor {shown(name)}: {problem}")
    return [*chunks]


def _of_sets(folder: Path, sets: Mapping[str, Path]) -> IndexedCheckpoint:
    """Return the index of several models in a folder, by their names, with diffusers' settings of
    an average."""
    tensors, values = dict[Keys, Find](), dict[str, Any]()
    for key, place in sets.items():
        tensors |= {
            (key, name): find for name, find in index_checkpoint(place).model_tensors().items()
        }
        if (config := place / CONFIG).is_file():
            settings = parse_object(config, read_small_file(config, _MOST_CONFIG), "configuration")
            values |= {f"{key}.{name}": value for name, value in settings.items()}
    return IndexedCheckpoint(folder, tensors, values)


def _of_shards(index: Path) -> IndexedCheckpoint:
    tensors, values = dict[Keys, Find](), dict[str, Any]()
    for name, listed in decode_index(index, ENDINGS).items():
        shard = _of_file(index.parent / name)
        for tensor in listed:
            _checked(
                shard.path,
                tensor,
                "" if (tensor,) in shard.tensors else "is not in it, as the index says",
            )
            tensors[tensor,] = shard.tensors[tensor,]
        values |= {key: value for key, value in shard.values.items() if key == "ema.format"}
    return IndexedCheckpoint(index.parent, tensors, values)


# --- torch.distributed.checkpoint


def _of_chunks(folder: Path) -> IndexedCheckpoint:
    """Return the index of a folder of chunks that the HuggingFaceStorageWriter wrote."""
    chunks: dict[Keys, list[FoundChunk]] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        file = _of_file(path)
        offsets = parse_object(path, file.values[_CHUNKS], _CHUNKS)
        for keys, find in file.tensors.items():
            (chunk,), entry = find(), offsets.get(keys[0])
            offset: Any = entry.get("saved_offsets") if isinstance(entry, dict) else None
            is_known = is_sizes(offset) and len(offset) == len(chunk.tensor.shape)
            _checked(path, keys[0], "" if is_known else f"{_CHUNKS} must give its offsets")
            chunks.setdefault(keys, []).append(
                chunk._replace(box=Box(tuple(offset), chunk.tensor.shape))
            )
    tensors: dict[Keys, Find] = {}
    for keys, found in chunks.items():
        problem = cover_problem(tensor_shape(found), [chunk.box for chunk in found])
        tensors[keys] = functools.partial(_checked, folder, keys[0], problem, *found)
    return IndexedCheckpoint(folder, tensors)


def _state(value: Any) -> dict[str, Any]:
    """Return the attributes of an object in a pickle; empty if it has none."""
    return value.state if isinstance(value, Node) and isinstance(value.state, dict) else {}


def _of_distributed(metadata: Path) -> IndexedCheckpoint:
    with OpenedFile(metadata) as file:
        state = _state(read_pickled(file, 0, file.size))
    listed, planned, stored = (
        state.get(key) for key in ("state_dict_metadata", "planner_data", "storage_data")
    )
    if not (isinstance(listed, dict) and isinstance(stored, dict)):
        raise FileFormatError(metadata, "is no metadata of torch.distributed.checkpoint")
    places, tensors, values = (
        dict[tuple[str, tuple[int, ...]], dict[str, Any]](),
        dict[Keys, Find](),
        dict[str, Any](),
    )
    for index, place in stored.items():
        fqn, offset = _state(index).get("fqn"), _state(index).get("offset") or ()
        if isinstance(fqn, str) and is_sizes(offset):
            places[fqn, tuple(offset)] = _state(place)
    files = _ChunkFiles(metadata, places)
    for name, described in listed.items():
        if isinstance(name, str) and isinstance(_state(described).get("chunks"), list):
            keys: Any = planned.get(name) if isinstance(planned, dict) else None
            is_path = isinstance(keys, tuple) and all(isinstance(key, str | int) for key in keys)
            find = functools.partial(files.chunks, name, _state(described))
            # each object is read once
            tensors[tuple(map(str, keys)) if is_path else (name,)] = functools.cache(find)
        elif name in _STEP_NAMES:  # the only objects to read that are no tensors
            values[name] = files.read(name, ())[1]
    return IndexedCheckpoint(metadata.parent, tensors, values)


@dataclass
class _ChunkFiles:
    """The objects in the files of a distributed checkpoint. They share no bytes, so that reading
    all takes one pass."""

    metadata: Path
    # of objects in files, by their names and offsets
    places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]
    identities: dict[Path, Identity] = field(default_factory=dict)
    # of the objects that were read, sorted
    spans: dict[Path, list[tuple[int, int]]] = field(default_factory=dict)

    def chunks(self, name: str, described: dict[str, Any]) -> list[FoundChunk]:
        """Return the chunks of a tensor, with their places in the files."""
        size: Any = described.get("size")
        listed: Any = [
            (chunk.get("offsets"), chunk.get("sizes")) for chunk in map(_state, described["chunks"])
        ]
        if not all(
            is_sizes(axes) and len(axes) == len(size)
            for pair in ((size, size), *listed)
            for axes in pair
        ):
            return _checked(self.metadata, name, "its shape, or that of a chunk, is malformed")
        boxes = [Box(tuple(offset), tuple(shape)) for offset, shape in listed]
        problem, chunks = cover_problem(size, boxes), []
        for box in () if problem else boxes:
            path, entry = self.read(name, box.offset)
            if not isinstance(entry, Entry) or entry.shape != box.shape:
                return _checked(path, name, f"holds no tensor of shape {list(box.shape)}")
            chunks.append(FoundChunk(path, self.identities[path], entry, box))
        return _checked(self.metadata, name, problem, *chunks)

    def read(self, name: str, offset: tuple[int, ...]) -> tuple[Path, Any]:
        """Return the file and the object of a name at an offset, or of the name alone."""
        place: Any = self.places.get((name, offset)) or self.places.get((name, ())) or {}
        file_name, begin, length = map(place.get, ("relative_path", "offset", "length"))
        problem = ""
        if not (isinstance(file_name, str) and is_sizes((begin, length))):
            problem = "its place is missing"
        elif Path(file_name).name != file_name or not file_name.isprintable():
            problem = f"{shown(file_name)} is not the name of a file in its folder"
        elif place.get("transform_descriptors"):
            problem = "is compressed or encrypted, which is not read"
        _checked(self.metadata, name, problem)
        path = self.metadata.parent / file_name
        with OpenedFile(path) as file:
            if path not in self.identities:
                self.identities[path] = sampled_identity(file), file.stamp
            spans, end = self.spans.setdefault(path, []), begin + length
            at = bisect(spans, (begin, end))
            shares = any(
                one < end and begin < other for one, other in spans[max(at - 1, 0) : at + 1]
            )
            problem = "shares bytes with another object of the file" * shares
            _checked(
                path,
                name,
                "truncated: it would end beyond the file" if end > file.size else problem,
            )
            spans.insert(at, (begin, end))
            return path, read_pickled(file, begin, end)

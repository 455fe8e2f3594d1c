"""What one checkpoint holds: a file, the shards of a model, or a folder of torch.distributed.checkpoint.

Files are safetensors, or what `torch.save` and `pickle.dump` make. Each is indexed once, and its tensors are then read
from where they are. They have no checksums of blocks: what tells that a file is still the one that was indexed is its
size, the places of its tensors, and a sample of its content.

Tensors are found by the keys that lead to them, since a checkpoint often holds more than the model: the model is chosen
by `model_tensors`. A tensor is one chunk, or several, each a box of it in some file.

A folder of torch.distributed.checkpoint has a pickle `.metadata`, which says where in which file each chunk of a tensor
is, as an archive of its own; or, from its HuggingFaceStorageWriter, safetensors files whose metadata give the offsets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from posthoc_cli.checkpoints.read_pickle import Node, read_pickled
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Box, cover_problem
from posthoc_cli.snapshots.directory import PICKLES
from posthoc_cli.snapshots.format import TensorEntry
from posthoc_cli.snapshots.headers import decode_header, file_kind, is_sizes, parse_object
from posthoc_cli.snapshots.outputs import decode_index
from posthoc_cli.snapshots.reading import sampled_identity
from posthoc_cli.snapshots.tensor_file import OpenedFile, decode_values, named_on_error, read_small_file, read_start

Keys = tuple[str, ...]
"""That lead to a tensor within a file's content."""

ENDINGS = (fmt.SUFFIX, *PICKLES, ".pth.tar")
PARAMETERS = "shadow_params"
"""Under which averages are a list, in the order of the model's parameters."""
_MOST_VALUES = 1_000_000
_DEEPEST = 100
DCP_METADATA = ".metadata"
INDEX_ENDING = ".index.json"
EMA_ENDING = "_ema"
"""What the folder of an average that diffusers wrote ends with; its weights are in the one without it."""
CONFIG = "config.json"
NOT_WEIGHTS = (
    "optimizer", "optim", "scheduler", "lr_scheduler", "rng", "random_state", "scaler", "training_args",
    "training-state",
)  # fmt: skip
"""What the names of files and groups begin with that hold something else than the model."""
MODEL_GROUPS = ("current_model_state", "state_dict", "model_state_dict", "model", "module")
"""Keys of a checkpoint under which the model is: the first one that is there. Lightning keeps its raw weights under the
first where `state_dict` is an average."""
_OTHER_GROUPS = (*NOT_WEIGHTS, "ema_optimizer", "train_state", "dataloader")
_STEP_NAMES = ("global_step", "global_steps", "step", "steps", "iteration", "train_state.step", "meta.iter", "ss_steps")
_MOST_CONFIG = 10_000_000


class FoundChunk(NamedTuple):
    """A box of a tensor, in a file."""

    path: Path
    identity: str
    tensor: TensorEntry
    box: Box


Find = Callable[[], list[FoundChunk]]
"""Finds the chunks of a tensor."""
Tensors = Mapping[str, Find]
"""Tensors by their names."""


@dataclass(frozen=True)
class IndexedCheckpoint:
    """What a checkpoint holds.

    Attributes:
        path: its file or folder.
        tensors: by the keys that lead to each, a function that finds its chunks.
        values: numbers and texts by their keys, joined by dots.
    """

    path: Path
    tensors: Mapping[Keys, Find]
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> float | None:
        """The step that the content tells; None if it does not."""
        for name in _STEP_NAMES:
            value = self.number(*name.split("."))
            if isinstance(value, str):
                value = int(value) if value.isdecimal() and len(value) < 20 else None
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def number(self, *keys: str) -> Any:
        """A value, or that of a tensor of one real number; None if there is neither."""
        value = self.values.get(".".join(keys))
        chunks = self.tensors[keys]() if value is None and keys in self.tensors else []
        found = chunks[0].tensor if len(chunks) == 1 else None
        if not found or found.nbytes != ITEM_BYTES[found.dtype] or found.dtype in ("C64", "BOOL"):
            return value
        with OpenedFile(chunks[0].path) as file:
            return float(
                decode_values(np.frombuffer(file.read_at(found.nbytes, found.begin), np.uint8), found.dtype)[0]
            )

    def groups(self, outer: Keys = ()) -> list[str]:
        """The keys, behind those of `outer`, under which there are tensors by further keys."""
        level = len(outer)
        return list(dict.fromkeys(k[level] for k in self.tensors if k[:level] == outer and len(k) > level + 1))

    def behind(self, *place: str) -> dict[str, Find]:
        """The tensors behind some keys, by their names there."""
        deep = len(place)
        return {".".join(k[deep:]): find for k, find in self.tensors.items() if len(k) > deep and k[:deep] == place}

    def model_tensors(self, prefix: str = "", group: str = "") -> dict[str, Find]:
        """The tensors of the model by name; with a prefix those whose names begin with it, without it.

        They are those of the `group`, if there is one of this name, else of one that is named as models are, also
        within the only group that there is.

        Raises:
            FileFormatError: the model cannot be told from the rest.
        """
        groups = self.groups()
        others = [name for name in groups if not name.startswith(_OTHER_GROUPS)]
        names = (*([group] if group else []), *MODEL_GROUPS)
        known: list[Keys] = [(name,) for name in names if name in groups]
        if not known and len(others) == 1:
            known = [(others[0], name) for name in MODEL_GROUPS if name in self.groups((others[0],))]
        place: Keys = known[0] if known else tuple(others) if len(others) == 1 else ()
        named = self.behind(*place) if place else {}
        if not known:
            beside = tuple(f"{name}." for name in _OTHER_GROUPS)
            single = [keys for keys in self.tensors if len(keys) == 1 and not keys[0].startswith(beside)]
            named = {keys[0]: self.tensors[keys] for keys in single} or named
        if prefix and not any(name.startswith(prefix) for name in named):
            named = {".".join(keys): find for keys, find in self.tensors.items()}
        found = {name.removeprefix(prefix): find for name, find in named.items() if name.startswith(prefix)}
        if found:
            return found
        if not self.tensors:
            raise FileFormatError(self.path, "holds no tensors")
        if prefix:
            there = names_in([".".join(keys) for keys in self.tensors])
            raise FileFormatError(self.path, f"no tensor's name begins with {shown(prefix)}; it has {there}")
        reason = f"the model cannot be told from the rest: it has tensors under {names_in(groups)}"
        raise FileFormatError(self.path, reason, "import with `prefix`, such as 'model.'")


def index_checkpoint(path: Path) -> IndexedCheckpoint:
    """What the checkpoint at a path holds. A FileFormatError names the file and says what is wrong."""
    if not path.is_dir():
        return _of_shards(path) if path.name.endswith(INDEX_ENDING) else _of_file(path)
    model = model_in(path)
    if model is None:
        raise FileFormatError(path, "holds no weights: no safetensors, .bin or .pt file, and no .metadata")
    if model.name == DCP_METADATA:
        return _of_distributed(model)
    if model.name.endswith(EMA_ENDING) and model.is_dir() and model != path:
        return _of_average(path, model)
    return _of_chunks(path) if model == path else index_checkpoint(model)


def model_in(folder: Path) -> Path | None:
    """Where the weights in a folder are: an index, a file, `.metadata`, the folder itself of chunks in safetensors.

    Accelerate puts those of a sharded model in a folder of its own.

    Raises:
        FileFormatError: there are several, or the folder cannot be read.
    """
    with named_on_error(folder, "read"):
        if (folder / DCP_METADATA).is_file():
            return folder / DCP_METADATA
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    indexes = [name for name in names if name.endswith(INDEX_ENDING)]
    weights = [name for name in names if name.endswith(ENDINGS) and not name.startswith(NOT_WEIGHTS)]
    for ending in (fmt.SUFFIX, ""):  # safetensors before pickles
        listed = [name for name in indexes if name.endswith(f"{ending}{INDEX_ENDING}")]
        own = [name for name in weights if name.endswith(ending or ENDINGS)]
        if len(listed) == 1:
            return folder / listed[0]
        if not listed and len(own) == 1:
            return folder / own[0]
        if ending and len(own) > 1 and all("DCP_SHARDING_INFO" in _of_file(folder / name).values for name in own):
            return folder
        if len(listed or own) > 1:
            raise FileFormatError(folder, f"holds several models: {names_in(listed or own)}", "name one by a glob")
    averages = [name for name in names if name.endswith(EMA_ENDING) and (folder / name / CONFIG).is_file()]
    if len(averages) > 1:
        raise FileFormatError(folder, f"holds several averages: {names_in(averages)}", "move all but one elsewhere")
    if averages:
        return folder / averages[0]
    inner = [folder / name for name in names if name.startswith("pytorch_model_fsdp")]
    return inner[0] / DCP_METADATA if inner and (inner[0] / DCP_METADATA).is_file() else None


def _of_average(folder: Path, average: Path) -> IndexedCheckpoint:
    """An average of diffusers as the group "ema", with the weights in the folder beside it as the group "model"."""
    config = average / CONFIG
    settings = parse_object(config, read_small_file(config, _MOST_CONFIG), "configuration")
    tensors: dict[Keys, Find] = {}
    beside = folder / average.name.removesuffix(EMA_ENDING)
    for group, place in (("model", beside), ("ema", average)):
        if place.is_dir():
            tensors |= {(group, *keys): find for keys, find in index_checkpoint(place).tensors.items()}
    return IndexedCheckpoint(folder, tensors, {f"ema.{key}": value for key, value in settings.items()})


def _whole(path: Path, identity: str, tensor: TensorEntry) -> list[FoundChunk]:
    return [FoundChunk(path, identity, tensor, Box.whole(tensor.shape))]


def _of_file(path: Path) -> IndexedCheckpoint:
    """What a file holds that is no snapshot or state; the metadata of safetensors are among the values."""
    values: dict[str, Any] = {}
    with OpenedFile(path) as file:
        if path.suffix == fmt.SUFFIX:
            header = decode_header(path, read_start(file), file.size)
            if file_kind(header) in ("snapshot", "state"):
                raise FileFormatError(path, f"is a {file_kind(header)} of this package, no checkpoint")
            start, values = header.payload_start, dict(header.metadata)
            content: dict[Keys, Any] = {
                (name,): replace(entry, begin=start + entry.begin) for name, entry in header.tensors.items()
            }
        else:
            content = _leaves(path, read_pickled(file, 0, file.size))
        identity = sampled_identity(file)
    tensors: dict[Keys, Find] = {}
    for keys, value in content.items():
        if isinstance(value, TensorEntry):
            tensors[keys] = functools.partial(_whole, path, identity, value)
        elif isinstance(value, Node):
            tensors[keys] = functools.partial(_refuse, path, keys, value)
        else:
            values[".".join(keys)] = value
    return IndexedCheckpoint(path, tensors, values)


def _refuse(path: Path, keys: Keys, node: Node) -> list[FoundChunk]:
    kind = node.name.removeprefix("torch._utils._rebuild_")
    raise FileFormatError(path, f"tensor {shown('.'.join(keys))} is of a kind that is not read ({shown(kind)})")


def _leaves(path: Path, value: Any) -> dict[Keys, Any]:
    """The tensors, numbers and texts within dicts, and those of averages in lists, by the keys that lead to each.

    A tensor of a kind that is not read (sparse, quantized, spread over processes) stays a node. The names of modules
    within a pickled module are one key, joined by dots, as in a state dict.
    """
    found: dict[Keys, Any] = {}
    left: list[tuple[Keys, Any, int, bool]] = [((), value, 0, False)]
    count = 0
    while left:
        keys, one, depth, within = left.pop()
        if isinstance(one, list) and keys[-1:] == (PARAMETERS,):
            one = dict(enumerate(one))
        if not isinstance(one, dict) or (isinstance(one, Node) and one.name.startswith("torch._utils._rebuild")):
            if isinstance(one, Node | TensorEntry | int | float | str):
                found[keys] = one
        elif depth < _DEEPEST:
            module = _module_tensors(one) if isinstance(one, Node) else None
            is_module, held = module is not None, module or one
            count += len(held)
            if count > _MOST_VALUES:
                raise FileFormatError(path, f"cannot be read as tensors: holds more than {_MOST_VALUES:,} values")
            for key in reversed(held):
                if isinstance(key, str | int):
                    name = (*keys[:-1], f"{keys[-1]}.{key}") if is_module and within else (*keys, str(key))
                    left.append((name, held[key], depth + 1, is_module))
    return found


def _module_tensors(node: Node) -> dict[Any, Any] | None:
    """The parameters, buffers and inner modules of a pickled torch module; None of something else.

    Its attributes are its state, or are among what it is made of, also one level further down under `state`.
    """
    for value in (node.state, *node.arguments):
        for state in (value, value.get("state")) if isinstance(value, dict) else ():
            if isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys():
                own = [state[key] for key in ("_parameters", "_buffers", "_modules")]
                held = {key: value for part in own if isinstance(part, dict) for key, value in part.items()}
                unsaved = state.get("_non_persistent_buffers_set")
                names = {key for key in unsaved if isinstance(key, str)} if isinstance(unsaved, list) else set()
                return {key: held[key] for key in held if key not in names}
    return None


def _of_shards(index: Path) -> IndexedCheckpoint:
    """A model in shards, by its index."""
    tensors: dict[Keys, Find] = {}
    values: dict[str, Any] = {}
    for name, listed in decode_index(index, ENDINGS).shards.items():
        shard = _of_file(index.parent / name)
        missing = [tensor for tensor in listed if (tensor,) not in shard.tensors]
        if missing:
            raise FileFormatError(shard.path, f"tensor {shown(missing[0])} is not in it, as the index says")
        tensors |= {(tensor,): shard.tensors[tensor,] for tensor in listed}
        values |= {key: value for key, value in shard.values.items() if key == "ema.format"}
    return IndexedCheckpoint(index.parent, tensors, values)


# --- torch.distributed.checkpoint


def _of_chunks(folder: Path) -> IndexedCheckpoint:
    """Safetensors files of chunks, as the HuggingFaceStorageWriter makes them."""
    held: dict[str, list[FoundChunk]] = {}
    for path in sorted(folder.glob(f"*{fmt.SUFFIX}")):
        file = _of_file(path)
        offsets = parse_object(path, file.values["DCP_SHARDING_INFO"], "DCP_SHARDING_INFO")
        for (name,), find in file.tensors.items():
            (chunk,), entry = find(), offsets.get(name)
            offset: Any = entry.get("saved_offsets") if isinstance(entry, dict) else None
            if not is_sizes(offset) or len(offset) != len(chunk.tensor.shape):
                raise FileFormatError(path, f"tensor {shown(name)}: DCP_SHARDING_INFO must give its offsets")
            held.setdefault(name, []).append(chunk._replace(box=Box(tuple(offset), chunk.tensor.shape)))
    for name, chunks in held.items():
        if problem := cover_problem(tensor_shape(chunks), [chunk.box for chunk in chunks]):
            raise FileFormatError(folder, f"tensor {shown(name)}: {problem}")
    return IndexedCheckpoint(folder, {(name,): functools.partial(list, chunks) for name, chunks in held.items()})


def tensor_shape(chunks: Sequence[FoundChunk]) -> tuple[int, ...]:
    """The shape of the tensor that all its chunks make."""
    if len(chunks) == 1:
        return chunks[0].box.end
    return tuple(map(max, zip(*(chunk.box.end for chunk in chunks), strict=True))) if chunks[0].box.shape else ()


def _of_distributed(metadata: Path) -> IndexedCheckpoint:
    with OpenedFile(metadata) as file:
        state = _state(read_pickled(file, 0, file.size))
    listed, planned, stored = (state.get(key) for key in ("state_dict_metadata", "planner_data", "storage_data"))
    if not (isinstance(listed, dict) and isinstance(stored, dict)):
        raise FileFormatError(metadata, "is no metadata of torch.distributed.checkpoint")
    files = _ChunkFiles(metadata, stored)
    tensors: dict[Keys, Find] = {}
    values: dict[str, Any] = {}
    for name, described in listed.items():
        if not (isinstance(name, str) and isinstance(_state(described).get("chunks"), list)):
            if name in _STEP_NAMES:
                values[name] = files.read(name, ())[1]
            continue  # an object that is no tensor
        keys: Any = planned.get(name) if isinstance(planned, dict) else None
        is_path = isinstance(keys, tuple) and all(isinstance(key, str | int) for key in keys)
        tensors[tuple(map(str, keys)) if is_path else (name,)] = functools.partial(files.chunks, name, described)
    return IndexedCheckpoint(metadata.parent, tensors, values)


def _state(value: Any) -> dict[str, Any]:
    """The attributes of an object in a pickle; empty where it has none."""
    return value.state if isinstance(value, Node) and isinstance(value.state, dict) else {}


class _ChunkFiles:
    """The files of a distributed checkpoint: what its metadata say of each place, and each file's identity."""

    def __init__(self, metadata: Path, stored: dict[Any, Any]) -> None:
        self._metadata = metadata
        self._identities: dict[Path, str] = {}
        self._places: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
        for index, place in stored.items():
            key: dict[str, Any] = _state(index)
            offset: Any = key.get("offset") or ()
            if isinstance(key.get("fqn"), str) and is_sizes(offset):
                self._places[key["fqn"], tuple(offset)] = _state(place)

    def chunks(self, name: str, described: Any) -> list[FoundChunk]:
        """The chunks of a tensor, where their files have them."""
        size: Any = _state(described).get("size")
        listed: Any = [(chunk.get("offsets"), chunk.get("sizes")) for chunk in map(_state, described.state["chunks"])]
        if not all(is_sizes(one) and len(one) == len(size) for pair in ((size, size), *listed) for one in pair):
            reason = f"tensor {shown(name)}: its shape, or that of a chunk, is malformed"
            raise FileFormatError(self._metadata, reason)
        boxes = [Box(tuple(offset), tuple(shape)) for offset, shape in listed]
        if problem := cover_problem(tuple(size), boxes):
            raise FileFormatError(self._metadata, f"tensor {shown(name)}: {problem}")
        made = []
        for box in boxes:
            path, found = self.read(name, box.offset)
            if not isinstance(found, TensorEntry) or found.shape != box.shape:
                raise FileFormatError(path, f"{shown(name)}: holds no tensor of shape {list(box.shape)}")
            made.append(FoundChunk(path, self._identities[path], found, box))
        return made

    def read(self, name: str, offset: tuple[int, ...]) -> tuple[Path, Any]:
        """The file and the object of a name at an offset, or of the name alone."""
        place = self._places.get((name, offset)) or self._places.get((name, ())) or {}
        file_name: Any = place.get("relative_path")
        begin: Any = place.get("offset")
        length: Any = place.get("length")
        wrong = ""
        if not (isinstance(file_name, str) and is_sizes((begin, length))):
            wrong = "its place is missing"
        elif Path(file_name).name != file_name or not file_name.isprintable():
            wrong = f"{shown(file_name)} is not the name of a file beside it"
        elif place.get("transform_descriptors"):
            wrong = "is compressed or encrypted, which is not read"
        if wrong:
            raise FileFormatError(self._metadata, f"{shown(name)}: {wrong}")
        path = self._metadata.parent / file_name
        with OpenedFile(path) as file:
            if path not in self._identities:
                self._identities[path] = sampled_identity(file)
            if begin + length > file.size:
                raise FileFormatError(path, f"truncated: {shown(name)} would end beyond it")
            return path, read_pickled(file, begin, begin + length)


def names_in(names: Sequence[str]) -> str:
    """A few names for a message."""
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""The content of one checkpoint: its tensors, and the numbers and texts beside them.

A checkpoint is a file, the shards of a model, or a folder: of torch.distributed.checkpoint, or of
several models. Files are safetensors, or written by `torch.save` or `pickle.dump`. Each is opened
once for its content; its tensors are then read in place. It has no checksums: a file is recognised
by its size, the places of its tensors, and a sample of it.

A tensor consists of one chunk or several, each a box of the tensor in a file. A folder of
torch.distributed.checkpoint has a pickle `.metadata`, which names the file and range of each chunk,
where the chunk is an archive itself; or, from its HuggingFaceStorageWriter, safetensors files with
offsets in their metadata.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from posthoc_cli.checkpoints.pickles import Keys, Node, read_pickled, read_tensors
from posthoc_cli.checkpoints.programs import AVERAGE_STATES, COUNTERS, MODEL_FILES
from posthoc_cli.errors import FileFormatError, UnsuitableError, first_of, shown
from posthoc_cli.snapshots.directory import PICKLES
from posthoc_cli.snapshots.outputs import decode_index
from posthoc_cli.snapshots.tensorfile import (
    SUFFIX,
    Box,
    Entry,
    Handle,
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

T = TypeVar("T")

ENDINGS = (SUFFIX, ".pth.tar", *PICKLES)
DCP_METADATA = ".metadata"
CONFIG = "config.json"
TRAINER_STATE = "trainer_state.json"
INDEX_ENDING = ".index.json"
KIND = "ema.format"  # name of a value: what this package wrote a file as
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
AVERAGE_WORD = re.compile(
    r"(?<![a-z])(?<!non[_-])(?<!without[_-])(?<!(?<![a-z])[nw]o[_-])"
    r"(?:emas?\d*|averaged?|avg|shadow|polyak|swa|teacher|target|"
    r"momentum(?!_classifier)|encoder_k)(?![a-z]|_backup)"
    r"|(?-i:(?<=[a-z])(?:EMA|Ema|Teacher|Target|Momentum)(?![a-z]))",
    re.IGNORECASE,
)
"""Pattern of a key, prefix or name that says that its tensors are an average, also `modelTeacher`;
solo-learn trains its `momentum_classifier` like any other layer. `non_ema`, `model_without_ema` and
`ema_backup` are the weights."""
NO_MODEL = re.compile(
    r"(?<![a-z])(?:opt|optims?|optimizers?|optimization|(?:lr_?)?schedulers?|rng|random_states?|"
    r"(?:grad_)?scaler|(?:train|training)[_-](?:args|state)|dataloaders?)(?![a-z])|"
    r"^chained_|^opt\d|^trainer\.|^data\.pt|^extra_state_world_size_",
    re.IGNORECASE,
)
"""Pattern of names of files and groups that hold no model: the state of a training."""
_KEPT_KEY = re.compile(
    rb'(?:X.\0\0\0|\x8c.|")(?:[\w.]*[^a-z])?(?:emas?\d*|shadow|swa)(?![a-ps-z])', re.I | re.S
)
"""The key, in a pickle (where `q` or `r` follows) or in JSON, of an average among the state of an
optimizer, whose own are called `exp_avg` and `momentum`."""
_KEYS = 4 << 20  # bytes at the beginning of a file: the pickle of 30,000 tensors
FOREIGN = re.compile(r"\.(?:gguf|onnx|np[yz]|msgpack|h5|hdf5|keras|tflite|nemo|index|gz|zip)$")
"""Pattern of names of other programs' files of weights, and of archives."""
READ = "save the tensors as .safetensors, or by torch.save; unpack archives"
_CHUNKS = "DCP_SHARDING_INFO"  # key for the places of chunks in the metadata of a safetensors file
_INFO = "training_info"  # key of the metadata of ai-toolkit
_USUAL = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model")
"""Names of weights in folders of Hugging Face's libraries."""
_PARTITION = re.compile(
    r"^zero_pp_rank_|^layer_\d+(?:-model|_expert)_|_pp-rank-.*_tp-rank-|_world_size_(?!1_)\d+_rank_"
    r"|^consolidated\.\d*[1-9]\."
)
"""In names of the partitions of ZeRO-3, of DeepSpeed's pipelines and experts, of nanotron, of verl,
and of Llama."""
_COUNT = re.compile(rb"^(epoch|optimizer_step): (\d{1,18})$", re.MULTILINE)
_MOST_CONFIG = 10_000_000
_MOST_STATE = 1_000_000_000


# --- tensors


@dataclass(frozen=True)
class Identity:
    """What a file is recognised by."""

    stamp: tuple[int, int | str]  # its size, and what changes when it is written to
    sample: str  # `sampled_identity`
    handle: Handle = field(default_factory=Handle, compare=False)  # for all tensors in it

    @classmethod
    def of(cls, file: OpenedFile) -> Identity:
        return cls(file.stamp, sampled_identity(file))

    @property
    def nbytes(self) -> int:
        return self.stamp[0]


@dataclass(frozen=True)
class Chunk:
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
    parts: tuple[Chunk, ...] = ()
    problem: str = ""  # why it cannot be read
    find_parts: Callable[[], tuple[Chunk, ...]] | None = None  # if they are not known yet

    @property
    def name(self) -> str:
        return ".".join(self.keys)

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        if self.problem:
            raise FileFormatError(self.path, f"tensor {shown(self.name)}: {self.problem}")
        if self.find_parts is None:
            return self.parts
        return self.find_parts()

    @property
    def place(self) -> tuple[Path, Entry] | None:
        """The place of the tensor if it is in one piece: tied tensors have the same."""
        first, *more = self.chunks
        if more or not first.entry.nbytes:
            return None
        return first.path, first.entry


Tensors = Mapping[str, StoredTensor]
Values = dict[str, Any]
"""Numbers and texts, by their keys."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds; see `open_checkpoint`."""

    path: Path  # the file or folder
    tensors: Tensors  # by their keys, joined by dots
    values: Values = field(default_factory=dict)  # numbers and texts, by their keys
    files: dict[Path, Identity] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(identity.nbytes for identity in self.files.values())

    def under(self, prefix: str) -> dict[str, StoredTensor]:
        """Return the tensors below a prefix, by the rest of their names; all without a prefix."""
        return stripped(self.tensors, f"{prefix}." if prefix else "")

    @cached_property
    def optimizers(self) -> frozenset[str]:
        """The keys of the states of optimizers, which have `param_groups` beside them, whatever
        they are called."""
        keys = set()
        for name in self.values:
            outer, is_group, _ = f".{name}".partition(".param_groups.0.")
            if is_group:
                keys.add(f"{outer}.state".removeprefix("."))
        return frozenset(keys)

    def is_of_optimizer(self, tensor: StoredTensor) -> bool:
        return any(tensor.name.startswith(f"{path}.") for path in self.optimizers)

    def groups(self, *outer: str) -> list[str]:
        """Return the next keys after `outer` that are followed by further keys of tensors."""
        level = len(outer)
        groups = dict[str, None]()
        for tensor in self.tensors.values():
            is_deeper = len(tensor.keys) > level + 1
            if is_deeper and tensor.keys[:level] == outer:
                groups[tensor.keys[level]] = None
        return list(groups)


def stripped(
    named: Mapping[str, T],
    start: str,
) -> dict[str, T]:
    """Return the items whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(start): item for name, item in named.items() if name.startswith(start)
    }


def names_in(names: Sequence[str], most: int = 5) -> str:
    """Return a few names, for a message."""
    return first_of(map(shown, names), most)


# --- files and folders


def open_checkpoint(path: Path) -> Content:
    """Return the content of a checkpoint; raise FileFormatError if it cannot be read.

    Values of a folder include the state of a Trainer and the configurations of its models.
    """
    if path.is_dir():
        content = _of_folder(path)
    elif path.name.endswith(INDEX_ENDING):
        content = _of_shards(path)
    elif FOREIGN.search(path.name):
        raise UnsuitableError(path, "is of a kind that is not read", READ)
    else:
        content = _of_file(path)
    return replace(content, path=path)


def _of_folder(folder: Path) -> Content:
    if sets := sets_in(folder):
        content = _of_sets(folder, sets)
    else:
        model = model_in(folder)
        places = [] if model else places_below(folder)
        if len(places) == 1:
            return open_checkpoint(places[0])
        if model is None:
            reason = "holds no weights: no safetensors, .bin or .pt file, and no .metadata"
            raise UnsuitableError(folder, reason)
        if model == folder:
            content = _of_chunks(folder)
        elif model.name == DCP_METADATA:
            content = _of_distributed(model)
        else:
            content = open_checkpoint(model)
    return replace(content, values={**content.values, **_counts_in(folder)})


def _counts_in(folder: Path) -> Values:
    """Return the step and the epoch in files beside a model: the state of a Trainer, and the texts
    of SpeechBrain."""
    values = Values()
    state = folder / TRAINER_STATE
    if state.is_file():
        text = read_small_file(state, _MOST_STATE)
        of_trainer = parse_object(state, text, "state of a Trainer", most=_MOST_STATE)
        for name in ("global_step", "epoch"):
            if type(of_trainer.get(name)) is int:
                values[name] = of_trainer[name]
    for file in (folder / "CKPT.yaml", folder / "brain.ckpt"):
        if file.is_file():
            lines = _COUNT.findall(read_small_file(file, _MOST_CONFIG))
            values.update({name.decode(): int(number) for name, number in lines})
    return values


def _names_in(folder: Path) -> list[str]:
    with named_on_error(folder, "read"):
        names = [entry.name for entry in folder.iterdir()]
    return sorted(name for name in names if not name.startswith("."))


def may_be_weights(name: str) -> bool:
    """Return whether a file has a name as of weights, also of a shard."""
    return name.endswith(ENDINGS) and not _is_state(name)


def _is_state(name: str) -> bool:
    return NO_MODEL.search(name) is not None and name not in MODEL_FILES


def holds_average(path: Path) -> bool:
    """Return whether a file of the state of a training, though not of one process, seems to hold an
    average, by the keys at its beginning: to read all takes seconds."""
    name = path.name
    if not (name.endswith(ENDINGS) and _is_state(name)) or "rank" in name:
        return False
    with suppress(FileFormatError):
        with OpenedFile(path) as file:
            begin = file.read_at(min(file.size, _KEYS), 0)
        return _KEPT_KEY.search(begin) is not None
    return False


def stem_of(name: str) -> str:
    """Return the name of a file without its ending, but for one that says that it is an average."""
    for ending in (INDEX_ENDING, *ENDINGS):
        if ending != ".ema":
            name = name.removesuffix(ending)
    return name


def glob_of(name: str) -> str:
    """Return a glob of the names that differ from this one in their numbers."""
    return re.sub("[0-9]+", "*", name)


def holds_model(folder: Path) -> bool:
    """Return whether a folder seems to hold a model, and not the checkpoints of a training."""
    try:
        return model_in(folder) is not None or bool(sets_in(folder))
    except FileFormatError:  # raised again when the folder is opened
        return True


def sets_in(folder: Path) -> dict[str, Path]:
    """Return the models in a folder that also holds an average, by their names; else none.

    They are files, such as `ema.safetensors` and `model.safetensors`, or folders, such as `ema` and
    `model`. accelerate stores an average among the states that were registered with it.
    """
    entries = [folder / name for name in _names_in(folder)]
    averages = _averages_among(entries)
    if not averages:
        for entry in filter(holds_average, entries):
            stem = re.sub("^train(ing)?[_-]", "", stem_of(entry.name))  # a state's is not a set
            averages[stem] = entry
    if not averages:
        return {}
    skip = [entry.name for entry in averages.values()]
    weights = model_in(folder, skip)
    if weights is not None:
        return averages | {"model": weights}
    return averages | {entry.name: entry for entry in entries if _is_model(entry)}


def _averages_among(entries: Sequence[Path]) -> dict[str, Path]:
    """Return the files, then the folders that a word in their names calls averages."""
    in_files = {}
    in_folders = {}
    for entry in entries:
        name = entry.name
        if entry.is_dir():
            if AVERAGE_WORD.search(name) and _is_model(entry):
                in_folders[name] = entry
        elif name.endswith((*ENDINGS, INDEX_ENDING)) and not SHARD.search(name):
            stem = re.sub(r"\.(?!\d)", "_", stem_of(name))  # not within `ema_0.999`
            if AVERAGE_WORD.search(stem) or AVERAGE_STATES.fullmatch(name):
                in_files[stem] = entry
    return in_files | in_folders


def _is_model(folder: Path) -> bool:
    with suppress(FileFormatError):
        return folder.is_dir() and model_in(folder) is not None
    return False


def model_in(
    folder: Path,
    skip: Sequence[str] = (),
) -> Path | None:
    """Return the path of the weights in a folder: an index, a file, `.metadata`, or the folder
    itself if it has chunks.

    Entries whose names are in `skip` are ignored. Raise FileFormatError if there are several
    models.
    """
    if (folder / DCP_METADATA).is_file():
        return folder / DCP_METADATA
    names = [name for name in _names_in(folder) if name not in skip]
    for ending in (SUFFIX, ""):  # safetensors before pickles
        models = _models_among(names, ending)
        if any(map(_PARTITION.search, models)):
            reason = "holds partitions of the model"
            hint = "convert it by the program's own script, such as DeepSpeed's zero_to_fp32.py"
            raise UnsuitableError(folder, reason, hint)
        if len(models) == 1:
            return folder / models[0]
        if models and ending and _are_chunks(folder, models):
            return folder
        with_tensors = [name for name in models if has_tensors(folder / name)]
        if len(with_tensors) == 1:
            return folder / with_tensors[0]
        if with_tensors:
            raise _several_models(folder, with_tensors)
    for name in names:
        metadata = folder / name / DCP_METADATA
        if name.startswith("pytorch_model_fsdp") and metadata.is_file():
            return metadata  # accelerate's
    return None


def _several_models(folder: Path, names: Sequence[str]) -> UnsuitableError:
    hint = f"name one by a glob such as */{names[0]}"
    series = [*dict.fromkeys(glob_of(name) for name in names)]
    if len(series) < len(names):  # the files of a training
        names = series
        hint = f"name this folder, or a glob such as */{series[0]}"
    return UnsuitableError(folder, f"holds several models: {names_in(names)}", hint)


def places_below(folder: Path, levels: int = 3) -> list[Path]:
    """Return the folders that hold a model, up to so many levels below a folder."""
    places = []
    for name in _names_in(folder):
        path = folder / name
        is_state = NO_MODEL.search(name) and "model" not in name
        if is_state or not path.is_dir():
            continue
        if holds_model(path):
            places.append(path)
        elif levels > 1:
            places += places_below(path, levels - 1)
    if len(places) > 1:
        return [path for path in places if has_tensors(path)]
    return places


def has_tensors(path: Path) -> bool:
    """Return whether a file or folder holds tensors; also if it cannot be read, which is said when
    it is opened."""
    try:
        content = open_checkpoint(path)
    except FileFormatError:
        return True
    return not all(map(content.is_of_optimizer, content.tensors.values()))


def _models_among(
    names: Sequence[str],
    ending: str,
) -> list[str]:
    """Return the names of indexes, else of files of weights, with an ending; the usual one of them
    if there are variants beside it, such as model.fp16."""
    models = [name for name in names if name.endswith(f"{ending}{INDEX_ENDING}")]
    if not models:
        for name in names:
            is_file = may_be_weights(name) and name.endswith(ending)
            if is_file and not AVERAGE_STATES.fullmatch(name):
                models.append(name)
    usual = []
    for name in models:
        stem, *endings = name.split(".")
        if stem in _USUAL and len(endings) == 1:
            usual.append(name)
    return usual if len(usual) == 1 else models


def _are_chunks(folder: Path, names: Sequence[str]) -> bool:
    return all(_CHUNKS in _of_file(folder / name).values for name in names)


def _of_file(path: Path) -> Content:
    """Return the content of a file that is not a snapshot; the values include the metadata of
    safetensors."""
    values = Values()
    tensors = {}
    with OpenedFile(path) as file:
        leaves: dict[Keys, Any]
        if path.suffix == SUFFIX:
            header = decode_file(file)
            if header.kind == "snapshot":
                raise UnsuitableError(
                    path, "is a snapshot of this package, not a checkpoint", "name its directory"
                )
            values.update(header.metadata)
            values.update(_training_info(path, header.metadata))
            if header.kind is not None:
                values[KIND] = header.kind
            leaves = {(name,): entry for name, entry in header.entries.items()}
        else:
            leaves = read_tensors(file)
        for keys, value in leaves.items():
            name = ".".join(keys)
            if not isinstance(value, Entry | Node):
                values[name] = value
                continue
            tensors[name] = _stored(path, keys, value)
            is_counter = _last_part(name) in COUNTERS
            if is_counter and isinstance(value, Entry) and value.size == 1:
                values[name] = _number(file, value)
        identity = Identity.of(file)
    return Content(path, tensors, values, {path: identity})


def _training_info(path: Path, metadata: Mapping[str, str]) -> Values:
    """Return the values of the object that ai-toolkit writes into the metadata, as text."""
    info = Values()
    with suppress(FileFormatError):  # another program's text
        info = parse_object(path, metadata.get(_INFO, "{}"), _INFO)
    return {f"{_INFO}.{name}": value for name, value in info.items()}


def _stored(
    path: Path,
    keys: Keys,
    value: Entry | Node,
) -> StoredTensor:
    if isinstance(value, Node):
        kind = shown(value.name.removeprefix("torch._utils._rebuild_"))
        return StoredTensor(path, keys, (), problem=f"is of a kind that is not read ({kind})")
    chunk = Chunk(path, value, Box.full(value.shape))
    return StoredTensor(path, keys, value.shape, (chunk,))


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _identity(path: Path) -> Identity:
    with OpenedFile(path) as file:
        return Identity.of(file)


def _number(file: OpenedFile, entry: Entry) -> float:
    """Return the value of a tensor of one element."""
    content = file.read_at(entry.nbytes, entry.begin)
    raw = np.frombuffer(content, np.uint8)
    return float(decode_values(raw, entry.dtype)[0])


def _of_sets(folder: Path, sets: Mapping[str, Path]) -> Content:
    """Return the content of several models in a folder, by their names, with the configurations of
    those in folders."""
    tensors = {}
    values = {}
    opened = {}
    for key, path in sets.items():
        content = open_checkpoint(path)
        opened.update(content.files)
        for tensor in content.tensors.values():
            moved = replace(tensor, keys=(key, *tensor.keys))
            tensors[moved.name] = moved
        settings = {}
        config = path / CONFIG
        if path.is_dir() and config.is_file():
            text = read_small_file(config, _MOST_CONFIG)
            settings = parse_object(config, text, "configuration")
            opened[config] = _identity(config)
        for name, value in {**content.values, **settings}.items():
            values[f"{key}.{name}"] = value
    return Content(folder, tensors, values, opened)


def _of_shards(index: Path) -> Content:
    tensors = {}
    values = {}
    opened = {index: _identity(index)}
    for name, listed in decode_index(index, ENDINGS).items():
        shard = _of_file(index.parent / name)
        opened.update(shard.files)
        for tensor in listed:
            if tensor not in shard.tensors:
                reason = f"tensor {shown(tensor)}: is not in it, as the index says"
                raise FileFormatError(shard.path, reason)
            tensors[tensor] = shard.tensors[tensor]
        if KIND in shard.values:
            values[KIND] = shard.values[KIND]
    return Content(index.parent, tensors, values, opened)


# --- torch.distributed.checkpoint

_Index = tuple[str, tuple[int, ...]]  # the name of an object, and its offset


def _of_chunks(folder: Path) -> Content:
    """Return the content of a folder of chunks that the HuggingFaceStorageWriter wrote."""
    chunks = dict[str, list[Chunk]]()
    opened = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        file = _of_file(path)
        opened.update(file.files)
        offsets = parse_object(path, file.values[_CHUNKS], _CHUNKS)
        for name, tensor in file.tensors.items():
            (chunk,) = tensor.chunks
            box = _saved_box(tensor, offsets.get(name))
            chunks.setdefault(name, []).append(replace(chunk, box=box))
    tensors = {}
    for name, found in chunks.items():
        boxes = [chunk.box for chunk in found]
        ends = [box.end for box in boxes]
        shape = tuple(map(max, zip(*ends, strict=True)))
        problem = cover_problem(shape, boxes) or ""
        tensors[name] = StoredTensor(folder, (name,), shape, tuple(found), problem)
    return Content(folder, tensors, {}, opened)


def _saved_box(tensor: StoredTensor, metadata: Any) -> Box:
    offset: Any = None
    if isinstance(metadata, dict):
        offset = metadata.get("saved_offsets")
    if not (is_sizes(offset) and len(offset) == len(tensor.shape)):
        reason = f"tensor {shown(tensor.name)}: {_CHUNKS} must give its offsets"
        raise FileFormatError(tensor.path, reason)
    return Box(tuple(offset), tensor.shape)


def _state(value: Any) -> Values:
    """Return the attributes of an object in a pickle; empty if it has none."""
    if isinstance(value, Node) and isinstance(value.state, dict):
        return value.state
    return {}


def _of_distributed(metadata: Path) -> Content:
    with OpenedFile(metadata) as file:
        state = _state(read_pickled(file, 0, file.size))
        identity = Identity.of(file)
    listed = state.get("state_dict_metadata")
    stored = state.get("storage_data")
    if not (isinstance(listed, dict) and isinstance(stored, dict)):
        raise FileFormatError(metadata, "is not the metadata of torch.distributed.checkpoint")
    objects = _Objects(metadata, _places_in(stored), {metadata: identity})
    tensors = {}
    values = {}
    for name, described in listed.items():
        if not isinstance(name, str):
            continue
        if isinstance(_state(described).get("chunks"), list):
            keys = _keys_of(name, state.get("planner_data"))
            tensor = objects.described(name, keys, _state(described))
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


def _keys_of(name: str, planned: Any) -> Keys:
    """Return the keys that lead to a tensor, as the plan of a distributed checkpoint says."""
    keys = None
    if isinstance(planned, dict):
        keys = planned.get(name)
    if isinstance(keys, tuple) and all(isinstance(key, str | int) for key in keys):
        return tuple(map(str, keys))
    return (name,)


@dataclass
class _Objects:
    """The objects in the files of a distributed checkpoint. They have no more bytes than their
    files, so that reading all takes one pass."""

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

    def described(
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
                problem = "its shape, or that of a chunk, is malformed"
                break
            boxes.append(Box(tuple(offset), tuple(shape)))
        problem = problem or cover_problem(size, boxes) or ""
        chunks = partial(self.chunks, name, boxes)
        return StoredTensor(self.metadata, keys, tuple(size), (), problem, chunks)

    def chunks(
        self,
        name: str,
        boxes: Sequence[Box],
    ) -> tuple[Chunk, ...]:
        chunks = []
        for box in boxes:
            path, entry = self.read(name, box.offset)
            if not isinstance(entry, Entry) or entry.shape != box.shape:
                self._refuse(path, name, f"holds no tensor of shape {list(box.shape)}")
            chunks.append(Chunk(path, entry, box))
        return tuple(chunks)

    def read(
        self,
        name: str,
        offset: tuple[int, ...],
    ) -> tuple[Path, Any]:
        """Return the file and the object of a name at an offset, or of the name alone."""
        place: Any = self.places.get((name, offset)) or self.places.get((name, ()), {})
        file_name, begin, length = map(place.get, ("relative_path", "offset", "length"))
        if not isinstance(file_name, str) or not is_sizes((begin, length)):
            self._refuse(self.metadata, name, "its place is missing")
        if Path(file_name).name != file_name or not file_name.isprintable():
            problem = f"{shown(file_name)} is not the name of a file in its folder"
            self._refuse(self.metadata, name, problem)
        if place.get("transform_descriptors"):
            self._refuse(self.metadata, name, "is compressed or encrypted, which is not read")
        path = self.metadata.parent / file_name
        with OpenedFile(path) as file:
            if path not in self.files:
                self.files[path] = Identity.of(file)
            if begin + length > file.size:
                self._refuse(path, name, "truncated: it would end beyond the file")
            if self.nbytes[file_name] > file.size:
                raise FileFormatError(path, "is shorter than its objects: truncated or overlapping")
            return path, read_pickled(file, begin, begin + length)

    def _refuse(
        self,
        path: Path,
        name: str,
        problem: str,
    ) -> NoReturn:
        raise FileFormatError(path, f"tensor {shown(name)}: {problem}")

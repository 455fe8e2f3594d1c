"""What a folder is: one file of weights, the shards of a model, a checkpoint of
torch.distributed.checkpoint, or several of these as the members of one checkpoint.

It is decided once, from one listing, and is a value, a `Layout`. A folder with the files of a
training, one for each step, has no layout: its entries are checkpoints.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.checkpoints.containers import ENDINGS, INDEX_ENDING, strip_ending
from posthoc_cli.errors import UnsuitableError
from posthoc_cli.snapshots.tensorfile import named_on_error

DCP_METADATA = ".metadata"
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
    r"(?:grad_)?scaler|(?:train|training)[_-]args|dataloaders?)(?![a-z])|^chained_|^opt\d",
    re.IGNORECASE,
)
"""Pattern of names of files and groups that hold no model: the state of a training."""
_STATE_FOLDER = re.compile(r"[-_]states?$|^states?$")
_PARTITION = re.compile(
    r"^zero_pp_rank_|^layer_\d+(?:-model|_expert)_|^mp_rank_\d*[1-9]|_pp-rank-.*_tp-rank-"
    r"|_world_size_(?!1_)\d+_rank_|^consolidated\.\d*[1-9]\."
)
"""In names of the partitions of ZeRO-3, of DeepSpeed's pipelines and experts, of Megatron, of
nanotron, of verl, and of Llama."""
_USUAL = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model")
"""Names of weights in folders of Hugging Face's libraries, the likeliest first."""
_FRACTION = re.compile(r"(?<![0-9])0\.[0-9]+")  # a decay or a loss in a name
_TIME = re.compile(
    r"(?:step|iter|epoch)[a-z]*[=_.-]*([0-9]+)|^(?:checkpoint|ckpt)[=_.-]*([0-9]+)|^([0-9]+)$", re.I
)
_DEEP = 5  # levels below a folder whose name is a time: fairseq2 has a file four folders down


@dataclass(frozen=True)
class OneFile:
    """A file of tensors; it may be the only file below a folder."""

    path: Path


@dataclass(frozen=True)
class Shards:
    """A model in several files, and the index that names them."""

    path: Path  # of the index


@dataclass(frozen=True)
class Distributed:
    """A checkpoint of torch.distributed.checkpoint."""

    path: Path  # of `.metadata`


@dataclass(frozen=True)
class Sets:
    """Several models in a folder, by their names, which are the first keys of their tensors."""

    path: Path  # the folder
    members: Mapping[str, Layout]


Layout = OneFile | Shards | Distributed | Sets


def _is_state(name: str) -> bool:
    return NO_MODEL.search(name) is not None and "model" not in name


def make_glob(name: str) -> str:
    """Make a glob of the names that differ from a name in their numbers alone, but not in
    fractions, which are decays or widths."""
    begin = 0
    glob = ""
    for fraction in _FRACTION.finditer(name):
        glob += re.sub("[0-9]+", "*", name[begin : fraction.start()]) + fraction[0]
        begin = fraction.end()
    return glob + re.sub("[0-9]+", "*", name[begin:])


def layout_at(path: Path) -> Layout | None:
    """Find what a file or folder is; None for a folder that is not one checkpoint."""
    if not path.is_dir():
        return Shards(path) if path.name.endswith(INDEX_ENDING) else OneFile(path)
    return find_layout(path, list_members(path))


def final_model_at(folder: Path) -> Layout | None:
    """Find the model in a folder beside the checkpoints of its training; None if there is none."""
    members = list_members(folder)
    for stem in _USUAL:
        for entry, layout in members.items():
            if strip_ending(entry.name) == stem:
                return layout
    return None


def list_members(folder: Path) -> dict[Path, Layout]:
    """List the entries of a folder that each hold a model, perhaps deeper below a name with a
    number. Listing a whole disk would take minutes."""
    if _TIME.search(folder.name):
        return _members_below(folder, _DEEP, is_numbered=True)
    return _members_below(folder, 2, is_numbered=False)


def _members_below(folder: Path, levels: int, is_numbered: bool) -> dict[Path, Layout]:
    with named_on_error(folder, "read"):
        entries = sorted(files.system.list(folder))
    by_name = {entry.name: entry for entry in entries}
    if DCP_METADATA in by_name:
        return {folder: Distributed(by_name[DCP_METADATA])}
    members: dict[Path, Layout] = {}
    for name, entry in by_name.items():
        if name.startswith(".") or _is_state(name):
            continue
        if entry.is_dir():
            inner = _layout_below(entry, levels - 1, is_numbered)
            if inner is not None:
                members[entry] = inner
        elif name.endswith(INDEX_ENDING):
            members[entry] = Shards(entry)
        elif name.endswith(ENDINGS) and not SHARD.search(name):
            members[entry] = OneFile(entry)
    return members


def _layout_below(folder: Path, levels: int, is_numbered: bool) -> Layout | None:
    if not is_numbered and re.search("[0-9]", folder.name):
        levels = _DEEP
        is_numbered = True
    if levels < 1 or _STATE_FOLDER.search(folder.name):
        return None
    return find_layout(folder, _members_below(folder, levels, is_numbered))


def find_layout(folder: Path, members: Mapping[Path, Layout]) -> Layout | None:
    """Find what a folder with such members is; None if these are the checkpoints of a training, or
    if there are none."""
    for entry in members:
        if _PARTITION.search(entry.name):
            reason = "holds partitions of the model"
            hint = "convert it with the program's own script, such as DeepSpeed's zero_to_fp32.py"
            raise UnsuitableError(folder, reason, hint)
    if not members or _are_series(folder, members.keys()):
        return None
    by_stem: dict[str, Layout] = {}
    for entry, layout in members.items():
        by_stem[strip_ending(entry.name)] = layout  # of two formats safetensors, which come last
    usual = [stem for stem in _USUAL if stem in by_stem]
    for stem in usual[1:]:  # the same model in another format
        del by_stem[stem]
    if len(by_stem) == 1:
        return by_stem.popitem()[1]
    return Sets(folder, by_stem)


def _are_series(folder: Path, members: Collection[Path]) -> bool:
    """Return whether entries are checkpoints of one or several times, and not the sets of one
    checkpoint."""
    stems = {strip_ending(entry.name) for entry in members if entry != folder}
    if any(_is_time_within(folder, stem) for stem in stems):
        return True
    if not stems.isdisjoint(_USUAL):
        return False
    globs = Counter(map(make_glob, stems))
    if any(count > 1 for count in globs.values()):
        return True
    if len(stems) == 1 or any(map(_is_set, stems)) or _TIME.search(strip_ending(folder.name)):
        return False
    return not any(entry.is_dir() for entry in members)


def _is_set(stem: str) -> bool:
    """Return whether the name of a file says that it is one of several sets of a checkpoint."""
    return "model" in stem or AVERAGE_WORD.search(stem) is not None


def _is_time_within(folder: Path, stem: str) -> bool:
    """Return whether a name is a time, and does not repeat the time of its folder, as in
    `checkpoint-500/global_step500`."""
    match = _TIME.search(stem)
    if match is None:
        return False
    return match[match.lastindex or 0].lstrip("0") not in folder.name

"""What a checkpoint consists of, a `Layout`: one file of tensors, the shards or parts of a model, a
folder of torch.distributed.checkpoint, or several of these as the parts of one checkpoint; and the
words in names, which are signs of a role.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from posthoc_cli.errors import UnsuitableError

DCP_METADATA = ".metadata"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
PART = re.compile(
    r"(?:shard-[0-9]{5}-model-)?(?P<number>[0-9]{1,5})[-_]of[-_](?P<total>[0-9]{1,5})(?![0-9])"
)
"""In names of parts: their number and how many there are. With torch's `HuggingFaceStorageWriter`
each process, whose number is that of the shard, writes so many."""
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
MODEL_FILES = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model")
"""Names of weights in folders of Hugging Face's libraries, the likeliest first."""
NO_MODEL = re.compile(
    r"(?<![a-z])(?:opt|optims?|optimizers?|optimization|(?:lr_?)?schedulers?|rng|random_states?|"
    r"(?:grad_)?scaler|(?:train|training)[_-]args|dataloaders?)(?![a-z])|^chained_|^opt\d",
    re.IGNORECASE,
)
"""Pattern of names of files and groups that hold no model: the state of a training."""


@dataclass(frozen=True)
class OneFile:
    """A file of tensors; it may be the only file below a folder."""

    path: Path


@dataclass(frozen=True)
class Shards:
    """A model in several files, and the index that names them."""

    path: Path  # of the index


@dataclass(frozen=True)
class Parts:
    """A model in several files without an index: their names count them, or their headers say
    where what they hold belongs."""

    path: Path  # of the first
    paths: tuple[Path, ...]
    are_counted: bool  # by their names, and not only those that each process has written


@dataclass(frozen=True)
class Distributed:
    """A checkpoint of torch.distributed.checkpoint."""

    path: Path  # of `.metadata`


@dataclass(frozen=True)
class Sets:
    """Several models in a folder, by their names, which are the first keys of their tensors."""

    path: Path  # the folder
    members: Mapping[str, Layout]


@dataclass(frozen=True)
class Refused:
    """A file or folder that cannot be opened, and why."""

    path: Path
    error: UnsuitableError


def missing_parts(names: Iterable[str]) -> list[int]:
    """List the parts of a model that the names of others count, from 0 or 1 on."""
    numbers = set[int]()
    total = 0
    for match in filter(None, map(PART.search, names)):
        numbers.add(int(match["number"]))
        total = int(match["total"])
    first = 0 if 0 in numbers else 1
    return sorted({*range(first, first + total)} - numbers)


Layout = OneFile | Shards | Parts | Distributed | Sets | Refused


def is_state(name: str) -> bool:
    """Return whether a name says that a file or folder holds the state of a training."""
    return NO_MODEL.search(name) is not None and "model" not in name

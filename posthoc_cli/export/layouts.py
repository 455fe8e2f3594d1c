"""The layouts of outputs: their options and names, and which tensors each of their files holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from posthoc_cli import files, resources
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import InvalidValueError, MismatchError, check_alone, check_word
from posthoc_cli.export.copying import Placed
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry
from posthoc_cli.targets import Target

INDEX_ENDING = ".index.json"

LAYOUTS = {
    "safetensors": (SUFFIX,),
    "sharded": (),
    "pt": (".pt", ".pth", ".bin"),
    "dcp": (),
}
"""The layouts of an output, each with the file name endings that it accepts; layouts without
endings are folders."""

FOLDERS = {
    "sharded": re.compile(rf"model(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(INDEX_NAME)}"),
    "dcp": re.compile(r"\.metadata|.*\.distcp"),
    "like": re.compile("(?!)"),
}
"""The layouts that are folders ("like" is the copy of a folder), each with a pattern of the names
of its files: `overwrite` replaces a folder that holds no others."""

Parts = Mapping[str, Mapping[str, Entry]]
"""The tensors of each file of an output: its path within the folder, or "" for an output that is
one file."""

Others = Mapping[str, Path | bytes]
"""The other files of a folder: their content, or the file to copy."""


@dataclass(frozen=True)
class Copied:
    """The checkpoint that an output is a copy of, but for some tensors."""

    path: Path  # the file or folder
    word: str  # which tensors are replaced: "average" or "weights"
    kept: Sequence[str]  # those of them that stay, since the run does not have them
    shared: Sequence[str]  # averages that have no place of their own: it is the weights', too
    left_out: Sequence[str]  # what is not copied from a folder
    places: Mapping[str, Placed]
    files: Mapping[Path, str]  # the files of the model, with their paths in the output

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "replaced": self.word,
            "kept": self.kept,
            "shared": self.shared,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Arrangement:
    """The files of an output."""

    layout: str  # one of `LAYOUTS`; "like", the copy of a folder; or "copy", that of a file
    parts: Parts
    others: Others = field(default_factory=dict)
    copied: Copied | None = None

    @property
    def entries(self) -> dict[str, Entry]:
        """The tensors of all parts."""
        entries = dict[str, Entry]()
        for part in self.parts.values():
            entries |= part
        return entries

    @property
    def sizes(self) -> list[int]:
        """The bytes of the parts."""
        if self.copied is None:
            return [nbytes(entries) for entries in self.parts.values()]
        sizes = [path.stat().st_size for path in self.copied.files]
        return [sum(sizes)]

    @property
    def bytes_beside(self) -> int:
        """The bytes of the other files to copy."""
        total = 0
        for other in self.others.values():
            if isinstance(other, Path):
                total += other.stat().st_size
        return total


@dataclass(frozen=True)
class OutputOptions:
    """Options for making averages and writing them to files."""

    device: torch.device | str = "auto"  # computes the sums
    workers: int | None = None  # number of threads; None for one per core
    layout: str | None = None  # one of `LAYOUTS`; None to choose it by the output's name
    # of a sharded output, such as "5GB", which is the default
    max_shard_size: int | str | None = None
    overwrite: bool = False
    dry_run: bool = False  # plan only
    # all processes of a torchrun job make this call, and each writes some of the shards
    distributed: bool = False
    # a checkpoint or model folder, which outputs are copies of but for the tensors of the average
    like: str | Path | None = None
    weights: bool = False  # replace its weights, not its own average
    average: str | None = None  # the key, prefix or glob of the tensors to replace

    def __post_init__(self) -> None:
        if self.layout is not None:
            check_word("layout", self.layout, LAYOUTS)
        self.shard_bytes  # noqa: B018  raises an error if invalid
        check_alone(weights=self.weights, average=self.average)
        if self.like is None and (self.weights or self.average is not None):
            name = "weights" if self.weights else "average"
            raise InvalidValueError(name, "says which tensors of `like` to replace: give that, too")

    def check_like(self, dtype: torch.dtype | str | None) -> None:
        """Raise an InvalidValueError for an option or a dtype that contradicts `like`."""
        if self.like is None:
            return
        given = self.distributed, self.layout, self.max_shard_size, parse_dtype(dtype)
        if any(given):
            reason = (
                "determines the output: layout, dtype, max_shard_size and torchrun cannot be "
                "combined with it"
            )
            raise InvalidValueError("like", reason)
        if self.overwrite and self.makes_folders:
            raise InvalidValueError("overwrite", "a copy of a folder replaces no other folder")

    @property
    def makes_folders(self) -> bool:
        """Whether every output is a folder."""
        if self.like is None:
            return self.distributed or self.layout in FOLDERS
        like = files.expanded(self.like)
        like = files.local_path("like", like)
        return like.is_dir() or like.name.endswith(INDEX_ENDING)

    @property
    def ending(self) -> str:
        """The ending of the name of an output that is a file, by default."""
        if self.like is not None:
            return Path(self.like).suffix
        return LAYOUTS[self.layout or "safetensors"][0]

    @property
    def shard_bytes(self) -> int:
        size = "5GB" if self.max_shard_size is None else str(self.max_shard_size)
        return resources.parse_bytes(size, "max_shard_size")


def layout_of(path: Path, layout: str | None) -> str:
    """Return the given layout, or choose it by the output's name: .pt, .safetensors, or a folder of
    shards.

    Raises InvalidValueError if the name has the ending of another layout, or of none. A folder may
    have any name.
    """
    named = next((name for name, endings in LAYOUTS.items() if path.suffix in endings), None)
    wanted = layout or named or "sharded"
    fits = named == wanted or (named is None and (layout is not None or not path.suffix))
    if not (fits or path.is_dir()):
        hint = "name a .safetensors or .pt file, or a folder for shards; or give `layout`"
        raise InvalidValueError(path, f"its ending does not fit the layout {wanted}", hint)
    return wanted


def output_paths(
    targets: Sequence[Target],
    out: str | Path | None,
    dtype: torch.dtype | str | None,
    options: OutputOptions,
) -> list[Path]:
    """Return the path of each target's output, none in a dry run: `out`, or a file or folder in it
    for each.

    A folder of shards holds one model. Raises InvalidValueError if options contradict each other,
    or if two targets would have the same path.
    """
    options.check_like(dtype)
    if out is None:
        if not options.dry_run:
            raise InvalidValueError("out", "is missing; only a dry run needs no output")
        return []
    path = files.output_path("out", out)
    is_file = path.suffix in (*LAYOUTS["safetensors"], *LAYOUTS["pt"])
    if options.distributed and (is_file or options.layout not in (None, "sharded")):
        reason = "a job of several processes makes a folder of shards; name a folder"
        raise InvalidValueError("out", reason, "an export makes one file of it", value=out)
    if not options.dry_run:
        files.check_parent("out", path)
    is_folder = path.is_dir() or path.suffix == "" or str(out).endswith("/")
    if len(targets) == 1 and (options.makes_folders or not is_folder):
        check_ending(path, options)
        paths = [path]
    elif is_file and not is_folder:
        raise InvalidValueError("out", f"{len(targets)} targets need a folder", value=out)
    else:
        paths = _paths_in(path, targets, "" if options.makes_folders else options.ending)
    return [] if options.dry_run else paths


def check_ending(path: Path, options: OutputOptions) -> None:
    """Raise InvalidValueError unless the name of an output has an ending of its layout."""
    if options.like is None:
        layout_of(path, "sharded" if options.distributed else options.layout)
    elif not options.makes_folders and path.suffix != options.ending:
        reason = f"must end in {options.ending}, as the file that it is a copy of"
        raise InvalidValueError("out", reason, value=path)


def _paths_in(
    folder: Path,
    targets: Sequence[Target],
    ending: str,
) -> list[Path]:
    """Return paths named after the targets."""
    paths = list[Path]()
    for target in targets:
        name = target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"
        path = folder / f"{name}{ending}"
        if path in paths:
            reason = f"two averages would both become {path}; a profile is named after its file"
            raise InvalidValueError("out", reason, "rename one", value=folder)
        paths.append(path)
    return paths


def arranged(
    layout: str,
    entries: Mapping[str, Entry],
    options: OutputOptions,
    ranks: int = 1,
) -> Arrangement:
    """Return the files of an output with these tensors: shards, at least one for each rank, or one
    file.

    Shards are cut as the Hugging Face libraries do. Several shards have an index; one has the name
    of a model in one file.
    """
    if layout != "sharded":
        if options.max_shard_size is not None:
            reason = f"is for a sharded output, and this layout is {layout}"
            raise InvalidValueError("max_shard_size", reason, value=options.max_shard_size)
        return Arrangement(layout, {"": entries})
    total = nbytes(entries)
    split = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=min(options.shard_bytes, max(1, -(-total // ranks))),
    )
    parts = dict[str, Mapping[str, Entry]]()
    for file, names in split.filename_to_tensors.items():
        parts[file] = {name: entries[name] for name in names}
    if not split.is_sharded:
        return Arrangement(layout, parts)
    index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return Arrangement(layout, parts, {INDEX_NAME: text.encode()})


def nbytes(entries: Mapping[str, Entry]) -> int:
    """Return the bytes of all tensors."""
    return sum(entry.nbytes for entry in entries.values())


def check_shape(
    path: Path,
    name: str,
    found: Sequence[int],
    average: Sequence[int],
) -> None:
    """Raise a MismatchError that names the file if a tensor does not have the shape of its
    average."""
    if tuple(found) != tuple(average):
        reason = f"tensor {name!r} has the shape {list(found)}, the average {list(average)}"
        raise MismatchError(path, reason)

"""What a user wants of outputs: their layout and their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from posthoc_cli import files, resources
from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import InvalidValueError, check_alone, check_word
from posthoc_cli.snapshots.tensorfile import SUFFIX
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

    @property
    def shard_bytes(self) -> int:
        size = "5GB" if self.max_shard_size is None else str(self.max_shard_size)
        return resources.parse_bytes(size, "max_shard_size")

    @property
    def makes_folders(self) -> bool:
        """Whether every output is a folder."""
        if self.like is None:
            return self.distributed or self.layout in ("sharded", "dcp")
        like = files.local_path("like", files.expanded(self.like))
        return like.is_dir() or like.name.endswith(INDEX_ENDING)

    @property
    def ending(self) -> str:
        """The ending of the name of an output that is a file, by default."""
        if self.like is not None:
            return Path(self.like).suffix
        return LAYOUTS[self.layout or "safetensors"][0]

    def layout_of(self, path: Path) -> str:
        """Return the layout of an output: as given, or by its name .pt, .safetensors, or a folder
        of shards; or "like" for a copy.

        Raises InvalidValueError if the name has the ending of another layout, or of none. A folder
        may have any name.
        """
        if self.like is not None:
            if not self.makes_folders and path.suffix != self.ending:
                reason = f"must end in {self.ending}, as the file that it is a copy of"
                raise InvalidValueError("out", reason, value=path)
            return "like"
        named = next((name for name, endings in LAYOUTS.items() if path.suffix in endings), None)
        given = "sharded" if self.distributed else self.layout
        layout = given or named or "sharded"
        fits = named == layout or (named is None and (given is not None or not path.suffix))
        if not (fits or path.is_dir()):
            hint = "name a .safetensors or .pt file, or a folder for shards; or give `layout`"
            reason = f"its ending does not fit the layout {layout}"
            if given is None:
                reason = f"the ending {path.suffix} says no layout"
            raise InvalidValueError(path, reason, hint)
        if self.max_shard_size is not None and layout != "sharded":
            reason = f"is for a sharded output, and this layout is {layout}"
            raise InvalidValueError("max_shard_size", reason, value=self.max_shard_size)
        return layout

    def check_like(self, dtype: torch.dtype | str | None) -> None:
        """Raise an InvalidValueError for an option or a dtype that contradicts `like`."""
        if self.like is None:
            return
        if any((self.distributed, self.layout, self.max_shard_size, parse_dtype(dtype))):
            reason = (
                "determines the output: `layout`, `dtype`, `max_shard_size` and torchrun cannot be "
                "combined with it"
            )
            raise InvalidValueError("like", reason)
        if self.overwrite and self.makes_folders:
            raise InvalidValueError("overwrite", "a copy of a folder replaces no other folder")


def output_paths(
    targets: Sequence[Target],
    out: str | Path | None,
    dtype: torch.dtype | str | None,
    options: OutputOptions,
) -> list[Path]:
    """Return the path of each target's output, none in a dry run: `out`, or a file or folder in it
    for each.

    Raises InvalidValueError if options contradict each other, or if two targets would have the same
    path.
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
        options.layout_of(path)
        paths = [path]
    elif is_file and not is_folder:
        raise InvalidValueError("out", f"{len(targets)} targets need a folder", value=out)
    else:
        paths = _paths_in(path, targets, "" if options.makes_folders else options.ending)
    return [] if options.dry_run else paths


def _paths_in(folder: Path, targets: Sequence[Target], ending: str) -> list[Path]:
    """Return paths named after the targets."""
    paths = []
    for target in targets:
        name = target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"
        path = folder / f"{name}{ending}"
        if path in paths:
            reason = f"two averages would both become {path}; a profile is named after its file"
            raise InvalidValueError("out", reason, "rename one", value=folder)
        paths.append(path)
    return paths

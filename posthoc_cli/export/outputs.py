"""Outputs of a synthesis: their layouts and names, whether they are there already, and how they are written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, OutputExistsError, WriteError, shown
from posthoc_cli.export.sinks import Sink, holds_model, make_sink
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.outputs import (
    OutputInfo,
    decode_output,
    model_files,
    output_difference,
    output_metadata,
    same_coefficients,
)
from posthoc_cli.snapshots.reader import read_header, verify_payload
from posthoc_cli.synthesis.engine import Options, synthesize_into
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Target

LAYOUTS = {"safetensors": ".safetensors", "sharded": "", "pt": ".pt", "dcp": ""}
"""The layouts of an output, with what its name ends in."""

DEFAULT_SHARD_SIZE = "5GB"
PICKLES = (".pt", ".pth", ".bin")
ANOTHER_NAME = "choose another name, or overwrite=True to replace it"
_SIGMA_REL, _TARGET = "{sigma_rel}", "{target}"


def write_synthesis(
    plan: Plan, paths: Sequence[Path], options: Options = Options(), folder: Path | None = None
) -> None:
    """Synthesize every target of a plan into its path; none appears before all are complete.

    Arguments:
        plan: from `plan_synthesis`.
        paths: an output a target.
        folder: the folder of the outputs, created if it is missing.

    Raises:
        WriteError: the system refused, or the outputs do not fit on the disk; the latter before anything is written.
        OutputExistsError: an output is there already, and `options.overwrite` is False.
        FileFormatError, NonFiniteError: as `synthesize`.
    """
    check_space(dict.fromkeys(paths, plan.nbytes))
    with ExitStack() as stack:
        if folder is not None and folder.parent.is_dir():
            stack.enter_context(files.new_directory(folder))
        metadata = [output_metadata(plan.output_info(index)) for index in range(len(paths))]
        for sink in fill_sinks(stack, plan, dict(zip(paths, metadata, strict=True)), options):
            sink.commit()


def fill_sinks(stack: ExitStack, plan: Plan, outputs: Mapping[Path, Mapping[str, str]], options: Options) -> list[Sink]:
    """Synthesize targets into sinks for outputs, given with their metadata; `stack` discards what is not committed."""
    sinks: list[Sink] = []
    for path, metadata in outputs.items():
        sinks.append(make_sink(layout_of(path, options.layout), path, plan.specs(), metadata, options))
        stack.callback(sinks[-1].discard)
    with closing(synthesize_into(plan, lambda tile: [s.open_tile(tile, plan.names) for s in sinks], options)) as made:
        for _ in made:
            pass
    return sinks


def check_space(outputs: Mapping[Path, int]) -> None:
    """Check that every disk has room for its outputs, or raise a WriteError; one that is replaced keeps its room."""
    disks: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for path, nbytes in outputs.items():
        place = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
        if place is not None:  # else making the output raises an error
            disks[place.stat().st_dev].append((place, nbytes))
    for places in disks.values():
        place, needed = places[0][0], sum(nbytes for _, nbytes in places)
        free = shutil.disk_usage(place).free
        if needed > free:
            count = "the output takes" if len(places) == 1 else f"the {len(places)} outputs take"
            reason = f"{count} {needed:,} bytes, and {free:,} are free on this disk; nothing was written"
            raise WriteError(place, reason, errno=errno.ENOSPC)


# --- layouts and names -------------------------------------------------------------------------------


def layout_of(path: Path, layout: str | None) -> str:
    """The given layout, or the one that the output's name says: .pt, .safetensors, or a folder of shards."""
    if layout is not None:
        if layout not in LAYOUTS:
            raise InvalidValueError("format", f"must be one of {', '.join(LAYOUTS)}", value=f"{layout!r}")
        return layout
    if path.suffix == fmt.SUFFIX:
        return "safetensors"
    if path.suffix in PICKLES:
        return "pt"
    if path.suffix == "" or path.is_dir():
        return "sharded"
    hint = "name a .safetensors or .pt file, or a folder for shards; or give the layout"
    raise InvalidValueError(path, "its ending names no layout", hint)


def suffix_of(layout: str | None) -> str:
    """What the names of outputs end in: in one safetensors file unless a layout is given."""
    return LAYOUTS["safetensors" if layout is None else layout_of(Path(), layout)]


def output_paths(targets: Sequence[Target], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    """The output of each target, and the folder to create for them, if one was named.

    The output may be a pattern with `{sigma_rel}` or `{target}` to fill in, a file (for one target), or a folder that
    takes a file a target. With the layout "sharded" a folder holds one model, so several targets get a folder each
    within it.

    Raises:
        InvalidValueError: several targets, but one output for them or for two of them; or a pattern that a target
            cannot fill in.
    """
    if not out:
        hint = f"name a file, a folder, or a pattern with {_SIGMA_REL} or {_TARGET}"
        raise InvalidValueError("out", "is empty", hint)
    unknown = [name for name in re.findall(r"\{\w*\}", out) if name not in (_SIGMA_REL, _TARGET)]
    if unknown:
        raise InvalidValueError("out", f"{unknown[0]} is not known; must be {_SIGMA_REL} or {_TARGET}", value=out)
    if _SIGMA_REL in out or _TARGET in out:
        paths, folder = [_filled_in(out, target) for target in targets], None
    else:
        paths, folder = _paths(targets, out, layout)
    taken: dict[Path, Target] = {}
    for target, path in zip(targets, paths, strict=True):
        if path in taken:
            both = f"{taken[path].title} and {target.title} would both become {path}"
            raise InvalidValueError("out", f"{both}; a profile is named after its file", "rename one", value=out)
        taken[path] = target
    return paths, folder


def _paths(targets: Sequence[Target], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    path = files.expanded(out)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InvalidValueError("out", "is a pipe or a device", "name a file or a folder", value=out)
    is_folder = path.is_dir() or path.suffix == "" or out.endswith("/")
    if len(targets) == 1 and (layout in ("sharded", "dcp") or not is_folder):
        return [path], None
    if not is_folder and path.suffix in (fmt.SUFFIX, *PICKLES):
        place = _TARGET if any(target.sigma_rel is None for target in targets) else _SIGMA_REL
        example = f"a name with {place} in it, such as {path.stem}-{place}{path.suffix}"
        raise InvalidValueError("out", f"{len(targets)} targets need a folder, or {example}", value=out)
    return [path / f"{_name(target)}{suffix_of(layout)}" for target in targets], path


def _filled_in(pattern: str, target: Target) -> Path:
    if _SIGMA_REL in pattern and target.sigma_rel is None:
        raise InvalidValueError("out", f"{target.title} has no sigma_rel", f"write {_TARGET} for it", value=pattern)
    return files.expanded(pattern.replace(_SIGMA_REL, repr(target.sigma_rel)).replace(_TARGET, _name(target)))


def _name(target: Target) -> str:
    """The name of a target's file, without an ending: `sigma_rel-0.15`, `beta-0.9999`."""
    return target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"


# --- outputs that are there already ------------------------------------------------------------------


def output_exists(path: Path, layout: str) -> bool:
    """Whether an output is there already."""
    return holds_model(path) if layout == "sharded" else os.path.lexists(path)


def existing_outputs(plan: Plan, paths: Sequence[Path], layout: str | None = None) -> set[int]:
    """The targets of a plan, by index, whose output is there already; every byte of it is verified.

    An OutputExistsError if it is damaged, of another run, target, time, method, dtype or snapshots, or does not tell.
    """
    there = {index for index, path in enumerate(paths) if output_exists(path, layout_of(path, layout))}
    for index in sorted(there):
        try:
            _check_output(paths[index], layout_of(paths[index], layout), plan, plan.output_info(index))
        except (FileFormatError, MismatchError) as error:
            raise OutputExistsError(error.subject, error.reason, ANOTHER_NAME) from error
    return there


def _check_output(path: Path, layout: str, plan: Plan, wanted: OutputInfo) -> None:
    """Check that an output is there as it would be made: FileFormatError or MismatchError."""
    if layout in ("pt", "dcp"):
        raise MismatchError(path, f"is there already, and this layout, {layout}, does not say which average it holds")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in model_files(path):
        header = read_header(shard)
        info = decode_output(shard, header)
        difference = output_difference(info, wanted)
        if difference is None and (_used(info) != _used(wanted) or not same_coefficients(info, wanted)):
            difference = "its snapshots or their coefficients are others"
        if difference is not None:
            raise MismatchError(shard, f"is another output: {difference}")
        verify_payload(shard, header)
        found |= {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    expected = {spec.name: (spec.dtype, spec.shape) for spec in plan.specs()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise MismatchError(path, f"is another output: tensor {shown(name)} differs")


def _used(info: OutputInfo) -> list[str]:
    return [name for name, coefficient in info.snapshots if coefficient]

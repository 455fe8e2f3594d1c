"""The layouts by name, and the sinks that write them."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, OutputExistsError, WriteError, shown
from posthoc_cli.export.sharded import (
    SHARD_PATTERN,
    FilePart,
    MemoryPart,
    ShardedSink,
    TilePart,
    holds_model,
    holds_snapshot,
)
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.models import INDEX_NAME, read_index
from posthoc_cli.snapshots.outputs import (
    OutputInfo,
    decode_output,
    output_difference,
    output_metadata,
    same_coefficients,
)
from posthoc_cli.snapshots.reader import read_header, verify_payload
from posthoc_cli.snapshots.tensors import tensor_bytes, torch_dtype
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.engine import Progress, place_synthesis
from posthoc_cli.synthesis.plan import Plan, names_by_tensor
from posthoc_cli.synthesis.tiles import Tile
from posthoc_cli.targets import Target

LAYOUTS = ("safetensors", "sharded", "pt")
DEFAULT_SHARD_SIZE = "5GB"
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Sink(Protocol):
    """Takes the tensors of one target. A context manager: what was not committed leaves nothing behind."""

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""
        ...

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TilePart:
        """Begin to take a tile, of tensors that go by `names`; any number of tiles may be open in any threads."""
        ...

    def commit(self) -> None:
        """Make the output appear."""
        ...

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def layout_of(path: Path, layout: str | None) -> str:
    """The layout asked for, or the one that the output's name says: .pt, .safetensors, or a folder of shards."""
    if layout is not None:
        if layout not in LAYOUTS:
            raise InvalidValueError("format", f"must be one of {', '.join(LAYOUTS)}", value=f"{layout!r}")
        return layout
    if path.suffix == fmt.SUFFIX:
        return "safetensors"
    if path.suffix in (".pt", ".pth", ".bin"):
        return "pt"
    if path.suffix == "" or path.is_dir():
        return "sharded"
    raise InvalidValueError(path, "name a .safetensors or .pt file, or a folder for shards, or say --format")


def parse_size(size: str) -> int:
    """Bytes from "5GB", "300MB", "1.5TB" (powers of 1000) or a plain number.

    Raises:
        InvalidValueError: anything else, or nothing above 0.
    """
    text = size.strip().upper()
    unit = next((u for u in _SIZE_UNITS if text.endswith(u)), "")
    try:
        value = float(text.removesuffix(unit)) * _SIZE_UNITS.get(unit, 1)
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**63:
        raise InvalidValueError(
            "max_shard_size", "must be a number of bytes above 0, with or without KB, MB, GB or TB", value=f"{size!r}"
        )
    return int(value)


def output_exists(path: Path, layout: str) -> bool:
    """Whether an output is there already."""
    if layout == "sharded":
        return holds_model(path)
    return os.path.lexists(path)


def make_sink(
    layout: str,
    path: Path,
    specs: Sequence[fmt.TensorSpec],
    metadata: Mapping[str, str],
    overwrite: bool = False,
    max_shard_size: int | None = None,
) -> Sink:
    """A sink that writes `specs` in a layout.

    Arguments:
        layout: "safetensors", "sharded" (`path` is a folder) or "pt".
        path: the output.
        specs: every tensor that will be written.
        metadata: strings for the header; a .pt file has no place for them.
        overwrite: replace what is there.
        max_shard_size: bytes a shard, for "sharded".

    Raises:
        OutputExistsError, WriteError.
    """
    if not path.parent.is_dir():
        raise InvalidValueError(path, "its folder does not exist")
    if overwrite and holds_snapshot(path):
        raise OutputExistsError(path, "is a snapshot of a run and is not replaced", "choose another name")
    if layout == "pt":
        return _TorchSink(path, specs, overwrite)
    if layout == "sharded":
        return ShardedSink(path, specs, metadata, overwrite, max_shard_size or parse_size(DEFAULT_SHARD_SIZE))
    return _FileSink(TensorFileWriter(path, specs, metadata, overwrite))


class _FileSink:
    """One safetensors file."""

    def __init__(self, writer: TensorFileWriter) -> None:
        self._writer = writer

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._writer.write(name, tensor_bytes(tensor))

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TilePart:
        return FilePart(lambda _: self._writer, tile, names)

    def commit(self) -> None:
        self._writer.commit()

    def __enter__(self) -> _FileSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.discard()


class _TorchSink:
    """A .pt state dict. torch.save takes it whole, so that this one layout holds the model in memory."""

    def __init__(self, path: Path, specs: Sequence[fmt.TensorSpec], overwrite: bool) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._specs = {spec.name: spec for spec in specs}
        self._file = files.PendingFile(path, overwrite)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.cpu()

    def open_tile(self, tile: Tile, names: Mapping[str, Sequence[str]]) -> TilePart:
        for piece in tile.pieces:
            if piece.name not in self._tensors:
                spec = self._specs[piece.name]
                with torch.inference_mode(False):  # whatever the caller's mode and default device
                    tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="cpu")
                self._tensors |= dict.fromkeys(names[piece.name], tensor)
        return MemoryPart(self._tensors, tile)

    def commit(self) -> None:
        stream = _Stream(self._file)
        try:
            with io.BufferedWriter(stream) as buffered:
                torch.save(self._tensors, buffered)
        except RuntimeError as error:
            # torch's archive writer hides what its stream raised, and a Ctrl-C, behind an error of its own.
            cause = stream.error or _interruption(error)
            if cause is None:
                raise
            raise cause from error
        self._file.publish()

    def __enter__(self) -> _TorchSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.discard()


def _interruption(error: BaseException) -> BaseException | None:
    """The Ctrl-C or end of the process during which an error was raised, if any."""
    before = error.__context__
    while isinstance(before, Exception):
        before = before.__context__
    return before


class _Stream(io.RawIOBase):
    """A pending file as the stream that torch.save writes to; keeps the error that a write ended with."""

    def __init__(self, file: files.PendingFile) -> None:
        self.error: BaseException | None = None
        self._file = file
        self._offset = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write_at(view, self._offset)
        except BaseException as error:  # Ctrl-C, too
            self.error = error
            raise
        self._offset += len(view)
        return len(view)


# --- Where the outputs of several targets go -------------------------------------------------------


_SUFFIXES = {"safetensors": ".safetensors", "pt": ".pt", "sharded": ""}
_SIGMA_REL, _TARGET = "{sigma_rel}", "{target}"


def output_paths(targets: Sequence[Target], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    """Where each target goes, and the folder to be made for them, if one was named.

    The output may be a pattern with `{sigma_rel}` or `{target}` to fill in, a file (for one target), or a folder that
    takes a file a target. With the layout "sharded" a folder holds one model, so that several targets get a folder
    each within it.

    Raises:
        InvalidValueError: several targets, but one output for them or for two of them; a name to be filled in with
            the sigma_rel of a target that has none, or with anything else.
    """
    if not out:
        raise InvalidValueError(
            "out", "is empty", f"name a file, a folder, or a pattern with {_SIGMA_REL} or {_TARGET}"
        )
    unknown = [name for name in re.findall(r"\{\w*\}", out) if name not in (_SIGMA_REL, _TARGET)]
    if unknown:
        raise InvalidValueError("out", f"{unknown[0]} is not known; must be {_SIGMA_REL} or {_TARGET}", value=out)
    paths, folder = _paths(targets, out, layout)
    taken: dict[Path, Target] = {}
    for target, path in zip(targets, paths, strict=True):
        if path in taken:
            raise InvalidValueError(
                "out",
                f"{taken[path].title} and {target.title} would both become {path}; a profile is named after "
                "its file: rename one",
                value=out,
            )
        taken[path] = target
    return paths, folder


def export_paths(sources: Sequence[Path], out: Path, layout: str | None) -> list[Path]:
    """Where the exports of several models go: into the folder `out`, each under the name that it has.

    Raises:
        InvalidValueError: the output is a file.
    """
    if out.suffix in (".safetensors", ".pt", ".pth", ".bin") and not out.is_dir():
        raise InvalidValueError("out", f"{len(sources)} models need a folder", value=out)
    suffix = _SUFFIXES[layout_of(Path("x.safetensors"), layout)]
    return [out / f"{source.name.removesuffix('.safetensors')}{suffix}" for source in sources]


def _paths(targets: Sequence[Target], out: str, layout: str | None) -> tuple[list[Path], Path | None]:
    if _SIGMA_REL in out or _TARGET in out:
        return [_filled_in(out, target) for target in targets], None
    path = files.expanded(out)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InvalidValueError("out", "is a pipe or a device", "name a file or a folder", value=out)
    is_folder = path.is_dir() or path.suffix == "" or out.endswith("/")
    if len(targets) == 1 and (layout == "sharded" or not is_folder):
        return [path], None
    if not is_folder and path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        place = _TARGET if any(target.sigma_rel is None for target in targets) else _SIGMA_REL
        raise InvalidValueError(
            "out",
            f"{len(targets)} targets need a folder, or a name with {place} in it, such as "
            f"{path.stem}-{place}{path.suffix}",
            value=out,
        )
    suffix = _SUFFIXES[layout_of(Path("x.safetensors"), layout)]
    return [path / f"{_name(target)}{suffix}" for target in targets], path


def _filled_in(pattern: str, target: Target) -> Path:
    if _SIGMA_REL in pattern and target.sigma_rel is None:
        raise InvalidValueError("out", f"{target.title} has no sigma_rel", f"write {_TARGET} for it", value=pattern)
    return files.expanded(pattern.replace(_SIGMA_REL, repr(target.sigma_rel)).replace(_TARGET, _name(target)))


def _name(target: Target) -> str:
    """What a target's file is called, without an ending: `sigma_rel-0.15`, `beta-0.9999`."""
    return target.label if target.sigma_rel is None else f"sigma_rel-{target.sigma_rel!r}"


# --- Whether outputs fit on their disks, asked before the first byte is written --------------------


def check_space(outputs: Mapping[Path, int]) -> None:
    """Check that every disk has room for its outputs, of so many bytes each.

    An output that is replaced keeps its room until the new one is complete.

    Raises:
        WriteError: naming the place, what is needed and what is free.
    """
    disks: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for path, nbytes in outputs.items():
        place = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
        if place is not None:  # else making the output says what is wrong
            disks[place.stat().st_dev].append((place, nbytes))
    for places in disks.values():
        place, needed = places[0][0], sum(nbytes for _, nbytes in places)
        free = shutil.disk_usage(place).free
        if needed > free:
            count = "the output takes" if len(places) == 1 else f"the {len(places)} outputs take"
            raise WriteError(
                place,
                f"{count} {needed:,} bytes, and {free:,} are free on this disk; nothing was written",
                errno=errno.ENOSPC,
            )


# --- A synthesis into files ------------------------------------------------------------------------


Contents = tuple[str, tuple[int, ...]]
"""Dtype and shape of a tensor."""


def write_synthesis(
    plan: Plan,
    paths: Sequence[Path],
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
    folder: Path | None = None,
    accumulate: torch.dtype | str | None = None,
    workers: int | None = None,
) -> None:
    """Synthesize every target of a plan into its path; none appears before all are complete.

    Arguments:
        plan: from `plan_synthesis`.
        paths: an output a target.
        layout, overwrite, max_shard_size: as in `export_file`.
        dtype, device, progress, accumulate, workers: as in `synthesis.synthesize`.
        folder: the folder of the outputs, to be made when it is missing.

    Raises:
        WriteError: the system refused, or the outputs do not fit on the disk; the latter before anything is written.
    """
    specs = plan.specs(dtype)
    limit = parse_size(max_shard_size)
    check_space(dict.fromkeys(paths, sum(spec.nbytes for spec in specs)))
    with ExitStack() as stack:
        if folder is not None and folder.parent.is_dir():
            stack.enter_context(files.new_directory(folder))
        sinks = []
        for index, path in enumerate(paths):
            metadata = output_metadata(plan.output_info(index))
            sink = make_sink(layout_of(path, layout), path, specs, metadata, overwrite, limit)
            sinks.append(stack.enter_context(sink))
        fill_sinks(plan, sinks, dtype, device, progress, accumulate, workers)
        for sink in sinks:
            sink.commit()


def existing_outputs(
    plan: Plan, paths: Sequence[Path], layout: str | None = None, dtype: torch.dtype | str | None = None
) -> set[int]:
    """The targets of a plan, by index, whose output is there already: every byte is verified.

    Arguments:
        plan, paths, layout, dtype: as in `write_synthesis`.

    Raises:
        OutputExistsError: what has an output's name is damaged, or of another run, target, time, method or dtype, of
            other snapshots, or says nothing of what it is.
    """
    there = set()
    specs = {spec.name: (spec.dtype, spec.shape) for spec in plan.specs(dtype)}
    for index, path in enumerate(paths):
        kind = layout_of(path, layout)
        if not output_exists(path, kind):
            continue
        try:
            _check_output(path, kind, plan.output_info(index), specs)
        except (FileFormatError, MismatchError) as error:
            raise OutputExistsError(
                error.subject, error.reason, "choose another name, or overwrite=True to replace it"
            ) from error
        there.add(index)
    return there


def _check_output(path: Path, layout: str, wanted: OutputInfo, specs: Mapping[str, Contents]) -> None:
    """Check that an output is there as it would be made.

    Raises:
        FileFormatError: it is damaged, or no output.
        MismatchError: it is another one; says what differs.
    """
    if layout == "pt":
        raise MismatchError(path, "is there already, and a .pt file does not say which average it holds")
    index = path / INDEX_NAME
    shards = [path] if layout == "safetensors" else [path / name for name in _shard_names(index)]
    found: dict[str, Contents] = {}
    for shard in shards:
        header = read_header(shard)
        info = decode_output(shard, header)
        difference = output_difference(info, wanted)
        if difference is None and (_names(info) != _names(wanted) or not same_coefficients(info, wanted)):
            difference = "its snapshots or their coefficients are others"
        if difference is not None:
            raise MismatchError(shard, f"is another output: {difference}")
        verify_payload(shard, header)
        found |= {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    for name in sorted(found.keys() | specs.keys()):
        if found.get(name) != specs.get(name):
            raise MismatchError(path, f"is another output: tensor {shown(name)} differs")


def _shard_names(index: Path) -> list[str]:
    """The files of a model in a folder; one without an index is one file."""
    return list(read_index(index)) if os.path.lexists(index) else [SHARD_PATTERN.format(suffix="")]


def _names(info: OutputInfo) -> list[str]:
    return [name for name, coefficient in info.snapshots if coefficient]


def fill_sinks(
    plan: Plan,
    sinks: Sequence[Sink],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    accumulate: torch.dtype | str | None = None,
    workers: int | None = None,
) -> None:
    """Synthesize every target of a plan into its sink; commits none. Arguments as in `synthesis.synthesize`."""
    names = names_by_tensor(plan.newest.info)
    made = place_synthesis(
        plan, lambda tile: _TargetParts(sinks, tile, names), dtype, device, progress, accumulate, workers
    )
    with closing(made):
        for _ in made:
            pass


class _TargetParts:
    """One tile's places in the outputs of all targets."""

    def __init__(self, sinks: Sequence[Sink], tile: Tile, names: Mapping[str, Sequence[str]]) -> None:
        self._parts = [sink.open_tile(tile, names) for sink in sinks]

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:
        self._parts[target].write(begin, values)

    def close(self) -> None:
        for part in self._parts:
            part.close()

"""How outputs are written: averages of a run by one process, or by the ranks of a torchrun job; and
exported models.

An output is a temporary file or folder, which gets its name when it is complete. In a job the first
rank makes the folder, and each rank writes some of the shards into it; to an object store each
sends its own. A plan is divided into shards by headers alone, so every rank knows the whole
division. Ranks exchange no tensors: they only report by torch.distributed whether they succeeded. A
rank that has died is noticed by the launcher, which ends the others, or by the ranks that wait for
it: no output appears, and the job is run again.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import (
    FileFormatError,
    OutputExistsError,
    PostHocError,
    RankError,
    WriteError,
)
from posthoc_cli.export.layouts import (
    FOLDERS,
    ModelFolder,
    Others,
    OutputOptions,
    Parts,
    files_of,
    layout_of,
    nbytes,
)
from posthoc_cli.resources import ProgressBar, no_bar, worker_count
from posthoc_cli.snapshots.sources import counted
from posthoc_cli.snapshots.tensorfile import (
    SUFFIX,
    Entry,
    TensorFile,
    TensorFileWriter,
    read_file,
    tensor_bytes,
)
from posthoc_cli.synthesis.engine import Tile, Writer, check_device, open_in_memory, synthesize_into
from posthoc_cli.synthesis.plan import Plan

# --- processes


def is_rank() -> bool:
    """Return whether this process is one of several ranks of a torchrun job."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(map(os.environ.get, wanted)) and os.environ["WORLD_SIZE"] != "1"


@dataclass(frozen=True)
class Ranks:
    """The processes of a torchrun job, or this process alone."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @contextmanager
    def together(self) -> Iterator[list[Any]]:
        """Run the block in all ranks, and raise a RankError if that of another one failed.

        It gets a list, which afterwards holds in all ranks what the first rank has put into it.
        """
        failure, shared = None, list[Any]()
        try:
            yield shared
        except PostHocError as error:
            failure = error
        results: list[Any] = [(failure and str(failure), shared)] * self.world
        try:
            if self.group is not None:
                dist.all_gather_object(results, results[0], self.group)
        except RuntimeError as error:
            raise failure or RankError(
                "another process of this job", "failed or died; nothing was finished"
            ) from error
        for rank, (text, _) in enumerate(results):
            if text:
                raise failure or RankError(f"rank {rank}", f"failed: {text}")
        shared[:] = results[0][1]


ALONE = Ranks()


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """Connect the ranks of a torchrun job for the block; raise RankError if they do not meet."""
    wait = timedelta(minutes=30)  # for other ranks to begin, or to finish their current shards
    # or torch prints a stack trace when a rank has died
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    is_own = not dist.is_initialized()
    try:
        if is_own:
            dist.init_process_group("gloo", timeout=wait)
        group = dist.new_group(backend="gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        reason = (
            f"did not meet by torch.distributed: {str(error).strip().partition(chr(10))[0][:200]}"
        )
        raise RankError("the processes of this job", reason) from error
    if dist.get_rank():  # the first rank logs for all
        logging.getLogger("posthoc_cli").setLevel(logging.ERROR)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group(None if is_own else group)


# --- outputs


class Output:
    """One output, written file by file under another name; the end of `stack` removes what was not
    published.

    Tensors are written complete (`write`) or in tiles (`open_tile`, see `synthesis.engine.Opener`).
    .pt files and DCP folders are collected in memory, since their libraries write them in one call.
    The first rank of a job is the owner of the folder, and the others get its `place`.
    """

    def __init__(
        self,
        stack: ExitStack,
        path: Path,
        layout: str,
        header: Mapping[str, Any],
        overwrite: bool,
        is_owner: bool,
    ) -> None:
        self._stack, self._path, self._layout = stack, path, layout
        self._header, self._overwrite = header, overwrite
        self._file: Any = None  # the current one: a TensorFileWriter, or a files.PendingFile
        self._folder: Any = None
        self._memory: dict[str, torch.Tensor] | None = None
        self._entries: Mapping[str, Entry] = {}
        with suppress(FileFormatError):
            if (
                overwrite
                and path.suffix == SUFFIX
                and path.is_file()
                and read_file(path).kind == "snapshot"
            ):
                raise OutputExistsError(
                    path, "is a snapshot of a run and is not replaced", "choose another name"
                )
        if is_owner:
            files.remove_leftovers(path.parent)
            if layout in FOLDERS:
                pending = files.PendingFolder(path, FOLDERS[layout] if overwrite else None)
                self._folder = stack.enter_context(pending)
        self.place = path if self._folder is None else self._folder.temporary

    def begin(self, name: str, entries: Mapping[str, Entry]) -> None:
        """Begin a file, into which these tensors go from now on."""
        self._entries, place = entries, self.place / name
        if self._layout in ("pt", "dcp"):
            self._memory = {}
        if self._layout == "pt":
            self._file = self._stack.enter_context(files.PendingFile(place, self._overwrite))
        elif self._layout != "dcp":
            files.make_directory(place.parent)
            writer = TensorFileWriter(place, entries, self._header, {}, self._overwrite)
            self._file = self._stack.enter_context(writer)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        if self._memory is not None:
            self._memory[name] = tensor
        else:
            self._file.write(name, tensor_bytes(tensor))

    def open_tile(self, tile: Tile) -> Writer:
        """Return the function that writes a tile under all names that its tensors have in the
        file."""
        if self._memory is not None:
            copy = open_in_memory(self._memory, torch.device("cpu"), tile)
            for name in tile.names:
                self._memory |= dict.fromkeys(tile.plan.names[name], self._memory[name])
            return copy
        item = ITEM_BYTES[tile.dtype]

        def write(values: torch.Tensor) -> None:
            view = tensor_bytes(values)
            for name, start, stop in tile.spans:
                for alias in tile.plan.names[name]:
                    if alias in self._entries:
                        self._file.write(alias, view[start * item : stop * item], tile.begin * item)

        return write

    def finish(self) -> None:
        """Finish the file; in the folder it gets its name, and in an object store it appears."""
        if self._memory is not None:
            _save(self._memory, self._file, self._folder)
        elif self._layout in FOLDERS:
            self._file.commit()
            if files.is_url(self._path):
                self._folder.send()

    def publish(self, others: Others) -> None:
        """Add the other files of a folder, and give the output its name."""
        if self._folder is None:
            self._file.commit() if self._memory is None else self._file.publish()
            return
        for name, other in others.items():
            place = self.place / name
            files.make_directory(place.parent)
            if isinstance(other, bytes):
                files.write_atomically(place, other)
                continue
            with files.reported_as_write_error(other, "copied"):
                shutil.copyfile(other, place)
        self._folder.publish()


def _save(tensors: dict[str, Any], file: Any, folder: Any) -> None:
    """Save tensors as a .pt file or, without `file`, in a folder of
    torch.distributed.checkpoint."""
    if file is None:
        from torch.distributed.checkpoint.api import CheckpointException  # slow to import
        from torch.distributed.checkpoint.state_dict_saver import save

        with files.reported_as_write_error(folder.path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is only one process
            try:
                save(tensors, checkpoint_id=str(folder.temporary), no_dist=True)
            except CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from error
        return
    end = 0

    def write(data: Any) -> int:
        nonlocal end
        file.write_at(data, end)
        size = memoryview(data).nbytes
        end += size
        return size

    try:
        torch.save(tensors, SimpleNamespace(write=write, flush=lambda: None))
    # torch's own, which replaces that of `write`, and a KeyboardInterrupt
    except RuntimeError as error:
        raise error.__context__ or error from None


def write_outputs(
    paths: Sequence[Path],
    layout: str,
    parts: Parts,
    headers: Sequence[Mapping[str, Any]],
    fill: Callable[[Sequence[Output], Mapping[str, Entry]], None],
    others: Others,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
) -> None:
    """Write outputs of the same tensors, each with its header, and create their folder.

    `fill` writes the tensors of a file into each output. No output appears before all are complete,
    except for shards in an object store, whose index comes last. Raises OutputExistsError, and
    WriteError, before anything is written if the outputs do not fit on the disk.
    """
    is_remote, is_first = files.is_url(paths[0]), ranks.rank == 0
    is_owner = is_first or is_remote
    with ExitStack() as stack:
        with ranks.together() as places:
            if is_owner:
                stack.enter_context(files.new_directory(paths[0].parent))
                copied = sum(
                    other.stat().st_size for other in others.values() if isinstance(other, Path)
                )
                # of those in a store, one at a time is on this disk
                sizes = [0, *map(nbytes, parts.values())]
                needed = len(paths) * ((max if is_remote else sum)(sizes) + copied)
                place = Path(tempfile.gettempdir()) if is_remote else paths[0].parent
                if needed > (free := shutil.disk_usage(place).free):
                    reason = (
                        f"the output takes {needed:,} bytes, and {free:,} are free on this disk"
                    )
                    hint = (
                        "set TMPDIR to a folder with room, or make smaller shards: max_shard_size"
                        * is_remote
                    )
                    raise WriteError(place, reason, hint, errno=errno.ENOSPC)
            outputs = [
                Output(stack, path, layout, header, overwrite, is_owner)
                for path, header in zip(paths, headers, strict=True)
            ]
            places += [output.place for output in outputs]
        with ranks.together():
            for output, place in zip(outputs, places, strict=True):
                output.place = output.place if is_owner else place
            for name in [*parts][ranks.rank :: ranks.world]:
                for output in outputs:
                    output.begin(name, parts[name])
                fill(outputs, parts[name])
                for output in outputs:
                    output.finish()
        with ranks.together():
            for output in outputs if is_first else ():
                output.publish(others)
        for output in outputs if is_remote and not is_first else ():
            output.publish({})  # nothing is left to send


# --- the synthesis


@dataclass(frozen=True)
class SynthesisReport:
    """The plan of a synthesis, and its result."""

    plan: Plan
    outputs: tuple[Path, ...] = ()  # one per target; empty in a dry run
    # tensors that the run lacks and that were copied from the model folder
    taken: tuple[str, ...] = ()
    device: str = "cpu"  # computed the sums
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        report = self.plan.to_dict()
        for index, target in enumerate(report["targets"]):
            target["output"] = str(self.outputs[index]) if self.outputs else None
            target["seconds"] = self.seconds
            target["bytes"] = self.plan.nbytes
        left_out = [name for name in self.plan.newest.left_out if not name.endswith("_extra_state")]
        later = (
            f" (the newest is of {self.plan.last:,.12g})" if self.plan.last != self.plan.t else ""
        )
        return report | {
            "device": self.device,
            "sources": counted(self.plan.sources) + later,
            "choice": self.plan.choice,
            "read_bytes": self.plan.read_bytes,
            "left_out": left_out,
            **({"from_model_folder": list(self.taken)} if self.taken else {}),
        }


def write_synthesis(
    plan: Plan,
    paths: Sequence[Path],
    options: OutputOptions = OutputOptions(),
    like: ModelFolder | None = None,
    ranks: Ranks = ALONE,
    progress: ProgressBar = no_bar,
) -> SynthesisReport | None:
    """Synthesize every target of a plan into its path; see also `write_outputs`. Returns None in
    all ranks but one.

    In a job this rank's share of the files is made. `like` is the model folder that outputs are
    copies of.
    """
    started, taken = time.perf_counter(), dict[str, TensorFile]()
    wanted, workers = options.device, options.workers
    if ranks.world > 1:  # those of one machine share its cores, and each uses another device
        rank, count = (
            int(os.environ.get("LOCAL_RANK", 0)),
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )
        workers = max(1, worker_count() // count)
        if str(wanted) == "cuda":
            wanted = f"cuda:{rank % max(1, torch.cuda.device_count())}"
    device = check_device(wanted)

    def fill(outputs: Sequence[Output], entries: Mapping[str, Entry]) -> None:
        for name in filter(entries.__contains__, taken):
            tensor = taken[name].tensor(name)
            for output in outputs:
                output.write(name, tensor)
        subset = frozenset(
            name for name, aliases in plan.names.items() if not entries.keys().isdisjoint(aliases)
        )
        openers = [output.open_tile for output in outputs]
        with closing(
            synthesize_into(replace(plan, subset=subset), openers, device, workers, advance)
        ) as tiles:
            for _ in tiles:
                pass

    if paths:
        if like is not None:
            layout, (plan, parts, others) = "like", like.arranged(plan)
            taken = {name: file for name, file in like.stored.items() if name not in plan.entries}
        else:
            layout = "sharded" if options.distributed else layout_of(paths[0], options.layout)
            parts, others = files_of(layout, plan.entries, options, ranks.world)
        headers = [plan.output_info(index).encoded() for index in range(len(plan.targets))]
        with (no_bar if ranks.rank else progress)(
            "synthesizing", plan.read_bytes // ranks.world
        ) as advance:
            write_outputs(paths, layout, parts, headers, fill, others, options.overwrite, ranks)
    report = SynthesisReport(
        plan, tuple(paths), tuple(taken), str(device), time.perf_counter() - started
    )
    return None if ranks.rank else report

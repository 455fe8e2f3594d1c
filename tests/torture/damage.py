"""One small file of each kind: every flipped bit and every truncation is found before a result is written."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from factories import split_snapshot, write_snapshot

from posthoc_cli import Run
from posthoc_cli.errors import FileFormatError
from posthoc_cli.export.convert import export_file
from posthoc_cli.reconstruction import Measurements, Sketch
from posthoc_cli.snapshots.outputs import INDEX_NAME, decode_index, decode_output
from posthoc_cli.snapshots.path import PathSketch, encode_path
from posthoc_cli.snapshots.snapshot import decode_snapshot
from posthoc_cli.snapshots.tensorfile import read_file, tensor_bytes
from posthoc_cli.snapshots.verify import verify
from torture import Tally

RUN_ID = "ab12" * 8
VALUES = {"a": torch.tensor([1.0, -2.5]), "b": torch.tensor([7], dtype=torch.int16)}
DECODERS: dict[str | None, Callable[..., object]] = {"snapshot": decode_snapshot, "output": decode_output}

Content = dict[str, object]
"""The content of a file: the bytes of each tensor by name, and the metadata under ""."""


def examine(path: Path) -> Content:
    """Verify a snapshot, an output, or the shards of an index as `ema verify` does; return the content.

    Raises:
        PostHocError: naming the file.
    """
    found = verify(path)
    for report in found.files:
        if not report.is_fine:
            raise FileFormatError(report.path, report.detail)
    if found.problems:
        raise FileFormatError(path, found.problems[0])
    content: Content = {}
    for shard in [path.parent / name for name in decode_index(path)] if path.name == INDEX_NAME else [path]:
        with read_file(shard) as file:
            if file.kind not in DECODERS:
                raise FileFormatError(shard, f"its kind is {str(file.kind)[:40]!r}")
            content |= {"": DECODERS[file.kind](file)}
            content |= {name: bytes(tensor_bytes(file.tensor(name))) for name in file.entries}
    return content


@dataclass(frozen=True)
class Victim:
    """A file that will be damaged, and a use of it."""

    kind: str
    path: Path
    use: Callable[[], object]
    """Uses the file as a command does: writes `out` and returns its content."""
    out: Path
    named: str
    """The path that an error must name: the file, or the folder of an index and its shards."""

    def results(self, tally: Tally, what: str, named: str = "") -> list[object]:
        """Return what `examine` and `use` give; None after an error of this package, which must contain `named`."""
        found: list[object] = []
        for how, act in (("examined", lambda: examine(self.path)), ("used", self.use)):
            found.append(None)
            with tally.judged(f"{what}, {how}", named):
                found[-1] = act()
            if found[-1] is None and self.out.exists():
                tally.lost.append(f"{what}, {how}: an output was left")
            self.out.unlink(missing_ok=True)
        return found


# --- one of each kind


def all_victims(folder: Path) -> Iterator[Victim]:
    """Yield one file of each kind."""
    for make in (small_snapshot, small_part, small_output, small_index, small_shard):
        (folder / make.__name__).mkdir()
        yield make(folder / make.__name__)


def small_snapshot(folder: Path, values: dict[str, torch.Tensor] | None = None) -> Victim:
    """Write a snapshot, which a synthesis reads."""
    sketch = Sketch(np.array([1.0, 5.0, 10.0]), np.ones(2), np.array([[0.0, 0.0], [0.5, 0.25]]), np.zeros(2))
    path = write_snapshot(
        folder / "run", 10, 0.05, RUN_ID, values or VALUES, sigma_rels=(0.05, 0.28), aliases={"tied": "a"},
        left_out=("frozen",), measurements=Measurements(7.25, 1e-7), clock=((10, 10.0),),
        sketch=encode_path(PathSketch(1, sketch)),
    )  # fmt: skip
    out = folder / "out.safetensors"
    return Victim("snapshot", path, lambda: synthesize(folder / "run", out), out, str(path))


def small_part(folder: Path) -> Victim:
    """Write a snapshot of two parts, which a synthesis reads; the victim is the second part."""
    unsplit = small_snapshot(folder, {"a": torch.tensor([[1.0], [-2.5]]), "b": VALUES["b"]})
    path = split_snapshot(unsplit.path, 2) / "part-00002-of-00002.safetensors"
    return Victim("part", path, unsplit.use, unsplit.out, path.parent.name)


def small_output(folder: Path) -> Victim:
    """Write the output of a synthesis, which an export reads."""
    path = folder / "made.safetensors"
    synthesize(small_snapshot(folder / "source").path.parent, path)
    return _exported("output", path, path, folder)


def small_index(folder: Path) -> Victim:
    """Write an output in two shards, which an export reads; the victim is the index."""
    shards = folder / "shards"
    export_file(small_output(folder).path, shards, max_shard_size="10")
    return _exported("index", shards / INDEX_NAME, shards, folder)


def small_shard(folder: Path) -> Victim:
    """Write an output in two shards; the victim is the first shard."""
    index = small_index(folder)
    path = index.path.with_name("model-00001-of-00002.safetensors")
    return Victim("shard", path, index.use, index.out, str(path))


def synthesize(run: Path, out: Path) -> Content:
    """Synthesize the tracked average; return the content of the output."""
    Run(run).write([0.05], out, overwrite=True)
    return examine(out)


def _exported(kind: str, path: Path, source: Path, folder: Path) -> Victim:
    out = folder / "out.safetensors"

    def use() -> object:
        export_file(source, out)
        return examine(out)

    return Victim(kind, path, use, out, str(source))


# --- damage


def flip_bits(folder: Path, share: float, seed: int) -> Tally:
    """Flip every single bit of every small file."""

    def flipped(data: bytes, place: int) -> bytes:
        byte, bit = divmod(place, 8)
        return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]

    return _harm(folder, "flipped at bit", flipped, lambda data: 8 * len(data), share, seed)


def truncate(folder: Path, share: float, seed: int) -> Tally:
    """Cut every small file to every shorter length."""
    return _harm(folder, "cut to bytes", lambda data, count: data[:count], len, share, seed)


def _harm(
    folder: Path, harm: str, change: Callable[[bytes, int], bytes], count: Callable[[bytes], int], share: float,
    seed: int,
) -> Tally:  # fmt: skip
    """Damage each file in a share of all ways, one at a time: each is found or, in an index, changes nothing."""
    tally, chance = Tally(), random.Random(seed)
    for victim in all_victims(folder):
        intact, data = victim.results(tally, victim.kind), victim.path.read_bytes()
        is_index = victim.path.name == INDEX_NAME  # has no checksum: some damage changes nothing
        for number in chance.sample(range(count(data)), max(1, round(share * count(data)))):
            victim.path.write_bytes(change(data, number))
            tally.tried += 1
            what = f"{victim.kind}, {harm} {number}"
            for result, before in zip(victim.results(tally, what, victim.named), intact, strict=True):
                if result is not None and not (is_index and result == before):
                    tally.missed.append(f"{what}: not found")
        victim.path.write_bytes(data)
        if victim.results(tally, victim.kind) != intact or None in intact:
            tally.lost.append(f"{victim.kind}: differs from before")
    return tally

"""Small files of every kind with a use of each, experiments that damage them, and forged headers.

A header is parsed into a tree of lists, changed anywhere, and sealed again with a correct checksum.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from factories import split_snapshot, write_snapshot

from posthoc_cli import disk_sources
from posthoc_cli.errors import FileFormatError
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.layouts import OutputOptions
from posthoc_cli.export.writing import write_synthesis
from posthoc_cli.reconstruction import Measurements, Sketch
from posthoc_cli.snapshots.codecs import PathSketch, encode_path
from posthoc_cli.snapshots.outputs import INDEX_NAME, decode_index, decode_output
from posthoc_cli.snapshots.snapshot import decode_snapshot
from posthoc_cli.snapshots.tensorfile import read_file, tensor_bytes
from posthoc_cli.snapshots.verify import verify
from posthoc_cli.synthesis.plan import plan_synthesis
from torture import Tally

RUN_ID = "ab12" * 8
VALUES = {"a": torch.tensor([1.0, -2.5]), "b": torch.tensor([7], dtype=torch.int16)}

Content = dict[str, object]
"""The content of a file: the bytes of each tensor by name, and the metadata under ""."""


def examine(path: Path) -> Content:
    """Verify a snapshot, an output, a state, or the shards of an index as `ema verify` does; return the content.

    Raises:
        PostHocError: naming the file.
    """
    for report in verify(path).files:
        if not report.is_fine:
            raise FileFormatError(report.path, report.detail)
    content: Content = {}
    for shard in [path.parent / name for name in decode_index(path).shards] if path.name == INDEX_NAME else [path]:
        with read_file(shard) as file:
            if file.kind not in DECODERS:
                raise FileFormatError(shard, f"its kind is {str(file.kind)[:40]!r}")
            content |= {"": DECODERS[file.kind](file)}
            content |= {name: bytes(tensor_bytes(file.tensor(name))) for name in file.entries}
    return content


DECODERS: dict[str | None, Callable[..., object]] = {
    "snapshot": decode_snapshot, "output": decode_output,
}  # fmt: skip
REFUSED = object()


@dataclass(frozen=True)
class Victim:
    """A file that will be damaged, and a use of it."""

    kind: str
    path: Path
    use: Callable[[], object]
    """Uses the file as a command does; returns the content of the result."""
    out: Path
    """The output of `use`, if it writes one."""
    named: str
    """The path that an error must name: the file, or the folder of an index and its shards."""

    @property
    def is_index(self) -> bool:
        """Whether the file is an index, which has no checksum, so that some damage changes nothing."""
        return self.path.name == INDEX_NAME

    def attempt(self, tally: Tally, what: str, act: Callable[[], object], named: str) -> object:
        """Return the result of `act`, or REFUSED after an error of this package, which must name `named`."""
        result = REFUSED
        with tally.judged(what, named):
            result = act()
        if result is REFUSED and self.out.exists():
            tally.lost.append(f"{what}: an output was left"[:4_000])
        self.out.unlink(missing_ok=True)
        return result

    def intact(self) -> tuple[object, object]:
        """Return the content of the intact file, and the result of its use."""
        results = examine(self.path), self.use()
        self.out.unlink(missing_ok=True)
        return results


def all_victims(folder: Path) -> Iterator[Victim]:
    """Yield one file of each kind."""
    for make in (small_snapshot, small_part, small_output, small_index, small_shard):
        (folder / make.__name__).mkdir()
        yield make(folder / make.__name__)


def harm_all(
    folder: Path, harm: str, change: Callable[[bytes, int], bytes], count: Callable[[Victim, bytes], int],
    share: float, seed: int,
) -> Tally:  # fmt: skip
    """Damage each file in a share of all ways, one at a time: each is detected or, in an index, changes nothing.

    Arguments:
        harm: the damage in words.
        change: returns the content of a file after the change with a number, counted from 0.
        count: returns the number of changes.
    """
    tally, chance = Tally(), random.Random(seed)
    for victim in all_victims(folder):
        intact, data = victim.intact(), victim.path.read_bytes()
        numbers = range(count(victim, data))
        for number in chance.sample(numbers, max(1, round(share * len(numbers)))):
            victim.path.write_bytes(change(data, number))
            tally.tried += 1
            ways = (("examined", lambda: examine(victim.path)), ("used", victim.use))  # noqa: B023
            for (how, act), before in zip(ways, intact, strict=True):
                what = f"{victim.kind}, {harm} {number}, {how}"
                result = victim.attempt(tally, what, act, victim.named)
                if result is not REFUSED and not (victim.is_index and result == before):
                    tally.missed.append(f"{what}: not found")
        victim.path.write_bytes(data)
        if victim.intact() != intact:
            tally.lost.append(f"{victim.kind}: differs from before")
    return tally


# --- one of each kind


def small_snapshot(folder: Path, values: dict[str, torch.Tensor] | None = None) -> Victim:
    """Write a snapshot, which a synthesis reads."""
    measured = Measurements(7.25, 1e-7)
    sketch = Sketch(np.array([1.0, 5.0, 10.0]), np.ones(2), np.array([[0.0, 0.0], [0.5, 0.25]]), np.zeros(2))
    path = write_snapshot(
        folder / "run", 10, 0.05, RUN_ID, values or VALUES, sigma_rels=(0.05, 0.28), aliases={"tied": "a"},
        left_out=("frozen",), measurements=measured, clock=((10, 10.0),), sketch=encode_path(PathSketch(1, sketch)),
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


def _exported(kind: str, path: Path, source: Path, folder: Path) -> Victim:
    out = folder / "out.safetensors"

    def use() -> object:
        export_file(source, out)
        return examine(out)

    return Victim(kind, path, use, out, str(source))


class Tiny(torch.nn.Module):
    """Two parameters and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
        self.register_buffer("count", torch.tensor(3, dtype=torch.int16))


def synthesize(run: Path, out: Path) -> object:
    """Synthesize the tracked average; return the content of the output."""
    write_synthesis(plan_synthesis(disk_sources(run), [0.05]), [out], OutputOptions(overwrite=True))
    return examine(out)


# --- headers

MARK = b'"ema.checksum":"'


class Pair(list[Any]):
    """A key (a string, or `Raw`) and its value."""


class Pairs(list[Pair]):
    """A JSON object in which a key may occur twice."""


class Inner(list[Any]):
    """A string that contains JSON: its one item."""


@dataclass(frozen=True)
class Raw:
    """Text that is written unchanged; its surrogate escapes become bytes that are not UTF-8."""

    text: str


def pairs(items: Iterable[tuple[Any, Any]]) -> Pairs:
    """Return keys and values as an object."""
    return Pairs(map(Pair, items))


def take_apart(path: Path) -> tuple[Pairs, bytes]:
    """Return the header of a file as a tree, and the payload, which an index does not have."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return json.loads(data, object_pairs_hook=pairs), b""
    end = 8 + int.from_bytes(data[:8], "little")
    tree = json.loads(data[8:end], object_pairs_hook=pairs)
    for pair in next((value for key, value in tree if key == "__metadata__"), ()):
        pair[1] = _inner(pair[1])
    return tree, data[end:]


def _inner(text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except ValueError:
        return text
    return Inner([value]) if isinstance(value, list) or dump(value) == text else text


def dump(tree: Any) -> str:
    """Return a tree as JSON without spaces."""
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(value)}" for key, value in tree) + "}"
    if isinstance(tree, Inner):
        return dump(dump(tree[0]))
    if isinstance(tree, list):
        return "[" + ",".join(map(dump, tree)) + "]"
    if isinstance(tree, Raw):
        return tree.text
    is_text = isinstance(tree, str) and not any("\ud800" <= c <= "\udfff" for c in tree)
    return json.dumps(tree, ensure_ascii=not is_text)


def seal(tree: Any) -> bytes:
    """Return the bytes of a header, with a correct checksum if the header has a place for one."""
    text = dump(tree).encode("utf-8", "surrogateescape")
    blank = len(text).to_bytes(8, "little") + text
    before, mark, after = blank.partition(MARK)
    if not mark:
        return blank
    blank = before + mark + b"0" * 16 + after[16:]
    return before + mark + xxhash.xxh3_64_hexdigest(blank).encode() + after[16:]


def forge(path: Path, changes: Mapping[str, str | None]) -> Path:
    """Change values, given as JSON, in the object of a file's header, or remove them (None), and seal it again."""
    tree, payload = take_apart(path)
    own = next(pair for pair in tree[0][1] if pair[0] == "ema")
    changed = {**dict(own[1][0]), **{key: value and Raw(value) for key, value in changes.items()}}
    own[1] = Inner([pairs((key, value) for key, value in changed.items() if value is not None)])
    path.write_bytes(seal(tree) + payload)
    return path

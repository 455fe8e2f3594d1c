"""One small file of each kind: every flipped bit and every truncation is found before a result is written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from factories import split_snapshot
from snapshots.recorded import SMALL, Content, examine, small_output, small_snapshot, used

from posthoc_cli import export_file
from posthoc_cli.snapshots.outputs import INDEX_NAME
from torture import Tally


@dataclass(frozen=True)
class Victim:
    """A file that will be damaged, what a command reads it from, and the path that an error must name."""

    path: Path
    source: Path
    named: Path

    def results(self, tally: Tally, what: str) -> list[Content | None]:
        """Return what `examine` and `used` return; None after an error."""
        found: list[Content | None] = [None, None]
        out = self.source.with_name("out.safetensors")
        with tally.judged(what, str(self.named)):
            found[0] = examine(self.path)
        with tally.judged(what, str(self.named)):
            found[1] = used(self.source, out)
        if found[1] is None and out.exists():
            tally.lost.append(f"{what}: an output was left")
        out.unlink(missing_ok=True)
        return found


def all_victims(folder: Path) -> dict[str, Victim]:
    """Write one file of each kind."""
    snapshot, output = small_snapshot(folder / "snapshot"), small_output(folder / "output")
    unsplit = small_snapshot(folder / "parts", SMALL | {"a": torch.tensor([[1.0], [-2.5]])})
    part = split_snapshot(unsplit, 2) / "part-00002-of-00002.safetensors"
    shards = folder / "shards"
    export_file(output, shards, max_shard_size="10")
    index, shard = shards / INDEX_NAME, shards / "model-00001-of-00002.safetensors"
    return {
        "snapshot": Victim(snapshot, snapshot.parent, snapshot), "output": Victim(output, output, output),
        "part": Victim(part, unsplit.parent, part.parent),
        "index": Victim(index, shards, shards), "shard": Victim(shard, shards, shard),
    }  # fmt: skip


def flip_bits(folder: Path, share: float, seed: int) -> Tally:
    """Flip every single bit of every small file."""

    def flipped(data: bytes, place: int) -> bytes:
        byte, bit = divmod(place, 8)
        return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]

    return _harm(folder, flipped, 8, share, seed)


def truncate(folder: Path, share: float, seed: int) -> Tally:
    """Cut every small file to every shorter length."""
    return _harm(folder, lambda data, length: data[:length], 1, share, seed)


def _harm(folder: Path, change: Callable[[bytes, int], bytes], ways: int, share: float, seed: int) -> Tally:
    """Damage each file in a share of the `ways` a byte: each damage is found or, in an index, changes nothing."""
    tally, chance = Tally(), random.Random(seed)
    for kind, victim in all_victims(folder).items():
        intact, data = victim.results(tally, kind), victim.path.read_bytes()
        count = ways * len(data)
        for number in chance.sample(range(count), max(1, round(share * count))):
            victim.path.write_bytes(change(data, number))
            tally.tried += 1
            found = victim.results(tally, f"{kind}, damage {number}")
            for result, before in zip(found, intact, strict=True):
                if result is not None and not (kind == "index" and result == before):  # an index has no checksum
                    tally.missed.append(f"{kind}, damage {number}: not found")
        victim.path.write_bytes(data)
        if victim.results(tally, kind) != intact or None in intact:
            tally.lost.append(f"{kind}: differs from before")
    return tally

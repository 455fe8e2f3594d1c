"""Damage, exhaustively: bits, lengths, blocks of small files. Each must be found before a result is written."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import torch

from torture.tally import Experiment, Tally
from torture.victims import Victim, small_index, small_output, small_shard, small_snapshot, small_state

MAKERS: Sequence[Callable[[Path], Victim]] = (small_snapshot, small_output, small_state, small_index, small_shard)
BLOCK = 4096


def _victims(folder: Path) -> Iterator[Victim]:
    for make in MAKERS:
        (folder / make.__name__).mkdir()
        yield make(folder / make.__name__)


def _chosen(everything: Sequence[int], share: float, seed: int) -> list[int]:
    """A share of all, at least one."""
    count = max(1, round(share * len(everything)))
    return sorted(random.Random(seed).sample(everything, count))


def flip_bits(folder: Path, share: float, seed: int) -> Tally:
    """Every single bit of every small file."""
    tally = Tally()
    for victim in _victims(folder):
        intact, data = victim.intact(), victim.path.read_bytes()
        descriptor = os.open(victim.path, os.O_RDWR)
        for place in _chosen(range(8 * len(data)), share, seed):
            byte, bit = divmod(place, 8)
            os.pwrite(descriptor, bytes([data[byte] ^ 1 << bit]), byte)
            victim.tried(tally, f"bit {bit} of byte {byte} flipped", intact)
            os.pwrite(descriptor, data[byte : byte + 1], byte)
        os.close(descriptor)
        _check_whole(victim, intact, tally)
    return tally


def truncate(folder: Path, share: float, seed: int) -> Tally:
    """Every shorter length of every small file."""
    tally = Tally()
    for victim in _victims(folder):
        intact, data = victim.intact(), victim.path.read_bytes()
        for length in reversed(_chosen(range(len(data)), share, seed)):
            if victim.is_index and not data[length:].strip():
                continue  # the last line end
            os.truncate(victim.path, length)
            victim.tried(tally, f"cut to {length} bytes", intact)
        victim.path.write_bytes(data)
        _check_whole(victim, intact, tally)
    return tally


def move_blocks(folder: Path, share: float, seed: int) -> Tally:
    """Blocks of 4 KiB of a snapshot of 64 KiB: every pair swapped, every one zeroed, repeated, left out; and more
    bytes behind."""
    tally = Tally()
    values = {"a": torch.randn(8000), "b": torch.randn(8000).to(torch.float16)}
    victim = small_snapshot(folder, values)
    intact, data = victim.intact(), victim.path.read_bytes()
    harms = list(_block_harms(data))
    for number in _chosen(range(len(harms)), share, seed):
        harm, harmed = harms[number]
        victim.path.write_bytes(harmed)
        victim.tried(tally, harm, intact)
    victim.path.write_bytes(data)
    _check_whole(victim, intact, tally)
    return tally


def _block_harms(data: bytes) -> Iterator[tuple[str, bytes]]:
    blocks = [data[begin : begin + BLOCK] for begin in range(0, len(data), BLOCK)]
    for i, j in combinations(range(len(blocks)), 2):
        swapped = list(blocks)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        yield f"blocks {i} and {j} swapped", b"".join(swapped)
    for i, block in enumerate(blocks):
        for harm, other in (("zeroed", bytes(len(block))), ("left out", b""), ("repeated", 2 * block)):
            yield f"block {i} {harm}", b"".join([*blocks[:i], other, *blocks[i + 1 :]])
        for fill in (b"\x00", b"\xff"):
            yield f"block {i} filled", b"".join([*blocks[:i], fill * len(block), *blocks[i + 1 :]])
    for extra in (b"\0", b" ", b"\n", bytes(BLOCK), data[-BLOCK:], data):
        yield f"{len(extra)} bytes appended", data + extra
        yield f"{len(extra)} bytes put in front", extra + data


def _check_whole(victim: Victim, intact: tuple[object, object], tally: Tally) -> None:
    """That the last harm was undone, and what was harmed can still be used: the experiment saw what it meant to."""
    if victim.intact() != intact:
        tally.lost.append(f"{victim.kind}: is not what it was before")


EXPERIMENTS = [
    Experiment("every flipped bit", flip_bits, 0.05),
    Experiment("every truncation", truncate, 0.3),
    Experiment("blocks swapped, zeroed, repeated, appended", move_blocks, 0.2),
]

"""Damage, exhaustively: bits, lengths, blocks of small files. Each must be found before a result is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

import torch

from torture.tally import Experiment, Tally
from torture.victims import Victim, all_victims, harm_all, small_snapshot

BLOCK = 4096
Harm = tuple[str, Callable[[], object]]


def flip_bits(folder: Path, share: float, seed: int) -> Tally:
    """Every single bit of every small file."""
    return harm_all(all_victims(folder), _flips, share, seed)


def _flips(victim: Victim, data: bytes) -> Iterator[Harm]:
    for place in range(8 * len(data)):
        byte, bit = divmod(place, 8)
        yield f"bit {bit} of byte {byte} flipped", partial(_flip, victim.path, data, byte, bit)


def _flip(path: Path, data: bytes, byte: int, bit: int) -> None:
    path.write_bytes(data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :])


def truncate(folder: Path, share: float, seed: int) -> Tally:
    """Every shorter length of every small file."""
    return harm_all(all_victims(folder), _cuts, share, seed)


def _cuts(victim: Victim, data: bytes) -> Iterator[Harm]:
    for length in range(len(data)):
        if not victim.is_index or data[length:].strip():  # more than the last line end
            yield f"cut to {length} bytes", partial(os.truncate, victim.path, length)


def move_blocks(folder: Path, share: float, seed: int) -> Tally:
    """Blocks of 4 KiB of a snapshot of 64 KiB: every pair swapped, every one zeroed, repeated, left out; and more
    bytes behind."""
    values = {"a": torch.randn(8000), "b": torch.randn(8000).to(torch.float16)}
    return harm_all([small_snapshot(folder, values)], _moves, share, seed)


def _moves(victim: Victim, data: bytes) -> Iterator[Harm]:
    blocks = [data[begin : begin + BLOCK] for begin in range(0, len(data), BLOCK)]
    harmed = {}
    for i, j in combinations(range(len(blocks)), 2):
        swapped = list(blocks)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        harmed[f"blocks {i} and {j} swapped"] = b"".join(swapped)
    for i, block in enumerate(blocks):
        others = {"zeroed": bytes(len(block)), "filled": b"\xff" * len(block), "left out": b"", "repeated": 2 * block}
        for what, other in others.items():
            harmed[f"block {i} {what}"] = b"".join([*blocks[:i], other, *blocks[i + 1 :]])
    for extra in (b"\0", b" ", b"\n", bytes(BLOCK), data[-BLOCK:], data):
        harmed[f"{extra[:9]!r}: {len(extra)} bytes appended"] = data + extra
        harmed[f"{extra[:9]!r}: {len(extra)} bytes put in front"] = extra + data
    for what, content in harmed.items():
        yield what, partial(victim.path.write_bytes, content)


EXPERIMENTS = [
    Experiment("every flipped bit", flip_bits, 0.05),
    Experiment("every truncation", truncate, 0.3),
    Experiment("blocks swapped, zeroed, repeated, appended", move_blocks, 0.2),
]

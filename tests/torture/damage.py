"""Damage, exhaustively: bits, lengths, blocks of small files, and headers that lie under right checksums.

Each must be found before a result is written, or change nothing.
"""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.snapshots.description import describe
from torture.forging import Inner, Pairs, Raw, places, replaced, take_apart, written
from torture.tally import Tally
from torture.victims import Victim, all_victims, examine, harm_all, small_snapshot

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


# --- headers

NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "9" * 1_000_000, "0x10", "1_0", "--1")
NO_TEXTS = (
    '"\udcff"', '"\udcc3("', '"\udcc0\udcaf"', '"\udced\udca0\udc80"', '"\udcf0\udc9f"',  # no UTF-8
    '"\\ud800"', '"\\udfff\\ud800"', '"a\\u0000b"', '"\\u0000"', '"\x00"', '"\x1b"', '"\n"', '"\\x"', "'a'",
)  # fmt: skip
DEPTHS = (100, 900, 2_000, 100_000)
HUGE = 2 * 10**9


def lie(folder: Path, share: float, seed: int) -> Tally:
    """Every kind of lie, at every place of every header."""
    return harm_all(all_victims(folder), _harms, share, seed)


def _harms(victim: Victim, _: bytes) -> Iterator[Harm]:
    tree, payload = take_apart(victim.path)
    if victim.kind == "part":  # without what is there for readers of torch alone
        (key, metadata), *others = tree
        tree = Pairs([(key, Pairs(pair for pair in metadata if not pair[0].startswith("DCP_"))), *others])
    for what, lied in _lies(tree):
        yield what, partial(_write, victim, lied, payload)
    # A header of 2 GB, declared alone and really there, as a hole in the file.
    yield "a header of 2 GB", partial(_make_huge, victim, True)
    if not victim.is_index:
        yield "a header of 2 GB, declared alone", partial(_make_huge, victim, False)


def _write(victim: Victim, tree: Any, payload: bytes) -> None:
    victim.path.write_bytes(written(tree, payload, victim.is_index))


def _make_huge(victim: Victim, really: bool) -> None:
    if not victim.is_index:
        victim.path.write_bytes(HUGE.to_bytes(8, "little") + victim.path.read_bytes()[8:])
    if really:
        os.truncate(victim.path, HUGE + 8)


def _lies(tree: Any) -> Iterator[tuple[str, Any]]:
    for at, found, _ in places(tree):
        for key, value in found if isinstance(found, Pairs) else ():
            yield f"key {key!r} twice, at {at}", replaced(tree, at, Pairs([*found, (key, value)]))
            yield f"key {key!r} twice, null first, at {at}", replaced(tree, at, Pairs([(key, None), *found]))
        if _is_number(found):
            for other in NO_NUMBERS:
                new = other if isinstance(found, str) else Raw(other)
                yield f"{found!r} at {at} became {other[:20]}", replaced(tree, at, new)
        if isinstance(found, str):
            for other in NO_TEXTS:
                yield f"{found[:20]!r} at {at} became {other!a}", replaced(tree, at, Raw(other))
        for depth in DEPTHS:
            for opened, closed in (("[", "]"), ('{"a":', "}")):
                nested = Raw(opened * depth + "0" + closed * depth)
                yield f"{depth} times {opened} at {at}", replaced(tree, at, nested)
    yield from _wrong_offsets(tree)


def _is_number(found: Any) -> bool:
    """A number of JSON, or a metadata value that is one."""
    if isinstance(found, Inner):
        return False
    try:
        float(found)
    except (TypeError, ValueError):
        return False
    return not isinstance(found, bool)


def _wrong_offsets(tree: Any) -> Iterator[tuple[str, Any]]:
    """Offsets that overlap, leave gaps, descend, lie outside, or are not those of the shape."""
    for at, found, _ in places(tree):
        if not (isinstance(found, Pairs) and [key for key, _ in found] == ["dtype", "shape", "data_offsets"]):
            continue
        begin, end = found[2][1]
        wrong = [
            [end, begin], [begin, begin], [end, end], [0, end - begin + 1], [begin + 1, end + 1], [begin - 1, end - 1],
            [begin + 2**40, end + 2**40], [begin, 10**10], [begin - 2**63, end], [-begin - 1, -end - 1],
            [begin + 2**63, end + 2**63], [begin + 2**64, end + 2**64], [begin], [begin, end, end], [begin, str(end)],
            [float(begin), float(end)], [False, True], [None, None],
        ]  # fmt: skip
        for offsets in wrong:
            yield f"offsets {offsets} at {at}", replaced(tree, (*at, 5), offsets)
        for shape in ([-1], [2**62, 4], [0], [0, 2**62], [1.0], [True], ["1"], [1] * 100_000, [10**10], [[1]], 1):
            yield f"shape {str(shape)[:30]} at {at}", replaced(tree, (*at, 3), shape)


# --- headers changed at random

EXAMPLES = 4_000
"""Of each kind of file, for a share of 1."""

SLOWEST = 10.0
"""Seconds that a file of 2 KB may take on a busy machine."""

ODD_TEXTS = (
    "", "a", "b", "w", "tied", "__metadata__", "../../x", "/etc/x", "C:\\x", "A", "é", "e\u0301", "\x1b]0;x\x07",
    "\u202e", "\ud800", "\0", "$x$", "=1", "state", "output", "snapshot", "1", "-0", "1e999", "null", "F32", "F8_E5M2",
    "0.05/w", "copy/w", "x" * 10_000, "model-00001-of-00002.safetensors", "[" * 2_000, "{}", "[]",
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 2, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1.5, 0.05, 0.28, 0.2886, 1e308,
    5e-324, 1e-300, -1e308, True, False, None,
)  # fmt: skip
OTHERS = (Raw("NaN"), Raw("1e999"), Raw('"\udcff"'), Inner(Pairs()), Inner([]), [], Pairs())


def fuzz(folder: Path, share: float, seed: int) -> Tally:
    """Change one or two things in a header, many times: one error of the package, or a file that can be described."""
    tally, chance = Tally(), random.Random(seed)
    for victim in all_victims(folder):
        tree, payload = take_apart(victim.path)
        uses = {"examined": lambda: examine(victim.path), "info": lambda: _info(victim.path)}  # noqa: B023
        for _ in range(max(10, round(share * EXAMPLES))):
            changed = _mutated(tree, chance)
            content = written(
                _mutated(changed, chance) if chance.random() < 0.25 else changed, payload, victim.is_index
            )
            victim.path.write_bytes(content)
            started = time.monotonic()
            for name, use in uses.items():
                tally.tried += 1
                with warnings.catch_warnings():
                    warnings.simplefilter("error", RuntimeWarning)
                    victim.attempt(tally, f"{victim.kind}, {name}, of {content!r}", use, str(victim.path.parent))
            if time.monotonic() - started > SLOWEST:
                tally.missed.append(f"{victim.kind}: took {time.monotonic() - started:.0f} s: {content!r}"[:2000])
    return tally


def _info(path: Path) -> None:
    json.dumps(describe(path), allow_nan=False).encode()


def _mutated(tree: Any, chance: random.Random) -> Any:
    """The tree with one thing in it dropped, doubled, or become another."""
    everything = list(places(tree))
    at, found, is_key = chance.choice(everything)
    kind = chance.choice(("like", "like", "like", "odd", "drop", "double", "other"))
    if is_key:
        return replaced(tree, at, chance.choice(ODD_TEXTS))
    if kind in ("drop", "double") and isinstance(found, list) and found:
        index = chance.randrange(len(found))
        rest = [*found[:index], *found[index + 1 :]] if kind == "drop" else [*found, found[index]]
        return replaced(tree, at, type(found)(rest))
    if kind == "like" and isinstance(found, str | int | float):
        return replaced(tree, at, chance.choice(ODD_TEXTS if isinstance(found, str) else ODD_NUMBERS))
    if kind == "other":
        return replaced(tree, at, chance.choice(everything)[1])
    return replaced(tree, at, _odd(chance))


def _odd(chance: random.Random) -> Any:
    """Anything, also a list or an object of such."""
    if chance.random() < 0.3:
        return [_odd(chance)] if chance.random() < 0.5 else Pairs([(chance.choice(ODD_TEXTS), _odd(chance))])
    return chance.choice((chance.choice(ODD_TEXTS), chance.choice(ODD_NUMBERS), chance.random(), chance.choice(OTHERS)))

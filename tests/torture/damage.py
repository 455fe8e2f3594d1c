"""Damage, exhaustively: every bit and every length of small files, found before a result is written.

And headers that lie under right checksums: an error of the package, or a file that can be described.
"""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from posthoc_cli.snapshots.outputs import describe
from torture.forging import Inner, Pairs, Raw, places, replaced, take_apart, written
from torture.tally import Tally
from torture.victims import Victim, all_victims, examine, harm_all

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
NO_JSON = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "9" * 1_000_000, "0x10", "1_0", "--1", "'a'",
    '"\udcff"', '"\udcc3("', '"\udcc0\udcaf"', '"\udced\udca0\udc80"', '"\udcf0\udc9f"',  # no UTF-8
    '"\\ud800"', '"\\udfff\\ud800"', '"a\\u0000b"', '"\\u0000"', '"\x00"', '"\x1b"', '"\n"', '"\\x"',
    *("[" * depth + "0" + "]" * depth for depth in (100, 900, 2_000, 100_000)),
    *('{"a":' * depth + "0" + "}" * depth for depth in (100, 900, 2_000, 100_000)),
)  # fmt: skip
OTHERS = (*map(Raw, NO_JSON), Inner(Pairs()), Inner([]), [], Pairs())


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

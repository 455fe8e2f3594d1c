"""Exhaustive damage: every flipped bit and every truncation of small files is found before a result is written.

Headers with correct checksums are tried as well: changed at random, each gives an error of the package or a file that
can be described; built to be expensive, each takes time and memory in proportion to the size of the file.
"""

from __future__ import annotations

import copy
import json
import random
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from factories import RUN_ID, exact_gamma

from posthoc_cli.snapshots.outputs import INDEX_NAME, decode_index, describe
from torture import Tally
from torture.victims import (
    Inner,
    Pair,
    Pairs,
    Raw,
    Victim,
    all_victims,
    dump,
    examine,
    harm_all,
    pairs,
    seal,
    small_snapshot,
    take_apart,
)


def flip_bits(folder: Path, share: float, seed: int) -> Tally:
    """Flip every single bit of every small file."""

    def flipped(data: bytes, place: int) -> bytes:
        byte, bit = divmod(place, 8)
        return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]

    return harm_all(folder, "flipped at bit", flipped, lambda _, data: 8 * len(data), share, seed)


def truncate(folder: Path, share: float, seed: int) -> Tally:
    """Cut every small file to every shorter length, an index without its last line end."""

    def length(victim: Victim, data: bytes) -> int:
        return len(data.rstrip() if victim.is_index else data)

    return harm_all(folder, "cut to bytes", lambda data, count: data[:count], length, share, seed)


# --- headers changed at random

EXAMPLES = 10_000
"""The number of examples for each kind of file with a share of 1."""

SLOWEST = 10.0
"""The time limit, in seconds, for a file of 2 KB on a busy machine."""

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
OTHERS = (*map(Raw, NO_JSON), Inner([Pairs()]), Inner([[]]), [], Pairs())


def fuzz(folder: Path, share: float, seed: int) -> Tally:
    """Change one or two values in a header, many times: each gives an error, or a file that can be described."""
    tally, chance = Tally(), random.Random(seed)
    for victim in all_victims(folder):
        tree, payload = take_apart(victim.path)
        uses = {
            "examined": partial(examine, victim.path),
            "info": lambda: json.dumps(describe(victim.path), allow_nan=False).encode(),  # noqa: B023
        }
        for _ in range(max(10, round(share * EXAMPLES))):
            changed = _mutated(tree, chance)
            content = dump(changed).encode("utf-8", "surrogateescape") if victim.is_index else seal(changed) + payload
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


def _mutated(tree: Any, chance: random.Random) -> Any:
    """Return a copy of the tree with one or two nodes dropped, doubled or replaced."""
    root = [copy.deepcopy(tree)]
    for _ in range(2 if chance.random() < 0.25 else 1):
        everything = list(_places(root))
        container, index = chance.choice(everything)
        node, kind = container[index], chance.choice(("like", "like", "like", "odd", "drop", "double", "other"))
        if isinstance(container, Pair) and index == 0:
            container[0] = chance.choice(ODD_TEXTS)
        elif kind in ("drop", "double") and isinstance(node, list) and node and not isinstance(node, Inner):
            at = chance.randrange(len(node))
            node[at : at + 1] = [] if kind == "drop" else [node[at], node[at]]
        elif kind == "like" and isinstance(node, str | int | float):
            container[index] = chance.choice(ODD_TEXTS if isinstance(node, str) else ODD_NUMBERS)
        elif kind == "other":
            other, at = chance.choice(everything)
            container[index] = copy.deepcopy(other[at])
        else:
            container[index] = _odd(chance)
    return root[0]


def _places(tree: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Yield each node of a tree as the list that contains it and its index."""
    for index, item in enumerate(tree):
        if not isinstance(item, Pair):
            yield tree, index
        if isinstance(item, list):
            yield from _places(item)


def _odd(chance: random.Random) -> Any:
    """Return an arbitrary odd value, sometimes in a list or an object."""
    if chance.random() < 0.3:
        return [_odd(chance)] if chance.random() < 0.5 else pairs([(chance.choice(ODD_TEXTS), _odd(chance))])
    return copy.deepcopy(
        chance.choice((chance.choice(ODD_TEXTS), chance.choice(ODD_NUMBERS), chance.random(), chance.choice(OTHERS)))
    )


# --- headers that could cost time or memory

MEGABYTE = 1_000_000
BYTES_A_BYTE = 80
"""The memory limit per byte of a file; the worst case are empty lists, `[],`: 56 bytes and 8 for the reference."""

SECONDS_A_MEGABYTE = 10.0
"""The time limit on a busy machine that traces every allocation; quadratic time would be minutes."""


def bound(folder: Path, share: float, _: int) -> Tally:
    """Try every expensive header and index, with files of up to 10 MB."""
    tally, size = Tally(), max(50_000, round(share * 10 * MEGABYTE))
    victim = small_snapshot(folder)
    tree, payload = take_apart(victim.path)
    for what, header in _headers(tree, size):
        victim.path.write_bytes(header + payload)
        _measure(tally, what, victim.path)
    for what, text in _texts(size):
        index = folder / INDEX_NAME
        index.write_bytes(text)
        _measure(tally, f"index, {what}", index)
    return tally


def _measure(tally: Tally, what: str, path: Path) -> None:
    tally.tried += 1
    size = path.stat().st_size
    tracemalloc.start()
    started = time.process_time()
    with tally.judged(what):
        decode_index(path) if path.name == INDEX_NAME else examine(path)
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if peak > BYTES_A_BYTE * size + MEGABYTE:
        tally.missed.append(f"{what}: {size:,} bytes took {peak:,} of memory")
    if seconds > 1 + SECONDS_A_MEGABYTE * size / MEGABYTE:
        tally.missed.append(f"{what}: {size:,} bytes took {seconds:.1f} s")


def _texts(size: int) -> Iterator[tuple[str, bytes]]:
    """Yield the most expensive JSON texts of this size."""
    tricks = {
        "nested lists": b"[" * size, "nested objects": b'{"a":' * (size // 5),
        "empty lists": b"[" + b"[]," * (size // 3) + b"[]]", "empty objects": b"[" + b"{}," * (size // 3) + b"{}]",
        "numbers": b"[" + b"1.5," * (size // 4) + b"0]", "a long number": b"[" + b"7" * size + b"]",
        "a long fraction": b"[0." + b"7" * size + b"]",
        "one key, many times": b"{" + b'"a":0,' * (size // 6) + b'"a":0}', "a long name": b'{"' + b"x" * size + b'":0}',
        "a long name of escapes": b'{"' + rb"\u00e9" * (size // 6) + b'":0}',
        "wide characters": b'{"' + b"x" * size + "\U0001f600".encode() + b'":0}',
    }  # fmt: skip
    for what, text in tricks.items():
        yield what, text
        yield f"{what}, as metadata", b'{"__metadata__":' + text + b"}"
        yield f"{what}, as a map", b'{"weight_map":' + text + b"}"
    maps = {
        "many names": {f"t{i}": "model-00001-of-00001.safetensors" for i in range(size // 50)},
        "many files": {f"t{i}": f"m{i}.safetensors" for i in range(size // 30)},
    }
    yield from ((what, json.dumps({"weight_map": names}).encode()) for what, names in maps.items())


def _headers(tree: Pairs, size: int) -> Iterator[tuple[str, bytes]]:
    plain = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    tensors = {
        "many tensors": {f"t{i}": plain for i in range(size // 60)},
        "many dimensions": {"a": {**plain, "shape": [1] * (size // 3)}},
        "10 GB declared": {"a": {"dtype": "F32", "shape": [10**10 // 4], "data_offsets": [0, 10**10]}},
    }
    for what, text in (*_texts(size), *((name, json.dumps(table).encode()) for name, table in tensors.items())):
        yield what, len(text).to_bytes(8, "little") + text
    (key, metadata), *others = tree
    (own,) = next(value for name, value in metadata if name == "ema")
    for what, values in _contents(size).items():
        changed = Inner([pairs((name, values.get(name, value)) for name, value in own)])
        strings = pairs((name, changed if name == "ema" else value) for name, value in metadata)
        yield what, seal(Pairs([Pair((key, strings)), *others]))


def _contents(size: int) -> dict[str, dict[str, object]]:
    """Return long values in a snapshot's header, each valid on its own."""
    widths = [0.05, *np.linspace(0.051, 0.28, size // 100).tolist()]
    distance = {"sigma_rel": 0.05, "squared": 1.0, "rounding": 0.0}
    distances = [pairs({"t": float(t), **distance}.items()) for t in np.linspace(1, 9.9, size // 100)]
    measured = pairs({"norm": 1.0, "rounding": 0.0, "distances": distances}.items())
    return {
        "many profiles and distances": {"sigma_rels": widths, "measurements": measured},
        "many knots of a clock": {"clock": [[i, i / 1e9] for i in range(1, size // 20)]},
        "many aliases": {"aliases": pairs((f"n{i}", "a") for i in range(size // 10))},
        "many names left out": {"left_out": [f"n{i}" for i in range(size // 10)]},
        "a long unit": {"t_unit": "x" * size}, "a long number": {"t": Raw("1" * size)},
        "a long step": {"step": Raw("1" * size)}, "a long run id": {"run_id": RUN_ID * (size // 32)},
        "a long gamma": {"gamma": Raw(f"{exact_gamma(0.05)!r}{'0' * size}")},
        "many checksums": {"sums": pairs((f"n{i}", "0" * 16) for i in range(size // 30))},
        "nested lists in the content": {"aliases": Raw("[" * size)},
    }  # fmt: skip

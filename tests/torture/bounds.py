"""Headers made to take long or much memory: both stay in proportion to what the file really holds."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from factories import RUN_ID, exact_gamma

from posthoc_cli.errors import PostHocError
from posthoc_cli.snapshots.outputs import INDEX_NAME, decode_index
from torture.commands import HungError, time_limit
from torture.forging import Inner, Pairs, seal, take_apart
from torture.tally import Tally
from torture.victims import examine, small_snapshot

MEGABYTE = 1_000_000
BYTES_A_BYTE = 80
"""Memory for each byte of a file: the worst are empty lists, `[],`, of 56 bytes and 8 for the place of each."""

SECONDS_A_MEGABYTE = 10.0
"""On a busy machine that measures every allocation; what is quadratic takes minutes."""


def bound(folder: Path, share: float, _: int) -> Tally:
    """Every trick, with files of up to 10 MB."""
    tally, size = Tally(), max(50_000, round(share * 10 * MEGABYTE))
    victim = small_snapshot(folder)
    tree, payload = take_apart(victim.path)
    for what, header in _headers(tree, size):
        victim.path.write_bytes(header + payload)
        _measure(tally, what, victim.path, examine)
    for what, text in _texts(size):
        index = folder / INDEX_NAME
        index.write_bytes(text)
        _measure(tally, f"index, {what}", index, decode_index)
    return tally


def _measure(tally: Tally, what: str, path: Path, read: Callable[[Path], object]) -> None:
    tally.tried += 1
    size = path.stat().st_size
    tracemalloc.start()
    started = time.process_time()
    try:
        with time_limit(), suppress(PostHocError):
            read(path)
    except (Exception, HungError) as error:  # noqa: BLE001 - whatever it is, it is no error of the package
        tally.missed.append(f"{what}: {type(error).__name__}: {error}"[:300])
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if peak > BYTES_A_BYTE * size + MEGABYTE:
        tally.missed.append(f"{what}: {size:,} bytes took {peak:,} of memory")
    if seconds > 1 + SECONDS_A_MEGABYTE * size / MEGABYTE:
        tally.missed.append(f"{what}: {size:,} bytes took {seconds:.1f} s")


def _texts(size: int) -> Iterator[tuple[str, bytes]]:
    """JSON of this size, the dearest there is."""
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
    for name, values in _metadata(size).items():
        changed = Pairs((k, values.get(k, v)) for k, v in metadata)
        yield name, seal(Pairs([(key, changed), *others]))


def _metadata(size: int) -> dict[str, dict[str, object]]:
    """Values of a snapshot's metadata that are long, and right in themselves."""
    widths = [0.05, *np.linspace(0.051, 0.28, size // 100).tolist()]
    distance = {"sigma_rel": 0.05, "squared": 1.0, "rounding": 0.0}
    pairs = [Pairs({"t": float(t), **distance}.items()) for t in np.linspace(1, 9.9, size // 100)]
    measured = Inner(Pairs([("norm", 1.0), ("rounding", 0.0), ("distances", pairs)]))
    return {
        "many profiles and distances": {"ema.sigma_rels": Inner(widths), "ema.measurements": measured},
        "many knots of a clock": {"ema.clock": Inner([[i, i / 1e9] for i in range(1, size // 20)])},
        "many aliases": {"ema.aliases": Inner(Pairs((f"n{i}", "a") for i in range(size // 10)))},
        "many names left out": {"ema.left_out": Inner([f"n{i}" for i in range(size // 10)])},
        "a long unit": {"ema.t_unit": "x" * size}, "a long number": {"ema.t": "1" * size},
        "a long step": {"ema.step": "1" * size}, "a long run id": {"ema.run_id": RUN_ID * (size // 32)},
        "a long gamma": {"ema.gamma": f"{exact_gamma(0.05)!r}{'0' * size}"},
        "many checksums": {"ema.checksums": Inner(Pairs((f"n{i}", "0" * 16) for i in range(size // 30)))},
        "nested metadata": {"ema.aliases": "[" * size},
    }  # fmt: skip

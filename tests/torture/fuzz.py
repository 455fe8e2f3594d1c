"""Headers changed at random and rightly sealed: one error of the package, or a file that can be described."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from posthoc_cli.snapshots.description import describe
from torture.forging import Inner, Pairs, Raw, places, replaced, take_apart, written
from torture.tally import Experiment, Tally
from torture.victims import Victim, all_victims, examine

EXAMPLES = 4_000
"""Of each kind of file, for a share of 1."""

SLOWEST = 10.0
"""Seconds that a file of 2 KB may take on a busy machine."""

ODD_TEXT = st.sampled_from(
    [
        "", "a", "b", "w", "tied", "__metadata__", "../../x", "/etc/x", "C:\\x", "A", "é", "e\u0301", "\x1b]0;x\x07",
        "\u202e", "\ud800", "\0", "$x$", "=1", "state", "output", "snapshot", "1", "-0", "1e999", "null", "F32",
        "F8_E5M2", "0.05/w", "copy/w", "x" * 10_000, "model-00001-of-00002.safetensors", "[" * 2_000, "{}", "[]",
    ]
)  # fmt: skip
ODD_NUMBER = st.sampled_from(
    [
        0, -1, 1, 2, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1.5, 0.05, 0.28, 0.2886,
        1e308, 5e-324, 1e-300, -1e308, True, False, None,
    ]
)  # fmt: skip
ODD = st.recursive(
    ODD_TEXT | ODD_NUMBER | st.text(max_size=5) | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(ODD_TEXT, inner), max_size=3).map(Pairs),
    max_leaves=5,
) | st.sampled_from([Raw("NaN"), Raw("1e999"), Raw('"\udcff"'), Inner(Pairs()), Inner([])])


def fuzz(folder: Path, share: float, chance: int) -> Tally:
    """Change the header of each kind of file, many times."""
    tally = Tally()
    for victim in all_victims(folder):
        _fuzz_one(victim, tally, max(10, round(share * EXAMPLES)), chance)
    return tally


def _fuzz_one(victim: Victim, tally: Tally, examples: int, chance: int) -> None:
    tree, payload = take_apart(victim.path)

    @seed(chance)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def try_one(data: st.DataObject) -> None:
        changed = tree
        for _ in range(data.draw(st.sampled_from([1, 1, 1, 2]))):
            changed = data.draw(_mutations(changed))
        content = written(changed, payload, victim.is_index)
        victim.path.write_bytes(content)
        started = time.monotonic()
        for name, use in _uses(victim).items():
            tally.tried += 1
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                victim.attempt(tally, f"{victim.kind}, {name}, of {content!r}", use, str(victim.path.parent))
        if time.monotonic() - started > SLOWEST:
            tally.missed.append(f"{victim.kind}: took {time.monotonic() - started:.0f} s: {content!r}"[:2000])

    try_one()


@st.composite
def _mutations(draw: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with one thing in it dropped, doubled, or become another."""
    everything = list(places(tree))
    at, found, is_key = draw(st.sampled_from(everything))
    if is_key:
        return replaced(tree, at, draw(ODD_TEXT))
    kind = draw(st.sampled_from(["like", "like", "like", "odd", "drop", "double", "other"]))
    if kind in ("drop", "double") and isinstance(found, list) and found:
        index = draw(st.integers(0, len(found) - 1))
        rest = [*found[:index], *found[index + 1 :]] if kind == "drop" else [*found, found[index]]
        return replaced(tree, at, type(found)(rest))
    if kind == "like" and isinstance(found, str | int | float):
        return replaced(tree, at, draw(ODD_TEXT if isinstance(found, str) else ODD_NUMBER))
    if kind == "other":
        return replaced(tree, at, draw(st.sampled_from(everything))[1])
    return replaced(tree, at, draw(ODD))


def _uses(victim: Victim) -> dict[str, Callable[[], object]]:
    return {"examined": lambda: examine(victim.path), "info": lambda: _info(victim.path)}


def _info(path: Path) -> None:
    json.dumps(describe(path), allow_nan=False).encode()


EXPERIMENTS = [Experiment("random headers with correct checksums", fuzz, 0.01)]

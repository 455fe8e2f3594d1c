"""The output of --json: all commands use the same names for the same things."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from ema_command import Ema

from posthoc_cli.cli import app

COMMANDS = (
    "synthesize run --sigma-rel 0.1,0.2 --target window:500 --dry-run",
    "synthesize run --sigma-rel 0.15 --out a.safetensors",
    "synthesize run --sigma-rel 0.1 --out shards --layout sharded",
    "export a.safetensors --out b.pt", "info run", "info run/0000000000000100-0.05.safetensors", "info a.safetensors",
    "info shards", "verify run", "verify run a.safetensors", "prune run --keep 5 --dry-run", "error-plot run",
    "error-plot run --target window:500", "plan --steps 3000 --params 100K --disk 100MB --like run",
    "profile", "guide", "guide sweep",
    "sweep run --run 'basename {sigma_rel} {weights}' --minimize --sigma-rel 0.05,0.1,0.2",
    "report run --out page.html",
    "report run --sweep sweep --out page.html --overwrite",
)  # fmt: skip
COLUMNS = {"sigma_rel", "predicted_error", "profile_error"}
"""These are lists in curves, with a number for each point, and single numbers elsewhere."""
VOCABULARY = {
    "bytes": {"number"}, "snapshots": {"list"}, "t": {"number"}, "step": {"number"},
    **{name: {"number", "list"} for name in COLUMNS},
}  # fmt: skip
SYNONYMS = {"nbytes", "size", "time", "sigma", "error", "width", "mean"}


def kind(value: Any) -> str:
    names = {bool: "flag", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    return names[type(value)]


def members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all names with their values, also those of nested objects."""
    for name, item in value.items() if isinstance(value, dict) else ():
        yield name, item
        yield from members(item)
    for item in value if isinstance(value, list) else ():
        yield from members(item)


def test_one_name_means_one_thing_in_the_json_of_all_commands(
    ema: Ema, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kinds: dict[str, set[str]] = defaultdict(set)
    for line in COMMANDS:
        words = shlex.split(line)
        done = ema(*words, "--json")
        assert done.code == 0, done.err
        for name, value in members(done.json):
            if value is not None:
                kinds[name].add(kind(value))
    assert {name: kinds[name] for name in VOCABULARY} == VOCABULARY
    assert {name for name, found in kinds.items() if len(found) > 1} == COLUMNS
    assert not kinds.keys() & SYNONYMS


def test_every_command_that_reports_has_json() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    without = {name for name, one in commands.items() if not any("--json" in option.opts for option in one.params)}
    assert without == set()

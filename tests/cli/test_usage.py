"""The conventions of all commands: exit codes, help, short options and the notation of numbers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from ema_command import Ema
from factories import flip_bit
from safetensors.torch import save_file

import posthoc_cli
from posthoc_cli.cli import app
from posthoc_cli.reconstruction import METHODS

TARGET = ("--sigma-rel", "0.15")


@pytest.fixture
def place(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run and a model."""
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path


def test_every_command_takes_counts_as_people_write_them(ema: Ema, place: Path) -> None:
    assert ema("profile", "--steps", "1e6", "--json").json["steps"] == 1_000_000
    plan = ema("plan", "--steps", "1e3", "--params", "1.2B", "--json").json
    assert plan["schedules"][0]["bytes"] == 11 * 2 * 1_200_000_000
    assert ema("prune", "run", "--keep", "1e1", "--dry-run").code == 0
    made = ema("synthesize", "run", *TARGET, "--step", "2K", "--dry-run", "--json")
    assert made.json["targets"][0]["t"] == 2000


def test_verify_takes_several_paths(ema: Ema, place: Path) -> None:
    shutil.copytree("run", "other")
    result = ema("verify", "run", "other", "model.safetensors")
    assert (result.code, result.out.count("40 files, ")) == (0, 2)
    report = ema("verify", "run", "model.safetensors", "--json").json
    found = [(one["kind"], one["path"]) for one in report["paths"]]
    assert (report["kind"], found) == ("several", [("directory", "run"), ("file", "model.safetensors")])
    flip_bit(sorted(Path("other").glob("*.safetensors"))[0])
    result = ema("verify", "other", "run")
    assert result.code == 1
    assert "1 of 40 files is damaged" in result.out
    assert "all intact" in result.out


def commands() -> dict:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_the_number_of_options_is_limited() -> None:
    counts = {
        name: sum(parameter.param_type_name == "option" for parameter in command.params)
        for name, command in commands().items()
    }
    assert counts["synthesize"] <= 22
    assert counts["sweep"] <= 13
    assert sum(counts.values()) <= 103


def test_help_of_a_command_and_the_version(ema: Ema) -> None:
    assert ema("--help").out == ema().out
    for command in commands().values():
        assert all("-o" in parameter.opts for parameter in command.params if "--out" in parameter.opts)
    wrong = ema("synthesise")
    assert wrong.code == 2
    assert "synthesise" in wrong.error
    assert ema("-V").out == ema("--version").out == f"ema {posthoc_cli.__version__}\n"
    assert re.search(rf"--method +<{re.escape('|'.join(METHODS))}> ", ema("synthesize", "--help").out)

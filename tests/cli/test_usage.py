"""What holds for every command: exit codes, help, short options, completion, numbers as people write them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from ema_command import Ema
from safetensors.torch import save_file

from posthoc_cli.cli import app, main
from posthoc_cli.cli.values import parse_bytes, parse_count
from posthoc_cli.dtypes import WORDS
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.export.outputs import LAYOUTS
from posthoc_cli.reconstruction import METHODS

TASK = ("plan", "--steps", "1000", "--params", "1e6", "--max-size", "1GB")
TARGET = ("--sigma-rel", "0.15")

# --- exit codes ------------------------------------------------------------------------------------

READING = {
    "synthesize": ("PATH", *TARGET, "--out", "new.safetensors"),
    "error-plot": ("PATH", "--out", "new.png"),
    "prune": ("PATH", "--keep", "3", "--yes"),
    "plan": (*TASK[1:], "--like", "PATH"),
    "info": ("PATH",),
    "verify": ("PATH",),
    "export": ("PATH", "--out", "new.pt"),
    "export, its base": ("model.safetensors", "--base", "PATH", "--out", "new.pt"),
}
WRITING = {
    "synthesize": ("run", *TARGET, "--out", "OUT.safetensors"),
    "synthesize, several": ("run", "--sigma-rel", "0.1,0.2", "--out", "OUT"),
    "synthesize, a part": ("run", *TARGET, "--out", "OUT", "--shard", "1/2"),
    "synthesize, the index": ("run", *TARGET, "--out", "OUT", "--finish"),
    "error-plot": ("run", "--out", "OUT.png"),
    "error-plot, a table": ("run", "--csv", "OUT.csv"),
    "plan": (*TASK[1:], "--out", "OUT.png"),
    "export": ("model.safetensors", "--out", "OUT.pt"),
    "export, shards": ("model.safetensors", "--out", "OUT/"),
    "demo": ("--out", "OUT", "--steps", "100"),
}


def filled(line: tuple[str, ...], **values: str) -> list[str]:
    for name, value in values.items():
        line = tuple(word.replace(name, value) for word in line)
    return list(line)


@pytest.fixture
def place(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run and a model."""
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", READING)
def test_a_wrong_input_is_wrong_usage_and_a_broken_one_is_a_failure(ema: Ema, place: Path, name: str) -> None:
    """By the command line alone, whatever the files hold: 2. By what they hold: 1. Nothing is written by either."""
    (place / "m.pt").write_bytes(b"\x80\x04.")
    (place / "empty").mkdir()
    (place / "broken.safetensors").write_bytes(b"no header")
    before = sorted(place.rglob("*"))
    directory = name in ("synthesize", "error-plot", "prune", "plan")
    for path, code in {
        "absent": 2,
        "model.safetensors/x": 2,
        "m.pt": 2,
        "empty": 1,
        "broken.safetensors": 2 if directory else 1,
    }.items():
        result = ema(name.split(",")[0], *filled(READING[name], PATH=path))
        assert (path, result.code) == (path, code)
        assert path in (result.out if name == "verify" and path.startswith("broken") else result.error)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", WRITING)
def test_an_output_without_a_folder_is_wrong_usage(ema: Ema, place: Path, name: str) -> None:
    result = ema(name.split(",")[0], *filled(WRITING[name], OUT="no/such"))
    assert result.code == 2
    assert "no/such" in result.error
    assert result.error.endswith("its folder does not exist")
    assert not (place / "no").exists()


@pytest.mark.parametrize("name", ["synthesize", "error-plot", "error-plot, a table", "plan", "export"])
def test_an_output_that_is_there_is_a_failure_with_the_option_that_replaces_it(
    ema: Ema, place: Path, name: str
) -> None:
    line = filled(WRITING[name], OUT="there")
    there = place / next(word for word in line if word.startswith("there"))
    there.write_text("precious")
    result = ema(name.split(",")[0], *line)
    assert result.code == 1
    assert result.error == f"{there.name}: is there already; choose another name, or --force to replace it"
    assert there.read_text() == "precious"


@pytest.mark.parametrize("command", [["verify", "run"], ["info", "run"], ["--help"], ["profile"]])
def test_a_reader_that_goes_is_not_taken_for_damage(
    ema: Ema, place: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """`| head`: 141, as a shell says of a process that SIGPIPE ended, and 1 means damaged."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        monkeypatch.setattr(sys, "argv", ["ema", *command])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 141


# --- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("synthesize", "run", *TARGET, "--t", "100", "--step", "100", "--out", "x"), "--t and --step: give one of"),
        (("synthesize", "run", "--window", "abc", "--out", "x"), "--window abc: must be a whole number of steps, a"),
        (("synthesize", "run", "--beta", "abc", "--out", "x"), "--beta abc: must be a number, a list such as 0.999,"),
        (("synthesize", "run", *TARGET, "--out", "two-{sigmarel}.safetensors"), "{sigmarel} is not known; must be {si"),
        (("synthesize", "run", *TARGET, "--step", "1.5", "--out", "x"), "--step 1.5: must be a whole number"),
        (("synthesize", "run", *TARGET, "--step", "1e5", "--out", "x"), "--step 100000: must lie between the first"),
        (("prune", "run", "--keep", "0"), "--keep 0: must be a whole number, at least 1"),
        (("prune", "run", "--keep", "3", "--sigma-range", "a:b"), "--sigma-range a:b: must be LOW:HIGH, such as 0.05"),
        (("prune", "run", "--keep", "3", "--sigma-range", "0.1"), "--sigma-range 0.1: must be LOW:HIGH"),
        (("error-plot", "run", "--t", "12345", "--json"), "--t 12345: must lie between the first snapshot, 100, and"),
        ((*TASK, "--checkpoint-every", "0"), "--checkpoint-every 0: must be a whole number, at least 1, such as"),
        (("demo", "--steps", "many"), "--steps many: must be a whole number, at least 1, such as 10000, 1e4 or 10K"),
    ],
)
def test_a_mistake_is_named_by_its_options_and_with_what_that_one_takes(
    ema: Ema, place: Path, line: tuple[str, ...], message: str
) -> None:
    before = sorted(place.rglob("*"))
    result = ema(*line)
    assert result.code == 2
    assert message in result.error
    assert sorted(place.rglob("*")) == before


def test_times_have_commas_and_what_was_typed_has_not(ema: Ema, place: Path) -> None:
    error = ema("synthesize", "run", *TARGET, "--t", "12345", "--out", "x").error
    assert error == "--t 12345: must lie between the first snapshot, 100, and the last, 2,000"


@pytest.mark.parametrize(
    ("text", "count"),
    [("1e6", 10**6), ("1,000", 1000), ("2k", 2000), ("1.5M", 1_500_000), ("9007199254740993", 2**53 + 1),
     ("1_000", None), ("1.5", None), ("0", None), ("-3", None), ("", None), ("1e30", None)],
)  # fmt: skip
def test_counts(text: str, count: int | None) -> None:
    if count is None:
        with pytest.raises(InvalidValueError, match=r"^--steps .*: must be a whole number, at least 1, such as 20$"):
            parse_count(text, "--steps", "20")
    else:
        assert parse_count(text, "--steps") == count
    assert parse_bytes("1.5KiB", "--max-size") == 1536


def test_every_command_takes_counts_as_people_write_them(ema: Ema, place: Path) -> None:
    schedule = ("--sigma-rels", "0.1", "--checkpoint-every", "1e3", "--max-checkpoints", "5e0", "--steps", "10K")
    (curve,) = json.loads(ema("error-plot", *schedule, "--json").out)["curves"]
    assert curve["label"] == "plan: 0.1 at 5 times in 10,000 steps, if the network moves evenly"
    assert json.loads(ema("profile", "--steps", "1e6", "--json").out)["steps"] == 1_000_000
    # What is refused is the option after it.
    late = ("--checkpoint-every", "0.1K", "--max-checkpoints", "many")
    assert ema("plan", *TASK[3:], "--steps", "1e3", *late).error.startswith("--max-checkpoints many: ")
    assert ema("prune", "run", "--keep", "1e1", "--dry-run").code == 0
    made = ema("synthesize", "run", *TARGET, "--step", "2K", "--dry-run", "--json")
    assert json.loads(made.out)["targets"][0]["t"] == 2000


def test_an_output_in_the_working_directory_has_a_name(ema: Ema, place: Path) -> None:
    line = ema("synthesize", "run", "--sigma-rel", "0.1,0.2", "-o", "x-{sigma_rel}.safetensors").out.splitlines()[-1]
    assert line.endswith(" s: in this folder")
    assert (place / "x-0.1.safetensors").exists()


@pytest.mark.parametrize(
    "line",
    [
        ("synthesize", "run", *TARGET, "-o", "x.safetensors"),
        ("error-plot", "run", "-o", "x.png"),
        ("export", "model.safetensors", "-o", "x.pt"),
    ],
)
def test_o_is_short_for_out(ema: Ema, place: Path, line: tuple[str, ...]) -> None:
    assert ema(*line).code == 0
    assert (place / line[-1]).exists()


def test_every_out_has_its_short_name() -> None:
    for name, command in commands().items():
        for parameter in command.params:
            if "--out" in parameter.opts:
                assert "-o" in parameter.opts, name


def test_the_version_in_short(ema: Ema) -> None:
    assert ema("-V") == ema("--version")


# --- several paths ---------------------------------------------------------------------------------


def test_verify_takes_several_paths(ema: Ema, place: Path) -> None:
    shutil.copytree("run", "other")
    result = ema("verify", "run", "other", "model.safetensors")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("40 files, ") == 2
    report = json.loads(ema("verify", "run", "model.safetensors", "--json").out)
    assert report["kind"] == "several"
    assert [(one["kind"], one["path"]) for one in report["paths"]] == [
        ("directory", "run"),
        ("file", "model.safetensors"),
    ]
    damaged = sorted(Path("other").glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for order in (["run", "other"], ["other", "run"]):
        result = ema("verify", *order)
        assert result.code == 1
        assert "1 of 40 files is damaged" in result.out
        assert "all whole" in result.out
    result = ema("verify", "other", "run", "--repair", "--yes")
    assert result.code == 0
    assert len(list(Path("other/quarantine").iterdir())) == 1
    assert not Path("run/quarantine").exists()


def test_a_path_that_is_not_there_is_known_before_the_others_are_read(ema: Ema, place: Path) -> None:
    result = ema("verify", "run", "absent")
    assert (result.code, result.out) == (2, "")
    assert result.error == "absent: no such file or directory"


# --- help ------------------------------------------------------------------------------------------


def commands() -> dict:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_help_is_not_wrapped_within_an_option_or_a_name(ema: Ema, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in commands():
        result = ema(name, "--help")
        assert result.code == 0
        for line in result.out.splitlines():
            assert len(line) <= width
            assert not line.endswith("-") or line.endswith(" -"), line
        assert "\u2011" not in result.out


def test_help_of_a_command(ema: Ema) -> None:
    assert ema("help").out == ema("--help").out
    for name in commands():
        shown = ema("help", name)
        assert (shown.code, shown.out) == (0, ema(name, "--help").out)
    wrong = ema("help", "synthesise")
    assert wrong.code == 2
    assert "synthesise" in wrong.error


# --- completion ------------------------------------------------------------------------------------


@pytest.fixture
def completed(ema: Ema, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """What bash is offered for the last word of a line, by the machinery that it calls."""

    def complete(*words: str) -> list[str]:
        monkeypatch.setenv("_EMA_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(("ema", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        result = ema()
        assert result.err == ""
        return result.out.split()

    yield complete


DTYPES = ["keep", "float32", "float16", "bfloat16", "float64"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("synthesize", "run", "--dtype", ""), DTYPES),
        (("synthesize", "run", "--dtype", "float"), ["float32", "float16", "float64"]),
        (("synthesize", "run", "--method", ""), ["minvar", "paper"]),
        (("synthesize", "run", "--method", "p"), ["paper"]),
        (("synthesize", "run", "--format", ""), list(LAYOUTS)),
        (("error-plot", "run", "--method", ""), ["minvar", "paper"]),
        (("export", "m.safetensors", "--dtype", "b"), ["bfloat16"]),
        (("export", "m.safetensors", "--format", "s"), ["safetensors", "sharded"]),
        (("plan", "--dtype", ""), ["float16", "bfloat16", "float32"]),
        (("help", "pr"), ["prune", "profile"]),
    ],
)
def test_values_are_completed(completed, words: tuple[str, ...], offered: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert completed(*words) == offered


def test_what_is_offered_is_what_there_is() -> None:
    assert set(DTYPES) == {word for word in WORDS if "float" in word} | {"keep"}
    assert set(METHODS) == {"minvar", "paper"}

"""The conventions of all commands: exit codes, help, short options and the notation of numbers."""

import itertools
import os
import pickle
import re
import shlex
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import typer
from factories import contents, flip_bit
from safetensors.torch import save_file

import posthoc_cli
from posthoc_cli.cli import app


def test_every_command_takes_counts_as_people_write_them(typed):
    (curve,) = typed("error-plot --steps 1e4 --json").json["curves"]
    assert curve["t"] == 10_000
    made = typed("synthesize run --sigma-rel 0.15 --step 2K --dry-run --json")
    assert made.json["targets"][0]["t"] == 2000


def test_verify_takes_several_paths(typed, run):
    save_file({"w": torch.ones(3)}, "model.safetensors")
    line = "verify run model.safetensors"
    report = typed(f"{line} --json").json
    assert report["kind"] == "several"
    found = [(one["kind"], one["path"]) for one in report["paths"]]
    assert found == [("directory", "run"), ("file", "model.safetensors")]
    flip_bit(min(run.glob("*.safetensors")))
    damaged = typed(line)
    assert damaged.code == 1
    assert "1 of 40 files is damaged" in damaged.out
    assert "model.safetensors:" in damaged.out


def test_verify_checks_the_others_where_a_path_is_wrong(typed):
    result = typed(f"verify absent run {__file__}")
    assert result.code == 2
    absent, text = result.err.splitlines()
    assert absent == "ema: error: absent: no such file or directory"
    assert text.startswith(f"ema: error: {__file__}: is a text")
    assert "all intact" in result.out


def options():
    """Return the names of the options of each command."""
    commands = typer.main.get_command(app).commands
    found = {}
    for name, command in commands.items():
        own = [each for each in command.params if each.param_type_name == "option"]
        found[name] = [each.opts for each in own]
    return found


def test_every_command_that_reports_has_json_and_each_output_a_short_option():
    for own in options().values():
        names = {*itertools.chain(*own)}
        assert "--json" in names
        assert ("-o" in names) == ("--out" in names)


def test_help_and_version(ema):
    assert ema("--help") == ema("help") == ema()
    assert ema("prune", "--help") == ema("help", "prune")
    version = f"ema {posthoc_cli.__version__}\n"
    assert ema("-V").out == ema("--version").out == ema("version").out == version
    groups = re.findall("Checkpoints that you have|A training with the hook|Learn", ema("-h").out)
    assert len(groups) == 3
    for command in ("synthesize", "error-plot"):
        assert re.search(r"--method +[<\[]minvar\|paper[>\]] ", ema(command, "--help").out)


# --- the output of --json: all commands use the same names for the same things

COMMANDS = (
    "synthesize run --sigma-rel 0.15 --target window:500 --dry-run",
    "synthesize run --sigma-rel 0.15 --out a.safetensors",
    "export a.safetensors --out shards", "export a.safetensors --out b.pt", "info run",
    "info run/0000000000000100-0.05.safetensors",
    "info a.safetensors", "info shards", "verify run", "verify run a.safetensors",
    "prune run --keep 5 --dry-run", "error-plot run --target window:500",
    "error-plot --steps 300 --every 100", "guide", "guide sweep",
    "sweep run --eval 'basename {sigma_rel} {weights}' --minimize --sigma-rel 0.05,0.1,0.2",
)  # fmt: skip
COLUMNS = {"sigma_rel", "predicted_error", "lost_gain", "profile_error"}
"""These are lists in curves, with a number for each point, and single numbers elsewhere."""
SYNONYMS = {"nbytes", "size", "time", "sigma", "error", "width", "mean"}


def test_one_name_means_one_thing_in_the_json_of_all_commands(typed):
    kinds = defaultdict(set)
    for line in COMMANDS:
        done = typed(f"{line} --json")
        assert done.code == 0, done.err
        assert isinstance(done.json, dict)
        for name, first in re.findall(r'^ *"(\w+)": ([^n])', done.out, re.MULTILINE):
            kind = "number" if first in "-0123456789" else first.replace("f", "t")
            kinds[name].add(kind)
    assert kinds["bytes"] == {"number"}
    assert kinds["snapshots"] == {"["}
    assert {name for name, found in kinds.items() if len(found) > 1} == COLUMNS
    assert not kinds.keys() & SYNONYMS


# --- the messages for wrong input: one line that names the input and what is accepted; no file is
# written or changed

MESSAGES = Path(__file__).parent.parent / "messages.txt"


def recorded():
    found = re.findall(r"^\$ ema (.*)\n(.*)$", MESSAGES.read_text(), re.MULTILINE)
    return dict(found)


@pytest.fixture(scope="module")
def places(_recorded_run, tmp_path_factory):
    """A working directory with a run, and with files and directories that cannot be used instead of
    one."""
    places = tmp_path_factory.mktemp("place")
    for name in ("run", "truncated", "flipped-payload", "flipped-header"):
        shutil.copytree(_recorded_run, places / name)
    file = "0000000000000300-0.28.safetensors"
    truncated = places / "truncated" / file
    truncated.write_bytes(truncated.read_bytes()[:-7])
    flip_bit(places / "flipped-payload" / file, -3)
    flip_bit(places / "flipped-header" / file, 40)
    for folder in ("empty", "foreign", "other", "other.html", "swept", "above"):
        (places / folder).mkdir()
    (places / "above/ema").symlink_to(places / "run")
    for model in ("model", "foreign/model"):
        save_file({"w": torch.ones(3)}, places / f"{model}.safetensors")
    (places / "m.pt").write_bytes(pickle.dumps({"w": 1}))
    texts = {
        "notes.json": "{}",
        "swept/sweep.json": "{}",
        "nothing.pt": "",
        "text": "precious",
        "there.safetensors": "precious",
        "there.png": "precious",
        "other/best.safetensors": "precious",
    }
    for name, text in texts.items():
        (places / name).write_text(text)
    return places


RECORDED = {line.split()[0] for line in recorded()}


@pytest.mark.parametrize("command", sorted(RECORDED))
def test_wrong_input_is_one_line_and_changes_nothing(ema, places, command, monkeypatch):
    monkeypatch.chdir(places)
    before = contents(places)
    found = recorded()
    for line in found:
        words = shlex.split(line)
        if words[0] == command:
            result = ema(*words)
            # the last digits of measurements in headers differ between processors
            message = re.sub(r"[\d,]+ bytes|says [\d,]+", "N bytes", result.error)
            found[line] = f"{result.code} {message}"
            assert result.out == "" or result.code == 1, line
    assert contents(places) == before
    if os.environ.get("EMA_RECORD_MESSAGES"):
        missing = "install" in "".join(found.values()).lower()
        assert not missing, "record where every extra is installed"
        head, *_ = MESSAGES.read_text().split("\n")
        cases = [f"$ ema {line}\n{answer}\n" for line, answer in found.items()]
        MESSAGES.write_text(f"{head}\n\n{''.join(cases)}")
    else:
        assert found == recorded()


def test_a_warning_comes_once_for_one_cause(ema, tmp_path):
    """A plot reads the checkpoints several times; here they hold a set that is not used."""
    for step in (10, 20):
        weights = torch.full((3, 2), float(step))
        other = {"v": torch.ones(2)}
        torch.save({"model": {"w": weights}, "critic": other}, tmp_path / f"{step}.pt")
    done = ema("error-plot", tmp_path, "--out", tmp_path / "errors.png")
    assert done.code == 0, done.err
    assert done.err.count("also holds 'critic', not used") == 1


def test_strict_takes_a_warning_as_an_error_and_writes_nothing(typed, run):
    line = "synthesize run --sigma-rel 0.01 --out a.safetensors"
    warned = typed(f"{line} --json")
    (warning,) = warned.json["warnings"]
    assert "predicted error" in warning
    assert warned.err == f"ema: warning: {warning}\n"
    Path("a.safetensors").unlink()
    refused = typed(f"{line} --strict")
    assert refused.code == 1
    assert refused.error == f"warning: {warning}"
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_notes_name_options(typed):
    torch.save({"w": torch.ones(3)}, "m.pt")
    assert "import with --step-from, a pattern" in typed("info m.pt").out

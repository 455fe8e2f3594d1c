"""The conventions of all commands: exit codes, help, short options and the notation of numbers."""

import itertools
import os
import pickle
import re
import shlex
import shutil
from collections import defaultdict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import typer
from factories import contents, flip_bit
from safetensors.torch import save_file
from torch import nn

import posthoc_cli
from posthoc_cli.cli import app
from posthoc_cli.sweep.search import LEAST_BUDGET


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
    for command in ("synthesize", "error-plot"):
        assert re.search(r"--method +[<\[]minvar\|paper[>\]] ", ema(command, "--help").out)


def test_the_help_groups_commands_by_what_one_wants(ema):
    panels = re.findall(r"─ (\w+) ─+╮\n(.*?)\n╰", ema("--help").out, re.DOTALL)
    groups = {
        panel: re.findall(r"^│ ([a-z][a-z-]+) ", rows, re.MULTILINE) for panel, rows in panels
    }
    assert groups == {
        "Options": [],
        "Choose": ["sweep", "synthesize", "error-plot"],
        "Look": ["info", "audit", "verify"],
        "Files": ["import", "export", "prune"],
        "Learn": ["demo", "guide"],
    }


def test_no_help_names_a_type_of_python(ema):
    for command in options():
        text = ema(command, "--help").out
        assert not re.search(r"<(str|int|float|list)|\b(TEXT|INTEGER|FLOAT)\b", text), text


def test_the_help_says_the_least_budget(ema):
    text = ema("sweep", "--help").out.replace("│", "")
    assert f"at least {LEAST_BUDGET} beside" in " ".join(text.split())


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
        other = {"v": torch.full((2,), float(step))}
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


OUTPUTS = {
    "synthesize run --sigma-rel 0.15": "a.safetensors",
    "synthesize run --sigma-rel 0.1,0.15": "lengths",
    "export run/0000000000000100-0.05.safetensors": "a.pt",
    "error-plot run": "error.png",
    "import foreign": "imported",
    "sweep run --eval 'basename {sigma_rel} {weights}' --minimize --sigma-rel 0.05,0.1": "swept",
    "demo --steps 100": "demo",
}
"""A command with each kind of output, and the name of this."""


@pytest.fixture
def foreign(run):
    folder = run.parent / "foreign"
    folder.mkdir()
    for step in (10, 20):
        torch.save({"w": torch.full((3,), float(step))}, folder / f"step{step}.pt")


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("line", OUTPUTS)
def test_missing_folders_of_an_output_are_made(typed, line):
    name = OUTPUTS[line]
    done = typed(f"{line} --out new/deep/{name}")
    assert done.code == 0, done.err
    assert [path.name for path in Path("new/deep").iterdir()] == [name]


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("line", OUTPUTS)
def test_a_folder_that_cannot_be_made_is_named_before_any_work(typed, line, tmp_path):
    Path("taken").write_text("precious")
    before = contents(tmp_path)
    refused = typed(f"{line} --out taken/deep/{OUTPUTS[line]}")
    assert refused.code == 2
    assert refused.error == f"--out taken/deep/{OUTPUTS[line]}: taken is not a folder"
    assert contents(tmp_path) == before


def test_an_output_that_fails_leaves_no_new_folder(typed, run):
    flip_bit(run / "0000000000002000-0.28.safetensors", -3)
    assert typed("synthesize run --sigma-rel 0.15 --out new/deep/a.safetensors").code == 1
    assert not Path("new").exists()


def test_strict_takes_no_notice_for_a_warning(ema, tmp_path):
    """Copies of BatchNorm's statistics are as the files hold them, and an evaluation may recompute
    them."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for step in range(100, 2100, 100):
        for parameter in model.parameters():
            parameter.data += 1e-3 * torch.randn_like(parameter)
        torch.save(model.state_dict(), tmp_path / f"step{step}.pt")
    line = ("synthesize", tmp_path, "--target", "last:5", "--out", tmp_path / "a.pt", "--json")
    done = ema("--strict", *line)
    assert done.code == 0, done.err
    assert "recompute them with torch.optim.swa_utils.update_bn" in done.err
    assert "warning" not in done.err
    assert done.json["warnings"] == []


@pytest.mark.parametrize("text", ["last-2", "last", "lst:2", "windows:500", "decay:cos:20%"])
def test_a_target_that_is_proposed_goes_through(typed, text):
    Path("ck").mkdir()
    for step in range(100, 1300, 100):
        torch.save({"w": torch.randn(3)}, f"ck/step{step}.pt")
    refused = typed(f"synthesize ck --dry-run --target {text}")
    assert refused.code == 2
    (proposed,) = re.findall(r"did you mean (.*)\?", refused.error)
    done = typed(f"synthesize ck --dry-run --target {proposed}")
    assert done.code == 0, done.err


SETS = {
    "two averages": ("model", "ema", "ema_fast"),
    "two models": ("alpha", "beta"),
}


@pytest.fixture
def sets(typed):
    """Write a file for each of these, of sets that have the names of the run."""
    assert typed("synthesize run --sigma-rel 0.1 --out made.pt").code == 0
    made = torch.load("made.pt")
    for name, keys in SETS.items():
        torch.save({key: deepcopy(made) for key in keys}, f"{name}.pt")


SWEEP = "sweep run --eval 'sh size {weights}' --minimize --sigma-rel 0.1,0.2 --out swept"


@pytest.mark.usefixtures("sets")
@pytest.mark.parametrize(
    ("option", "name"),
    [("--like", "two averages"), ("--like", "two models"), ("--raw", "two models")],
)
def test_a_sweep_asks_for_a_file_of_one_set_by_a_line_that_makes_it(typed, option, name):
    Path("size").write_text("cksum < $1 | cut -c 1-4")
    refused = typed(f"{SWEEP} {option} '{name}.pt'")
    assert refused.code == 2
    _, _, line = refused.error.partition("paste: ema ")
    assert typed(line).code == 0
    done = typed(f"{SWEEP} {option} one-set.pt")
    assert done.code == 0, done.err


@pytest.mark.usefixtures("sets")
@pytest.mark.parametrize("command", ["export '{}' --out a.pt", "synthesize run --like '{}'"])
@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_proposed_is_accepted(typed, command, name):
    line = command.format(f"{name}.pt")
    if command.startswith("synthesize"):
        line += " --sigma-rel 0.1 --out a.pt"
    refused = typed(line)
    assert refused.code == 2
    proposed = re.findall(r"(--[a-z]+ '\w+')", refused.error)
    assert len(proposed) == 2
    for option in proposed:
        done = typed(f"{line} {option} --overwrite")
        assert done.code == 0, done.err


def test_notes_name_options(typed):
    Path("names").mkdir()
    for step in (1, 2):
        torch.save({"w": torch.ones(3)}, f"names/a{step}-b{step + 3}.pt")
    assert "--step-from" in typed("info names").out

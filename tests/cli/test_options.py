"""Each option of each command, in each way to call the command, changes what it does, or is
refused: none is ignored. And counts are read in one notation.

The tables of the command line say which options there are: a new one fails here without a row.
"""

import itertools
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from checking import each_heavy
from ema_command import run_ema
from proposals import commands, options
from safetensors.torch import save_file
from saved import store
from torch import nn

from posthoc_cli import PostHocEMA
from posthoc_cli.checkpoints.manifest import MANIFEST
from posthoc_cli.cli import EXAMPLES

WAYS = {
    "synthesize a file": "run --sigma-rel 0.15 --out a.safetensors",
    "synthesize a folder": "run --sigma-rel 0.1,0.15 --out averages",
    "synthesize a copy": "run --sigma-rel 0.15 --like like.pt --out a.pt",
    "synthesize nothing": "run --sigma-rel 0.15 --dry-run",
    "synthesize checkpoints": "ck --sigma-rel 0.15 --out a.safetensors",
    "sweep a range": "run --eval 'sh measure {weights} {job}' --minimize --sigma-rel 0.05:0.2 "
    "--budget 9",
    "sweep a list": "run --eval 'sh measure {weights} {job}' --minimize --sigma-rel 0.05,0.2",
    "sweep decays": "run --eval 'sh measure {weights} {job}' --minimize --decay 0.98,0.99",
    "sweep a look": "run --eval 'sh show {weights} {job} {dir}' --look --sigma-rel 0.05:0.2",
    "error-plot snapshots": "run --json",
    "error-plot checkpoints": "ck",
    "error-plot a picture": "run --out error.svg",
    "error-plot a schedule": "--steps 900 --every 100",
    "info a run": "run",
    "info a file": "like.pt",
    "audit checkpoints": "ck",
    "audit epochs": "epochs --steps-per-epoch 20",
    "audit a picture": "ck --out audit.svg",
    "verify a run": "run",
    "import an average": "ck --out imported",
    "import a counted average": "counted --out imported",
    "import a schedule": "cosine --ema-warmup cosine:0.9 --steps 500 --out imported",
    "import weights": "alone --out imported",
    "import epochs": "epochs --steps-per-epoch 20 --out imported",
    "import nothing": "ck --dry-run",
    "export a model": "model.safetensors --out a.safetensors",
    "export shards": "model.safetensors --out shards --max-shard-size 1KB",
    "export a checkpoint": "like.pt --out a.safetensors",
    "export a copy": "model.safetensors --like like.pt --out a.pt",
    "prune for good": "run --keep 5 --yes",
    "prune nothing": "run --keep 5 --dry-run",
    "demo": "--steps 100",
    "guide a page": "gain",
    "guide a list": "",
}
"""The ways to call the commands: those in which an option may have another meaning."""

ADDED = {
    "synthesize": {
        "--sigma-rel": "0.2",
        "--decay": "0.9",
        "--target": "window:100",
        "--out": "a.zip",
        "--json": "",
        "--t": "100",
        "--step": "100",
        "--method": "paper",
        "--max-error": "1e-9",
        "--dtype": "float16",
        "--include": "'*w*'",
        "--exclude": "'*w*'",
        "--device": "gpu",
        "--like": "plain.pt",
        "--overwrite": "",
        "--raw": "",
        "--average": "other",
        "--weights": "other",
        "--base": "plain.pt",
        "--base-share": "0.2",
        "--dry-run": "",
    },
    "sweep": {
        "--sigma-rel": "0.1:0.2",
        "--decay": "0.95:0.99",
        "--eval": "'sh again {weights} {dir}'",
        "--run": "'sh measure {weights}'",
        "--metric": "size",
        "--minimize": "",
        "--maximize": "",
        "--look": "",
        "--base": "plain.pt",
        "--budget": "5",
        "--jobs": "2",
        "--out": "other",
        "--like": "plain.pt",
        "--json": "",
        "--t": "100",
        "--step": "100",
        "--raw": "like.pt",
    },
    "error-plot": {
        "--out": "other.svg",
        "--overwrite": "",
        "--json": "",
        "--decay": "0.9",
        "--target": "window:100",
        "--sigma-range": "0.1:0.2",
        "--t": "100",
        "--method": "paper",
        "--steps": "800",
        "--every": "50",
        "--keep": "5",
    },
    "info": {"--json": ""},
    "audit": {
        "--claimed": "0.5",
        "--step-from": r"'[^\d]*(\d)'",
        "--steps-per-epoch": "10",
        "--first-epoch": "0",
        "--out": "other.svg",
        "--overwrite": "",
        "--json": "",
    },
    "verify": {"--json": ""},
    "import": {
        "--out": "taken",
        "--from": "checkpoints",
        "--step-from": r"'[^\d]*(\d)'",
        "--include": "'w*'",
        "--exclude": "'w*'",
        "--sigma-rels": "0.1",
        "--update-every": "2",
        "--update-after-step": "50",
        "--ema-decay": "0.5",
        "--ema-warmup": "ratio",
        "--steps": "600",
        "--steps-per-epoch": "10",
        "--first-epoch": "0",
        "--average": "model",
        "--weights": "ema",
        "--exchanged": "100",
        "--overwrite": "",
        "--dry-run": "",
        "--json": "",
    },
    "export": {
        "--out": "a.zip",
        "--dtype": "float16",
        "--layout": "pt",
        "--max-shard-size": "40B",
        "--like": "plain.pt",
        "--overwrite": "",
        "--json": "",
        "--raw": "",
        "--average": "other",
        "--weights": "other",
    },
    "prune": {
        "--keep": "3",
        "--yes": "",
        "--dry-run": "",
        "--sigma-range": "0.1:0.2",
        "--json": "",
    },
    "demo": {"--out": "other", "--json": "", "--steps": "200"},
    "guide": {"--json": ""},
}
"""What is added to a line for each option of a command; it must matter."""
NEEDS_LIKE = {
    "--raw": "needs --like",
    "--average": "needs --like",
    "--weights": "needs --like",
}
ONE_FILE = {
    "--decay": "is one file for 2 targets",
    "--target": "is one file for 2 targets",
    "--out": "its extension is unknown",
    "--like": "must end in .pt",
}
NO_SCHEDULE = {
    "--steps": "name a directory, or give --steps",
    "--every": "give --steps in place of DIR",
    "--keep": "give --steps in place of DIR",
}
NO_EPOCHS = {
    "--steps-per-epoch": "does not apply to numbers that are steps",
    "--first-epoch": "does not apply to numbers that are steps",
}
FOUND_DECAY = {
    "--sigma-rels": "does not fit the files",
    "--update-every": "must be given",
    "--ema-decay": "does not fit the files",
    "--steps": "is of no use",
}
OTHER_SETS = {
    "--average": "the average moves farther than the weights",
    "--weights": "must be given",
}
"""What several ways to call a command refuse."""
REFUSED = {
    "synthesize": {
        "--device": "choose from auto",
        "--base": "needs --base-share",
        "--base-share": "needs --base",
    },
    "synthesize a file": {
        **ONE_FILE,
        **NEEDS_LIKE,
    },
    "synthesize a folder": {
        **NEEDS_LIKE,
    },
    "synthesize a copy": {
        "--decay": "is one file for 2 targets",
        "--target": "is one file for 2 targets",
        "--out": "must end in .pt",
        "--dtype": "at most one of --like, --dtype",
        "--include": "at most one of --like, --include",
        "--exclude": "at most one of --like, --exclude",
    },
    "synthesize nothing": {
        "--out": "its extension is unknown",
        "--overwrite": "at most one of --overwrite, --dry-run",
        **NEEDS_LIKE,
    },
    "synthesize checkpoints": {
        **ONE_FILE,
        **NEEDS_LIKE,
    },
    "sweep": {"--run": "is called --eval", "--maximize": "at most one of"},
    "sweep a range": {
        "--decay": "at most one of --sigma-rel, --decay",
        "--look": "at most one of --minimize, --maximize, --look",
    },
    "sweep a list": {
        "--decay": "at most one of --sigma-rel, --decay",
        "--look": "at most one of --minimize, --maximize, --look",
        "--budget": "a list is measured as it is",
    },
    "sweep decays": {
        "--sigma-rel": "at most one of --sigma-rel, --decay",
        "--look": "at most one of --minimize, --maximize, --look",
        "--budget": "a list is measured as it is",
        "--t": "is longer than the uniform average",
        "--step": "is longer than the uniform average",
    },
    "sweep a look": {
        "--base": "at most one of --look, --base",
        "--decay": "at most one of --sigma-rel, --decay",
        "--metric": "at most one of --look, --metric",
        "--minimize": "at most one of --minimize, --maximize, --look",
    },
    "error-plot snapshots": {
        "--overwrite": "needs --out",
        **NO_SCHEDULE,
    },
    "error-plot checkpoints": {
        "--overwrite": "needs --out",
        **NO_SCHEDULE,
    },
    "error-plot a picture": {
        **NO_SCHEDULE,
    },
    "error-plot a schedule": {"--overwrite": "needs --out"},
    "audit checkpoints": {
        **NO_EPOCHS,
        "--overwrite": "needs --out",
    },
    "audit epochs": {"--overwrite": "needs --out"},
    "audit a picture": {
        **NO_EPOCHS,
    },
    "import": {"--out": "holds something else", "--exchanged": "are exchanged in 1 file"},
    "import an average": {
        **FOUND_DECAY,
        **NO_EPOCHS,
        **OTHER_SETS,
    },
    "import a counted average": {
        "--step-from": "counts the updates",
        "--sigma-rels": "does not fit the files",
        "--update-every": "counts the updates",
        "--update-after-step": "is of no use",
        "--ema-decay": "does not fit the files",
        "--steps": "is of no use",
        **NO_EPOCHS,
        **OTHER_SETS,
    },
    "import a schedule": {
        "--from": "--ema-warmup: does not apply",
        "--sigma-rels": "at most one of --sigma-rels, --ema-warmup",
        "--update-every": "does not fit the files",
        "--ema-decay": "has no place beside",
        "--ema-warmup": "must be given",
        **NO_EPOCHS,
        **OTHER_SETS,
    },
    "import weights": {
        "--exchanged": "is the step of no files",
        "--sigma-rels": "does not apply to files that are taken for weights",
        "--update-every": "does not apply to files that are taken for weights",
        "--update-after-step": "does not apply to files that are taken for weights",
        "--ema-decay": "does not apply to files that are taken for weights",
        "--ema-warmup": "does not apply to files that are taken for weights",
        "--steps": "does not apply to files that are taken for weights",
        **NO_EPOCHS,
        "--average": "has no set of tensors",
        "--weights": "has no set of tensors",
    },
    "import epochs": {
        **FOUND_DECAY,
        "--steps-per-epoch": "must be given",
        **OTHER_SETS,
    },
    "import nothing": {
        **FOUND_DECAY,
        **NO_EPOCHS,
        **OTHER_SETS,
        "--overwrite": "at most one of --overwrite, --dry-run",
    },
    "export a model": {
        "--out": "its extension is unknown",
        "--layout": "does not fit the layout pt",
        "--max-shard-size": "applies to sharded outputs only",
        "--like": "must end in .pt",
        "--raw": "is for a training's checkpoint",
        "--average": "has no set of tensors",
        "--weights": "has no set of tensors",
    },
    "export shards": {
        "--out": "its extension is unknown",
        "--layout": "applies to sharded outputs only",
        "--like": "at most one of --like, --max-shard-size",
        "--raw": "is for a training's checkpoint",
        "--average": "has no set of tensors",
        "--weights": "has no set of tensors",
    },
    "export a checkpoint": {
        "--out": "its extension is unknown",
        "--layout": "does not fit the layout pt",
        "--max-shard-size": "applies to sharded outputs only",
        "--like": "must end in .pt",
    },
    "export a copy": {
        "--out": "must end in .pt",
        "--dtype": "at most one of --like, --dtype",
        "--layout": "at most one of --like, --layout",
        "--max-shard-size": "at most one of --like, --max-shard-size",
    },
    "prune for good": {"--dry-run": "at most one of --yes, --dry-run"},
    "prune nothing": {"--yes": "at most one of --yes, --dry-run"},
}
"""Which of these are refused, and words of the message: in each way to call a command, or in
one."""
BEFORE = {"import": "import alone --include w --out imported"}
"""What is done before --overwrite is given; else the same without it."""

MEASURE = """
mkdir -p jobs
touch jobs/$2
echo size: $(wc -c < "$1")
cksum < "$1" | cut -c 1-4
"""
SHOW = """
mkdir -p jobs
touch jobs/$2-${1##*.}
printf '\\211PNG\\r\\n' > "$3/sample.png"
"""


def write_checkpoints(place):
    """Write a random walk with its EMA, also by epochs and with a decay that rises to 1; weights
    alone; and a count of the updates."""
    random = torch.Generator().manual_seed(0)
    weights = torch.zeros(600)
    average = torch.zeros(600)
    scheduled = torch.zeros(600)
    for step in range(1, 401):
        weights = weights + 0.1 * torch.randn(600, generator=random)
        average = 0.9 * average + 0.1 * weights
        decay = 1 - 0.1 * (1 + math.cos(math.pi * (step - 1) / 500)) / 2
        scheduled = decay * scheduled + (1 - decay) * weights
        if step % 20 == 0:
            model = name_tensors(weights)
            ema = name_tensors(average)
            for file, content in {
                f"ck/step{step}.pt": {"model": model, "ema": ema, "other": ema},
                f"counted/step{step}.pt": {"model": model, "ema": {"n_averaged": step, **ema}},
                f"epochs/epoch{step // 20:03}.pt": {"model": model, "ema": ema},
                f"cosine/step{step}.pt": {"model": model, "ema": name_tensors(scheduled)},
                f"alone/step{step}.pt": model,
            }.items():
                store(place / file, content)


def name_tensors(values):
    return {"w": values[:300].reshape(100, 3).clone(), "b": values[300:].clone()}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with what the lines above name."""
    place = tmp_path_factory.mktemp("places")
    (place / "taken").mkdir()
    (place / "taken/text").write_text("precious")
    (place / "measure").write_text(MEASURE)
    (place / "again").write_text(f"{MEASURE}{SHOW}".replace("$3", "$2"))
    (place / "show").write_text(SHOW)
    write_checkpoints(place)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with PostHocEMA.from_model(model, place / "run", checkpoint_every=100) as tracker:
        for _ in range(800):
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            tracker.update_(model)
    sets = {}
    for name in ("model", "ema", "other"):
        sets[name] = {key: value + 0.01 * len(sets) for key, value in model.state_dict().items()}
    torch.save(sets, place / "like.pt")
    torch.save({"model": sets["model"]}, place / "plain.pt")
    save_file(sets["ema"], place / "model.safetensors")
    return place


class Folder:
    """A copy of a folder, in which lines are run."""

    def __init__(self, places, path):
        self._path = Path(shutil.copytree(places, path))

    def run(self, line):
        """Run `ema` with a line; return what came of it, without what differs from time to time."""
        done = run_ema(*shlex.split(line))
        printed = done.shown.replace(str(self._path), ".")
        printed = re.sub(r"\d+(\.\d+)? s\b", "", printed)
        printed = re.sub(r", about +left|\"(?:seconds|run)\": \S+", "", printed)
        return done.code, printed, self.list_files()

    def list_files(self):
        files = {}
        for file in self._path.rglob("*"):
            is_result = file.suffix in (".pt", ".safetensors", ".svg") or file.name == MANIFEST
            is_read = is_result and file.is_file() and "ema-demo" not in file.parts
            files[file.relative_to(self._path)] = file.read_bytes() if is_read else b""
        return files


@pytest.fixture
def fresh(places, tmp_path, monkeypatch):
    """Return a function that makes a copy of the folder the working directory."""
    numbers = itertools.count()

    def make():
        path = tmp_path / str(next(numbers))
        folder = Folder(places, path)
        monkeypatch.chdir(path)
        return folder

    return make


def words_of(way):
    name, _, _ = way.partition(" ")
    return name, f"{name} {WAYS[way]}"


def added_options(way):
    """Yield the options that a line does not have, or whose value another one replaces."""
    name, line = words_of(way)
    for option, value in ADDED[name].items():
        parameter = options(name)[option]
        if option not in shlex.split(line) or not (parameter.is_flag or parameter.multiple):
            yield option, value


def test_each_option_of_each_command_has_a_row():
    for name in commands():
        assert {option.opts[0] for option in options(name).values()} == {*ADDED[name]}
        assert any(words_of(way)[0] == name for way in WAYS)


HEAVY = ("sweep", "audit", "import", "demo", "synthesize checkpoints", "error-plot checkpoints")


def is_heavy(way):
    return way.startswith(HEAVY) and way not in ("import weights", "sweep a list")


@pytest.mark.parametrize(
    "way", [*each_heavy(*filter(is_heavy, WAYS)), *itertools.filterfalse(is_heavy, WAYS)]
)
def test_each_option_matters_or_is_refused(way, fresh):
    name, line = words_of(way)
    refused = REFUSED.get(name, {}) | REFUSED.get(way, {})
    plain = fresh().run(line)
    assert plain[0] == 0, plain[1]
    assert fresh().run(line) == plain  # else anything would seem to matter
    for option, value in added_options(way):
        folder = fresh()
        without = plain
        if option == "--overwrite":
            folder.run(BEFORE.get(name, line))
            without = folder.run(line)
        before = folder.list_files()
        code, printed, files = folder.run(f"{line} {option} {value}")
        assert (code, printed, files) != without, option
        if option in refused:
            assert code == 2, printed
            *_, message = printed.splitlines()
            assert refused[option] in message
            assert files == before
        else:
            assert code != 2, printed


COUNTED = {
    "synthesize": WAYS["synthesize nothing"],
    "sweep": "run --eval 'absent {weights}' --minimize --sigma-rel 0.05:0.2",
    "error-plot": WAYS["error-plot a schedule"],
    "audit": WAYS["audit epochs"],
    "import": "epochs --steps-per-epoch 20 --dry-run",
    "prune": WAYS["prune nothing"],
    "demo": "--out taken",
}
"""Lines to which counts are added; most are too large for them."""


def find_counts():
    """Find the options that are a count, a time or the number of an epoch."""
    found = []
    for name in commands():
        for option, parameter in options(name).items():
            if parameter.metavar in ("COUNT", "TIME", "NUMBER", "STEPS"):
                found.append((name, option))
    return found


@pytest.mark.parametrize(("name", "option"), find_counts())
def test_a_count_may_be_written_as_people_write_it(name, option, places, monkeypatch):
    line = f"{name} {COUNTED[name]}"
    monkeypatch.chdir(places)
    spelled = ["1K", "1e3", "1_000"]
    if options(name)[option].metavar != "STEPS":  # a list
        spelled.append("1,000")

    def answer(text):
        done = run_ema(*shlex.split(f"{line} {option} {text}"))
        return done.code, re.sub(r"\d+(\.\d+)? s\b", "", done.shown)

    assert {answer(text) for text in spelled} == {answer("1000")} != {answer("x")}


def test_no_command_lets_its_parser_read_a_whole_number():
    """It would refuse 1K."""
    for function in EXAMPLES:
        for name, hint in get_type_hints(function).items():
            assert name == "return" or int not in (hint, *get_args(hint)), function


@pytest.mark.parametrize("text", ["1,5", "1,5K", "1,0000", "1.5", "x", "1e30", "-1", "nan", "''"])
def test_what_may_mean_another_number_is_no_count(text, places, monkeypatch):
    monkeypatch.chdir(places)
    refused = run_ema(*shlex.split(f"prune run --dry-run --keep={text}"))
    assert refused.code == 2
    assert refused.error.startswith("--keep ")
    assert "must be a whole number" in refused.error

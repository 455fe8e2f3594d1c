"""Each option of each command, in each way to call the command, changes what it does, or is
refused: none is ignored. And counts are read in one notation.

The tables of the command line say which options there are: a new one fails here without a row.
"""

import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from ema_command import run_ema
from proposals import commands, options
from safetensors.torch import save_file
from saved import store
from torch import nn

from posthoc_cli import PostHocEMA
from posthoc_cli.checkpoints.manifest import MANIFEST

WAYS = {
    "synthesize a file": "run --sigma-rel 0.15 --out a.safetensors",
    "synthesize a folder": "run --sigma-rel 0.1,0.15 --out averages",
    "synthesize a copy": "run --sigma-rel 0.15 --like like.pt --out a.pt",
    "synthesize nothing": "run --sigma-rel 0.15 --dry-run",
    "synthesize checkpoints": "ck --sigma-rel 0.15 --out a.safetensors",
    "sweep a range": "run --eval 'sh measure {weights} {job}' --minimize --sigma-rel 0.05:0.2",
    "sweep a list": "run --eval 'sh measure {weights} {job}' --minimize --sigma-rel 0.05,0.2",
    "sweep decays": "run --eval 'sh measure {weights} {job}' --minimize --decay 0.95:0.99",
    "sweep a look": "run --eval 'sh show {weights} {job} {dir}' --look --sigma-rel 0.05:0.2",
    "error-plot snapshots": "run",
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
    "export a model": "model.safetensors --out new.safetensors",
    "export shards": "model.safetensors --out shards",
    "export a checkpoint": "like.pt --out new.safetensors",
    "export a copy": "model.safetensors --like like.pt --out new.pt",
    "prune": "run --keep 5 --yes",
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
        "--t": "500",
        "--step": "500",
        "--method": "paper",
        "--max-error": "1e-9",
        "--dtype": "float16",
        "--include": "'*w*'",
        "--exclude": "'*w*'",
        "--device": "gpu",
        "--like": "like.pt",
        "--overwrite": "",
        "--raw": "",
        "--average": "other",
        "--weights": "other",
        "--dry-run": "",
    },
    "sweep": {
        "--sigma-rel": "0.1:0.2",
        "--decay": "0.95:0.99",
        "--eval": "'sh other {weights}'",
        "--run": "'sh measure {weights}'",
        "--metric": "size",
        "--minimize": "",
        "--maximize": "",
        "--look": "",
        "--budget": "5",
        "--jobs": "2",
        "--out": "other",
        "--like": "like.pt",
        "--json": "",
        "--t": "500",
        "--step": "500",
        "--raw": "like.pt",
    },
    "error-plot": {
        "--out": "other.svg",
        "--overwrite": "",
        "--json": "",
        "--decay": "0.9",
        "--target": "window:100",
        "--sigma-range": "0.1:0.2",
        "--t": "500",
        "--method": "paper",
        "--steps": "900",
        "--every": "50",
        "--keep": "5",
    },
    "info": {"--json": ""},
    "audit": {
        "--claimed": "0.5",
        "--step-from": r"'step(\d)'",
        "--steps-per-epoch": "20",
        "--first-epoch": "0",
        "--out": "audit.svg",
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
        "--steps": "1000",
        "--steps-per-epoch": "20",
        "--first-epoch": "0",
        "--average": "model",
        "--weights": "ema",
        "--overwrite": "",
        "--dry-run": "",
        "--json": "",
    },
    "export": {
        "--dtype": "float16",
        "--layout": "pt",
        "--max-shard-size": "1KB",
        "--like": "like.pt",
        "--overwrite": "",
        "--json": "",
        "--raw": "",
        "--average": "other",
        "--weights": "other",
    },
    "prune": {
        "--yes": "",
        "--dry-run": "",
        "--sigma-range": "0.1:0.2",
        "--json": "",
    },
    "demo": {"--out": "other", "--json": "", "--steps": "100"},
    "guide": {"--json": ""},
}
"""What is added to a line for each option: it must matter."""

REFUSED = {
    "synthesize": {"--device": "choose from auto"},
    "synthesize a file": {
        "--decay": "2 targets",
        "--target": "2 targets",
        "--like": "must end in .pt",
        "--raw": "needs --like",
        "--average": "needs --like",
        "--weights": "needs --like",
    },
}
"""Which of these are refused, with words of the message: in all ways to call a command, or in
one."""

MEASURE = """
mkdir -p jobs
touch jobs/$2
echo size: $(wc -c < "$1")
cksum < "$1" | cut -c 1-4
"""
SHOW = """
mkdir -p jobs
touch jobs/$2
printf '\\211PNG\\r\\n' > "$3/sample.png"
"""


def write_checkpoints(place):
    """Write a random walk with its EMA, also by epochs and with a decay that rises to 1; weights
    alone; and a count of the updates."""
    random = torch.Generator().manual_seed(0)
    weights = torch.zeros(60)
    average = torch.zeros(60)
    scheduled = torch.zeros(60)
    for step in range(1, 401):
        weights = weights + 0.1 * torch.randn(60, generator=random)
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
    return {"w": values[:30].reshape(10, 3).clone(), "b": values[30:].clone()}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with what the lines above name."""
    place = tmp_path_factory.mktemp("places")
    (place / "taken").mkdir()
    (place / "taken/text").write_text("precious")
    (place / "measure").write_text(MEASURE)
    (place / "other").write_text("echo 1.5")
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
        printed = re.sub(r", about +left|\"seconds\": \S+", "", printed)
        return done.code, printed, self._list_files()

    def _list_files(self):
        files = {}
        for file in sorted(self._path.rglob("*")):
            name = str(file.relative_to(self._path))
            is_result = file.suffix in (".pt", ".safetensors") or file.name == MANIFEST
            files[name] = file.read_bytes() if is_result and file.is_file() else b""
        return files


@pytest.fixture
def fresh(places, tmp_path, monkeypatch):
    """Return a function that makes a copy of the folder, and makes it the working directory."""
    made = []

    def make():
        made.append(Folder(places, tmp_path / str(len(made))))
        monkeypatch.chdir(tmp_path / str(len(made) - 1))
        return made[-1]

    return make


def added_options(way):
    """Return the options that a way to call a command does not use itself, with their values."""
    name, _, _ = way.partition(" ")
    used = shlex.split(WAYS[way])
    return {option: value for option, value in ADDED[name].items() if option not in used}

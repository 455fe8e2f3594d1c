"""Runs and checkpoints in a bucket: each command does the same as with the files on a disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors
from ema_command import Ema
from factories import random_walk, split_snapshot, write_run
from remote.servers import Server
from safetensors.torch import load_file, save_file

from posthoc_cli import Run

SHAPES = {"large": (400, 350), "small": (7,), "scalar": ()}
STEPS = (10, 20, 30, 40)


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "bucket"
    walk = random_walk(max(STEPS), SHAPES)
    (folder / "run").mkdir(parents=True)
    write_run(folder / "run", walk, STEPS, dtype=torch.float16)
    shutil.copytree(folder / "run", folder / "parted")
    for path in sorted((folder / "parted").iterdir()):
        split_snapshot(path)
    (folder / "pickles").mkdir()
    for step in STEPS:
        values = walk[step - 1]
        weights = {name: torch.tensor(value).float() for name, value in values.items()}
        (folder / f"folders/checkpoint-{step}").mkdir(parents=True)
        save_file(weights, folder / f"folders/checkpoint-{step}/model.safetensors")
        torch.save({"state_dict": weights, "global_step": step}, folder / f"pickles/step{step}.pt")
    return folder


@pytest.fixture
def made(_made: Path, serve: Callable[[Path], Server]) -> Path:
    serve(_made.parent)
    return _made


BUCKET = "s3://bucket"


@pytest.mark.parametrize("name", ["run", "parted"])
def test_averages_of_a_run_in_a_bucket_are_those_of_its_copy_on_a_disk(
    made: Path,
    name: str,
) -> None:
    local = Run(made / name)
    remote = Run(f"{BUCKET}/{name}")
    assert repr(remote) == repr(local).replace(str(made), BUCKET)
    for target in (0.15, "window:10"):
        wanted = local.average(target)
        found = remote.average(target)
        assert found.predicted_error == wanted.predicted_error
        assert_same_tensors(found, wanted)
    assert facts_of(remote).replace(BUCKET, str(made)) == facts_of(local)


def facts_of(run: Run) -> str:
    facts = run.info() | {"path": "", "bytes": 0}
    return json.dumps(facts, default=str)


@pytest.mark.parametrize("place", ["folders", "folders/checkpoint-*", "pickles/step*.pt"])
def test_checkpoints_in_a_bucket_are_averaged(made: Path, place: str) -> None:
    found = Run(f"{BUCKET}/{place}").average("last:3")
    _, *last = sorted((made / "folders").rglob("*.safetensors"))
    weights = [load_file(path) for path in last]
    for name, value in found.items():
        mean = sum(each[name].double() for each in weights) / 3
        torch.testing.assert_close(value.double(), mean, rtol=3e-7, atol=1e-7)


@pytest.mark.usefixtures("made")
def test_each_command_takes_a_url(ema: Ema, tmp_path: Path) -> None:
    run = f"{BUCKET}/run"
    file = f"{run}/0000000000000040-0.05.safetensors"
    out = tmp_path / "out.safetensors"
    other = tmp_path / "other.safetensors"
    synthesis = ["synthesize", run, "--sigma-rel", "0.1", "--out", out]
    assert ema("info", run, "--json").json["path"] == run
    assert ema("error-plot", run, "--out", tmp_path / "error.png").code == 0
    assert "would read " in ema(*synthesis, "--dry-run").out
    assert ema(*synthesis).code == 0
    for path in (run, file, f"{BUCKET}/parted"):
        assert "all intact" in ema("verify", path).out
    assert ema("export", file, "--out", tmp_path / "one.pt").code == 0
    assert ema("prune", run, "--keep", "3", "--dry-run").code == 0
    done = ema("synthesize", f"{BUCKET}/folders", "--sigma-rel", "0.1", "--out", other)
    assert done.code == 0

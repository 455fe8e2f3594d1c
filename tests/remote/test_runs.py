"""Runs and checkpoints in a bucket: each command does the same as with the files on a disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ema_command import Ema
from factories import random_walk, split_snapshot, write_run
from remote.objects import upload
from safetensors.torch import load_file, save_file

from posthoc_cli import Run

SHAPES = {"large": (600, 500), "small": (7,), "scalar": ()}
STEPS = (10, 20, 30, 40)


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    walk = random_walk(max(STEPS), SHAPES)
    (folder / "run").mkdir()
    write_run(folder / "run", walk, STEPS, dtype=torch.float16)
    shutil.copytree(folder / "run", folder / "parted")
    for path in sorted((folder / "parted").iterdir()):
        split_snapshot(path)
    for step in STEPS:
        weights = {
            name: torch.tensor(value, dtype=torch.float32) for name, value in walk[step - 1].items()
        }
        (folder / f"folders/checkpoint-{step}").mkdir(parents=True)
        save_file(weights, folder / f"folders/checkpoint-{step}/model.safetensors")
        (folder / "pickles").mkdir(exist_ok=True)
        torch.save({"state_dict": weights, "global_step": step}, folder / f"pickles/step{step}.pt")
    return folder


@pytest.fixture
def made(_made: Path, bucket: str) -> Path:
    upload(_made, bucket)
    return _made


@pytest.mark.parametrize("name", ["run", "parted"])
def test_averages_of_a_run_in_a_bucket_are_those_of_its_copy_on_a_disk(
    made: Path,
    bucket: str,
    name: str,
) -> None:
    local = Run(made / name)
    remote = Run(f"{bucket}/{name}")
    assert repr(remote) == repr(local).replace(str(made), bucket)
    for target in (0.15, "window:10"):
        wanted = local.average(target)
        found = remote.average(target)
        assert found.predicted_error == wanted.predicted_error
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert found.keys() == wanted.keys()
    facts = [run.info() | {"path": "", "bytes": 0} for run in (local, remote)]
    assert json.dumps(facts[1], default=str).replace(bucket, str(made)) == json.dumps(
        facts[0],
        default=str,
    )


@pytest.mark.parametrize(
    "place", ["folders", "folders/checkpoint-*", "pickles", "pickles/step*.pt"]
)
def test_checkpoints_in_a_bucket_are_averaged(made: Path, bucket: str, place: str) -> None:
    found = Run(f"{bucket}/{place}").average("last:3")
    weights = [
        load_file(made / f"folders/checkpoint-{step}/model.safetensors") for step in STEPS[-3:]
    ]
    for name, value in found.items():
        mean = torch.stack([each[name].double() for each in weights]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=3e-7, atol=1e-7)


def test_each_command_takes_a_url(made: Path, bucket: str, ema: Ema, tmp_path: Path) -> None:
    run = f"{bucket}/run"
    out = tmp_path / "out.safetensors"
    assert ema("info", run, "--json").json["path"] == run
    assert ema("error-plot", run, "--out", tmp_path / "error.png").code == 0
    assert (
        "would read " in ema("synthesize", run, "--sigma-rel", "0.1", "--out", out, "--dry-run").out
    )
    assert ema("synthesize", run, "--sigma-rel", "0.1", "--out", out).code == 0
    for path in (run, f"{run}/0000000000000040-0.05.safetensors", f"{bucket}/parted"):
        assert "all intact" in ema("verify", path).out
    assert (
        ema("export", f"{run}/0000000000000040-0.05.safetensors", "--out", tmp_path / "one.pt").code
        == 0
    )
    assert ema("prune", run, "--keep", "3", "--dry-run").code == 0
    assert (
        ema(
            "synthesize",
            f"{bucket}/folders",
            "--out",
            tmp_path / "with.safetensors",
            "--sigma-rel",
            "0.1",
        ).code
        == 0
    )

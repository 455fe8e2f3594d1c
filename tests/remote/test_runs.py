"""Runs and checkpoints in a bucket: each command does the same as with the files on a disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ema_command import Ema
from factories import random_walk, split_snapshot, write_run
from remote.faulty import FaultyServer
from safetensors.torch import load_file, save_file

from posthoc_cli import Run, export_file
from posthoc_cli.errors import InvalidValueError, OutputExistsError, RemoteError, WriteError
from posthoc_cli.remote import store
from posthoc_cli.remote.store import remote_path

SHAPES = {"large": (600, 500), "small": (7,), "scalar": ()}
STEPS = (10, 20, 30, 40)


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, walk = tmp_path_factory.mktemp("made"), random_walk(max(STEPS), SHAPES)
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


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.fixture
def made(_made: Path, bucket: str) -> Path:
    for path in _made.rglob("*"):
        if path.is_file():
            store.put(f"{bucket}/{path.relative_to(_made).as_posix()}", path)
    return _made


@pytest.mark.parametrize("name", ["run", "parted"])
def test_averages_of_a_run_in_a_bucket_are_those_of_its_copy_on_a_disk(
    made: Path, bucket: str, name: str
) -> None:
    local, remote = Run(made / name), Run(f"{bucket}/{name}")
    assert repr(remote) == repr(local).replace(str(made), bucket)
    for target in (0.15, "window:10"):
        wanted, found = local.average(target), remote.average(target)
        assert found.predicted_error == wanted.predicted_error
        assert (
            all(torch.equal(found[key], wanted[key]) for key in wanted)
            and found.keys() == wanted.keys()
        )
    facts = [run.info() | {"path": "", "bytes": 0} for run in (local, remote)]
    assert json.dumps(facts[1], default=str).replace(bucket, str(made)) == json.dumps(
        facts[0], default=str
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
    run, out = f"{bucket}/run", tmp_path / "out.safetensors"
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


def test_an_output_appears_in_the_bucket_complete_and_replaces_nothing(
    made: Path, bucket: str, tmp_path: Path, temporary: Path
) -> None:
    run, local = Run(f"{bucket}/run"), tmp_path / "local.safetensors"
    run.write(0.15, local)
    for name in ("one.safetensors", "one.pt"):
        run.write(0.15, f"{bucket}/out/{name}")
        with pytest.raises(OutputExistsError, match=f"^{bucket}/out/{name}: already exists"):
            run.write(0.2, f"{bucket}/out/{name}")
    run.write(0.15, f"{bucket}/out/one.safetensors", overwrite=True)
    assert bytes(store.get(f"{bucket}/out/one.safetensors", 0, 10**9)[0]) == local.read_bytes()
    run.write([0.15, 0.2], f"{bucket}/several/")
    run.write(0.15, f"{bucket}/shards", layout="sharded", max_shard_size="100KB", overwrite=True)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(
            OutputExistsError, match=r"shards: already exists, and holds .*; name a new folder$"
        ):
            run.write(0.2, f"{bucket}/shards", layout="sharded", **options)
    assert not [*temporary.iterdir()]
    keys = [
        f"{folder}/{name}"
        for folder in ("out", "several")
        for name in store.listed(f"{bucket}/{folder}")
    ]
    assert sorted(keys) == [
        "out/one.pt",
        "out/one.safetensors",
        "several/sigma_rel-0.15.safetensors",
        "several/sigma_rel-0.2.safetensors",
    ]


@pytest.mark.parametrize("way", ["write", "export"])
def test_shards_are_sent_one_by_one_and_deleted_if_one_fails(
    server: FaultyServer,
    bucket: str,
    tmp_path: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    taken: list[int] = []

    def measure(_: Any) -> None:
        taken.append(sum(path.stat().st_blocks * 512 for path in temporary.iterdir()))

    source = f"{bucket}/step1.safetensors"
    save_file(
        {f"w{n}": torch.randn(300, 1000) for n in range(5)} | {"b": torch.randn(3)},
        tmp_path / "step1",
    )
    store.put(source, tmp_path / "step1")

    def make(size: str) -> None:
        if way == "write":
            Run(source).write("last:1", f"{bucket}/shards", layout="sharded", max_shard_size=size)
        else:
            export_file(remote_path(source), remote_path(f"{bucket}/shards"), max_shard_size=size)

    server.answer = lambda request: (
        403 if (request["METHOD"], "00003-of" in request["KEY"]) == ("PUT", True) else None
    )
    with pytest.raises(RemoteError, match="access is denied"):
        make("1300KB")
    assert not store.listed(f"{bucket}/shards") and not [*temporary.iterdir()]
    server.answer = measure
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_400_000))
    reason = r"takes 6,000,012 bytes, .*; set TMPDIR to .*, or make smaller shards: max_shard_size$"
    with pytest.raises(WriteError, match=reason):
        make("10MB")
    make("1300KB")
    assert len(store.listed(f"{bucket}/shards")) == 6 and max(taken) < 1_300_000
    assert not [*temporary.iterdir()]


def downloaded(url: str, folder: Path) -> Path:
    folder.mkdir()
    for name in store.listed(url):
        (folder / name).write_bytes(store.get(f"{url}/{name}", 0, 10**9)[0])
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_folders_that_libraries_write_are_sent_completely_or_not_at_all(
    made: Path, server: FaultyServer, bucket: str, tmp_path: Path, temporary: Path
) -> None:
    run, like = Run(f"{bucket}/run"), tmp_path / "like"
    like.mkdir()
    save_file(
        load_file(made / "folders/checkpoint-40/model.safetensors"), like / "model.safetensors"
    )
    (like / "config.json").write_text("{}")
    wanted = run.average(0.15)

    def refuse(request: dict[str, Any]) -> int | None:
        return (
            403
            if request["METHOD"] == "PUT" and request["KEY"].endswith((".metadata", "config.json"))
            else None
        )

    for url, options in ((f"{bucket}/dcp", {"layout": "dcp"}), (f"{bucket}/like", {"like": like})):
        server.answer = refuse
        with pytest.raises(RemoteError, match="access is denied"):
            run.write(0.15, url, **options)
        assert not store.listed(url)
        server.answer = lambda _: None
        run.write(0.15, url, **options)
        with pytest.raises(OutputExistsError):
            run.write(0.15, url, **options)
        with pytest.raises(
            InvalidValueError, match="must be a path, or begin with s3://, gs:// or az://"
        ):
            run.write(0.15, "hf://org/model/out", **options)
        assert not [*temporary.iterdir()]
    run.write(0.15, tmp_path / "local", like=like)
    for path in downloaded(f"{bucket}/like", tmp_path / "found").iterdir():
        assert path.read_bytes() == (tmp_path / "local" / path.name).read_bytes()
    assert len([*(tmp_path / "found").iterdir()]) == 2
    loaded = {name: torch.empty_like(value) for name, value in wanted.items()}
    dcp.load(loaded, checkpoint_id=downloaded(f"{bucket}/dcp", tmp_path / "loaded"), no_dist=True)
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("size", [0, 1_000_000, 20_000_000])
def test_a_file_replaces_nothing(
    server: FaultyServer, bucket: str, tmp_path: Path, size: int
) -> None:
    """The store itself refuses a small one; for a file in parts it is checked before that there is
    no such object."""
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "file").write_bytes(data)
    store.put(f"{bucket}/file", tmp_path / "file")
    assert bytes(store.get(f"{bucket}/file", 0, size + 1)[0]) == data
    server.seen.clear()
    with pytest.raises(FileExistsError):
        store.put(f"{bucket}/file", tmp_path / "file")
    assert ("GET file" in server.seen) is (size > 8 * 2**20)
    store.put(f"{bucket}/file", tmp_path / "file", create=False)
    info = store.listed(bucket)["file"]
    # S3's tag of an object in parts
    assert info is not None and ("-" in info.tag) is (size > 8 * 2**20)

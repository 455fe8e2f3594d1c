"""Shards by the ranks of a job, which here is one process: the same bytes as in one file, no mixture of two plans, and
no index before all shards are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checking import assert_same_tensors, load_output
from factories import OTHER_RUN_ID, RUN_ID, contents, flip_bit, refuse_for_space, write_snapshot
from safetensors.torch import load_file, save_file

import posthoc_cli
from posthoc_cli import Run, disk_sources, files
from posthoc_cli.errors import InvalidValueError, OutputExistsError, WriteError
from posthoc_cli.export.writing import Shards, divide
from posthoc_cli.synthesis.plan import plan_synthesis

INDEX_NAME = "model.safetensors.index.json"
SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (300, 40), "a/../b": (7,), "ü 'quoted'": (3, 5), "none": (0, 4), "one": (),
    **{f"layer.{i}.weight": (40, 50) for i in range(12)}, **{f"layer.{i}.bias": (50,) for i in range(12)},
}  # fmt: skip


def write_run(folder: Path, run_id: str = RUN_ID, seed: int = 0) -> Path:
    for t in (10, 20, 30):
        for sigma_rel in (0.05, 0.28):
            generator = torch.Generator().manual_seed(1000 * seed + t + round(100 * sigma_rel))
            values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
            values["half"] = torch.randn(90, 9, generator=generator).half()
            values["count"] = torch.tensor(t)
            tracked = {"sigma_rels": (0.05, 0.28), "aliases": {"tied": "embed"}}
            write_snapshot(folder, t, sigma_rel, run_id, values, **tracked)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """This process is the only rank of a job."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(run: Path, out: Path, target: Any = 0.1, size: int = 60_000, **options: Any) -> None:
    """Write shards, four by default, of a model of 200 kB in float32."""
    Run(run).write(target, out, distributed=True, max_shard_size=size, **options)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("size", [10, 10_000, 60_000, 10**9])
def test_any_number_of_shards_gives_the_bytes_of_one_file(
    run: Path, tmp_path: Path, size: int, dtype: str | None
) -> None:
    write(run, tmp_path / "out", [0.1, 0.2], size, dtype=dtype)
    Run(run).write([0.1, 0.2], tmp_path / "files", dtype=dtype)
    for target in ("sigma_rel-0.1", "sigma_rel-0.2"):
        folder, file = tmp_path / "out" / target, tmp_path / "files" / f"{target}.safetensors"
        rtol = 0 if dtype is None else 0.01
        torch.testing.assert_close(load_output(folder), load_file(file), rtol=rtol, atol=1e-6)
        assert sorted(contents(folder)) == [*(path.name for path in shards(folder)), INDEX_NAME]
    write(run, tmp_path / "one", 0.1, size, dtype=dtype)
    Run(run).write(0.1, tmp_path / "one.safetensors", dtype=dtype)
    assert_same_tensors(load_output(tmp_path / "one"), load_file(tmp_path / "one.safetensors"))


def test_shards_have_nearly_equal_bytes_and_are_never_empty(run: Path) -> None:
    plan = plan_synthesis(disk_sources(run), [0.1])
    specs = {name: entry.nbytes for name, entry in plan.entries.items()}
    costs = {
        name: sum(specs[n] for n in names) + sum(source.entries[name].nbytes for source in plan.sources)
        for name, names in plan.names.items()
    }
    for parts in (1, 2, 3, 7, 1000):
        division = divide(plan, parts)
        assert [name for part in division for name in part] == list(plan.newest.info.tensors)
        assert all(division)
        loads = [sum(costs[name] for name in part) for part in division]
        assert max(loads) <= sum(loads) / parts + max(costs.values())
    assert len(divide(plan, 3)) == 3


def test_a_job_that_was_killed_is_run_again_and_keeps_its_shards(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(run, out, [0.1, 0.2])
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in sorted(out.rglob("model*"))}
    first, second = out / "sigma_rel-0.1", out / "sigma_rel-0.2"
    missing = [first / INDEX_NAME, shards(first)[1], second / INDEX_NAME]
    for path in missing:
        path.unlink()
    leftover = first / ".ema-0123456789abcdef.tmp"
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    write(run, out, [0.1, 0.2])
    after = {path: (path.read_bytes(), path.stat().st_ino) for path in sorted(out.rglob("model*"))}
    assert {path: data for path, (data, _) in after.items()} == {path: data for path, (data, _) in before.items()}
    assert {path for path in before if before[path] != after[path]} <= set(missing)
    assert not leftover.exists()


def test_a_job_deletes_nothing_that_another_one_has_written_meanwhile(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, make = tmp_path / "out", Shards.make

    def interfere(self: Shards, shard: int, progress: Any) -> None:
        make(self, shard, progress)
        (out / "model-00001-of-00009.safetensors").write_bytes(b"precious")

    monkeypatch.setattr(Shards, "make", interfere)
    with pytest.raises(OutputExistsError, match=r"00009\.safetensors: is of another model"):
        write(run, out)
    assert (out / "model-00001-of-00009.safetensors").read_bytes() == b"precious"
    write(run, out, overwrite=True)
    assert not (out / "model-00001-of-00009.safetensors").exists()


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.12}, "its target is sigma_rel 0.1, not sigma_rel 0.12"), ({"t": 20}, "its t is 30, not 20"),
        ({"method": "paper"}, "its method is minvar, not paper"), ({"dtype": "float16", "size": 29_000}, "dtype, ten"),
        ({"size": 90_000}, "is of another model"),
    ],
)  # fmt: skip
def test_shards_of_two_plans_do_not_mix(
    run: Path, tmp_path: Path, options: dict[str, Any], message: str, is_finished: bool
) -> None:
    out = tmp_path / "out"
    write(run, out)
    if not is_finished:
        (out / INDEX_NAME).unlink()
        shards(out)[1].unlink()
    before = contents(out)
    with pytest.raises(OutputExistsError, match=message):
        write(run, out, **options)
    assert contents(out) == before
    write(run, out, **options, overwrite=True)
    write(run, tmp_path / "fresh", **options)
    assert contents(out) == contents(tmp_path / "fresh")


def test_shards_of_two_runs_releases_or_sets_of_snapshots_do_not_mix(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(run, out)
    before = contents(out)
    with pytest.raises(OutputExistsError, match=f"its run is {RUN_ID}, not {OTHER_RUN_ID}"):
        write(write_run(tmp_path / "2", OTHER_RUN_ID), out)
    with pytest.raises(OutputExistsError, match=r"its (release, )?snapshots"):
        write(write_run(tmp_path / "3", seed=1), out)
    monkeypatch.setattr(posthoc_cli, "__version__", "99.0")
    with pytest.raises(OutputExistsError, match=r"its (release, )?snapshots"):
        write(run, out)
    assert contents(out) == before


def test_no_index_stays_next_to_shards_of_another_plan(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fsync, calls = tmp_path / "out", files.system.fsync, []
    write(run, out)

    def fail_at_the_second(descriptor: int) -> None:
        calls.append(descriptor)
        refuse_for_space() if len(calls) == 2 else fsync(descriptor)

    monkeypatch.setattr(files.system, "fsync", fail_at_the_second)
    with pytest.raises(WriteError, match="no space left"):
        write(run, out, 0.2, overwrite=True)
    assert sorted(contents(out)) == [path.name for path in shards(out)]
    monkeypatch.undo()
    with pytest.raises(OutputExistsError, match="is another output"):
        write(run, out, 0.2)
    write(run, out, 0.2, overwrite=True)
    write(run, tmp_path / "fresh", 0.2)
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("place", ["header", "payload", "end"])
def test_a_damaged_shard_is_named_and_replaced_only_with_overwrite(run: Path, tmp_path: Path, place: str) -> None:
    out = tmp_path / "out"
    write(run, out)
    before, path = contents(out), shards(out)[2]
    if place == "end":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip_bit(path, {"header": 100, "payload": -5}[place])
    with pytest.raises(OutputExistsError, match=path.name):
        write(run, out)
    write(run, out, overwrite=True)
    assert contents(out) == before


def test_files_of_other_models_are_not_replaced(run: Path, tmp_path: Path) -> None:
    out, shard = tmp_path / "out", tmp_path / "out" / "model-00001-of-00004.safetensors"
    out.touch()
    with pytest.raises(OutputExistsError, match="is a file"):
        write(run, out)
    out.unlink()
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match=r"model\.safetensors: is of another model"):
        write(run, out)
    assert contents(out) == {"model.safetensors": b"precious"}
    save_file({"w": torch.ones(2)}, shard)
    with pytest.raises(OutputExistsError, match=r"not an output of this package: has no header of it"):
        write(run, out)
    shutil.copy(min(run.iterdir()), shard)
    with pytest.raises(OutputExistsError, match="is a snapshot of a run and is not replaced"):
        write(run, out, overwrite=True)


@pytest.mark.parametrize("operation", ["fsync", "link"])
def test_a_failure_leaves_no_shard_and_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(files.system, operation, refuse_for_space)
    with pytest.raises(WriteError, match="no space left"):
        write(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "options"), [("m.safetensors", {}), ("m.pt", {}), ("m", {"layout": "pt"}), ("m", {"layout": "dcp"})]
)
def test_a_job_makes_a_folder_of_shards(run: Path, tmp_path: Path, out: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match="makes a folder of shards; name a folder; an export makes one file"):
        Run(run).write(0.1, tmp_path / out, distributed=True, **options)
    report = Run(run).write(0.1, tmp_path / "m", distributed=True, dry_run=True)
    assert report is not None
    assert report.outputs == ()
    assert not (tmp_path / "m").exists()

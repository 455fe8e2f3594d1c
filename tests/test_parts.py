"""A synthesis in parts: the same bytes as one file, parts that never mix, and no model before its index; its processes
end together, and name the one that failed or died."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import assert_same_tensors
from ema_command import Ema, Result
from factories import OTHER_RUN_ID, RUN_ID, contents, flip_bit, refuse_for_space, write_snapshot
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore

import posthoc_cli
from posthoc_cli import files
from posthoc_cli.checkpoints.opening import disk_sources
from posthoc_cli.errors import OutputExistsError, RankError, WriteError
from posthoc_cli.export import ranks
from posthoc_cli.export.layouts import write_synthesis
from posthoc_cli.export.parts import Part, PartedSynthesis, divide, finish, parts_for
from posthoc_cli.export.ranks import Ranks
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


def parted(run: Path, out: Path, parts: int, targets: tuple[float, ...] = (0.1,), **options: Any) -> PartedSynthesis:
    plan = plan_synthesis(disk_sources(run), targets, **options)
    folders = [out] if len(targets) == 1 else [out / str(target) for target in targets]
    return PartedSynthesis(plan, folders, parts, container=out)


def load(folder: Path) -> dict[str, torch.Tensor]:
    weight_map = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    shards = {name: load_file(folder / name) for name in set(weight_map.values())}
    assert sorted(weight_map) == sorted(name for shard in shards.values() for name in shard)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 50])
def test_any_number_of_parts_gives_together_the_bytes_of_one_file(
    run: Path, tmp_path: Path, parts: int, dtype: str | None
) -> None:
    job = parted(run, tmp_path / "out", parts, (0.1, 0.2), dtype=dtype)
    for number in range(parts, 0, -1):
        job.make(Part(number, parts))
        assert not list((tmp_path / "out").rglob("*.json"))
    finish(job)
    whole = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    write_synthesis(job.plan, whole)
    for path, folder in zip(whole, job.folders, strict=True):
        assert_same_tensors(load(folder), load_file(path))


def test_parts_have_nearly_equal_bytes_and_keep_small_neighbours_together(run: Path) -> None:
    plan = plan_synthesis(disk_sources(run), [0.1])
    specs = {spec.name: spec.nbytes for spec in plan.specs()}
    written = {name: sum(specs[n] for n in names) for name, names in plan.names.items()}
    division = divide(plan, 3)
    assert sorted(name for part in division for name in part) == sorted(plan.newest.info.tensors)
    loads = sorted(sum(written[name] for name in part) for part in division)
    assert loads[2] == written["embed"], "the largest tensor, under both its names, is not cut"
    assert loads[1] - loads[0] < 0.05 * loads[1]
    assert division == divide(plan, 3)


def test_parts_for_a_job_are_no_larger_than_asked_and_as_many_for_each_rank() -> None:
    assert [parts_for(nbytes, 10, 3) for nbytes in (0, 1, 30, 31, 60, 61)] == [3, 3, 3, 6, 6, 9]


def test_a_part_that_is_there_stays_also_where_another_process_makes_it_at_the_same_time(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = files.system.link, tmp_path / "out"
    before = []

    def there() -> list[tuple[str, int, int]]:
        return [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("model*")]

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(files.system, "link", real)
        parted(run, out, 3).make(Part(1, 3))
        before.extend(there())
        real(source, target)

    monkeypatch.setattr(files.system, "link", late)
    parted(run, out, 3).make(Part(1, 3))
    assert parted(run, out, 3).make(Part(1, 3)).there == {0}
    assert there() == before
    assert [path.name for path in out.iterdir()] == ["model-00001-of-00003.safetensors"]


def test_a_failure_leaves_no_part_and_no_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.system, "fsync", refuse_for_space)
    with pytest.raises(WriteError, match="no space left"):
        parted(run, tmp_path / "out", 3).make(Part(1, 3))
    assert not (tmp_path / "out").exists()


def make(ema: Ema, run: Path, out: Path, *options: object) -> Result:
    return ema("synthesize", run, "--sigma-rel", "0.1", "--out", out, *options)


def make_all(ema: Ema, run: Path, out: Path, parts: int, *options: object) -> None:
    for number in range(1, parts + 1):
        assert make(ema, run, out, "--shard", f"{number}/{parts}", *options).code == 0


def finish_it(ema: Ema, run: Path, out: Path, *options: object) -> str:
    """The error of --finish, which has written nothing."""
    before = contents(out)
    result = make(ema, run, out, "--finish", "--quiet", *options)
    assert contents(out) == before
    assert result.code == 1
    return result.err.splitlines()[-1]


def test_parts_and_finish_on_the_command_line(ema: Ema, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "would make part 2/3" in make(ema, run, out, "--shard", "2/3", "--dry-run").out
    assert not out.exists()
    make_all(ema, run, out, 3)
    report = make(ema, run, out, "--shard", "3/3", "--json").json
    nbytes = sum(tensor.nbytes for tensor in load_file(out / "model-00003-of-00003.safetensors").values())
    assert {key: report["shard"][key] for key in ("part", "of", "bytes")} == {"part": 3, "of": 3, "bytes": nbytes}
    assert report["targets"][0]["skipped"] is True
    assert "is there already" in make(ema, run, out, "--shard", "1/3").out
    assert "nothing was written" in make(ema, run, out, "--finish", "--dry-run").out
    assert not (out / INDEX_NAME).exists()
    assert "wrote the index" in make(ema, run, out, "--finish").out
    before = contents(out)
    assert "there already" in make(ema, run, out, "--finish").out
    make_all(ema, run, out, 3)
    assert contents(out) == before


def test_a_missing_part_is_named(ema: Ema, run: Path, tmp_path: Path) -> None:
    make_all(ema, run, tmp_path / "out", 3)
    (tmp_path / "out" / "model-00002-of-00003.safetensors").unlink()
    error = finish_it(ema, run, tmp_path / "out")
    assert "model-00002-of-00003.safetensors: is missing; make part 2/3" in error
    assert "no part is here" in finish_it(ema, run, tmp_path / "elsewhere")


@pytest.mark.parametrize("place", ["header", "payload", "end"])
def test_a_damaged_part_is_named_and_replaced_by_force(ema: Ema, run: Path, tmp_path: Path, place: str) -> None:
    out = tmp_path / "out"
    make_all(ema, run, out, 3)
    path = out / "model-00003-of-00003.safetensors"
    if place == "end":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip_bit(path, {"header": 100, "payload": -5}[place])
    assert "model-00003-of-00003.safetensors: " in finish_it(ema, run, out)
    assert "--force to replace it" in make(ema, run, out, "--shard", "3/3", "-q").err
    assert make(ema, run, out, "--shard", "3/3", "--force").code == 0
    assert make(ema, run, out, "--finish").code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--sigma-rel", "0.12"), "its target is sigma_rel 0.12, not sigma_rel 0.1"),
        (("--t", "20"), "its t is 20, not 30"),
        (("--method", "paper"), "its method is paper, not minvar"),
        (("--dtype", "float16"), "its snapshots, dtype or tensors are others"),
        (("--accumulate", "float64"), "its snapshots, dtype or tensors are others"),
    ],
)
def test_parts_of_two_plans_do_not_mix(
    ema: Ema, run: Path, tmp_path: Path, options: tuple[str, str], said: str
) -> None:
    out = tmp_path / "out"
    make_all(ema, run, out, 3)
    path = out / "model-00002-of-00003.safetensors"
    path.unlink()
    second = ("--shard", "2/3", "--quiet")
    refused = make(ema, run, out, *second, *options)
    assert (refused.code, path.exists()) == (1, False)
    first = out / "model-00001-of-00003.safetensors"
    assert f"{first}: is a part of another plan: {said.partition(' is ')[0]}" in refused.err
    assert make(ema, run, out, *second, *options, "--force").code == 0
    assert f"{path}: is a part of another plan: {said}" in finish_it(ema, run, out)
    refused = make(ema, run, out, *second)
    assert refused.code == 1
    assert said in refused.err
    assert make(ema, run, out, *second, "--force").code == 0
    assert make(ema, run, out, "--finish").code == 0


def test_parts_of_two_runs_releases_or_sets_of_snapshots_do_not_mix(
    ema: Ema, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make_all(ema, run, out, 3)
    assert f"its run is {RUN_ID}, not {OTHER_RUN_ID}" in finish_it(ema, write_run(tmp_path / "2", OTHER_RUN_ID), out)
    assert "its snapshots, dtype or tensors are others" in finish_it(ema, write_run(tmp_path / "3", seed=1), out)
    monkeypatch.setattr(posthoc_cli, "__version__", "99.0")
    assert "it was made by release" in finish_it(ema, run, out)


def test_parts_of_another_number_are_refused_unless_forced_and_then_removed(
    ema: Ema, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make_all(ema, run, out, 2, "--dtype", "float16")
    assert make(ema, run, out, "--finish", "--dtype", "float16").code == 0
    assert "holds a model already" in make(ema, run, out, "--shard", "1/3", "--quiet").err
    make_all(ema, run, out, 3, "--force")
    assert load(out)["embed"].dtype == torch.float16, "the old model is whole until the new one is"
    assert "is of another model" in finish_it(ema, run, out)
    assert make(ema, run, out, "--finish", "--force").code == 0
    assert sorted(contents(out)) == [*(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)), INDEX_NAME]
    assert load(out)["embed"].dtype == torch.float32
    # An index never leads to parts of two plans, and parts of two numbers are told apart.
    assert make(ema, run, out, "--shard", "2/3", "--dtype", "float16", "--force").code == 0
    assert not (out / INDEX_NAME).exists()
    make_all(ema, run, out, 2)
    assert "holds parts of models in 2 and in 3 parts" in finish_it(ema, run, out)


def test_another_model_in_the_folder_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match="holds a model already"):
        parted(run, tmp_path / "out", 2).make(Part(1, 2))
    assert contents(tmp_path / "out") == {"model.safetensors": b"precious"}
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="is a file"):
        parted(run, tmp_path / "file", 2).make(Part(1, 2))


def test_a_model_in_the_run_s_own_folder_that_lacks_a_part_is_completed_there(ema: Ema, run: Path) -> None:
    out = run / "model"
    make_all(ema, run, out, 3)
    assert make(ema, run, out, "--finish").code == 0
    before = contents(out)
    (out / "model-00002-of-00003.safetensors").unlink()
    assert ema("info", run).code == 0
    assert make(ema, run, out, "--shard", "2/3", "--force").code == 0
    assert make(ema, run, out, "--finish").code == 0
    assert contents(out) == before


def test_what_a_killed_process_has_left_is_named_when_the_model_is_finished(
    ema: Ema, run: Path, tmp_path: Path
) -> None:
    make_all(ema, run, tmp_path / "out", 2)
    left = tmp_path / "out" / ".ema-0123456789abcdef.tmp"
    left.write_bytes(bytes(5000))
    result = make(ema, run, tmp_path / "out", "--finish")
    assert result.code == 0
    assert f"warning: {left}: left by interrupted processes, 5,000 bytes" in result.err
    assert left.exists()


def test_a_foreign_shard_of_a_part_s_name_is_refused(ema: Ema, run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "out" / "model-00001-of-00002.safetensors")
    assert "not an output of this package: has no ema.format" in finish_it(ema, run, tmp_path / "out")


def test_parts_of_two_targets_are_not_finished_one_by_one_and_the_error_says_so(
    ema: Ema, run: Path, tmp_path: Path
) -> None:
    make_all(ema, run, tmp_path / "out", 2, "--sigma-rel", "0.1,0.2")
    assert "or the targets that it was made together with" in finish_it(ema, run, tmp_path / "out" / "sigma_rel-0.1")


# --- ranks, here as threads, or absent ------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "EXIT_WAIT", 0.2)
    monkeypatch.setattr(ranks, "WORK_WAIT", 0.2)


@pytest.mark.parametrize(
    ("alive", "said"), [((0, 2), None), ((0,), "rank 2: has died"), ((), "rank 0 and rank 2: died, or never began")]
)
def test_a_process_that_the_launcher_ends_names_those_that_do_not_answer(
    alive: tuple[int, ...], said: str | None
) -> None:
    store = HashStore()
    for rank in alive:
        store.set(f"left/{rank}", "1")
    with pytest.raises(SystemExit if said is None else RankError) as raised, Ranks(1, 3, store):
        raise SystemExit(143)
    assert str(raised.value) == (said or "143")


def test_a_failure_stops_those_that_work_and_those_that_wait() -> None:
    store = HashStore()
    with pytest.raises(ValueError, match="broken"), Ranks(1, 3, store):
        raise ValueError("broken")
    with pytest.raises(RankError) as raised, Ranks(0, 3, store) as working:
        working.check()
    assert (raised.value.subject, raised.value.reason) == ("rank 1", "failed: broken")
    with pytest.raises(RankError, match="rank 1"), Ranks(2, 3, store) as waiting:
        waiting.finish(lambda: None)


def test_a_rank_that_does_not_come_is_named_when_the_time_is_up() -> None:
    store = HashStore()
    store.set("ready/1", "1")
    with pytest.raises(RankError) as raised, Ranks(0, 3, store) as rank:
        rank.finish(lambda: pytest.fail("finished without rank 2"))
    assert raised.value.subject == "rank 2"


def test_the_first_rank_begins_and_finishes_alone_and_all_wait_for_it() -> None:
    store, done = HashStore(), list[str]()

    def work(number: int) -> list[str]:
        with Ranks(number, 3, store) as rank:
            rank.begin(lambda: done.append(f"begun by {number}"))
            seen = list(done)
            rank.finish(lambda: done.append(f"finished by {number}"))
            return seen + done

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    assert found == [["begun by 0", "begun by 0", "finished by 0"]] * 3

"""Snapshots in several files: read as one, and nothing in an index is believed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_command import Ema
from factories import (
    OTHER_RUN_ID,
    RUN_ID,
    make_info,
    random_walk,
    read_snapshot,
    rewrite_snapshot,
    write_run,
    write_sharded,
    write_snapshot,
)
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import FileFormatError, PostHocError, VanishedError
from posthoc_cli.export.outputs import write_synthesis
from posthoc_cli.reconstruction.measurements import Distance, Measurements
from posthoc_cli.snapshots.directory import StoredSnapshot, find_snapshots, inspect_directory, set_aside
from posthoc_cli.snapshots.models import INDEX_NAME
from posthoc_cli.snapshots.pruning import plan_pruning, prune
from posthoc_cli.snapshots.sharded import (
    ShardedSnapshot,
    open_path,
    open_tensors,
    read_sharded,
    remove_snapshot,
)
from posthoc_cli.synthesis.plan import plan_synthesis
from posthoc_cli.synthesis.sources import disk_sources

VALUES = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "c": torch.tensor(2.0), "n": torch.tensor(3)}


def both_runs(tmp_path: Path, measured: bool = True) -> tuple[Path, Path]:
    """The same snapshots, in one file each and in three."""
    walk = random_walk(40, {"w": (30, 20), "bias": (20,), "x/../y": (), "none": (0, 2)})
    write_run(tmp_path / "plain", walk, (10, 20, 30, 40))
    for path in sorted((tmp_path / "plain").iterdir()):
        split_snapshot(path, tmp_path / "sharded" / path.stem)
    return tmp_path / "plain", tmp_path / "sharded"


def split_snapshot(path: Path, folder: Path) -> None:
    info, values = read_snapshot(path).info, load_file(path)
    names = list(values)
    shards = [names[:1], names[1:3], names[3:]]
    write_sharded(folder, info, [{name: values[name] for name in shard} for shard in shards])


def simple(folder: Path, t: float = 10.0, **overrides: Any) -> Path:
    parts = [{"a": VALUES["a"]}, {name: VALUES[name] for name in "bcn"}]
    return write_sharded(folder, make_info(VALUES, t, **overrides), parts)


def test_a_synthesis_from_sharded_snapshots_is_the_same_bits(tmp_path: Path) -> None:
    made = []
    for run in both_runs(tmp_path):
        plan = plan_synthesis(disk_sources(run), [0.1])
        write_synthesis(plan, [tmp_path / f"{run.name}.safetensors"])
        made.append(load_file(tmp_path / f"{run.name}.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    both = [PostHocEMA.from_path(tmp_path / name).state_dict(sigma_rel=0.1) for name in ("plain", "sharded")]
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())


def test_measurements_of_shards_add_up(tmp_path: Path) -> None:
    one = Measurements(1.0, 0.1, (Distance(5.0, 0.05, 2.0, 0.25),))
    path = simple(tmp_path / "s", measurements=one)
    read = read_sharded(path)
    assert isinstance(read, ShardedSnapshot)
    assert read.info.measurements == Measurements(2.0, 0.2, (Distance(5.0, 0.05, 4.0, 0.5),))
    assert read.info.tensors == make_info(VALUES).tensors
    assert read.header.file_bytes == sum(p.stat().st_size for p in path.glob("*.safetensors"))


def measured_apart(path: Path, *found: Measurements | None) -> ShardedSnapshot:
    """A snapshot of `VALUES` whose shards were measured apart."""
    simple(path)
    for number, one in enumerate(found, 1):
        rewrite_snapshot(path / f"model-{number:05d}-of-00002.safetensors", measurements=one)
    read = read_sharded(path)
    assert isinstance(read, ShardedSnapshot)
    return read


def test_a_missing_shard_is_damage_unless_the_whole_snapshot_has_gone(tmp_path: Path) -> None:
    values = {"a": torch.arange(6.0), "b": torch.ones(4)}
    folder = write_sharded(tmp_path / "10", make_info(values, 10), [{name: value} for name, value in values.items()])
    snapshot = read_sharded(folder)
    assert snapshot is not None
    second = sorted(folder.glob("*.safetensors"))[1]
    second.unlink()
    for read in (lambda: read_sharded(folder), lambda: open_tensors(snapshot)):
        with pytest.raises(FileFormatError) as refused:
            read()
        assert type(refused.value) is FileFormatError
        assert str(refused.value) == f"{second}: is missing; {INDEX_NAME} names it"
    (folder / INDEX_NAME).unlink()
    with pytest.raises(VanishedError):
        open_tensors(snapshot)


def test_measurements_of_shards_do_not_add_up_where_their_partners_differ(tmp_path: Path) -> None:
    one = Measurements(1.0, 0.1, (Distance(5.0, 0.05, 2.0, 0.25), Distance(5.0, 0.28, 3.0, 0.5)))
    turned = Measurements(4.0, 0.2, (Distance(5.0, 0.28, 30.0, 1.5), Distance(5.0, 0.05, 20.0, 2.25)))
    whole = Measurements(5.0, 0.1 + 0.2, (Distance(5.0, 0.05, 22.0, 2.5), Distance(5.0, 0.28, 33.0, 2.0)))
    assert measured_apart(tmp_path / "turned", one, turned).info.measurements == whole
    fewer = Measurements(4.0, 0.2, turned.distances[:1])
    for name, pair in {"fewer": (one, fewer), "more": (fewer, one), "none": (one, None)}.items():
        assert measured_apart(tmp_path / name, *pair).info.measurements is None


def test_measured_distances_to_the_weights_add_up_where_every_shard_with_averages_has_one(tmp_path: Path) -> None:
    """A shard of copies alone has measured nothing, and there is nothing of it in the sum."""
    values = {"a": torch.ones(3), "b": torch.ones(2), "n": torch.tensor(3)}
    sums = {"a": Measurements(3.0, 0.0, (), 0.5), "b": Measurements(2.0, 0.0, (), 0.25), "n": None}

    def joined(name: str, **others: Measurements | None) -> Measurements | None:
        folder = write_sharded(tmp_path / name, make_info(values), [{key: value} for key, value in values.items()])
        for number, found in enumerate((sums | others).values(), 1):
            rewrite_snapshot(folder / f"model-{number:05d}-of-00003.safetensors", measurements=found)
        read = read_sharded(folder)
        assert read is not None
        return read.info.measurements

    assert joined("all") == Measurements(5.0, 0.0, (), 0.75)
    assert joined("one without", b=Measurements(2.0, 0.0)) == Measurements(5.0, 0.0)
    assert joined("copies measured", n=Measurements(0.0, 0.0)) == Measurements(5.0, 0.0, (), 0.75)
    assert joined("two without", a=Measurements(3.0, 0.0), b=Measurements(2.0, 0.0)) == Measurements(5.0, 0.0)
    assert joined("not measured", a=None) is None


def test_further_names_of_all_shards_are_those_of_the_snapshot(tmp_path: Path) -> None:
    read = read_sharded(simple(tmp_path / "s", aliases={"head": "a", "twin": "b", "third": "c"}))
    assert read is not None
    assert read.info.aliases == {"head": "a", "twin": "b", "third": "c"}


def test_one_further_name_of_two_tensors_is_refused(tmp_path: Path) -> None:
    path = simple(tmp_path / "s", aliases={"head": "a", "twin": "b"})
    first, second = sorted(path.glob("*.safetensors"))
    rewrite_snapshot(second, aliases={"twin": "b", "head": "c"})
    with pytest.raises(FileFormatError, match=f"^{re.escape(str(path))}: 'head' is a further name of 'a' and of 'c'$"):
        read_sharded(path)
    rewrite_snapshot(second, aliases={"a": "b"})
    rewrite_snapshot(first, aliases={})
    with pytest.raises(FileFormatError, match=f"^{re.escape(str(path))}: 'a' is a tensor and a further name of 'b'$"):
        read_sharded(path)


def test_one_further_name_in_two_later_shards_is_refused(tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "s", make_info(VALUES), [{name: VALUES[name]} for name in "abcn"])
    for number, name in ((2, "b"), (3, "c")):
        rewrite_snapshot(path / f"model-{number:05d}-of-00004.safetensors", aliases={"head": name})
    with pytest.raises(FileFormatError, match="'head' is a further name of 'b' and of 'c'"):
        read_sharded(path)


def test_shards_follow_each_other_with_a_gap_in_the_joined_header(tmp_path: Path) -> None:
    read = read_sharded(simple(tmp_path / "s"))
    assert isinstance(read, ShardedSnapshot)
    joined = read.header.tensors
    for shard in read.shards:
        own = sorted(shard.header.tensors.items(), key=lambda item: item[1].begin)
        for (one, entry), (other, _) in pairwise(own):
            assert joined[one].begin + entry.nbytes == joined[other].begin
    (_, last), (following, _), *_ = joined.items()
    assert last.begin == 0
    assert joined[following].begin > last.nbytes
    assert read.header.metadata["ema.checksum"] not in {s.header.metadata["ema.checksum"] for s in read.shards}


def test_a_directory_without_an_index_or_without_snapshots_is_passed_over(tmp_path: Path) -> None:
    simple(tmp_path / "later", t=20.0)
    (simple(tmp_path / "s") / INDEX_NAME).unlink()
    (tmp_path / "model").mkdir()
    torch_file = write_snapshot(tmp_path / "elsewhere", 10, 0.05, RUN_ID, VALUES)
    assert torch_file.exists()
    assert [snapshot.path.name for snapshot in find_snapshots(tmp_path)] == ["later"]


@pytest.mark.parametrize(
    "index",
    [
        b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": "../model-00001-of-00002.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}', b'{"weight_map": {"a": "x\\u0000.safetensors"}}',
        b'{"weight_map": {"a": "..\\\\x.safetensors"}}', b'{"weight_map": {"a": ".hidden.safetensors"}}',
        b'{"weight_map": {"a": "C:x.safetensors"}}', b'{"weight_map": {"a": ""}}', b'{"weight_map": {"a": ".."}}',
        b'{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}', b'{"weight_map": NaN}', b"[" * 100_000,
        b'{"weight_map": {"a": "not-there.safetensors"}}',
        b'{"weight_map": {"a": "' + b"x" * 5000 + b'.safetensors"}}',
    ],
)  # fmt: skip
def test_a_hostile_index_is_named(tmp_path: Path, index: bytes) -> None:
    path = simple(tmp_path / "s")
    (path / INDEX_NAME).write_bytes(index)
    with pytest.raises(FileFormatError, match=str(path)):
        find_snapshots(tmp_path)
    assert str(path) in inspect_directory(tmp_path).problems[0]


def change_map(path: Path, changes: Mapping[str, str | None]) -> None:
    index = json.loads((path / INDEX_NAME).read_text())
    for name, file in changes.items():
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    (path / INDEX_NAME).write_text(json.dumps(index))


def test_an_index_that_contradicts_its_shards_is_named(tmp_path: Path) -> None:
    path = simple(tmp_path / "s")
    first, second = sorted(p.name for p in path.glob("*.safetensors"))
    for changes, said in (
        ({"b": first}, "'b' is not in it"), ({"b": None}, "'b' is in it"), ({"z": second}, "'z' is not in it"),
    ):  # fmt: skip
        before = (path / INDEX_NAME).read_bytes()
        change_map(path, changes)
        with pytest.raises(FileFormatError, match=said):
            read_sharded(path)
        (path / INDEX_NAME).write_bytes(before)


@pytest.mark.parametrize("other", [{"t": 20.0}, {"run_id": OTHER_RUN_ID}, {"sigma_rel": 0.1}, {"left_out": ("x",)}])
def test_shards_of_two_snapshots_are_not_one(tmp_path: Path, other: dict[str, Any]) -> None:
    path, stranger = simple(tmp_path / "s"), simple(tmp_path / "o", **other)
    first, second = sorted(path.glob("*.safetensors"))
    (stranger / second.name).replace(second)
    ((name, value),) = other.items()
    own = make_info(VALUES)
    told = f"{first} and {second} are not of one snapshot: their {name} are {getattr(own, name)} and {value}"
    with pytest.raises(FileFormatError, match=f"^{re.escape(told)}$"):
        read_sharded(path)


def test_a_path_is_opened_as_what_it_is_and_a_snapshot_as_what_it_was(tmp_path: Path) -> None:
    path = simple(tmp_path / "s")
    plain = write_snapshot(tmp_path, 10, 0.05, RUN_ID, VALUES)
    for one in (path, plain):
        with open_path(one) as file:
            assert file.read("b").tobytes() == VALUES["b"].numpy().tobytes()
    found = {snapshot.path.name: snapshot for snapshot in (read_sharded(path), read_snapshot(plain)) if snapshot}
    for snapshot in found.values():
        with open_tensors(snapshot) as file:
            assert file.header == snapshot.header
            assert file.read("b").tobytes() == VALUES["b"].numpy().tobytes()
    for file in (plain, *path.glob("*-00002-*.safetensors")):
        rewrite_snapshot(file, lambda values: values["b"].add_(1))
    for snapshot in found.values():
        with pytest.raises(FileFormatError, match="was replaced while it was being used"):
            open_tensors(snapshot)


def test_a_shard_that_contradicts_itself_is_named(tmp_path: Path) -> None:
    path = simple(tmp_path / "s")
    second = sorted(path.glob("*.safetensors"))[1]
    rewrite_snapshot(second, t=20.0, t_first=30.0)
    with pytest.raises(FileFormatError, match=f"^{re.escape(str(second))}: t 20, first update 30"):
        read_sharded(path)


def test_the_size_in_an_index_is_compared(tmp_path: Path) -> None:
    path = simple(tmp_path / "s")
    index = path / INDEX_NAME
    index.write_text(index.read_text().replace('"total_size": 52', '"total_size": 53'))
    told = f"{index}: total_size is 53; the tensors of its shards have 52 bytes"
    with pytest.raises(FileFormatError, match=f"^{re.escape(told)}$"):
        read_sharded(path)


def test_a_flipped_bit_in_a_shard_is_found(tmp_path: Path) -> None:
    _, run = both_runs(tmp_path)
    shard = max(run.rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    plan = plan_synthesis(disk_sources(run), [0.1])
    with pytest.raises(PostHocError, match=shard.name):
        write_synthesis(plan, [tmp_path / "out.safetensors"])
    assert not (tmp_path / "out.safetensors").exists()


# --- away with them --------------------------------------------------------------------------------


def test_pruning_removes_whole_directories(tmp_path: Path) -> None:
    _, run = both_runs(tmp_path)
    pruning = prune(run, plan_pruning(find_snapshots(run), keep=2))
    assert sorted(p for p in run.iterdir() if p.is_dir()) == sorted(s.path for s in pruning.kept)
    assert len(find_snapshots(run)) == 4


def test_what_somebody_keeps_in_the_directory_stays(tmp_path: Path) -> None:
    path = simple(tmp_path / "s")
    (path / "notes.txt").write_text("mine")
    remove_snapshot(path)
    assert [p.name for p in path.iterdir()] == ["notes.txt"]
    assert find_snapshots(tmp_path) == []


def test_a_directory_can_be_set_aside(tmp_path: Path) -> None:
    simple(tmp_path / "s", t=20.0)
    simple(tmp_path / "first")
    stored: Sequence[StoredSnapshot] = [StoredSnapshot.of(snapshot) for snapshot in find_snapshots(tmp_path)]
    assert len({snapshot.checksum for snapshot in stored}) == 2
    set_aside([stored[1]])
    found = inspect_directory(tmp_path)
    assert [snapshot.path.name for snapshot in found.snapshots] == ["first"]
    assert found.superseded == 1


def test_info_of_a_sharded_snapshot(ema: Ema, tmp_path: Path) -> None:
    report = json.loads(ema("info", simple(tmp_path / "s"), "--json").out)
    assert report["kind"] == "snapshot"
    assert report["tensors"] == 4


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "first.safetensors"])
@pytest.mark.parametrize("options", [("--format", "sharded"), ("--shard", "1/1"), ("--finish",)], ids=lambda o: o[0])
def test_a_sharded_snapshot_is_never_replaced_by_an_output(
    tmp_path: Path, ema: Ema, name: str, options: tuple[str, ...]
) -> None:
    values = {f"w{k}": torch.randn(4) for k in range(2)}
    for t in (10, 20):
        info = make_info(values, t, 0.05, sigma_rels=(0.05,))
        write_sharded(tmp_path / f"run/{t}", info, [{key: value} for key, value in values.items()])
    folder = tmp_path / "run" / "10"
    (folder / "model-00001-of-00002.safetensors").rename(folder / name)
    index = folder / INDEX_NAME
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", name))
    if options == ("--finish",):  # parts that an older release has put there
        part = ("synthesize", tmp_path / "run", "--sigma-rel", "0.05", "--shard", "1/1", "-q", "--out")
        assert ema(*part, tmp_path / "out").code == 0
        (tmp_path / "out" / "model-00001-of-00001.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = ema("synthesize", tmp_path / "run", "--sigma-rel", "0.05", "--out", folder, *options, "--force", "-q")
    assert result.code == 1
    assert "is a snapshot of a run and is not replaced" in result.error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

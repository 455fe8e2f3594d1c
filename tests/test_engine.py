"""The engine of a synthesis: the same bytes however the work is cut, constant memory, nothing left on failure."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from factories import RUN_ID, write_snapshot
from safetensors.torch import load_file
from synthesis_cases import peak_memory, write_sparse_snapshots

from posthoc_cli import Between, PostHocEMA, PowerFunction
from posthoc_cli.cli.output import ProgressLines
from posthoc_cli.errors import FileFormatError, InvalidValueError, NonFiniteError, WriteError
from posthoc_cli.export.outputs import write_synthesis
from posthoc_cli.reconstruction import Reconstruction
from posthoc_cli.snapshots.format import BLOCK_BYTES, TrackedTensor
from posthoc_cli.synthesis import engine, sums
from posthoc_cli.synthesis import plan as plan_module
from posthoc_cli.synthesis.engine import NoWriter, Options, numbered_device, synthesize, synthesize_into
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.synthesis.sources import disk_sources
from posthoc_cli.synthesis.sums import COLUMNS, GROUP, Sums
from posthoc_cli.synthesis.tiles import Tile, cut_tiles
from posthoc_cli.tracker.model_weights import fill_model

LARGE = 2_500_003
"""Elements of a tensor that takes two tiles in float16, and ends within a block and a vector register."""

TARGETS = (0.04, 0.1, 0.15, 0.2, 0.25)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Snapshots with large and small tensors, one of which is in float32 in some files and in float16 in others."""
    directory = tmp_path_factory.mktemp("mixed")
    for index, t in enumerate((10, 20, 30, 40)):
        wide = index % 2 == 0
        values = {
            "large": draw(index, LARGE).half(),
            "changing": draw(10 + index, 1031, 1024).to(torch.float32 if wide else torch.float16),
            **{f"small {k}": draw(100 * index + k, 3 + k, 5).half() for k in range(40)},
            "own": draw(50 + index, 300_001).double(),
            "empty": torch.empty(0, 3).half(),
            "scalar": draw(60 + index).half(),
            "counter": torch.arange(400_000) + t,
            "flag": torch.tensor(True),
        }
        tensors = {
            name: TrackedTensor(*(("average", "F32") if value.is_floating_point() else ("copy", "I64")))
            for name, value in values.items()
        }
        tensors |= {"own": TrackedTensor("average", "F64"), "flag": TrackedTensor("copy", "BOOL")}
        write_snapshot(
            directory, t, 0.05, RUN_ID, values, tensors=tensors, aliases={"tied": "large", "tied 0": "small 0"}
        )
    return directory


def plan_of(directory: Path, targets: tuple[float, ...] = TARGETS, **options: Any) -> Plan:
    return plan_synthesis(disk_sources(directory), targets, **options)


def bits(plan: Plan, **options: Any) -> dict[str, list[bytes]]:
    return {
        name: [value.reshape(-1).view(torch.uint8).numpy().tobytes() for value in values]
        for name, values in synthesize(plan, Options(**options))
    }


class Kept:
    """A placement that keeps what it is given, as bytes by target."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int, int], bytes] = {}

    def open(self, tile: Tile) -> list[Any]:
        def write(target: int, begin: int, values: torch.Tensor) -> None:
            first = tile.pieces[0]
            self.found[first.name, first.begin + begin, target] = values.numpy().tobytes()

        return [SimpleNamespace(write=partial(write, k), close=lambda: None) for k in range(len(TARGETS))]

    def joined(self, name: str, target: int) -> bytes:
        return b"".join(self.found[key] for key in sorted(self.found) if key[0] == name and key[2] == target)


# --- the same bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("chunk", [COLUMNS, 4 * COLUMNS, 2**18])
@pytest.mark.parametrize("tile", [1, 3 * 2**20])
def test_tiles_chunks_and_threads_of_any_number_give_the_same_bytes(
    mixed: Path, workers: int, chunk: int, tile: int
) -> None:
    plan = plan_of(mixed)
    reference, kept = bits(plan, workers=1), Kept()
    for _ in synthesize_into(plan, kept.open, Options(workers=workers), chunk, tile):
        pass
    for name in ("large", "changing", "own", "counter"):
        for target in range(len(TARGETS)):
            assert kept.joined(name, target) == reference[name][target], name


def test_a_target_alone_has_the_bytes_that_it_has_in_company(mixed: Path) -> None:
    together = bits(plan_of(mixed))
    for count in (1, 2, 3):
        for name, values in bits(plan_of(mixed, TARGETS[:count])).items():
            assert values == together[name][:count], name


def test_snapshots_that_a_target_does_without_do_not_change_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ten of more than a group: in company they are there, and may move no other one into another group."""
    for t in range(1, GROUP + 20):
        write_snapshot(tmp_path, t, 0.05, RUN_ID, {"w": draw(t, 500)})
    solve = plan_module.reconstruct

    def without_the_first(snapshots: object, targets: Sequence[PowerFunction], *rest: object) -> Reconstruction:
        result = solve(snapshots, targets, *rest)  # type: ignore[arg-type]
        for column, target in enumerate(targets):
            result.coefficients[:10, column] *= target.sigma_rel > 0.15
        return result

    monkeypatch.setattr(plan_module, "reconstruct", without_the_first)
    together, alone = plan_of(tmp_path, (0.1, 0.2)), plan_of(tmp_path, (0.1,))
    assert len(together.sources) == len(alone.sources) + 10
    assert bits(alone)["w"] == bits(together)["w"][:1]


def test_copies_come_from_the_newest_snapshot_also_where_no_target_needs_it(tmp_path: Path) -> None:
    for t in range(10, 110, 10):
        write_snapshot(tmp_path, t, 0.05, RUN_ID, {"w": draw(t, 3), "count": torch.tensor(t)})
    plan = plan_synthesis(disk_sources(tmp_path), [Between(20, 60)], method="paper")
    assert np.flatnonzero(plan.reconstruction.coefficients).max() < len(plan.sources) - 1
    assert dict(synthesize(plan))["count"][0] == 100


def test_a_file_has_the_bytes_of_the_tensors(mixed: Path, tmp_path: Path) -> None:
    plan = plan_of(mixed)
    outputs = [tmp_path / f"{target}.safetensors" for target in TARGETS]
    write_synthesis(plan, outputs, Options(workers=3))
    for index, path in enumerate(outputs):
        found = load_file(path)
        for name, values in bits(plan).items():
            assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == values[index], name


@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.device("meta")], ids=["inference", "meta"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_modes_of_the_caller_change_nothing(mixed: Path, tmp_path: Path, mode: object, suffix: str) -> None:
    plan, paths = plan_of(mixed, (0.1,)), [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    write_synthesis(plan, paths[:1])
    with mode:  # type: ignore[attr-defined]
        write_synthesis(plan, paths[1:])
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("sources", [1, 7, GROUP, GROUP + 1, 2 * GROUP + 3])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_sums_of_many_sources_do_not_depend_on_the_number_of_targets(sources: int, wide: torch.dtype) -> None:
    generator = np.random.default_rng(sources)
    coefficients = generator.normal(size=(sources, 33))
    values = torch.from_numpy(generator.normal(size=(sources, COLUMNS + 77)))

    def made(columns: list[int]) -> torch.Tensor:
        room = Sums(coefficients[:, columns], 2 * COLUMNS, wide, torch.device("cpu"))
        room.start(values.shape[1])
        for index, row in enumerate(values):
            room.slot(index).copy_(row)
            room.add(index)
        return room.result().clone()

    together = made(list(range(33)))
    for columns in ([0], [32], [3, 4], [5, 6, 7], list(range(9)), list(range(31))):
        assert torch.equal(made(columns), together[columns])
    exact = torch.from_numpy(coefficients.T) @ values
    bound = (torch.from_numpy(np.abs(coefficients.T)) @ values.abs()) * (sources + 3) * torch.finfo(wide).eps
    assert bool(((together - exact).abs() <= bound).all())


def test_a_machine_whose_matrix_products_sum_otherwise_gives_the_same_bytes(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bits(plan_of(mixed))
    monkeypatch.setattr(sums, "product_is_exact", lambda *_: False)
    assert bits(plan_of(mixed)) == expected


def test_a_program_that_allows_coarser_matrix_products_changes_no_byte(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TF32 does: the factors lose bits where torch's setting allows it, which it does after the first synthesis,
    and again in the middle of another one."""
    multiply, expected = sums.multiply, bits(plan_of(mixed))
    allowed, coarse = False, []

    def rounded(matrix: torch.Tensor, values: torch.Tensor, result: torch.Tensor) -> None:
        coarse.append(allowed)
        multiply(matrix.bfloat16().to(matrix.dtype) if allowed else matrix, values, result)

    def allow(now: bool) -> None:
        nonlocal allowed
        allowed = now
        torch.set_float32_matmul_precision("high" if now else "highest")

    monkeypatch.setattr(sums, "multiply", rounded)
    sums.product_is_exact.cache_clear()
    try:
        for now in (False, True, False):
            allow(now)
            assert bits(plan_of(mixed)) == expected
        assert set(coarse) == {False, True}
        make, tiles = engine.Maker.make, iter(range(1000))

        def change_and_make(*arguments: Any) -> None:
            allow(next(tiles) % 2 == 1)
            make(*arguments)

        monkeypatch.setattr(engine.Maker, "make", change_and_make)
        assert bits(plan_of(mixed), workers=1) == expected
        assert next(tiles) > 2
    finally:
        allow(False)
        sums.product_is_exact.cache_clear()


def test_settings_of_torch_that_make_matrix_products_coarser_are_told_apart() -> None:
    found, kinds = [sums.matmul_precision()], ("cuda", "mkldnn")
    try:
        torch.set_float32_matmul_precision("high")
        found.append(sums.matmul_precision())
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_tf32 = True
        found.append(sums.matmul_precision())
        torch.backends.cuda.matmul.allow_tf32 = False
        for kind in kinds if hasattr(torch.backends, "fp32_precision") else ():
            matmul = getattr(torch.backends, kind).matmul
            before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if kind == "cuda" else "bf16"
            found.append(sums.matmul_precision())  # torch's own functions raise now: both kinds of settings are used
            matmul.fp32_precision = before
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = sums.matmul_precision()
    assert all(other not in (found[0], exact) for other in found[1:])


def test_every_element_is_in_one_tile_and_tiles_end_where_blocks_end(mixed: Path) -> None:
    plan = plan_of(mixed)
    for size in (1, 2**21, 2**22):
        tiles = cut_tiles(plan, 2**16, tile_elements=size)
        assert sorted({piece.name for tile in tiles for piece in tile.pieces}) == sorted(plan.newest.info.tensors)
        seen = dict.fromkeys(plan.newest.info.tensors, 0)
        for piece in (piece for tile in tiles for piece in tile.pieces):
            assert piece.begin == seen[piece.name]
            assert piece.begin % (BLOCK_BYTES // 2) == 0
            seen[piece.name] = piece.end
        assert seen == {name: int(np.prod(entry.shape)) for name, entry in plan.newest.stored.items()}
        assert sum(tile.stored_bytes for tile in tiles) == plan.read_bytes


# --- dtypes ----------------------------------------------------------------------------------------


def test_sums_in_float64_are_rounded_once(mixed: Path) -> None:
    plan = plan_of(mixed, (0.15,))
    values = []
    for source in plan.sources:
        only = replace(
            plan, sources=(source,), reconstruction=replace(plan.reconstruction, coefficients=np.ones((1, 1)))
        )
        values.append(dict(synthesize(only))["large"][0].double())
    exact = sum(c * v for c, v in zip(plan.reconstruction.coefficients[:, 0].tolist(), values, strict=True))
    found = dict(synthesize(replace(plan, accumulate="F64")))["large"][0]
    assert torch.equal(found, exact.float())  # type: ignore[union-attr]
    assert not torch.equal(found, dict(synthesize(plan))["large"][0])


def test_sums_in_float64_are_rounded_once_to_sixteen_bits_too(tmp_path: Path) -> None:
    value = torch.tensor([1 + 2**-11 + 2**-40, 65519.9999999], dtype=torch.float64)
    write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": value})
    found = dict(synthesize(plan_of(tmp_path, (0.05,), dtype="float16")))["w"][0]
    assert found.tolist() == [1 + 2**-10, 65504.0]


@pytest.mark.parametrize("word", ["float16", "bf16", "int8", "wide"])
def test_sums_in_other_dtypes_are_refused(mixed: Path, word: str) -> None:
    with pytest.raises(InvalidValueError, match="float32"):
        plan_of(mixed, accumulate=word)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_averages_that_are_stored_in_eight_bits_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    value = codes[codes.float().isfinite()].repeat(300)
    tensors = {"w": TrackedTensor("average", "F32"), "v": TrackedTensor("average", "F32")}
    write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": value, "v": value[:9]}, tensors=tensors)
    found = dict(synthesize(plan_of(tmp_path, (0.05,))))
    assert torch.equal(found["w"][0], value.float())
    assert torch.equal(found["v"][0], value[:9].float())


# --- memory ----------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """10 and 100 million parameters of a file that is all holes; the snapshots take 1.2 GB of address space."""
    peaks = []
    for name, elements in (("small", 10_000_000), ("large", 100_000_000)):
        write_sparse_snapshots(tmp_path / name, elements, tensors=4, snapshots=3)
        peaks.append(peak_memory(tmp_path / name, tmp_path / "out.safetensors"))
        (tmp_path / "out.safetensors").unlink()
    small, large = peaks
    assert small < 300e6
    assert abs(large - small) < 30e6


# --- bad input -------------------------------------------------------------------------------------


def harmed(mixed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the snapshots, and one of its files."""
    run = tmp_path / "run"
    shutil.copytree(mixed, run)
    return run, sorted(run.iterdir())[1]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["large", "changing", "small 7", "own", "scalar"])
def test_a_flipped_bit_anywhere_in_a_tensor_is_found_by_name_and_nothing_is_left(
    mixed: Path, tmp_path: Path, name: str
) -> None:
    run, path = harmed(mixed, tmp_path)
    plan = plan_of(run)
    header = plan.sources[1].snapshot.header  # type: ignore[attr-defined]
    flip(path, header.payload_start + header.tensors[name].begin + header.tensors[name].nbytes - 1)
    with pytest.raises(FileFormatError, match=f"{path.name}: tensor '{name}' is damaged"):
        write_synthesis(plan, [tmp_path / f"{target}.safetensors" for target in TARGETS])
    assert list(tmp_path.iterdir()) == [run]


def test_a_snapshot_that_shrinks_while_it_is_read_is_named(mixed: Path, tmp_path: Path) -> None:
    run, path = harmed(mixed, tmp_path)
    plan = plan_of(run)

    def shrink(_: int) -> None:
        os.truncate(path, 1000)

    with pytest.raises(FileFormatError, match=f"{path.name}.*became shorter while it was read"):
        write_synthesis(plan, [tmp_path / f"{t}.safetensors" for t in TARGETS], Options(progress=shrink, workers=1))
    assert list(tmp_path.iterdir()) == [run]


def test_a_snapshot_that_loses_its_name_while_it_is_read_is_read_to_its_end(mixed: Path, tmp_path: Path) -> None:
    run, path = harmed(mixed, tmp_path)
    plan = plan_of(run)
    found = bits(plan, progress=lambda _: path.unlink(missing_ok=True), workers=1)
    assert found == bits(plan_of(mixed))


def test_outputs_that_do_not_fit_on_the_disk_are_refused_before_the_first_byte(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(spec.nbytes for spec in plan_of(mixed).specs())
    free = 2 * needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    outputs = [tmp_path / f"{target}.safetensors" for target in TARGETS]
    with pytest.raises(WriteError, match=rf"the 5 outputs take {5 * needed:,} bytes, and {free:,} are free"):
        write_synthesis(plan_of(mixed), outputs)
    assert list(tmp_path.iterdir()) == []
    write_synthesis(plan_of(mixed, TARGETS[:2]), outputs[:2])


NAMES = ["a/b", "../../etc/passwd", "/abs", "quo\"te's", "ünï → ✓", "n" * 10_000, " ", "new\nline", "\\"]


def test_names_of_any_kind_are_only_names(tmp_path: Path) -> None:
    values = {name: draw(index, 4) for index, name in enumerate(NAMES)}
    write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, values)
    plan = plan_of(tmp_path / "run", (0.05,))
    write_synthesis(plan, [tmp_path / "out.safetensors"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "run"]
    found = dict(synthesize(plan))
    assert all(torch.equal(found[name][0], value) for name, value in values.items())


def test_tensors_without_elements_or_dimensions_come_as_they_are(tmp_path: Path) -> None:
    values = {
        "none": torch.empty(0),
        "no rows": torch.empty(0, 5),
        "no columns": torch.empty(5, 0),
        "one": torch.ones(()),
    }
    write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, values)
    plan = plan_of(tmp_path / "run", (0.05, 0.1))
    for name, (value, _) in dict(synthesize(plan)).items():
        assert value.shape == values[name].shape
    write_synthesis(plan, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_a_hundred_thousand_tensors_are_made(tmp_path: Path) -> None:
    values = {f"block.{index}.weight": torch.full((2,), float(index)) for index in range(100_000)}
    write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, values)
    write_synthesis(plan_of(tmp_path / "run", (0.05,)), [tmp_path / "out.safetensors"])
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], value) for name, value in values.items())


# --- being stopped ---------------------------------------------------------------------------------


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ema-synthesis")]


def test_ctrl_c_leaves_no_file_and_no_thread(mixed: Path, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthesis(plan_of(mixed), [tmp_path / f"{t}.safetensors" for t in TARGETS], Options(progress=interrupt))
    assert list(tmp_path.iterdir()) == []
    assert threads() == []


def test_a_caller_that_goes_away_stops_the_threads(mixed: Path) -> None:
    stream = synthesize(plan_of(mixed))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threads() == []


def test_an_error_in_one_thread_stops_the_others_within_a_chunk(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, after = threading.Event(), []
    average: Callable[..., None] = engine.Maker._average

    def fail(self: engine.Maker, tile: object, writers: object, stop: threading.Event) -> None:
        if not failed.is_set():
            failed.set()
            raise NonFiniteError("w", "the first error")
        average(self, tile, writers, stop)
        after.append(tile)

    monkeypatch.setattr(engine.Maker, "_average", fail)
    with pytest.raises(NonFiniteError, match="the first error"):
        bits(plan_of(mixed), workers=4)
    assert threads() == []
    assert len(after) <= 4


# --- streams of an accelerator ---------------------------------------------------------------------


class Streams:
    """A device whose streams only say what they are told: in place of those of `making`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, object]] = []
        make = engine.Maker.make

        def with_stream(maker: engine.Maker, *arguments: object) -> None:
            maker._stream = SimpleNamespace(
                wait_event=lambda event: self.log.append(("wait", event)),
                synchronize=lambda: self.log.append(("synchronize", threading.get_ident())),
            )
            self.log.append(("make", id(arguments[1])))
            make(maker, *arguments)  # type: ignore[arg-type]

        def caller_event(_: torch.device) -> int:
            assert threading.current_thread() is threading.main_thread()
            self.log.append(("event", len(self.log)))
            return len(self.log) - 1

        monkeypatch.setattr(engine.Maker, "make", with_stream)
        monkeypatch.setattr(engine, "caller_event", caller_event)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())

    def open(self, _: object) -> list[NoWriter]:
        writers = [NoWriter()] * len(TARGETS)
        self.log.append(("open", id(writers)))
        self.kept = [*getattr(self, "kept", []), writers]  # so that no id is given again
        return writers


def test_a_tile_is_made_after_what_the_caller_did_up_to_its_opening(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its room may be of memory that the caller's stream still uses."""
    streams = Streams(monkeypatch)
    tiles = list(synthesize_into(plan_of(mixed), streams.open, Options(workers=1)))
    log = streams.log
    opened = {what: log[index + 1] for index, (kind, what) in enumerate(log) if kind == "open"}
    made = [(what, log[index + 1 :]) for index, (kind, what) in enumerate(log) if kind == "make"]
    assert len(opened) == len(made) == len(tiles)
    for placement, rest in made:
        assert opened[placement] == ("event", next(what for kind, what in rest if kind == "wait"))


def test_no_thread_leaves_work_under_way_when_an_error_stops_it(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets the error frees what its streams write."""
    streams = Streams(monkeypatch)

    def fail(*_: object) -> None:
        streams.log.append(("fail", threading.get_ident()))
        raise NonFiniteError("w", "an error")

    monkeypatch.setattr(engine.Maker, "_average", fail)
    with pytest.raises(NonFiniteError, match="an error"):
        list(synthesize_into(plan_of(mixed), streams.open, Options(workers=3)))
    failed = [(index, what) for index, (kind, what) in enumerate(streams.log) if kind == "fail"]
    assert failed
    for index, thread in failed:
        assert ("synchronize", thread) in streams.log[index:]


def test_threads_make_sums_on_the_device_that_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is each thread's own; in a new one it is the first."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert numbered_device("cuda") == torch.device("cuda:3")
    for other in ("cuda:1", "cpu", torch.device("mps")):
        assert numbered_device(other) == torch.device(other)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
def test_results_may_lie_in_memory_that_the_callers_stream_still_writes(mixed: Path) -> None:
    plan = plan_of(mixed)
    reference = {name: [value.cpu() for value in values] for name, values in synthesize(plan, Options("cuda"))}
    torch.cuda.empty_cache()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            old = [torch.empty(LARGE, device="cuda") for _ in range(2 * len(TARGETS))]
            torch.cuda._sleep(10**9)
            for tensor in old:
                tensor.fill_(torch.nan)
            del old, tensor
            made = dict(synthesize(plan, Options("cuda")))
            torch.cuda.synchronize()
            for name, values in made.items():
                for value, expected in zip(values, reference[name], strict=True):
                    assert torch.equal(value.cpu(), expected), name
            del made, values, value


@pytest.mark.cuda
@needs_cuda
def test_tf32_that_is_allowed_later_changes_no_byte_on_a_gpu(mixed: Path) -> None:
    def made() -> dict[str, list[torch.Tensor]]:
        return {name: [value.cpu() for value in values] for name, values in synthesize(plan, Options("cuda"))}

    plan = plan_of(mixed)
    before = made()
    try:
        torch.set_float32_matmul_precision("high")
        after = made()
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, values in before.items():
        assert all(torch.equal(value, other) for value, other in zip(values, after[name], strict=True)), name


@pytest.mark.cuda
@needs_cuda
def test_memory_that_a_failed_synthesis_has_freed_is_not_written_any_more(mixed: Path, tmp_path: Path) -> None:
    run, path = harmed(mixed, tmp_path)
    plan = plan_of(run)
    header = plan.sources[1].snapshot.header  # type: ignore[attr-defined]
    flip(path, header.payload_start + header.tensors["large"].begin + header.tensors["large"].nbytes - 1)
    for _ in range(10):
        with pytest.raises(FileFormatError, match="is damaged"):
            list(synthesize(plan, Options("cuda")))
        new = [torch.zeros(LARGE, device="cuda") for _ in range(2 * len(TARGETS))]
        torch.cuda.synchronize()
        assert all(not bool(tensor.any()) for tensor in new)


def test_the_number_of_threads_of_torch_is_as_it_was(mixed: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        bits(plan_of(mixed, (0.1,)))
        assert torch.get_num_threads() == 2
        later: list[int] = []
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert later == [2]
    finally:
        torch.set_num_threads(before)


def test_nothing_is_changed_by_a_synthesis_into_nowhere(mixed: Path) -> None:
    told: list[int] = []
    plan = plan_of(mixed)
    for _ in synthesize_into(plan, lambda _: [NoWriter()] * len(TARGETS), Options(progress=told.append)):
        pass
    assert sum(told) == plan.read_bytes


# --- progress --------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_line_every_thirty_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = ProgressLines("synthesizing", 10_000_000_000, lambda: now[0])
    for second in range(1, 76):
        now[0] = float(second)
        lines.advance(100_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "synthesizing: 3 GB of 10 GB, 100 MB/s, 70 s remain",
        "synthesizing: 6 GB of 10 GB, 100 MB/s, 40 s remain",
    ]


# --- filling a model -------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Parameters, tied and not, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 3, bias=False)
        self.two = torch.nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.ones(3), persistent=False)


def tracked(folder: Path) -> PostHocEMA:
    model = Net()
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=1) as tracker:
        for step in range(4):
            with torch.no_grad():
                model.one.weight.copy_(draw(step, 3, 3))
            tracker.update_(model)
    return PostHocEMA.from_path(folder)


def test_a_model_is_filled_in_its_own_memory(tmp_path: Path) -> None:
    tracker, model = tracked(tmp_path), Net()
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    tracker.load_into(model, 0.15)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == places
    for name, value in tracker.state_dict(0.15).items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("harm", ["last bit", "nan"])
def test_a_model_is_as_it_was_where_anything_is_wrong(tmp_path: Path, harm: str) -> None:
    tracker, model = tracked(tmp_path), Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if harm == "last bit":
        path = max(tmp_path.glob("*.safetensors"))
        flip(path, path.stat().st_size - 1)
        with pytest.raises(FileFormatError, match="damaged"):
            tracker.load_into(model, 0.15)
    else:
        with pytest.raises(NonFiniteError, match="cannot hold"):
            fill_model(model, scaled(plan_of(tmp_path, (0.15,), dtype="float16"), 1e30))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def scaled(plan: Plan, factor: float) -> Plan:
    coefficients = plan.reconstruction.coefficients * factor
    return replace(plan, reconstruction=replace(plan.reconstruction, coefficients=coefficients))


def test_a_model_on_meta_comes_to_be_and_what_nothing_fills_is_named(tmp_path: Path) -> None:
    tracker = tracked(tmp_path)
    with torch.device("meta"):
        model = Net()
    with pytest.warns(RuntimeWarning, match="on meta still, since no average fills them: mask;"):
        tracker.load_into(model, 0.15)
    assert model.one.weight is model.two.weight
    assert model.one.weight.requires_grad
    assert model.mask.is_meta
    for name, value in tracker.state_dict(0.15).items():
        assert torch.equal(model.state_dict()[name], value)


def test_tensors_on_meta_stay_tied_also_under_names_that_nothing_fills(tmp_path: Path) -> None:
    tracker = tracked(tmp_path)
    with torch.device("meta"):
        model = Net()
        model.three = torch.nn.Linear(3, 3, bias=False)
        model.three.weight = model.one.weight
        model.register_buffer("again", model.count)
    with pytest.warns(RuntimeWarning, match="no average fills them: mask;"):
        tracker.load_into(model, 0.15)
    assert model.three.weight is model.one.weight
    assert model.again is model.count
    assert model.count == 0


@pytest.mark.parametrize("way", ["load_into", "model"])
def test_a_model_of_float16_that_cannot_hold_a_value_stays_as_it_was(tmp_path: Path, way: str) -> None:
    model = Net()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=1) as tracker:
        for step in range(3):
            with torch.no_grad():
                model.one.weight.fill_(1e6 + step)
            tracker.update_(model)
    small, tracker = Net().half(), PostHocEMA.from_path(tmp_path)
    before = small.one.weight.clone()
    said = "'one.weight': the model's torch.float16 cannot hold its largest value, 1e.06"
    with pytest.raises(NonFiniteError, match=said):
        if way == "load_into":
            tracker.load_into(small, 0.15)
        else:
            with tracker.model(small, 0.15):
                pass
    assert torch.equal(small.one.weight, before)
    tracker.load_into(small, 0.15, dtype=torch.float32)
    assert small.one.weight.isfinite().all()


def test_a_device_that_is_not_there_is_named_and_the_model_stays(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(InvalidValueError, match="device 'nowhere': cannot be used"):
        tracked(tmp_path).load_into(model, 0.15, device="nowhere")
    assert model.one.weight.is_meta

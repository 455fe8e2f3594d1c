"""The engine of a synthesis: the same bytes for any tiles and threads, constant memory, nothing
left after failures."""

import errno
import itertools
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
import torch
from bench_synthesis import write_sparse_snapshots
from checking import assert_same_tensors, heavy, load_output, refused
from device import DEVICE, IS_SIMULATED, MODULE
from factories import (
    RUN_ID,
    flip_bit,
    random_walk,
    snapshot_files,
    write_run,
    write_snapshot,
)
from safetensors.torch import load_file
from snapshots.recorded import failing, record
from sums import assert_sums

from posthoc_cli import PostHocEMA, Run, synthesize
from posthoc_cli.errors import FileFormatError, NonFiniteError
from posthoc_cli.synthesis.calculator import SLOTS

LARGE = 1_300_003
"""Elements of a tensor of several tiles, which ends within a block and within a vector
register."""

TARGETS = (0.04, 0.1, 0.15, 0.2, 0.25)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Snapshots with large and small tensors, one of which is in float32 in some files and in
    float16 in others."""
    directory = tmp_path_factory.mktemp("mixed")
    torch.manual_seed(0)
    for t in (10, 20, 30, 40):
        values = {
            "large": torch.randn(LARGE).half(),
            "changing": torch.randn(601, 1024),
            "empty": torch.empty(0, 3).half(),
        }
        if t in (20, 40):
            values["changing"] = values["changing"].half()
        for k in range(40):
            values[f"small {k}"] = torch.randn(3 + k, 5).half()
        tensors = dict.fromkeys(values, "average F32")
        values["own"] = torch.randn(300_001).double()
        values["counter"] = torch.arange(140_000) + t
        write_snapshot(directory, t, 0.05, RUN_ID, values, tensors=tensors)
    return directory


def plan_of(directory, targets=TARGETS):
    return Run(directory).plan(targets)


def as_bytes(value):
    return value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits(plan, **options):
    tensors = {}
    for name, values in synthesize(plan, **options):
        tensors[name] = [as_bytes(value) for value in values]
    return tensors


# --- the same bytes
# --------------------------------------------------------------------------------


def test_threads_of_any_number_give_the_same_bytes(mixed):
    plan = plan_of(mixed)
    read = list[int]()
    many = bits(plan, workers=5, progress=read.append)
    assert many == bits(plan, workers=1)
    assert sum(read) == plan.read_bytes  # no block is read twice


@pytest.mark.parametrize("targets", [TARGETS[:1], TARGETS])
def test_each_of_any_number_of_targets_is_the_sum_within_rounding(mixed, tmp_path, targets):
    """Of large and small tensors, and of more sources than one matrix product takes."""
    for t in range(1, SLOTS + 3):
        values = {"w": torch.randn(3, 7)}
        write_snapshot(tmp_path, t, 0.05, RUN_ID, values)
    assert_sums(plan_of(mixed, targets), torch.float32)
    assert_sums(plan_of(tmp_path, targets), torch.float32)


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode(),
        torch.device("meta"),
    ],
)
def test_modes_of_the_caller_change_nothing(mixed, tmp_path, mode):
    out = tmp_path / "out.pt"
    with mode:
        Run(mixed).write(0.1, out)
    assert_same_tensors(load_output(out), Run(mixed).average(0.1))


# --- dtypes
# ----------------------------------------------------------------------------------------


def test_averages_that_are_stored_in_eight_bits_are_read(tmp_path):
    dtype = torch.float8_e4m3fn
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    value = codes[codes.float().isfinite()].repeat(300)
    tensors = {"w": "average F32"}
    write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": value}, tensors=tensors)
    averages = dict(synthesize(plan_of(tmp_path, (0.05,))))
    assert torch.equal(averages["w"][0], value.float())


# --- memory
# ----------------------------------------------------------------------------------------


PEAK = """
import re, sys
from pathlib import Path
from posthoc_cli import Run

def resident(what):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"Vm{what}:\\s+(\\d+)", status)[1])

before = resident("RSS")
Run(sys.argv[1]).write(0.15, f"{sys.argv[1]}.safetensors", dtype="float32")
print(resident("HWM") - before)
"""


@heavy
def test_memory_does_not_grow_with_the_model(tmp_path):
    """4 and 24 million parameters in sparse files: a copy of one of the 4 float16 snapshots would
    take 40 MB more."""
    peaks = []
    for elements in (4_000_000, 24_000_000):
        folder = tmp_path / str(elements)
        write_sparse_snapshots(folder, elements, tensors=4, times=2)
        peaks.append(int(forked.check(PEAK, folder).out))
    small, large = peaks
    assert small < 300e6
    assert abs(large - small) < 30e6


# --- being stopped
# ---------------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ema-synthesis")]


def test_a_stream_that_is_left_ends_its_threads(mixed):
    stream = synthesize(plan_of(mixed))
    next(stream)
    stream.close()
    assert threads() == []


def test_an_error_in_one_thread_stops_the_others_within_a_tile(mixed):
    plan = plan_of(mixed)
    reads = itertools.count()
    fails = failing("read", errno.EIO, lambda *_: next(reads) == 8)
    with fails, pytest.raises(FileFormatError):
        bits(plan, workers=4)
    assert threads() == []
    begun = 4 * 2  # of 4 threads, of which each may have begun another tile
    assert next(reads) < 8 + begun * len(plan.sources)


def test_a_synthesis_restores_torchs_number_of_threads(mixed):
    """In this thread, and in threads that begin later."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        bits(plan_of(mixed, (0.1,)))
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(torch.get_num_threads)
        assert later.result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- streams of an accelerator
# ---------------------------------------------------------------------


@pytest.mark.cuda
def test_results_may_lie_in_memory_that_the_callers_stream_still_writes(mixed):
    """Threads do not change sums."""
    plan = plan_of(mixed)
    expected = bits(plan, device=DEVICE, workers=1)
    MODULE.empty_cache()
    with MODULE.stream(MODULE.Stream()):
        for _ in range(3):
            old = [torch.empty(LARGE, device=DEVICE) for _ in range(2 * len(TARGETS))]
            MODULE._sleep(10**8 if IS_SIMULATED else 10**9)
            for tensor in old:
                tensor.fill_(torch.nan)
            del old, tensor
            tensors = dict(synthesize(plan, DEVICE, workers=5))
            MODULE.synchronize()
            for name, values in tensors.items():
                assert [as_bytes(value) for value in values] == expected[name]
            del tensors, values


@pytest.mark.cuda
def test_a_programs_setting_of_tf32_does_not_change_sums(mixed):
    try:
        torch.set_float32_matmul_precision("high")
        assert_sums(plan_of(mixed), torch.float32, device=DEVICE)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.cuda
def test_memory_that_a_failed_synthesis_has_freed_is_no_longer_written(mixed, tmp_path):
    run = Path(shutil.copytree(mixed, tmp_path / "run"))
    plan = plan_of(run)
    path = sorted(run.iterdir())[1]
    large = as_bytes(load_file(path)["large"])
    flip_bit(path, path.read_bytes().index(large) + len(large) - 1)
    for _ in range(10):
        with refused(path, "'large'", kind=FileFormatError):
            list(synthesize(plan, DEVICE))
        new = [torch.zeros(LARGE, device=DEVICE) for _ in range(2 * len(TARGETS))]
        MODULE.synchronize()
        for tensor in new:
            assert not bool(tensor.any())


# --- filling a model
# -------------------------------------------------------------------------------


def test_a_value_that_a_model_of_float16_cannot_hold_is_refused(tmp_path):
    values = {"weight": torch.full((2, 3), 1e6)}
    write_snapshot(tmp_path, 10, 0.05, RUN_ID, values)
    tracker = PostHocEMA.from_path(tmp_path)
    model = torch.nn.Linear(3, 2, bias=False).half()
    before = model.weight.clone()
    with refused("tensor 'weight'", "1e+06", kind=NonFiniteError):
        tracker.load_into(model, 0.05)
    assert torch.equal(model.weight, before)  # no infinity


# --- readers, which take no lock, while a writer thins the snapshots


def test_weights_are_made_from_the_remaining_snapshots(tmp_path, ema):
    """Once all headers were read, a snapshot is deleted, not the newest. Without measurements in
    headers, planning itself reads tensors."""
    run = tmp_path / "run"
    out = tmp_path / "out.safetensors"
    walk = random_walk(80, {"w": (3,)})
    write_run(run, walk, range(10, 81, 10))
    paths = snapshot_files(run)
    removed = paths[len(paths) // 2]
    opened = Counter[Path]()

    def remove(path):
        opened[path] += 1
        if opened[path] == 2:  # for its tensors
            removed.unlink(missing_ok=True)
        return False

    with failing("open", errno.ENOENT, remove):
        done = ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
    assert f"{removed}: " in done.err
    assert_same_tensors(load_file(out), Run(run).average(0.15))
    assert not list(tmp_path.rglob(".ema-*.tmp"))


def test_an_open_file_that_another_host_removes_is_planned_without(tmp_path, caplog):
    """On a local file system the file would stay readable; a client of a network file system gets
    ESTALE."""
    run = Run(record(tmp_path, 20, checkpoint_every=2))
    removed = run.snapshots[4].path

    def is_removed_meanwhile(_file, _view, at):
        is_first = at > 8 and removed.exists()  # beyond a header
        if is_first:
            removed.unlink()
        return is_first

    with failing("read", errno.ESTALE, is_removed_meanwhile):
        made = run.average(0.15)
    assert_same_tensors(made, run.average(0.15))
    (warning,) = caplog.messages
    assert "stale file handle" in warning

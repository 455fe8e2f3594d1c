"""Syntheses on the simulated accelerator: bit for bit those on the CPU, with no race."""

import shutil

import pytest
import torch
from accelerator import simulator
from accelerator.trainings import without_streams
from checking import refused
from factories import RUN_ID, flip_bit, write_snapshot
from safetensors.torch import load_file

from posthoc_cli import Run, synthesize
from posthoc_cli.errors import FileFormatError
from posthoc_cli.synthesis.engine import check_device

core = simulator.load()

TARGETS = (0.04, 0.15, 0.25)
LARGE = 1_300_003  # elements of a tensor of several tiles


@pytest.fixture(autouse=True)
def clean():
    """Delay everything, and fail a test with races, touches, or visits of device 0."""
    core.set_delays(200, 2000)
    torch.sim.synchronize()
    core.reset()
    yield
    core.set_delays(0, 0)
    for device in range(core.device_count):
        torch.sim.synchronize(device)
    assert core.races() == []
    found = core.counts()
    assert found["touches of device memory"] == found["touches of pinned memory"] == 0
    assert found["visits of device 0"] == 0


def write_snapshots(folder):
    torch.manual_seed(0)
    for t in (10, 20, 30):
        values = {"large": torch.randn(LARGE).half(), "changing": torch.randn(301, 512)}
        if t == 20:
            values["changing"] = values["changing"].half()
        for number in range(20):
            values[f"small {number}"] = torch.randn(3 + number, 5).half()
        tensors = dict.fromkeys(values, "average F32")
        values["own"] = torch.randn(150_001).double()
        values["counter"] = torch.arange(70_000) + t
        write_snapshot(folder, t, 0.05, RUN_ID, values, tensors=tensors)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshots")
    write_snapshots(folder)
    return folder


def compute(directory, device, targets=TARGETS, **options):
    plan = Run(directory).plan(targets)
    found = {}
    for name, values in synthesize(plan, device, **options):
        found[name] = [value.cpu().clone() for value in values]
    return found


def check_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        for one, other in zip(ours[name], values, strict=True):
            assert torch.equal(one, other), name


@pytest.fixture(scope="module")
def expected(directory):
    return compute(directory, "cpu")


@pytest.mark.parametrize(("device", "workers"), [("sim:0", 1), ("sim:0", 3), ("sim:1", 2)])
def test_a_synthesis_on_the_device_has_the_bits_of_one_on_the_cpu(
    directory, expected, device, workers
):
    check_same(compute(directory, device, workers=workers), expected)


def test_a_device_without_streams_has_the_bits_of_the_cpu(directory, expected, monkeypatch):
    without_streams(monkeypatch)
    check_same(compute(directory, "sim", workers=2), expected)


def test_one_target_has_the_bits_of_the_cpu(directory):
    ours = compute(directory, "sim", (0.1,), workers=2)
    check_same(ours, compute(directory, "cpu", (0.1,)))


def test_results_may_lie_in_memory_that_the_callers_stream_still_writes(directory, expected):
    with torch.sim.stream(torch.sim.Stream()):
        for _ in range(2):
            old = [torch.empty(LARGE, device="sim") for _ in range(2 * len(TARGETS))]
            torch.sim._sleep(50_000_000)
            for tensor in old:
                tensor.fill_(torch.nan)
            del old, tensor
            check_same(compute(directory, "sim", workers=3), expected)


def test_memory_of_a_failed_synthesis_is_no_longer_written(directory, tmp_path):
    run = shutil.copytree(directory, tmp_path / "run")
    path = sorted(run.iterdir())[1]
    large = load_file(path)["large"].numpy().tobytes()
    flip_bit(path, path.read_bytes().index(large) + len(large) - 1)
    for _ in range(3):
        with refused(path, "'large'", kind=FileFormatError):
            compute(run, "sim", workers=3)
        new = [torch.zeros(LARGE, device="sim") for _ in range(2 * len(TARGETS))]
        assert not any(bool(tensor.any()) for tensor in new)


def test_the_command_writes_the_same_file(directory, tmp_path, ema):
    outputs = []
    for device in ("cpu", "sim", "sim:1"):
        output = tmp_path / f"{len(outputs)}.safetensors"
        done = ema("synthesize", directory, "--sigma-rel", "0.1", "-o", output, "--device", device)
        assert done.code == 0, done
        outputs.append(load_file(output))
    for output in outputs[1:]:
        for name, values in outputs[0].items():
            assert torch.equal(output[name], values)


def test_the_devices_of_the_machine_are_named():
    with refused("device 'sim:7'", "choose from auto, cpu, sim:0, sim:1"):
        check_device("sim:7")

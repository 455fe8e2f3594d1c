"""Trainings on the simulated accelerator: bit for bit those on the CPU, with no race, no touch of
memory that is in use, and no visit of another device."""

import itertools

import pytest
import torch
from accelerator import trainings
from accelerator.trainings import (
    PLACES,
    change,
    check,
    check_same,
    core,
    make,
    synchronize,
    track,
    train,
)
from torch import nn


@pytest.fixture(autouse=True)
def clean():
    """Delay everything, and fail a test with races or touches."""
    core.set_delays(50, 500)
    synchronize()
    core.reset()
    yield
    core.set_delays(0, 0)
    synchronize()
    check()


@pytest.mark.parametrize(
    ("scenario", "place"),
    [*itertools.product(trainings.SCENARIOS, PLACES), (trainings.plain, None)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_training_on_the_device_has_the_bits_of_one_on_the_cpu(scenario, tmp_path, place):
    check_same(scenario, tmp_path, place)


@pytest.mark.parametrize("place", PLACES)
def test_a_device_without_streams_has_the_bits_of_the_cpu(tmp_path, place, monkeypatch):
    trainings.without_streams(monkeypatch)
    before = core.counts()["pinned"]
    check_same(trainings.plain, tmp_path, place)
    assert core.counts()["peak pinned"] == before


# --- waiting, devices and memory


@pytest.mark.parametrize("fail", [trainings.failing_reader, trainings.failing_update])
def test_work_that_has_failed_is_waited_for(fail):
    fail()


@pytest.mark.parametrize("place", PLACES)
def test_weights_of_a_busy_stream_have_not_moved_at_the_close(tmp_path, place, caplog):
    """The sample of the last update is read after it, though it runs in a stream of its own."""
    model = make("sim:0")
    synchronize()
    with torch.sim.stream(torch.sim.Stream("sim:0")):
        ema = track(model, tmp_path, place)
        for step in range(4):
            change(model, step)
            torch.sim._sleep(20_000_000)
            ema.update_(model)
        ema.close()
        synchronize()
    assert caplog.text == ""


def test_an_update_by_copy_never_waits_for_the_device(tmp_path):
    model = make("sim:0")
    ema = track(model, tmp_path, "cpu")
    train(model, ema, range(3))
    ema.flush()
    stream = torch.sim.current_stream()
    core.hold()
    ema.update_(model)  # would never return
    assert not stream.query()
    core.release()
    ema.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("current", [0, 1])
def test_a_training_on_the_second_device_visits_no_other(tmp_path, place, current):
    """On CUDA each visit would make a context on it, some hundred megabytes."""
    torch.sim.set_device(current)
    model = make("sim:1")
    core.reset()
    with track(model, tmp_path, place, checkpoint_every=2) as ema:
        for _ in range(6):
            ema.update_(model)
        ema.state_dict(0.05)
        with ema.model(model, 0.1):
            pass
    assert core.counts()["visits of device 0"] == 0
    torch.sim.set_device(0)


@pytest.mark.parametrize("size", [17, 1_000, 700_001, 1_100_000, 2_200_000])
def test_pinned_memory_is_hardly_larger_than_the_model_and_reported(tmp_path, size):
    """Torch pins powers of two; a block of averages pins nothing more."""
    core.set_delays(0, 0)
    model = nn.ParameterList([nn.Parameter(torch.zeros(size // 2)) for _ in range(2)]).to("sim")
    model.append(nn.Parameter(torch.zeros(3, 5, device="sim")))
    nbytes = sum(parameter.nbytes for parameter in model)
    before = core.counts()["pinned"]
    core.reset()
    with track(model, tmp_path, "cpu", checkpoint_every=2) as ema:
        for _ in range(4):
            ema.update_(model)
        ema.flush()
        pinned = core.counts()["pinned"] - before
        assert 0.99 * nbytes <= pinned <= 1.1 * nbytes + 64
        with ema.model(model, 0.05):
            assert core.counts()["pinned"] - before == pinned
        assert core.counts()["peak pinned"] - before == pinned
        assert ema._pipeline._host_copy.nbytes == pinned
        reported = ema.metrics()["bytes"]
    assert reported >= pinned


def test_small_models_take_little_memory_on_the_device(tmp_path):
    model = nn.Linear(30, 33).to("sim")
    before = core.counts()["live"]
    core.reset()
    with track(model, tmp_path, "model", checkpoint_every=2) as ema:
        for _ in range(4):
            ema.update_(model)
        assert core.counts()["peak"] - before < 300_000

"""Trainings on the simulated accelerator and on the CPU, for the checks of tracker and mutations.

Each scenario takes a model's device, a folder and the place of the averages, and returns tensors by
name, which must not depend on the device.
"""

import gc
import sys
import threading
from contextlib import nullcontext, suppress
from copy import deepcopy

import pytest
import torch
from accelerator import simulator
from safetensors.torch import load_file
from torch import nn

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import NonFiniteError
from posthoc_cli.tracker.pipeline import DeviceStreams, wait_for_writers

core = simulator.load()

PLACES = ("model", "cpu")


def synchronize():
    for device in range(core.device_count):
        torch.sim.synchronize(device)


def check():
    assert core.races() == []
    found = core.counts()
    assert found["touches of device memory"] == found["touches of pinned memory"] == 0


def host(tensors):
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def stored(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, values in load_file(path).items():
            found[f"{path.name} {name}"] = values
    return found


class Net(nn.Module):
    """All that models have: several dtypes, a scalar, buffers that are averaged or copied, strides
    of several kinds, and an empty tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(37, 101)
        self.norm = nn.BatchNorm1d(101)
        self.last = nn.Linear(101, 3)
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.half_values = nn.Parameter(torch.randn(5, 7).bfloat16())
        self.double_values = nn.Parameter(torch.randn(9, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty_values = nn.Parameter(torch.empty(0, 4))
        self.turned = nn.Parameter(torch.randn(6, 5).t())
        self.spread = nn.Parameter(torch.randn(10, 6)[:, ::2])
        self.register_buffer("flags", torch.tensor([True, False]))


def make(device):
    torch.manual_seed(0)
    return Net().to(device)


def change(model, step):
    """Change a model as a step of an optimizer does: by kernels that the host does not wait for."""
    with torch.no_grad():
        for number, tensor in enumerate(model.parameters()):
            draw = torch.Generator().manual_seed(100 * step + number)
            noise = torch.randn(tensor.shape, generator=draw)
            tensor.add_((0.1 * noise).to(tensor.device, tensor.dtype, non_blocking=True))
        model.norm.running_mean.add_(0.5)
        model.norm.num_batches_tracked.add_(1)


def train(model, ema, steps):
    """Update, and change the weights at once: a late reader would see it."""
    for step in steps:
        change(model, step)
        ema.update_(model)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(1e3)
                tensor.sub_(1e3)


def track(model, folder, place, **options):
    defaults = {"update_every": 1, "checkpoint_every": 6}
    return PostHocEMA.from_model(model, folder, device=place, **(defaults | options))


def check_same(scenario, tmp_path, place):
    """Run a scenario on the CPU and on the device, and compare what it returns."""
    expected = scenario("cpu", tmp_path / "cpu", place)
    synchronize()
    core.reset()
    ours = scenario("sim:0", tmp_path / "sim", place)
    assert ours.keys() == expected.keys()
    assert ours
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        same = torch.equal(ours[name].cpu().nan_to_num(7.0), value.nan_to_num(7.0))
        assert same, f"{name}: {ours[name]} for {value}"


# --- scenarios: what each does with a model on a device


def plain(device, folder, place):
    """Everything that a training asks for."""
    model = make(device)
    found = {}
    with track(model, folder, place) as ema:
        for part in (range(9), range(9, 20)):
            train(model, ema, part)
            with ema.model(model, 0.05) as averaged:
                for name, value in host(averaged.state_dict()).items():
                    found[f"block {part} {name}"] = value
            for name, value in host(model.state_dict()).items():
                found[f"raw {part} {name}"] = value
        found |= dict(ema.state_dict(0.28))
        ema.load_into(model, 0.1)
        for name, value in host(model.state_dict()).items():
            found[f"filled {name}"] = value
        ema.update_(model)
    return found | stored(folder)


def own_stream(device, folder, place):
    model = make(device)
    synchronize()
    stream = torch.sim.Stream("sim:0") if device != "cpu" else None
    with nullcontext() if stream is None else torch.sim.stream(stream):
        ema = track(model, folder, place)
        train(model, ema, range(15))
        found = dict(ema.state_dict(0.05))
        ema.close()
        synchronize()
    return found | stored(folder)


def on_the_second_device(device, folder, place):
    """Which visits no other: on CUDA that would make a context on it."""
    return plain("cpu" if device == "cpu" else "sim:1", folder, place)


def late_device(device, folder, place):
    """The host queues each update before the device has begun the one before."""
    model = make(device)
    with track(model, folder, place) as ema:
        for step in range(5):
            torch.sim._sleep(40_000_000)
            change(model, step)
            torch.sim._sleep(40_000_000)
            ema.update_(model)
        return dict(ema.state_dict(0.05))


def a_snapshot_every_step(device, folder, place):
    model = make(device)
    with track(model, folder, place, checkpoint_every=1) as ema:
        train(model, ema, range(12))
    return stored(folder)


def every_reading(device, folder, place):
    """Each at once after an update in a stream of the training's own, which is late."""
    model = make(device)
    readings = {
        "average": lambda ema: dict(ema.state_dict(0.28)),
        "state": lambda ema: averages_of(ema.state_dict()),
        "error": lambda ema: {"": torch.tensor(ema._pipeline.predict_error(1))},
        "sample": lambda ema: {"": torch.from_numpy(ema._pipeline.sample.copy())},
    }
    synchronize()
    found = {}
    with torch.sim.stream(torch.sim.Stream("sim:0")):
        ema = track(model, folder, place, checkpoint_every=100)
        for step, (kind, reading) in enumerate(readings.items()):
            train(model, ema, [2 * step, 2 * step + 1])
            torch.sim._sleep(5_000_000)
            ema.update_(model)
            for name, values in reading(ema).items():
                found[f"{kind} {name}"] = values
        ema.close()
        synchronize()
    return found


def averages_of(state):
    """Find the tensors of a tracker's state."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            for name, values in averages_of(value).items():
                found[f"{key} {name}"] = values
        elif isinstance(value, torch.Tensor):
            found[key] = value
    return found


def counters_on_the_second_device(device, folder, place):
    model = make(device)
    if device != "cpu":
        model.flags = model.flags.to("sim:1")
    synchronize()
    streams = [torch.sim.Stream(f"sim:{index}") for index in range(2)]
    with torch.sim.stream(streams[1]), torch.sim.stream(streams[0]):
        ema = track(model, folder, place)
        for step in range(6):
            change(model, step)
            with torch.sim.stream(streams[1]):
                torch.sim._sleep(5_000_000)
                model.flags.logical_not_()
            ema.update_(model)
        found = dict(ema.state_dict(0.1))
        ema.close()
        synchronize()
    return found


def changing_streams(device, folder, place):
    model = make(device)
    streams = [torch.sim.Stream("sim:0") for _ in range(3)]
    synchronize()
    ema = track(model, folder, place)
    for step in range(12):
        stream = streams[step % 3]
        stream.wait_stream(streams[(step - 1) % 3])
        with torch.sim.stream(stream) if device != "cpu" else nullcontext():
            train(model, ema, [step])
    found = dict(ema.state_dict(0.05))
    torch.sim.current_stream().wait_stream(streams[11 % 3])
    ema.close()
    return found | stored(folder)


def unordered_streams(device, folder, place):
    """Of weights that do not change."""
    model = make(device)
    synchronize()
    streams = [torch.sim.Stream("sim:0") for _ in range(2)]
    with track(model, folder, place) as ema:
        for step in range(12):
            stream = streams[step % 2]
            with torch.sim.stream(stream) if device != "cpu" else nullcontext():
                ema.update_(model)
        return dict(ema.state_dict(0.05))


def two_devices(device, folder, place):
    model = make("cpu")
    if device != "cpu":
        model.to("sim:0")
        model.first.to("sim:1")
        model.norm.to("sim:1")
    with track(model, folder, place) as ema:
        train(model, ema, range(15))
        with ema.model(model, 0.05):
            found = host(model.state_dict())
    return found | stored(folder)


def partly_on_the_host(device, folder, place):
    model = make("cpu")
    model.last.to(device)
    with track(model, folder, place) as ema:
        train(model, ema, range(15))
        with ema.model(model, 0.05):
            found = host(model.state_dict())
    return found | stored(folder)


def moved(device, folder, place):
    model = make("cpu")
    with track(model, folder, place) as ema:
        train(model, ema, range(5))
        model.to(device)
        train(model, ema, range(5, 10))
        model.to("cpu" if device == "cpu" else "sim:1")
        train(model, ema, range(10, 15))
        model.cpu()
        train(model, ema, range(15, 19))
        return dict(ema.state_dict(0.05))


def continued(device, folder, place):
    model = make(device)
    with track(model, folder / "first", place) as ema:
        train(model, ema, range(9))
        state = ema.state_dict()
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "state.pt")
    with track(model, folder / "second", place) as ema:
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
        ema.load_state_dict(state)
        train(model, ema, range(9, 15))
        return dict(ema.state_dict(0.05))


def resumed(device, folder, place):
    model = make(device)
    ema = None
    for step in range(10):
        if step in (0, 5):
            if ema is not None:
                ema.close()
            ema = track(model, folder, place, resume="auto")
        change(model, step)
        ema.update_(model)
    with ema:
        return dict(ema.state_dict(0.05))


def refused(device, folder, place):
    model = make(device)
    with track(model, folder, place, checkpoint_every=50) as ema:
        train(model, ema, range(5))
        good = deepcopy(model.state_dict())
        with torch.no_grad():
            model.last.weight[1, 2] = torch.nan
        with pytest.raises(NonFiniteError, match=r"last\.weight"):
            ema.update_(model)
            ema.flush()
            ema.update_(model)
        model.load_state_dict(good)
        train(model, ema, range(6, 10))
        return dict(ema.state_dict(0.05))


def in_inference_mode(device, folder, place):
    model = make(device)
    with track(model, folder, place) as ema:
        with torch.inference_mode():
            train(model, ema, range(6))
        train(model, ema, range(6, 12))
        with torch.inference_mode(), ema.model(model, 0.1):
            return host(model.state_dict())


def read_by_another_thread(device, folder, place):
    model = make(device)
    with track(model, folder, place) as ema:
        train(model, ema, range(2))
        is_over = threading.Event()
        reads = []

        def read():
            while not is_over.is_set():
                reads.append(dict(ema.state_dict(0.05)))

        reader = threading.Thread(target=read)
        reader.start()
        train(model, ema, range(2, 15))
        is_over.set()
        reader.join()
        assert reads
        return dict(ema.state_dict(0.05))


def abandoned(device, folder, place):
    model = make(device)
    ema = track(model, folder, place, checkpoint_every=4)
    train(model, ema, range(11))
    del ema, model
    gc.collect()
    wait_for_writers(folder)
    return stored(folder)


def attached(device, folder, place):
    model = nn.Sequential(nn.Linear(20, 33), nn.BatchNorm1d(33), nn.Linear(33, 3))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with track(model, folder, place, checkpoint_every=4) as ema:
        ema.attach(optimizer)
        for step in range(12):
            draw = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(8, 20, generator=draw).to(device)).square().mean().backward()
            optimizer.step()
        return dict(ema.state_dict(0.1))


SCENARIOS = (
    plain,
    own_stream,
    late_device,
    a_snapshot_every_step,
    every_reading,
    counters_on_the_second_device,
    changing_streams,
    unordered_streams,
    two_devices,
    partly_on_the_host,
    moved,
    continued,
    resumed,
    refused,
    in_inference_mode,
    read_by_another_thread,
    abandoned,
    attached,
)


def without_streams(monkeypatch):
    """Take the device for one whose copies are waited for, as Apple's GPU."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("posthoc_cli") and hasattr(module, "streams_of"):
            monkeypatch.setattr(module, "streams_of", lambda _: None)


# --- work that fails


def failing_reader():
    """A reader that fails leaves nothing queued that the next update could change."""
    streams, tensor, current = begin_streams()
    with suppress(ZeroDivisionError), streams.in_own_streams():
        tensor.add(1)
        raise ZeroDivisionError
    with streams.in_streams_of_caller(current):
        tensor.mul_(2)


def failing_update():
    """A reader waits also for an update that has failed."""
    streams, tensor, current = begin_streams()
    with suppress(ZeroDivisionError), streams.in_streams_of_caller(current):
        tensor.mul_(2)
        raise ZeroDivisionError
    with streams.in_own_streams():
        tensor.add(1)


def begin_streams():
    tensor = torch.zeros(1000, device="sim")
    synchronize()
    streams = DeviceStreams()
    current = streams.current([tensor.device])
    with streams.in_streams_of_caller(current):
        tensor.add_(1)
    return streams, tensor, current

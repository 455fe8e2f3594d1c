"""Copies of a model's values to the host, from a device whose streams run as late as they may."""

import random
from collections import deque
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from posthoc_cli.tracker import memory
from posthoc_cli.tracker.memory import HostCopy, Reader


class Event:
    """A mark in a stream, which is done after the work before it."""

    def __init__(self, device):
        self.device = device
        self.done = False

    def finish(self):
        self.done = True

    def synchronize(self):
        while not self.done:
            self.device.some()


class Stream:
    """Work that is done in order; an item that returns False has to wait."""

    def __init__(self, device, *_):
        self.device = device
        self.work = deque()
        device.streams.append(self)

    def advance(self):
        """Do the next item of work; return whether there was one that had not to wait."""
        has_done = bool(self.work) and self.work[0]() is not False
        if has_done:
            self.work.popleft()
        return has_done

    def finish(self):
        """Work until this stream has to wait."""
        while self.advance():
            pass

    def record_event(self, event):
        self.work.append(event.finish)


class SimulatedDevice:
    """Streams whose work is done in a random order of those that streams and events allow."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.streams = []
        self.training = Stream(self)

    def some(self):
        for _ in range(self.draw.randrange(6)):
            self.draw.choice(self.streams).advance()

    def as_torch(self):
        """Return the replacement of torch in `memory`: copies to pinned memory are work of the
        training's stream."""
        simulated = self

        class Pinned(torch.Tensor):
            @classmethod
            def __torch_function__(cls, call, types, args=(), kwargs=None):
                if call.__name__ != "_foreach_copy_":
                    return super().__torch_function__(call, types, args, kwargs or {})
                simulated.training.work.append(partial(call, *map(as_plain, args)))
                return args[0]

        def empty(elements, dtype, device=None, pin_memory=False):
            made = torch.zeros(elements, dtype=dtype)
            return made.as_subclass(Pinned) if pin_memory else made

        cuda = SimpleNamespace(
            Event=lambda **_: Event(self),
            current_stream=lambda _: self.training,
        )
        return SimpleNamespace(**vars(torch) | {"cuda": cuda, "empty": empty})


def as_plain(argument):
    """Return an argument of torch's with tensors of no subclass."""
    if isinstance(argument, list):
        return [*map(as_plain, argument)]
    return argument.as_subclass(torch.Tensor)


@pytest.fixture(params=range(3, 9))
def device(request, monkeypatch):
    """Simulate a device: from the sixth seed on with tensors of several tiles."""
    simulated = SimulatedDevice(request.param)
    if request.param >= 6:
        for name in ("TILE", "DEVICE_TILE"):
            monkeypatch.setattr(memory, name, 2)
    monkeypatch.setattr(memory, "torch", simulated.as_torch())
    return simulated


def tensors():
    return {
        "a": torch.zeros(3, 2),
        "b": torch.zeros(3, 2, dtype=torch.bfloat16),
        "c": torch.zeros(3, 2),
        "d": torch.zeros(3, 2, dtype=torch.float64),
    }


def on_devices(tensors):
    """Return a reader of tensors as if they were on devices, float64 on a second one."""
    host = Reader.from_tensors(tensors)
    layout = []
    for bucket in host.layout:
        number = int(bucket.dtype == torch.float64)
        layout.append(replace(bucket, device=torch.device("cuda", number)))
    values = [host.current(tile) for tile in host.tiles]
    return Reader(tuple(layout), values, threads=0)


def check_values(stager, number):
    values = stager.wait()
    for tile in values.tiles:
        assert (values.values(tile) == number).all()


def test_values_are_those_of_the_moment_in_any_order_of_the_device(device):
    """Training overwrites the values while a copy of earlier ones waits to be read."""
    values = tensors()
    stager = HostCopy()
    for number in range(1, 8):
        for tensor in values.values():
            device.training.work.append(partial(tensor.fill_, number))
        stager.copy(on_devices(values))
        device.some()
        for tensor in values.values():
            device.training.work.append(partial(tensor.fill_, -number))
        device.some()
        check_values(stager, number)


@pytest.mark.cuda
@pytest.mark.parametrize("own_stream", [False, True])
def test_values_on_a_device_are_those_of_the_moment(own_stream):
    """Training continues at once, also in another stream; copying 64 MB takes longer than its next
    kernels."""
    averaged = {
        "a": torch.zeros(2**24, device="cuda"),
        "b": torch.zeros(2**24, device="cuda", dtype=torch.bfloat16),
    }
    reader = Reader.from_tensors(averaged, 0)
    stager = HostCopy()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for number in range(1, 12):
            for tensor in averaged.values():
                tensor.fill_(number)
            stager.copy(reader)
            for tensor in averaged.values():
                tensor.fill_(-number)
            check_values(stager, number)

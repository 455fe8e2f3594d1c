"""Copies of a model's values: device streams that run as late as they may, and pinned memory of the
right size."""

import random
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from posthoc_cli.tracker import host_copy, memory
from posthoc_cli.tracker.host_copy import ModelCopier
from posthoc_cli.tracker.memory import Reader


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

    def wait_event(self, event):
        self.work.append(lambda: event.done)

    def wait_stream(self, other):
        event = Event(self.device)
        other.record_event(event)
        self.wait_event(event)


class SimulatedDevice:
    """Streams whose work is done in a random order of those that streams and events allow."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.free = 2**40
        self.kept = 0  # by torch, of what it has freed
        self.streams = []
        self.used_by = set()
        self.training = self.current = Stream(self)

    def some(self):
        for _ in range(self.draw.randrange(6)):
            self.draw.choice(self.streams).advance()

    @contextmanager
    def on(self, stream):
        self.current = stream
        yield
        self.current = self.training

    def as_torch(self):
        """Return the replacement of torch in `memory` and `host_copy`."""
        simulated = self

        class OnDevice(torch.Tensor):
            def record_stream(self, stream):
                simulated.used_by.add((self.data_ptr(), stream))

            @classmethod
            def __torch_function__(cls, call, types, args=(), kwargs=None):
                if call.__name__ not in ("copy_", "_foreach_copy_"):
                    return super().__torch_function__(call, types, args, kwargs or {})
                simulated.current.work.append(partial(call, *map(as_plain, args)))
                return args[0]

        def empty(elements, dtype, device=None, pin_memory=False):
            made = torch.zeros(elements, dtype=dtype)
            is_on_device = device is not None and device.type == "cuda"
            return made.as_subclass(OnDevice) if is_on_device else made

        cuda = SimpleNamespace(
            Stream=partial(Stream, self),
            Event=lambda **_: Event(self),
            current_stream=lambda _: self.current,
            stream=self.on,
            mem_get_info=lambda _: (self.free, self.free),
            memory_reserved=lambda _: self.kept,
            memory_allocated=lambda _: 0,
        )
        return SimpleNamespace(**vars(torch) | {"cuda": cuda, "empty": empty})


def as_plain(argument):
    """Return an argument of torch's with tensors of no subclass."""
    if isinstance(argument, list):
        return [*map(as_plain, argument)]
    return argument.as_subclass(torch.Tensor)


@pytest.fixture(params=range(3, 9))
def device(request, monkeypatch):
    """Simulate a device: from the sixth seed on without free memory, and with tensors of several
    slabs."""
    simulated = SimulatedDevice(request.param)
    if request.param >= 6:
        simulated.free = 0
        for name in ("TILE", "DEVICE_TILE"):
            monkeypatch.setattr(memory, name, 2)
    for module in (memory, host_copy):
        monkeypatch.setattr(module, "torch", simulated.as_torch())
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
    host = Reader.of_tensors(tensors)
    layout = []
    for bucket in host.layout:
        number = int(bucket.dtype == torch.float64)
        layout.append(replace(bucket, device=torch.device("cuda", number)))
    values = [host.current(tile) for tile in host.tiles]
    return Reader(tuple(layout), values, threads=0)


def check_values(stager, number):
    values = stager.arrived()
    for tile in values.tiles:
        assert (values.values(tile) == number).all()


def test_values_are_those_of_the_moment_in_any_order_of_the_device(device):
    """Training overwrites the values while a copy of earlier ones waits to be read."""
    values = tensors()
    stager = ModelCopier()
    for number in range(1, 8):
        for tensor in values.values():
            device.training.work.append(partial(tensor.fill_, number))
        stager.copy(on_devices(values))
        device.some()
        for tensor in values.values():
            device.training.work.append(partial(tensor.fill_, -number))
        device.some()
        check_values(stager, number)


def test_training_waits_for_the_host_only_if_memory_is_short(device):
    """A buffer holds all of a copy, or two tiles a device."""
    values = tensors()
    stager = ModelCopier()
    stager.copy(on_devices(values))
    host = sum(value.nbytes for value in values.values())
    buffers = {buffer for buffer, _ in device.used_by}
    # Both streams are recorded, so that a freed buffer is not reused by the training before the
    # other has read it.
    assert len(device.used_by) == 2 * len(buffers)
    device.training.finish()
    if device.free:
        assert stager.nbytes == 2 * host
        assert not device.training.work
    else:
        assert len(buffers) == 4
        assert stager.nbytes <= host + 4 * 4 * 8  # bytes of a slab
        assert device.training.work
    stager.arrived()
    device.training.finish()
    assert not device.training.work
    stager.copy(on_devices(values))
    device.training.finish()
    assert bool(device.training.work) == (not device.free)


@pytest.mark.parametrize("device", [6], indirect=True)
def test_memory_that_torch_has_freed_and_kept_counts_as_free(device):
    device.kept = 2**40
    stager = ModelCopier()
    values = tensors()
    stager.copy(on_devices(values))
    host = sum(value.nbytes for value in values.values())
    assert stager.nbytes == 2 * host


@pytest.mark.cuda
@pytest.mark.parametrize("own_stream", [False, True])
def test_values_on_a_device_are_those_of_the_moment(own_stream):
    """Training continues at once, also in another stream; copying 64 MB takes longer than its next
    kernels."""
    averaged = {
        "a": torch.zeros(2**24, device="cuda"),
        "b": torch.zeros(2**24, device="cuda", dtype=torch.bfloat16),
    }
    reader = Reader.of_tensors(averaged, 0)
    stager = ModelCopier()
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

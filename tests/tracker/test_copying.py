"""Copies of a model's values: device streams that run as late as they may, and pinned memory of the
right size."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from posthoc_cli.tracker import host_copy, memory
from posthoc_cli.tracker.host_copy import ModelCopier
from posthoc_cli.tracker.memory import Reader


class Event:
    """An event of a stream, which is done after the work before it."""

    def __init__(self, device):
        self.device = device
        self.done = False

    def finish(self):
        self.done = True

    def synchronize(self):
        self.device.run(until=lambda: self.done)


@dataclass(eq=False)
class Stream:
    """Work that is done in order; an item of `work` does nothing and returns False while it has to
    wait."""

    device: SimulatedDevice
    work: deque[Callable[[], bool]] = field(default_factory=deque)

    def add(self, do):
        self.work.append(lambda: do() is not None or True)

    def advance(self):
        """Do the next item of work; return whether there was one that had not to wait."""
        if self.work and self.work[0]():
            self.work.popleft()
            return True
        return False

    def finish(self):
        """Work until this stream has to wait."""
        while self.advance():
            pass

    def record_event(self, event=None):
        event = event or Event(self.device)
        self.add(event.finish)
        return event

    def wait_event(self, event):
        self.work.append(lambda: event.done)

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class SimulatedDevice:
    """Streams whose work is done in a random order of those that streams and events allow."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.free = 2**40
        self.kept = 0  # by torch, of what it has freed
        self.streams = []
        self.used_by = set()
        self.training = self.current = self.stream()

    def stream(self, *_):
        self.streams.append(Stream(self))
        return self.streams[-1]

    def run(self, until=lambda: False):
        """Work until a condition holds, or until no stream can continue."""
        while not until():
            self.draw.shuffle(self.streams)
            if not any(stream.advance() for stream in self.streams):
                return

    def some(self):
        for _ in range(self.draw.randrange(6)):
            self.draw.choice(self.streams).advance()

    @contextmanager
    def on(self, stream):
        before = self.current
        self.current = stream
        yield
        self.current = before

    def as_torch(self):
        """Return the replacement of torch in `memory` and `host_copy`."""
        used_by = self.used_by
        cuda = SimpleNamespace(
            Stream=self.stream,
            Event=lambda **_: Event(self),
            current_stream=lambda _: self.current,
            stream=self.on,
            mem_get_info=lambda _: (self.free, self.free),
            memory_reserved=lambda _: self.kept,
            memory_allocated=lambda _: 0,
        )

        class OnDevice(torch.Tensor):
            def record_stream(self, stream):
                used_by.add((self.data_ptr(), stream))

            @classmethod
            def __torch_function__(
                cls,
                call,
                types,
                args=(),
                kwargs=None,
            ):
                if call.__name__ not in ("copy_", "_foreach_copy_"):
                    return super().__torch_function__(call, types, args, kwargs or {})
                self.current.add(partial(call, *map(as_plain, args)))
                return args[0]

        proxy = SimpleNamespace(**vars(torch))
        proxy.cuda = cuda

        def empty(
            elements,
            dtype,
            device=None,
            pin_memory=False,
        ):
            made = torch.zeros(elements, dtype=dtype)
            if device is not None and device.type == "cuda":
                return made.as_subclass(OnDevice)
            return made

        proxy.empty = empty
        return proxy


def as_plain(argument):
    """Return an argument of torch's with tensors of no subclass."""
    if isinstance(argument, list):
        return [tensor.as_subclass(torch.Tensor) for tensor in argument]
    if isinstance(argument, torch.Tensor):
        return argument.as_subclass(torch.Tensor)
    return argument


@pytest.fixture(params=range(3, 9))
def device(request, monkeypatch):
    """Simulate a device: from the sixth seed on without free memory, and with tensors of several
    slabs."""
    simulated = SimulatedDevice(request.param)
    if request.param >= 6:
        simulated.free = 0
        for name, elements in {"TILE": 2, "DEVICE_TILE": 2}.items():
            monkeypatch.setattr(memory, name, elements)

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
            device.training.add(partial(tensor.fill_, number))
        stager.copy(on_devices(values))
        device.some()
        for tensor in values.values():
            device.training.add(partial(tensor.fill_, -number))
        device.some()
        check_values(stager, number)
        copied = set()
        for bucket in stager.memory.layout:
            copied |= bucket.places.keys()
        assert copied == values.keys()


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

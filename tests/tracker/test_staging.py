"""Copies out of training's way: streams that run as late as they may, and pinned memory of the right size."""

from __future__ import annotations

import gc
import mmap
import os
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posthoc_cli.tracker import averages
from posthoc_cli.tracker.averages import Layout, Staged, Stager, lay_out, pinned_empty


class Event:
    """After it, what was recorded before it is done."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device, self.done = device, False

    def synchronize(self) -> None:
        self.device.run(until=lambda: self.done)


@dataclass(eq=False)
class Stream:
    """Work in order; `work` does nothing and returns False while it has to wait."""

    device: SimulatedDevice
    work: deque[Callable[[], bool]] = field(default_factory=deque)

    def add(self, do: Callable[[], object]) -> None:
        self.work.append(lambda: do() is not None or True)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.device)
        self.add(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.work.append(lambda: event.done)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class SimulatedDevice:
    """Streams that do what they were given in any order that streams and events allow, drawn by chance."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.streams: list[Stream] = []
        self.used_by: set[tuple[int, Stream]] = set()
        self.training = self.current = self.stream()

    def stream(self, *_: object) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    def run(self, until: Callable[[], bool] = lambda: False, only: Stream | None = None) -> None:
        """Work until nothing can be done any more."""
        while not until():
            for stream in self.draw.sample(self.streams, len(self.streams)):
                if (only is None or stream is only) and stream.work and stream.work[0]():
                    stream.work.popleft()
                    break
            else:
                return

    def some(self) -> None:
        count = self.draw.randrange(6)
        self.run(until=iter([False] * count + [True]).__next__)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def as_torch(self) -> Any:
        """What `staging` sees in place of torch."""
        used_by = self.used_by
        cuda = SimpleNamespace(
            Stream=self.stream, Event=lambda **_: Event(self), current_stream=lambda _: self.current, stream=self.on
        )

        class OnDevice(torch.Tensor):
            def record_stream(self, stream: Any) -> None:
                used_by.add((self.data_ptr(), stream))

            @classmethod
            def __torch_function__(cls, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if call.__name__ not in ("copy_", "_foreach_copy_"):
                    return super().__torch_function__(call, types, args, kwargs or {})
                plain = [[x.as_subclass(torch.Tensor) for x in a] if isinstance(a, list) else a for a in args]
                plain = [a.as_subclass(torch.Tensor) if isinstance(a, torch.Tensor) else a for a in plain]
                self.current.add(lambda: call(*plain))
                return args[0]

        class Torch:
            def __getattr__(_, name: str) -> Any:  # noqa: N805
                return getattr(torch, name)

        proxy: Any = Torch()
        proxy.cuda = cuda
        proxy.empty = lambda elements, dtype, **_: torch.zeros(elements, dtype=dtype).as_subclass(OnDevice)
        return proxy


@pytest.fixture(params=range(15))
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    simulated = SimulatedDevice(request.param)

    def on_devices(tensors: Mapping[str, torch.Tensor]) -> Layout:
        """float64 on a second device."""
        numbers = {torch.float64: 1}
        return tuple(replace(g, device=torch.device("cuda", numbers.get(g.dtype, 0))) for g in lay_out(tensors))

    monkeypatch.setattr(averages, "torch", simulated.as_torch())
    monkeypatch.setattr(averages, "lay_out", on_devices)
    monkeypatch.setattr(averages, "pinned_empty", lambda elements, dtype: torch.zeros(elements, dtype=dtype))
    return simulated


def tensors() -> dict[str, torch.Tensor]:
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float32, "d": torch.float64}
    return {name: torch.zeros(3, 2, dtype=dtype) for name, dtype in dtypes.items()}


def expected(values: Mapping[str, torch.Tensor], number: int) -> bool:
    return all(bool((value == torch.tensor(number, dtype=value.dtype)).all()) for value in values.values())


def test_values_are_those_of_the_moment_in_any_order_of_the_device(device: SimulatedDevice) -> None:
    """Training overwrites its values step after step; up to two copies of earlier ones wait to be read."""
    values = tensors()
    stager, waiting = Stager(), deque[tuple[int, Staged]]()

    def check() -> None:
        number, staged = waiting.popleft()
        assert staged.arrived().keys() == values.keys()
        assert expected(staged.arrived(), number)
        stager.give_back(staged)

    for number in range(1, 8):
        for tensor in values.values():
            device.training.add(lambda tensor=tensor, number=number: tensor.fill_(number))
        waiting.append((number, stager.stage(values)))
        device.some()
        if len(waiting) > device.draw.randrange(3):
            check()
    while waiting:
        check()


def test_a_buffer_is_not_filled_again_before_its_values_have_left(device: SimulatedDevice) -> None:
    """Training is as far ahead of the other streams as it can be."""
    values, stager = tensors(), Stager()
    staged = [stager.stage(values)]
    for tensor in values.values():
        device.training.add(lambda tensor=tensor: tensor.fill_(1))
    staged.append(stager.stage(values))
    device.run(only=device.training)
    for number, one in enumerate(staged):
        assert expected(one.arrived(), number)


def test_training_waits_for_no_copy_to_the_host_but_that_of_the_buffer_it_refills(device: SimulatedDevice) -> None:
    values, stager = tensors(), Stager()
    first = stager.stage(values)
    groups = len(lay_out(values))
    assert len({buffer for buffer, _ in device.used_by}) == groups
    # Freed, a buffer is not given to the training before the other stream has read it.
    assert len(device.used_by) == 2 * groups
    device.run(only=device.training)
    assert not device.training.work  # all groups are out of training's way, and none has gone to the host
    first.arrived()
    stager.stage(values)
    device.run(only=device.training)
    assert not device.training.work


def test_buffers_are_used_again_and_others_are_made_for_other_tensors(device: SimulatedDevice) -> None:
    values, stager = tensors(), Stager()
    first = stager.stage(values)
    first.arrived()
    stager.give_back(first)
    assert stager.stage(values).values is first.values
    other = stager.stage({"a": values["a"].fill_(7)})
    assert other.arrived().keys() == {"a"}
    assert expected(other.arrived(), 7)


class Cudart:
    """Registers memory, or has no mind to."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 1
        if not self.error:
            ends = [(start, start + size) for start, size in self.registered.items()]
            assert all(address + nbytes <= start or end <= address for start, end in ends)
            self.registered[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def pretend(monkeypatch: pytest.MonkeyPatch, cudart: Cudart) -> list[int]:
    """A machine with three devices, of which the last is in use; returns those that were waited for."""
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda device: device == 2, raising=False)

    def use(device: int) -> nullcontext[None]:
        assert device == 2
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", use)
    return waited


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex64])
@pytest.mark.parametrize("elements", [1, 1000, 2**20 + 1])
def test_pinned_memory_is_as_large_as_what_it_holds_and_registered_as_long_as_it_is_used(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = Cudart()
    waited = pretend(monkeypatch, cudart)
    flat, other = pinned_empty(elements, dtype), pinned_empty(3, dtype)
    assert (flat.shape, flat.dtype, flat.device.type) == ((elements,), dtype, "cpu")
    # A power of two would be twice as much for 2**20 + 1.
    assert cudart.registered == {flat.data_ptr(): elements * dtype.itemsize, other.data_ptr(): 3 * dtype.itemsize}
    assert flat.data_ptr() % mmap.PAGESIZE == other.data_ptr() % mmap.PAGESIZE == 0
    flat.fill_(1)
    part = flat[-1:].view(1, 1)
    address = flat.data_ptr()
    del flat
    gc.collect()
    assert address in cudart.registered
    assert part.sum() == 1
    assert waited == []
    del part
    gc.collect()
    assert cudart.registered.keys() == {other.data_ptr()}
    assert waited == [2]  # a copy may have been on its way


def test_memory_that_cannot_be_registered_is_allocated_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Cudart(error=801))
    given, real = [], torch.empty

    def empty(elements: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        given.append(pin_memory)
        return real(elements, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    # The error stays with the driver until a kernel has raised it.
    monkeypatch.setattr(torch, "zeros", lambda *_, device: given.append(device) or real(1, dtype=torch.float32))
    assert pinned_empty(5, torch.float32).shape == (5,)
    assert given == ["cuda", True]


def test_a_forked_process_unregisters_nothing_and_no_elements_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart()
    pretend(monkeypatch, cudart)
    assert pinned_empty(0, torch.float32).shape == (0,)
    assert cudart.registered == {}
    flat = pinned_empty(10, torch.float32)
    monkeypatch.setattr(averages.os, "getpid", lambda: -1)
    del flat
    gc.collect()
    assert len(cudart.registered) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_pinned_memory_is_the_same_for_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a page that is written after a fork would be another one than that which the device writes to."""
    pretend(monkeypatch, Cudart())
    flat = pinned_empty(2, torch.int64)
    flat.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads, from Python 3.12 on
        child = os.fork()
    if not child:
        try:
            flat.numpy()[1] = 5
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert flat.tolist() == [0, 5]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
def test_pinned_memory_is_pinned_and_given_free() -> None:
    flat = pinned_empty(2**20 + 1, torch.float32)
    assert flat.is_pinned()
    flat.copy_(torch.arange(2**20 + 1, device="cuda"), non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(flat, torch.arange(2**20 + 1).float())
    del flat
    gc.collect()
    again = torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.uint8)
    assert not again.is_pinned()  # also where it is at the same address


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("own_stream", [False, True])
def test_values_on_a_device_are_those_of_the_moment(own_stream: bool) -> None:
    """Training goes on at once, in a stream of its own too; 64 MB a group take longer than its next kernels."""
    averaged = {
        str(k): torch.zeros(2**24, device="cuda", dtype=d) for k, d in enumerate((torch.float32, torch.bfloat16))
    }
    stager, waiting = Stager(), deque[tuple[int, Staged]]()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()) if own_stream else nullcontext():
        for number in range(1, 12):
            for tensor in averaged.values():
                tensor.fill_(number)
            waiting.append((number, stager.stage(averaged)))
            if len(waiting) == 2:
                first, staged = waiting.popleft()
                assert expected(staged.arrived(), first)
                stager.give_back(staged)

"""Each synchronisation of tracker and synthesis is needed: without it the simulator finds a fault.

A mutation replaces a text of a function, which must be there once, by `pass` or another text.
"""

import inspect
import sys
import textwrap

import pytest
import torch
from accelerator import check_synthesis, trainings
from accelerator.trainings import core, synchronize

from posthoc_cli import devices
from posthoc_cli.synthesis.calculator import Calculator
from posthoc_cli.tracker.memory import HostCopy
from posthoc_cli.tracker.pipeline import DeviceStreams, Pipeline

OWN_STREAMS = "with self._streams.in_own_streams():"


def train(scenario, place):
    return lambda folder: trainings.check_same(scenario, folder, place)


def synthesize(folder):
    """Make averages in a busy stream, in memory that it still writes."""
    directory = folder / "snapshots"
    directory.mkdir()
    check_synthesis.write_snapshots(directory)
    expected = check_synthesis.compute(directory, "cpu")
    core.set_delays(300, 5000)
    with torch.sim.stream(torch.sim.Stream()):
        for _ in range(2):
            size = check_synthesis.LARGE
            old = [torch.empty(size, device="sim") for _ in check_synthesis.TARGETS]
            torch.sim._sleep(50_000_000)
            for tensor in old:
                tensor.fill_(torch.nan)
            del old, tensor
            ours = check_synthesis.compute(directory, "sim", workers=2)
            check_synthesis.check_same(ours, expected)


MUTATIONS = {
    "values arrive on the host": (
        (HostCopy, "wait", "event.synchronize()", "pass"),
        train(trainings.late_device, "cpu"),
    ),
    "the next values wait for the last ones": (
        (Pipeline, "wait_for_turn", "self._averaging.wait_for_turn()", "pass"),
        train(trainings.late_device, "cpu"),
    ),
    "snapshots wait for the last ones": (
        (Pipeline, "wait_for_turn", "self._writing.wait_for_turn()", "pass"),
        train(trainings.a_snapshot_every_step, "model"),
    ),
    "copied buffers are read after they were copied": (
        (Pipeline, "_update_by_copy", "self._streams.last_events = events", "pass"),
        train(trainings.counters_on_the_second_device, "cpu"),
    ),
    "snapshots are taken after the update": (
        (Pipeline, "_submit_snapshots", OWN_STREAMS, "if True:"),
        train(trainings.own_stream, "model"),
    ),
    "the sample is read after the update": (
        (Pipeline, "sample", OWN_STREAMS, "if True:"),
        train(trainings.every_reading, "model"),
    ),
    "averages are read after the update": (
        (Pipeline, "read", OWN_STREAMS, "if True:"),
        train(trainings.every_reading, "model"),
    ),
    "the state is read after the update": (
        (Pipeline, "read_exactly", OWN_STREAMS, "if True:"),
        train(trainings.every_reading, "model"),
    ),
    "errors are predicted after the update": (
        (Pipeline, "predict_error", OWN_STREAMS, "if True:"),
        train(trainings.every_reading, "model"),
    ),
    "updates run in the training's stream": (
        (DeviceStreams, "in_streams_of_caller", "stack.enter_context(in_stream(stream))", "pass"),
        train(trainings.own_stream, "model"),
    ),
    "an update follows the one before": (
        (DeviceStreams, "in_streams_of_caller", "streams[device].wait_event(event)", "pass"),
        train(trainings.unordered_streams, "model"),
    ),
    "an update's end is known": (
        (
            DeviceStreams,
            "in_streams_of_caller",
            "self.last_events = self.record_events(streams)",
            "pass",
        ),
        train(trainings.own_stream, "model"),
    ),
    "the end of an update that fails is known": (
        (
            DeviceStreams,
            "in_streams_of_caller",
            "finally:  # an update that has failed may have queued work",
            "except KeyError:\n            raise\n        else:",
        ),
        lambda _: trainings.failing_update(),
    ),
    "a reader waits for the update": (
        (DeviceStreams, "in_own_streams", "self._own[device].wait_event(event)", "pass"),
        train(trainings.own_stream, "model"),
    ),
    "a reader has a stream of its own": (
        (
            DeviceStreams,
            "in_own_streams",
            "stack.enter_context(in_stream(self._own[device]))",
            "pass",
        ),
        train(trainings.own_stream, "model"),
    ),
    "a reader's work is over at its end": (
        (DeviceStreams, "in_own_streams", "stack.callback(self._own[device].synchronize)", "pass"),
        lambda _: trainings.failing_reader(),
    ),
    "the stream's device is current": (
        (
            devices,
            "in_stream",
            "with module.device(stream.device), module.stream(stream):",
            "with module.stream(stream):",
        ),
        train(trainings.on_the_second_device, "model"),
    ),
    "a tile follows the caller's work": (
        (Calculator, "compute", "self._stream.wait_event(opened)", "pass"),
        synthesize,
    ),
    "a tile is computed in a stream of its thread": (
        (Calculator, "compute", "stack.enter_context(in_stream(self._stream))", "pass"),
        synthesize,
    ),
    "a tile is complete when it is returned": (
        (Calculator, "compute", "stack.callback(self._stream.synchronize)", "pass"),
        synthesize,
    ),
    "bytes are read when the last ones have left": (
        (Calculator, "_read", "buffer.sent.synchronize()", "pass"),
        synthesize,
    ),
}


def mutate(monkeypatch, owner, name, old, new):
    """Replace a text in the source of a function, method or property."""
    found = inspect.getattr_static(owner, name)
    is_property = isinstance(found, property)
    function = inspect.unwrap(found.fget if is_property else found)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, source
    made = {}
    code = "from __future__ import annotations\n" + source.replace(old, new)
    module = vars(sys.modules[function.__module__])
    exec(compile(code, f"<{name} without {old}>", "exec"), module, made)
    for user in [owner, *sys.modules.values()]:  # others may have imported it by name
        if inspect.getattr_static(user, name, None) is found:
            monkeypatch.setattr(user, name, made[name])


def find_fault(check, folder):
    """Say what a check finds, with what the simulator finds; "" if nothing."""
    core.set_delays(100, 3000)
    synchronize()
    core.reset()
    try:
        check(folder)
        synchronize()
        trainings.check()
        assert core.counts()["visits of device 0"] == 0
    except Exception as error:  # noqa: BLE001  # whatever the lack of order leads to
        return f"{type(error).__name__}: {error}"
    finally:
        core.set_delays(0, 0)
        synchronize()
        core.reset()
    return ""


@pytest.mark.parametrize("title", MUTATIONS)
def test_without_a_synchronisation_a_fault_is_found(monkeypatch, tmp_path, title):
    mutation, check = MUTATIONS[title]
    mutate(monkeypatch, *mutation)
    fault = find_fault(check, tmp_path)
    assert fault

"""The simulator itself: what it computes is right, and what a GPU punishes is found."""

import ctypes

import pytest
import torch
from accelerator import simulator

core = simulator.load()


@pytest.fixture(autouse=True)
def _fresh():
    core.set_delays(300, 1000)
    torch.sim.synchronize()
    core.reset()
    yield
    core.set_delays(0, 0)
    torch.sim.synchronize()


def pinned(size):
    return torch.empty(size, pin_memory=True)


def counts(name):
    return core.counts()[name]


# --- values


def test_operators_give_the_bits_of_the_cpu():
    values = torch.randn(40, 30)
    weights = torch.randn(30, 20)

    def compute(device):
        a = values.to(device)
        b = weights.to(device)
        product = torch.relu(a @ b).half().float()
        product.mul_(0.5).add_(1.0)
        joined = torch.cat([product, product.t().contiguous().view(40, 20)], out=a.new_empty(0))
        chosen = joined.index_select(0, torch.tensor([3, 1]).to(device))
        return [product, joined, chosen, product.sum(0), *torch.aminmax(product), product.argmax()]

    for ours, expected in zip(compute("sim"), compute("cpu"), strict=True):
        assert ours.device.type == "sim"
        assert torch.equal(ours.cpu(), expected)


def test_gradients_are_those_of_the_cpu():
    def train(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5)).to(device)
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 7).to(device)).square().sum().backward()
            optimizer.step()
        return {name: value.cpu() for name, value in model.state_dict().items()}

    ours = train("sim:1")
    for name, value in train("cpu").items():
        assert torch.equal(ours[name], value)
    assert core.races() == []


def test_copies_convert_and_cross_devices():
    values = torch.randn(6, 5)
    moved = values.to("sim:0").t().to("sim:1").half()
    assert torch.equal(moved.cpu(), values.t().half())
    target = pinned(30)
    target.copy_(moved.contiguous().view(-1), non_blocking=True)
    torch.sim.synchronize(1)
    assert torch.equal(target, values.t().half().reshape(-1).float())


def test_storage_can_be_freed_and_made_again():
    tensor = torch.ones(1000, device="sim")
    tensor.untyped_storage().resize_(0)
    tensor.untyped_storage().resize_(4000)
    tensor.fill_(2)
    assert torch.equal(tensor.cpu(), torch.full((1000,), 2.0))


# --- races


def test_two_streams_that_nothing_orders_race():
    tensor = torch.zeros(1000, device="sim")
    torch.sim.synchronize()
    with torch.sim.stream(torch.sim.Stream()):
        tensor.add_(1)
    assert core.races() == []
    tensor.mul(2)
    (race,) = core.races()
    operator = "aten::{}.out at check_simulator.py:"
    assert race.startswith(operator.format("mul"))
    assert "reads in stream 0:0, not after " + operator.format("add") in race


def test_reads_do_not_race_and_neither_do_other_elements():
    tensor = torch.zeros(1000, device="sim")
    torch.sim.synchronize()
    with torch.sim.stream(torch.sim.Stream()):
        tensor[500:].add(1)
        tensor[:500].add_(1)
    tensor[500:].add(1)
    tensor[499:].add(1)
    (race,) = core.races()
    assert " reads in stream 0:0, not after " in race
    assert race.endswith(" wrote")


def order_by_event(before, after):
    after.wait_event(before.record_event())


def order_by_stream(before, after):
    after.wait_stream(before)


def order_by_host(before, after):
    before.synchronize()


def order_by_event_and_host(before, after):
    before.record_event().synchronize()


def order_by_device(before, after):
    torch.sim.synchronize()


@pytest.mark.parametrize(
    "order",
    [order_by_event, order_by_stream, order_by_host, order_by_event_and_host, order_by_device],
)
def test_what_orders_two_streams_ends_a_race(order):
    tensor = torch.zeros(1000, device="sim")
    torch.sim.synchronize()
    first = torch.sim.Stream()
    with torch.sim.stream(first):
        tensor.add_(1)
    order(first, torch.sim.current_stream())
    assert torch.equal((tensor * 2).cpu(), torch.full((1000,), 2.0))
    assert core.races() == []


def test_an_event_that_is_over_orders_nothing_until_it_is_asked():
    tensor = torch.zeros(1000, device="sim")
    torch.sim.synchronize()
    stream = torch.sim.Stream()
    with torch.sim.stream(stream):
        tensor.add_(1)
    event = stream.record_event()
    while not event.query():
        pass
    tensor.mul_(2)
    assert core.races() == []


# --- memory


def test_a_read_of_the_host_is_found():
    tensor = torch.zeros(4, device="sim")
    torch.sim.synchronize()
    ctypes.string_at(tensor.data_ptr(), 4)
    assert counts("touches of device memory") == 1


def test_freed_memory_is_poisoned_and_used_again_at_once():
    tensor = torch.zeros(1000, device="sim")
    address = tensor.data_ptr()
    del tensor
    again = torch.empty(1000, device="sim")
    assert again.data_ptr() == address
    assert bool(again.cpu().isnan().all())


def test_memory_that_another_stream_still_reads_is_a_race_when_freed():
    tensor = torch.ones(1000, device="sim")
    torch.sim.synchronize()
    with torch.sim.stream(torch.sim.Stream()):
        tensor.add(1)
    del tensor
    (race,) = core.races()
    assert race.startswith("freeing at")


def test_memory_that_a_stream_has_recorded_waits_for_it():
    tensor = torch.ones(1000, device="sim")
    torch.sim.synchronize()
    stream = torch.sim.Stream()
    with torch.sim.stream(stream):
        torch.sim._sleep(20_000_000)
        result = tensor.add(1)
    tensor.record_stream(stream)
    del tensor
    other = torch.empty(1000, device="sim").fill_(5)
    stream.synchronize()
    assert torch.equal(result.cpu(), torch.full((1000,), 2.0))
    assert bool((other.cpu() == 5).all())
    assert core.races() == []


# --- pinned memory


def test_a_read_before_a_copy_has_arrived_is_found():
    tensor = torch.ones(1000, device="sim")
    target = pinned(1000)
    torch.sim._sleep(20_000_000)
    target.copy_(tensor, non_blocking=True)
    assert float(target[0]) != 1
    assert counts("touches of pinned memory") == 1
    torch.sim.synchronize()
    assert float(target.sum()) == 1000
    assert counts("touches of pinned memory") == 1


def test_a_write_before_a_copy_has_left_is_found():
    source = pinned(1000).fill_(1)
    tensor = torch.zeros(1000, device="sim")
    torch.sim._sleep(20_000_000)
    tensor.copy_(source, non_blocking=True)
    assert float(source[0]) == 1
    assert counts("touches of pinned memory") == 0
    source.fill_(3)
    assert counts("touches of pinned memory") == 1


def test_other_memory_of_the_host_is_copied_at_once():
    source = torch.ones(1000)
    torch.sim._sleep(20_000_000)
    tensor = source.to("sim", non_blocking=True)
    source.fill_(3)
    assert float(tensor.cpu().sum()) == 1000


def test_pinned_memory_is_counted_in_powers_of_two():
    before = counts("pinned")
    target = pinned(1025)
    assert counts("pinned") - before == 8192
    del target
    assert counts("pinned") == before


# --- devices


def test_visits_of_a_device_are_counted():
    stream = torch.sim.Stream("sim:1")
    with torch.sim.stream(stream):
        pass
    assert counts("visits of device 1") >= 1
    core.reset()
    with torch.sim.device(1), torch.sim.stream(stream):
        torch.zeros(3, device="sim:0").add_(1)
    assert counts("visits of device 0") == 0
    assert torch.sim.current_device() == 0


def test_leaving_a_stream_of_another_device_is_a_visit_of_the_one_before():
    torch.sim.set_device(1)
    core.reset()
    with torch.sim.stream(torch.sim.Stream("sim:0")):
        pass
    assert counts("visits of device 0") == 1
    torch.sim.set_device(0)


def test_an_error_in_a_kernel_is_raised_where_the_host_waits():
    index = torch.tensor([5]).to("sim")
    torch.zeros(3, device="sim").index_select(0, index)
    with pytest.raises(RuntimeError, match="error in a kernel"):
        torch.sim.synchronize()


def test_events_measure_the_time_of_a_stream():
    before = torch.sim.Event(enable_timing=True)
    after = torch.sim.Event(enable_timing=True)
    before.record()
    torch.sim._sleep(5_000_000)
    after.record()
    torch.sim.synchronize()
    assert before.elapsed_time(after) >= 5

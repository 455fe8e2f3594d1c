"""Copies of a model's values to the host from a device."""

import pytest
import torch
from device import DEVICE, IS_SIMULATED, MODULE

from posthoc_cli.tracker.memory import HostCopy, TileReader


@pytest.mark.cuda
@pytest.mark.parametrize("own_stream", [False, True])
def test_values_on_a_device_are_those_of_the_moment(own_stream):
    """Training continues at once, also in another stream; on a GPU copying 64 MB takes longer than
    its next kernels."""
    size = 2**12 if IS_SIMULATED else 2**24
    averaged = {
        "a": torch.zeros(size, device=DEVICE),
        "b": torch.zeros(size, device=DEVICE, dtype=torch.bfloat16),
    }
    reader = TileReader.from_tensors(averaged, 0)
    stager = HostCopy()
    MODULE.synchronize()
    stream = MODULE.Stream() if own_stream else MODULE.current_stream()
    with MODULE.stream(stream):
        for number in range(1, 12):
            for tensor in averaged.values():
                tensor.fill_(number)
            stager.copy(reader)
            for tensor in averaged.values():
                tensor.fill_(-number)
            values = stager.wait()
            for tile in values.tiles:
                assert (values.values(tile) == number).all()

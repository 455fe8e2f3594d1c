"""HostNumber: a buffer's number, without asking the buffer each time."""

from __future__ import annotations

import numpy as np
import torch

from posthoc_cli.averages.pairing import HostNumber


class Asked(torch.Tensor):
    """Counts how often its value is taken to the host."""

    times = 0

    def item(self) -> float:
        Asked.times += 1
        return super().item()


def test_the_device_is_asked_once_and_again_after_somebody_else_wrote() -> None:
    number, buffer = HostNumber(), torch.tensor(3).as_subclass(Asked)
    Asked.times = 0
    assert [number.read(buffer) for _ in range(3)] == [3, 3, 3]
    number.write_(buffer, 4)
    assert number.read(buffer) == 4
    assert Asked.times == 1
    buffer.add_(1)
    assert number.read(buffer) == 5
    assert Asked.times == 2


def test_another_tensor_in_its_place_is_asked() -> None:
    number, one, other = HostNumber(), torch.tensor(1), torch.tensor(2)
    assert one._version == other._version
    assert (number.read(one), number.read(other), number.read(one)) == (1, 2, 1)


def test_a_written_number_is_known_as_the_buffer_holds_it() -> None:
    number, buffer = HostNumber(), torch.tensor(0.0, dtype=torch.float32)
    number.write_(buffer, 0.1)
    assert number.read(buffer) == float(np.float32(0.1)) == buffer.item()

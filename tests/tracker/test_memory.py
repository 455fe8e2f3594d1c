"""How the elements of a model are divided into tiles."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from posthoc_cli.tracker import memory
from posthoc_cli.tracker.memory import Bucket, Slot


@pytest.fixture
def small_sizes(monkeypatch):
    monkeypatch.setattr(memory, "TILE", 16)
    monkeypatch.setattr(memory, "DEVICE_TILE", 128)


def buckets(sizes):
    """Return a bucket of tensors of these sizes on the host, and one on an accelerator."""
    places = {}
    end = 0
    for size in sizes:
        places[f"tensor {len(places)}"] = Slot(end, end + size, (size,), (0,))
        end += size
    on_host = Bucket(torch.device("cpu"), torch.float32, places, end)
    return on_host, replace(on_host, device=torch.device("cuda", 0))


@pytest.mark.usefixtures("small_sizes")
def test_tiles_of_the_accelerator_consist_of_tiles_of_the_host():
    """On the host a tensor larger than a tile shares none."""
    small = [4, 4, 4, 4, 3]
    large = [17, 0, 40, 1, 700, 16, 64, 150, 7]
    host, accelerator = buckets(small + large)
    assert set(accelerator.tile_edges) <= set(host.tile_edges)
    assert host.tile_edges[:6] == [0, 16, 19, 35, 36, 52]
    for bucket, most in ((host, 16), (accelerator, 128)):
        assert bucket.tile_edges[-1] == host.size
        for begin, end in pairwise(bucket.tile_edges):
            assert 0 < end - begin <= most

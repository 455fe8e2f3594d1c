"""How the elements of a model are divided into tiles, and pinned memory into slabs."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from posthoc_cli.tracker import memory
from posthoc_cli.tracker.memory import Bucket, Place, layout_of

SIZES = {"TILE": 16, "DEVICE_TILE": 128}


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SIZES.items():
        monkeypatch.setattr(memory, name, size)


def buckets(sizes: list[int]) -> tuple[Bucket, Bucket]:
    """Return a bucket of tensors of these sizes on the host, and one on an accelerator."""
    places = {}
    end = 0
    for size in sizes:
        places[f"tensor {len(places)}"] = Place(end, end + size, (size,), (0,))
        end += size
    on_host = Bucket(torch.device("cpu"), torch.float32, places, end)
    return on_host, replace(on_host, device=torch.device("cuda", 0))


def random_sizes(seed: int) -> list[int]:
    drawn = random.Random(seed)
    return drawn.choices([0, 1, 3, 7, 16, 17, 40, 64, 150, 700], k=30)


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("seed", range(2))
def test_tiles_of_the_accelerator_consist_of_tiles_of_the_host(seed: int) -> None:
    """On the host a tensor larger than a tile shares none."""
    host, accelerator = buckets(random_sizes(seed))
    assert set(accelerator.tile_edges) <= set(host.tile_edges)
    all_edges = host.tile_edges, accelerator.tile_edges
    for edges, most in zip(all_edges, SIZES.values(), strict=True):
        assert edges[0] == 0
        assert edges[-1] == host.size
        for begin, end in pairwise(edges):
            assert 0 < end - begin <= most
    for place in host.places.values():
        if place.end - place.begin > SIZES["TILE"]:
            assert {place.begin, place.end} <= set(host.tile_edges)


@pytest.mark.usefixtures("small_sizes")
def test_small_tensors_fill_a_tile_together() -> None:
    bucket, _ = buckets([4] * 12)
    assert bucket.tile_edges == [0, 16, 32, 48]


@pytest.mark.usefixtures("small_sizes")
def test_pinned_memory_is_hardly_larger_than_a_model_of_large_tensors() -> None:
    bucket, _ = buckets([150, 8] * 20)
    rounded = 0
    for begin, end in pairwise(bucket.device_edges):
        rounded += 2 ** (end - begin - 1).bit_length()
    assert rounded < 1.25 * bucket.size


def test_a_model_without_elements_has_no_tiles() -> None:
    (bucket,) = layout_of({"empty": torch.zeros(0)})
    assert bucket.tile_edges == bucket.device_edges == [0]

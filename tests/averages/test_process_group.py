"""EMAStats over two processes of gloo: the statistics and the gradients of one process with all rows."""

from __future__ import annotations

import forked
import pytest
import torch

from posthoc_cli.averages import EMAStats

ROWS = (5, 2)
"""Rows of each process; one process has other batches than the other."""

WORKER = """
import copy, io, sys, warnings
warnings.simplefilter("error", UserWarning)
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from posthoc_cli.averages import EMAStats

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
batches = torch.load(f"{folder}/batches-{rank}.pt", weights_only=True)

stats = EMAStats(3, 2, momentum=0.3, process_group=dist.group.WORLD).double()
for x, y in batches:
    stats(x, y)

twin = copy.deepcopy(stats)
assert twin.process_group is stats.process_group
for one in (stats, twin):
    with torch.no_grad():
        one(*batches[0])
for name, value in stats.state_dict().items():
    assert torch.equal(value, twin.state_dict()[name])

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.save(stats, io.BytesIO())
assert any("process_group" in str(warning.message) for warning in caught)

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 3, dtype=torch.float64)
        self.stats = EMAStats(3, 2, momentum=0.3, process_group=dist.group.WORLD).double()

    def forward(self, x, y):
        self.stats(self.layer(x), y)
        return self.stats.cov_xy.square().sum()

network = DistributedDataParallel(Network())
optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
for x, y in batches:
    optimizer.zero_grad()
    network(x, y).backward()
    optimizer.step()

torch.save({
    "state": stats.state_dict(),
    "trained": network.module.state_dict(),
}, f"{folder}/result-{rank}.pt")
dist.destroy_process_group()
"""


def all_batches() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """For each process, five batches."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[((rows, 3), (rows, 2)) for _ in range(5)] for rows in ROWS]
    return [
        [tuple(torch.randn(shape, generator=generator, dtype=torch.float64) + rank for shape in pair) for pair in pairs]
        for rank, pairs in enumerate(shapes)
    ]


pytestmark = pytest.mark.xdist_group("gloo")  # one group of processes for all that look at it


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    for rank, batches in enumerate(all_batches()):
        torch.save(batches, folder / f"batches-{rank}.pt")
    processes = [forked.Forked(WORKER, rank, folder) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(2)]


def whole_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    first, second = all_batches()
    return [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(first, second, strict=True)]


def test_every_process_has_the_statistics_of_all_rows(results: list[dict]) -> None:
    alone = EMAStats(3, 2, momentum=0.3).double()
    batches = whole_batches()
    for x, y in [*batches, batches[0]]:
        alone(x, y)
    for result in results:
        for name, value in alone.state_dict().items():
            # The same sums of 7 rows in another order.
            torch.testing.assert_close(result["state"][name], value, rtol=1e-13, atol=1e-13)
    for name, value in results[0]["state"].items():
        assert torch.equal(value, results[1]["state"][name])


def test_data_parallel_training_is_training_on_all_rows(results: list[dict]) -> None:
    """DistributedDataParallel takes the mean of what the processes found, and each found the loss of all rows."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)
    stats = EMAStats(3, 2, momentum=0.3).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    start = layer.weight.detach().clone()
    for x, y in whole_batches():
        stats(layer(x), y)
        optimizer.zero_grad()
        stats.cov_xy.square().sum().backward()
        optimizer.step()
    assert (layer.weight - start).abs().max() > 1e-3
    for result in results:
        torch.testing.assert_close(result["trained"]["layer.weight"], layer.weight.detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(result["trained"]["stats.cov_xy"], stats.cov_xy.detach(), rtol=1e-12, atol=1e-13)

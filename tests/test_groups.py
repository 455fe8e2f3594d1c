"""The groups of processes that other tests use are what they say."""

from pathlib import Path

import pytest
from groups import check_group


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 3), ("hsdp", 4), ("tp", 2), ("fsdp-tp", 4), ("ddp", 2)])
def test_values_are_those_of_one_process(kind: str, ranks: int, tmp_path: Path) -> None:
    check_group(
        """
import torch
from torch.distributed.tensor import DTensor
model = groups.spread(groups.Net(), arguments[0])
groups.move(model, 4)
for name, tensor in getattr(model, "module", model).named_parameters():
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    assert torch.equal(found, groups.value(name, 4, found)), name
""",
        ranks,
        tmp_path,
        kind,
    )

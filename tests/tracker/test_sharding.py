"""Who owns which chunk of a sharded model."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
from groups import Net, check_group

from posthoc_cli.snapshots.chunks import Box, cover_problem

MEET = """
import json
from posthoc_cli.tracker import sharding
model = groups.spread(groups.Net(), arguments[0])
bare = getattr(model, "module", model)
parts = {name: sharding.local_part(name, tensor) for name, tensor in bare.named_parameters()}
chunks = {name: chunk for name, (_, chunk) in parts.items()}
members = sharding.meet(chunks, {"options": arguments[1] if rank else "0.05"}, f"run of {rank}")
for name, (tensor, chunk) in parts.items():
    if chunk is not None and chunk.box.size:
        assert tuple(tensor.shape) == chunk.box.shape
owned = {name: chunks[name] and [chunks[name].box.offset, chunks[name].box.shape] for name in members.owned}
print(json.dumps([owned, members.part, members.parts, members.run_id]))
"""


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp", 3), ("hsdp", 4), ("tp", 2), ("fsdp-tp", 4), ("replicas", 2)])
def test_each_element_has_one_owner(kind: str, ranks: int, tmp_path: Path) -> None:
    found = [json.loads(out) for out in check_group(MEET, ranks, tmp_path, kind, "0.05")]
    owners = [rank for rank, (owned, *_) in enumerate(found) if owned]
    assert [part for _, part, _, _ in found] == [
        owners.index(rank) + 1 if rank in owners else None for rank in range(ranks)
    ]
    assert {(parts, run) for _, _, parts, run in found} == {(len(owners), "run of 0")}
    for name, parameter in Net().named_parameters():
        boxes = [
            Box.whole(parameter.shape) if place is None else Box(*map(tuple, place))
            for place in chain.from_iterable([owned[name]] for owned, *_ in found if name in owned)
        ]
        assert cover_problem(parameter.shape, boxes) is None

"""States that were damaged on their way: each is refused in one line, or harmless."""

import copy
import json
import random

import pytest
import torch
from tracker.runs import Training, track

from posthoc_cli import PostHocError

OTHER_VALUES = [
    None, -1, 0, 2.5, 1e300, 10**30, "", "x", True, [], [1], {}, {"a": 1}, float("nan"),
]  # fmt: skip
OTHER_TENSORS = [
    b"x",
    torch.zeros(0),
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(24, 8, device="meta"),
    torch.zeros(24, 8).to_sparse(),
    torch.zeros(24, 8, dtype=torch.complex64),
]


def paths(value, path=()):
    """Yield the keys that lead to each part of a nested value."""
    yield path
    parts = []
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for key, part in parts:
        yield from paths(part, (*path, key))


def change(root, others, draw):
    """Delete, rename or replace a part of a nested value; as many parts of each depth."""
    found = [path for path in paths(root) if path]
    depth = draw.choice(sorted({len(path) for path in found}))
    *above, key = draw.choice([path for path in found if len(path) == depth])
    for step in above:
        root = root[step]
    old = root[key]
    action = draw.choice(["delete", "rename", "scale", "replace", "replace"])
    if action == "delete":
        del root[key]
    elif action == "rename" and isinstance(root, dict):
        root[f"{key}x"] = root.pop(key)
    elif action == "scale" and isinstance(old, int | float):
        root[key] = draw.choice([old + 1, old * 1000, old / 3, -old, 2**62])
    elif action == "scale" and isinstance(old, str) and old:
        index = draw.randrange(len(old))
        root[key] = old[:index] + draw.choice("aZ0+,|") + old[index + 1 :]
    else:
        root[key] = draw.choice(others)


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_state_is_an_error_of_one_line_that_changes_nothing(tmp_path, seed):
    draw = random.Random(seed)
    training = Training()
    ema = track(training.model, tmp_path, checkpoint_every=100)
    training.run(15, ema)
    before = ema.state_dict()
    refusals = 0
    for _ in range(100):
        state = copy.deepcopy(before)
        if draw.random() < 0.5:
            info = json.loads(state["info"])
            change(info, OTHER_VALUES, draw)
            state["info"] = json.dumps(info)
        else:
            change(state, OTHER_VALUES + OTHER_TENSORS, draw)
        try:
            ema.load_state_dict(state)
        except PostHocError as error:
            refusals += 1
            assert len(str(error).splitlines()) == 1
            assert ema.step == 15
        else:  # another number, or one that has a default
            ema.update_(training.model)
            ema.state_dict(0.28)
            ema.load_state_dict(before)
    assert refusals > 50
    training.run(20, ema)
    assert training.error(ema, range(1, 21)) < 1e-6

"""`scripts/gpu.py` measures every row on the simulated accelerator; its times say nothing."""

import math

import gpu
import torch
from accelerator import simulator

core = simulator.load()


def test_every_row_of_the_table_is_measured(monkeypatch):
    monkeypatch.setattr(gpu, "BUSY_CYCLES", 1_000_000)
    rows = [*gpu.measure(torch.device("sim:0"), 30_000, 3, repeats=1, until=math.inf)]
    labels = [row.label for row in rows]
    assert len({*labels}) == len(labels)
    assert "one average of 20 snapshots, made on sim:0" in labels
    for row in rows:
        assert row.host > 0
        if "update" in row.label:
            assert row.stream > 0
    assert core.races() == []

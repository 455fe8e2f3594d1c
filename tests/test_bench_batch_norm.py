"""The measurement of BatchNorm statistics that the README quotes: it runs, and shows what it is there to show."""

from __future__ import annotations

import bench_batch_norm
import pytest


def test_measured_statistics_are_better_than_copied_ones_for_long_averages(capsys: pytest.CaptureFixture[str]) -> None:
    bench_batch_norm.main(["--seeds", "1", "--steps", "60"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.")]
    assert len(rows) == 12
    losses = {(row[0].strip(), row[1].strip()): (float(row[2]), float(row[3])) for row in rows}
    copied, measured = losses["0.1", "sigma_rel 0.25"]
    assert measured < copied

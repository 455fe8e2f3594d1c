"""The benchmark of the averages: it runs, and judges nothing by times that a neighbour has made."""

from __future__ import annotations

import re

import bench_averages
import pytest
import quiet_timing


@pytest.mark.parametrize(("busy", "verdicts"), [(False, ("met", "MISSED")), (True, ("NOT JUDGED",))])
def test_the_benchmark_runs(
    busy: bool, verdicts: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(quiet_timing, "PATIENCE", 0.0)
    monkeypatch.setattr(quiet_timing, "_busy", lambda: 1000.0 * next(ticks) if busy else 0.0)
    bench_averages.main(["--quick"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^  (?:ExponentialMovingAverage|ShadowModel|swa_utils\S+) +\d+\.\d\d ms", out, re.M)) == 9
    (verdict,) = re.findall(r"^Goal: ([A-Za-z ]+):", out, re.M)
    assert verdict in verdicts

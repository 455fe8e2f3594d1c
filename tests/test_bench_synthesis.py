"""The benchmark of synthesis: it runs, and it decides nothing by times that a neighbour has made."""

from __future__ import annotations

import bench_synthesis
import pytest
import quiet_timing
from bench_report import Report
from quiet_timing import Seconds, take_turns


def test_the_benchmark_runs_and_judges_every_goal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet_timing, "PATIENCE", 0.0)
    bench_synthesis.main(["--quick"])
    out = capsys.readouterr().out
    assert "accelerators: not run" in out
    goals = out.split("Goals:\n")[1].splitlines()
    assert len(goals) == 8
    assert all(line.split()[0] in ("met", "MISSED", "NOT") for line in goals)


@pytest.mark.parametrize(("contended", "verdict"), [(0, "met"), (2, "met"), (3, "NOT JUDGED"), (None, "NOT JUDGED")])
def test_a_goal_is_not_judged_by_runs_beside_busy_neighbours(contended: int | None, verdict: str) -> None:
    report = Report(5)
    times = [Seconds((1.0,) * 5, 0), Seconds((20.0,) * 5, contended)]
    report.goal("times faster", 20.0, 10, times, at_least=True)
    assert report.goals[0].strip().startswith(verdict)


def test_another_process_is_told_from_ones_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([0.0, 0.0, 100.0, 200.0])
    monkeypatch.setattr(quiet_timing, "PATIENCE", 0.0)
    monkeypatch.setattr(quiet_timing, "_busy", lambda: next(busy))
    (found,) = take_turns([lambda: None], 2)
    assert found.contended == 1


def test_runs_that_are_compared_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_timing, "PATIENCE", 0.0)
    order: list[str] = []
    take_turns([lambda: order.append("ours"), lambda: order.append("theirs")], 3)
    assert order == ["ours", "theirs"] * 3

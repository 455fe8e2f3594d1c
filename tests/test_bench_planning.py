"""The benchmark of planning: it runs each command, quiet and busy, and judges every goal."""

from __future__ import annotations

from collections.abc import Sequence

import bench_planning
import pytest
import quiet_timing
from typer.testing import CliRunner

from posthoc_cli.cli import app


def test_the_benchmark_runs_and_judges_every_goal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def run(words: Sequence[str]) -> None:
        """In this process: importing takes seconds."""
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, result.output
        done.append(words[0])

    monkeypatch.setattr(quiet_timing, "PATIENCE", 0.0)
    monkeypatch.setattr(bench_planning, "run", run)
    bench_planning.main(["--quick"])
    goals = capsys.readouterr().out.split("Goals:\n")[1].splitlines()
    assert done == ["plan", "prune"] * 2
    assert [line.split(", ")[-1].split(":")[0] for line in goals] == ["quiet"] * 2 + ["busy"] * 2
    assert all(line.split()[0] in ("met", "MISSED") for line in goals[2:])

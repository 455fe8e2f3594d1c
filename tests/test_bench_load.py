"""The benchmark of load: its jobs run, in small, and say what is there."""

from __future__ import annotations

from pathlib import Path

import bench_load
import pytest

from posthoc_cli.snapshots.directory import read_directory


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]


@pytest.mark.parametrize(("job", "kept"), [("thinned", 40), ("kept", 60), ("layers", 60)])
def test_a_training_tells_memory_and_open_files_on_the_way(
    job: str, kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_load.main(["--job", job, "300", str(tmp_path / "run")])
    found = rows(capsys.readouterr().out)
    assert [row[:2] for row in found] == [["3", "0"], ["30", "6"], ["150", "30"], ["300", str(kept)]]
    assert len({row[3] for row in found}) == 1


def test_every_step_with_many_tensors_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_load.main(["--job", "tensors", "20", str(tmp_path / "run")])
    assert len(rows(capsys.readouterr().out)) == 10


def test_a_command_is_timed_also_without_measurements(tmp_path: Path) -> None:
    bench_load.train(30, tmp_path / "run", None)
    bench_load.without_measurements(tmp_path / "run", tmp_path / "plain")
    assert all(snapshot.info.measurements is None for snapshot in read_directory(tmp_path / "plain"))
    seconds, memory = bench_load.command(["info", "DIR"], tmp_path / "plain", 1)
    assert seconds.endswith(" s")
    assert float(memory.removesuffix(" MB")) > 10


def test_the_choice_is_compared_with_all_and_with_even_spacing(capsys: pytest.CaptureFixture[str]) -> None:
    bench_load.compare_choices(40)
    found = rows(capsys.readouterr().out)[3:]
    assert [row[0].partition(",")[0] for row in found] == ["all", *["20 of them"] * 2, *["4 of them"] * 2] * 2
    assert float(found[1][1].removeprefix("x ")) <= float(found[2][1].removeprefix("x "))

"""`ema prune`: shows, asks, and only then deletes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ema_command import Asked, Ema
from factories import contents


def snapshots(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("*.safetensors")}


def test_it_shows_what_goes_and_deletes_it(ema: Ema, run: Path) -> None:
    result = ema("prune", run, "--keep", "5", "--yes")
    assert result.code == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[0].split() == ["would", "go", "t", "sigma_rel", "size"]
    assert lines[-1].startswith("deleted 30 snapshots, ")
    shown = {line.split()[0] for line in lines if ".safetensors" in line}
    assert len(shown) == 30
    left = snapshots(run)
    assert len(left) == 10
    assert not shown & set(left)


def test_json_says_what_it_did(ema: Ema, run: Path) -> None:
    everything = set(snapshots(run))
    report = ema("prune", run, "--max-error", "30%", "--yes", "--json").json
    assert report["deleted"] is True
    assert report["before"]["worst_error"] <= report["after"]["worst_error"] <= 0.3
    left = snapshots(run)
    assert set(report["kept"]) == set(left) == everything - {gone["file"] for gone in report["gone"]}
    assert report["bytes"] == sum(map(len, left.values()))
    enough = ema("prune", run, "--max-size", "1GB", "--yes")
    assert enough.code == 0
    assert enough.out.splitlines()[-1] == "nothing has to be deleted"


@pytest.mark.parametrize("wish", [("--keep", "5"), ("--max-size", "100kB"), ("--max-error", "0.5")])
def test_a_dry_run_deletes_nothing(ema: Ema, run: Path, wish: tuple[str, str]) -> None:
    before = contents(run)
    result = ema("prune", run, *wish, "--dry-run")
    assert result.code == 0
    assert "nothing was deleted" in result.out.splitlines()[-1]
    report = ema("prune", run, *wish, "--dry-run", "--json").json
    assert report["deleted"] is False
    assert report["gone"]
    assert contents(run) == before


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, 40), ("y", 0, 10), ("", 130, 40)])
def test_it_asks(ema: Ema, run: Path, asked: Asked, answer: str, code: int, left: int) -> None:
    questions = asked(answer, run)
    result = ema("prune", run, "--keep", "5")
    assert (result.code, questions, len(snapshots(run))) == (code, ["delete 30 snapshots for good?"], left)
    assert answer != "n" or result.out.splitlines()[-1] == "nothing was deleted"

"""`ema verify` and `ema prune`: their reports, and the questions that they ask before they change files."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from ema_command import Ema
from factories import OTHER_RUN_ID, contents, flip_bit, forge, rewrite_snapshot, snapshot_files

from posthoc_cli.snapshots.directory import DirectoryLock


def test_a_run_that_is_intact(ema: Ema, run: Path) -> None:
    before = contents(run)
    result = ema("verify", run)
    assert (result.code, result.err) == (0, "")
    first, empty, last = result.out.splitlines()
    assert (first, empty) == ("40 files with nothing wrong; --json lists them", "")
    assert last.startswith("40 files, ")
    assert last.endswith(" s: all intact")
    assert contents(run) == before
    for path in snapshot_files(run)[10:]:
        path.unlink()
    header, *lines = ema("verify", run).out.split("\n\n")[0].splitlines()
    assert (header.split(), len(lines)) == (["file", "what", "state"], 10)
    assert {line.split()[-1] for line in lines} == {"intact"}


def test_of_many_files_only_broken_ones_have_a_line_and_the_report_has_all(ema: Ema, run: Path) -> None:
    flip_bit(snapshot_files(run)[3])
    (run / ".ema-0123.tmp").write_text("half")
    lines = ema("verify", run).out.splitlines()
    assert lines[0] == "39 files with nothing wrong; --json lists them"
    wrong = r"0000000000000200-0.28.safetensors: snapshot sigma_rel 0.28 at t = 200: damaged: .* does not match"
    assert re.fullmatch(wrong, lines[1])
    assert lines[2] == ".ema-0123.tmp: left by an interrupted write, or by one in progress"
    assert len(lines) < 9
    result = ema("verify", run, "--json")
    assert (result.code, result.err) == (1, "")
    report = result.json
    (file,) = (file for file in report["files"] if file["state"] != "intact")
    assert file.keys() == {"path", "what", "state", "detail", "bytes"}
    assert (file["path"], file["state"]) == (snapshot_files(run)[3].name, "damaged")
    assert report["leftovers"] == [".ema-0123.tmp"]
    assert report["bytes"] == sum(file["bytes"] for file in report["files"])
    assert report["seconds"] > 0


def test_contradictions_and_files_of_a_later_release_are_reported(ema: Ema, run: Path) -> None:
    files = snapshot_files(run)
    rewrite_snapshot(files[3], run_id=OTHER_RUN_ID)
    result = ema("verify", run)
    assert result.code == 1
    assert re.search(rf"^problem: .*{files[3].name}: are of different runs", result.out, re.MULTILINE)
    assert ema("info", run).code == 1
    forge(files[3], {"kind": '"future"'})
    assert "unreadable: this release does not know 'future' of format 3" in ema("verify", run).out


def test_nothing_is_changed_while_a_tracker_writes(ema: Ema, run: Path) -> None:
    flip_bit(snapshot_files(run)[2])
    before = {name: data for name, data in contents(run).items() if "lock" not in name}
    with DirectoryLock(run):
        assert "is writing here" in ema("prune", run, "--keep", "5", "--yes").error
        assert ema("verify", run).code == 1
        assert ema("prune", run, "--keep", "5", "--dry-run").code == 0
    assert {name: data for name, data in contents(run).items() if "lock" not in name} == before


def test_json_says_what_was_deleted(ema: Ema, run: Path) -> None:
    everything, before = {path.name for path in snapshot_files(run)}, contents(run)
    dry = ema("prune", run, "--max-error", "30%", "--dry-run", "--json").json
    assert (dry["deleted"], bool(dry["gone"]), contents(run) == before) == (False, True, True)
    report = ema("prune", run, "--max-error", "30%", "--yes", "--json").json
    assert report["deleted"] is True
    assert report["before"]["worst_error"] <= report["after"]["worst_error"] <= 0.3
    left = {path.name: path.stat().st_size for path in snapshot_files(run)}
    assert set(report["kept"]) == set(left) == everything - {gone["file"] for gone in report["gone"]}
    assert report["bytes"] == sum(left.values())
    enough = ema("prune", run, "--max-size", "1GB", "--yes")
    assert enough.code == 0
    assert enough.out.splitlines()[-1] == "nothing has to be deleted"


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 1, 40), ("y\n", 0, 10), ("", 130, 40)])
def test_pruning_asks(ema: Ema, run: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            DirectoryLock(run).release()  # the directory is not locked while the question is open
            return answer

    monkeypatch.setattr(sys, "stdin", Terminal())
    result = ema("prune", run, "--keep", "5")
    assert (result.code, len(snapshot_files(run))) == (code, left)
    assert (result.out + result.err).count("delete 30 snapshots for good?") == 1
    assert code != 1 or result.out.endswith("nothing was deleted\n")

"""The reports of commands, as text and as JSON, and the tables that they print."""

import fcntl
import io
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, heavy
from factories import OTHER_RUN_ID, contents, flip_bit, forge, rewrite_snapshot, snapshot_files
from numpy.testing import assert_allclose
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA
from posthoc_cli.cli.output import print_rows
from posthoc_cli.snapshots.directory import DirectoryLock


def has_line(pattern, text):
    """Return whether a line begins with a pattern."""
    return re.search(f"^{pattern}", text, re.MULTILINE) is not None


def size_of(files):
    return sum(path.stat().st_size for path in files)


# --- the command `ema info`


def test_info_of_a_directory(typed, run):
    (run / ".ema-0123.tmp").write_text("")
    result = typed("info run")
    assert result.code == 0
    assert has_line("run +[0-9a-f]{32}$", result.out)
    assert has_line(r" *0\.28 +decay 0\.9989 +20 +100 +2,000 +0\.0\d+ % to 0\.0\d+ % ", result.out)
    assert has_line("measured +40 of them, from which errors are predicted", result.out)
    assert has_line("schedule +update_every .*, checkpoint_dtype float16$", result.out)
    report = typed("info run --json").json
    assert report["bytes"] == size_of(snapshot_files(run))
    assert report["leftovers"] == [".ema-0123.tmp"]
    low, high = report["profiles"][0]["relative_rounding_range"]
    assert 2**-13 < low <= high < 2**-11


def test_info_of_a_snapshot(typed):
    line = "info run/0000000000002000-0.28.safetensors"
    facts = {"kind": "snapshot", "sigma_rel": 0.28, "t": 2000, "t_first": 10}
    assert typed(f"{line} --json").json.items() >= facts.items()
    text = typed(line).out
    assert has_line(r"measurements +norm [\d.]+, relative_rounding 0\.0\d+ %$", text)


def test_info_of_an_output_lists_the_largest_coefficients(typed):
    typed("synthesize run --sigma-rel 0.15 --out m.safetensors")
    text = typed("info m.safetensors").out
    assert has_line(r"predicted error +0\.\d+ %$", text)
    assert "and 30 more rows with smaller coefficients; --json lists them" in text
    rows = re.findall(r"^\S+\.safetensors +[+-](\d\.\d{6})$", text, re.MULTILINE)
    snapshots = typed("info m.safetensors --json").json["snapshots"]
    sizes = sorted(abs(snapshot["coefficient"]) for snapshot in snapshots)
    assert sorted(map(float, rows)) == pytest.approx(sizes[-10:], abs=1e-6)


def test_info_of_a_folder_of_outputs_and_of_shards(typed):
    typed("synthesize run --sigma-rel 0.1,0.15 --out all")
    report = typed("info all --json").json
    assert report["kind"] == "outputs"
    profiles = [output["profile"] for output in report["outputs"]]
    assert profiles == ["sigma_rel 0.1", "sigma_rel 0.15"]
    text = typed("info all").out
    assert has_line(r"sigma_rel-0\.1\.safetensors +sigma_rel 0\.1 +2,000 +0\.0\d+ % ", text)
    typed("export all/sigma_rel-0.15.safetensors --max-shard-size 50 --out shards")
    shards = [*Path("shards").glob("*.safetensors")]
    assert len(shards) > 1
    for path in ("shards", "shards/model.safetensors.index.json"):
        report = typed(f"info {path} --json").json
        assert report["profile"] == "sigma_rel 0.15"
        assert report["shards"] == len(shards)
        assert report["bytes"] == size_of(shards)


# --- tables


def test_tables_are_aligned(capsys):
    """Texts to the left and numbers to the right, by their width on a terminal, and control
    characters escaped."""
    rows = [
        {"file": "名\x1b", "bytes": 0, "predicted_error": 0.0},
        {"file": "長い名前です", "bytes": 999, "predicted_error": 1e-8},
        {"file": "a", "bytes": 2.5e6, "predicted_error": 2e-7},
        {"file": "b", "bytes": 4e12, "predicted_error": 12.0},
        {"file": "", "predicted_error": None},
    ]
    print_rows(rows, ["file", "size:bytes", "predicted_error"])
    assert capsys.readouterr().out.splitlines() == [
        "file            size  predicted error",
        "名\\x1b           0 B              0 %",
        "長い名前です   999 B         < 1e-5 %",
        "a             2.5 MB          2e-05 %",
        "b               4 TB        > 1,000 %",
        "                              unknown",
    ]


# --- the command `ema synthesize`


def test_one_average_into_one_file(typed, run):
    result = typed("synthesize run --sigma-rel 0.15 --out m.safetensors")
    last = result.out.splitlines()[-1]
    made = r"made sigma_rel 0\.15 \(as decay 0\.\d+\) at t = 2,000 from 40 snapshots"
    errors = r"predicted error 0\.\d+ %, lost gain at most about 0\.\d+ %"
    assert re.fullmatch(rf"{made}, {errors}, 128 B, in .*: m.safetensors", last)
    found = load_file("m.safetensors")
    assert_same_tensors(found, PostHocEMA.from_path(run).state_dict(sigma_rel=0.15))
    assert found["2.weight"].dtype == torch.float16
    assert found["1.num_batches_tracked"].dtype == torch.int64


def test_an_output_that_lacks_tensors_is_completed_by_a_copy_of_a_model(typed):
    made = typed("synthesize run --sigma-rel 0.15 --out m.pt")
    (note,) = [line for line in made.err.splitlines() if "2.bias" in line]
    assert "1 tensor (2.bias)" in note
    full = torch.load("m.pt") | {"2.bias": torch.ones(2).half()}
    torch.save(full, "FULL.pt")
    typed("synthesize run --sigma-rel 0.15 --like FULL.pt --out complete.pt")
    assert_same_tensors(torch.load("complete.pt"), full)


def test_an_average_is_named_by_its_length_as_a_decay_too(typed):
    made = typed("synthesize run --sigma-rel 0.1 --dry-run").out
    assert "would make sigma_rel 0.1 (as decay 0.9955) at t = 2,000" in made
    made = typed("synthesize run --decay 0.99,0.999 --out decays --json").json["targets"]
    assert [target["target"] for target in made] == ["decay 0.99", "decay 0.999"]
    assert made[0]["as"] == "sigma_rel 0.0473"
    assert Path("decays/decay-0.99.safetensors").is_file()


@pytest.fixture
def damaged(run):
    """A run in which each file of tensors is damaged: its headers alone can be read."""
    for path in snapshot_files(run):
        flip_bit(path)
    return run


@pytest.mark.parametrize("when", ["--t", "--step"])
def test_a_dry_run_reads_headers_only_and_writes_nothing(typed, damaged, when):
    before = contents(damaged.parent)
    line = f"synthesize run --sigma-rel 0.15 --dry-run {when} 1000"
    assert "nothing was written" in typed(line).out
    (target,) = typed(f"{line} --json").json["targets"]
    assert target["t"] == 1000
    assert target["output"] is None
    files = [snapshot["file"] for snapshot in target["snapshots"]]
    assert max(files) < "0000000000001001"
    assert contents(damaged.parent) == before


def test_an_average_with_too_large_an_error_is_not_made_and_no_tensor_is_read(typed, damaged):
    result = typed("synthesize run --sigma-rel 0.15,0.03 --out averages --max-error '0.01 %'")
    assert result.code == 1
    assert result.out == ""
    assert re.match(r"sigma_rel 0\.(03|15): the predicted error is .*0\.01 %", result.error)
    assert not Path("averages").exists()


@pytest.fixture
def single(run):
    """A run of one snapshot, which has no sketch."""
    first, *others = snapshot_files(run)
    for path in others:
        path.unlink()
    rewrite_snapshot(first, sketch="")


@pytest.mark.usefixtures("single")
def test_no_error_is_predicted_from_one_snapshot_without_a_sketch(typed):
    line = "synthesize run --sigma-rel 0.051 --out m.safetensors"
    assert "cannot be predicted" in typed(f"{line} --max-error 0.5").error
    assert not Path("m.safetensors").exists()
    errors = "predicted error unknown, lost gain unknown"
    assert has_line(f"made .* from 1 snapshot, {errors}, ", typed(line).out)
    (target,) = typed(f"{line} --overwrite --json").json["targets"]
    assert target["predicted_error"] is None
    assert target["lost_gain"] is None


# --- `ema synthesize --method paper`


def gamma_of(sigma_rel):
    """Solve sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3)) for its largest root."""
    square = sigma_rel**2
    cubic = np.array([1, 7, 16, 12]) - np.array([0, 0, 1, 1]) / square
    return max(np.roots(cubic).real)


def inner_product(first, second):
    """The inner product of the profiles of two averages, each a pair of t and gamma: equation 151
    of the method's authors."""
    (s, g), (t, h) = sorted((first, second))
    return (g + 1) * (h + 1) / (g + h + 1) * (s / t) ** h / t


def test_the_published_method_has_the_published_coefficients(typed):
    line = "synthesize run --sigma-rel 0.15 --method paper"
    (target,) = typed(f"{line} --dry-run --json").json["targets"]
    assert target["method"] == "paper"
    profiles = []
    for snapshot in target["snapshots"]:
        t, sigma_rel = snapshot["file"].removesuffix(".safetensors").split("-")
        profiles.append((float(t), gamma_of(float(sigma_rel))))
    assert len(profiles) == 40
    wanted = (2000.0, gamma_of(0.15))
    matrix = [[inner_product(a, b) for b in profiles] for a in profiles]
    solution = np.linalg.solve(matrix, [inner_product(a, wanted) for a in profiles])
    found = [snapshot["coefficient"] for snapshot in target["snapshots"]]
    assert_allclose(found, solution / solution.sum(), atol=1e-8)
    made = typed(f"{line} --out paper.safetensors")
    assert f"profile error {100 * target['profile_error']:.2g} %" in made.out
    assert typed("info paper.safetensors --json").json["method"] == "paper"


# --- `ema error-plot`: the picture and the numbers


@pytest.mark.usefixtures("single")
def test_the_picture_of_one_snapshot_assumes_even_motion(typed):
    (curve,) = typed("error-plot run --sigma-range 0.05:0.28 --json").json["curves"]
    assert curve["label"] == "run: 1 snapshot up to 100 steps, if the network moves evenly"


def test_the_picture_of_a_directory(typed):
    result = typed("error-plot run --out error.png --method paper --target window:1")
    assert result.err == ""
    assert Path("error.png").read_bytes().startswith(b"\x89PNG")
    first, *lines = result.out.splitlines()
    assert first == "run: 40 snapshots up to 2,000 steps"
    assert re.fullmatch(r"  lost gain  below 5 % for sigma_rel 0\.\d+ to 0\.\d+", lines[0])
    assert lines[1].split() == ["tracked", "0.05,", "0.28"]
    assert has_line(r" +window:1 +0\.000144 ", result.out)
    assert "profile error" in result.out


def test_the_picture_of_a_training_to_come(typed):
    result = typed("error-plot --steps 4K --every 100 --keep 8 --out e.png")
    assert result.out.splitlines()[0].startswith(
        "snapshots at 8 times of 4,000 steps, one every 100, if"
    )
    assert Path("e.png").exists()
    without = typed("error-plot run")
    assert "lost gain  below 5 %" in without.out
    assert "--out errors.png draws the curve" in without.err
    assert typed("error-plot run --steps 4K --json").code == 2
    assert typed("error-plot --json").code == 2


def test_the_picture_and_a_warning_name_the_same_range(typed):
    typed("error-plot run --out e.svg")
    (shown,) = set(re.findall(r"below 5 % for sigma_rel (.*?) -->", Path("e.svg").read_text()))
    # rounding to the model's dtypes is no part of the errors of a picture
    made = typed("synthesize run --sigma-rel 0.01 --dtype float64 --dry-run")
    assert made.err.rstrip().endswith(
        f" % of what averaging gains; below 5 % for sigma_rel {shown}"
    )


# --- `ema verify` and `ema prune`: their reports, and the questions that they ask before they
# change files


def test_verify_reports_an_intact_run_in_one_line(typed, monkeypatch):
    """A log has no progress bar, also with forced color."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = typed("verify run")
    assert result.err == ""
    assert result.code == 0
    first, empty, last = result.out.splitlines()
    assert first == "40 files with nothing wrong; --json lists them"
    assert empty == ""
    assert re.fullmatch(r"40 files, .* s: all intact", last)


def test_of_many_files_only_broken_ones_have_a_line_and_the_report_has_all(typed, run):
    flip_bit(snapshot_files(run)[3])
    (run / ".ema-0123.tmp").write_text("half")
    intact, damaged, leftover, *_ = typed("verify run").out.splitlines()
    assert intact == "39 files with nothing wrong; --json lists them"
    name = "0000000000000200-0.28.safetensors"
    what = "snapshot sigma_rel 0.28 at t = 200"
    assert re.fullmatch(f"{name}: {what}: damaged: .* does not match", damaged)
    assert leftover == ".ema-0123.tmp: left by an interrupted write, or by one in progress"
    result = typed("verify run --json")
    assert result.err == ""
    assert result.code == 1
    files = result.json["files"]
    assert [file["path"] for file in files if file["state"] != "intact"] == [name]
    assert result.json["bytes"] == sum(file["bytes"] for file in files)


def test_contradictions_and_files_of_a_later_release_are_reported(typed, run):
    first, second, *_ = snapshot_files(run)
    rewrite_snapshot(first, run_id=OTHER_RUN_ID)
    forge(second, {"kind": '"future"'})
    found = typed("verify run").out
    assert has_line("problem: .* differ in 'run_id'", found)
    assert "unreadable: " in found
    assert "'future' of format 4" in found


def test_nothing_is_pruned_while_a_tracker_writes(typed, run):
    with DirectoryLock(run):
        assert typed("prune run --keep 5 --yes").error.startswith("run: ")
        assert typed("prune run --keep 5 --dry-run").code == 0
    assert len(snapshot_files(run)) == 40


def test_json_says_what_was_deleted(typed, run):
    before = {path.name for path in snapshot_files(run)}
    line = "prune run --keep 5 --json"
    assert typed(f"{line} --dry-run").json["deleted"] is False
    assert {path.name for path in snapshot_files(run)} == before
    report = typed(f"{line} --yes").json
    left = {path.name for path in snapshot_files(run)}
    assert {snapshot["file"] for snapshot in report["gone"]} == before - left != set()
    assert {*report["kept"]} == left
    assert report["bytes"] == size_of(snapshot_files(run))


def test_nothing_has_to_be_deleted(typed):
    enough = typed("prune run --keep 100 --yes")
    assert enough.code == 0
    assert enough.out.splitlines()[-1] == "nothing has to be deleted"


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [
        ("n\n", 1, 40),
        ("y\n", 0, 10),
        ("", 130, 40),
    ],
)
def test_pruning_asks(typed, run, monkeypatch, answer, code, left):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def readline(self, *_):
            # the directory is not locked while the question is open
            with (run / ".ema.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return answer

    monkeypatch.setattr(sys, "stdin", Terminal())
    result = typed("prune run --keep 5")
    assert result.code == code
    assert len(snapshot_files(run)) == left
    assert result.err.count("delete 30 snapshots for good?") == 1
    assert result.out.endswith("nothing was deleted\n") == (code == 1)


# --- what goes wrong


def without_memory_of_torch():
    torch.empty(2**60, dtype=torch.uint8)


NO_MEMORY = "not enough memory is free"
NO_THREAD = "the system starts no more threads: a limit of processes or of memory is reached"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (MemoryError, NO_MEMORY),
        (without_memory_of_torch, NO_MEMORY),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), NO_MEMORY),
        (RuntimeError("can't start new thread"), NO_THREAD),
    ],
)
def test_a_lack_of_memory_or_of_threads_is_named(typed, monkeypatch, fault, message):
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=fault))
    result = typed("verify run")
    assert result.code == 1
    assert result.error == message


@heavy
def test_messages_that_cannot_be_printed_change_no_exit_code():
    command = [sys.executable, *shlex.split("-m posthoc_cli demo --steps none")]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stderr=full, check=False)
    assert done.returncode == 2

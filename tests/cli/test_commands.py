"""`ema info`, `export` and `profile`, and the tables that commands print."""

import fcntl
import io
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import matplotlib.image
import pytest
import torch
from checking import assert_same_tensors
from ema_command import Ema
from factories import OTHER_RUN_ID, contents, flip_bit, forge, rewrite_snapshot, snapshot_files
from safetensors.torch import load_file, save_file
from tracker.runs import track, update

from posthoc_cli import PostHocEMA
from posthoc_cli.cli.output import print_pairs, print_rows


def has_line(pattern: str, text: str) -> bool:
    """Return whether a line begins with a pattern."""
    return re.search(f"^{pattern}", text, re.MULTILINE) is not None


def size_of(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def test_info_of_a_directory(ema: Ema, run: Path) -> None:
    (run / ".ema-0123.tmp").write_text("")
    (run / "superseded").mkdir()
    (run / "superseded" / "x.safetensors").write_text("")
    result = ema("info", run)
    assert result.err == ""
    assert result.code == 0
    assert has_line("run +[0-9a-f]{32}$", result.out)
    assert has_line(r" *0\.28 +20 +100 +2,000 +0\.0\d+ % to 0\.0\d+ % ", result.out)
    assert has_line("measured +40 of them, from which", result.out)
    assert has_line("schedule +update_every .*, checkpoint_dtype float16$", result.out)
    report = ema("info", run, "--json").json
    assert report["run"] == PostHocEMA.from_path(run).run_id
    assert report["bytes"] == size_of(snapshot_files(run))
    assert report["problems"] == []
    assert report["leftovers"] == [".ema-0123.tmp"]
    assert report["superseded"] == 1
    low, high = report["profiles"][0]["relative_rounding_range"]
    assert 2**-13 < low <= high < 2**-11


def test_info_of_a_snapshot_and_of_another_programs_file(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    snapshot = snapshot_files(run)[-1]
    report = ema("info", snapshot, "--json").json
    facts = {"kind": "snapshot", "sigma_rel": 0.28, "t": 2000, "t_first": 10}
    assert report.items() >= facts.items()
    measured = report["measurements"]
    assert measured["relative_rounding"] == pytest.approx(2**-11, rel=0.7)
    tensors = load_file(snapshot)
    averages = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight")
    squares = []
    for name in averages:
        square = tensors[name].double().square()
        squares.append(float(square.sum()))
    assert measured["norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-3)
    text = ema("info", snapshot).out
    assert has_line(r"measurements +norm [\d.]+, relative_rounding 0\.0\d+ %$", text)
    save_file({"w": torch.zeros(3, 2)}, tmp_path / "a.safetensors")
    report = ema("info", tmp_path / "a.safetensors", "--json").json
    assert report["kind"] == "safetensors"
    assert report["parameters"] == 6


def test_info_of_an_output(ema: Ema, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
    report = ema("info", out, "--json").json
    text = ema("info", out).out
    assert has_line(r"predicted error +0\.\d+ %$", text)
    assert has_line(r"sigma_rel +0\.15$", text)
    lines = text.replace(str(out), "").splitlines()
    assert max(map(len, lines)) <= 80
    rows = re.findall(r"^\S+\.safetensors +[+-](\d\.\d{6})$", text, re.MULTILINE)
    sizes = sorted(abs(snapshot["coefficient"]) for snapshot in report["snapshots"])
    assert sorted(map(float, rows)) == pytest.approx(sizes[-10:], abs=1e-6)
    assert "and 30 more with smaller coefficients; --json lists them" in lines
    assert "profile error" not in text
    ema("synthesize", run, "--target", "beta:0.99", "--out", out, "--overwrite")
    report = ema("info", out, "--json").json
    facts = {"profile": "beta:0.99", "sigma_rel": None, "gamma": None}
    assert report.items() >= facts.items()
    assert not has_line("sigma_rel", ema("info", out).out)


def test_info_of_shards_of_their_index_and_of_a_folder_of_outputs(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    averages = tmp_path / "averages"
    sharded = tmp_path / "shards"
    words = ("synthesize", run, "--sigma-rel", "0.1,0.15,0.2", "--out")
    assert ema(*words, averages).code == 0
    assert ema(*words, sharded, "--layout", "sharded", "--max-shard-size", "50").code == 0
    single = ema("info", averages / "sigma_rel-0.15.safetensors", "--json").json
    folder = sharded / "sigma_rel-0.15"
    shards = [*folder.glob("*.safetensors")]
    assert len(shards) > 1
    expected = single | {"shards": len(shards), "bytes": size_of(shards)}
    for path in (folder, folder / "model.safetensors.index.json"):
        assert ema("info", path, "--json").json == expected | {"path": str(path)}
        assert has_line(r"profile +sigma_rel 0\.15$", ema("info", path).out)
    for container in (averages, sharded):
        report = ema("info", container, "--json").json
        assert report["kind"] == "outputs"
        profiles = [output["profile"] for output in report["outputs"]]
        assert profiles == ["sigma_rel 0.1", "sigma_rel 0.15", "sigma_rel 0.2"]
        text = ema("info", container).out
        rows = re.findall(r"^sigma_rel-\S+ +sigma_rel 0\.\d+ +2,000 +0\.0\d+ % ", text, re.M)
        assert len(rows) == 3


def test_the_command_that_completes_an_output_works(ema: Ema, run: Path, tmp_path: Path) -> None:
    made = ema("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "m.pt")
    (note,) = [line for line in made.err.splitlines() if "the output lacks" in line]
    assert "(2.bias)" in note
    advice = "from a full model: make m.safetensors instead of m.pt, then: "
    _, _, command = note.partition(advice)
    ema("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "m.safetensors")
    full = load_file(tmp_path / "m.safetensors")
    full["2.bias"] = torch.ones(2).half()
    save_file(full, tmp_path / "FULL.safetensors")
    command = re.sub(r"\b(FULL|NEW)\b", rf"{tmp_path}/\1", command)
    _, *words = shlex.split(command)
    assert "wrote 9 tensors, 1 of them from" in ema(*words).out
    assert_same_tensors(load_file(tmp_path / "NEW.safetensors"), full)


def test_the_profiles_table_and_the_conversion_in_both_directions(ema: Ema) -> None:
    header, *lines = ema("profile").out.splitlines()
    assert header.split() == ["sigma_rel", "gamma", "mean_age", "std", "beta"]
    widths = [line.split()[0] for line in lines[:8]]
    assert widths == ["0.001", "0.01", "0.03", "0.05", "0.1", "0.15", "0.2", "0.27"]

    def row(*words: object) -> dict[str, float]:
        report = ema("profile", *words, "--steps", "100000", "--json").json
        (only,) = report["profiles"]
        return only

    half_life = row("--target", "half-life:5000")
    assert half_life["beta"] ** 5000 == pytest.approx(0.5, rel=1e-9)
    width = row("--target", "beta:0.9999")["sigma_rel"]
    assert row("--sigma-rel", width)["beta"] == pytest.approx(0.9999, rel=1e-12)
    wrong = ema("profile", "--target", "beta:0.99", "--steps", "0")
    assert wrong.err == "ema: error: --steps 0: must be from 1 to 1e15\n"  # the target was blamed


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts to the left and numbers to the right, by their width on a terminal, and control
    characters escaped."""
    rows = [
        {"file": "名\x1b", "bytes": 0, "predicted_error": 0.0},
        {"file": "長い名前です", "bytes": 999, "predicted_error": 1e-8},
        {"file": "a", "bytes": 1500, "predicted_error": 0.00123},
        {"file": "b", "bytes": 2.5e6, "predicted_error": 0.5},
        {"file": "c", "bytes": 3e9, "predicted_error": 0.996},
        {"file": "d", "bytes": 4e12, "predicted_error": 12.0},
        {"file": "", "bytes": 1, "predicted_error": None},
        {"file": "e"},
    ]
    print_rows(rows, ["file", "size:bytes", "predicted_error"])
    assert capsys.readouterr().out.splitlines() == [
        "file            size  predicted error",
        "名\\x1b           0 B              0 %",
        "長い名前です   999 B         < 1e-5 %",
        "a             1.5 kB           0.12 %",
        "b             2.5 MB             50 %",
        "c               3 GB            100 %",
        "d               4 TB        > 1,000 %",
        "                 1 B          unknown",
        "e",
    ]
    print_pairs([("run", "x"), ("schedule", "y")])
    assert capsys.readouterr().out == "run       x\nschedule  y\n"


# --- the command `ema synthesize`


def test_one_average_into_one_file(ema: Ema, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    result = ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
    assert result.code == 0
    last = result.out.splitlines()[-1]
    made = r"made sigma_rel 0\.15 at t = 2,000 from 40 snapshots"
    assert re.match(rf"{made}, predicted error 0\.\d+ %, 128 B, in ", last)
    assert str(out) in last
    assert "the output lacks 1 tensor (2.bias) of the model" in result.err
    found = load_file(out)
    assert_same_tensors(found, PostHocEMA.from_path(run).state_dict(sigma_rel=0.15))
    assert found["2.weight"].dtype == torch.float16
    assert found["1.num_batches_tracked"].dtype == torch.int64


def test_a_folder_receives_a_file_of_the_targets_name(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "folder"
    poor = ema("synthesize", run, "--sigma-rel", "0.010", "--out", folder)
    assert poor.code == 0
    assert poor.err.startswith("ema: warning: sigma_rel 0.01: predicted error ")
    assert [path.name for path in folder.iterdir()] == ["sigma_rel-0.01.safetensors"]


def test_a_dry_run_reads_headers_only_and_writes_nothing(ema: Ema, run: Path) -> None:
    for path in run.glob("*.safetensors"):  # a dry run must not read the damaged tensors
        flip_bit(path)
    before = contents(run)
    words = ("synthesize", run, "--sigma-rel", "0.15", "--dry-run")
    result = ema(*words)
    assert result.code == 0
    assert "nothing was written" in result.out
    for when in ("--t", "--step"):
        (target,) = ema(*words, when, "1000", "--json").json["targets"]
        assert target["t"] == 1000
        assert target["output"] is None
        files = [snapshot["file"] for snapshot in target["snapshots"]]
        assert max(files) < "0000000000001001"
    assert contents(run) == before


def test_no_error_is_predicted_from_one_snapshot_without_a_sketch(ema: Ema, tmp_path: Path) -> None:
    """The picture of such a run assumes even motion, as that of a schedule."""
    model = torch.nn.Linear(4, 3)
    out = tmp_path / "m.safetensors"
    run = tmp_path / "one"
    with track(model, run, (0.05,), update_every=10, checkpoint_every=100) as tracker:
        update(tracker, model, 100)
    (path,) = snapshot_files(run)
    rewrite_snapshot(path, sketch="")
    words = ("synthesize", run, "--sigma-rel", "0.051", "--out")
    made = ema(*words, out)
    assert has_line("made .* from 1 snapshot, predicted error unknown, 60 B", made.out)
    report = ema(*words, out, "--overwrite", "--json").json
    (target,) = report["targets"]
    assert target["predicted_error"] is None
    assert report["movement"]["source"] == "assumed"
    other = tmp_path / "other.safetensors"
    assert "cannot be predicted" in ema(*words, other, "--max-error", "0.5").error
    assert not other.exists()
    report = ema("error-plot", run, "--sigma-range", "0.05:0.28", "--json").json
    (curve,) = report["curves"]
    assert curve["label"].endswith("/one: 1 snapshot up to 100 steps, if the network moves evenly")


def test_an_average_with_too_large_an_error_is_not_made_and_no_tensor_is_read(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "averages"
    arguments = ["synthesize", run, "--sigma-rel=0.15", "--sigma-rel=0.03", "--out", out]
    assert ema(*arguments, "--max-error", "99%").code == 0
    made = {path.name for path in out.iterdir()}
    assert made == {"sigma_rel-0.03.safetensors", "sigma_rel-0.15.safetensors"}
    for path in run.glob("*.safetensors"):
        flip_bit(path)
    before = contents(tmp_path)
    result = ema(*arguments, "--overwrite", "--max-error", "0.01 %")
    assert result.code == 1
    assert result.out == ""
    assert re.match(r"sigma_rel 0\.(03|15): the predicted error is ", result.error)
    assert "0.01 %" in result.error
    assert contents(tmp_path) == before


# --- `ema error-plot`: the picture and the numbers; and `ema plan`: its proposals and the call to
# paste


def test_the_picture_of_a_directory(ema: Ema, run: Path, tmp_path: Path) -> None:
    targets = shlex.split("--method paper --target window:1")
    result = ema("error-plot", run, "--out", tmp_path / "error.png", *targets)
    assert result.err == ""
    assert result.code == 0
    picture = matplotlib.image.imread(tmp_path / "error.png")
    assert picture.shape[1] >= 1000
    first, *lines = result.out.splitlines()
    assert first.endswith("/run: 40 snapshots up to 2,000 steps")
    assert lines[0].split() == ["tracked", "0.05,", "0.28"]
    assert re.fullmatch(r"  predicted error below 1 %  sigma_rel 0\.\d+ to 0\.\d+", lines[1])
    # a target beyond the curve widens it
    assert has_line(r" +window:1 +0\.000144 ", result.out)
    assert "profile error" in result.out


def test_the_picture_and_the_warning_name_the_same_range_and_the_same_errors(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    """Both ends are in the range; targets are points of the picture."""
    others = shlex.split("--target beta:0.99,0.999 --target window:500 --target decay:linear:100%")
    report = ema("error-plot", run, *others, "--json", "--out", tmp_path / "e.svg").json
    (curve,) = report["curves"]
    ((low, high),) = curve["below_1_percent"]
    for width, error in zip(curve["sigma_rel"], curve["predicted_error"], strict=True):
        assert (low <= width <= high) == (error < 0.01)
    picture = (tmp_path / "e.svg").read_text()
    assert "tracked: 0.05, 0.28" in picture
    assert "relative L2 error of the profile" not in picture
    (shown,) = set(re.findall(r"below 1 % for sigma_rel (.*?) -->", picture))
    ends = ",".join(re.findall(r"0\.\d+", shown))
    # With float64 the results are not rounded to the model's dtypes, which error-plot does not
    # count.
    options = ("--sigma-rel", f"0.01,{ends}", "--dtype", "float64", "--dry-run", "--json")
    made = ema("synthesize", run, *others, *options)
    assert made.err.rstrip().endswith(f"; below 1 % for sigma_rel {shown}")
    _, *both_ends = made.json["targets"][:3]
    assert max(target["predicted_error"] for target in both_ends) < 0.01
    points = {other["target"]: other for other in curve["others"]}
    assert list(points) == ["beta:0.99", "beta:0.999", "window:500", "decay:linear:100%"]
    assert points["window:500"]["sigma_rel"] == pytest.approx(0.25 / 12**0.5, rel=1e-6)
    for target in made.json["targets"][3:]:
        point = points[target["target"]]
        for error in ("predicted_error", "profile_error"):
            assert target[error] == pytest.approx(point[error], rel=1e-9)
        percent = 100 * point["predicted_error"]
        assert f"{point['target']}: {percent:.2g} %" in picture


PLANNED = ("plan", "--steps", "400", "--params", "1M", "--disk")


def test_a_plan_has_named_schedules_each_with_a_call_that_runs(
    ema: Ema,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ema(*PLANNED, "50MB", "--out", "plan.png")
    assert result.err == ""
    assert result.code == 0
    assert result.out.splitlines()[-1] == "wrote plan.png"
    assert Path("plan.png").read_bytes()[:4] == b"\x89PNG"
    report = ema(*PLANNED, "50MB", "--json").json
    rows = [line.split() for line in result.out.splitlines()[1:6]]
    names = [row[0] for row in rows]
    assert names == [each["name"] for each in report["schedules"]]
    marked = [row[0] for row in rows if row[1] == "*"]
    assert marked == ["small"]
    assert report["within_disk"] == "small"
    calls = re.findall(r"^ema = .*$", result.out, re.MULTILINE)
    for each, call in zip(report["schedules"], calls, strict=True):
        names: dict = {"PostHocEMA": PostHocEMA, "model": torch.nn.Linear(2, 1)}
        exec(call, names)
        settings = names["ema"].settings
        assert settings.sigma_rels == tuple(each["sigma_rels"])
        assert settings.schedule.checkpoint_every == each["checkpoint_every"]
        assert settings.schedule.max_checkpoints == each["max_checkpoints"]
        assert each["worst_error"] == max(each["predicted_error"])
    assert report["assumption"] == "the network moves evenly"
    assert "none is within --disk" in ema(*PLANNED, "1kB").out


# --- `ema verify` and `ema prune`: their reports, and the questions that they ask before they
# change files


def test_a_run_that_is_intact(
    ema: Ema,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A log has no progress bar, also with forced color."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    before = contents(run)
    result = ema("verify", run)
    assert result.err == ""
    assert result.code == 0
    first, empty, last = result.out.splitlines()
    assert first == "40 files with nothing wrong; --json lists them"
    assert empty == ""
    assert last.startswith("40 files, ")
    assert last.endswith(" s: all intact")
    assert contents(run) == before
    for path in snapshot_files(run)[10:]:
        path.unlink()
    table, _, _ = ema("verify", run).out.partition("\n\n")
    header, *lines = table.splitlines()
    assert header.split() == ["file", "what", "state"]
    assert [line.split()[-1] for line in lines] == ["intact"] * 10


def test_of_many_files_only_broken_ones_have_a_line_and_the_report_has_all(
    ema: Ema,
    run: Path,
) -> None:
    flip_bit(snapshot_files(run)[3])
    (run / ".ema-0123.tmp").write_text("half")
    lines = ema("verify", run).out.splitlines()
    assert lines[0] == "39 files with nothing wrong; --json lists them"
    damaged = "0000000000000200-0.28.safetensors: snapshot sigma_rel 0.28 at t = 200: damaged: "
    assert lines[1].startswith(damaged)
    assert lines[1].endswith(" does not match")
    assert lines[2] == ".ema-0123.tmp: left by an interrupted write, or by one in progress"
    assert len(lines) < 9
    result = ema("verify", run, "--json")
    assert result.err == ""
    assert result.code == 1
    report = result.json
    (file,) = [file for file in report["files"] if file["state"] != "intact"]
    assert file.keys() == {"path", "what", "state", "detail", "bytes"}
    assert file["path"] == snapshot_files(run)[3].name
    assert file["state"] == "damaged"
    assert report["leftovers"] == [".ema-0123.tmp"]
    assert report["bytes"] == sum(file["bytes"] for file in report["files"])
    assert report["seconds"] > 0


def test_contradictions_and_files_of_a_later_release_are_reported(ema: Ema, run: Path) -> None:
    files = snapshot_files(run)
    rewrite_snapshot(files[3], run_id=OTHER_RUN_ID)
    result = ema("verify", run)
    assert result.code == 1
    assert has_line(f"problem: .*{files[3].name}: differ in 'run_id'", result.out)
    assert ema("info", run).code == 1
    forge(files[3], {"kind": '"future"'})
    reason = "unreadable: is not of the kind 'snapshot' and format 3, but 'future' of format 3"
    assert reason in ema("verify", run).out


def test_nothing_is_changed_while_a_tracker_writes(ema: Ema, run: Path) -> None:
    flip_bit(snapshot_files(run)[2])
    before = [path.read_bytes() for path in snapshot_files(run)]
    with (run / ".ema.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is writing here" in ema("prune", run, "--keep", "5", "--yes").error
        assert ema("verify", run).code == 1
        assert ema("prune", run, "--keep", "5", "--dry-run").code == 0
    assert [path.read_bytes() for path in snapshot_files(run)] == before


def test_json_says_what_was_deleted(ema: Ema, run: Path) -> None:
    everything = {path.name for path in snapshot_files(run)}
    before = contents(run)
    dry = ema("prune", run, "--max-error", "30%", "--dry-run", "--json").json
    assert dry["deleted"] is False
    assert dry["gone"]
    assert contents(run) == before
    report = ema("prune", run, "--max-error", "30%", "--yes", "--json").json
    assert report["deleted"] is True
    assert report["before"]["worst_error"] <= report["after"]["worst_error"] <= 0.3
    left = snapshot_files(run)
    gone = {snapshot["file"] for snapshot in report["gone"]}
    assert {*report["kept"]} == {path.name for path in left} == everything - gone
    assert report["bytes"] == size_of(left)
    enough = ema("prune", run, "--keep", "100", "--yes")
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
def test_pruning_asks(
    ema: Ema,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
    left: int,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            # the directory is not locked while the question is open
            with (run / ".ema.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return answer

    monkeypatch.setattr(sys, "stdin", Terminal())
    result = ema("prune", run, "--keep", "5")
    assert result.code == code
    assert len(snapshot_files(run)) == left
    assert (result.out + result.err).count("delete 30 snapshots for good?") == 1
    if code == 1:
        assert result.out.endswith("nothing was deleted\n")


@pytest.mark.parametrize(
    ("lack", "message"),
    [
        ("memory", "not enough memory is free"),
        ("memory of torch", "not enough memory is free"),
        ("library", "not enough memory is free"),
        (
            "thread",
            "the system starts no more threads: a limit of processes or of memory is reached",
        ),
    ],
)
def test_a_lack_of_memory_or_of_threads_is_named(
    ema: Ema,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    lack: str,
    message: str,
) -> None:
    def refuse(_: threading.Thread) -> None:
        if lack == "memory":
            raise MemoryError
        if lack == "memory of torch":
            torch.empty(2**60, dtype=torch.uint8)
        if lack == "library":
            raise ImportError("libtorch_cpu.so: failed to map segment from shared object")
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    result = ema("verify", run)
    assert result.code == 1
    assert result.error == message


def test_messages_that_cannot_be_printed_change_no_exit_code() -> None:
    command = [sys.executable, "-m", "posthoc_cli", "profile", "--steps", "none"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stderr=full, check=False)
    assert done.returncode == 2


def test_a_page_shows_a_directory_whose_name_is_no_valid_text(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    folder = run.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    assert ema("report", folder, "--out", tmp_path / "page.html").code == 0
    assert "caf\\udce9" in (tmp_path / "page.html").read_text()

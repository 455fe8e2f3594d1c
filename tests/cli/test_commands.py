"""`ema info`, `export` and `profile`, and the tables that commands print."""

import fcntl
import io
import re
import shlex
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from checking import assert_same_tensors
from ema_command import Ema
from factories import OTHER_RUN_ID, contents, flip_bit, forge, rewrite_snapshot, snapshot_files
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocEMA
from posthoc_cli.cli.output import print_pairs, print_rows


def test_info_of_a_directory(ema: Ema, run: Path) -> None:
    (run / ".ema-0123.tmp").write_text("")
    (run / "superseded").mkdir()
    (run / "superseded" / "x.safetensors").write_text("")
    result = ema("info", run)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^run +[0-9a-f]{32}$", result.out, re.MULTILINE)
    assert re.search(r"^ *0\.28 +20 +100 +2,000 +0\.0\d+ % to 0\.0\d+ % ", result.out, re.MULTILINE)
    assert re.search(r"^measured +40 of them, from which", result.out, re.MULTILINE)
    assert re.search(r"^schedule +update_every .*, checkpoint_dtype float16$", result.out, re.M)
    report = ema("info", run, "--json").json
    assert report["run"] == PostHocEMA.from_path(run).run_id
    assert report["bytes"] == sum(p.stat().st_size for p in run.glob("*.safetensors"))
    assert (report["problems"], report["leftovers"], report["superseded"]) == (
        [],
        [".ema-0123.tmp"],
        1,
    )
    low, high = report["profiles"][0]["relative_rounding_range"]
    assert 2**-13 < low <= high < 2**-11


def test_info_of_a_snapshot_and_of_another_programs_file(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    snapshot = sorted(run.glob("*.safetensors"))[-1]
    report = ema("info", snapshot, "--json").json
    assert (report["kind"], report["sigma_rel"], report["t"], report["t_first"]) == (
        "snapshot",
        0.28,
        2000,
        10,
    )
    assert report["measurements"]["relative_rounding"] == pytest.approx(2**-11, rel=0.7)
    tensors = {
        name: tensor
        for name, tensor in load_file(snapshot).items()
        if not name.startswith("1.running")
    }
    norm = torch.cat(
        [t.double().flatten() for t in tensors.values() if t.is_floating_point()]
    ).norm()
    assert report["measurements"]["norm"] == pytest.approx(float(norm), rel=1e-3)
    said = r"^measurements +norm [\d.]+, relative_rounding 0\.0\d+ %$"
    assert re.search(said, ema("info", snapshot).out, re.MULTILINE)
    save_file({"w": torch.zeros(3, 2)}, tmp_path / "a.safetensors")
    report = ema("info", tmp_path / "a.safetensors", "--json").json
    assert (report["kind"], report["parameters"]) == ("safetensors", 6)


def test_info_of_an_output(ema: Ema, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
    report = ema("info", out, "--json").json
    text = ema("info", out).out
    assert re.search(r"^predicted error +0\.\d+ %$", text, re.MULTILINE)
    assert re.search(r"^sigma_rel +0\.15$", text, re.MULTILINE)
    assert max(map(len, text.replace(str(out), "").splitlines())) <= 80
    rows = re.findall(r"^\S+\.safetensors +([+-]\d\.\d{6})$", text, re.MULTILINE)
    largest = sorted((abs(item["coefficient"]) for item in report["snapshots"]), reverse=True)[:10]
    assert sorted((abs(float(c)) for c in rows), reverse=True) == pytest.approx(largest, abs=1e-6)
    assert re.search(
        r"^and 30 more with smaller coefficients; --json lists them$", text, re.MULTILINE
    )
    assert "profile error" not in text
    ema("synthesize", run, "--target", "beta:0.99", "--out", out, "--overwrite")
    report = ema("info", out, "--json").json
    assert (report["profile"], report["sigma_rel"], report["gamma"]) == ("beta:0.99", None, None)
    assert not re.search(r"^sigma_rel", ema("info", out).out, re.MULTILINE)


def test_info_of_shards_of_their_index_and_of_a_folder_of_outputs(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    for name, options in (
        ("averages", ()),
        ("shards", ("--layout", "sharded", "--max-shard-size", "50")),
    ):
        assert (
            ema(
                "synthesize", run, "--sigma-rel", "0.1,0.15,0.2", "--out", tmp_path / name, *options
            ).code
            == 0
        )
    single = ema("info", tmp_path / "averages" / "sigma_rel-0.15.safetensors", "--json").json
    folder = tmp_path / "shards" / "sigma_rel-0.15"
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1
    changed = {"shards": len(shards), "bytes": sum(shard.stat().st_size for shard in shards)}
    for path in (folder, folder / "model.safetensors.index.json"):
        assert ema("info", path, "--json").json == {**single, **changed, "path": str(path)}
        assert re.search(r"^profile +sigma_rel 0\.15$", ema("info", path).out, re.MULTILINE)
    for container in ("averages", "shards"):
        report = ema("info", tmp_path / container, "--json").json
        assert report["kind"] == "outputs"
        assert [one["profile"] for one in report["outputs"]] == [
            "sigma_rel 0.1",
            "sigma_rel 0.15",
            "sigma_rel 0.2",
        ]
        text = ema("info", tmp_path / container).out
        assert (
            len(
                re.findall(
                    r"^sigma_rel-0\.\S+ +sigma_rel 0\.\d+ +2,000 +0\.0\d+ % ", text, re.MULTILINE
                )
            )
            == 3
        )


def test_the_command_that_completes_an_output_works(ema: Ema, run: Path, tmp_path: Path) -> None:
    made = ema("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "m.pt")
    (note,) = (line for line in made.err.splitlines() if "the output lacks" in line)
    assert "(2.bias)" in note
    advice = made.err.split("from a full model: ")[1].strip()
    assert advice.startswith("make m.safetensors instead of m.pt, then: ")
    ema("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "m.safetensors")
    command = advice.split("then: ")[1]
    weights = PostHocEMA.from_path(run).state_dict(sigma_rel=0.15)
    full = {**weights, "2.bias": torch.ones(2).half()}
    save_file(full, tmp_path / "FULL.safetensors")
    words = [re.sub(r"^(FULL|NEW)", rf"{tmp_path}/\1", word) for word in shlex.split(command)[1:]]
    assert "wrote 9 tensors, 1 of them from" in ema(*words).out
    assert_same_tensors(load_file(tmp_path / "NEW.safetensors"), full)


def test_the_profiles_table_and_the_conversion_in_both_directions(ema: Ema) -> None:
    rows = [line.split() for line in ema("profile").out.splitlines()]
    assert rows[0] == ["sigma_rel", "gamma", "mean_age", "std", "beta"]
    assert [row[0] for row in rows[1:9]] == [
        "0.001",
        "0.01",
        "0.03",
        "0.05",
        "0.1",
        "0.15",
        "0.2",
        "0.27",
    ]
    (row,) = ema("profile", "--target", "beta:0.9999", "--steps", "100000", "--json").json[
        "profiles"
    ]
    (same,) = ema("profile", "--target", "half-life:5000", "--steps", "100000", "--json").json[
        "profiles"
    ]
    assert same["beta"] ** 5000 == pytest.approx(0.5, rel=1e-9)
    back = ema("profile", "--sigma-rel", row["sigma_rel"], "--steps", "100000", "--json").json
    assert back["profiles"][0]["beta"] == pytest.approx(0.9999, rel=1e-12)


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts to the left and numbers to the right, by their width on a terminal, and control
    characters escaped."""
    keys = ("file", "bytes", "predicted_error")
    sizes = (0, 999, 1500, 2.5e6, 3e9, 4e12, 1)
    rows = zip(
        ["名\x1b", "長い名前です", *"abcd", ""],
        sizes,
        (0.0, 1e-8, 0.00123, 0.5, 0.996, 12.0, None),
        strict=True,
    )
    print_rows(
        [*(dict(zip(keys, row, strict=True)) for row in rows), {"file": "e"}],
        ["file", "size:bytes", keys[2]],
    )
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
    (tmp_path / "existing").mkdir()
    for folder in ("existing", "new"):  # receives a file of the target's name
        poor = ema("synthesize", run, "--sigma-rel", "0.010", "--out", tmp_path / folder)
        assert poor.code == 0
        assert poor.err.startswith("ema: warning: sigma_rel 0.01: predicted error ")
        assert [path.name for path in (tmp_path / folder).iterdir()] == [
            "sigma_rel-0.01.safetensors"
        ]


def test_a_dry_run_reads_headers_only_and_writes_nothing(ema: Ema, run: Path) -> None:
    for path in run.glob("*.safetensors"):  # a dry run must not read the damaged tensors
        flip_bit(path)
    before = contents(run)
    result = ema("synthesize", run, "--sigma-rel", "0.15", "--dry-run")
    assert result.code == 0
    assert "nothing was written" in result.out
    for when in ("--t", "--step"):
        (target,) = ema(
            "synthesize", run, "--sigma-rel", "0.15", when, "1000", "--dry-run", "--json"
        ).json["targets"]
        assert (target["t"], target["output"]) == (1000, None)
        assert all(int(s["file"].split("-")[0]) <= 1000 for s in target["snapshots"])
    assert contents(run) == before


def test_no_error_is_predicted_from_one_snapshot_without_a_sketch(ema: Ema, tmp_path: Path) -> None:
    """The picture of such a run assumes even motion, as that of a schedule."""
    model = torch.nn.Linear(4, 3)
    out = tmp_path / "m.safetensors"
    with PostHocEMA.from_model(
        model, tmp_path / "one", sigma_rels=(0.05,), checkpoint_every=100
    ) as tracker:
        for _ in range(100):
            tracker.update_(model)
    for path in (tmp_path / "one").glob("*.safetensors"):
        rewrite_snapshot(path, sketch="")
    arguments = ["synthesize", tmp_path / "one", "--sigma-rel", "0.051", "--out"]
    made = ema(*arguments, out)
    assert re.search(
        r"^made .* from 1 snapshot, predicted error unknown, 60 B", made.out, re.MULTILINE
    )
    report = ema(*arguments, out, "--overwrite", "--json").json
    assert report["targets"][0]["predicted_error"] is None
    assert report["movement"]["source"] == "assumed"
    assert (
        "cannot be predicted"
        in ema(*arguments, tmp_path / "other.safetensors", "--max-error", "0.5").error
    )
    assert not (tmp_path / "other.safetensors").exists()
    (curve,) = ema("error-plot", tmp_path / "one", "--sigma-range", "0.05:0.28", "--json").json[
        "curves"
    ]
    assert curve["label"].endswith("/one: 1 snapshot up to 100 steps, if the network moves evenly")


def test_an_average_with_too_large_an_error_is_not_made_and_no_tensor_is_read(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    arguments = [
        "synthesize",
        run,
        "--sigma-rel=0.15",
        "--sigma-rel=0.03",
        "--out",
        tmp_path / "averages",
    ]
    assert ema(*arguments, "--max-error", "99%").code == 0
    assert {path.name for path in (tmp_path / "averages").iterdir()} == {
        f"sigma_rel-{s}.safetensors" for s in (0.03, 0.15)
    }
    for path in run.glob("*.safetensors"):
        flip_bit(path)
    before = contents(tmp_path)
    result = ema(*arguments, "--overwrite", "--max-error", "0.01 %")
    assert (result.code, result.out) == (1, "")
    assert re.match(r"sigma_rel 0\.(03|15): the predicted error is ", result.error)
    assert "0.01 %" in result.error
    assert contents(tmp_path) == before


# --- `ema error-plot`: the picture and the numbers; and `ema plan`: its proposals and the call to
# paste


def test_the_picture_of_a_directory(ema: Ema, run: Path, tmp_path: Path) -> None:
    result = ema(
        "error-plot",
        run,
        "--out",
        tmp_path / "error.png",
        "--target",
        "window:1",
        "--target",
        "beta:0.999",
    )
    assert (result.code, result.err) == (0, "")
    assert matplotlib.image.imread(tmp_path / "error.png").shape[1] >= 1000
    first, *lines = result.out.splitlines()
    assert first.endswith("/run: 40 snapshots up to 2,000 steps")
    assert lines[0].split() == ["tracked", "0.05,", "0.28"]
    assert re.fullmatch(r"  predicted error below 1 %  sigma_rel 0\.\d+ to 0\.\d+", lines[1])
    # a target beyond the curve widens it
    assert re.search(r"^ +window:1 +0\.000144 ", result.out, re.MULTILINE)
    assert "profile error" not in result.out
    paper = ema(
        "error-plot",
        run,
        "--method",
        "paper",
        "--out",
        tmp_path / "e.svg",
        "--target",
        "window:500",
    )
    assert "profile error" in paper.out
    assert "relative L2 error of the profile" in (tmp_path / "e.svg").read_text()


def test_the_picture_and_the_warning_name_the_same_range_and_both_ends_are_in_it(
    ema: Ema,
    run: Path,
    tmp_path: Path,
) -> None:
    (curve,) = ema("error-plot", run, "--out", tmp_path / "e.svg", "--json").json["curves"]
    for sigma_rel, error in zip(curve["sigma_rel"], curve["predicted_error"], strict=True):
        assert any(low <= sigma_rel <= high for low, high in curve["below_1_percent"]) == (
            error < 0.01
        )
    picture = (tmp_path / "e.svg").read_text()
    assert "tracked: 0.05, 0.28" in picture
    (shown,) = set(re.findall(r"below 1 % for sigma_rel (.*?) -->", picture))
    warning = ema("synthesize", run, "--sigma-rel", "0.01", "--dry-run").err
    assert warning.rstrip().endswith(f"; below 1 % for sigma_rel {shown}")
    ends = re.findall(r"0\.\d+", shown)
    report = ema("synthesize", run, "--sigma-rel", ",".join(ends), "--dry-run", "--json").json
    assert all(target["predicted_error"] < 0.01 for target in report["targets"])


def test_targets_are_points(ema: Ema, run: Path, tmp_path: Path) -> None:
    titles = ["beta:0.99", "beta:0.999", "window:500", "decay:linear:500:1500", "decay:linear:100%"]
    others = [
        "--target",
        "beta:0.99,0.999",
        *(word for title in titles[2:] for word in ("--target", title)),
    ]
    (curve,) = ema("error-plot", run, *others, "--json", "--out", tmp_path / "e.svg").json["curves"]
    found = {other["target"]: other for other in curve["others"]}
    assert list(found) == titles
    assert found["window:500"]["sigma_rel"] == pytest.approx(0.25 / 12**0.5, rel=1e-6)
    assert found["decay:linear:100%"]["sigma_rel"] == pytest.approx(12**-0.5, rel=1e-6)
    # With float64 the results are not rounded to the model's dtypes, which error-plot does not
    # count.
    for target in ema("synthesize", run, *others, "--dtype", "float64", "--dry-run", "--json").json[
        "targets"
    ]:
        for error in ("predicted_error", "profile_error"):
            assert target[error] == pytest.approx(found[target["target"]][error], rel=1e-9)
    picture = (tmp_path / "e.svg").read_text()
    assert all(
        f"{title}: {100 * found[title]['predicted_error']:.2g} %" in picture for title in titles
    )


PLANNED = ("plan", "--steps", "4000", "--params", "1M", "--disk", "50MB")


def test_a_plan_has_named_schedules_each_with_a_call_that_runs(
    ema: Ema,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It uses the motion of an earlier run, if one is given."""
    result = ema(*PLANNED)
    assert (result.code, result.err) == (0, "")
    report = ema(*PLANNED, "--json").json
    rows = result.out.splitlines()[1:6]
    assert [row.split()[0] for row in rows] == [each["name"] for each in report["schedules"]]
    assert (
        [row.split()[0] for row in rows if row.split()[1] == "*"]
        == [report["within_disk"]]
        == ["small"]
    )
    monkeypatch.chdir(tmp_path)
    for each, line in zip(
        report["schedules"], re.findall(r"^ema = .*$", result.out, re.MULTILINE), strict=True
    ):
        names: dict = {"PostHocEMA": PostHocEMA, "model": torch.nn.Linear(2, 1)}
        exec(line, names)
        settings = names["ema"].settings
        assert settings.sigma_rels == tuple(each["sigma_rels"])
        assert settings.schedule.checkpoint_every == each["checkpoint_every"]
        assert settings.schedule.max_checkpoints == each["max_checkpoints"]
        assert each["worst_error"] == max(each["predicted_error"])
    assert report["assumption"] == "the network moves evenly"
    drawn = ema(*PLANNED[:-1], "1kB", "--out", "plan.png")
    assert "none is within --disk" in drawn.out
    assert drawn.out.splitlines()[-1] == "wrote plan.png"
    assert Path("plan.png").read_bytes()[:4] == b"\x89PNG"


# --- `ema verify` and `ema prune`: their reports, and the questions that they ask before they
# change files


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


def test_of_many_files_only_broken_ones_have_a_line_and_the_report_has_all(
    ema: Ema,
    run: Path,
) -> None:
    flip_bit(snapshot_files(run)[3])
    (run / ".ema-0123.tmp").write_text("half")
    lines = ema("verify", run).out.splitlines()
    assert lines[0] == "39 files with nothing wrong; --json lists them"
    wrong = (
        r"0000000000000200-0.28.safetensors: snapshot sigma_rel 0.28 at t = 200: damaged: "
        r".* does not match"
    )
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
    assert re.search(rf"^problem: .*{files[3].name}: differ in 'run_id'", result.out, re.MULTILINE)
    assert ema("info", run).code == 1
    forge(files[3], {"kind": '"future"'})
    assert (
        "unreadable: is not of the kind 'snapshot' and format 3, but 'future' of format 3"
        in ema("verify", run).out
    )


def test_nothing_is_changed_while_a_tracker_writes(ema: Ema, run: Path) -> None:
    flip_bit(snapshot_files(run)[2])
    before = {name: data for name, data in contents(run).items() if "lock" not in name}
    with (run / ".ema.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is writing here" in ema("prune", run, "--keep", "5", "--yes").error
        assert ema("verify", run).code == 1
        assert ema("prune", run, "--keep", "5", "--dry-run").code == 0
    assert {name: data for name, data in contents(run).items() if "lock" not in name} == before


def test_json_says_what_was_deleted(ema: Ema, run: Path) -> None:
    everything = {path.name for path in snapshot_files(run)}
    before = contents(run)
    dry = ema("prune", run, "--max-error", "30%", "--dry-run", "--json").json
    assert (dry["deleted"], bool(dry["gone"]), contents(run) == before) == (False, True, True)
    report = ema("prune", run, "--max-error", "30%", "--yes", "--json").json
    assert report["deleted"] is True
    assert report["before"]["worst_error"] <= report["after"]["worst_error"] <= 0.3
    left = {path.name: path.stat().st_size for path in snapshot_files(run)}
    assert (
        set(report["kept"]) == set(left) == everything - {gone["file"] for gone in report["gone"]}
    )
    assert report["bytes"] == sum(left.values())
    enough = ema("prune", run, "--keep", "100", "--yes")
    assert enough.code == 0
    assert enough.out.splitlines()[-1] == "nothing has to be deleted"


@pytest.mark.parametrize(
    ("answer", "code", "left"), [("n\n", 1, 40), ("y\n", 0, 10), ("", 130, 40)]
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
    assert (result.code, len(snapshot_files(run))) == (code, left)
    assert (result.out + result.err).count("delete 30 snapshots for good?") == 1
    assert code != 1 or result.out.endswith("nothing was deleted\n")

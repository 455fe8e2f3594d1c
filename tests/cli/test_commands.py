"""`ema error-plot`, `info`, `export`, `profile`, and what holds for every command."""

from __future__ import annotations

import csv
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from ema_command import Ema
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocEMA
from posthoc_cli.cli.output import percent, printable, size_text

SCHEDULE = ("--steps", "100000", "--checkpoint-every", "1000", "--max-checkpoints", "20")


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


# --- error-plot ------------------------------------------------------------------------------------


def test_the_picture_of_a_directory(ema: Ema, run: Path, tmp_path: Path) -> None:
    result = ema("error-plot", run, "--out", tmp_path / "error.png")
    assert (result.code, result.err) == (0, "")
    assert png_size(tmp_path / "error.png")[0] >= 1000
    assert re.search(r"/run: 40 snapshots up to 2,000 steps +0\.05, 0\.28 +0\.\d+ to 0\.\d+", result.out)


@pytest.mark.parametrize(("name", "magic"), [("e.svg", b"<?xml"), ("e.pdf", b"%PDF"), ("e.png", b"\x89PNG")])
def test_pictures_for_screen_and_print(ema: Ema, run: Path, tmp_path: Path, name: str, magic: bytes) -> None:
    assert ema("error-plot", run, "--out", tmp_path / name, "--profiles", "0.15,0.2").code == 0
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_the_picture_names_the_good_range_and_marks_what_is_tracked(ema: Ema, run: Path, tmp_path: Path) -> None:
    ema("error-plot", run, "--out", tmp_path / "e.svg")
    text = (tmp_path / "e.svg").read_text()
    assert "Reconstruction error: below 1 % for sigma_rel 0.0" in text
    assert "tracked: 0.05, 0.28" in text


def test_before_training_several_schedules_in_one_picture(ema: Ema, tmp_path: Path) -> None:
    result = ema(
        "error-plot", "--sigma-rels", "0.05,0.28", "--sigma-rels", "0.05,0.10", *SCHEDULE,
        "--out", tmp_path / "plan.png",
    )  # fmt: skip
    assert result.code == 0
    assert result.out.count("plan: ") == 2


def test_the_numbers_as_json_and_as_a_table(ema: Ema, run: Path, tmp_path: Path) -> None:
    result = ema("error-plot", run, "--csv", tmp_path / "e.csv", "--json", "--sigma-range", "0.04:0.28")
    (curve,) = json.loads(result.out)["curves"]
    rows = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    assert [float(row["sigma_rel"]) for row in rows] == curve["sigma_rel"]
    assert [float(row["profile_error"]) for row in rows] == curve["profile_error"]
    assert curve["tracked"] == [0.05, 0.28]
    assert (curve["sigma_rel"][0], curve["sigma_rel"][-1]) == (0.04, 0.28)
    dry = json.loads(ema("synthesize", run, "--sigma-rel", "0.04", "--dry-run", "--json").out)
    assert dry["targets"][0]["profile_error"] == pytest.approx(curve["profile_error"][0])


def test_a_directory_beside_a_schedule(ema: Ema, run: Path) -> None:
    result = ema("error-plot", run, "--sigma-rels", "0.1", *SCHEDULE, "--json")
    assert [curve["tracked"] for curve in json.loads(result.out)["curves"]] == [[0.05, 0.28], [0.1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "e.png"], "name a directory of snapshots, or a schedule"),
        (["--sigma-rels", "0.1", "--out", "e.png"], "--steps: is missing"),
        (["--steps", "100", "--out", "e.png"], "--sigma-rels: is missing"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--out", "e.png", "--csv", "e.png"], "--csv e.png: is the picture"),
        (["--sigma-rels", "0.4", *SCHEDULE, "--json"], "--sigma-rel 0.4: must lie in"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--steps", "5", "--steps", "6", "--json"], "--steps: give it once"),
        (["--sigma-rels", "0.1", "--steps", "10", "--checkpoint-every", "11", "--json"], "--checkpoint-every 11"),
        (["--sigma-rels", "0.1", "--steps", "1000000000", "--checkpoint-every", "1", "--json"], "at most 20,000"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--max-checkpoints", "0", "--json"], "--max-checkpoints"),
        (["--sigma-rels", "0.1", *SCHEDULE], "--out: name a picture"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--out", "e.gif"], "--out e.gif: must end in .png, .svg, .pdf"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--sigma-range", "0.2:0.1"], "first must be below the second"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--sigma-range", "0.2"], "--sigma-range 0.2: must be LOW:HIGH"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--profiles", "2"], "2: must lie in (0, 0.2887)"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--t", "5"], "--t 5: must lie between"),
    ],
)  # fmt: skip
def test_wrong_options_of_error_plot(
    ema: Ema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ema("error-plot", *options)
    assert result.code == 2
    assert words in result.error
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_not_replaced_unasked(ema: Ema, run: Path, tmp_path: Path) -> None:
    (tmp_path / "e.png").write_text("precious")
    assert "is there already" in ema("error-plot", run, "--out", tmp_path / "e.png").error
    assert (tmp_path / "e.png").read_text() == "precious"
    assert ema("error-plot", run, "--out", tmp_path / "e.png", "--force").code == 0


# --- info ------------------------------------------------------------------------------------------


def test_info_of_a_directory(ema: Ema, run: Path) -> None:
    result = ema("info", run)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^run +[0-9a-f]{32}$", result.out, re.MULTILINE)
    assert re.search(r"^ *0\.28 +0\.1693 +20 +100 +2,000 ", result.out, re.MULTILINE)
    report = json.loads(ema("info", run, "--json").out)
    assert report["run"] == PostHocEMA.from_path(run).run_id
    assert [p["sigma_rel"] for p in report["profiles"]] == [0.05, 0.28]
    assert report["profiles"][0]["times"] == [100.0 * k for k in range(1, 21)]
    assert (report["averaged"], report["copied"], report["left_out"]) == (5, 3, ["2.bias"])
    assert report["bytes"] == sum(p.stat().st_size for p in run.glob("*.safetensors"))
    assert report["problems"] == []


def test_info_of_a_snapshot_an_output_and_a_stranger(ema: Ema, run: Path, tmp_path: Path) -> None:
    snapshot = sorted(run.glob("*.safetensors"))[-1]
    report = json.loads(ema("info", snapshot, "--json").out)
    assert (report["kind"], report["sigma_rel"], report["t"], report["t_first"]) == ("snapshot", 0.28, 2000, 10)
    out = tmp_path / "m.safetensors"
    ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
    report = json.loads(ema("info", out, "--json").out)
    assert (report["kind"], report["sigma_rel"], report["method"]) == ("output", 0.15, "paper")
    assert len(report["snapshots"]) == 40
    assert "sigma rel" in ema("info", out).out
    save_file({"w": torch.zeros(3, 2)}, tmp_path / "other.safetensors")
    report = json.loads(ema("info", tmp_path / "other.safetensors", "--json").out)
    assert (report["kind"], report["parameters"]) == ("safetensors", 6)


def test_info_reports_leftovers_and_what_was_set_aside(ema: Ema, run: Path) -> None:
    (run / ".ema-0123.tmp").write_text("")
    (run / "superseded").mkdir()
    (run / "superseded" / "x.safetensors").write_text("")
    report = json.loads(ema("info", run, "--json").out)
    assert report["leftovers"] == [".ema-0123.tmp"]
    assert report["superseded"] == 1


@pytest.mark.parametrize("name", ["nowhere", "empty", "text"])
def test_info_of_nothing(ema: Ema, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    result = ema("info", tmp_path / name)
    assert result.code == 1
    assert name in result.error


# --- export ----------------------------------------------------------------------------------------


def test_export_into_a_pt_file_completed_from_a_full_model(ema: Ema, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
    full = {f"net.{name}": tensor for name, tensor in load_file(out).items()} | {"net.2.bias": torch.ones(2).half()}
    save_file(full, tmp_path / "full.safetensors")
    result = ema("export", out, "--out", tmp_path / "m.pt", "--base", tmp_path / "full.safetensors", "--prefix", "net.")
    assert result.code == 0
    assert "wrote 9 tensors, 1 of them from" in result.out
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert loaded.keys() == full.keys()
    assert torch.equal(loaded["net.2.bias"], torch.ones(2).half())
    result = ema("export", tmp_path / "full.safetensors", "--out", tmp_path / "s", "--strip-prefix", "net.", "--json")
    assert json.loads(result.out)["tensors"] == 9
    assert set(load_file(tmp_path / "s" / "model.safetensors")) == {name.removeprefix("net.") for name in full}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "x.zip"], "x.zip"),
        (["--out", "x.pt", "--dtype", "int4"], "--dtype int4"),
        (["--out", "x.pt", "--strip-prefix", "nope."], "--strip-prefix 'nope.': no tensor's name begins so"),
        (["--out", "x", "--max-shard-size", "-1GB"], "--max-shard-size '-1GB'"),
        (["--out", "nowhere/x.pt"], "its folder does not exist"),
    ],
)
def test_wrong_options_of_export(
    ema: Ema, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    result = ema("export", sorted(run.glob("*.safetensors"))[0], *options)
    assert result.code == 2
    assert words in result.error
    assert set(tmp_path.rglob("*")) == before


def test_a_damaged_file_is_not_exported(ema: Ema, run: Path, tmp_path: Path) -> None:
    path = sorted(run.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    result = ema("export", path, "--out", tmp_path / "x.pt")
    assert result.code == 1
    assert f"{path}: truncated" in result.error
    assert not (tmp_path / "x.pt").exists()


# --- profile ---------------------------------------------------------------------------------------


def test_the_table_that_users_know(ema: Ema) -> None:
    result = ema("profile")
    rows = [line.split() for line in result.out.splitlines()]
    assert rows[0] == ["sigma_rel", "gamma", "mean_age", "std", "beta"]
    assert [row[0] for row in rows[1:9]] == ["0.001", "0.01", "0.03", "0.05", "0.1", "0.15", "0.2", "0.27"]
    known = [0.3700, 0.9055, 0.9680, 0.9808, 0.9911, 0.9944, 0.9962, 0.9979]
    assert [float(row[4]) for row in rows[1:9]] == pytest.approx(known, abs=0.002)


def test_both_ways(ema: Ema) -> None:
    (row,) = json.loads(ema("profile", "--beta", "0.9999", "--steps", "100000", "--json").out)["profiles"]
    back = json.loads(ema("profile", "--sigma-rel", row["sigma_rel"], "--steps", "100000", "--json").out)
    assert back["profiles"][0]["beta"] == pytest.approx(0.9999, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sigma-rel", "0.40"], "--sigma-rel 0.4: must lie in (0, 0.2887)"),
        (["--beta", "0.9999"], "--beta 0.9999: after 1,000 steps it must lie in (0, 0.998002)"),
        (["--beta", "0.99", "--sigma-rel", "0.1"], "give one of them"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_wrong_options_of_profile(ema: Ema, options: list[str], words: str) -> None:
    result = ema("profile", *options)
    assert result.code == 2
    assert words in result.error


# --- every command ---------------------------------------------------------------------------------


def test_no_command_is_a_request_for_help(ema: Ema) -> None:
    result = ema()
    assert result.code == 0
    assert result.out == ema("--help").out


def test_an_unknown_command_is_one_line(ema: Ema) -> None:
    result = ema("synthesise")
    assert result.code == 2
    assert "synthesise" in result.error


def test_the_version(ema: Ema) -> None:
    import posthoc_cli

    assert ema("--version").out == f"ema {posthoc_cli.__version__}\n"


def test_debug_shows_where(ema: Ema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posthoc_cli.cli import main
    from posthoc_cli.errors import FileFormatError

    monkeypatch.setattr("sys.argv", ["ema", "--debug", "info", str(tmp_path / "nowhere")])
    with pytest.raises(FileFormatError):
        main()


def test_a_name_from_a_file_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\nc") == "a\\x1b[31mb\\nc"
    assert printable("größe") == "größe"


def test_sizes_and_errors_for_people() -> None:
    assert [size_text(n) for n in (0, 999, 1500, 2.5e6, 3e9, 4e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3 GB",
        "4 TB",
    ]
    assert [percent(e) for e in (0.0, 1e-8, 0.00123, 0.5)] == ["0 %", "< 1e-5 %", "0.12 %", "50 %"]

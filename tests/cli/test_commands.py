"""`ema info`, `export`, `profile`, and what holds for every command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from ema_command import Ema
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocEMA
from posthoc_cli.cli.output import percent, printable, size_text

# --- info ------------------------------------------------------------------------------------------


def test_info_of_a_directory(ema: Ema, run: Path) -> None:
    result = ema("info", run)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^run +[0-9a-f]{32}$", result.out, re.MULTILINE)
    assert re.search(r"^ *0\.28 +0\.1693 +20 +100 +2,000 +0\.0\d+ % to 0\.0\d+ % ", result.out, re.MULTILINE)
    assert re.search(r"^measured +40 of them$", result.out, re.MULTILINE)
    report = json.loads(ema("info", run, "--json").out)
    assert report["run"] == PostHocEMA.from_path(run).run_id
    assert [p["sigma_rel"] for p in report["profiles"]] == [0.05, 0.28]
    assert report["profiles"][0]["times"] == [100.0 * k for k in range(1, 21)]
    assert (report["averaged"], report["copied"], report["left_out"]) == (5, 3, ["2.bias"])
    assert report["bytes"] == sum(p.stat().st_size for p in run.glob("*.safetensors"))
    assert report["problems"] == []
    assert report["measured"] == 40
    assert (report["t"], report["step"]) == (2000, 2000)
    low, high = report["profiles"][0]["relative_rounding"]
    assert 2**-13 < low <= high < 2**-11


def test_info_says_where_nothing_was_measured(ema: Ema, unmeasured_run: Path) -> None:
    result = ema("info", unmeasured_run)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^measured +none of them: errors are predicted from a sample$", result.out, re.MULTILINE)
    assert result.out.count("unknown") == 2
    report = json.loads(ema("info", unmeasured_run, "--json").out)
    assert report["measured"] == 0
    assert [profile["relative_rounding"] for profile in report["profiles"]] == [None, None]
    snapshot = json.loads(ema("info", sorted(unmeasured_run.glob("*.safetensors"))[0], "--json").out)
    assert snapshot["measurements"] is None


def test_info_of_an_output_that_is_no_power_function(ema: Ema, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "beta.safetensors"
    ema("synthesize", run, "--beta", "0.99", "--out", out)
    report = json.loads(ema("info", out, "--json").out)
    assert (report["profile"], report["sigma_rel"], report["gamma"]) == ("beta 0.99", None, None)
    text = ema("info", out).out
    assert re.search(r"^profile +beta 0\.99$", text, re.MULTILINE)
    assert "sigma rel" not in text


def test_info_of_a_snapshot_an_output_and_a_stranger(ema: Ema, run: Path, tmp_path: Path) -> None:
    snapshot = sorted(run.glob("*.safetensors"))[-1]
    report = json.loads(ema("info", snapshot, "--json").out)
    assert (report["kind"], report["sigma_rel"], report["t"], report["t_first"]) == ("snapshot", 0.28, 2000, 10)
    assert report["measurements"]["distances"] == 5
    assert report["measurements"]["relative_rounding"] == pytest.approx(2**-11, rel=0.7)
    tensors = {name: tensor for name, tensor in load_file(snapshot).items() if not name.startswith("1.running")}
    norm = torch.cat([t.double().flatten() for t in tensors.values() if t.is_floating_point()]).norm()
    assert report["measurements"]["norm"] == pytest.approx(float(norm), rel=1e-3)
    assert re.search(r"^measurements +norm [\d.]+, relative_rounding 0\.0\d+ %, distances 5$",
                     ema("info", snapshot).out, re.MULTILINE)  # fmt: skip
    out = tmp_path / "m.safetensors"
    ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
    report = json.loads(ema("info", out, "--json").out)
    assert (report["kind"], report["sigma_rel"], report["method"]) == ("output", 0.15, "minvar")
    assert report["profile"] == "sigma_rel 0.15"
    assert 0 < report["predicted_error"] < 0.01
    assert re.search(r"^predicted error +0\.\d+ %$", ema("info", out).out, re.MULTILINE)
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
    assert [percent(e) for e in (None, 0.0, 1e-8, 0.00123, 0.5, 0.996, 12.0)] == [
        "unknown", "0 %", "< 1e-5 %", "0.12 %", "50 %", "100 %", "1,200 %",
    ]  # fmt: skip

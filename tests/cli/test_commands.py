"""`ema info`, `export` and `profile`, and the tables that commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors
from ema_command import Ema
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocEMA
from posthoc_cli.cli.output import print_pairs, print_rows
from posthoc_cli.errors import percent
from posthoc_cli.resources import size_text


def test_info_of_a_directory(ema: Ema, run: Path) -> None:
    (run / ".ema-0123.tmp").write_text("")
    (run / "superseded").mkdir()
    (run / "superseded" / "x.safetensors").write_text("")
    result = ema("info", run)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^run +[0-9a-f]{32}$", result.out, re.MULTILINE)
    assert re.search(r"^ *0\.28 +20 +100 +2,000 +0\.0\d+ % to 0\.0\d+ % ", result.out, re.MULTILINE)
    assert re.search(r"^measured +40 of them$", result.out, re.MULTILINE)
    assert re.search(r"^schedule +update_every .*, checkpoint_dtype float16$", result.out, re.M)
    report = ema("info", run, "--json").json
    assert report["run"] == PostHocEMA.from_path(run).run_id
    assert report["bytes"] == sum(p.stat().st_size for p in run.glob("*.safetensors"))
    assert (report["problems"], report["leftovers"], report["superseded"]) == ([], [".ema-0123.tmp"], 1)
    low, high = report["profiles"][0]["relative_rounding_range"]
    assert 2**-13 < low <= high < 2**-11


def test_info_of_a_snapshot_and_of_another_programs_file(ema: Ema, run: Path, tmp_path: Path) -> None:
    snapshot = sorted(run.glob("*.safetensors"))[-1]
    report = ema("info", snapshot, "--json").json
    assert (report["kind"], report["sigma_rel"], report["t"], report["t_first"]) == ("snapshot", 0.28, 2000, 10)
    assert report["measurements"]["relative_rounding"] == pytest.approx(2**-11, rel=0.7)
    tensors = {name: tensor for name, tensor in load_file(snapshot).items() if not name.startswith("1.running")}
    norm = torch.cat([t.double().flatten() for t in tensors.values() if t.is_floating_point()]).norm()
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
    assert re.search(r"^and 30 more with smaller coefficients; --json lists them$", text, re.MULTILINE)
    assert "profile error" not in text
    ema("synthesize", run, "--target", "beta:0.99", "--out", out, "--overwrite")
    report = ema("info", out, "--json").json
    assert (report["profile"], report["sigma_rel"], report["gamma"]) == ("beta:0.99", None, None)
    assert not re.search(r"^sigma_rel", ema("info", out).out, re.MULTILINE)


def test_info_of_shards_of_their_index_and_of_a_folder_of_outputs(ema: Ema, run: Path, tmp_path: Path) -> None:
    for name, options in (("averages", ()), ("shards", ("--layout", "sharded", "--max-shard-size", "50"))):
        assert ema("synthesize", run, "--sigma-rel", "0.1,0.15,0.2", "--out", tmp_path / name, *options).code == 0
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
        assert [one["profile"] for one in report["outputs"]] == ["sigma_rel 0.1", "sigma_rel 0.15", "sigma_rel 0.2"]
        text = ema("info", tmp_path / container).out
        assert len(re.findall(r"^sigma_rel-0\.\S+ +sigma_rel 0\.\d+ +2,000 +0\.0\d+ % ", text, re.MULTILINE)) == 3


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
    assert [row[0] for row in rows[1:9]] == ["0.001", "0.01", "0.03", "0.05", "0.1", "0.15", "0.2", "0.27"]
    (row,) = ema("profile", "--target", "beta:0.9999", "--steps", "100000", "--json").json["profiles"]
    (same,) = ema("profile", "--target", "half-life:5000", "--steps", "100000", "--json").json["profiles"]
    assert same["beta"] ** 5000 == pytest.approx(0.5, rel=1e-9)
    back = ema("profile", "--sigma-rel", row["sigma_rel"], "--steps", "100000", "--json").json
    assert back["profiles"][0]["beta"] == pytest.approx(0.9999, rel=1e-12)


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts to the left and numbers to the right, by their width on a terminal, and control characters escaped."""
    rows = [{"file": "名\x1b", "bytes": 1, "predicted_error": 0.1}, {"file": "longer-name", "bytes": 12_000}]
    print_rows(rows, ["file", "size:bytes", "predicted_error"])
    assert capsys.readouterr().out.splitlines() == [
        "file          size  predicted error",
        "名\\x1b         1 B             10 %",
        "longer-name  12 kB",
    ]
    print_pairs([("run", "x"), ("schedule", "y")])
    assert capsys.readouterr().out == "run       x\nschedule  y\n"


def test_sizes_and_errors_for_people() -> None:
    sizes = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 2.5e6: "2.5 MB", 3e9: "3 GB", 4e12: "4 TB"}
    assert {size: size_text(size) for size in sizes} == sizes
    errors = {0.0: "0 %", 1e-8: "< 1e-5 %", 0.00123: "0.12 %", 0.5: "50 %", 0.996: "100 %", 12.0: "> 1,000 %"}
    assert {error: percent(error) for error in errors} == errors
    assert percent(None) == "unknown"

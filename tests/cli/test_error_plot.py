"""`ema error-plot`: the picture, the table and the numbers."""

from __future__ import annotations

import csv
import json
import re
import struct
from pathlib import Path

import pytest
from ema_command import Ema

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
    assert ema("error-plot", run, "--out", tmp_path / name, "--draw", "0.15,0.2").code == 0
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_the_picture_names_the_good_range_and_marks_what_is_tracked(ema: Ema, run: Path, tmp_path: Path) -> None:
    ema("error-plot", run, "--out", tmp_path / "e.svg")
    text = (tmp_path / "e.svg").read_text()
    assert "Predicted error of the weights: below 1 % for sigma_rel 0.0" in text
    assert "tracked: 0.05, 0.28" in text
    for error in ("expected relative L2 error of the weights", "thin: relative L2 error of the profile"):
        assert error in text


def test_without_measurements_the_error_is_that_of_the_profile(ema: Ema, run: Path, tmp_path: Path) -> None:
    ema("error-plot", "--sigma-rels", "0.05,0.28", *SCHEDULE, "--out", tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    assert "Profile error: below 1 % for sigma_rel 0.0" in text
    assert "expected relative L2 error" not in text
    # Beside a run the same measure for both; in numbers each has what is known of it.
    arguments = ["error-plot", run, "--sigma-rels", "0.05,0.28", *SCHEDULE]
    result = ema(*arguments, "--out", tmp_path / "both.svg")
    assert "sigma_rel with profile error below 1 %" in result.out
    assert "<!-- Profile error -->" in (tmp_path / "both.svg").read_text()
    measured, planned = json.loads(ema(*arguments, "--json").out)["curves"]
    assert (measured["error"], planned["error"]) == ("predicted_error", "profile_error")
    assert len(measured["predicted_error"]) == len(measured["sigma_rel"])
    assert planned["predicted_error"] is None


def test_a_directory_without_measurements_is_measured_from_a_sample(ema: Ema, run: Path, unmeasured_run: Path) -> None:
    (curve,) = json.loads(ema("error-plot", unmeasured_run, "--json").out)["curves"]
    assert curve["error"] == "predicted_error"
    assert all(error > 0 for error in curve["predicted_error"])


def test_the_range_below_1_percent_is_that_of_the_main_error(ema: Ema, run: Path) -> None:
    (curve,) = json.loads(ema("error-plot", run, "--json").out)["curves"]
    assert curve["below_1_percent"]
    for sigma_rel, error in zip(curve["sigma_rel"], curve["predicted_error"], strict=True):
        inside = any(low <= sigma_rel <= high for low, high in curve["below_1_percent"])
        assert inside == (error < 0.01)


def test_targets_of_other_kinds_are_points_and_drawn_over_time(ema: Ema, run: Path, tmp_path: Path) -> None:
    ramp = tmp_path / "ramp.csv"
    ramp.write_text("time,density\n0,0\n2000,1\n")
    others = ["--beta", "0.99,0.999", "--window", "500", "--between", "500:1500", "--profile", ramp]
    titles = ["beta 0.99", "beta 0.999", "window 500", "between 500:1500", "profile ramp.csv"]
    arguments = ["error-plot", run, *others, "--draw", "0.15", "--out", tmp_path / "e.svg", "--csv", tmp_path / "e.csv"]
    (curve,) = json.loads(ema(*arguments, "--json").out)["curves"]
    found = {other["target"]: other for other in curve["others"]}
    assert list(found) == titles
    assert found["window 500"]["sigma_rel"] == pytest.approx(0.25 / 12**0.5, rel=1e-6)
    assert found["profile ramp.csv"]["sigma_rel"] == pytest.approx(18**-0.5, rel=1e-6)
    # Before the results are rounded to the model's own dtypes.
    dry = ema("synthesize", run, *others, "--dtype", "float64", "--dry-run", "--json").out
    for target in json.loads(dry)["targets"]:
        for error in ("predicted_error", "profile_error"):
            assert target[error] == pytest.approx(found[target["target"]][error], rel=1e-9)
    rows = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    assert [row["target"] for row in rows if row["target"] != "sigma_rel"] == titles
    assert float(rows[-1]["predicted_error"]) == found["profile ramp.csv"]["predicted_error"]
    picture = (tmp_path / "e.svg").read_text()
    for title in ("sigma_rel 0.15", *titles):
        assert f"{title} from " in picture
    for title in titles:
        assert f"{title}: {100 * found[title]['predicted_error']:.2g} %" in picture


def test_points_beyond_the_curve_widen_the_picture(ema: Ema, run: Path, tmp_path: Path) -> None:
    result = ema("error-plot", run, "--window", "1", "--beta", "0.999", "--out", tmp_path / "e.png")
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^window 1 +0\.000144 ", result.out, re.MULTILINE)


def test_what_is_not_known_is_null_or_empty(ema: Ema, tmp_path: Path) -> None:
    arguments = ["error-plot", "--sigma-rels", "0.05", *SCHEDULE, "--beta", "0.9999", "--csv", tmp_path / "e.csv"]
    (curve,) = json.loads(ema(*arguments, "--json").out)["curves"]
    assert (curve["predicted_error"], curve["others"][0]["predicted_error"]) == (None, None)
    rows = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    assert {row["predicted_error"] for row in rows} == {""}
    assert "beta 0.9999" in ema(*arguments, "--force").out


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
    assert [float(row["predicted_error"]) for row in rows] == curve["predicted_error"]
    assert list(rows[0]) == ["curve", "t", "target", "sigma_rel", "predicted_error", "profile_error"]
    assert {row["target"] for row in rows} == {"sigma_rel"}
    assert curve["tracked"] == [0.05, 0.28]
    assert (curve["sigma_rel"][0], curve["sigma_rel"][-1]) == (0.04, 0.28)
    dry = json.loads(ema("synthesize", run, "--sigma-rel", "0.04", "--dtype", "float64", "--dry-run", "--json").out)
    for error in ("predicted_error", "profile_error"):
        assert dry["targets"][0][error] == pytest.approx(curve[error][0])


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
        (["--sigma-rels", "0.4", *SCHEDULE, "--json"], "--sigma-rels 0.4: must lie in"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--steps", "5", "--steps", "6", "--json"], "--steps: give it once"),
        (["--sigma-rels", "0.1", "--steps", "10", "--checkpoint-every", "11", "--json"], "--checkpoint-every 11"),
        (["--sigma-rels", "0.1", "--steps", "1000000000", "--checkpoint-every", "1", "--json"], "at most 20,000"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--max-checkpoints", "0", "--json"], "--max-checkpoints"),
        (["--sigma-rels", "0.1", *SCHEDULE], "--out: name a picture"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--out", "e.gif"], "--out e.gif: must end in .png, .svg, .pdf"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--sigma-range", "0.2:0.1"], "first must be below the second"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--sigma-range", "0.2"], "--sigma-range 0.2: must be LOW:HIGH"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--draw", "2"], "--draw 2: must lie in (0, 0.2887)"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--t", "5"], "--t 5: must lie between"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--t", "0", "--beta", "0.9"], "--t 0: must lie between"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--window", "200000"], "--window 200000: the run has 100,000"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--json", "--profile", "nope.csv"], "--profile nope.csv: cannot be read"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--draw", "0.01:0.2:0.001", "--out", "e.png"], "191 drawings"),
        (["--sigma-rels", "0.1", *SCHEDULE, "--profiles", "0.15", "--out", "e.png"], "No such option: --profiles"),
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

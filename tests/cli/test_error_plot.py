"""`ema error-plot`: the picture, the table and the numbers."""

from __future__ import annotations

import csv
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from ema_command import Ema
from factories import expected_error

from posthoc_cli import PostHocEMA

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
    first, *lines = result.out.splitlines()
    assert first.endswith("/run: 40 snapshots up to 2,000 steps")
    assert lines[0].split() == ["tracked", "0.05,", "0.28"]
    assert re.fullmatch(r"  predicted error below 1 %  sigma_rel 0\.\d+ to 0\.\d+", lines[1])


@pytest.mark.parametrize(("name", "magic"), [("e.svg", b"<?xml"), ("e.pdf", b"%PDF"), ("e.png", b"\x89PNG")])
def test_pictures_for_screen_and_print(ema: Ema, run: Path, tmp_path: Path, name: str, magic: bytes) -> None:
    assert ema("error-plot", run, "--out", tmp_path / name, "--draw", "0.15,0.2").code == 0
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_the_picture_names_the_good_range_and_marks_what_is_tracked(ema: Ema, run: Path, tmp_path: Path) -> None:
    ema("error-plot", run, "--out", tmp_path / "e.svg")
    text = (tmp_path / "e.svg").read_text()
    assert "Predicted error of the weights: below 1 % for sigma_rel 0.0" in text
    assert "tracked: 0.05, 0.28" in text
    assert "expected relative L2 error of the weights" in text
    assert "of the profile" not in text


@pytest.mark.parametrize("more", [("--verbose",), ("--method", "paper")])
def test_the_profile_error_is_for_those_who_ask(ema: Ema, run: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    arguments = ["error-plot", run, "--window", "500", "--out", tmp_path / "e.svg", "--force"]
    assert "profile error" not in ema(*arguments).out
    assert "profile error" in ema(*arguments, *more).out
    assert "relative L2 error of the profile" in (tmp_path / "e.svg").read_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_schedule_has_the_predicted_error_of_plan_under_the_same_assumption(ema: Ema, dtype: str) -> None:
    schedule = ("--sigma-rels", "0.05,0.28", "--steps", "8000", "--checkpoint-every", "1000", "--dtype", dtype)
    (curve,) = ema("error-plot", *schedule, "--sigma-range", "0.05:0.28", "--json").json["curves"]
    rounding = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype] * np.sqrt(2 * np.log(2) / 36)
    for index in range(20, 200, 30):
        least = expected_error(curve["sigma_rel"][index], (0.05, 0.28), range(1000, 8001, 1000), float(rounding))
        assert (
            0.99 * least < curve["predicted_error"][index] < 1.13 * least
        )  # a little more where the paper's are taken
    fixed = (*schedule, "--params", "1M", "--max-size", "1GB", "--max-checkpoints", "8")
    (plan,) = ema("plan", *fixed, "--json").json["proposals"]
    found = np.interp(plan["sigma_rel"], curve["sigma_rel"], curve["predicted_error"])
    assert found == pytest.approx(plan["predicted_error"], rel=0.02)
    assert curve["assumption"] == "the network moves evenly"
    assert curve["label"].endswith(" in 8,000 steps, if the network moves evenly")


def test_a_schedule_takes_the_movement_of_an_earlier_run(ema: Ema, run: Path) -> None:
    schedule = ("--sigma-rels", "0.05,0.28", "--steps", "4000", "--checkpoint-every", "500", "--like", run)
    result = ema("error-plot", *schedule, "--sigma-range", "0.05:0.28", "--json")
    (curve,) = result.json["curves"]
    fixed = (*schedule, "--params", "1M", "--max-size", "1GB", "--max-checkpoints", "8", "--dtype", "float16")
    (plan,) = ema("plan", *fixed, "--json").json["proposals"]
    found = np.interp(plan["sigma_rel"], curve["sigma_rel"], curve["predicted_error"])
    assert found == pytest.approx(plan["predicted_error"], rel=0.02)
    assert curve["assumption"] == f"the network moves as in {run}"


def test_a_schedule_beside_a_run_leaves_the_runs_curve_as_it_is(ema: Ema, run: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "e.svg", "--force")
    alone = ema("error-plot", run, *out).out.splitlines()
    both = ema("error-plot", run, "--sigma-rels", "0.05,0.28", *SCHEDULE, *out).out.splitlines()
    assert both[:3] == alone[:3]
    assert both[3].startswith("plan: 0.05, 0.28 at 20 times in 100,000 steps, if the network moves evenly")
    assert "predicted error below 1 %" in both[5]
    assert "<!-- Predicted error of the weights -->" in (tmp_path / "e.svg").read_text()


def test_a_run_that_does_not_tell_how_it_moved_is_judged_as_a_schedule(ema: Ema, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    with PostHocEMA.from_model(model, tmp_path / "one", sigma_rels=(0.05,), checkpoint_every=100) as tracker:
        for _ in range(100):
            tracker.update_(model)
    (curve,) = ema("error-plot", tmp_path / "one", "--sigma-range", "0.05:0.28", "--json").json["curves"]
    assert curve["label"].endswith("/one: 1 snapshot up to 100 steps, if the network moves evenly")
    assert curve["predicted_error"][-1] == pytest.approx(expected_error(0.28, (0.05,), (100,), 0.0), rel=0.01)


def test_the_picture_and_the_warning_name_the_same_range_and_both_ends_are_in_it(
    ema: Ema, run: Path, tmp_path: Path
) -> None:
    ema("error-plot", run, "--out", tmp_path / "e.svg")
    (shown,) = set(re.findall(r"below 1 % for sigma_rel (.*?) -->", (tmp_path / "e.svg").read_text()))
    warning = ema("synthesize", run, "--sigma-rel", "0.01", "--dry-run", "-q").err
    assert warning.rstrip().endswith(f"; below 1 % for sigma_rel {shown}")
    ends = re.findall(r"0\.\d+", shown)
    report = ema("synthesize", run, "--sigma-rel", ",".join(ends), "--dry-run", "--json").json
    assert all(target["predicted_error"] < 0.01 for target in report["targets"])


def test_a_directory_without_measurements_is_measured_from_a_sample(ema: Ema, run: Path, unmeasured_run: Path) -> None:
    (curve,) = ema("error-plot", unmeasured_run, "--json").json["curves"]
    assert curve["assumption"] is None
    assert all(error > 0 for error in curve["predicted_error"])


def test_the_range_below_1_percent_is_that_of_the_main_error(ema: Ema, run: Path) -> None:
    (curve,) = ema("error-plot", run, "--json").json["curves"]
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
    (curve,) = ema(*arguments, "--json").json["curves"]
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
    assert re.search(r"^ +window 1 +0\.000144 ", result.out, re.MULTILINE)


def test_before_training_several_schedules_in_one_picture(ema: Ema, tmp_path: Path) -> None:
    result = ema(
        "error-plot", "--sigma-rels", "0.05,0.28", "--sigma-rels", "0.05,0.10", *SCHEDULE,
        "--out", tmp_path / "plan.png",
    )  # fmt: skip
    assert result.code == 0
    assert result.out.count("plan: ") == 2


def test_the_numbers_as_json_and_as_a_table(ema: Ema, run: Path, tmp_path: Path) -> None:
    result = ema("error-plot", run, "--csv", tmp_path / "e.csv", "--json", "--sigma-range", "0.04:0.28")
    (curve,) = result.json["curves"]
    rows = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    assert [float(row["sigma_rel"]) for row in rows] == curve["sigma_rel"]
    assert [float(row["profile_error"]) for row in rows] == curve["profile_error"]
    assert [float(row["predicted_error"]) for row in rows] == curve["predicted_error"]
    assert list(rows[0]) == ["curve", "t", "target", "sigma_rel", "predicted_error", "profile_error"]
    assert {row["target"] for row in rows} == {"sigma_rel"}
    assert curve["tracked"] == [0.05, 0.28]
    assert (curve["sigma_rel"][0], curve["sigma_rel"][-1]) == (0.04, 0.28)
    dry = ema("synthesize", run, "--sigma-rel", "0.04", "--dtype", "float64", "--dry-run", "--json").json
    for error in ("predicted_error", "profile_error"):
        assert dry["targets"][0][error] == pytest.approx(curve[error][0])


def test_a_directory_beside_a_schedule(ema: Ema, run: Path) -> None:
    result = ema("error-plot", run, "--sigma-rels", "0.1", *SCHEDULE, "--json")
    assert [curve["tracked"] for curve in result.json["curves"]] == [[0.05, 0.28], [0.1]]

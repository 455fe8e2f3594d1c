"""`ema error-plot`: the picture and the numbers; and `ema plan`: its proposals and the call to paste."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.image
import pytest
import torch
from ema_command import Ema

from posthoc_cli import PostHocEMA


def test_the_picture_of_a_directory(ema: Ema, run: Path, tmp_path: Path) -> None:
    result = ema("error-plot", run, "--out", tmp_path / "error.png", "--target", "window:1", "--target", "beta:0.999")
    assert (result.code, result.err) == (0, "")
    assert matplotlib.image.imread(tmp_path / "error.png").shape[1] >= 1000
    first, *lines = result.out.splitlines()
    assert first.endswith("/run: 40 snapshots up to 2,000 steps")
    assert lines[0].split() == ["tracked", "0.05,", "0.28"]
    assert re.fullmatch(r"  predicted error below 1 %  sigma_rel 0\.\d+ to 0\.\d+", lines[1])
    assert re.search(r"^ +window:1 +0\.000144 ", result.out, re.MULTILINE)  # a target beyond the curve widens it
    assert "profile error" not in result.out
    paper = ema("error-plot", run, "--method", "paper", "--out", tmp_path / "e.svg", "--target", "window:500")
    assert "profile error" in paper.out
    assert "relative L2 error of the profile" in (tmp_path / "e.svg").read_text()


def test_the_picture_and_the_warning_name_the_same_range_and_both_ends_are_in_it(
    ema: Ema, run: Path, tmp_path: Path
) -> None:
    (curve,) = ema("error-plot", run, "--out", tmp_path / "e.svg", "--json").json["curves"]
    for sigma_rel, error in zip(curve["sigma_rel"], curve["predicted_error"], strict=True):
        assert any(low <= sigma_rel <= high for low, high in curve["below_1_percent"]) == (error < 0.01)
    picture = (tmp_path / "e.svg").read_text()
    assert "tracked: 0.05, 0.28" in picture
    (shown,) = set(re.findall(r"below 1 % for sigma_rel (.*?) -->", picture))
    warning = ema("synthesize", run, "--sigma-rel", "0.01", "--dry-run").err
    assert warning.rstrip().endswith(f"; below 1 % for sigma_rel {shown}")
    ends = re.findall(r"0\.\d+", shown)
    report = ema("synthesize", run, "--sigma-rel", ",".join(ends), "--dry-run", "--json").json
    assert all(target["predicted_error"] < 0.01 for target in report["targets"])


def test_targets_are_points(ema: Ema, run: Path, tmp_path: Path) -> None:
    titles = ["beta:0.99", "beta:0.999", "window:500", "between:500:1500", "decay:linear:100%"]
    others = ["--target", "beta:0.99,0.999", *(word for title in titles[2:] for word in ("--target", title))]
    (curve,) = ema("error-plot", run, *others, "--json", "--out", tmp_path / "e.svg").json["curves"]
    found = {other["target"]: other for other in curve["others"]}
    assert list(found) == titles
    assert found["window:500"]["sigma_rel"] == pytest.approx(0.25 / 12**0.5, rel=1e-6)
    assert found["decay:linear:100%"]["sigma_rel"] == pytest.approx(12**-0.5, rel=1e-6)
    # With float64 the results are not rounded to the model's dtypes, which error-plot does not count.
    for target in ema("synthesize", run, *others, "--dtype", "float64", "--dry-run", "--json").json["targets"]:
        for error in ("predicted_error", "profile_error"):
            assert target[error] == pytest.approx(found[target["target"]][error], rel=1e-9)
    picture = (tmp_path / "e.svg").read_text()
    assert all(f"{title}: {100 * found[title]['predicted_error']:.2g} %" in picture for title in titles)


PLANNED = ("plan", "--steps", "4000", "--params", "1M", "--disk", "50MB")


def test_a_plan_has_named_schedules_each_with_a_call_that_runs(
    ema: Ema, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uses the motion of an earlier run, if one is given."""
    result = ema(*PLANNED)
    assert (result.code, result.err) == (0, "")
    report = ema(*PLANNED, "--json").json
    rows = result.out.splitlines()[1:6]
    assert [row.split()[0] for row in rows] == [each["name"] for each in report["schedules"]]
    assert [row.split()[0] for row in rows if row.split()[1] == "*"] == [report["within_disk"]] == ["small"]
    monkeypatch.chdir(tmp_path)
    for each, line in zip(report["schedules"], re.findall(r"^ema = .*$", result.out, re.MULTILINE), strict=True):
        names: dict = {"PostHocEMA": PostHocEMA, "model": torch.nn.Linear(2, 1)}
        exec(line, names)
        settings = names["ema"].settings
        assert settings.sigma_rels == tuple(each["sigma_rels"])
        assert settings.schedule.checkpoint_every == each["checkpoint_every"]
        assert settings.schedule.max_checkpoints == each["max_checkpoints"]
        assert each["worst_error"] == max(each["predicted_error"])
    assert report["assumption"] == "the network moves evenly"
    like = ema(*PLANNED, "--like", run, "--json").json
    for one, other in zip(report["schedules"], like["schedules"], strict=True):
        assert one["worst_error"] != pytest.approx(other["worst_error"], rel=0.05)
    assert like["assumption"] == f"the network moves as in {run}"
    drawn = ema(*PLANNED[:-1], "1kB", "--out", "plan.png")
    assert "none is within --disk" in drawn.out
    assert drawn.out.splitlines()[-1] == "wrote plan.png"
    assert Path("plan.png").read_bytes()[:4] == b"\x89PNG"

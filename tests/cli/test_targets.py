"""`ema synthesize` of averages that are no power functions, and with a bound on the predicted error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from ema_command import Ema
from factories import contents, flip_bit
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis, synthesize
from posthoc_cli.targets import Beta, Between, ProfileFile, Window


@pytest.fixture
def ramp(tmp_path: Path) -> Path:
    path = tmp_path / "ramp.csv"
    path.write_text("time,density\n0,0\n2000,1\n")
    return path


def test_every_kind_at_once_each_into_a_file_of_its_name(ema: Ema, run: Path, tmp_path: Path, ramp: Path) -> None:
    result = ema(
        "synthesize", run, "--profile", ramp, "--between", "500:1500", "--window", "500", "--beta", "0.99,0.999",
        "--sigma-rel", "0.15", "--out", tmp_path / "averages",
    )  # fmt: skip
    assert result.code == 0
    targets = {
        "sigma_rel-0.15": 0.15,
        "beta-0.99": Beta(0.99),
        "beta-0.999": Beta(0.999),
        "window-500": Window(500),
        "between-500-1500": Between(500, 1500),
        "ramp": ProfileFile(ramp),
    }
    assert {p.name for p in (tmp_path / "averages").iterdir()} == {f"{name}.safetensors" for name in targets}
    expected = {
        name: list(values) for name, values in synthesize(plan_synthesis(disk_sources(run), [*targets.values()]))
    }
    for index, name in enumerate(targets):
        found = load_file(tmp_path / "averages" / f"{name}.safetensors")
        assert all(torch.equal(found[key], values[index]) for key, values in expected.items())


@pytest.mark.parametrize("more", [(), ("--verbose",), ("--method", "paper")])
def test_the_table_shows_the_error_of_every_target_and_the_last_line_the_largest(
    ema: Ema, run: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    arguments = ["synthesize", run, "--sigma-rel", "0.15", "--beta", "0.99", "--window", "500", *more]
    lines = ema(*arguments, "--out", tmp_path / "averages").out.splitlines()
    names = ["predicted error", "profile error"] if more else ["predicted error"]
    first = next(index for index, line in enumerate(lines) if line.startswith("target"))
    assert re.split(r" {2,}", lines[first]) == ["target", *names, "output"]
    rows = [re.split(r" {2,}", line) for line in lines[first + 1 : first + 4]]
    assert [row[0] for row in rows] == ["sigma_rel 0.15", "beta 0.99", "window 500"]
    assert [row[-1] for row in rows] == [
        f"{name}.safetensors" for name in ("sigma_rel-0.15", "beta-0.99", "window-500")
    ]
    report = ema(*arguments, "--dry-run", "--json").json
    errors = [name.replace(" ", "_") for name in names]
    for row, target in zip(rows, report["targets"], strict=True):
        assert row[1:-1] == [f"{100 * target[error]:.2g} %" for error in errors]
    worst = {name: max(t[error] for t in report["targets"]) for name, error in zip(names, errors, strict=True)}
    said = ", ".join(f"{name} up to {100 * error:.2g} %" for name, error in worst.items())
    newest = "training time of the newest snapshot: 2,000"
    assert lines[-1].startswith(f"made 3 averages at t = 2,000 from 40 snapshots, {newest}, {said}, 128 B each, in ")
    assert lines[-1].endswith(f": {tmp_path / 'averages'}")
    assert len({line.index(" %") for line in lines[first + 1 : first + 4]}) == 1  # aligned


def test_the_json_names_targets_of_every_kind(ema: Ema, run: Path, ramp: Path) -> None:
    arguments = ["--sigma-rel", "0.1", "--beta", "0.99,0.99", "--between", "500:1500,0:2e3", "--profile", ramp]
    report = ema("synthesize", run, *arguments, "--dry-run", "--json").json
    named = [(target["target"], target["sigma_rel"]) for target in report["targets"]]
    assert named == [
        ("sigma_rel 0.1", 0.1), ("beta 0.99", None), ("between 500:1500", None), ("between 0:2000", None),
        ("profile ramp.csv", None),
    ]  # fmt: skip
    assert all(0 < target["predicted_error"] < 0.1 for target in report["targets"])


def test_a_pattern_is_filled_in_by_any_target(ema: Ema, run: Path, tmp_path: Path) -> None:
    pattern = tmp_path / "ema-{target}.pt"
    assert ema("synthesize", run, "--sigma-rel", "0.10", "--window", "500", "--out", pattern).code == 0
    assert {p.name for p in tmp_path.glob("*.pt")} == {"ema-sigma_rel-0.1.pt", "ema-window-500.pt"}


# --- what is known ---------------------------------------------------------------------------------


def test_without_measurements_a_sample_tells_how_the_network_moved(ema: Ema, unmeasured_run: Path) -> None:
    report = ema("synthesize", unmeasured_run, "--sigma-rel", "0.15", "--dry-run", "--json").json
    assert report["movement"]["source"] == "sampled"
    assert report["targets"][0]["predicted_error"] > 0


def test_of_one_snapshot_no_error_is_predicted(ema: Ema, tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    with PostHocEMA.from_model(model, tmp_path / "one", sigma_rels=(0.05,), checkpoint_every=100) as tracker:
        for _ in range(100):
            tracker.update_(model)
    arguments = ["synthesize", tmp_path / "one", "--sigma-rel", "0.051"]
    report = ema(*arguments, "--dry-run", "--json").json
    assert report["targets"][0]["predicted_error"] is None
    assert report["movement"]["source"] == "assumed"
    made = ema(*arguments, "--out", tmp_path / "m.safetensors")
    assert re.search(r"^made .* from 1 snapshot, .*, predicted error unknown, 60 B", made.out, re.MULTILINE)
    refused = ema(*arguments, "--out", tmp_path / "other.safetensors", "--max-error", "0.5")
    assert refused.code == 1
    assert "cannot be predicted" in refused.error
    assert not (tmp_path / "other.safetensors").exists()


# --- --max-error -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.0001", "0.01%", "0.01 %", "1e-4"])
def test_what_would_be_too_inexact_is_not_made(ema: Ema, run: Path, tmp_path: Path, text: str) -> None:
    before = contents(tmp_path)
    arguments = ["synthesize", run, "--sigma-rel", "0.15,0.03", "--out", tmp_path / "averages"]
    result = ema(*arguments, "--max-error", text)
    assert (result.code, result.out) == (1, "")
    assert "sigma_rel 0.03: the predicted error is " in result.error or "sigma_rel 0.15: the" in result.error
    assert "0.01 %" in result.error
    assert contents(tmp_path) == before
    assert ema(*arguments, "--max-error", "99%").code == 0


def test_a_bound_on_the_error_is_held_before_tensors_are_read(ema: Ema, run: Path, tmp_path: Path) -> None:
    for path in run.glob("*.safetensors"):
        flip_bit(path)
    result = ema("synthesize", run, "--beta", "0.9", "--out", tmp_path / "m.safetensors", "--max-error", "1e-6")
    assert result.error.startswith("beta 0.9: the predicted error is ")


def test_a_huge_profile_is_not_read(ema: Ema, run: Path, tmp_path: Path) -> None:
    with (tmp_path / "mine.csv").open("wb") as file:
        file.truncate(10**9)  # without taking the space
    result = ema("synthesize", run, "--profile", tmp_path / "mine.csv", "--out", tmp_path / "out.safetensors")
    assert (result.code, result.out) == (2, "")
    assert "is larger than 100 MB" in result.error

"""`ema synthesize` of averages that are no power functions, and with a bound on the predicted error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors
from ema_command import Ema
from factories import contents, expected_error, flip_bit, rewrite_snapshot
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis, synthesize
from posthoc_cli.targets import Beta, Between, Decay, Window


def test_every_kind_at_once_each_into_a_file_of_its_name(ema: Ema, run: Path, tmp_path: Path) -> None:
    result = ema(
        "synthesize", run, "--target", "beta:0.99,0.999,0.99", "--target", "window:500", "--target", "between:500:1500",
        "--sigma-rel", "0.15", "--out", tmp_path / "of-{target}.safetensors", "--json",
    )  # fmt: skip
    targets = {
        "sigma_rel-0.15": 0.15, "beta-0.99": Beta(0.99), "beta-0.999": Beta(0.999), "window-500": Window(500),
        "between-500-1500": Between(500, 1500),
    }  # fmt: skip
    report = result.json["targets"]
    assert [(target["target"], target["sigma_rel"]) for target in report] == [
        ("sigma_rel 0.15", 0.15), ("beta:0.99", None), ("beta:0.999", None), ("window:500", None),
        ("between:500:1500", None),
    ]  # fmt: skip
    assert all(0 < target["predicted_error"] < 0.1 for target in report)
    assert [target["output"] for target in report] == [f"{tmp_path}/of-{name}.safetensors" for name in targets]
    made = dict(synthesize(plan_synthesis(disk_sources(run), [*targets.values()])))
    for index, target in enumerate(report):
        assert_same_tensors(load_file(target["output"]), {name: values[index] for name, values in made.items()})


@pytest.mark.parametrize("more", [(), ("--method", "paper")])
def test_the_table_shows_the_error_of_every_target_and_the_last_line_the_largest(
    ema: Ema, run: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    arguments = ["synthesize", run, "--sigma-rel", "0.15", "--target", "beta:0.99", "--target", "window:500", *more]
    lines = ema(*arguments, "--out", tmp_path / "averages").out.splitlines()
    names = ["predicted error", "profile error"] if more else ["predicted error"]
    first = next(index for index, line in enumerate(lines) if line.startswith("target"))
    assert re.split(r" {2,}", lines[first]) == ["target", *names, "output"]
    rows = [re.split(r" {2,}", line) for line in lines[first + 1 : first + 4]]
    assert [row[0] for row in rows] == ["sigma_rel 0.15", "beta:0.99", "window:500"]
    assert [row[-1] for row in rows] == [
        f"{name}.safetensors" for name in ("sigma_rel-0.15", "beta-0.99", "window-500")
    ]
    report = ema(*arguments, "--dry-run", "--json").json
    errors = [name.replace(" ", "_") for name in names]
    for row, target in zip(rows, report["targets"], strict=True):
        assert row[1:-1] == [f"{100 * target[error]:.2g} %" for error in errors]
    worst = {name: max(t[error] for t in report["targets"]) for name, error in zip(names, errors, strict=True)}
    said = ", ".join(f"{name} up to {100 * error:.2g} %" for name, error in worst.items())
    assert lines[-1].startswith(f"made 3 averages at t = 2,000 from 40 snapshots, {said}, 128 B each, in ")
    assert lines[-1].endswith(f": {tmp_path / 'averages'}")
    assert len({line.index(" %") for line in lines[first + 1 : first + 4]}) == 1  # aligned


def test_without_measurements_a_sample_tells_how_the_network_moved(ema: Ema, unmeasured_run: Path) -> None:
    report = ema("synthesize", unmeasured_run, "--sigma-rel", "0.15", "--dry-run", "--json").json
    assert report["movement"]["source"] == "sampled"
    assert report["targets"][0]["predicted_error"] > 0


def test_of_one_snapshot_without_sketch_no_error_is_predicted(ema: Ema, tmp_path: Path) -> None:
    """Before training ends, a picture judges it as a schedule."""
    model, out = torch.nn.Linear(4, 3), tmp_path / "m.safetensors"
    with PostHocEMA.from_model(model, tmp_path / "one", sigma_rels=(0.05,), checkpoint_every=100) as tracker:
        for _ in range(100):
            tracker.update_(model)
    for path in (tmp_path / "one").glob("*.safetensors"):
        rewrite_snapshot(path, sketch="")
    arguments = ["synthesize", tmp_path / "one", "--sigma-rel", "0.051", "--out"]
    made = ema(*arguments, out)
    assert re.search(r"^made .* from 1 snapshot, predicted error unknown, 60 B", made.out, re.MULTILINE)
    report = ema(*arguments, out, "--overwrite", "--json").json
    assert report["targets"][0]["predicted_error"] is None
    assert report["movement"]["source"] == "assumed"
    assert "cannot be predicted" in ema(*arguments, tmp_path / "other.safetensors", "--max-error", "0.5").error
    assert not (tmp_path / "other.safetensors").exists()
    (curve,) = ema("error-plot", tmp_path / "one", "--sigma-range", "0.05:0.28", "--json").json["curves"]
    assert curve["label"].endswith("/one: 1 snapshot up to 100 steps, if the network moves evenly")
    assert curve["predicted_error"][-1] == pytest.approx(expected_error(0.28, (0.05,), (100,), 0.0), rel=0.01)


@pytest.mark.parametrize("text", ["0.0001", "0.01%", "0.01 %", "1e-4"])
def test_what_would_be_too_inexact_is_not_made_and_no_tensor_is_read(
    ema: Ema, run: Path, tmp_path: Path, text: str
) -> None:
    arguments = ["synthesize", run, "--sigma-rel", "0.15,0.03", "--out", tmp_path / "averages"]
    assert ema(*arguments, "--max-error", "99%").code == 0
    for path in run.glob("*.safetensors"):
        flip_bit(path)
    before = contents(tmp_path)
    result = ema(*arguments, "--overwrite", "--max-error", text)
    assert (result.code, result.out) == (1, "")
    assert re.match(r"sigma_rel 0\.(03|15): the predicted error is ", result.error)
    assert "0.01 %" in result.error
    assert contents(tmp_path) == before


def test_a_decay_and_the_mean_of_the_last_ones(ema: Ema, run: Path, tmp_path: Path) -> None:
    for path in run.glob("*-0.28.safetensors"):
        path.unlink()
    result = ema(
        "synthesize", run, "--target", "decay:linear:30%", "--target", "last:3",
        "--out", tmp_path / "{target}.safetensors", "--dtype", "float64", "--json",
    )  # fmt: skip
    decay, mean = result.json["targets"]
    assert (decay["target"], mean["target"]) == ("decay:linear:30%", "last:3")
    last = [load_file(run / f"{step:016}-0.05.safetensors")["0.weight"].double() for step in (1800, 1900, 2000)]
    torch.testing.assert_close(
        load_file(tmp_path / "last-3.safetensors")["0.weight"], sum(last) / 3, rtol=1e-6, atol=1e-7
    )
    plan = plan_synthesis(disk_sources(run), [Decay("linear", 0.3)], dtype="float64")
    assert decay["predicted_error"] == plan.predicted_error(0)

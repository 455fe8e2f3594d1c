"""The command `ema synthesize`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from checking import assert_same_tensors
from ema_command import Ema
from factories import contents, flip_bit, rewrite_snapshot
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA


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
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["sigma_rel-0.01.safetensors"]


def test_a_dry_run_reads_headers_only_and_writes_nothing(ema: Ema, run: Path) -> None:
    for path in run.glob("*.safetensors"):  # a dry run must not read the damaged tensors
        flip_bit(path)
    before = contents(run)
    result = ema("synthesize", run, "--sigma-rel", "0.15", "--dry-run")
    assert result.code == 0
    assert "nothing was written" in result.out
    for when in ("--t", "--step"):
        (target,) = ema("synthesize", run, "--sigma-rel", "0.15", when, "1000", "--dry-run", "--json").json["targets"]
        assert (target["t"], target["output"]) == (1000, None)
        assert all(int(s["file"].split("-")[0]) <= 1000 for s in target["snapshots"])
    assert contents(run) == before


def test_no_error_is_predicted_from_one_snapshot_without_a_sketch(ema: Ema, tmp_path: Path) -> None:
    """The picture of such a run assumes even motion, as that of a schedule."""
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


def test_an_average_with_too_large_an_error_is_not_made_and_no_tensor_is_read(
    ema: Ema, run: Path, tmp_path: Path
) -> None:
    arguments = ["synthesize", run, "--sigma-rel", "0.15,0.03", "--out", tmp_path / "averages"]
    assert ema(*arguments, "--max-error", "99%").code == 0
    for path in run.glob("*.safetensors"):
        flip_bit(path)
    before = contents(tmp_path)
    result = ema(*arguments, "--overwrite", "--max-error", "0.01 %")
    assert (result.code, result.out) == (1, "")
    assert re.match(r"sigma_rel 0\.(03|15): the predicted error is ", result.error)
    assert "0.01 %" in result.error
    assert contents(tmp_path) == before

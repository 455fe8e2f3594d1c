"""Trainings of the frameworks in processes of their own, of which some are killed."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.programs import heavy, train
from integrations.truth import distance, exact

pytest.importorskip(
    "lightning.pytorch", reason="lightning is not installed: make integrations installs it"
)
accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: make integrations installs it"
)
pytest.importorskip("diffusers", reason="diffusers is not installed: make integrations installs it")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: make integrations installs it"
)

pytestmark = pytest.mark.xdist_group("frameworks")  # one server that has imported them

KILLED = {
    "llama": (7, 4),
    "digits": (7, 4),
    "batches": (13, 2),
    "unet": (7, 4),
}
"""By program the step, or the batch, that kills it, and the step of the checkpoint before."""


KINDS = [
    "alone",
    pytest.param("ddp", marks=heavy),
    pytest.param("sharded", marks=heavy),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", KILLED)
def test_a_killed_training_resumes_exactly_and_evaluates_the_average(
    tmp_path: Path,
    program: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each step counts once, also those before the kill that the checkpoint lacks; every process
    has one average, and none waits for processes that have no tracker."""
    is_sharded = kind == "sharded"
    if is_sharded and program == "llama" and transformers.__version__ < "5":
        pytest.skip("transformers 4 shards models on accelerators only")
    if is_sharded and program == "unet":
        pytest.skip("scripts of diffusers shard no models")
    killed_at, saved = KILLED[program]
    complete = tmp_path / "complete"
    resumed = tmp_path / "resumed"
    ranks = 1 if kind == "alone" else 2
    assert train(program, complete, kind) == [0] * ranks
    codes = train(program, resumed, kind, killed_at)
    assert -signal.SIGKILL in codes
    assert 0 not in codes  # the other process may fail without the killed one
    assert [*resumed.glob("ema/*4-*")]  # snapshots that are later than the checkpoint of `batches`
    if is_sharded and program != "digits":  # which continues from a snapshot
        (state,) = resumed.rglob("posthoc_ema")
        assert len([*state.glob("*.distcp")]) == 2
    assert train(program, resumed, kind, resumes=True) == [0] * ranks
    within = 1e-6
    if is_sharded and program == "digits":
        within = 1e-4  # snapshots are rounded to float16
    weights, *_ = torch.load(complete / "made-0.pt")
    for rank in range(ranks):
        if rank == 1 and program == "unet":
            continue  # the first process alone keeps averages
        check_averages(complete / f"made-{rank}.pt", [], within)
        last = check_averages(resumed / f"made-{rank}.pt", weights[:saved], within)
        if program not in RESTARTING:
            assert distance(last, weights[-1]) == 0
    assert not [*tmp_path.glob("*/none")]
    assert "waiting for" not in capsys.readouterr().out


RESTARTING = {"digits"}
"""This release of Lightning restarts the data of an epoch when it resumes within one."""
if accelerate.__version__.startswith("1.10."):
    RESTARTING.add("batches")  # it saves no state of the optimizer with FSDP2


def check_averages(made: Path, before: list[Any], within: float) -> dict[str, torch.Tensor]:
    """Check the averages of a program that began after some steps; return its last weights."""
    weights, average, step, evaluated, *stored = torch.load(made)
    history = before + weights
    assert step == len(history)
    assert distance(average, exact(history, 0.2)) < within
    assert distance(evaluated, exact(history, 0.2)) < within
    if stored:
        last, in_checkpoint = stored
        assert distance(in_checkpoint, exact(history[:last], 0.2)) < within
    return weights[-1]

"""Trainings of the frameworks in processes of their own, of which some are killed."""

import signal

import pytest
import torch
from checking import heavy
from integrations.programs import train
from truth import distance, exact

pytest.importorskip("lightning.pytorch")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("frameworks")  # one server that has imported them

SAVED = {
    "llama": 4,
    "digits": 4,
    "batches": 2,
    "unet": 4,
}
"""By program the step of the checkpoint before the kill."""


@heavy
@pytest.mark.parametrize("kind", ["alone", "ddp", "sharded"])
@pytest.mark.parametrize("program", SAVED)
def test_a_killed_training_resumes_exactly_and_evaluates_the_average(
    tmp_path,
    program,
    kind,
):
    """Each step counts once, also those before the kill that the checkpoint lacks, which are
    repeated; every process has one average, and none waits for processes that have no tracker."""
    is_sharded = kind == "sharded"
    if is_sharded and program == "llama" and transformers.__version__ < "5":
        pytest.skip("transformers 4 shards models on accelerators only")
    if is_sharded and program == "unet":
        pytest.skip("scripts of diffusers shard no models")
    saved = SAVED[program]
    ranks = 1 if kind == "alone" else 2
    codes = train(program, tmp_path, kind, resumes=False)
    assert -signal.SIGKILL in codes
    assert 0 not in codes  # the other process may fail without the killed one
    assert [*tmp_path.glob("ema/*4-*")]  # snapshots that are later than the checkpoint of `batches`
    if is_sharded and program != "digits":  # which continues from a snapshot
        (state,) = tmp_path.rglob("posthoc_ema")
        assert len([*state.glob("*.distcp")]) == 2
    before = torch.load(next(tmp_path.glob("before-*")))
    assert len(before) > saved
    assert train(program, tmp_path, kind, resumes=True) == [0] * ranks
    within = 1e-6
    if is_sharded and program == "digits":
        within = 1e-4  # snapshots are rounded to float16
    for rank in range(ranks):
        if rank == 1 and program == "unet":
            continue  # the first process alone keeps averages
        weights = check_averages(tmp_path / f"made-{rank}.pt", before[:saved], within)
        if program not in RESTARTING:
            for repeated, first in zip(weights, before[saved:], strict=False):
                assert distance(repeated, first) == 0
    assert not (tmp_path / "none").exists()


RESTARTING = {"digits"}
"""This release of Lightning restarts the data of an epoch when it resumes within one."""
if accelerate.__version__.startswith("1.10."):
    RESTARTING.add("batches")  # it saves no state of the optimizer with FSDP2


def check_averages(made, before, within):
    """Check the averages of a program that began after some steps; return its weights."""
    weights, average, step, evaluated, *stored = torch.load(made)
    history = before + weights
    assert step == len(history)
    assert distance(average, exact(history, 0.2)) < within
    assert distance(evaluated, exact(history, 0.2)) < within
    if stored:
        last, in_checkpoint = stored
        assert distance(in_checkpoint, exact(history[:last], 0.2)) < within
    return weights

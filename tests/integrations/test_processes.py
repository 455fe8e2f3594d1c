"""Trainings of the frameworks in processes of their own, of which some are killed."""

import signal
from pathlib import Path

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


@pytest.mark.parametrize(
    "kind", ["alone", pytest.param("ddp", marks=heavy), pytest.param("sharded", marks=heavy)]
)
@pytest.mark.parametrize("program", KILLED)
def test_a_killed_training_resumes_exactly_and_evaluates_the_average(
    tmp_path: Path,
    program: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each step counts once, also those before the kill that the checkpoint lacks; every process
    has one average, and none waits for processes that have no tracker."""
    if kind == "sharded" and program == "llama" and transformers.__version__ < "5":
        pytest.skip("transformers 4 shards models on accelerators only")
    if kind == "sharded" and program == "unet":
        pytest.skip("scripts of diffusers shard no models")
    killed_at, saved = KILLED[program]
    ranks = range(1 if kind == "alone" else 2)
    assert train(program, tmp_path / "complete", kind) == [0 for _ in ranks]
    weights, *_ = torch.load(tmp_path / "complete/made-0.pt")
    codes = train(program, tmp_path, kind, killed_at)
    assert -signal.SIGKILL in codes
    assert 0 not in codes  # the other process may fail without the killed one
    assert [*tmp_path.glob("ema/*4-*")]  # snapshots that are later than the checkpoint of `batches`
    if kind == "sharded" and program != "digits":  # which continues from a snapshot
        (state,) = (one for one in tmp_path.rglob("posthoc_ema") if "complete" not in str(one))
        assert len([*state.glob("*.distcp")]) == 2
    assert train(program, tmp_path, kind, resumes=True) == [0 for _ in ranks]
    for folder, begin in (
        (tmp_path / "complete", []),
        (tmp_path, weights[:saved]),
    ):
        # of `unet` the first process alone keeps averages
        for rank in ranks[:1] if program == "unet" else ranks:
            own, average, step, evaluated, *stored = torch.load(folder / f"made-{rank}.pt")
            history = begin + own
            assert step == len(history)
            for found, last in (
                (average, step),
                (evaluated, step),
                *([stored[::-1]] if stored else []),
            ):
                # snapshots are rounded to float16
                within = 1e-4 if (program, kind) == ("digits", "sharded") else 1e-6
                assert distance(found, exact(history[:last], 0.2)) < within
            # This release of Lightning restarts the data of an epoch when it resumes within one.
            # accelerate 1.10 saves no state of the optimizer with FSDP2, and continues without it.
            if program in ("llama", "unet") or (
                program == "batches" and accelerate.__version__[:5] != "1.10."
            ):
                assert distance(own[-1], weights[-1]) == 0
    assert not (tmp_path / "none").exists()
    assert "waiting for" not in capsys.readouterr().out

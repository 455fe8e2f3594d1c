"""DeepSpeed ZeRO-1 and ZeRO-2 on the CPU, with the real library: `update_` after each step, and a
state to resume."""

import signal

import pytest
import torch

pytest.importorskip("deepspeed")

import forked
from checking import heavy
from integrations.programs import exit_codes_of_two
from truth import distance, exact

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the library's own
    heavy,
]


def train(folder, stage, resumes=0, killed_at=-1):
    program = forked.program("deepspeed_training")
    return exit_codes_of_two(program, folder, stage, resumes, killed_at, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("stage", [1, 2])
def test_updates_are_exact_and_a_killed_training_resumes(tmp_path, stage):
    assert train(tmp_path, stage, killed_at=9) == [-signal.SIGKILL, -signal.SIGKILL]
    assert train(tmp_path, stage, resumes=1) == [0, 0]
    weights, step, average = torch.load(tmp_path / "made.pt")
    assert step == len(weights) == 6
    assert distance(average, exact(weights, 0.2)) < 1e-6

"""The tracker within accelerate, with the real library."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from groups import check_group, run_group

pytest.importorskip("accelerate", reason="accelerate is not installed: make integrations installs it")

import accelerate
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from integrations.programs import FRAMEWORKS, forget, heavy, skip_steps, start, use_fsdp_on_the_cpu
from integrations.truth import assert_exact, distance, exact, recorded

from posthoc_cli.errors import MismatchError
from posthoc_cli.integrations import STATE_NAME, read_state
from posthoc_cli.integrations.accelerate import prepare

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

EVERY: dict[str, Any] = {"update_every": 1, "checkpoint_every": 4, "sigma_rels": (0.1, 0.2)}
X = torch.randn(60, 4, generator=torch.manual_seed(5))


class Training:
    """A training of fifteen batches with a step after every third one, which saves after the second step."""

    def __init__(
        self, folder: Path, before: bool = False, sharded: bool = False, resume: str | None = None, **arguments: Any
    ) -> None:
        torch.manual_seed(0)
        every = EVERY | {"resume": resume}
        if sharded:
            use_fsdp_on_the_cpu()
            arguments["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        self.accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True, **arguments)
        self.folder, bare = folder, torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1))
        plain = torch.optim.Adam(bare.parameters(), lr=0.05)
        if before:
            self.ema = prepare(self.accelerator, bare, folder / "ema", plain, **every)
        self.model, self.optimizer = self.accelerator.prepare(bare, plain)
        if not before:
            self.ema = prepare(self.accelerator, self.model, folder / "ema", self.optimizer, **every)
        self.weights: list[dict[str, torch.Tensor]] = []

    def run(self, first: int = 0, killed_at: int = 0) -> None:
        for number in range(first, 15):
            with self.accelerator.accumulate(self.model):
                loss = self.model(X[number * 4 : number * 4 + 4]).square().mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped:
                self.weights.append(recorded(self.accelerator.unwrap_model(self.model)))
            if number == 5:
                self.accelerator.save_state(str(self.folder / "saved"))
            if number == killed_at > 0:
                self.ema.flush()
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("before", [False, True])
def test_accumulated_steps_count_once(tmp_path: Path, before: bool) -> None:
    training = Training(tmp_path, before)
    training.run()
    assert len(training.weights) == 5
    assert_exact(training.ema, training.model, training.weights)


def test_a_skipped_step_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_steps(monkeypatch, (6,))
    training = Training(tmp_path)
    training.run()
    assert len(training.weights) == 4
    assert_exact(training.ema, training.model, training.weights)


def test_a_killed_training_resumes_exactly(tmp_path: Path) -> None:
    """Killed after the first snapshot, whose step is later than that of the state."""
    program = (
        "import sys, warnings; warnings.simplefilter('ignore'); from pathlib import Path\n"
        "from integrations.test_accelerate import Training\nTraining(Path(sys.argv[1])).run(killed_at=13)"
    )
    assert start(program, tmp_path).wait(250) == -signal.SIGKILL
    assert (tmp_path / "saved/posthoc_ema.pt").exists()
    assert list((tmp_path / "ema").glob("*.safetensors"))
    assert not list((tmp_path / "saved").glob("custom_checkpoint*"))
    complete = Training(tmp_path / "complete")
    complete.run()
    complete.ema.close()
    forget()
    resumed = Training(tmp_path, resume="auto")
    resumed.accelerator.load_state(str(tmp_path / "saved"))
    assert resumed.ema.step == 2
    resumed.run(first=6)
    assert distance(resumed.weights[-1], complete.weights[-1]) == 0
    assert_exact(resumed.ema, resumed.model, complete.weights)


def generator_and_critic(folder: Path) -> tuple[Accelerator, list[Any]]:
    """Return an accelerator and, for each of two models, the model, its optimizer and its tracker."""
    forget()
    accelerator, prepared = Accelerator(cpu=True), []
    for name in ("generator", "critic"):
        bare = torch.nn.Linear(4, 4)
        model, optimizer = accelerator.prepare(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
        prepared.append((model, optimizer, prepare(accelerator, model, folder / name, optimizer, **EVERY)))
    return accelerator, prepared


def test_each_of_several_models_resumes_from_its_own_state(tmp_path: Path) -> None:
    weights: list[list[Any]] = [[], []]
    for steps in (range(5), range(5, 8)):
        accelerator, prepared = generator_and_critic(tmp_path)
        if steps.start:
            accelerator.load_state(str(tmp_path / "saved"))
        for number in steps:
            for (model, optimizer, _), history in zip(prepared, weights, strict=True):
                accelerator.backward(model(X[4 * number : 4 * number + 4]).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                history.append(recorded(model))
        accelerator.save_state(str(tmp_path / "saved"))
        for (model, _, ema), history in zip(prepared, weights, strict=True):
            assert_exact(ema, model, history)
            ema.close()


GROUP = """
import integrations.programs, integrations.truth, torch, warnings
from integrations.test_accelerate import Training
warnings.simplefilter("ignore")
integrations.programs.announce(rank, world)
training = Training(folder, sharded="sharded" in arguments, resume="auto")
if "resumed" in arguments:
    training.accelerator.load_state(str(folder / "saved"))
    assert training.ema.step == 2
training.run(first=6 if "resumed" in arguments else 0, killed_at=13 if "killed" in arguments else 0)
assert training.ema.step == 5
with training.ema.model(training.model, 0.2) as averaged:
    found = {name.removeprefix("module."): value for name, value in integrations.truth.recorded(averaged).items()}
torch.save([training.weights, found], folder / f"made-{rank}.pt")
training.ema.close()
"""


@heavy
def test_two_processes_have_one_average(tmp_path: Path) -> None:
    check_group(GROUP, 2, tmp_path, modules=FRAMEWORKS)
    (weights, first), (_, second) = (torch.load(tmp_path / f"made-{rank}.pt") for rank in (0, 1))
    assert distance(first, exact(weights, 0.2)) < 1e-6
    assert distance(second, first) == 0


@heavy
def test_a_killed_training_of_a_sharded_model_resumes_exactly(tmp_path: Path) -> None:
    check_group(GROUP, 2, tmp_path / "complete", "sharded", modules=FRAMEWORKS)
    weights, _ = torch.load(tmp_path / "complete/made-0.pt")
    killed = run_group(GROUP, 2, tmp_path, "sharded", "killed", modules=FRAMEWORKS)
    assert -signal.SIGKILL in {result.code for result in killed}  # the other process may fail without it
    assert len(list((tmp_path / "saved/posthoc_ema").glob("*.distcp"))) == 2
    check_group(GROUP, 2, tmp_path, "sharded", "resumed", modules=FRAMEWORKS)
    for rank in (0, 1):
        resumed, average = torch.load(tmp_path / f"made-{rank}.pt")
        # accelerate 1.10 saves no state of the optimizer with FSDP2, and continues without it.
        assert accelerate.__version__.startswith("1.10.") or distance(resumed[-1], weights[-1]) == 0
        assert distance(average, exact(weights[:2] + resumed, 0.2)) < 1e-6


def test_a_checkpoint_with_states_of_two_saves_is_refused(tmp_path: Path) -> None:
    """A checkpoint that was saved again by another arrangement of processes keeps the earlier state."""
    ema = Training(tmp_path).ema
    assert not read_state(ema, tmp_path)
    (tmp_path / f"{STATE_NAME}.pt").touch()
    (tmp_path / STATE_NAME).mkdir()
    with pytest.raises(MismatchError, match=rf"{STATE_NAME}\.pt and .*{STATE_NAME}.*two saves"):
        read_state(ema, tmp_path)

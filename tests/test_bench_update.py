"""The benchmark of updates: it runs, everyone in it updates averages, and what is not there is a line that says so."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
from pathlib import Path

import bench_update
import busy
import pytest
import quiet_timing
import torch
import update_cases
from quiet_timing import Seconds
from synthesis_cases import Layers, without_noise
from update_cases import contenders

from posthoc_cli import PostHocEMA

GOALS = 4 * 2 + 2


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_timing, "PATIENCE", 0.0)


@pytest.mark.usefixtures("_impatient")
def test_beside_busy_processes_every_goal_is_judged_and_none_of_them_is_left(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def begin(*arguments: object) -> subprocess.Popen[bytes]:
        begun.append(real(*arguments))  # type: ignore[call-overload]
        return begun[-1]

    monkeypatch.setattr(busy.subprocess, "Popen", begin)
    bench_update.main(["--quick", "--busy", "--folder", str(tmp_path)])
    goals = capsys.readouterr().out.split("Goals:\n")[1].splitlines()
    assert [line.split(":")[0].rpartition(", ")[2] for line in goals] == ["quiet", "quiet", "busy", "busy"]
    assert all(line.split()[0] in ("met", "MISSED") for line in goals[2:])
    assert len(begun) == 1
    assert begun[0].returncode is not None


@pytest.mark.usefixtures("_impatient")
def test_every_goal_is_judged_and_what_is_not_there_is_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        update_cases.importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench_update.main(["--quick", "--device", "cuda", "--folder", str(tmp_path)])
    out = capsys.readouterr().out
    assert "torch finds none" in out
    assert "accelerators: not run" in out
    lines = [line for line in out.splitlines() if line.startswith("  diffusers")]
    assert len(lines) == 2 * (2 + 3)
    assert all(line.endswith("not installed") for line in lines)
    goals = out.split("Goals:\n")[1].splitlines()
    assert len(goals) == GOALS
    assert all(line.split()[0] in ("met", "MISSED", "NOT") for line in goals)
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.usefixtures("_impatient")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_benchmark_runs_on_an_accelerator(capsys: pytest.CaptureFixture[str]) -> None:
    bench_update.main(["--quick", "--device", "cuda"])
    out = capsys.readouterr().out
    assert "accelerators: not run" not in out
    assert "% of a step" in out.split("Goals:\n")[1]
    assert "memory in staging buffers" in out.split("Goals:\n")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_everyone_elses_changes_two_averages_of_the_dtype_that_is_shown(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """No private names: the averages are the tensors of this process that have changed."""
    shape = (37, 41)
    for index, who in enumerate(contenders(dtype, "cpu")):
        if not who.installed or who.role not in ("PyPI peer", "other"):
            continue
        with without_noise():
            model = Layers({"layers.0.weight": shape, "layers.1.weight": shape}).to(dtype)
            updates = who.start(model, tmp_path / str(index))
            updates.update()
            with torch.no_grad():
                model.layers[1].fill_(1e5)
            tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
            # A parameter and its detached self are two objects and one tensor.
            kept = {item.data_ptr(): (item, item.detach().clone()) for item in tensors if tuple(item.shape) == shape}
            updates.update()
            updates.settle()
        changed = [now for now, before in kept.values() if not torch.allclose(now, before, rtol=1e-3)]
        assert len(changed) == 2, who.label
        assert {now.dtype for now in changed} == {who.average_dtype or dtype}, who.label
        del tensors, kept, changed


def test_ours_is_compared_with_its_averages_where_the_others_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_model(model: torch.nn.Module, checkpoint_dir: Path, device: str | None = None) -> None: ...

    monkeypatch.setattr(PostHocEMA, "from_model", from_model)
    field = contenders(torch.float32, "cuda:0")
    assert [who.label for who in field if who.role == "ours"] == [
        "ours, averages on device='cpu'",
        "ours, averages on device='model'",
    ]
    found = [(who, Seconds((float(index),), 0)) for index, who in enumerate(field)]
    assert bench_update._ours_beside(found).median == 1.0
    assert update_cases.our_places("cpu") == [None]


@pytest.mark.parametrize("writes_later", [False, True])
def test_the_stall_is_what_the_call_takes_and_durable_what_flush_waits_for(
    writes_later: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]

    class Tracker:
        step = 0
        pending = 0.0

        def update_(self, _: torch.nn.Module) -> None:
            self.step += 1
            now[0] += 1.0
            if self.step % bench_update.CALLS_BETWEEN_CHECKPOINTS == 0:
                now[0] += 0.5 if writes_later else 20.0
                self.pending = 19.5 if writes_later else 0.0

        def flush(self) -> None:
            now[0] += self.pending
            self.pending = 0.0

    monkeypatch.setattr(bench_update, "start_tracker", lambda *_: Tracker())
    monkeypatch.setattr(bench_update.time, "perf_counter", lambda: now[0])
    rounds = bench_update.CheckpointRounds(torch.nn.Linear(1, 1), tmp_path, "cpu", None)
    rounds.wait()
    rounds.go_on()
    assert rounds.usual == [1.0] * 6
    assert rounds.due == rounds.due_before_next == [1.5 if writes_later else 21.0]
    assert rounds.next == [1.0]
    assert rounds.durable == [21.0]

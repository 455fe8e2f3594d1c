"""The step from which a run is resumed: the model's weights are compared with a sample that every snapshot holds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from factories import rewrite_snapshot
from groups import check_group
from integrations.truth import recorded
from safetensors.torch import load_file
from tracker.runs import as_if_killed, contents, times, tracked_error

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import FileFormatError, ModelMismatchError
from posthoc_cli.snapshots.codecs import decode_sample
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.path import Moment, locate

SETTINGS: dict[str, Any] = {"update_every": 1, "checkpoint_every": 40, "checkpoint_dtype": None}
OFF = (
    r"model: its weights are not on the path of the run in .*restore the model's checkpoint first.*resume=\d+.*another"
)


class Training:
    """A regression by Adam or SGD whose batches depend on the step's number; `path` holds the weights of all steps."""

    def __init__(self, seed: int = 0, kind: str = "adam", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4)).to(dtype)
        parameters = [*self.model.parameters()]
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=3e-3)
        if kind == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=0.9)
        self.task = torch.randn(8, 4, generator=torch.Generator().manual_seed(99))
        self.path: list[dict[str, torch.Tensor]] = []

    def run(self, first: int, last: int, ema: PostHocEMA | None = None) -> Training:
        for number in range(first, last + 1):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
            y = torch.sin(x @ self.task) + 0.3 * torch.randn(16, 4, generator=torch.Generator().manual_seed(-number))
            self.optimizer.zero_grad()
            (self.model(x.to(self.model[0].weight.dtype)).float() - y).square().mean().backward()
            self.optimizer.step()
            self.path.append(recorded(self.model))
            if ema is not None:
                ema.update_(self.model)
        return self

    def checkpoint(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def restored(self, checkpoint: Mapping[str, Any]) -> Training:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        return self


def finished(folder: Path, last: int = 200, saved: Sequence[int] = (), kind: str = "adam", **settings: Any) -> Any:
    """Return a training up to step `last`, and its checkpoints of the steps in `saved`."""
    training, checkpoints = Training(kind=kind), {}
    with PostHocEMA.from_model(training.model, folder, **SETTINGS | settings) as ema:
        for step in range(1, last + 1):
            training.run(step, step, ema)
            if step in saved:
                checkpoints[step] = training.checkpoint()
    return training, checkpoints


def error(ema: PostHocEMA, path: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Return the largest error of a tensor of the averages against that over the weights of a path."""
    assert ema.t == len(path)
    values = {name: np.stack([weights[name].numpy() for weights in path]) for name in path[0]}
    return max(tracked_error(ema, name, value, range(1, len(path) + 1)) for name, value in values.items())


def resumed(model: torch.nn.Module, folder: Path, way: str = "from_model") -> PostHocEMA:
    if way == "from_path":
        return PostHocEMA.from_path(folder, model)
    return PostHocEMA.from_model(model, folder, **SETTINGS, resume="auto")


# --- weights that are on the path, and others


@pytest.mark.parametrize("way", ["from_model", "from_path"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("last", [200, 41, 75])
def test_a_run_is_not_resumed_with_fresh_weights(tmp_path: Path, way: str, seed: int, last: int) -> None:
    """Nor with the weights that the run began with, nor if it has only one snapshot on the schedule."""
    finished(tmp_path, last)
    as_if_killed(tmp_path)
    before = contents(tmp_path)
    fresh = Training(seed)
    ema = resumed(fresh.model, tmp_path, way)
    for step in (1, 2):  # every call raises the error
        with pytest.raises(ModelMismatchError, match=OFF):
            fresh.run(step, step, ema)
    assert contents(tmp_path) == before
    assert not (tmp_path / "superseded").exists()
    ema.load_into(fresh.model, 0.15)  # any model may be filled
    with PostHocEMA.from_model(Training().model, tmp_path / "new", **SETTINGS) as other:
        other.update_(fresh.model)


@pytest.mark.parametrize("way", ["from_model", "from_path"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_weights_of_an_earlier_checkpoint_resume_from_the_snapshots_before_it(
    tmp_path: Path, way: str, late: bool, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint of step 100 resumes from step 80: steps 81 to 100 are missing in averages, and none counts twice."""
    first, checkpoints = finished(tmp_path, 200, saved=[100], kind=kind)
    again = Training(seed=3, kind=kind)
    if not late:
        again.restored(checkpoints[100])
    ema = resumed(again.model, tmp_path, way)
    again.restored(checkpoints[100])
    with ema:
        again.run(101, 240, ema)
        assert error(ema, [*first.path[:80], *again.path]) < 1e-6
    assert times(tmp_path) == {40, 80, 120, 160, 200, 220}
    (record,) = (record for record in caplog.records if "continuing at step 80" in record.getMessage())
    assert record.levelno == logging.WARNING
    assert "later snapshots, up to step 200, will be set aside" in record.getMessage()
    assert len(list((tmp_path / "superseded").iterdir())) == 6


def test_the_step_is_right_as_soon_as_the_tracker_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, checkpoints = finished(tmp_path, 200, saved=[80, 100])
    for step, expected in ((80, 80), (100, 80)):
        assert resumed(Training(seed=3).restored(checkpoints[step]).model, tmp_path).step == expected
    ema = resumed(first.model, tmp_path)
    assert ema.step == 200
    assert caplog.messages[-1] == f"{tmp_path}: continuing at step 200, where the model's weights are"
    with ema:
        first.run(201, 210, ema)
        assert error(ema, first.path) < 1e-6
    assert not (tmp_path / "superseded").exists()


@pytest.mark.parametrize("last", [41, 79, 95, 119, 239])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_checkpoint_that_is_newer_than_the_snapshots_resumes_from_them(tmp_path: Path, last: int, kind: str) -> None:
    """A kill leaves such a checkpoint. The steps since the newest snapshot are missing in the averages."""
    first, checkpoints = finished(tmp_path, last, saved=[last], kind=kind)
    as_if_killed(tmp_path)
    newest = last // 40 * 40
    again = Training(seed=3, kind=kind).restored(checkpoints[last])
    with resumed(again.model, tmp_path) as ema:
        assert ema.step == newest
        again.run(last + 1, last + 30, ema)
        assert error(ema, [*first.path[:newest], *again.path]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [160, 170, 200])
def test_a_checkpoint_in_half_precision_resumes_the_run(tmp_path: Path, dtype: torch.dtype, step: int) -> None:
    _, checkpoints = finished(tmp_path, 200, saved=[step])
    again = Training(seed=3).restored(checkpoints[step])
    for parameter in again.model.parameters():
        parameter.data.copy_(parameter.data.to(dtype))
    assert resumed(again.model, tmp_path).step == step // 40 * 40


@pytest.mark.parametrize("way", ["from_model", "from_path"])
def test_a_large_first_step_is_accepted_if_the_model_was_on_the_path_when_the_tracker_was_made(
    tmp_path: Path, way: str
) -> None:
    """Snapshots of every fourth step say little about the size of a step."""
    first, _ = finished(tmp_path, 40, checkpoint_every=4, kind="sgd")
    ema = resumed(first.model, tmp_path, way)
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.add_(0.3 * parameter.square().mean().sqrt() * torch.randn_like(parameter))
    ema.update_(first.model)
    assert ema.step == 41


def test_weights_that_do_not_move_resume_from_the_newest_snapshot(tmp_path: Path) -> None:
    still = Training()
    for last in (80, 160):
        with resumed(still.model, tmp_path) as ema:
            for _ in range(80):
                ema.update_(still.model)
            assert ema.step == last


def test_a_requested_step_is_used_whatever_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, checkpoints = finished(tmp_path, 200, saved=[120, 160])
    for named, weights, where in (
        (160, None, "not on the run's path"),
        (160, 120, "those of step 120, or a little later"),
        (120, 120, None),
    ):
        caplog.clear()
        training = Training(seed=1)
        if weights is not None:
            training.restored(checkpoints[weights])
        with PostHocEMA.from_path(tmp_path, training.model, step=named) as ema:
            training.run(1, 1, ema)
            assert ema.step == named + 1
        as_if_killed(tmp_path)
        texts = [text for text in caplog.messages if "as requested" in text]
        expected = f"{tmp_path}: the averages continue from step {named}, as requested; the model's weights are {where}"
        assert texts == ([] if where is None else [expected])


def test_an_exact_state_is_used_if_it_is_of_the_models_place(tmp_path: Path) -> None:
    exact = {"keep_state": True, "checkpoint_dtype": "bfloat16"}
    settings = SETTINGS | exact
    first, checkpoints = finished(tmp_path, 200, saved=[100], **exact)
    with PostHocEMA.from_model(first.model, tmp_path, **settings, resume="auto") as ema:
        first.run(201, 210, ema)
        assert error(ema, first.path) < 1e-6
    again = Training().restored(checkpoints[100])
    with PostHocEMA.from_model(again.model, tmp_path, **settings, resume="auto") as ema:
        again.run(101, 110, ema)
        assert 1e-6 < error(ema, [*first.path[:80], *again.path]) < 1e-2


def test_a_state_in_the_users_own_checkpoint_needs_no_place_on_the_path(tmp_path: Path) -> None:
    training, states = Training(), {}
    with PostHocEMA.from_model(training.model, tmp_path, **SETTINGS) as ema:
        training.run(1, 20, ema)
        states = ema.state_dict(), training.checkpoint()
        training.run(21, 100, ema)
    again = Training(seed=4)
    with resumed(again.model, tmp_path) as ema:
        again.restored(states[1])
        ema.load_state_dict(states[0])
        again.run(21, 60, ema)
        assert error(ema, [*training.path[:20], *again.path]) < 1e-6


def test_resuming_from_snapshots_of_an_earlier_release_warns_that_nothing_was_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished(tmp_path, 80)
    for snapshot in read_directory(tmp_path):
        rewrite_snapshot(snapshot.path, sample="")
    fresh = Training(seed=1)
    with resumed(fresh.model, tmp_path) as ema:
        fresh.run(81, 82, ema)
        assert ema.step == 82
    (text,) = (text for text in caplog.messages if "cannot be checked" in text)
    reason = "whether the model is on the run's path cannot be checked: its snapshots hold no sample of it"
    assert text == f"{tmp_path}: {reason}"


def test_another_model_is_an_error_at_the_first_call_even_if_no_update_is_due(tmp_path: Path) -> None:
    finished(tmp_path, 80, update_every=2)
    ema = PostHocEMA.from_path(tmp_path)
    for _ in range(2):
        with pytest.raises(ModelMismatchError, match=r"tensor '0\.weight': has the shape \[24, 9\], and had \[24, 8\]"):
            ema.update_(torch.nn.Sequential(torch.nn.Linear(9, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4)))
    assert ema.step == 80


# --- the sample


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("ending", ["scheduled", "in between"])
def test_a_header_holds_the_weights_and_the_average_of_its_time(tmp_path: Path, device: str, ending: str) -> None:
    """The format defines the elements of the sample. A snapshot off the schedule holds those of the last update."""
    last, at = (80, 80) if ending == "scheduled" else (77, 76)
    first, _ = finished(tmp_path, last, device=device, update_every=2)
    newest = read_directory(tmp_path)[-1]
    assert newest.info.t == at
    average, raw = load_file(newest.path), first.path[at - 1]
    names, expected = sorted(average), []
    for number, name in enumerate(names):
        places = {
            xxhash.xxh3_64_intdigest(f"{k}/{name}".encode()) % average[name].numel()
            for k in range(512)
            if k * len(names) // 512 == number
        }
        expected += [(float(raw[name].reshape(-1)[i]), float(average[name].reshape(-1)[i])) for i in sorted(places)]
    weights, averages = decode_sample(newest.info.sample)
    assert [*zip(weights.tolist(), averages.tolist(), strict=True)] == expected


@pytest.mark.parametrize("wrong", ["no base64!", "AAAA", "A" * 5464])
def test_a_damaged_sample_is_named(tmp_path: Path, wrong: str) -> None:
    finished(tmp_path, 40)
    path = read_directory(tmp_path)[0].path
    rewrite_snapshot(path, sample=wrong)
    with pytest.raises(FileFormatError, match=r"ema\.sample: "):
        read_directory(tmp_path)


SHARDED = """
from posthoc_cli.errors import ModelMismatchError
model = spread(Net(), arguments[0]) if arguments[0] != "alone" else Net()
first, weights, last, expected = map(int, arguments[1:])
with PostHocEMA.from_model(model, folder / "run", **SETTINGS, resume="auto") as ema:
    for step in range(first, last + 1):
        move(model, step)
        if expected < 0:
            refused(lambda: ema.update_(model), ModelMismatchError)
            break
        ema.update_(model)
        if step == first:
            assert ema.step == expected + 1, ema.step
"""


@pytest.mark.parametrize(
    ("kinds", "ranks"), [(("fsdp", "fsdp"), (2, 3)), (("tp", "alone"), (2, 1)), (("alone", "fsdp"), (1, 2))]
)
def test_processes_decide_together_with_the_samples_of_another_arrangement(
    kinds: tuple[str, str], ranks: tuple[int, int], tmp_path: Path
) -> None:
    """The walk at step 10 resumes from step 8, not from 12; that at step 1,000 is not on the path of 16 steps."""
    check_group(SHARDED, ranks[0], tmp_path, kinds[0], 1, 0, 16, 0)
    for out in check_group(SHARDED, ranks[1], tmp_path, kinds[1], 1_000, 0, 1_001, -1):
        assert "are not on the path of the run" in out
    check_group(SHARDED, ranks[1], tmp_path, kinds[1], 11, 0, 16, 8)


# --- the criterion, on a recorded training


def flat(weights: Mapping[str, torch.Tensor]) -> Any:
    return torch.cat([value.reshape(-1) for value in weights.values()]).numpy()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_every_step_of_a_training_is_found_and_no_fresh_weights_are(kind: str, count: int) -> None:
    every, gammas = 600 // (count + 1), {"narrow": 16.97, "wide": 0.0469}
    values = np.stack([flat(weights) for weights in Training(kind=kind).run(1, 600).path])

    def average(t: int, gamma: float) -> Any:
        edges = (np.arange(t + 1) / t) ** (gamma + 1)
        return np.diff(edges) @ values[:t]

    snapshots = [every * (index + 1) for index in range(count)]
    path = [
        Moment(t, t, values[t - 1], *(average(t, g) for g in gammas.values()), gammas["wide"], every) for t in snapshots
    ]
    misplaced = 0.0
    for step in range(every, every * (count + 1), 3):
        found = locate(values[step - 1].astype(np.float32), path)
        assert found is not None
        assert found.step is not None, step
        misplaced = max(misplaced, (found.step - step) / every)
    assert misplaced < 0.6  # of an interval that lies ahead of the step
    for seed in range(1, 9):
        found = locate(flat(recorded(Training(seed).model)).astype(np.float32), path)
        assert found is not None
        assert found.step is None

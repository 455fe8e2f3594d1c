"""The step from which a run is resumed: the model's weights are compared with a sample that every snapshot holds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from groups import check_group, truth
from integrations.truth import distance, recorded
from integrations.truth import exact as discrete_average
from safetensors.torch import load_file
from tracker.runs import as_if_killed, assert_near, contents, times, tracked_error

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import ModelMismatchError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.path import decode_sample

SETTINGS: dict[str, Any] = {"update_every": 1, "checkpoint_every": 40, "checkpoint_dtype": None}
OFF = r"model: its weights are those of no snapshot of the run in .*restore the model's checkpoint.*resume=\d+.*another"


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


@cache
def _finished(last: int, kind: str, settings: frozenset[tuple[str, Any]]) -> tuple[Training, Any, dict[str, bytes]]:
    """Train once; return the training, its checkpoints of every tenth step, and the files in the directory."""
    training, checkpoints = Training(kind=kind), {}
    with TemporaryDirectory() as folder:
        with PostHocEMA.from_model(training.model, folder, **SETTINGS | dict(settings)) as ema:
            for step in range(1, last + 1):
                training.run(step, step, ema)
                if step % 10 == 0:
                    checkpoints[step] = training.checkpoint()
        return training, checkpoints, {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


def finished(folder: Path, last: int = 200, kind: str = "adam", **settings: Any) -> tuple[Training, Any]:
    """Return a training up to step `last`, whose snapshots lie in a folder, and its checkpoints of every tenth step."""
    training, checkpoints, contents = _finished(last, kind, frozenset(settings.items()))
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return copy.deepcopy(training), checkpoints


def error(ema: PostHocEMA, path: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """Return the largest error of a tensor of the averages against that over the weights of a path."""
    assert ema.t == len(path)
    values = {name: np.stack([weights[name].numpy() for weights in path]) for name in path[0]}
    return max(tracked_error(ema, name, value, range(1, len(path) + 1)) for name, value in values.items())


def resumed(model: torch.nn.Module, folder: Path, way: str = "from_model") -> PostHocEMA:
    if way == "from_path":
        return PostHocEMA.from_path(folder, model)
    return PostHocEMA.from_model(model, folder, **SETTINGS, resume="auto")


# --- weights that the network had at a time of the run, and others


@pytest.mark.parametrize(
    ("way", "seed", "last"), [("from_model", 0, 200), ("from_path", 1, 200), ("from_model", 1, 75)]
)
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


def fine_tuned(training: Training, steps: int) -> None:
    training.task = -training.task
    training.run(201, 200 + steps)


def permuted(training: Training) -> None:
    """Swap two hidden units: the same function with other weights."""
    order = [1, 0, *range(2, 24)]
    with torch.no_grad():
        for tensor in (training.model[0].weight, training.model[0].bias):
            tensor.copy_(tensor[order].clone())
        training.model[2].weight.copy_(training.model[2].weight[:, order].clone())


@pytest.mark.parametrize("change", ["1 step", "5 steps", "50 steps", "permuted", "average", "between", "forked"])
def test_a_model_that_has_gone_elsewhere_is_refused(tmp_path: Path, change: str) -> None:
    training, checkpoints = finished(tmp_path, 200)
    if change in ("between", "forked"):
        training = Training().restored(checkpoints[130 if change == "between" else 160])
        training.run(900, 939 if change == "forked" else 899)
    elif change == "permuted":
        permuted(training)
    elif change == "average":
        training.model.load_state_dict(PostHocEMA.from_path(tmp_path).state_dict(0.05), strict=False)
    else:
        fine_tuned(training, int(change.split()[0]))
    ema = resumed(training.model, tmp_path)
    with pytest.raises(ModelMismatchError, match=OFF):
        training.run(201, 201, ema)


@pytest.mark.parametrize(
    ("way", "late", "kind"), [("from_model", False, "adam"), ("from_path", True, "adam"), ("from_model", True, "sgd")]
)
def test_an_earlier_checkpoint_resumes_from_its_own_step(
    tmp_path: Path, way: str, late: bool, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint may be loaded after the tracker was made."""
    first, checkpoints = finished(tmp_path, 200, kind=kind)
    again = Training(seed=3, kind=kind)
    if not late:
        again.restored(checkpoints[80])
    ema = resumed(again.model, tmp_path, way)
    again.restored(checkpoints[80])
    assert ema.step == 80
    with ema:
        again.run(81, 220, ema)
        assert error(ema, [*first.path[:80], *again.path]) < 1e-6
    assert times(tmp_path) == {40, 80, 120, 160, 200, 220}
    (record,) = (record for record in caplog.records if "continuing at step 80" in record.getMessage())
    assert record.levelno == logging.WARNING
    assert "later snapshots, up to step 200, will be set aside" in record.getMessage()
    assert len(list((tmp_path / "superseded").iterdir())) == 6


def test_the_last_checkpoint_that_was_loaded_decides(tmp_path: Path) -> None:
    """A script may build its tracker with one checkpoint, and load another one before it trains."""
    first, checkpoints = finished(tmp_path, 200)
    again = Training(seed=3).restored(checkpoints[80])
    ema = resumed(again.model, tmp_path)
    assert ema.step == 80
    again.restored(checkpoints[100])
    with pytest.raises(ModelMismatchError, match=OFF):
        again.run(101, 101, ema)
    again = Training(seed=3).restored(checkpoints[80])
    ema = resumed(again.model, tmp_path)
    again.model.load_state_dict(first.model.state_dict())
    assert ema.step == 200
    copy.deepcopy(again.model).load_state_dict(checkpoints[80]["model"])
    assert ema.step == 200
    ema.close()


def test_a_time_without_a_snapshot_of_each_profile_is_resumed_by_reconstruction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is missing is reconstructed, and later predicted errors contain its error."""
    first, checkpoints = finished(tmp_path, 400, checkpoint_every=20)
    (gone,) = (s for s in read_directory(tmp_path) if (s.t, s.sigma_rel) == (400, 0.28))
    gone.path.unlink()
    again = Training(seed=3).restored(checkpoints[400])
    with resumed(again.model, tmp_path) as ema:
        assert ema.step == 400
        again.run(401, 440, ema)
        path = [*first.path, *again.path]
        assert error(ema, path) > 1e-6
        found = ema.state_dict(0.28, dtype=torch.float32)
        exact = discrete_average(path, 0.28)
    off = distance(found, exact)
    assert found.predicted_error is not None
    assert off < 2 * found.predicted_error < 0.02
    assert "sigma_rel 0.28 has no snapshot at step 400: it is reconstructed, with a predicted error of" in caplog.text


@pytest.mark.parametrize("every", [1, 10])
def test_a_snapshot_on_request_is_a_place_to_resume_from(tmp_path: Path, every: int) -> None:
    """Between two updates it takes in the weights, with the true interval."""
    settings = {"update_every": every, "checkpoint_every": 40, "checkpoint_dtype": None}
    first = Training()
    with PostHocEMA.from_model(first.model, tmp_path, **settings) as ema:
        first.run(1, 105, ema)
        ema.snapshot()
        ema.snapshot()  # a second call has nothing to add
        saved = first.checkpoint()
        first.run(106, 170, ema)
    assert 105 in times(tmp_path)
    again = Training(seed=3).restored(saved)
    with PostHocEMA.from_model(again.model, tmp_path, **settings, resume="auto") as ema:
        assert ema.step == 105
        again.run(106, 160, ema)
        updates = sorted({*range(every, 161, every), 105})
        path = [*first.path[:105], *again.path]
        values = {name: np.stack([path[step - 1][name].numpy() for step in updates]) for name in path[0]}
        assert max(tracked_error(ema, name, value, updates) for name, value in values.items()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_resumes_the_run(tmp_path: Path, dtype: torch.dtype) -> None:
    _, checkpoints = finished(tmp_path, 200)
    again = Training(seed=3).restored(checkpoints[160])
    for parameter in again.model.parameters():
        parameter.data.copy_(parameter.data.to(dtype))
    assert resumed(again.model, tmp_path).step == 160


def test_weights_that_do_not_move_resume_from_the_newest_snapshot(tmp_path: Path) -> None:
    still = Training()
    for last in (80, 160):
        with resumed(still.model, tmp_path) as ema:
            for _ in range(80):
                ema.update_(still.model)
            assert ema.step == last


def test_a_requested_step_is_used_whatever_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Later predicted errors contain the distance of the model from the network of that step."""
    _, checkpoints = finished(tmp_path, 200)
    for named, weights in ((160, None), (160, 120), (120, 120)):
        caplog.clear()
        training = Training(seed=1)
        if weights is not None:
            training.restored(checkpoints[weights])
        expected = distance(recorded(training.model), checkpoints[named]["model"])
        with PostHocEMA.from_path(tmp_path, training.model, step=named) as ema:
            training.run(1, 1, ema)
            assert ema.step == named + 1
            found = ema.state_dict(0.05).predicted_error
        as_if_killed(tmp_path)
        texts = [text for text in caplog.messages if "averages continue from" in text]
        assert found is not None
        if weights == named:
            assert not texts
            assert found < 1e-3
        else:
            assert texts[0].startswith(f"{tmp_path}: the averages continue from step {named};")
            assert 0.5 * expected < found < 1.5 * expected


@pytest.mark.parametrize(
    ("order", "clock"), [("state last", "images"), ("state first", "steps"), ("in place", "steps")]
)
def test_a_state_of_an_earlier_step_than_the_models_is_continued_with_a_warning(
    tmp_path: Path, order: str, clock: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The steps in between are lost: later predicted errors contain the distance between the model and the state's.

    With an own clock the first value after the gap stands for all of it."""
    settings: dict[str, Any] = SETTINGS | {"t_unit": clock, "checkpoint_dtype": torch.float32}

    def run(training: Training, first: int, last: int, ema: PostHocEMA) -> None:
        for step in range(first, last + 1):
            training.run(step, step)
            ema.update_(training.model, None if clock == "steps" else 10.0 * step)

    training = Training()
    with PostHocEMA.from_model(training.model, tmp_path, **settings) as ema:
        run(training, 1, 100, ema)
        state, at_100 = ema.state_dict(), training.checkpoint()
        run(training, 101, 130, ema)
        at_130 = training.checkpoint()
    for saved, is_exact in ((at_100, True), (at_130, False)):
        caplog.clear()
        again = Training(seed=4)
        with PostHocEMA.from_model(again.model, tmp_path, **settings, resume="auto") as ema:
            if order == "state last":
                again.restored(saved)
            ema.load_state_dict(state)
            if order == "state first":
                again.restored(saved)
            elif order == "in place":
                for name, value in again.model.state_dict().items():
                    value.copy_(saved["model"][name])
            kept = ema.state_dict()["weights"]
            run(again, 131, 131, ema)
            found = ema.state_dict(0.05).predicted_error
        assert kept == state["weights"]
        assert found is not None
        lost = distance(recorded(again.model), at_100["model"])
        one_step = distance(recorded(again.model), saved["model"])
        said = "the averages continue from step 100; the model has other weights" in caplog.text
        if is_exact and order != "in place":
            assert not said
            assert found < 1e-6
        elif is_exact:  # nobody notices a change in place: the present model is one step away
            assert found < 1.5 * one_step
        else:
            assert said
            assert 0.5 * lost < found < 1.5 * lost


def test_the_error_of_a_live_average_contains_the_rounding_of_snapshots_that_it_continued_from(tmp_path: Path) -> None:
    training = Training()
    for last, low, high in ((40, 0, 1e-6), (80, 1e-6, 1e-3)):
        settings = SETTINGS | {"checkpoint_dtype": torch.float16}
        with PostHocEMA.from_model(training.model, tmp_path, **settings, resume="auto") as ema:
            training.run(last - 39, last, ema)
            error = ema.state_dict(0.28, dtype=torch.float32).predicted_error
            assert error is not None
            assert low < error < high


# --- the sample


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("ending", ["scheduled", "in between"])
def test_a_header_holds_the_weights_and_the_average_of_its_time(tmp_path: Path, device: str, ending: str) -> None:
    """The format defines the elements of the sample. A snapshot off the schedule holds those of the last update."""
    last, at = (80, 80) if ending == "scheduled" else (77, 76)
    first, _ = finished(tmp_path, last, device=device, update_every=2)
    newest = read_directory(tmp_path)[-1]
    assert newest.t == at
    average, raw = load_file(newest.path), first.path[at - 1]
    names, expected = sorted(average), []
    for number, name in enumerate(names):
        places = {
            xxhash.xxh3_64_intdigest(f"{k}/{name}".encode()) % average[name].numel()
            for k in range(512)
            if k * len(names) // 512 == number
        }
        expected += [(float(raw[name].reshape(-1)[i]), float(average[name].reshape(-1)[i])) for i in sorted(places)]
    weights, averages = decode_sample(newest.sample)
    assert [*zip(weights.tolist(), averages.tolist(), strict=True)] == expected


SHARDED = """
from posthoc_cli.errors import ModelMismatchError
model = spread(Net(), arguments[0]) if arguments[0] != "alone" else Net()
for first, weights, last, expected in zip(*[map(int, arguments[1:])] * 4):
    if weights:
        move(model, weights)
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
    """The walk at step 8 resumes from there, not from 12; that at step 1,000 is refused."""
    check_group(SHARDED, ranks[0], tmp_path, kinds[0], 1, 0, 16, 0)
    for out in check_group(SHARDED, ranks[1], tmp_path, kinds[1], 1_000, 0, 1_001, -1, 9, 8, 16, 8):
        assert "are those of no snapshot of the run" in out
    for width in (0.1, 0.2):
        exact = truth(width, [*range(2, 17, 2)])
        assert_near(Run(tmp_path / "run").average(width, t=16), exact, within=2e-6)

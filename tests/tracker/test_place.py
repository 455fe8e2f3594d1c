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
    """A walk whose steps depend on their numbers and a `salt`; `path` holds the weights of all steps: checkpoints."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4))
        self.path: list[dict[str, torch.Tensor]] = []

    def run(self, first: int, last: int, ema: PostHocEMA | None = None, salt: int = 0, scale: float = 1.0) -> Training:
        """Take these steps; with `scale`, on a clock of that interval."""
        for number in range(first, last + 1):
            generator = torch.Generator().manual_seed(1000 * salt + number)
            for parameter in self.model.parameters():
                parameter.data.add_(0.003 * torch.randn(parameter.shape, generator=generator))
            self.path.append(recorded(self.model))
            if ema is not None:
                ema.update_(self.model, None if scale == 1 else scale * number)
        return self

    def restored(self, checkpoint: Mapping[str, torch.Tensor]) -> Training:
        self.model.load_state_dict(checkpoint)
        return self


def finished(folder: Path, last: int = 200, **settings: Any) -> Training:
    """Return a training up to step `last`, whose snapshots lie in a folder."""
    training = Training()
    with PostHocEMA.from_model(training.model, folder, **SETTINGS | settings) as ema:
        return training.run(1, last, ema)


def error(ema: PostHocEMA, path: Sequence[Mapping[str, torch.Tensor]], updates: Sequence[int] = ()) -> float:
    """Return the largest error of a tensor of the averages against that over the weights of a path."""
    updates = updates or range(1, len(path) + 1)
    assert ema.t == updates[-1]
    values = {name: np.stack([path[step - 1][name].numpy() for step in updates]) for name in path[0]}
    return max(tracked_error(ema, name, value, updates) for name, value in values.items())


def resumed(model: torch.nn.Module, folder: Path, way: str = "from_model", **settings: Any) -> PostHocEMA:
    if way == "from_path":
        return PostHocEMA.from_path(folder, model)
    return PostHocEMA.from_model(model, folder, **SETTINGS | settings, resume="auto")


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


@pytest.mark.parametrize("change", ["1 step", "50 steps", "permuted", "average", "between", "forked"])
def test_a_model_that_has_gone_elsewhere_is_refused(tmp_path: Path, change: str) -> None:
    training = finished(tmp_path)
    if change in ("between", "forked"):
        training.restored(training.path[129 if change == "between" else 159])
        training.run(161, 200 if change == "forked" else 160, salt=1)
    elif change == "permuted":  # two hidden units are swapped: the same function with other weights
        order, (inner, _, outer) = [1, 0, *range(2, 24)], training.model
        inner.weight.data, inner.bias.data = inner.weight.data[order], inner.bias.data[order]
        outer.weight.data = outer.weight.data[:, order]
    elif change == "average":
        training.model.load_state_dict(PostHocEMA.from_path(tmp_path).state_dict(0.05), strict=False)
    else:
        training.run(201, 200 + int(change.split()[0]))
    ema = resumed(training.model, tmp_path)
    with pytest.raises(ModelMismatchError, match=OFF):
        training.run(201, 201, ema)


@pytest.mark.parametrize(("way", "late"), [("from_model", False), ("from_path", True), ("from_model", True)])
def test_an_earlier_checkpoint_resumes_from_its_own_step(
    tmp_path: Path, way: str, late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint may be loaded after the tracker was made."""
    first, again = finished(tmp_path), Training(seed=3)
    if not late:
        again.restored(first.path[79])
    ema = resumed(again.model, tmp_path, way)
    again.restored(first.path[79])
    assert ema.step == 80
    with ema:
        again.run(81, 220, ema, salt=1)
        assert error(ema, [*first.path[:80], *again.path]) < 1e-6
    assert times(tmp_path) == {40, 80, 120, 160, 200, 220}
    (record,) = (record for record in caplog.records if "continuing at step 80" in record.getMessage())
    assert record.levelno == logging.WARNING
    assert "later snapshots, up to step 200, will be set aside" in record.getMessage()
    assert len(list((tmp_path / "superseded").iterdir())) == 6


def test_the_last_checkpoint_that_was_loaded_decides(tmp_path: Path) -> None:
    """A script may build its tracker with one checkpoint, and load another one before it trains."""
    first = finished(tmp_path)
    again = Training(seed=3).restored(first.path[79])
    ema = resumed(again.model, tmp_path)
    assert ema.step == 80
    again.restored(first.path[99])
    with pytest.raises(ModelMismatchError, match=OFF):
        again.run(101, 101, ema)
    again = Training(seed=3).restored(first.path[79])
    ema = resumed(again.model, tmp_path)
    again.restored(first.path[-1])
    assert ema.step == 200
    copy.deepcopy(again.model).load_state_dict(first.path[79])
    assert ema.step == 200
    ema.close()


def test_a_time_without_a_snapshot_of_each_profile_is_resumed_by_reconstruction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is missing is reconstructed, and later predicted errors contain its error."""
    first = finished(tmp_path, 400, checkpoint_every=20)
    (gone,) = (s for s in read_directory(tmp_path) if (s.t, s.sigma_rel) == (400, 0.28))
    gone.path.unlink()
    again = Training(seed=3).restored(first.path[-1])
    with resumed(again.model, tmp_path) as ema:
        assert ema.step == 400
        again.run(401, 440, ema)
        path = [*first.path, *again.path]
        assert error(ema, path) > 1e-6
        found = ema.state_dict(0.28, dtype=torch.float32)
    assert distance(found, discrete_average(path, 0.28)) < 2 * found.predicted_error < 0.02
    assert "sigma_rel 0.28 has no snapshot at step 400: it is reconstructed, with a predicted error of" in caplog.text


@pytest.mark.parametrize("every", [1, 10])
def test_a_snapshot_on_request_is_a_place_to_resume_from(tmp_path: Path, every: int) -> None:
    """Between two updates it takes in the weights, with the true interval."""
    first = Training()
    with PostHocEMA.from_model(first.model, tmp_path, **SETTINGS | {"update_every": every}) as ema:
        first.run(1, 105, ema)
        ema.snapshot()
        ema.snapshot()  # a second call has nothing to add
        first.run(106, 170, ema)
    assert 105 in times(tmp_path)
    again = Training(seed=3).restored(first.path[104])
    with resumed(again.model, tmp_path, update_every=every) as ema:
        assert ema.step == 105
        again.run(106, 160, ema, salt=1)
        assert error(ema, [*first.path[:105], *again.path], sorted({*range(every, 161, every), 105})) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_resumes_the_run(tmp_path: Path, dtype: torch.dtype) -> None:
    rounded = {name: value.to(dtype) for name, value in finished(tmp_path).path[159].items()}
    assert resumed(Training(seed=3).restored(rounded).model, tmp_path).step == 160


def test_weights_that_do_not_move_resume_from_the_newest_snapshot(tmp_path: Path) -> None:
    still = Training()
    for last in (80, 160):
        with resumed(still.model, tmp_path) as ema:
            for _ in range(80):
                ema.update_(still.model)
            assert ema.step == last


def test_a_requested_step_is_used_whatever_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Later predicted errors contain the distance of the model from the network of that step."""
    first = finished(tmp_path)
    for named, weights in ((160, None), (160, 120), (120, 120)):
        caplog.clear()
        training = Training(seed=1)
        if weights is not None:
            training.restored(first.path[weights - 1])
        expected = distance(recorded(training.model), first.path[named - 1])
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
    training, scale = Training(), 1.0 if clock == "steps" else 10.0
    with PostHocEMA.from_model(training.model, tmp_path, **settings) as ema:
        training.run(1, 100, ema, scale=scale)
        state = ema.state_dict()
        training.run(101, 130, ema, scale=scale)
    at_100, at_130 = training.path[99], training.path[129]
    for saved, is_exact in ((at_100, True), (at_130, False)):
        caplog.clear()
        again = Training(seed=4)
        with resumed(again.model, tmp_path, **settings) as ema:
            if order == "state last":
                again.restored(saved)
            ema.load_state_dict(state)
            if order == "state first":
                again.restored(saved)
            elif order == "in place":
                for name, value in again.model.state_dict().items():
                    value.copy_(saved[name])
            kept = ema.state_dict()["weights"]
            again.run(131, 131, ema, scale=scale)
            found = ema.state_dict(0.05).predicted_error
        assert kept == state["weights"]
        lost, one_step = distance(again.path[-1], at_100), distance(again.path[-1], saved)
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
        with resumed(training.model, tmp_path, checkpoint_dtype=torch.float16) as ema:
            training.run(last - 39, last, ema)
            assert low < ema.state_dict(0.28, dtype=torch.float32).predicted_error < high


# --- the sample


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("ending", ["scheduled", "in between"])
def test_a_header_holds_the_weights_and_the_average_of_its_time(tmp_path: Path, device: str, ending: str) -> None:
    """The format defines the elements of the sample. A snapshot off the schedule holds those of the last update."""
    last, at = (80, 80) if ending == "scheduled" else (77, 76)
    first = finished(tmp_path, last, device=device, update_every=2)
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

"""A notebook's cell or a function that trains is run again, in the same process: the tracker that
takes the place of the earlier one continues from the snapshot that the earlier one has written."""

import gc
import shutil
import weakref
from unittest.mock import Mock

import pytest
import torch
from tracker.runs import Training, track

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import RefusedCallError

SETTINGS = {
    "update_every": 2,
    "checkpoint_every": 4,
    "checkpoint_dtype": None,
}
ROUNDED = 1e-6  # float32, once at each of the ends


def begin(model, folder):
    return PostHocEMA.from_model(model, folder, resume="auto", **SETTINGS)


def begin_wrapped(model, folder):
    return begin(torch.nn.DataParallel(model), folder)


@pytest.mark.parametrize("make", [begin, begin_wrapped])
def test_a_cell_that_is_run_again_continues(tmp_path, make):
    """After 4, 5 and 7 steps; after the 9th, between two updates, the end of the earlier tracker
    has taken in the weights. Other names keep the earlier trackers."""
    training = Training()
    kept = []
    for last in (4, 9, 16):
        ema = make(training.model, tmp_path / "run")
        kept.append(ema)
        training.run(last, ema)
    assert training.error(ema, [2, 4, 6, 8, 9, 10, 12, 14, 16]) < ROUNDED
    assert ema.t == 16


def test_a_function_that_is_run_again_continues(tmp_path):
    """Its tracker has not stayed, nor the wrapper of its model."""
    training = Training()
    ema = begin(training.model, tmp_path)
    for step in range(1, 7):
        training.run(step)
        ema.update_(torch.nn.DataParallel(training.model))
    del ema
    gc.collect()
    ema = begin(training.model, tmp_path)
    training.run(9, ema)
    assert training.error(ema) < ROUNDED


def test_an_interrupted_cell_is_run_again(tmp_path, monkeypatch):
    """After a step that was taken, and not counted."""
    training = Training()
    ema = begin(training.model, tmp_path)
    training.run(7, ema)
    training.run(8)
    with monkeypatch.context() as patch:
        patch.setattr(ema._pipeline, "wait_for_turn", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ema.update_(training.model)
    ema = begin(training.model, tmp_path)
    training.run(14, ema)
    assert ema.step == 13


def test_weights_of_a_snapshot_continue_from_its_step(tmp_path):
    training = Training()
    first = begin(training.model, tmp_path)
    path = training.run(25, first).path
    training.model.load_state_dict(path[19])
    ema = begin(training.model, tmp_path)
    training.path = path[:20]
    training.run(23, ema)
    assert ema.step == 23


def test_the_earlier_tracker_says_that_it_was_closed(tmp_path, caplog):
    training = Training()
    earlier = begin(training.model, tmp_path)
    training.run(4, earlier)
    ema = begin(training.model, tmp_path)
    training.run(5, ema)
    assert "closed at step 4" in caplog.text
    with pytest.raises(RefusedCallError, match="closed"):
        earlier.update_(training.model)
    reader = PostHocEMA.from_path(tmp_path, Training().model)
    assert not ema.closed  # a reader, also with a model of its own, takes no place
    assert reader.step == 4


def test_a_folder_that_was_removed_between_two_runs_of_a_cell_begins_anew(tmp_path):
    training = Training()
    earlier = begin(training.model, tmp_path / "run")
    training.run(6, earlier)
    earlier.flush()
    shutil.rmtree(tmp_path / "run")
    ema = begin(training.model, tmp_path / "run")
    training.run(9, ema)
    assert ema.step == 3


def test_a_tracker_and_its_attachment_form_no_cycle(tmp_path):
    gc.disable()
    try:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = track(model, tmp_path)
        ema.attach(optimizer)
        reference = weakref.ref(ema)
        del ema
        assert reference() is not None  # which the optimizer updates
        del optimizer
        assert reference() is None
    finally:
        gc.enable()

"""The tracker within accelerate, with the real library."""

import json

import pytest
import torch

pytest.importorskip("accelerate")

from accelerate import Accelerator
from integrations.batches import Training, batch
from integrations.programs import forget
from truth import EVERY, assert_exact, recorded

from posthoc_cli.errors import MismatchError
from posthoc_cli.integrations import STATE_NAME, read_state
from posthoc_cli.integrations.accelerate import prepare

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


@pytest.mark.parametrize("before", [False, True])
def test_accumulated_steps_count_once(tmp_path, before):
    training = Training(tmp_path, before)
    training.run()
    assert len(training.weights) == 5
    assert_exact(training.ema, training.model, training.weights)


def generator_and_critic(folder):
    """Return an accelerator and, for each of two models, the model, its optimizer and its
    tracker."""
    forget()
    accelerator = Accelerator(cpu=True)
    prepared = []
    for name in ("generator", "critic"):
        bare = torch.nn.Linear(4, 4)
        plain = torch.optim.SGD(bare.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(bare, plain)
        ema = prepare(accelerator, model, folder / name, optimizer, **EVERY)
        prepared.append((model, optimizer, ema))
    return accelerator, prepared


def step(accelerator, model, optimizer):
    output = model(batch(0))
    accelerator.backward(output.square().mean())
    optimizer.step()
    optimizer.zero_grad()


def test_each_of_several_models_resumes_from_its_own_state(tmp_path):
    weights = [[], []]
    for steps in (5, 3):
        accelerator, prepared = generator_and_critic(tmp_path)
        if weights[0]:
            accelerator.load_state(str(tmp_path / "saved"))
        for (model, optimizer, _), history in zip(prepared, weights, strict=True):
            for _ in range(steps):
                step(accelerator, model, optimizer)
                history.append(recorded(model))
        accelerator.save_state(str(tmp_path / "saved"))
        for (model, _, ema), history in zip(prepared, weights, strict=True):
            assert_exact(ema, model, history)
            ema.close()


def test_a_checkpoint_with_states_of_two_saves_is_refused(tmp_path):
    """A checkpoint that was saved again by another arrangement of processes keeps the earlier
    state."""
    ema = Training(tmp_path).ema
    (tmp_path / f"{STATE_NAME}.pt").touch()
    (tmp_path / STATE_NAME).mkdir()
    with pytest.raises(MismatchError, match=rf"{STATE_NAME}\.pt and .*{STATE_NAME}"):
        read_state(ema, tmp_path)


def test_a_directory_that_is_prepared_again_takes_its_earlier_place(tmp_path):
    """As a notebook's cell that runs again: the earlier tracker is closed, and neither saves nor
    loads anything."""
    accelerator, prepared = generator_and_critic(tmp_path)
    (model, optimizer, first), (_, _, critic) = prepared
    again = prepare(accelerator, model, tmp_path / "generator", optimizer, **EVERY)
    assert first.closed
    step(accelerator, model, optimizer)
    accelerator.save_state(str(tmp_path / "saved"))
    saved = sorted((tmp_path / "saved").glob("posthoc_ema*"))
    states = [json.loads(torch.load(path)["info"])["run_id"] for path in saved]
    assert states == [again.run_id, critic.run_id]
    accelerator.load_state(str(tmp_path / "saved"))

"""What an error costs: the expected distance of an average from the last weights is the true one,
and the loss is the error's share of it."""

import numpy as np
import pytest
import torch
from predictions import true_averages
from torch import nn
from trained import EVERY, TIMES, ema, named, network, train, write

from posthoc_cli import PostHocEMA, Request, Run, disk_sources, import_checkpoints, plan_synthesis
from posthoc_cli.reconstruction import lost_gain

pytestmark = pytest.mark.statistical

LENGTHS = (0.05, 0.1, 0.2)


def weights_alone(folder):
    for step in TIMES:
        weights = named(train()[step - 1])
        torch.save({"model": weights, "step": step}, folder / f"step{step}.pt")
    return folder


def weights_and_ema(folder):
    write(folder / "files", train(), ema(0.97))
    import_checkpoints(folder / "files", folder / "run", ema_decay=0.97)
    return folder / "run"


def hook(folder):
    model = network()
    tracker = PostHocEMA.from_model(
        model, folder / "run", update_every=1, checkpoint_every=EVERY, max_checkpoints=None
    )
    for weights in train():
        vector = torch.from_numpy(weights).float()
        nn.utils.vector_to_parameters(vector, model.parameters())
        tracker.update_(model)
    tracker.close()
    return folder / "run"


@pytest.mark.parametrize("make", [weights_alone, weights_and_ema, hook])
def test_the_loss_is_the_error_relative_to_the_true_distance_from_the_last_weights(make, tmp_path):
    plan = plan_synthesis(disk_sources(make(tmp_path)), Request(LENGTHS, dtype="float64"))
    last = train()[-1]
    for index, truth in enumerate(true_averages(LENGTHS, train())):
        distance = np.linalg.norm(truth - last) / np.linalg.norm(truth)
        error = plan.predicted_error(index)
        assert error < distance
        # a drift, which long averages leave behind, is no walk
        assert 0.5 < plan.lost_gain(index) / (error / distance) < 2


def test_a_tensor_that_hardly_moves_hides_no_loss(tmp_path):
    """A large table takes the norm of all weights, to which errors are relative."""
    plain = tmp_path / "plain"
    beside = tmp_path / "beside"
    for folder in (plain, beside):
        folder.mkdir()
    table = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    for step in TIMES:
        weights = named(train()[step - 1])
        torch.save({"model": weights, "step": step}, plain / f"step{step}.pt")
        moved = 100 * table + 1e-4 * step / EVERY
        content = {"model": weights | {"table": moved}, "step": step}
        torch.save(content, beside / f"step{step}.pt")
    alone = Run(plain).plan(0.1)
    hidden = Run(beside).plan(0.1)
    assert hidden.predicted_error(0) < alone.predicted_error(0) / 50
    assert hidden.lost_gain(0) == pytest.approx(alone.lost_gain(0), rel=0.1)


def test_no_error_loses_nothing_and_one_as_large_as_the_distance_all():
    """Weights that stand still, at a distance of 0, have nothing to gain."""
    lost = lost_gain([0.0, 0.01, 0.3, 0.1, np.nan], [0.0, 0.1, 0.1, 0.0, np.nan])
    assert lost.tolist() == [0.0, pytest.approx(0.1), 1.0, 0.0, 0.0]

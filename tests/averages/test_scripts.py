"""The benchmark of `DifferentiableEMA` and the examples of the two recipes: they run, and measure what they say."""

from __future__ import annotations

import re
from pathlib import Path

import bench_differentiable
import digit_trials
import hare_tortoise
import numpy as np
import pytest
import switch_ema
import torch
from bench_differentiable import LiveBytes, Mode
from digit_trials import Digits
from torch import nn

# --- memory and time of DifferentiableEMA ------------------------------------------------------------

BATCH, WIDTH = 32, 16
SMALL = (BATCH, WIDTH)


def _graph_bytes() -> int:
    """What one value's graph holds: the images, two hidden layers, and the two weights that gradients pass through."""
    return 4 * (BATCH * 64 + 2 * BATCH * WIDTH + WIDTH * WIDTH + WIDTH * bench_differentiable.OUTPUTS)


def test_memory_grows_with_the_graphs_that_are_kept_and_no_further() -> None:
    modes = [Mode("t", "truncated"), Mode("w", "window", 5), Mode("c", "carried"), Mode("f", "full")]
    truncated, window, carried, full = bench_differentiable.measure(modes, 40, 1, SMALL)
    assert np.ptp(truncated.memory[1:]) == 0
    assert np.ptp(carried.memory[1:]) == 0
    assert np.ptp(window.memory[10:]) == 0
    growth = np.diff(full.memory[10:])
    np.testing.assert_array_equal(growth, growth[0])
    assert _graph_bytes() <= growth[0] < 1.02 * _graph_bytes() + 500
    assert window.memory[-1] - truncated.memory[-1] == pytest.approx(5 * _graph_bytes(), rel=0.2)
    assert full.distance == 0
    assert carried.distance < 1e-5
    assert 0.01 < window.distance < truncated.distance < 1


def test_live_bytes_follows_memory_until_it_is_free() -> None:
    outside = torch.ones(1000)
    with LiveBytes() as live:
        one = outside + 1
        assert live.peak == one.nbytes
        two = one.view(10, 100) * 2
        assert live.peak == one.nbytes + two.nbytes
        del one
        live.peak = 0
        two += 1
        assert live.peak == two.nbytes
        outside.add_(1)
        assert live.peak == two.nbytes


def test_the_benchmark_prints_its_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    bench_differentiable.main(["--quick", "--figure", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    for label in ("truncated", "window of 3", "carried", "full graph"):
        assert sum(line.startswith(label) for line in lines) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path).encode() not in picture.read_bytes()


def test_too_few_updates_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_differentiable.main(["--updates", "7"])
    assert stopped.value.code == 2
    assert "7: must be at least 8" in capsys.readouterr().err


# --- the examples ------------------------------------------------------------------------------------


def test_switch_ema_prints_every_method_and_judges_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    switch_ema.main(["--quick"])
    text = capsys.readouterr().out
    for label in ("SGD", "EMA", "Switch EMA", "Switch EMA, tracker"):
        assert len(re.findall(rf"^{label} +\d", text, re.MULTILINE)) == len(switch_ema.SETTINGS)
    assert len(re.findall(r"^  (shows|does not show|the contrary)  ", text, re.MULTILINE)) == 6 * len(
        switch_ema.SETTINGS
    )


def test_hare_and_tortoise_prints_every_method_and_judges_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    hare_tortoise.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    for method in hare_tortoise.METHODS:
        assert sum(line[:24].rstrip() == method.label for line in lines) == 1
    assert sum(bool(re.match("  (shows|does not show|the contrary)  ", line)) for line in lines) == 7


def _tiny_network(width: int = 4) -> nn.Sequential:
    network = digit_trials.network(0, width)
    assert isinstance(network, nn.Sequential)
    return network.double()


def _data(count: int = 40) -> Digits:
    data, _ = digit_trials.split(0, count)
    return Digits(data.images.double(), data.labels)


def test_the_largest_eigenvalue_is_that_of_the_hessian() -> None:
    model, data = nn.Linear(64, 10, bias=False).double(), _data()
    flat = model.weight.detach().flatten()

    def loss(weights: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(data.images @ weights.view(10, 64).T, data.labels)

    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    assert switch_ema.largest_eigenvalue(model, data, steps=200) == pytest.approx(expected, rel=1e-3)


def test_the_rise_does_not_depend_on_how_layers_share_their_size() -> None:
    """What filter normalization is for: a network with its first layer doubled and the second halved is the same."""
    model, data = _tiny_network(), _data()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.bias.zero_()
    before = [parameter.clone() for parameter in model.parameters()]
    rise = switch_ema.mean_rise(model, data)
    assert all(torch.equal(parameter, was) for parameter, was in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[2].weight.div_(2)
    assert switch_ema.mean_rise(model, data) == pytest.approx(rise, rel=1e-9)


def test_wrong_labels_are_as_many_as_asked_and_all_wrong() -> None:
    data = _data()
    wrong = digit_trials.with_wrong_labels(data, 0.25, seed=3)
    assert int((wrong.labels != data.labels).sum()) == 10
    assert torch.equal(wrong.images, data.images)
    assert 0 <= wrong.labels.min() <= wrong.labels.max() <= 9


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([-1.0, -1.2, -0.9], "shows"),
        ([1.0, 1.2, 0.9], "the contrary"),
        ([-1.0, 1.0, -0.5], "does not show"),
        ([-1.0], "NOT JUDGED"),
    ],
)
def test_a_claim_shows_where_the_interval_says_so(differences: list[float], word: str) -> None:
    line = digit_trials.verdict("a claim", differences)
    assert line.startswith(f"  {word}")


def test_the_interval_is_students() -> None:
    """Mean -1, standard error 0.1 (deviations 0.1732 / sqrt 3), and 4.303 of them for two degrees of freedom."""
    line = digit_trials.verdict("a claim", [-1.0, -1.0 + 0.1732, -1.0 - 0.1732], scale=100)
    assert line.endswith("a claim: -1e+02 (-1.4e+02 to -57)")


def test_training_and_test_images_are_all_of_them_once() -> None:
    training, test = digit_trials.split(1, 700)
    assert (len(training), len(test)) == (700, 1097)
    rows = {tuple(row) for row in torch.cat([training.images, test.images]).tolist()}
    assert len(rows) == len({tuple(row) for row in digit_trials.digits()[0].tolist()})

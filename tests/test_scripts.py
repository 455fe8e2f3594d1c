"""The recorded training runs, and the comparison with the peers that the README quotes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import compare_peers
import numpy as np
import pytest
import torch
import trained_networks
import trajectories
from compare_peers import Entry, PeerMethod, Row, true_weights

from posthoc_cli.profiles import PowerFunction

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


# --- recorded runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", trajectories.NAMES)
def test_a_run_is_recorded_after_every_step(name: str) -> None:
    run = trajectories.record(name, 30)
    assert (run.name, run.steps, run.weights.dtype) == (name, 30, np.float32)
    assert run.weights.shape == (30, sum(int(np.prod(shape)) for shape in run.shapes))
    assert 3_600 < run.weights.shape[1] < 12_000
    assert np.isfinite(run.weights).all()
    assert np.all(np.linalg.norm(np.diff(run.weights, axis=0), axis=1) > 0)


@pytest.mark.parametrize("name", trajectories.NAMES)
def test_a_run_is_the_same_whatever_the_callers_random_numbers(name: str) -> None:
    torch.manual_seed(1)
    first = trajectories.record(name, 30).weights
    torch.manual_seed(2)
    np.testing.assert_array_equal(trajectories.record(name, 30).weights, first)


def test_recording_leaves_random_numbers_and_threads_alone() -> None:
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    trajectories.record("classifier-sgd", 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2


def test_training_gets_somewhere() -> None:
    run = trajectories.record("classifier-sgd", 600)
    replay = trajectories.Replay(run)
    images, labels = trained_networks.digits()
    right = []
    for index in (0, 599):
        replay.go_to(index)
        first, first_bias, second, second_bias = replay.parameters()
        logits = torch.relu(images @ first.T + first_bias) @ second.T + second_bias
        right.append(float((logits.argmax(dim=1) == labels).float().mean()))
    assert right[0] < 0.5 < 0.9 < right[1]


@pytest.mark.parametrize("name", trajectories.NAMES)
def test_a_run_learns(name: str) -> None:
    """Most of a denoiser's loss is noise that nobody could foresee."""
    run = trajectories.record(name, 300)
    first, last = trajectories.mean_loss(run, 0), trajectories.mean_loss(run, 299)
    assert last < (0.85 if "denoiser" in name else 0.6) * first
    assert trajectories.mean_loss(run, 0) == first


def test_every_run_is_described_and_has_its_own_random_numbers() -> None:
    recipes = trajectories.RECIPES.values()
    assert all(recipe.description.endswith(".") for recipe in recipes)
    others = [recipe.seed for name, recipe in trajectories.RECIPES.items() if name not in trajectories.PEER_RUNS]
    assert len({*others, 2312}) == len(others) + 1


def test_half_of_the_runs_are_held_out_and_none_that_other_figures_rest_on() -> None:
    assert set(trajectories.HELD_OUT) < set(trajectories.NAMES)
    assert len(trajectories.HELD_OUT) == len(trajectories.NAMES) // 2
    assert not set(trajectories.HELD_OUT) & set(trajectories.PEER_RUNS)


@pytest.mark.parametrize("name", trajectories.NAMES)
def test_the_clock_counts_steps_or_images(name: str, tmp_path: Path) -> None:
    for _ in ("recorded", "cached"):
        run = trajectories.record(name, 10, tmp_path)
        sizes = [16] * 4 + [64] * 4 + [256] * 2 if name == "classifier-images" else [1] * 10
        assert run.times.dtype == np.float64
        np.testing.assert_array_equal(np.diff(run.times, prepend=0), sizes)


def test_a_trajectory_without_a_clock_counts_its_steps() -> None:
    run = trajectories.record("denoiser-adam", 4)
    np.testing.assert_array_equal(trajectories.Trajectory(run.name, run.weights[:3], run.shapes).times, [1, 2, 3])


def test_the_batch_grows_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    recipe = trajectories.RECIPES["classifier-images"]

    def watching() -> trained_networks.Loss:
        loss = recipe.task.loss()
        return lambda model, size: (sizes.append(size), loss(model, size))[1]

    watched = replace(recipe, task=replace(recipe.task, loss=watching))
    monkeypatch.setitem(trajectories.RECIPES, "classifier-images", watched)
    run = trajectories.record("classifier-images", 20)
    np.testing.assert_array_equal(np.cumsum(sizes), run.times)


def test_a_restart_forgets_the_optimizers_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's first step is as long as the rate in every parameter; later ones hardly ever are."""
    restarted = trajectories.record("denoiser-restart", 200).weights
    recipe = replace(trajectories.RECIPES["denoiser-restart"], restart=None)
    monkeypatch.setitem(trajectories.RECIPES, "denoiser-restart", recipe)
    kept = trajectories.record("denoiser-restart", 200).weights
    np.testing.assert_array_equal(restarted[:120], kept[:120])
    rate = 5e-3 * 1e-3
    for weights, forgot in ((restarted, True), (kept, False)):
        move = np.abs(weights[120].astype(np.float64) - weights[119])
        assert (np.mean(np.abs(move / rate - 1) < 0.05) > 0.95) == forgot


def test_the_plain_classifier_wanders_about_one_place() -> None:
    """A random walk is twice as far away after four times the steps; drift makes that more."""
    grown = {}
    for name in ("classifier-plain", "denoiser-constant"):
        weights = trajectories.record(name, 4000).weights[1500:]
        moved = {lag: np.linalg.norm(weights[lag::50] - weights[:-lag:50], axis=1).mean() for lag in (250, 1000)}
        grown[name] = moved[1000] / moved[250]
    assert grown["classifier-plain"] < 1.4 < 2 < grown["denoiser-constant"]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (trajectories._inverse_sqrt, {0: 1, 0.05: 1, 0.2: 0.5, 0.8: 0.25}),
        (trajectories._cuts, {0: 1, 0.5999: 1, 0.6: 0.1, 0.8499: 0.1, 0.85: 0.01}),
        (trajectories._cosine(1e-3), {0: 1e-3, 0.5: 0.5005, 1: 1e-3}),
        (trajectories._warm_up_stable_decay, {0: 1e-3, 0.025: 0.5, 0.05: 1, 0.8: 1, 0.9: 0.505, 1: 0.01}),
        (trajectories._warm_up_again, {0: 1e-3, 0.025: 0.5, 0.05: 1, 0.2: 0.5, 0.6: 1e-3, 0.625: 0.5, 0.8: 0.5}),
    ],
)
def test_rates_are_what_they_are_said_to_be(rate: object, expected: dict[float, float]) -> None:
    assert callable(rate)
    assert {at: rate(at) for at in expected} == pytest.approx(expected)


def test_the_parameters_of_batch_norm_are_recorded_and_its_statistics_are_not() -> None:
    run = trajectories.record("cnn-batch-norm", 30)
    assert run.shapes.count((12,)) == run.shapes.count((32,)) == 2
    assert sum(math.prod(shape) for shape in run.shapes) == 108 + 24 + 3456 + 64 + 1290
    scale, shift = run.weights[-1, 108:120], run.weights[-1, 120:132]
    assert np.all(scale != 1)
    assert np.all(shift != 0)


def test_a_digit_is_read_as_its_label_and_its_pixels() -> None:
    images, labels = trained_networks.digits()
    sequences = trained_networks.digit_sequences()
    assert sequences.shape == (len(images), 33)
    assert torch.equal(sequences[:, 0], 16 + labels)
    levels = torch.stack([sequences[:, 1:] // 4, sequences[:, 1:] % 4], dim=2).flatten(1)
    assert (levels.min(), levels.max()) == (0, 3)
    assert torch.equal(levels == 0, images < (4.5 - 4.9) / 6)
    assert torch.equal(levels == 3, images > (12.5 - 4.9) / 6)


def test_the_transformer_sees_no_later_token() -> None:
    model = trajectories.RECIPES["transformer-adamw"].task.model()
    tokens = trained_networks.digit_sequences()[:1, :-1]
    other = tokens.clone()
    other[0, 20] = (other[0, 20] + 1) % 16
    with torch.no_grad():
        change = (model(other) - model(tokens)).abs().amax(dim=2)[0]
    assert torch.all(change[:20] < 1e-6)
    assert torch.all(change[20:] > 1e-6)


def test_a_cached_run_is_read_and_belongs_to_its_name_and_steps(tmp_path: Path) -> None:
    recorded = trajectories.record("classifier-sgd", 5, tmp_path / "runs")
    (file,) = (tmp_path / "runs").iterdir()
    np.save(file, recorded.weights + 1)
    cached = trajectories.record("classifier-sgd", 5, tmp_path / "runs")
    np.testing.assert_array_equal(cached.weights, recorded.weights + 1)
    assert cached.shapes == recorded.shapes
    assert trajectories.record("classifier-sgd", 6, tmp_path / "runs").steps == 6


def test_a_replay_stands_where_the_run_stood() -> None:
    run = trajectories.record("denoiser-adam", 4)
    replay = trajectories.Replay(run)
    held = [parameter.data_ptr() for parameter in replay.parameters()]
    replay.go_to(2)
    assert tuple(tuple(parameter.shape) for parameter in replay.parameters()) == run.shapes
    weights = torch.nn.utils.parameters_to_vector(replay.parameters()).detach().numpy()
    np.testing.assert_array_equal(weights, run.weights[2])
    assert [parameter.data_ptr() for parameter in replay.parameters()] == held


@pytest.mark.parametrize(("name", "steps"), [("no-such-run", 10), ("classifier-sgd", 0)])
def test_a_run_that_there_is_not_is_refused(name: str, steps: int) -> None:
    with pytest.raises(ValueError, match=r"choose from denoiser-adam|at least 1"):
        trajectories.record(name, steps)


# --- the parts of the comparison -------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("sigma_rel", compare_peers.TARGETS)
def test_the_scripts_own_true_average_is_the_packages_definition(sigma_rel: float, stride: int) -> None:
    seen = np.arange(stride, 601, stride)
    counts = true_weights(sigma_rel, 600, stride)
    expected = PowerFunction.from_sigma_rel(sigma_rel, 600).discrete_weights(seen)
    np.testing.assert_allclose(counts[seen - 1], expected, rtol=1e-9, atol=1e-15)
    assert counts.sum() == pytest.approx(1)


def test_the_peers_at_stride_10_track_another_profile_than_they_were_asked_for() -> None:
    """Mean distance of the tracked average from the end, in multiples of what 0.05 stands for."""
    asked = true_weights(0.05, 2000)
    gamma = compare_peers.gamma_of(0.05)
    age = np.arange(2000)[::-1]
    for stride, longer in ((1, 1), (10, 6.8)):  # (gamma + 2) / ((gamma + 1) / 10 + 1)
        (tracked,) = PeerMethod(2000, stride, 100, first_call=1)._recorded(gamma, [2000])
        assert (tracked @ age) / (asked @ age) == pytest.approx(longer, rel=0.02)


class _Broken:
    def __init__(self, *_: object) -> None:
        raise RuntimeError("no luck\nat all")

    def update(self) -> None: ...

    def average(self, sigma_rel: float) -> Iterable[torch.Tensor]: ...  # type: ignore[empty-body]


def test_a_peer_that_fails_is_a_line_with_its_reason() -> None:
    run = trajectories.record("classifier-sgd", 20)
    row = compare_peers._row(Entry("broken", "no-such-package", _Broken, 1), run, 1, np.ones((5, 3610)))
    assert row.failure == "RuntimeError: no luck"
    for table in (compare_peers.text_table([row]), compare_peers.markdown_table([row])):
        assert "broken (not installed)" in table
        assert "RuntimeError: no luck" in table


def test_an_error_of_our_own_is_not_hidden() -> None:
    run = trajectories.record("classifier-sgd", 20)
    with pytest.raises(RuntimeError, match="no luck"):
        compare_peers._row(Entry("ours", "posthoc-cli", _Broken), run, 1, np.ones((5, 3610)))


def test_the_text_table_is_aligned() -> None:
    rows = [Row("a", errors=[0.1] * 5), Row("a long name", 10, [1e-6] * 5, 1e-7, 1.0, 0.01)]
    header, short, long = compare_peers.text_table(rows).splitlines()
    assert len(header) == len(long)
    assert short.rindex("1.0e-01") == long.rindex("1.0e-06") == header.index("0.28") - 3


@pytest.mark.parametrize("steps", ["0", "100", "1001", "many"])
def test_steps_that_the_snapshots_do_not_divide_are_a_usage_error(
    steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare_peers.main(["--steps", steps])
    assert stopped.value.code == 2
    assert steps in capsys.readouterr().err


# --- the comparison --------------------------------------------------------------------------------


def test_ours_is_near_the_truth_and_the_peers_where_their_method_puts_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_peers, "PEER_RUNS", ("classifier-sgd",))
    compare_peers.main(["--steps", "600", "--markdown"])
    printed = capsys.readouterr()
    assert printed.err == ""
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines() if "|" in line]
    assert len(table) == 12
    rows = {(_without_version(line[0]), line[1]): line for line in table[2:]}
    assert len(rows) == 10
    distance = {key: np.array(line[2:7], dtype=float) for key, line in rows.items()}
    assert np.all(distance["posthoc_cli", "1"] < 1e-4)
    assert np.all(distance["posthoc_cli", "10"] < 1.1 * distance["every 10th step, exactly", "10"] + 1e-4)
    for peer in ("ema_pytorch", "posthoc_ema", "posthoc_ema, update_after_step=1"):
        assert np.all(distance[peer, "1"] < 0.1)
        assert np.all(distance[peer, "10"] > 10 * distance["posthoc_cli", "10"])
        assert float(rows[peer, "1"][7]) < 1e-4
        assert float(rows[peer, "10"][7]) < 1e-4


def _without_version(label: str) -> str:
    return re.sub(r" \d+\.[\w.+]*", "", label)

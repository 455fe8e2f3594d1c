"""Errors are as predicted, and no larger than the published method's, with few snapshots or sudden
motion.

Walks of known rates are tracked; every average made from the directory is compared with the float64
sum over all updates.
"""

import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checking import refused
from factories import Span, exact_weights
from safetensors.torch import save_file

from posthoc_cli import (
    Decay,
    PostHocEMA,
    Run,
    disk_sources,
    import_checkpoints,
    plan_synthesis,
    synthesize,
)
from posthoc_cli.profiles import Profile
from posthoc_cli.targets import Target

Floats = npt.NDArray[np.float64]

SIZE = 400
STEPS = 4000
STRIDE = 10
WIDTHS = (0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.28)

RATES: dict[str, Callable[[Floats], Floats]] = {
    "constant": np.ones_like,
    "cosine": lambda x: np.cos(np.pi * x / 2) ** 2,
    "frozen": lambda x: np.where(x < 0.5, 1.0, 0.0),
    "restarts": lambda x: 1.0 - 0.97 * (4 * x % 1),
}


def walk(rate: str, steps: int = STEPS, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return weights of norm about 1 that move a quarter of that in a random walk: shape [steps,
    SIZE]."""
    generator = np.random.default_rng(seed)
    speed = RATES[rate](np.arange(steps) / steps)
    moves = generator.normal(size=(steps, SIZE)) * speed[:, None]
    moves *= 0.25 / np.sqrt(SIZE * np.sum(speed**2))
    return (generator.normal(size=SIZE) / SIZE**0.5 + np.cumsum(moves, axis=0)).astype(np.float32)


def course(distance: Callable[[Floats], Floats], steps: int = STEPS) -> npt.NDArray[np.float32]:
    """Return weights of norm about 1 that move by `distance(fraction of training)` in one
    direction."""
    place, direction = np.random.default_rng(0).normal(size=(2, SIZE)) / SIZE**0.5
    return (place + distance(np.arange(1, steps + 1) / steps)[:, None] * direction).astype(
        np.float32
    )


def wave(
    periods: float, amplitude: float, phase: float = 1.0, steps: int = STEPS
) -> npt.NDArray[np.float32]:
    return course(lambda x: amplitude * np.sin(2 * np.pi * periods * x + phase), steps)


def track(
    folder: Path,
    path: npt.NDArray[np.float32],
    stride: int = STRIDE,
    times: Floats | None = None,
    **options: object,
) -> None:
    model = torch.nn.Linear(SIZE, 1, bias=False)
    settings = {"update_every": stride, "checkpoint_every": 200, "max_checkpoints": None} | options
    if times is not None:
        settings["t_unit"] = "seconds"
    with PostHocEMA.from_model(model, folder, **settings) as tracker:  # type: ignore[arg-type]
        for index, row in enumerate(torch.from_numpy(path)):
            with torch.no_grad():
                model.weight[0].copy_(row)
            tracker.update_(model, None if times is None else float(times[index]))


def made(
    folder: Path, wanted: list[float | Target | Profile], method: str
) -> tuple[Floats, Floats]:
    """Return averages from a directory, shape [targets, SIZE], and their predicted errors."""
    plan = plan_synthesis(disk_sources(folder), wanted, method=method)
    ((_, tensors),) = synthesize(plan)
    return np.array(
        [value[0].double().numpy() for value in tensors]
    ), plan.reconstruction.predicted_error


def true(
    path: npt.NDArray[np.float32], stride: int = STRIDE, times: Floats | None = None
) -> Floats:
    """Return the exact averages of WIDTHS over all updates: shape [targets, SIZE]."""
    updates = slice(stride - 1, None, stride)
    clock = np.arange(1.0, len(path) + 1) if times is None else times
    return np.array([exact_weights(s, clock[updates]) for s in WIDTHS]) @ path[updates].astype(
        np.float64
    )


def judged(
    folder: Path, path: npt.NDArray[np.float32], stride: int = STRIDE, times: Floats | None = None
) -> tuple[Floats, Floats, Floats]:
    """Return, for WIDTHS from a directory, the errors, the published method's errors, and the
    predicted errors."""
    truth = true(path, stride, times)
    (found, predicted), (published, _) = (
        made(folder, [*WIDTHS], method) for method in ("minvar", "paper")
    )
    return errors(found, truth), errors(published, truth), predicted


def assert_honest(actual: Floats, theirs: Floats, predicted: Floats, within: float = 3) -> None:
    """Require errors no larger than the published method's and than predicted, up to the last digit
    of float32."""
    assert np.all(actual <= 1.05 * theirs + 3e-8)
    assert np.all(actual < within * predicted + 3e-8)


def errors(found: Floats, truth: Floats) -> Floats:
    return np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)


CLOSE = {"sigma_rels": (0.05, 0.10)}
ONE = {"sigma_rels": (0.10,)}
EXACT = {"checkpoint_dtype": "float32"}
HALF = {"checkpoint_dtype": "float16"}


def paused() -> Floats:
    """Return a clock in seconds that pauses in the middle for as long as the training takes."""
    return np.arange(1.0, STEPS + 1) + np.where(np.arange(STEPS) < STEPS // 2, 0.0, 4000.0)


@pytest.mark.parametrize(
    ("path", "options", "within"),
    [
        # From the motion between the survivors alone, predictions were up to 200 times too small.
        pytest.param(lambda: walk("cosine"), {"max_checkpoints": 1}, 4, id="one left"),
        pytest.param(lambda: walk("frozen"), {**CLOSE, "max_checkpoints": 2}, 4, id="two left"),
        pytest.param(lambda: walk("restarts"), {**ONE, "max_checkpoints": 3}, 4, id="three left"),
        # In step with the snapshots, an oscillation looks like a standstill: errors were up to 47
        # times the predicted.
        *(
            pytest.param(
                lambda a=a, phase=phase: wave(20, a, phase), HALF, 2.5, id=f"in step {a} {phase}"
            )
            for a, phase in ((1.0, 0.0), (0.1, 1.0))
        ),
        # Slow ones, and one of two updates: treated as a walk, errors were up to 110 times the
        # published method's.
        pytest.param(lambda: wave(2.5, 0.5), EXACT, 3, id="slow"),
        pytest.param(
            lambda: wave(2.5, 0.5), {**EXACT, "max_checkpoints": 3}, 3, id="slow, three left"
        ),
        pytest.param(lambda: wave(2.5, 0.5), {**EXACT, **CLOSE}, 3, id="slow, close"),
        pytest.param(lambda: wave(200, 0.5), EXACT, 3, id="fast"),
        pytest.param(
            lambda: walk("cosine"), {**EXACT, "times": paused()}, 3, id="a pause of the clock"
        ),
        pytest.param(
            lambda: walk("cosine", 25),
            {**EXACT, "checkpoint_every": 5, "stride": 1},
            3,
            id="25 steps",
        ),
        # Coefficients fit the projections: without the leverage of these, errors are up to 1.8
        # times the predicted.
        pytest.param(
            lambda: walk("restarts", 2000),
            {**EXACT, "checkpoint_every": 50},
            1.4,
            id="many snapshots",
        ),
    ],
)
def test_errors_are_as_predicted_and_no_larger_than_published(
    tmp_path: Path,
    path: Callable[[], npt.NDArray[np.float32]],
    options: dict[str, Any],
    within: float,
) -> None:
    """Up to the last digit of float32."""
    weights, (stride, times) = path(), (options.get("stride", STRIDE), options.get("times"))
    track(tmp_path, weights, **options)
    actual, theirs, predicted = judged(tmp_path, weights, stride, times)
    assert_honest(actual, theirs, predicted, within)
    # one realisation's error is within 10 % of its expectation; the rest is the motion
    if within == 4:
        assert np.median(actual / predicted) == pytest.approx(1, abs=0.7)


@pytest.mark.parametrize(
    ("path", "tracked", "bound", "widest", "options"),
    [
        (lambda: walk("cosine", seed=1), (0.05, 0.28), 0.01, 0.28, {"checkpoint_every": 100}),
        (
            lambda: wave(2.5, 0.5, 0.0, 2000),
            (0.05, 0.28),
            0.01,
            0.28,
            {**EXACT, "checkpoint_every": 50},
        ),
        (
            lambda: course(lambda x: np.exp(-5 * x), 2000),
            (0.05, 0.10),
            0.003,
            0.15,
            {**EXACT, "checkpoint_every": 50},
        ),
    ],
    ids=["walk", "wave", "fall"],
)
def test_pruning_to_an_error_leaves_that_error(
    tmp_path: Path,
    path: Callable[[], npt.NDArray[np.float32]],
    tracked: tuple[float, ...],
    bound: float,
    widest: float,
    options: dict[str, Any],
) -> None:
    """A judgement by the survivors alone left errors of 5 to 15 % for a bound of 1 %."""
    weights = path()
    track(tmp_path, weights, sigma_rels=tracked, **options)
    pruning = Run(tmp_path).prune(max_error=bound, sigma_range=(0.05, widest))
    assert pruning.to_delete
    assert pruning.before.worst <= pruning.after.worst <= bound
    assert np.all(pruning.after.predicted_error >= pruning.before.predicted_error)
    wanted = [index for index, width in enumerate(WIDTHS) if width <= widest + 1e-9]
    found, predicted = made(tmp_path, [WIDTHS[index] for index in wanted], "minvar")
    actual = errors(found, true(weights)[wanted])
    assert actual.max() <= bound
    assert options.get("checkpoint_dtype") or np.all(actual < 3 * predicted)


def test_the_rounding_of_updates_is_predicted(tmp_path: Path) -> None:
    """Of averages that are stored in float32, and so exactly; values, folds and a read are
    rounded."""
    path = walk("constant", 1000)
    track(tmp_path, path, 1, checkpoint_every=1000, checkpoint_dtype="float32")
    found, predicted = made(tmp_path, [0.05, 0.28], "minvar")
    actual = errors(found, true(path, 1)[[0, -1]])
    assert np.all(np.abs(np.log(actual / predicted)) < np.log(1.6)), actual / predicted


def test_a_combination_replaces_the_newest_snapshot_only_if_it_is_clearly_better(
    tmp_path: Path,
) -> None:
    """The rounding of a combination is known; projections overestimate the snapshot's error by a
    fifth here."""
    place, direction = np.random.default_rng(23).normal(size=(2, SIZE)) / SIZE**0.5
    steps = np.arange(1.0, 3841)
    stride = 6
    path = (place + np.sin(40 * np.pi * steps / 3840 + 1)[:, None] * direction).astype(np.float32)
    track(tmp_path, path, stride, checkpoint_every=60, checkpoint_dtype="float16")
    truth = exact_weights(0.02, steps[stride - 1 :: stride])[None, :] @ path[
        stride - 1 :: stride
    ].astype(np.float64)
    found, newest = (
        errors(made(tmp_path, [width], "minvar")[0], truth)[0] for width in (0.02, 0.05)
    )
    assert found <= 1.05 * newest


def test_the_error_of_a_decay_that_begins_steeply_is_not_overestimated(tmp_path: Path) -> None:
    """A 1-sqrt decay's density grows without bound at its start; its predicted error was 2 to 3
    times too large."""
    path = walk("constant")
    track(tmp_path, path, checkpoint_every=100, checkpoint_dtype="float32")
    found, predicted = made(tmp_path, [Decay("1-sqrt", 0.2)], "minvar")
    seen = np.arange(STRIDE, STEPS + 1, STRIDE)
    mass = np.sqrt(np.clip((seen / STEPS - 0.8) / 0.2, 0, 1))
    truth = np.diff(mass, prepend=0.0)[None, :] @ path[seen - 1].astype(np.float64)
    assert 0.5 < errors(found, truth)[0] / predicted[0] < 2


@pytest.mark.parametrize("every", [10, 20])
def test_a_snapshot_at_every_update_or_second_one_is_used(tmp_path: Path, every: int) -> None:
    """Motion between two updates contributes to no average."""
    path = walk("cosine", 600)
    track(tmp_path, path, checkpoint_every=every, checkpoint_dtype="float32")
    actual, theirs, predicted = judged(tmp_path, path)
    assert np.all(actual <= 1.05 * theirs + 3e-8)  # the last digit of float32 aside
    assert np.all(predicted < 4 * actual + 1e-7)
    assert actual.max() < (1e-5 if every == 20 else 2e-6)


# In the last case, a search for the motion that starts with the first estimate of the noise gives
# errors of 9.5 times the predicted ones, and 7.5 times the published method's.
@pytest.mark.parametrize(
    ("tracked", "moment", "seed"), [((0.10,), 2000, 0), ((0.05, 0.28), 2000, 0), ((0.10,), 3000, 1)]
)
def test_weights_drawn_anew_right_after_a_snapshot_are_expected(
    tmp_path: Path, tracked: tuple[float, ...], moment: int, seed: int
) -> None:
    """Distances show the moment, so that errors are as predicted, also those of averages over the
    time after it."""
    path = walk("cosine", seed=seed)
    path[moment:, :40] += np.float32(0.15) * np.random.default_rng(2).normal(size=40).astype(
        np.float32
    )
    track(tmp_path, path, sigma_rels=tracked, checkpoint_dtype="float32")
    windows = [(moment, moment + 200), (moment, moment + 800)]
    wanted = [*WIDTHS[2:], *(Span(*window) for window in windows)]
    (found, predicted), (published, _) = (
        made(tmp_path, wanted, method) for method in ("minvar", "paper")
    )
    later = [
        path[begin + STRIDE - 1 : end : STRIDE].astype(np.float64).mean(axis=0)
        for begin, end in windows
    ]
    truth = np.concatenate((true(path)[2:], later))
    actual = errors(found, truth)
    assert_honest(actual, errors(published, truth), predicted)
    assert np.all(predicted < 6 * actual + 3e-8)


# --- averages of other programs, without a sketch of the path


def judged_files(
    folder: Path,
    path: Floats,
    times: range,
    widths: tuple[float, ...] = (0.05, 0.28),
    dtype: str = "float32",
) -> tuple[Floats, Floats, Floats]:
    """Return what `judged` does, from files as EDM2 writes them."""
    folder.mkdir()
    for t in times:
        for width in widths:
            average = exact_weights(width, range(1, t + 1)) @ path[:t]
            content = {"ema": {"w": torch.from_numpy(average).to(getattr(torch, dtype))[None]}}
            torch.save(content, folder / f"network-snapshot-{t:07}-{width:.3f}.pkl")
    truth = true(path.astype(np.float32), 1)
    (found, predicted), (published, _) = (
        made(folder, [*WIDTHS], method) for method in ("minvar", "paper")
    )
    return errors(found, truth), errors(published, truth), predicted


@pytest.mark.parametrize("moved", [1e-6, 1e-4])
def test_the_rounding_of_files_is_not_taken_for_motion(tmp_path: Path, moved: float) -> None:
    """The weights move less than float16 resolves; if rounding counts as motion, predictions are
    half as large."""
    random = np.random.default_rng(0)
    place = random.normal(size=SIZE)
    path = place + moved * np.cumsum(random.normal(size=(STEPS, SIZE)), axis=0) / STEPS**0.5
    actual, _, predicted = judged_files(
        tmp_path / "run", path, range(200, STEPS + 1, 200), dtype="float16"
    )
    assert np.all(np.abs(np.log(actual / predicted)) < np.log(1.35))


def test_predictions_allow_for_oscillations_that_files_do_not_show(tmp_path: Path) -> None:
    """Without the widening 4 of 15 runs are within 3; nothing in the files excludes that they
    oscillate."""
    holds = []
    for number, (periods, phase) in enumerate(product((5, 10, 20, 21, 40), (0, 1, 2))):
        path = wave(periods, 0.1, phase).astype(np.float64)
        actual, _, predicted = judged_files(
            tmp_path / f"{number}", path, range(800, STEPS + 1, 800)
        )
        holds.append(bool(np.all(actual < 3 * predicted)))
    assert sum(holds) >= 9


@pytest.mark.parametrize(
    ("still", "noise", "every"),
    [
        ("copy", 0.0, 500),
        ("copy", 5.0, 200),
        ("middle", 5.0, 500),
        ("last fifth", 0.0, 200),
        ("half", 5.0, 500),
    ],
)
def test_a_standstill_of_checkpoints_says_nothing_about_motion_elsewhere(
    tmp_path: Path, still: str, noise: float, every: int
) -> None:
    """With equal checkpoints, or weights that did not move for a while, errors were up to 200 times
    too large."""
    random = np.random.default_rng(0)
    path = 100 + np.cumsum(random.normal(size=(STEPS, SIZE)), axis=0)
    path += noise * random.normal(size=path.shape)
    stop = STEPS * 4 // 5 if still == "last fifth" else STEPS // 2
    if still == "middle":
        path = np.insert(path[: STEPS * 3 // 4], [stop] * (STEPS // 4), path[stop - 1], axis=0)
    elif still == "copy":
        path = np.concatenate((path, path[-1:]))
    else:
        path[stop:] = path[stop - 1]
    for step in {*range(every, STEPS + 1, every), len(path)}:
        save_file(
            {"w": torch.from_numpy(path[step - 1]).float()[None]},
            tmp_path / f"step{step}.safetensors",
        )
    found, predicted = made(tmp_path, [*WIDTHS], "minvar")
    ratios = errors(found, true(path.astype(np.float32), 1)) / predicted
    assert np.all((ratios > 0.5) & (ratios < 2)), ratios


def test_checkpoints_show_that_weights_forget_between_them(tmp_path: Path) -> None:
    """Weights wander about one place, as those of SGD at a constant rate; a walk explains their
    EMAs as well as noise does, and predicts half of the error. The decay cannot be checked, which
    the predicted error contains.
    """
    memory = 5
    decay = 0.99
    random = np.random.default_rng(memory)
    pull = 1 / memory
    place = random.normal(size=SIZE) / SIZE**0.5
    path = np.empty((STEPS, SIZE))
    weights = average = place
    for step in range(STEPS):
        weights = weights + pull * (place - weights) + 0.01 / SIZE**0.5 * random.normal(size=SIZE)
        average = decay * average + (1 - decay) * weights
        path[step] = weights
        if (step + 1) % 200 == 0:
            content = {
                key: {"w": torch.from_numpy(one)[None].clone()}
                for key, one in (("model", weights), ("ema", average))
            }
            torch.save(content | {"step": step + 1}, tmp_path / f"{step + 1}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the decay may be undetermined
        import_checkpoints(tmp_path, tmp_path / "run", ema_decay=decay)
    found, predicted = made(tmp_path / "run", [*WIDTHS], "minvar")
    actual = errors(found, true(path.astype(np.float32), 1))
    ratios = actual / predicted
    assert np.all((ratios > 0.4) & (ratios < 1.5)), ratios


def test_usual_mistakes_with_a_tracker_name_what_was_meant(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=5)
    for name in ("update", "update_parameters"):
        with pytest.raises(AttributeError, match=r"call ema.update_\(model\) after each step"):
            getattr(ema, name)
    assert ema.step == 0
    with refused("state", "none of a tracker", "'weight', 'bias'", "ema.state_dict()"):
        ema.load_state_dict(model.state_dict())
    with refused("device", "'cuda'", "or 'model' for the model's own device"):
        PostHocEMA.from_model(model, tmp_path / "other", device="cuda")
    with refused("checkpoint_every", "checkpoint_every 100.0: must be a whole number"):
        PostHocEMA.from_model(model, tmp_path / "other", checkpoint_every=100.0)  # type: ignore[arg-type]

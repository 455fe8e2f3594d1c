"""The audit of averages of a real training, and of averages that are broken in the ways of public
bug reports."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ema_command import Ema
from trained import EVERY, STEPS, Average, Weights, named, timm, train, write
from trained import ema as averaged

from posthoc_cli import PostHocEMA, Run, errors, import_checkpoints

DECAY = 0.995
STUCK = ("2.weight", "2.bias")
HELD_OUT = {"falls": True, "seed": 7}
"""A training that was not used to choose any threshold."""


def when(condition: Callable[[int], object], update: Average, otherwise: Average) -> Average:
    return lambda step, average, weights: (update if condition(step) else otherwise)(
        step, average, weights
    )


def stay(_: int, average: np.ndarray, __: np.ndarray) -> np.ndarray:
    return average


def copy(_: int, __: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights.copy()


def two_stuck(step: int, average: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """As under torch.compile with half of the names."""
    sizes = {name: tensor.numel() for name, tensor in named(weights).items()}
    stuck = np.concatenate([np.full(size, name in STUCK) for name, size in sizes.items()])
    return np.where(stuck, average, averaged(DECAY)(step, average, weights))


def log_error(found: float | None, decay: float) -> float:
    """Return the error of a found decay, as the logarithm of the ratio of time constants."""
    assert found is not None
    return abs(math.log((1 - found) / (1 - decay)))


HEALTHY: list[tuple[dict[str, Any], float, torch.dtype]] = [
    ({"falls": True}, 0.995, torch.float16),
    ({}, 0.99, torch.bfloat16),
    ({"rate": 1e-2, "optimizer": "SGD"}, 0.999, torch.float32),
]


@pytest.mark.parametrize(("training", "decay", "dtype"), HEALTHY)
def test_a_healthy_average_is_as_claimed(
    training: dict[str, Any],
    decay: float,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    run = Run(write(tmp_path / "x", train(**training), averaged(decay), dtype))
    (found,) = run.audit()
    assert (found.verdict, found.warm_up, found.starts) == ("found", "", ())
    assert found.uncertainty is not None
    assert log_error(found.found, decay) < 3 * found.uncertainty
    (found,) = run.audit(decay)
    assert (found.verdict, found.is_bad) == ("as claimed", False), found.text


@pytest.mark.parametrize("settling", [0.3, math.inf], ids=["soon", "never"])
def test_weights_without_noise_show_the_decay_too(settling: float, tmp_path: Path) -> None:
    """They settle, in so many intervals, or move on a line; the covariance of such a path is nearly
    singular."""
    start = np.random.default_rng(0).standard_normal(train().shape[1])
    place = np.arange(STEPS)[:, None] / EVERY
    weights = start * (1 + (place if settling == math.inf else np.exp(-place / settling)))
    (found,) = Run(write(tmp_path / "x", weights, averaged(DECAY))).audit()
    assert found.uncertainty is not None
    assert log_error(found.found, DECAY) < min(3 * found.uncertainty, 0.03)


def test_steps_that_correlate_over_many_checkpoints(tmp_path: Path) -> None:
    """A random walk whose mean step lasts for ten intervals, against the decay that the average was
    made with."""
    random = np.random.default_rng(0)
    weights = np.zeros_like(train())
    mean = random.standard_normal(weights.shape[1])
    for step in range(1, STEPS):
        mean += (2 / (10 * EVERY)) ** 0.5 * random.standard_normal(mean.size) - mean / (10 * EVERY)
        weights[step] = weights[step - 1] + 1e-3 * mean + 1e-2 * random.standard_normal(mean.size)
    (found,) = Run(write(tmp_path / "x", weights, averaged(DECAY))).audit()
    assert found.uncertainty is not None
    assert log_error(found.found, DECAY) < found.uncertainty < 0.01


CASES: dict[str, tuple[Average, str, str]] = {
    "sign": (
        lambda _, e, x: e + (1 - DECAY) / 10 * (e - x),
        "undetermined",
        "do not explain how the average moves",
    ),
    "stuck": (stay, "does not move", "is its update called"),
    "microbatch": (
        lambda _, e, x: DECAY**8 * e + (1 - DECAY**8) * x,
        "too short",
        "once a microbatch",
    ),
    "every tenth": (
        when(lambda step: step % 10 == 0, averaged(DECAY), stay),
        "too long",
        r"every k-th step.* \(k = ",
    ),
    "reset": (
        when(lambda step: step == 850, copy, averaged(DECAY)),
        "began again",
        "near step 8[3-7]",
    ),
    "copy": (copy, "equals the weights", "copied"),
    "two tensors": (two_stuck, "some tensors", "2 of 6 tensors are not followed"),
    "another run": (
        lambda step, e, _: averaged(DECAY)(step, e, train()[step - 1]),
        "undetermined",
        "or are of another run",
    ),
    "not updated later": (
        when(lambda step: step > STEPS // 2, stay, averaged(DECAY)),
        "does not move",
        "from step 800 to 1,500, while the weights do",
    ),
    "copied first, at its own interval": (  # as ema-pytorch
        when(
            lambda step: step > 120, averaged(DECAY), when(lambda step: step % 10 == 1, copy, stay)
        ),
        "as claimed",
        "",
    ),
}


TIMES_A_STEP = {"microbatch": 8, "every tenth": 10}
"""The updates of a step, or steps of an update; a verdict gives a range that contains this number.
"""


@pytest.mark.parametrize("case", CASES)
def test_what_an_average_did_is_named(case: str, tmp_path: Path) -> None:
    update, verdict, reason = CASES[case]
    (found,) = Run(write(tmp_path / "x", train(**HELD_OUT), update)).audit(DECAY)
    assert (found.verdict, found.is_bad) == (
        verdict,
        verdict not in ("undetermined", "as claimed"),
    ), found.text
    assert re.search(reason, found.text)
    assert sorted(found.tensors) == sorted(STUCK if case == "two tensors" else ())
    if times := TIMES_A_STEP.get(case):
        low, high = re.search(r"([\d.]+) to ([\d.]+)", found.text).groups()  # type: ignore[union-attr]
        assert float(low) / 1.05 < times < float(high) * 1.05
    json.dumps(found.to_dict(), allow_nan=False)
    still = [one.begin for one in found.intervals if one.note == "was not updated"]
    assert still == [*range(800, STEPS, EVERY)] * (case == "not updated later")


def test_an_average_that_does_not_fit_its_weights_or_is_not_finite_is_named(tmp_path: Path) -> None:
    def form(step: int, weights: Weights, average: Weights) -> object:
        if step == 700:
            average["2.weight"][0, 0] = math.nan
        return timm(step, weights, average)

    with pytest.raises(
        errors.NonFiniteError, match=r"step700\.pt: tensor '2\.weight': holds nan or infinity"
    ):
        Run(write(tmp_path / "x", train(), averaged(DECAY), form=form)).audit()
    run = write(
        tmp_path / "y",
        train(),
        averaged(DECAY),
        form=lambda step, w, a: timm(step, w, a | {"other": torch.zeros(3)}),
    )
    reason = "an EMA and weights of different models: only the EMA has 'other'"
    with pytest.raises(errors.FileFormatError, match=reason):
        import_checkpoints(run, tmp_path / "run", ema_decay=DECAY)


def test_what_is_undetermined_is_said(tmp_path: Path) -> None:
    (found,) = Run(write(tmp_path / "short", train(), averaged(0.5))).audit(0.5)
    assert (found.verdict, found.found) == ("undetermined", None)
    assert "checkpoints closer than 20 steps would show it" in found.text
    (found,) = Run(
        write(tmp_path / "still", np.ones((STEPS, 1)) * train()[-1], averaged(DECAY))
    ).audit()
    assert "the weights stand still" in found.text
    (tmp_path / "one").mkdir()
    (tmp_path / "short" / "step300.pt").rename(tmp_path / "one" / "step300.pt")
    with pytest.raises(
        errors.InvalidValueError, match="no two times at which there are an average and the weights"
    ):
        Run(tmp_path / "one").audit()


def test_an_interval_with_two_explanations_has_the_one_near_the_others(tmp_path: Path) -> None:
    """Weights that return to the average, d = e - x = 0.8 v, move it by about as much (B d + s v)
    for the decay's B of 0.61 as for 0.09; by a bend in their way, the latter explains this interval
    better.
    """
    weights = train().copy()
    average = train()[0].copy()
    signs = np.random.default_rng(0).choice([-0.05, 0.05], average.size)
    for step in range(1, STEPS + 1):
        if step == 701:
            away = average - weights[699]
        if 700 < step <= 800:
            u = (step - 700) / 100
            weights[step - 1] = (
                weights[699] + (u * (1 - signs) / 0.8 - 8 * u * (1 - u) * signs) * away
            )
        elif step > 800:
            weights[step - 1] += weights[799] - train()[799]
        average = averaged(DECAY)(step, average, weights[step - 1])
    (found,) = Run(write(tmp_path / "x", weights, averaged(DECAY))).audit(DECAY)
    assert [one.found for one in found.intervals] == pytest.approx([1 / (1 - DECAY)] * 14, rel=0.2)


def test_a_trackers_snapshots_need_no_audit(tmp_path: Path, ema: Ema) -> None:
    model = torch.nn.Linear(3, 2)
    with PostHocEMA.from_model(
        model, tmp_path / "ema", update_every=1, checkpoint_every=1
    ) as tracker:
        tracker.update_(model)
    refused = ema("audit", tmp_path / "ema")
    reason = (
        "holds snapshots of a tracker: their headers hold the width exactly, and `ema "
        "info` shows it"
    )
    assert (refused.code, refused.error) == (2, f"{tmp_path / 'ema'}: {reason}")


def test_the_command(tmp_path: Path, ema: Ema) -> None:
    run = write(tmp_path / "x", train(), lambda _, e, x: DECAY**8 * e + (1 - DECAY**8) * x)
    done = ema("audit", run, "--claimed", DECAY, "--out", tmp_path / "a.png")
    assert done.code == 1
    assert "too short: " in done.out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    done = ema("audit", write(tmp_path / "y", train(), averaged(DECAY)), "--json")
    (found,) = done.json["audits"]
    assert found["verdict"] == "found"
    assert found["length"] == pytest.approx(1 / (1 - DECAY), rel=0.1)
    assert len(found["intervals"]) == len(range(EVERY, STEPS, EVERY))
    refused = ema("audit", run, "--claimed", "7")
    assert (refused.code, refused.error) == (2, "--claimed 7: must lie in (0, 1)")

"""Which decay averages of a real training have; and averages that are broken in the ways of public bug reports."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ema_command import Ema
from factories import random_walk, write_run
from trained import EVERY, STEPS, Average, named, network, train, write
from trained import ema as averaged

from posthoc_cli import PostHocEMA, Run, errors, import_checkpoints

DECAY = 0.995


def rounded(update: Average) -> Average:
    """Kept in bfloat16 after each update."""
    return lambda step, average, weights: torch.from_numpy(update(step, average, weights)).bfloat16().double().numpy()


def when(condition: object, one: Average, other: Average) -> Average:
    return lambda step, average, weights: (one if condition(step) else other)(step, average, weights)  # type: ignore[operator]


def stay(_: int, average: np.ndarray, __: np.ndarray) -> np.ndarray:
    return average


def restart(_: int, __: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights.copy()


HEALTHY = {
    f"{name} {decay}": (options, decay)
    for name, options in {
        "constant": {}, "falling": {"falls": True}, "sgd": {"rate": 1e-2, "optimizer": "SGD"},
    }.items()
    for decay in (0.98, 0.995, 0.999)
} | {"falling sgd 0.99": ({"falls": True, "rate": 1e-2, "optimizer": "SGD"}, 0.99)}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_average_is_as_claimed(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    options, decay = HEALTHY[case]
    run = Run(write(tmp_path / "x", train(**options), averaged(decay), dtype))
    (found,) = run.audit()
    assert found.verdict == "found"
    assert found.found is not None
    assert found.uncertainty is not None
    wrong = abs(math.log((1 - found.found) / (1 - decay)))
    assert wrong < 3 * found.uncertainty
    assert (found.warm_up, found.starts) == ("", ())
    (found,) = run.audit(decay)
    assert (found.verdict, found.is_bad) == ("as claimed", False), found.text


def test_steps_that_correlate_over_many_checkpoints(tmp_path: Path) -> None:
    """A random walk whose mean step lasts for ten intervals, against the decay that the average was made with."""
    random, weights = np.random.default_rng(0), np.zeros_like(train())
    mean = random.standard_normal(weights.shape[1])
    for step in range(1, STEPS):
        mean += (2 / (10 * EVERY)) ** 0.5 * random.standard_normal(mean.size) - mean / (10 * EVERY)
        weights[step] = weights[step - 1] + 1e-3 * mean + 1e-2 * random.standard_normal(mean.size)
    (found,) = Run(write(tmp_path / "x", weights, averaged(DECAY))).audit()
    assert found.found is not None
    assert abs(math.log((1 - found.found) / (1 - DECAY))) < 2e-3


def test_a_bfloat16_copy_of_a_healthy_average_is_as_claimed(tmp_path: Path) -> None:
    (found,) = Run(write(tmp_path / "x", train(), averaged(0.99), torch.bfloat16)).audit(0.99)
    assert found.verdict == "as claimed", found.text


BROKEN: dict[str, tuple[Average, str, str]] = {
    "sign": (lambda _, e, x: e + (1 - DECAY) / 10 * (e - x), "moves away", "the sign of its update is wrong"),
    "stuck": (stay, "does not move", "is its update called"),
    "microbatch": (lambda _, e, x: DECAY**8 * e + (1 - DECAY**8) * x, "too short", "once a microbatch"),
    "every tenth": (when(lambda step: step % 10 == 0, averaged(DECAY), stay), "too long", r"every k-th step.* \(k = "),
    "reset": (when(lambda step: step == 850, restart, averaged(DECAY)), "began again", "near step 8[3-7]"),
    "lost": (when(lambda step: step > STEPS // 2, stay, averaged(DECAY)), "was not updated", "from 800 to 1,500"),
    "bfloat16": (rounded(averaged(0.999)), "stalls", "keep it in float32"),
    "copy": (restart, "is the weights", "copied"),
}  # fmt: skip


TIMES_A_STEP = {"microbatch": 8, "every tenth": 10}
"""Or steps of a time; a verdict says between which they are."""

HELD_OUT = {"falls": True, "seed": 7}
"""A training that no threshold was chosen by."""


@pytest.mark.parametrize("options", [{}, HELD_OUT], ids=["", "held out"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_average_is_named(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    update, verdict, reason = BROKEN[case]
    run = Run(write(tmp_path / "x", train(**options), update))
    claimed = 0.999 if case == "bfloat16" else DECAY
    (found,) = run.audit(claimed)
    assert (found.verdict, found.is_bad) == (verdict, True), found.text
    assert re.search(reason, found.text)
    if times := TIMES_A_STEP.get(case):
        low, high = re.search(r"([\d.]+) to ([\d.]+)", found.text).groups()  # type: ignore[union-attr]
        assert float(low) / 1.05 < times < float(high) * 1.05


def rewrite(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Every checkpoint as the function makes it."""
    for path in run.iterdir():
        torch.save(change(torch.load(path)), path)


def test_tensors_that_are_not_followed_are_named(tmp_path: Path) -> None:
    """As under torch.compile with half of the names, or of a part that is not passed to the average."""
    run = write(tmp_path / "x", train(), averaged(DECAY))
    first = torch.load(run / f"step{EVERY}.pt")["state_dict_ema"]
    kept = {name: first[name] for name in ("2.weight", "2.bias")}
    rewrite(run, lambda content: content | {"state_dict_ema": content["state_dict_ema"] | kept})
    (found,) = Run(run).audit(DECAY)
    assert (found.verdict, set(found.tensors)) == ("some tensors", {"2.weight", "2.bias"})
    assert "2 of 6 tensors are not followed" in found.text


def test_weights_of_another_run(tmp_path: Path) -> None:
    run = write(tmp_path / "x", train(), averaged(DECAY))
    rewrite(run, lambda content: content | {"state_dict": named(train(seed=7)[content["step"] - 1])})
    (found,) = Run(run).audit(DECAY)
    assert (found.verdict, found.is_bad) == ("other weights", True), found.text
    rewrite(run, lambda content: content | {"state_dict_ema": content["state_dict_ema"] | {"other": torch.zeros(3)}})
    with pytest.raises(
        errors.FileFormatError, match="an EMA and weights of different models: only the EMA has 'other'"
    ):
        import_checkpoints(run, tmp_path / "run", ema_decay=DECAY)


def test_swapped_weights_and_averages(tmp_path: Path) -> None:
    run = write(tmp_path / "x", train(), averaged(DECAY))
    rewrite(run, lambda old: old | {"state_dict": old["state_dict_ema"], "state_dict_ema": old["state_dict"]})
    (found,) = Run(run).audit(DECAY)
    assert found.verdict == "swapped", found.text


def test_an_average_that_is_not_finite_is_named_with_its_tensor(tmp_path: Path) -> None:
    run = write(tmp_path / "x", train(), averaged(DECAY))
    content = torch.load(run / "step700.pt")
    content["state_dict_ema"]["2.weight"][0, 0] = math.nan
    torch.save(content, run / "step700.pt")
    with pytest.raises(errors.NonFiniteError, match=r"step700\.pt: tensor '2\.weight': holds nan or infinity"):
        Run(run).audit()


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    (found,) = Run(write(tmp_path / "short", train(), averaged(0.5))).audit(0.5)
    assert (found.verdict, found.found) == ("cannot be told", None)
    assert "closer than 20 steps they could" in found.text
    (found,) = Run(write(tmp_path / "still", np.ones((STEPS, 1)) * train()[-1], averaged(DECAY))).audit()
    assert "the weights stand still" in found.text
    (tmp_path / "one").mkdir()
    (tmp_path / "short" / "step300.pt").rename(tmp_path / "one" / "step300.pt")
    with pytest.raises(errors.InvalidValueError, match="no two times at which there are an average and the weights"):
        Run(tmp_path / "one").audit()
    with pytest.raises(errors.InvalidValueError, match=r"must lie in \(0, 1\)"):
        Run(tmp_path / "short").audit(1.5)


def test_snapshots_of_a_tracker(tmp_path: Path) -> None:
    """Their headers hold samples of the weights and of the average."""
    weights = train()
    model = network()
    tracker = PostHocEMA.from_model(model, tmp_path / "x", checkpoint_every=EVERY, update_every=1)
    for vector in weights:
        model.load_state_dict(named(vector))
        tracker.update_(model)
    tracker.close()
    for found in Run(tmp_path / "x").audit():
        assert found.verdict == "as claimed", found.text
        assert found.ratio == pytest.approx(1, abs=0.05)


def test_the_command(tmp_path: Path, ema: Ema) -> None:
    run = write(tmp_path / "x", train(), lambda _, e, x: DECAY**8 * e + (1 - DECAY**8) * x)
    done = ema("audit", run, "--claimed", DECAY, "--out", tmp_path / "a.png")
    assert done.code == 1
    assert "too short: " in done.out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    done = ema("audit", run, "--json")
    (found,) = done.json["audits"]
    assert found["verdict"] == "found"
    assert found["length"] == pytest.approx(1 / (1 - DECAY**8), rel=0.1)
    assert len(found["intervals"]) == len(range(EVERY, STEPS, EVERY))


def test_a_claim_that_is_no_decay_is_named_as_it_was_given(ema: Ema, tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_walk(60, {"a": (30,)}), range(10, 61, 10))
    refused = ema("audit", tmp_path / "run", "--claimed", "7")
    assert (refused.code, refused.error) == (2, "--claimed 7.0: must lie in (0, 1)")

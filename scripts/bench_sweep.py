"""How good the choices of the search are, and how often its stated range holds the best length.

    python scripts/bench_sweep.py [--quick] [--record]

On 200 made-up metrics over sigma_rel from 0.02 to 0.28, of five shapes, their depth 1, with noise of 0 to 1/3, and on
three real ones, the losses of a denoiser and a language model and the error rate of a classifier on scikit-learn's
digits, as `--record` has measured them (sweep_curves.json: 31 lengths by 8 seeds, whose mean is the truth).

The regret of a choice is the true metric there above that of the best. "Within noise" are choices whose regret is at
most the noise of one evaluation, or 1 % of the depth. The peers measure a plain grid and take its lowest value, or
narrow a bracket by golden section. The models are compared on the same trials, those of the search.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posthoc_cli.sweep import search
from posthoc_cli.sweep.search import Trial

Array = npt.NDArray[np.float64]
Measure = Callable[[float, int], float]

LOW, HIGH = 0.02, 0.28
COUNTS = (8, 10, 12, 20)
PUBLISHED = 31
SHAPES = ("smooth", "flat", "skewed", "two minima", "kink")
NOISES = (0.0, 0.03, 0.1, 1 / 3)
CURVES = Path(__file__).with_name("sweep_curves.json")
GRID = np.linspace(0, 1, 2001)


def place(x: float) -> float:
    """The logarithm of a length, scaled to [0, 1]."""
    return math.log(x / LOW) / math.log(HIGH / LOW)


@dataclass(frozen=True)
class Metric:
    """A metric with its truth on GRID; `measure` takes a length and a seed."""

    group: str
    truth: Array
    noise: float
    measure: Measure

    def regret(self, x: float) -> float:
        """Of a length, as a fraction of the depth."""
        depth = float(np.ptp(self.truth))
        return (float(np.interp(place(x), GRID, self.truth)) - float(self.truth.min())) / depth

    def within(self, regret: float) -> bool:
        """Whether it is lost in the noise."""
        return regret <= max(self.noise / float(np.ptp(self.truth)), 0.01)

    @property
    def best(self) -> float:
        """The true best length."""
        return float(LOW * (HIGH / LOW) ** GRID[self.truth.argmin()])


def made_up(shape: str, noise: float, number: int) -> Metric:
    """One of the 200."""
    random = np.random.default_rng([SHAPES.index(shape), round(100 * noise), number])
    off = GRID - random.uniform(0.08, 0.92)
    if shape == "smooth":
        truth = off**2 * (1 + random.uniform(-0.5, 0.5) * off)
    elif shape == "flat":
        truth = off**4
    elif shape == "skewed":
        steep = random.choice([-1, 1]) * random.uniform(3, 7)
        truth = np.exp(steep * off) - steep * off
    elif shape == "two minima":
        first, second, width = random.uniform(0.1, 0.35), random.uniform(0.6, 0.9), random.uniform(0.1, 0.2)
        dips = (np.exp(-(((GRID - centre) / width) ** 2)) for centre in (first, second))
        truth = -sum(depth * dip for depth, dip in zip((1, random.uniform(0.9, 1.1)), dips, strict=True))
    else:
        truth = np.where(off < 0, -off * random.uniform(0.5, 2), off * random.uniform(0.5, 2))
    truth = (truth - truth.min()) / np.ptp(truth)
    return Metric(shape, truth, noise, lambda x, _: float(np.interp(place(x), GRID, truth)) + noise * random.normal())


def recorded() -> list[Metric]:
    """The three real ones."""
    metrics = []
    for name, rows in json.loads(CURVES.read_text()).items():
        curves = np.array(rows)  # [lengths, seeds]
        knots, truth = np.linspace(0, 1, len(curves)), curves.mean(axis=1)
        noise = float((curves - curves.mean(axis=0) - truth[:, None] + truth.mean()).std())

        def measure(x: float, seed: int, curves: Array = curves, knots: Array = knots) -> float:
            return float(np.interp(place(x), knots, curves[:, seed % curves.shape[1]]))

        metrics.append(Metric(name, np.interp(GRID, knots, truth), noise, measure))
    return metrics


# --- the search and its peers ------------------------------------------------------------------------


def searched(metric: Metric, counts: Sequence[int]) -> tuple[dict[int, search.Estimate], list[Trial]]:
    """What the search says after so many evaluations, and all of them."""
    trials: list[Trial] = []
    found: dict[int, search.Estimate] = {}
    batch = search.first_batch(LOW, HIGH)
    while True:
        for x in batch:
            seed = sum(trial.x == x for trial in trials)
            trials.append(Trial(x, metric.measure(x, seed), seed=seed))
            if len(trials) in counts:
                found[len(trials)] = search.estimate(trials, LOW, HIGH)
                if len(trials) == max(counts):
                    return found, trials
        now = search.estimate(trials, LOW, HIGH)
        batch = search.next_batch(now, trials, repeat=True)


def grid(metric: Metric, count: int) -> float:
    """The lowest of a plain grid, even in the length as published."""
    xs = np.linspace(LOW, HIGH, count).tolist()
    return float(min(xs, key=lambda x: metric.measure(x, 0)))


def golden(metric: Metric, count: int) -> float:
    """Golden section in the logarithm."""
    ratio, low, high = (math.sqrt(5) - 1) / 2, 0.0, 1.0
    values: dict[float, float] = {}

    def value(u: float) -> float:
        if u not in values:
            values[u] = metric.measure(LOW * (HIGH / LOW) ** u, 0)
        return values[u]

    left, right = high - ratio * (high - low), low + ratio * (high - low)
    while len(values.keys() | {left, right}) <= count:
        if value(left) < value(right):
            high, right = right, left
            left = high - ratio * (high - low)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
    return float(LOW * (HIGH / LOW) ** min(values, key=values.__getitem__))


def gaussian_process(trials: Sequence[Trial]) -> tuple[float, float, float]:
    """scikit-learn's, hyperparameters of most likelihood: best, and the range of the minima of 1,000 draws."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.0) * Matern(0.3, (0.05, 5), nu=2.5) + WhiteKernel(0.1, (1e-6, 2))
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    xs = GRID[::20, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(np.array([[place(trial.x)] for trial in trials]), [trial.value for trial in trials])
        draws = model.sample_y(xs, 1000, random_state=0)
        mean = model.predict(xs)
    ends = np.quantile(xs[draws.argmin(axis=0), 0], [0.025, 0.975]) + np.array([-0.005, 0.005])
    return tuple(LOW * (HIGH / LOW) ** np.array([xs[mean.argmin(), 0], *ends]))


def quadratic(trials: Sequence[Trial]) -> tuple[float, float, float]:
    """Least squares, each trial weighted by its distance to the lowest; the range from draws of the coefficients."""
    us, values = np.array([place(trial.x) for trial in trials]), np.array([trial.value for trial in trials])
    weights = np.exp(-2 * (us - us[values.argmin()]) ** 2)
    design = np.vander(us, 3)
    inverse = np.linalg.pinv(design.T @ (weights[:, None] * design))
    fitted = inverse @ design.T @ (weights * values)
    variance = (weights * (values - design @ fitted) ** 2).sum() / max(1, len(us) - 3)
    drawn = np.random.default_rng(0).multivariate_normal(fitted, variance * inverse, 1000)
    minima = GRID[(np.vander(GRID[::20], 3) @ np.vstack([fitted, drawn]).T).argmin(axis=0) * 20]
    return tuple(LOW * (HIGH / LOW) ** np.array([minima[0], *np.quantile(minima[1:], [0.025, 0.975])]))


# --- the tables --------------------------------------------------------------------------------------


def cell(metrics: Sequence[Metric], choices: Sequence[float]) -> str:
    """Mean regret, and the share of choices within noise."""
    regrets = [metric.regret(x) for metric, x in zip(metrics, choices, strict=True)]
    within = np.mean([metric.within(regret) for metric, regret in zip(metrics, regrets, strict=True)])
    return f"{np.mean(regrets):7.4f} {100 * within:4.0f} %"


def compare(metrics: Sequence[Metric], counts: Sequence[int]) -> None:
    """Print the tables of some metrics."""
    runs = [searched(metric, counts) for metric in metrics]
    print(f"{'evaluations':>24}  {'search':>14}  {'grid':>14}  {'golden section':>14}  coverage  width")
    for count in counts:
        found = [estimates[count] for estimates, _ in runs]
        cells = [cell(metrics, [one.best for one in found])]
        cells += [cell(metrics, [method(metric, count) for metric in metrics]) for method in (grid, golden)]
        held = np.mean([one.low <= metric.best <= one.high for one, metric in zip(found, metrics, strict=True)])
        width = np.mean([place(LOW * one.high / one.low) for one in found])
        print(f"{count:>24}  {cells[0]:>14}  {cells[1]:>14}  {cells[2]:>14}  {100 * held:6.0f} %  {width:5.2f}")
    published = cell(metrics, [grid(metric, PUBLISHED) for metric in metrics])
    print(f"{PUBLISHED:>24}  {'':>14}  {published:>14}")
    if len(metrics) > 3:
        for name, model in (("scikit-learn's GP", gaussian_process), ("weighted quadratic", quadratic)):
            choices = [model(trials[:12]) for _, trials in runs]
            held = np.mean([low <= m.best <= high for m, (_, low, high) in zip(metrics, choices, strict=True)])
            print(
                f"{name:>24}  {cell(metrics, [best for best, _, _ in choices]):>14}{'':>34}  {100 * held:6.0f} %  at 12"
            )


def record() -> None:
    """Train the three networks and measure their averages; some minutes."""
    import tempfile

    import torch
    import trained_networks as networks

    from posthoc_cli import PostHocEMA, Run, synthesize
    from posthoc_cli.demo import training

    torch.set_num_threads(1)
    images, labels = networks.digits()
    sequences = networks.digit_sequences()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[:1000], order[1000:]

    def classification(model: torch.nn.Module, size: int) -> torch.Tensor:
        chosen = seen[torch.randint(len(seen), (size,))]
        noisy = images[chosen] + 0.7 * torch.randn(size, images.shape[1])
        return torch.nn.functional.cross_entropy(model(noisy), labels[chosen])

    def errors(model: torch.nn.Module, seed: int) -> float:
        random = torch.Generator().manual_seed(seed)
        noisy = images[unseen] + 0.7 * torch.randn(len(unseen), images.shape[1], generator=random)
        return float((model(noisy).argmax(dim=1) != labels[unseen]).double().mean())

    def language(model: torch.nn.Module, chosen: torch.Tensor) -> torch.Tensor:
        logits = model(sequences[chosen][:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[chosen][:, 1:].flatten())

    def surprise(model: torch.nn.Module, seed: int) -> float:
        random = torch.Generator().manual_seed(seed)
        return float(language(model, unseen[torch.randperm(len(unseen), generator=random)[:200]]))

    def train(task: networks.Task, loss: Callable, steps: int, rate: float, size: int, folder: Path) -> torch.nn.Module:
        torch.manual_seed(0)
        model = task.model()
        optimizer = torch.optim.Adam(model.parameters())
        with PostHocEMA.from_model(
            model, folder, update_every=5, checkpoint_every=steps // 40, max_checkpoints=None
        ) as ema:
            for step in range(1, steps + 1):
                optimizer.param_groups[0]["lr"] = rate / max(1, step / (0.3 * steps)) ** 0.5
                optimizer.zero_grad()
                loss(model, size).backward()
                optimizer.step()
                ema.update_(model)
        return model

    def measured(folder: Path, model: torch.nn.Module, evaluate: Callable) -> list[list[float]]:
        widths = np.geomspace(LOW, HIGH, 31).tolist()
        made = dict(synthesize(Run(folder).plan(widths)))
        rows = []
        for index in range(len(widths)):
            model.load_state_dict({name: tensors[index] for name, tensors in made.items()}, strict=False)
            with torch.no_grad():
                rows.append([float(f"{evaluate(model, seed):.5g}") for seed in range(8)])
        return rows

    with tempfile.TemporaryDirectory() as name:
        one, two, three = (Path(name) / part for part in "abc")
        digits = training.load_digits(seed=0)
        denoiser, _ = training.train(training.Settings(10_000), digits.training, one, [], lambda _: None)
        losses = [training.Validation(digits.validation, seed=seed, draws=4) for seed in range(8)]
        classifier = train(networks.classification(48), classification, 6000, 0.03, 32, two)
        chosen = lambda model, size: language(model, seen[torch.randint(len(seen), (size,))])  # noqa: E731
        transformer = train(networks.next_token(), chosen, 5000, 0.02, 16, three)
        curves = {
            "denoiser": measured(one, denoiser, lambda model, seed: float(losses[seed](model).mean())),
            "classifier": measured(two, classifier, errors),
            "language model": measured(three, transformer, surprise),
        }
    CURVES.write_text(json.dumps(curves, separators=(",", ":")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description="How good the search of the best length is.")
    parser.add_argument("--quick", action="store_true", help="a few metrics: does everything run?")
    parser.add_argument("--record", action="store_true", help="measure the real curves anew, then stop")
    options = parser.parse_args(arguments)
    if options.record:
        record()
        return
    started, each = time.perf_counter(), 1 if options.quick else 10
    noises, counts = (NOISES[-1:], COUNTS[2:3]) if options.quick else (NOISES, COUNTS)
    metrics = [made_up(shape, noise, k) for shape in SHAPES for noise in noises for k in range(each)]
    print(f"{len(metrics)} made-up metrics: mean regret, share within noise, coverage of the range, its width")
    compare(metrics, counts)
    for metric in recorded():
        print(f"\n{metric.group}: noise {100 * metric.noise / float(np.ptp(metric.truth)):.2g} % of the depth")
        compare([metric], counts)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

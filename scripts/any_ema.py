"""Measure averages of other lengths that are made from the EMA that a training saved anyway.

Each library's EMA follows a recorded training. Its checkpoints are stored 20 times in float32, by
the library where it is installed, otherwise in its format; the EMA of a plain loop, in float16,
follows all trainings. The import is given only the settings that no file contains. Plain least
squares fits the tails of the profiles, with coefficients of sum 1. The truth is summed here over
every step in float64; averages come from the folder alone, through the public interface. The runs
of HELD_OUT, by which no constant was chosen, are reported separately.

    OMP_NUM_THREADS=1 python scripts/any_ema.py --cache DIR [--steps 6000] [--only plain]

Some minutes, a round and an odd decay: --steps 2000 --only plain --lengths 100,40
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compare_peers import distances, markdown
from fidelity_runs import quiet
from safetensors.torch import save_file
from trajectories import HELD_OUT, NAMES, Replay, Trajectory, record

from posthoc_cli import Run, gamma_from_sigma_rel, import_checkpoints
from posthoc_cli.errors import InvalidValueError

WIDTHS = (0.05, 0.10, 0.15, 0.25)
LENGTHS = (0.1, 0.3, 0.03, 0.01)
"""Time constants as fractions of the run; EMAs of libraries have the first."""

EPOCH = 100
CHECKPOINTS = 20
Save = Callable[[int], object]
Weights = dict[str, torch.Tensor]


def copies(net: Replay) -> Weights:
    """Return copies of the parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def decays(library: str, decay: float) -> Callable[[int], float]:
    """Return the decay of the n-th update by the library's formula."""
    if library in ("diffusers", "lit-ema", "torch-ema"):
        late = library == "diffusers"  # which copies at the first
        return lambda n: min(decay, (1 + n - late) / (10 + n - late)) if n > late else 0.0
    if library == "timm, warm-up":
        return lambda n: min(decay, 1 - n ** (-2 / 3))
    if library == "ema-pytorch":
        return lambda n: min(decay, 1 - (n - 100) ** (-2 / 3)) if n > 101 else 0.0
    if library == "edm":
        return lambda n: min(decay, 2 ** (-1 / (0.05 * (n - 1)))) if n > 1 else 0.0
    return lambda n: decay if n > 1 or library in ("plain", "timm") else 0.0


class Own(NamedTuple):
    """A library's own functions."""

    update: Callable[[], Any]
    save: Save


def own_ema(library: str, net: Replay, decay: float, place: Path) -> Own | None:
    """Return the library's own functions; None if it is not installed or has no file format."""
    if library == "diffusers":
        return own_of_diffusers(net, decay, place)
    if library in ("averaged-model", "lightning"):
        return own_of_torch(library, net, decay, place)
    if library == "ema-pytorch":
        import ema_pytorch

        ema = ema_pytorch.EMA(net, beta=decay, update_every=1)

        def save(step: int) -> None:
            torch.save(ema.state_dict(), place / f"step{step}.pt")

        return Own(ema.update, save)
    return None


def own_of_diffusers(net: Replay, decay: float, place: Path) -> Own:
    """Return the functions of diffusers' `EMAModel`."""
    from diffusers import ModelMixin
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.training_utils import EMAModel

    class Small(Replay, ModelMixin, ConfigMixin):  # type: ignore[misc]
        config_name = "config.json"

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            for name, value in copies(net).items():
                self.register_parameter(name, torch.nn.Parameter(value))

    ema = EMAModel(net.parameters(), decay=decay, model_cls=Small, model_config={})

    def update() -> None:
        ema.step(net.parameters())

    def save(step: int) -> None:
        checkpoint = place / f"checkpoint-{step}"
        ema.save_pretrained(checkpoint / "unet_ema")
        (checkpoint / "unet").mkdir()
        save_file(copies(net), checkpoint / "unet" / "model.safetensors")

    return Own(update, save)


def own_of_torch(library: str, net: Replay, decay: float, place: Path) -> Own:
    """Return the functions of torch's `AveragedModel`, which Lightning uses."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update() -> None:
        ema.update_parameters(net)

    def save(step: int) -> None:
        state = ema.state_dict()
        content = {"model": copies(net), "ema": state, "step": step}
        if library == "lightning":
            count = state.pop("n_averaged")
            averaged = {name.removeprefix("module."): value for name, value in state.items()}
            content = {
                "global_step": step,
                "current_model_state": copies(net),
                "state_dict": averaged,
                "averaging_state": {"n_averaged": count},
            }
        torch.save(content, place / f"step={step}.ckpt")

    return Own(update, save)


def in_format(
    library: str,
    raw: Weights,
    average: Weights,
    decay: float,
    place: Path,
    step: int,
) -> None:
    """Save weights and an average in the format of a library that is not installed."""
    if library == "plain":
        halves = {name: value.half() for name, value in average.items()}
        save_file(halves, place / f"ema_step{step}.safetensors")
        save_file(raw, place / f"step{step}.safetensors")
        return
    epoch = step // EPOCH - 1
    name = f"{step}.pt"
    content: dict[str, Any] = {"state_dict": raw, "state_dict_ema": average, "epoch": epoch}
    if library.startswith("timm"):
        name = f"checkpoint-{epoch}.pt"
    elif library == "edm":
        name = f"network-snapshot-{step:06d}.pkl"
        content = {"ema": average, "net": raw}
    elif library == "lit-ema":
        name = f"step={step}.ckpt"
        state = prefixed("model.", raw) | prefixed("model_ema.", average)
        state["model_ema.num_updates"] = torch.tensor(step)
        state["model_ema.decay"] = torch.tensor(decay)
        content = {"state_dict": state, "global_step": step}
    elif library == "torch-ema":
        ema = {"decay": decay, "num_updates": step, "shadow_params": [*average.values()]}
        content = {"model": raw, "ema": ema, "step": step}
    elif library == "mmengine":
        swapped = prefixed("module.", raw)
        swapped["steps"] = torch.tensor(step)
        content = {"state_dict": average, "ema_state_dict": swapped, "meta": {"iter": step}}
    torch.save(content, place / name)


def prefixed(prefix: str, weights: Weights) -> Weights:
    """Return weights under longer names."""
    return {prefix + name: value for name, value in weights.items()}


LIBRARIES = (
    "diffusers",
    "timm",
    "timm, warm-up",
    "averaged-model",
    "lightning",
    "ema-pytorch",
    "torch-ema",
    "lit-ema",
    "mmengine",
    "edm",
)


# --- one training


class Errors(NamedTuple):
    """Errors of an average of one width: of ours, of the EMA in its place, of least squares over
    raw checkpoints and over the EMAs, and the predicted one of ours."""

    ours: float
    ema: float
    raw: float
    plain: float
    predicted: float


class Result(NamedTuple):
    """What the import of a training found: the decay, how uncertain it is, whether it asked for
    it; and the errors by width."""

    true: float
    found: float
    uncertainty: float
    asked: bool
    errors: list[Errors]

    @property
    def off(self) -> float:
        """Return how far the length of the average that was found is off."""
        return float(np.log((1 - self.true) / (1 - self.found)))


def measure(library: str, run: Trajectory, length: float) -> Result:
    """Store an EMA of a training, import it, and compare averages of each width with the truth."""
    decay = 1 - 1 / (length * run.steps)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "x"
        place.mkdir()
        emas = follow(library, run, decay, place)
        imported = Run(Path(folder) / "run")
        asked = import_stored(library, place, imported.directory, decay)
        (audit,) = imported.audit()
        made = [imported.average(width, dtype="float64") for width in WIDTHS]
    names = dict(Replay(run).named_parameters())
    ours = [torch.cat([average[name].flatten() for name in names]).numpy() for average in made]
    predicted = [average.predicted_error or np.nan for average in made]
    at = decays(library, decay)
    dtype = np.float16 if library == "plain" else np.float32
    others = other_ways(run, at, emas, emas.astype(dtype).astype(np.float64))
    truth = np.diff(masses_until(run.steps), axis=0).T @ run.weights
    columns = [distances(values, truth) for values in (np.array(ours), *others)]
    errors = [Errors(*map(float, row)) for row in zip(*columns, predicted, strict=True)]
    found = math.nan if audit.found is None else audit.found
    uncertainty = math.nan if audit.uncertainty is None else audit.uncertainty
    return Result(at(run.steps), found, uncertainty, asked, errors)


def other_ways(
    run: Trajectory,
    at: Callable[[int], float],
    emas: np.ndarray,
    stored: np.ndarray,
) -> list[np.ndarray]:
    """Return the last EMA for each width, and least squares over raw weights and stored EMAs."""
    times = checkpoint_times(run.steps)
    wanted = 1 - masses_until(run.steps)[:-1]  # the tails of the averages
    points = np.arange(run.steps)[:, None] < times
    of_raw = least_squares(points.astype(np.float64), wanted)
    of_emas = least_squares(tails_of_emas(at, run.steps), wanted)
    last = np.repeat(emas[-1:], len(WIDTHS), axis=0)
    return [last, of_raw.T @ run.weights[times - 1], of_emas.T @ stored]


def checkpoint_times(steps: int) -> np.ndarray:
    """Return the steps of the checkpoints."""
    numbers = np.arange(1, CHECKPOINTS + 1)
    return np.round(steps * numbers / CHECKPOINTS).astype(int)


def follow(library: str, run: Trajectory, decay: float, place: Path) -> np.ndarray:
    """Let an EMA follow a training, and save it with the weights; return it at each checkpoint, in
    float64."""
    net = Replay(run)
    held = Replay(run)
    own = own_ema(library, net, decay, place)
    at = decays(library, decay)
    times = checkpoint_times(run.steps)
    average = run.weights[0].astype(np.float64)
    emas = []
    for step, weights in enumerate(run.weights, 1):
        average = at(step) * average + (1 - at(step)) * weights
        if own is not None or step in times:
            net.go_to(step - 1)
        if own is not None:
            own.update()
        if step in times:
            emas.append(average)
            held.take(torch.from_numpy(average.astype(np.float32)))
            if own is not None:
                own.save(step)
            else:
                in_format(library, copies(net), copies(held), decay, place, step)
    return np.array(emas)


UNSAID: dict[str, dict[str, Any]] = {
    "timm": {"steps_per_epoch": EPOCH},
    "timm, warm-up": {"steps_per_epoch": EPOCH},
    "edm": {"update_every": 1000},
    "lit-ema": {"prefix": "model."},
}
"""The settings that no file of a library contains."""


def import_stored(library: str, place: Path, out: Path, decay: float) -> bool:
    """Import checkpoints; return whether the import asked for the decay."""
    settings = UNSAID.get(library, {})
    if library == "ema-pytorch":
        settings = {"ema_decay": decay, "update_every": 1, "update_after_step": 100}
    try:
        import_checkpoints(place, out, **settings)
    except InvalidValueError:
        import_checkpoints(place, out, **settings | {"ema_decay": decay})
        return True
    return False


def masses_until(steps: int) -> np.ndarray:
    """Return the mass of each wanted average until each step: [steps + 1, widths]."""
    until = np.arange(steps + 1) / steps
    columns = [until ** (gamma_from_sigma_rel(width) + 1) for width in WIDTHS]
    return np.stack(columns, axis=1)


def tails_of_emas(at: Callable[[int], float], steps: int) -> np.ndarray:
    """Return the mass that the EMA of each checkpoint has after each step: [steps, checkpoints]."""
    logs = np.zeros(steps + 1)
    for step in range(1, steps + 1):
        logs[step] = logs[step - 1] + np.log(max(at(step), 1e-30))
    columns = []
    for time in checkpoint_times(steps):
        tail = np.where(np.arange(steps) < time, 1 - np.exp(logs[time] - logs[:-1]), 0)
        tail[0] = 1
        columns.append(tail)
    return np.stack(columns, axis=1)


def least_squares(tails: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return coefficients with sum 1 for tails of stored averages, [steps, checkpoints]:
    [checkpoints, targets]."""
    others = tails[:, :-1] - tails[:, -1:]
    last = tails[:, -1:]
    found, *_ = np.linalg.lstsq(others, wanted - last, rcond=1e-10)
    return np.vstack([found, 1 - found.sum(axis=0)])


# --- all trainings


class Job(NamedTuple):
    """An EMA of a library over a recorded training, with a time constant as a fraction of it."""

    library: str
    training: str
    length: float


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return what the user asks for."""
    lengths = LENGTHS
    if options.lengths:
        lengths = tuple(float(steps) / options.steps for steps in options.lengths.split(","))
    jobs = []
    for index, library in enumerate(LIBRARIES):
        jobs.append(Job(library, NAMES[index % len(NAMES)], LENGTHS[0]))
    jobs += [Job("plain", name, length) for length in lengths for name in NAMES]
    return [job for job in jobs if options.only in (None, job.library)]


@quiet()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the decays that are found, the errors, and whether the predictions hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--steps", type=int, default=6000, help="a multiple of 2000")
    parser.add_argument("--only", help="a library, or plain")
    parser.add_argument("--lengths", help="time constants of the EMA of a plain loop, in steps")
    options = parser.parse_args(arguments)
    results = {}
    for job in jobs_of(options):
        run = record(job.training, options.steps, options.cache)
        results[job] = measure(job.library, run, job.length)
        print(*decay_row(job, results[job]), file=sys.stderr, flush=True)
    print(decay_table(results), error_table(results), sep="\n\n", end="\n\n", flush=True)
    held_out = {job for job in results if job.training in HELD_OUT}
    print_summary("chosen by", [results[job] for job in results if job not in held_out])
    print_summary("held out", [results[job] for job in results if job in held_out])


def decay_row(job: Job, result: Result) -> tuple[str, ...]:
    """Return a row of the first table."""
    return (
        job.library,
        job.training,
        f"{result.true:.6f}",
        f"{result.found:.6f}",
        f"{result.off:+.2%}",
        f"{result.uncertainty:.2%}",
        "asked for" if result.asked else "",
    )


def decay_table(results: dict[Job, Result]) -> str:
    """Return what the imports found."""
    titles = (
        "EMA of",
        "training",
        "true decay",
        "found",
        "of the length: off by",
        "uncertainty",
        "import",
    )
    return markdown([titles, *(decay_row(job, result) for job, result in results.items())])


def error_table(results: dict[Job, Result]) -> str:
    """Return the errors of each width."""
    rows: list[tuple[str, ...]] = [
        ("EMA of", "training", "sigma_rel", "error", "that EMA", "from raw", "plain", "predicted")
    ]
    for job, result in results.items():
        for width, errors in zip(WIDTHS, result.errors, strict=True):
            figures = [f"{value:.1e}" for value in errors]
            rows.append(
                (job.library, f"{job.training}, {job.length:g} T", f"{width:.2f}", *figures)
            )
    return markdown(rows)


def print_summary(part: str, results: Sequence[Result]) -> None:
    """Print how errors compare with other ways, and how many predictions hold."""
    errors = [one for result in results for one in result.errors]
    if not errors:
        return
    ours, ema, raw, plain, predicted = np.array(errors).T
    for what, other in (
        ("that EMA's", ema),
        ("raw checkpoints'", raw),
        ("plain least squares'", plain),
    ):
        ratio = ours / other
        print(f"{part}: error / {what}: median {np.median(ratio):.3f}, most {ratio.max():.2f}")
    held = np.maximum(ours / predicted, predicted / ours)
    within = ", ".join(f"{np.mean(held < k):.1%} within {k}" for k in (2, 3))
    print(f"{part}: actual / predicted: {within}, most {held.max():.2f}, of {len(held)}")
    bands = np.array([abs(result.off) / result.uncertainty for result in results])
    bands = bands[~np.isnan(bands)]
    shares = ", ".join(f"{np.mean(bands < k):.0%} within {k}" for k in (1, 2, 3))
    print(f"{part}: true length, in uncertainties: {shares}, of {len(bands)}")


if __name__ == "__main__":
    main()

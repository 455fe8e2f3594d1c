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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def own_ema(
    library: str,
    net: Replay,
    decay: float,
    place: Path,
) -> tuple[Callable[[], Any], Save] | None:
    """Return the library's own update and save functions; None if it is not installed or has no
    file format."""
    if library == "diffusers" and find_spec("diffusers"):
        from diffusers import ModelMixin
        from diffusers.configuration_utils import ConfigMixin
        from diffusers.training_utils import EMAModel

        class Small(Replay, ModelMixin, ConfigMixin):  # type: ignore[misc]
            config_name = "config.json"

            def __init__(self) -> None:
                torch.nn.Module.__init__(self)
                for name, p in net.named_parameters():
                    self.register_parameter(name, torch.nn.Parameter(p.detach().clone()))

        ema = EMAModel(net.parameters(), decay=decay, model_cls=Small, model_config={})

        def save(step: int) -> None:
            ema.save_pretrained(place / f"checkpoint-{step}" / "unet_ema")
            (place / f"checkpoint-{step}" / "unet").mkdir()
            save_file(copies(net), place / f"checkpoint-{step}" / "unet" / "model.safetensors")

        return lambda: ema.step(net.parameters()), save
    if library in ("averaged-model", "lightning"):
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        own = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))

        def content(step: int) -> dict[str, Any]:
            state = own.state_dict()
            if library == "averaged-model":
                return {"model": copies(net), "ema": state, "step": step}
            rest = {"n_averaged": state.pop("n_averaged")}
            averaged = {name.removeprefix("module."): value for name, value in state.items()}
            return {
                "global_step": step,
                "current_model_state": copies(net),
                "state_dict": averaged,
                "averaging_state": rest,
            }

        return lambda: own.update_parameters(net), lambda step: torch.save(
            content(step), place / f"step={step}.ckpt"
        )
    if library == "ema-pytorch" and find_spec("ema_pytorch"):
        import ema_pytorch

        its = ema_pytorch.EMA(net, beta=decay, update_every=1)
        return its.update, lambda step: torch.save(its.state_dict(), place / f"step{step}.pt")
    return None


def in_format(
    library: str,
    raw: Weights,
    average: Weights,
    decay: float,
    place: Path,
    step: int,
) -> None:
    """Save weights and an average in the format of a library that is not installed."""
    count = torch.tensor(step)
    if library == "plain":
        save_file(
            {name: value.half() for name, value in average.items()},
            place / f"ema_step{step}.safetensors",
        )
        save_file(raw, place / f"step{step}.safetensors")
        return
    held: dict[str, Any] = {
        "state_dict": raw,
        "state_dict_ema": average,
        "epoch": step // EPOCH - 1,
    }
    if library == "lit-ema":
        state = {f"model.{name}": value for name, value in raw.items()} | {
            "model_ema.num_updates": count
        }
        state |= {f"model_ema.{name}": value for name, value in average.items()}
        held = {"state_dict": state | {"model_ema.decay": torch.tensor(decay)}, "global_step": step}
    elif library == "torch-ema":
        held = {"decay": decay, "num_updates": step, "shadow_params": [*average.values()]}
        held = {"model": raw, "ema": held, "step": step}
    elif library == "mmengine":
        swapped = {f"module.{name}": value for name, value in raw.items()} | {"steps": count}
        held = {"state_dict": average, "ema_state_dict": swapped, "meta": {"iter": step}}
    elif library == "edm":
        held = {"ema": average, "net": raw}
    names = {"edm": f"network-snapshot-{step:06d}.pkl", "lit-ema": f"step={step}.ckpt"}
    torch.save(
        held,
        place
        / names.get(
            library, f"checkpoint-{step // EPOCH - 1}.pt" if "epoch" in held else f"{step}.pt"
        ),
    )


LIBRARIES = (
    "diffusers", "timm", "timm, warm-up", "averaged-model", "lightning", "ema-pytorch", "torch-ema",
    "lit-ema", "mmengine", "edm",
)  # fmt: skip


def least_squares(tails: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return coefficients with sum 1 for tails of stored averages, [steps, checkpoints]:
    [checkpoints, targets]."""
    others = tails[:, :-1] - tails[:, -1:]
    last = tails[:, -1:]
    found, *_ = np.linalg.lstsq(others, wanted - last, rcond=1e-10)
    return np.vstack([found, 1 - found.sum(axis=0)])


def measure(
    library: str,
    run: Trajectory,
    length: float,
) -> tuple[tuple[float, ...], list[tuple[float, ...]]]:
    """Return decay, found, uncertainty, whether the import asked for it; by width error, EMA, raw,
    plain, predicted."""
    steps = run.steps
    net = Replay(run)
    decay = 1 - 1 / (length * run.steps)
    times = [round(steps * (index + 1) / CHECKPOINTS) for index in range(CHECKPOINTS)]
    at = decays(library, decay)
    with tempfile.TemporaryDirectory() as folder:
        (place := Path(folder) / "x").mkdir()
        own = own_ema(library, net, decay, place)
        held = Replay(run)
        average = run.weights[0].astype(np.float64)
        forgot = [0.0]
        ends = []
        for step, weights in enumerate(run.weights, 1):
            average = at(step) * average + (1 - at(step)) * weights
            forgot.append(forgot[-1] + float(np.log(max(at(step), 1e-30))))
            if own or step in times:
                net.go_to(step - 1)
            if own:
                own[0]()
            if step in times:
                ends.append(average)
                held.take(torch.from_numpy(average.astype(np.float32)))
                own[1](step) if own else in_format(
                    library, copies(net), copies(held), decay, place, step
                )
        said: dict[str, Any] = {"steps_per_epoch": EPOCH} if library.startswith("timm") else {}
        said |= (
            {"ema_decay": decay, "update_every": 1, "update_after_step": 100}
            if library == "ema-pytorch"
            else {}
        )
        said |= {"update_every": 1000} if library == "edm" else {}
        said |= {"prefix": "model."} if library == "lit-ema" else {}
        try:
            import_checkpoints(place, Path(folder) / "run", **said)
            asked = False
        except InvalidValueError:
            import_checkpoints(place, Path(folder) / "run", **said | {"ema_decay": decay})
            asked = True
        (audit,) = Run(Path(folder) / "run").audit()
        made = [Run(Path(folder) / "run").average(width, dtype="float64") for width in WIDTHS]
    predicted = [one.predicted_error or np.nan for one in made]
    vectors = np.array(
        [
            torch.cat([one[name].flatten() for name, _ in net.named_parameters()]).numpy()
            for one in made
        ]
    )
    shares = (np.arange(steps + 1) / steps)[:, None] ** (
        np.array([gamma_from_sigma_rel(w) for w in WIDTHS]) + 1
    )
    truth = np.diff(shares, axis=0).T @ run.weights
    logs = np.array(forgot)
    tails = np.array(
        [
            np.where(np.arange(steps) < t, 1 - np.exp(logs[t] - np.minimum(logs[:-1], 1e9)), 0)
            for t in times
        ]
    )
    tails[:, 0] = 1
    points = np.array([np.arange(steps) < t for t in times], dtype=np.float64)

    stored = (
        np.array(ends).astype(np.float16 if library == "plain" else np.float32).astype(np.float64)
    )
    plain = least_squares(tails.T, 1 - shares[:-1]).T @ stored
    raw = least_squares(points.T, 1 - shares[:-1]).T @ run.weights[np.array(times) - 1]
    own_average = np.broadcast_to(ends[-1], truth.shape)
    cells = zip(
        *(distances(one, truth) for one in (vectors, own_average, raw, plain)),
        predicted,
        strict=True,
    )
    stated = (math.nan if value is None else value for value in (audit.found, audit.uncertainty))
    return (at(steps), *stated, asked), [tuple(map(float, cell)) for cell in cells]


@quiet()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the decays that are found, the errors, and whether the predictions hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--steps", type=int, default=6000, help="a multiple of 2000")
    parser.add_argument("--only", help="a library, or plain")
    parser.add_argument("--lengths", help="time constants of the EMA of a plain loop, in steps")
    options = parser.parse_args(arguments)
    lengths = LENGTHS
    if options.lengths:
        lengths = tuple(float(steps) / options.steps for steps in options.lengths.split(","))
    jobs = [(name, NAMES[index % len(NAMES)], LENGTHS[0]) for index, name in enumerate(LIBRARIES)]
    jobs += [("plain", name, length) for length in lengths for name in NAMES]
    rows = [
        (
            "EMA of",
            "training",
            "true decay",
            "found",
            "of the length: off by",
            "uncertainty",
            "import",
        )
    ]
    errors = [
        ("EMA of", "training", "sigma_rel", "error", "that EMA", "from raw", "plain", "predicted")
    ]
    sets: dict[str, list[tuple[float, ...]]] = {"chosen by": [], "held out": []}
    bands: dict[str, list[float]] = {"chosen by": [], "held out": []}
    for library, name, length in jobs:
        if options.only not in (None, library):
            continue
        (true, found, unsure, asked), cells = measure(
            library, record(name, options.steps, options.cache), length
        )
        off = float(np.log((1 - true) / (1 - found)))
        rows.append(
            (
                library,
                name,
                f"{true:.6f}",
                f"{found:.6f}",
                f"{off:+.2%}",
                f"{unsure:.2%}",
                "asked for" if asked else "",
            )
        )
        print(
            *rows[-1],
            [tuple(f"{value:.1e}" for value in cell) for cell in cells],
            file=sys.stderr,
            flush=True,
        )
        part = "held out" if name in HELD_OUT else "chosen by"
        bands[part] += [] if np.isnan(unsure + off) else [abs(off) / unsure]
        sets[part] += cells
        for width, cell in zip(WIDTHS, cells, strict=True):
            errors.append(
                (
                    library,
                    f"{name}, {length:g} T",
                    f"{width:.2f}",
                    *(f"{value:.1e}" for value in cell),
                )
            )
    print(markdown(rows), markdown(errors), sep="\n\n", end="\n\n", flush=True)
    for part, values in sets.items():
        if values:
            error, own, raw, plain, predicted = np.array(values).T
            held = np.maximum(error / predicted, predicted / error)
            for what, ratio in (
                ("that EMA's", own),
                ("raw checkpoints'", raw),
                ("plain least squares'", plain),
            ):
                print(
                    f"{part}: error / {what}: median {np.median(error / ratio):.3f}, most "
                    f"{(error / ratio).max():.2f}"
                )
            within = ", ".join(f"{np.mean(held < k):.1%} within {k}" for k in (2, 3))
            print(f"{part}: actual / predicted: {within}, most {held.max():.2f}, of {len(values)}")
            shares = ", ".join(
                f"{np.mean(np.array(bands[part]) < k):.0%} within {k}" for k in (1, 2, 3)
            )
            print(f"{part}: true length, in uncertainties: {shares}, of {len(bands[part])}")


if __name__ == "__main__":
    main()

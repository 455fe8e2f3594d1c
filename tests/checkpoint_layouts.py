"""Checkpoints of a random walk, in the layouts of other programs."""

import copy
import json
import operator
import pickle
import warnings
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

Weights = dict[str, torch.Tensor]
STEPS = (20, 40, 100, 200)


def walk():
    generator = torch.Generator().manual_seed(0)
    parts = (nn.Linear(40, 30), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    layers = nn.Sequential(*parts)
    state = layers.state_dict()
    found = {}
    for step in STEPS:
        for value in state.values():
            change = torch.tensor(step)
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                change = 0.01 * step**0.5 * noise
            value += change
        found[step] = dict(copy.deepcopy(state))
    return found


def filled(folder, *steps, size=3):
    """Write files of one tensor whose elements equal the step; return the folder."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        weights = torch.full((size,), float(step))
        torch.save({"w": weights}, folder / f"step{step}.pt")
    return folder


def check_average(run, states, target=0.2, strip="", at="step", exact=1e-12):
    """Check that an average is the planned combination of weights, with the newest values of all
    other tensors."""
    plan = run.plan(target)
    made = run.average(target, dtype="float64")
    key = operator.attrgetter(*at.split())
    used = [states[key(one)] for one in plan.sources]
    (c,) = torch.from_numpy(plan.reconstruction.coefficients.T)
    newest = states[key(run.sources[-1])]
    values = {name.removeprefix(strip): value for name, value in made.items()}
    assert values.keys() == newest.keys()
    for name, value in values.items():
        expected = newest[name]
        is_statistic = name.endswith(("running_mean", "running_var"))
        if expected.is_floating_point() and not is_statistic:
            stack = torch.stack([state[name].double() for state in used])
            expected = torch.tensordot(c, stack, dims=1)
        assert_close(value, expected, rtol=exact, atol=exact, check_dtype=False)


def shards(run, step, weights, ending):
    """Write two shards and their index, as transformers does."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    save = save_file if ending == "safetensors" else torch.save
    names = sorted(weights)
    files = {}
    for number in (1, 2):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        held = names[number - 1 :: 2]
        files |= dict.fromkeys(held, file)
        save({name: weights[name] for name in held}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": files})
    (folder / f"{stem}.{ending}.index.json").write_text(index)
    trainer(folder, step)


def trainer(folder, step):
    """Write what a Trainer writes next to the weights."""
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save({"x": torch.ones(3)}, folder / "rng_state.pth")
    state = json.dumps({"global_step": step, "log_history": []})
    (folder / "trainer_state.json").write_text(state)


def distributed(folder, content):
    """Write a folder of torch.distributed.checkpoint, by one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(content), checkpoint_id=str(folder))


def pickled_folder(run, step, weights):
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    for name in ("training_args.bin", "scheduler.pt", "scaler.pt", "random_states_0.pkl"):
        torch.save({"x": torch.ones(2)}, folder / name)
    trainer(folder, step)


def lightning(run, step, weights):
    named = {f"net.{name}": value for name, value in weights.items()}
    # an average, which is not to be read
    zeros = {name: torch.zeros_like(value) for name, value in named.items()}
    content = {
        "state_dict": zeros,
        "current_model_state": named,
        "global_step": step,
        "optimizer_states": [zeros],
    }
    torch.save(content, run / f"epoch=3-step={step + 1}.ckpt")


def files_of_safetensors(run, step, weights):
    save_file(weights, run / f"step{step}.safetensors")


def archives(run, step, weights):
    torch.save(weights, run / f"model-{step:08}.pt")


def pickles(run, step, weights):
    content = {"model": weights, "optimizer": weights, "step": step}
    (run / f"{step}.pth").write_bytes(pickle.dumps(content))


def modules(run, step, weights):
    content = {"module": weights, "iteration": step}
    torch.save(content, run / f"rank_{step}.pt")


def with_an_optimizer(run, step, weights):
    content = {
        "model": weights,
        "optimizer": {"x": torch.ones(3)},
        "step": step,
    }
    distributed(run / f"step-{step}", content)


def flat(run, step, weights):
    distributed(run / f"step-{step}", weights)


LAYOUTS = {
    "safetensors": files_of_safetensors,
    "archives": archives,
    "pickles": pickles,
    "modules": modules,
    "lightning": lightning,
    "transformers": partial(shards, ending="safetensors"),
    "bins": partial(shards, ending="bin"),
    "pickled folders": pickled_folder,
    "distributed": with_an_optimizer,
    "distributed flat": flat,
}
"""A function for each layout that writes the weights of a step into the folder of a run."""

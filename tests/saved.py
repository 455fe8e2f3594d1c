"""Files of a training's saves, and checks that both sets of tensors in them are found."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from predictions import assert_predicted
from safetensors.torch import load_file, save_file
from torch.nn.utils import parameters_to_vector
from walks import STEPS, constant, history, saves

from posthoc_cli import export_file, import_checkpoints
from posthoc_cli.checkpoints.open_run import find_unclaimed
from posthoc_cli.errors import InvalidValueError


def all_steps():
    return [save.step for save in saves()]


def named(prefix, tensors):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def store(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)


def write_each(folder, name, content, decay=constant):
    """Write a file at each save, whose name has places for its fields; return the last one."""
    for save in saves(decay):
        file = folder / name.format(save=save)
        store(file, content(save))
    return file


def read(place, **settings):
    """Return what an import finds; what it has written is opened as the same."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        found = import_checkpoints(place, out, **settings)
        reopened = find_unclaimed(out).checkpoints
    for ours, theirs in zip(found.checkpoints, reopened, strict=True):
        assert describe(ours) == describe(theirs)
    return found


def describe(checkpoint):
    """Return what is found out about a checkpoint: its role, its time, its profile, its tensors."""
    profile = checkpoint.profile
    tails = [profile.tail(share * profile.t) for share in (0.3, 0.7, 0.9, 0.99)]
    about = (checkpoint.path, checkpoint.t, checkpoint.t_unit, checkpoint.holds)
    return about, tails, checkpoint.stored, checkpoint.tensors, checkpoint.aliases


def times(place, **settings):
    return [one.t for one in read(place, **settings).checkpoints]


def asked(place, **settings):
    """Return what an import asks for."""
    with pytest.raises(InvalidValueError) as raised:
        read(place, **settings)
    return str(raised.value)


def values_of(source):
    """Return the tensors of a source, under all their names."""
    found = {}
    with source:
        for name, entry in source.entries.items():
            values = source.values(name, 0, entry.size)
            found[name] = torch.from_numpy(values).reshape(entry.shape)
    for alias, name in source.aliases.items():
        found[alias] = found[name]
    return found


def assert_equal(made, stored):
    assert made.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(made[name].double(), value.double()), name


def check(place, average, weights, decay=0.95, /, **settings):
    """Check what an import finds at the last step; `decay` None if the file does not say it."""
    given = dict(settings)
    if decay is None:
        given |= {"ema_decay": 0.95, "ema_warmup": "none"}
    found = read(place, **given).checkpoints
    assert found[-1].t == STEPS
    newest = [one for one in found if one.t == STEPS]
    (raw,) = [one for one in newest if one.holds == "weights"]
    (averaged,) = [one for one in newest if one.decay]
    assert_equal(values_of(raw), weights)
    assert_equal(values_of(averaged), average)
    assert averaged.decay == pytest.approx(decay or 0.95, abs=1e-7)
    assert len(found) >= 19  # an average that has not begun is none


def check_last(place, **settings):
    """Check that an import finds the last weights and their average, of a decay that no file
    says."""
    last = saves()[-1]
    check(place, last.average, last.weights, None, **settings)


def check_error(place, most=0.02):
    """Check that an average's error is the predicted one, which is at most half of `most`."""
    path = [parameters_to_vector(weights.values()).double().numpy() for weights in history()]
    assert_predicted(
        place, path, targets=[0.1], names=[*history()[0]], low=0.0, high=2, below=most / 2
    )


def exported(file, **options):
    out = file.with_name("exported.safetensors")
    export_file(file, out, overwrite=True, **options)
    return load_file(out)


def check_export(file, average, weights):
    assert_equal(exported(file), average)
    assert_equal(exported(file, raw=True), weights)

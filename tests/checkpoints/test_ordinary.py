"""Averages of any length from ordinary EMAs, as the libraries that are installed write them, else
in their format."""

import warnings

import pytest
import torch
from checking import refused
from predictions import assert_predicted
from safetensors.torch import load_file, save_file
from trained import (
    EVERY,
    STEPS,
    TIMES,
    named,
    network,
    paste,
    shapes,
    train,
    write,
)
from trained import ema as ema_of

from posthoc_cli import Run, export_file, import_checkpoints
from posthoc_cli.decay_rules import DecayRule

pytestmark = pytest.mark.statistical

DECAY = 0.995


def replay(update, save):
    """Repeat the recorded training with a model; call `update` after each step, and `save` at
    `TIMES`."""
    model = network()
    for step, vector in enumerate(train(), 1):
        model.load_state_dict(named(vector))
        update(model)
        if step in TIMES:
            save(step, model)


def test_long_averages_have_few_times():
    """A run opens 20 files of a million updates each."""
    for decay in (0.99, 0.9999, 0.99999):
        profile = DecayRule(decay).profile(10**6, 10**6)
        assert profile.times.size < 10_000


def plain(folder):
    write(folder, train(), ema_of(DECAY), torch.float16)
    for path in folder.iterdir():
        average = torch.load(path)["state_dict_ema"]
        save_file(average, path.with_suffix(".safetensors"))
        path.unlink()
    return {"ema_decay": DECAY, "kind": "ema"}


def diffusers(folder, **settings):
    pytest.importorskip("diffusers")
    from diffusers import ModelMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.training_utils import EMAModel

    class Small(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self):
            super().__init__()
            self.net = network()

    model = Small()
    average = EMAModel(
        model.parameters(), decay=DECAY, model_cls=Small, model_config=model.config, **settings
    )

    def save(step, _):
        average.save_pretrained(folder / f"checkpoint-{step}" / "unet_ema")
        model.save_pretrained(folder / f"checkpoint-{step}" / "unet")

    def update(now):
        model.net.load_state_dict(now.state_dict())
        average.step(model.parameters())

    replay(update, save)
    return {}


def ema_pytorch(folder, update_every=5, update_after_step=20, **rule):
    library = pytest.importorskip("ema_pytorch")
    online = network()
    intervals = {"update_every": update_every, "update_after_step": update_after_step}
    average = library.EMA(online, **({"beta": DECAY} | rule), **intervals)

    def update(model):
        online.load_state_dict(model.state_dict())
        average.update()

    def save(step, _):
        torch.save(average.state_dict(), folder / f"step{step}.pt")

    replay(update, save)
    return {"ema_decay": DECAY, **intervals}


def lightning(folder):
    """Write files with its Trainer, callback and checkpoints; each step loads the recorded
    weights."""
    library = pytest.importorskip(
        "lightning.pytorch", "2.6", reason="Lightning 2.6 is not installed"
    )
    weights = iter(train())

    class Replay(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self):
            super().__init__()
            self.net = network()
            self.automatic_optimization = False

        def training_step(self, *_):
            self.optimizers().step()
            self.net.load_state_dict(named(next(weights)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    callbacks = [
        library.callbacks.EMAWeightAveraging(decay=DECAY),
        library.callbacks.ModelCheckpoint(folder, every_n_train_steps=EVERY, save_top_k=-1),
    ]
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        trainer = library.Trainer(max_steps=STEPS, accelerator="cpu", callbacks=callbacks, **off)
        trainer.fit(Replay(), torch.utils.data.DataLoader(range(STEPS)))
    return {"ema_decay": DECAY}


def mmengine(folder):
    """Write files with its Runner, EMAHook and checkpoints; each step loads the recorded
    weights."""
    pytest.importorskip("mmengine.hooks")
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    weights = iter(train())

    class Replay(BaseModel):  # type: ignore[misc]
        def __init__(self):
            super().__init__()
            self.net = network()

        def train_step(self, *_, **__):
            self.net.load_state_dict(named(next(weights)))
            return {"loss": torch.zeros(())}

        def forward(self, *_):
            raise NotImplementedError

    Runner(
        Replay(),
        str(folder),
        torch.utils.data.DataLoader(range(STEPS)),
        train_cfg={"by_epoch": False, "max_iters": STEPS},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": EVERY}
        },
        custom_hooks=[{"type": "EMAHook", "momentum": 1 - DECAY}],
        log_level="ERROR",
    ).train()
    return {"ema_decay": DECAY}


LIBRARIES = [plain, diffusers, lightning, ema_pytorch, mmengine]


def averages_in(run):
    return [one for one in Run(run).sources if one.holds != "weights"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda one: one.__name__)
def test_an_ordinary_ema_makes_other_lengths(library, files, run):
    """The error from 15 checkpoints of the weights is 1.3e-2; from their EMAs an eighth of it, also
    in float16."""
    files.mkdir()
    settings = library(files)
    done = import_checkpoints(files, run, **settings)
    averages = averages_in(run)
    assert len(averages) == len(TIMES)
    assert any(one.decay == DECAY for one in averages)
    prefix = "net." if library in (diffusers, lightning, mmengine) else ""
    assert_predicted(run, names=[prefix + name for name in shapes()], below=2e-3)
    if library is not plain:
        assert all("as claimed" in line for line in done.checks), done.checks


def test_averages_without_names_are_those_of_the_parameters(tmp_path):
    """And not of the buffers between them."""
    file = tmp_path / "step5.pt"
    layers = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(3))
    shadow = [torch.full((3,), float(k)) for k in range(4)]
    average = {"decay": 0.9, "num_updates": 5, "shadow_params": shadow}
    torch.save({"model": layers.state_dict(), "ema": average}, file)
    export_file(file, tmp_path / "average.safetensors")
    exported = load_file(tmp_path / "average.safetensors")
    assert exported["1.weight"].tolist() == [2.0, 2.0, 2.0]


def test_every_command_asks_for_a_decay_as_an_import_does(tmp_path, ema):
    write(tmp_path, train(), ema_of(0.985))
    line = f"ema import {tmp_path} --ema-decay N --out run"
    with refused("ema_decay", line):
        _ = Run(tmp_path).sources
    out = tmp_path / "out.pt"
    assert ema("synthesize", tmp_path, "--sigma-rel", "0.1", "--out", out).error.endswith(line)
    assert "EMA of unknown decay" in ema("info", tmp_path).out
    assert "ema: error" not in ema("audit", tmp_path).err


def decays_of(done):
    """Return the decays of the averages in an import."""
    return {one.decay for one in done.checkpoints if one.decay}


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ({"ema_decay": DECAY}, "update_every"),
        ({"update_every": 1}, "update_after_step"),
    ],
)
def test_the_begin_and_the_interval_of_ema_pytorch_are_not_guessed(said, asked, tmp_path):
    """Its files count calls, and do not say how many there are between two updates."""
    ema_pytorch(tmp_path)
    with refused(asked):
        import_checkpoints(tmp_path, None, dry_run=True, **said)


def test_predictions_count_the_uncertainty_of_a_decay_that_was_found(files, run):
    """If predictions ignored it, actual errors would be up to 43 times the predicted ones."""
    weights = train(0.1, True, "SGD")
    write(files, weights, ema_of(0.9925))
    with refused("ema_decay", "--ema-decay found --out run") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    assert_predicted(run, weights, targets=(0.05, 0.25), low=0.0, high=3)


def test_more_checkpoints_are_taken_in_though_they_show_another_decay(tmp_path, files):
    write(files, train(), ema_of(0.9973))
    later = files / f"step{STEPS}.pt"
    later.rename(tmp_path / "later.pt")
    first = import_checkpoints(files, tmp_path / "run", ema_decay="found")
    (tmp_path / "later.pt").rename(later)
    again = import_checkpoints(files, tmp_path / "run", ema_decay="found")
    assert again.written
    assert len(again.checkpoints) == len(first.checkpoints) + 2
    assert len(decays_of(first) | decays_of(again)) == 2


@pytest.mark.parametrize("decay", [0.99, 0.995, 0.998, 0.999])
def test_a_round_decay_is_taken(decay, files, run):
    write(files, train(falls=True, seed=7), ema_of(decay), steps=range(50, 1501, 50))
    done = import_checkpoints(files, run)
    assert done.checks[0].endswith(f"; taken as {decay:g}")
    assert decays_of(done) == {decay}
    assert import_checkpoints(files, run).written is False


def test_a_decay_that_the_files_show_too_vaguely_is_asked_for(files, run):
    """Two files show it to 72 %."""
    write(files, train(), ema_of(0.98))
    for step in TIMES[:-2]:
        (files / f"step{step}.pt").unlink()
    with refused("ema_decay", "--ema-decay N "):
        import_checkpoints(files, run)
    assert import_checkpoints(files, run, ema_decay=0.98).written


@pytest.fixture
def begun_at_51(files):
    """Return files whose counts of updates do not show the interval: 50 at step 100 may mean one
    update in 2 steps, or an average that began at step 51."""
    files.mkdir()
    weights = torch.ones(3)
    for step in (100, 200):
        ema = {"decay": DECAY, "num_updates": step - 50, "shadow_params": [weights]}
        content = {"model": {"w": weights}, "ema": ema, "step": step}
        torch.save(content, files / f"step{step}.pt")
    return files


@pytest.mark.parametrize("settings", [{}, {"update_every": 3}])
def test_the_interval_is_asked_for_where_counts_do_not_show_it(settings, begun_at_51, run):
    with refused("update_every"):
        import_checkpoints(begun_at_51, run, **settings)


def test_the_interval_and_the_counts_tell_the_first_update(begun_at_51, run):
    import_checkpoints(begun_at_51, run, update_every=1)
    for average in averages_in(run):
        assert average.profile.settings["first"] == 51


def test_the_decay_of_averages_alone_is_not_found(tmp_path, run):
    plain(tmp_path)
    for path in tmp_path.iterdir():
        path.rename(path.with_name(f"ema_{path.name}"))
    with refused("ema_decay", "without weights"):
        import_checkpoints(tmp_path, run)


@pytest.mark.parametrize("every", [1, 10])
def test_the_power_of_ema_pytorch_is_looked_for(every, tmp_path):
    """Its files do not say it: the default, 2/3, was taken for 0.75, 40 times off in silence.

    Its warm-up counts calls, also those that update nothing.
    """
    ema_pytorch(tmp_path, every, 0, beta=0.9999, power=0.75)
    intervals = {"update_every": every, "update_after_step": 0}
    with refused("ema_decay", "--ema-warmup power:0.75 --out run") as asked:
        import_checkpoints(tmp_path, None, dry_run=True, **intervals)
    paste(asked.value, tmp_path / "run")

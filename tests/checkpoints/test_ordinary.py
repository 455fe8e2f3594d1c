"""Averages of any length from ordinary EMAs, as the libraries that are installed write them, else
in their format."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_command import Ema
from safetensors.torch import load_file, save_file
from trained import (
    EVERY,
    STEPS,
    TIMES,
    Weights,
    by,
    check,
    ema,
    error_of,
    named,
    network,
    ratio,
    train,
    write,
)

from posthoc_cli import Run, errors, export_file, import_checkpoints
from posthoc_cli.profiles import DecayRule, Point

DECAY = 0.995


def replay(
    update: Callable[[torch.nn.Module], None],
    save: Callable[[int, torch.nn.Module], None],
) -> None:
    """Repeat the recorded training with a model; call `update` after each step, and `save` at
    `TIMES`."""
    model = network()
    for step, vector in enumerate(train(), 1):
        model.load_state_dict(named(vector))
        update(model)
        if step in TIMES:
            save(step, model)


def test_long_averages_have_few_times() -> None:
    """A run opens 20 files of a million updates each."""
    for decay in (0.99, 0.9999, 0.99999):
        assert DecayRule(decay).profile(10**6, 10**6).times.size < 10_000


def timm(folder: Path) -> dict[str, Any]:
    write(folder, train(), ema(DECAY))
    return {"ema_decay": DECAY}


def plain(folder: Path) -> dict[str, Any]:
    for path in write(folder, train(), ema(DECAY), torch.float16).iterdir():
        save_file(torch.load(path)["state_dict_ema"], path.with_suffix(".safetensors"))
        path.unlink()
    return {"ema_decay": DECAY, "kind": "ema"}


def diffusers(folder: Path, **settings: Any) -> dict[str, Any]:
    pytest.importorskip("diffusers")
    from diffusers import ModelMixin
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.training_utils import EMAModel

    class Small(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

    model = Small()
    average = EMAModel(
        model.parameters(), decay=DECAY, model_cls=Small, model_config=model.config, **settings
    )

    def save(step: int, _: torch.nn.Module) -> None:
        average.save_pretrained(folder / f"checkpoint-{step}" / "unet_ema")
        model.save_pretrained(folder / f"checkpoint-{step}" / "unet")

    def update(now: torch.nn.Module) -> None:
        model.net.load_state_dict(now.state_dict())
        average.step(model.parameters())

    replay(update, save)
    return {"prefix": "net."}


def ema_pytorch(folder: Path, update_every: int = 5, update_after_step: int = 20) -> dict[str, Any]:
    library = pytest.importorskip("ema_pytorch")
    online = network()
    average = library.EMA(
        online, beta=DECAY, update_every=update_every, update_after_step=update_after_step
    )

    def update(model: torch.nn.Module) -> None:
        online.load_state_dict(model.state_dict())
        average.update()

    replay(update, lambda step, _: torch.save(average.state_dict(), folder / f"step{step}.pt"))
    return {
        "ema_decay": DECAY,
        "update_every": update_every,
        "update_after_step": update_after_step,
    }


def lightning(folder: Path) -> dict[str, Any]:
    """Write files with its Trainer, callback and checkpoints; each step loads the recorded
    weights."""
    library = pytest.importorskip(
        "lightning.pytorch", "2.6", reason="Lightning 2.6 is not installed"
    )
    weights = iter(train())

    class Replay(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.automatic_optimization = False

        def training_step(self, *_: object) -> None:
            self.optimizers().step()
            self.net.load_state_dict(named(next(weights)))

        def configure_optimizers(self) -> torch.optim.Optimizer:
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
    return {"ema_decay": DECAY, "prefix": "net."}


def mmengine(folder: Path) -> dict[str, Any]:
    """Write files with its Runner, EMAHook and checkpoints; each step loads the recorded
    weights."""
    pytest.importorskip("mmengine.hooks")
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    weights = iter(train())

    class Replay(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def train_step(self, *_: object, **__: object) -> dict[str, torch.Tensor]:
            self.net.load_state_dict(named(next(weights)))
            return {"loss": torch.zeros(())}

        def forward(self, *_: object) -> None:
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
    return {"ema_decay": DECAY, "prefix": "net."}


LIBRARIES = [timm, plain, diffusers, lightning, ema_pytorch, mmengine]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda one: one.__name__)
def test_an_ordinary_ema_makes_other_lengths(
    library: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
) -> None:
    """The error from 15 checkpoints of the weights is 1.3e-2; from their EMAs an eighth of it, also
    in float16."""
    (folder := tmp_path / "x").mkdir()
    settings = library(folder)
    done = import_checkpoints(folder, tmp_path / "run", **settings)
    assert any(one.decay == DECAY for one in done.checkpoints)
    run = Run(tmp_path / "run")
    assert len([one for one in run.sources if not isinstance(one.profile, Point)]) == len(TIMES)
    check(run)
    if library is not plain:
        assert all("as claimed" in line for line in done.checks), done.checks


def test_the_first_update_of_diffusers_copies_and_later_ones_warm_up(tmp_path: Path) -> None:
    for name in ("unet", "unet_ema"):
        (folder := tmp_path / "checkpoint-3" / name).mkdir(parents=True)
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"decay": DECAY, "optimization_step": 3}))
    (average,) = (one for one in Run(tmp_path).sources if one.sigma_rel or one.decay)
    assert [average.profile.tail(step) for step in (1, 2)] == pytest.approx(
        [1 - 2 / 11 * 3 / 12, 1 - 3 / 12]
    )


def test_averages_without_names_are_those_of_the_parameters(tmp_path: Path) -> None:
    layers = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(3))
    average = {
        "decay": 0.9,
        "num_updates": 5,
        "shadow_params": [torch.full((3,), float(k)) for k in range(4)],
    }
    torch.save({"model": layers.state_dict(), "ema": average}, tmp_path / "step5.pt")
    export_file(tmp_path / "step5.pt", tmp_path / "average.safetensors")
    assert load_file(tmp_path / "average.safetensors")["1.weight"][0] == 2


def test_the_decay_is_found(tmp_path: Path, ema: Ema, caplog: pytest.LogCaptureFixture) -> None:
    timm(tmp_path / "x")
    assert len(Run(tmp_path / "x").sources) == len(TIMES)  # the weights alone
    assert f"{len(TIMES)} EMAs, such as " in caplog.text
    assert "left out of averages: their files do not say the decay" in caplog.text
    assert "left out" not in ema("audit", tmp_path / "x").err  # it makes no averages
    done = ema("import", tmp_path / "x", "--out", tmp_path / "run")
    assert "found: decay 0.99" in done.out, done.err
    (decay,) = {
        one.decay for one in Run(tmp_path / "run").sources if not isinstance(one.profile, Point)
    }
    assert decay == pytest.approx(DECAY, abs=2e-4)
    assert error_of(Run(tmp_path / "run"))[0] < 2e-3


def test_the_interval_of_ema_pytorch_is_not_guessed(tmp_path: Path) -> None:
    """Its files count calls, and do not say how many there are between two updates."""
    (folder := tmp_path / "x").mkdir()
    ema_pytorch(folder, 1, 0)
    (audit,) = Run(folder).audit()
    assert audit.verdict == "found"
    assert audit.found == pytest.approx(min(DECAY, 1 - STEPS ** (-2 / 3)), abs=1e-3)  # its warm-up
    import_checkpoints(folder, tmp_path / "found")
    check(tmp_path / "found", most=1)
    for name, said in (("update_every", {}), ("update_after_step", {"update_every": 1})):
        with pytest.raises(
            errors.InvalidValueError,
            match=rf"{name}: must be given: step\d+\.pt .* default of the library",
        ):
            import_checkpoints(folder, tmp_path / "asked", ema_decay=DECAY, **said)
    # These files did not copy the weights for 100 calls: distances that no motion explains do not
    # disturb the fit.
    import_checkpoints(
        folder, tmp_path / "wrong", ema_decay=DECAY, update_every=1, update_after_step=100
    )
    assert error_of(Run(tmp_path / "wrong"))[0] < 5e-3


def test_the_decay_is_found_though_some_of_the_files_say_theirs(tmp_path: Path) -> None:
    def form(step: int, weights: Weights, average: Weights) -> object:
        told = {"decay": 0.9, "num_updates": None, "shadow_params": [*average.values()]}
        return {"model": weights, "ema": told if step < STEPS // 2 else average, "step": step}

    done = import_checkpoints(
        write(tmp_path / "x", train(), ema(DECAY), form=form), tmp_path / "run"
    )
    assert done.checks[0].startswith("found: decay 0.99")
    assert len({one.decay for one in done.checkpoints if one.decay}) == 1


def test_predictions_count_the_uncertainty_of_a_decay_that_was_found(tmp_path: Path) -> None:
    """If predictions ignored it, actual errors would be up to 43 times the predicted ones."""
    weights = train(0.1, True, "SGD")
    write(tmp_path / "x", weights, ema(0.9925))
    import_checkpoints(tmp_path / "x", tmp_path / "found")
    import_checkpoints(tmp_path / "x", tmp_path / "said", ema_decay=0.9925)
    for width in (0.05, 0.1, 0.15, 0.25):
        error, found = error_of(Run(tmp_path / "found"), width, weights=weights)
        _, said = error_of(Run(tmp_path / "said"), width, weights=weights)
        assert 1 / 3 < error / found < 3
        assert said < found  # what is said is exact


def test_more_checkpoints_are_taken_in_though_they_show_another_decay(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", train(), ema(0.9873))
    later = folder / f"step{STEPS}.pt"
    later.rename(tmp_path / "later.pt")
    first = import_checkpoints(folder, tmp_path / "run")
    (tmp_path / "later.pt").rename(later)
    again = import_checkpoints(folder, tmp_path / "run")
    assert again.written
    assert len(again.checkpoints) == len(first.checkpoints) + 2
    assert len({one.decay for done in (first, again) for one in done.checkpoints if one.decay}) == 2
    with pytest.raises(errors.OutputExistsError, match="with other settings"):
        import_checkpoints(folder, tmp_path / "run", ema_decay=0.9873)


def test_a_decay_that_people_use_is_taken_if_it_is_as_likely(tmp_path: Path) -> None:
    done = import_checkpoints(
        write(tmp_path / "x", train(1e-2, False, "SGD"), ema(0.98)), tmp_path / "run"
    )
    assert "; taken as 0.98" in done.checks[0]
    assert {one.decay for one in done.checkpoints} == {0.0, 0.98}
    settings = json.loads((tmp_path / "run" / "ema-import.json").read_text())["settings"]
    assert settings["ema_uncertainty"] > 0


def test_a_decay_that_the_files_show_too_vaguely_is_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", train(1e-2, False, "Adam"), ema(0.98))
    for step in range(EVERY, STEPS - EVERY, EVERY):  # the two files that remain show it to 72 %
        (folder / f"step{step}.pt").unlink()
    with pytest.raises(
        errors.InvalidValueError, match="ema_decay: must be given: the checkpoints do not show"
    ):
        import_checkpoints(folder, tmp_path / "run")
    assert import_checkpoints(folder, tmp_path / "run", ema_decay=0.98).written


def test_the_interval_is_asked_for_where_counts_do_not_show_it(tmp_path: Path) -> None:
    """50 updates at step 100 may mean one update in 2 steps, or an average that began at step
    51."""

    def form(step: int, weights: Weights, average: Weights) -> object:
        shadow = {"shadow_params": [*average.values()], "collected_params": None}
        return {
            "model": weights,
            "ema": {"decay": DECAY, "num_updates": step - 50} | shadow,
            "step": step,
        }

    update = by(lambda step: min(DECAY, ratio(step - 50)) if step > 50 else 0.0)
    folder = write(tmp_path / "x", train(), update, form=form)
    reason = r"update_every: must be given, and fit: step\d+.pt has counted [\d,]+ updates"
    for wrong in ({}, {"update_every": 3}):
        with pytest.raises(errors.InvalidValueError, match=reason):
            import_checkpoints(folder, tmp_path / "run", **wrong)
    import_checkpoints(folder, tmp_path / "run", update_every=1)
    run = Run(tmp_path / "run")
    settings = [
        vars(one.profile)["settings"] for one in run.sources if not isinstance(one.profile, Point)
    ]
    assert {(one["every"], one["first"]) for one in settings} == {(1, 51)}
    error, predicted = error_of(run)
    assert error < 2 * predicted < 2e-3


def test_what_an_import_cannot_find_is_named(tmp_path: Path) -> None:
    plain(tmp_path / "x")
    with pytest.raises(errors.FileFormatError, match="is no file of torchtitan"):
        import_checkpoints(tmp_path / "x", tmp_path / "run", kind="torchtitan")
    for path in (tmp_path / "x").iterdir():
        path.rename(path.with_name(f"ema_{path.name}"))
    with pytest.raises(
        errors.InvalidValueError, match="cannot be found without weights next to the averages"
    ):
        import_checkpoints(tmp_path / "x", tmp_path / "run")


def test_the_power_of_ema_pytorch_is_looked_for(tmp_path: Path) -> None:
    """Its files do not say it: the default, 2/3, was taken for 0.75, 40 times off in silence."""
    library = pytest.importorskip("ema_pytorch")
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(40, 40)
    average = library.EMA(
        model, beta=0.9999, power=0.75, update_every=1, update_after_step=0,
        include_online_model=False,
    )  # fmt: skip
    for step in range(1, 1001):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        average.update()
        if step % 100 == 0:
            content = {"model": model.state_dict(), "ema": average.state_dict(), "step": step}
            torch.save(content, tmp_path / f"{step}.pt")
    done = import_checkpoints(tmp_path, None, dry_run=True)
    (found,) = [line for line in done.checks if line.startswith("found: ")]
    assert "1 - (1 + n)^-0.75" in found

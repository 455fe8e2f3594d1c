"""The checkpoints of real trainings with the hook, in each framework and in a loop as the README's:
every command opens them, takes the weights as the library loads them, and names the run."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from checking import assert_same_tensors, each_heavy
from checkpoint_layouts import check_average
from ema_command import run_ema
from integrations.programs import forget
from truth import EVERY

from posthoc_cli import PostHocEMA, Run

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

STEPS = range(4, 21, 4)
NOTE = "holds the state of a tracker, whose snapshots make more exact averages: name"


@dataclass(frozen=True)
class Training:
    """Where a training has saved its checkpoints, and how its library loads one of them."""

    folder: Path
    saved: str  # in the folder: a place for commands
    step: str  # the name of a checkpoint there, with its step
    load: object  # the weights of a checkpoint
    load_average: object = None  # the average in it, if the hook has saved one
    run: str = "ema"

    def checkpoint(self, step):
        return self.folder / self.saved / self.step.format(step)

    @property
    def place(self):
        return self.folder / self.saved


# --- one training each


def transformers(folder, **options):
    pytest.importorskip("transformers")
    from integrations.llama import make_trainer

    from posthoc_cli.integrations.transformers import PostHocCallback

    evaluate = 0.15 if options else None
    callback = PostHocCallback(folder / "ema", evaluate=evaluate, **EVERY)
    make_trainer(folder, callback, max_steps=STEPS[-1], **options).train()
    return Training(folder, "out", "checkpoint-{}", load_llama)


def load_llama(path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path).state_dict()


def transformers_with_the_best_average(folder):
    pytest.importorskip("transformers")
    from integrations.llama import BEST

    made = transformers(folder, **BEST)
    return Training(folder, "out", made.step, load_llama, lambda path: load_llama(path / "ema"))


def lightning(folder, validate=None):
    pytest.importorskip("lightning.pytorch")
    from integrations.digits import EVERY as OPTIONS
    from integrations.digits import Regression, loader, make_trainer

    from posthoc_cli.integrations.lightning import PostHocWeightAveraging

    callback = PostHocWeightAveraging(folder / "ema", validate=validate, **OPTIONS)
    trainer = make_trainer(folder, callback, max_epochs=None, max_steps=STEPS[-1])
    trainer.fit(Regression(), loader(), loader())
    return Training(folder, "out", "step={}.ckpt", load_resumed)


def load_resumed(path):
    """Return the weights with which Lightning resumes a training."""
    from integrations.digits import EVERY as OPTIONS
    from integrations.digits import Regression, loader, make_trainer
    from lightning.pytorch import Callback

    from posthoc_cli.integrations.lightning import PostHocWeightAveraging

    class Looking(Callback):
        def on_train_start(self, trainer, module):
            self.weights = {name: value.clone() for name, value in module.state_dict().items()}
            trainer.should_stop = True

    looking = Looking()
    with TemporaryDirectory() as folder:
        callback = PostHocWeightAveraging(Path(folder, "ema"), **OPTIONS)
        trainer = make_trainer(Path(folder), looking, callback, max_epochs=9)
        trainer.fit(Regression(), loader(), loader(), ckpt_path=path)
    return looking.weights


def lightning_validated(folder):
    made = lightning(folder, validate=0.15)
    return Training(folder, "out", made.step, load_resumed, load_for_tests)


def load_for_tests(path):
    """Return the weights with which Lightning tests or predicts."""
    from integrations.digits import Regression

    return Regression.load_from_checkpoint(path).state_dict()


def accelerate(folder):
    pytest.importorskip("accelerate")
    from posthoc_cli.integrations.accelerate import prepare

    accelerator, model, optimizer = prepare_all()
    ema = prepare(accelerator, model, folder / "ema", optimizer, **EVERY)
    for step in range(1, STEPS[-1] + 1):
        accelerator.backward(model(torch.randn(4, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            accelerator.save_state(str(folder / f"saved/step_{step}"))
    ema.close()
    return Training(folder, "saved", "step_{}", load_state)


def prepare_all():
    from accelerate import Accelerator

    forget()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    bare = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1))
    return accelerator, *accelerator.prepare(bare, torch.optim.Adam(bare.parameters(), lr=0.05))


def load_state(path):
    accelerator, model, _ = prepare_all()
    accelerator.load_state(str(path))
    return model.state_dict()


def diffusers(folder):
    pytest.importorskip("diffusers")
    from integrations import unet

    forget()
    training = unet.Training(folder)
    for step in range(1, STEPS[-1] + 1):
        output = training.model(unet.IMAGES[step % len(unet.IMAGES)], step).sample
        training.accelerator.backward(output.square().mean())
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.ema_model.step(training.model.parameters())
        if step in STEPS:
            training.accelerator.save_state(str(folder / f"saved/checkpoint-{step}"))
    training.ema_model.close()
    return Training(
        folder,
        "saved",
        "checkpoint-{}",
        lambda path: load_unet(path, "unet"),
        lambda path: load_unet(path, "unet_ema"),
    )


def load_unet(path, name):
    from diffusers import UNet2DModel

    return UNet2DModel.from_pretrained(path, subfolder=name).state_dict()


def loop(folder):
    """As the guide `training` says, with a file a checkpoint."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    ema = PostHocEMA.from_model(model, folder / "ema", **EVERY)
    parts = {"model": model, "optimizer": optimizer, "ema": ema}
    (folder / "saved").mkdir()
    for step in range(1, STEPS[-1] + 1):
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_(model)
        if step in STEPS:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step, **state}, folder / f"saved/{step}.pt")
    ema.close()
    return Training(
        folder, "saved", "{}.pt", lambda path: torch.load(path, weights_only=True)["model"]
    )


TRAININGS = (
    transformers,
    transformers_with_the_best_average,
    lightning,
    lightning_validated,
    accelerate,
    diffusers,
    loop,
)


@pytest.fixture(scope="module", params=TRAININGS, ids=lambda make: make.__name__)
def training(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("training"))


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Return a function that runs `ema` with a line of arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda line: run_ema(*shlex.split(line))


COMMANDS = {
    "info": "info {saved}",
    "synthesize": "synthesize {saved} --sigma-rel 0.2 --out made.safetensors",
    "error-plot": "error-plot {saved} --out errors.png",
    "sweep": "sweep {saved} --sigma-rel 0.1,0.2 --minimize --out swept --eval "
    "\"sh -c 'echo {{sigma_rel}} | sed s/raw/9/' {{weights}}\"",
    "audit": "audit {saved}",
    "import": "import {saved} --out own",
}


@pytest.mark.parametrize(
    "command", ["info", "synthesize", "audit", "import", *each_heavy("error-plot", "sweep")]
)
def test_a_command_opens_the_checkpoints_and_names_the_run(training, command, typed):
    done = typed(COMMANDS[command].format(saved=training.place))
    if command == "audit" and training.load_average is None:
        assert "holds no average" in done.err  # to compare with the weights
    else:
        assert done.code == 0, done.err
    said = done.out + done.err
    assert said.count(f"{NOTE} {training.folder / training.run}\n") == 1


def test_the_sources_are_the_weights_that_the_library_loads(training):
    run = Run(training.place)
    assert {source.holds for source in run.sources} == {"weights"}
    weights = {step: training.load(training.checkpoint(step)) for step in STEPS}
    check_average(run, weights, 0.2)


def test_an_average_of_the_hook_is_audited_and_used_if_its_length_is_given(
    training, tmp_path, typed
):
    if training.load_average is None:
        pytest.skip("its checkpoints hold no average")
    noted = typed(f"import {training.place} --out own").err
    (options,) = re.findall(r"not used: an import with (.*) takes it", noted)
    done = typed(f"import {training.place} {options} --out own --overwrite")
    assert done.code == 0, done.err
    averages = [source for source in Run(tmp_path / "own").sources if source.sigma_rel]
    assert [source.t for source in averages] == [*map(float, STEPS)]
    (audit,) = Run(tmp_path / "own").audit()
    assert audit.verdict == "as claimed"


def test_a_copy_with_an_average_is_loaded_by_the_library(training, tmp_path, typed):
    like = training.checkpoint(STEPS[-1])
    out = tmp_path / like.name
    copy = f"--like '{like}' --out '{out}'"
    done = typed(f"synthesize {training.folder / training.run} --sigma-rel 0.2 {copy}")
    assert "the tracker's state in the copy is that of the training" in done.err
    average = Run(training.folder / training.run).average(0.2)
    load = training.load_average or training.load
    found = load(out)
    assert_same_tensors({name: found[name] for name in average}, average)
    if training.load_average is not None:
        assert_same_tensors(training.load(out), training.load(like))


def test_the_readmes_folder_names_the_run_in_it(tmp_path, typed):
    """`run/` holds the newest checkpoint, and the run."""
    made = loop(tmp_path)
    (tmp_path / "run").mkdir()
    made.checkpoint(STEPS[-1]).rename(tmp_path / "run/checkpoint.pt")
    (tmp_path / "ema").rename(tmp_path / "run/ema")
    for command, line in COMMANDS.items():
        done = typed(line.format(saved="run"))
        assert (done.out + done.err).count(f": {NOTE} run/ema\n") == 1
        if command in ("synthesize", "error-plot", "sweep"):
            assert "is one checkpoint" in done.err
    like = "--like run/checkpoint.pt --out copied.pt"
    done = typed(f"synthesize run/ema --sigma-rel 0.2 {like}")
    assert done.code == 0, done.err
    average = Run(tmp_path / "run/ema").average(0.2)
    assert_same_tensors(torch.load(tmp_path / "copied.pt")["model"], average)

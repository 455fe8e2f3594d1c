"""What is asked about, or refused with what to do, where files leave it open."""

import os
import shlex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checking import refused
from safetensors.torch import save_file
from saved import asked, read, store, times, write_each
from walks import saves

from posthoc_cli import PostHocEMA, Run, import_checkpoints
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError, PostHocError

FIRST, *_, LAST = saves()
HEAD = {"head.weight": torch.ones(4, 3), "head.bias": torch.ones(4)}
"""Another model."""


def weights(save):
    return save.weights


# --- later numbers of another model


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("step_{save.step}.pt", "disc_epoch_5000.pt"),
        ("epoch_{save.epoch}.pt", "disc_step_5000.pt"),
        ("net_{save.step}.pt", "vae_epoch_901.pt"),
        ("{save.step}.pt", "head-step901.pt"),
        ("e{save.epoch}/net_epoch_{save.epoch}.pt", "head_iter_777.pt"),
    ],
)
def test_a_later_number_of_another_model_is_asked_about_in_every_unit(name, other, tmp_path):
    write_each(tmp_path, name, weights)
    store(tmp_path / other, HEAD)
    said = asked(tmp_path)
    assert f"1 x {other}" in said
    assert other not in said.partition("paste: ")[2]


@pytest.mark.parametrize("other", ["vgg16.pt", "lpips_alex.pt", "head_step_3.pt"])
def test_another_model_without_a_later_time_is_left_out_and_named(other, tmp_path, caplog):
    write_each(tmp_path, "epoch_{save.epoch}.pt", weights)
    store(tmp_path / other, HEAD)
    assert len(times(tmp_path)) == 10
    assert f"{other} (another model)" in caplog.text


# --- shards, and parts by their numbers


def write_shards(folder, count=2, prefix="model"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        path = folder / f"{prefix}-{number:05}-of-{count:05}.safetensors"
        save_file({f"layer{number}.weight": torch.ones(2, 2)}, path)


@pytest.mark.parametrize("place", ["", "*"])
@pytest.mark.parametrize("prefix", ["model", "diffusion_pytorch_model"])
def test_shards_without_an_index_are_joined_if_all_are_there(prefix, place, tmp_path):
    for step in (40, 80):
        write_shards(tmp_path / f"step_{step}", prefix=prefix)
    assert times(tmp_path / place) == [40, 80]
    newest = read(tmp_path / place).checkpoints[-1]
    assert {*newest.tensors} == {"layer1.weight", "layer2.weight"}
    (tmp_path / "step_80" / f"{prefix}-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileFormatError, match="those that are missing have the numbers 2"):
        read(tmp_path)


def test_a_shard_that_is_all_of_a_model_is_one(tmp_path):
    for step in (40, 80, 120):
        write_shards(tmp_path / f"checkpoint-{step}", 1)
    assert times(tmp_path) == [40, 80, 120]


@pytest.mark.parametrize("name", ["model_{}_part{}.pt", "{}-{}.pt", "s{0}/{0}_rest{1}.pt"])
def test_a_glob_of_two_parts_is_asked_about(name, tmp_path):
    """It was a mismatch, without a command."""
    for save in saves():
        for number, part in enumerate((save.weights, HEAD)):
            store(tmp_path / name.format(save.step, number), part)
    said = asked(tmp_path / ("s*" if "/" in name else "") / "*.pt")
    assert said.count("10 x ") == 2
    assert said.endswith(("0.pt' --out run", "1.pt' --out run"))


@pytest.mark.parametrize("prefix", ["ema.", "net_ema.", "target.", "momentum_head."])
@pytest.mark.parametrize("count", [8, 12])
def test_a_part_that_a_word_calls_an_average_is_asked_about(prefix, count, tmp_path):
    """It was left out, with a warning: the rest of the model was averaged."""

    def content(save):
        part = {f"{prefix}p{number}.weight": torch.ones(2, 2) for number in range(count)}
        return {f"body.{name}": value for name, value in save.weights.items()} | part

    write_each(tmp_path, "step_{save.step}.pt", content)
    assert asked(tmp_path).endswith(" --from checkpoints --out run")


# --- numbers that are no steps of the training


def walk(count):
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(6, 6, generator=generator)
    for _ in range(count):
        position = position + 0.1 * torch.randn(6, 6, generator=generator)
        yield {"w.weight": position.clone()}


BEGIN_ANEW = ["ep{}-st{}.pt", "epoch{}_step{}.pt", "e{}/st_{}.pt", "epoch={}-step={}.ckpt"]


@pytest.mark.parametrize("name", BEGIN_ANEW)
def test_steps_that_begin_anew_in_each_epoch_have_no_proposal(name, tmp_path):
    """Of 20 files of one run 4 were proposed."""
    for number, content in enumerate(walk(20)):
        store(tmp_path / name.format(number // 4, 50 * (1 + number % 4)), content)
    with pytest.raises(InvalidValueError, match="anew") as raised:
        read(tmp_path)
    assert "paste" not in str(raised.value)


@pytest.mark.parametrize("name", ["e{}_s{}.pt", "epoch_{}_{}.pt", "{}-{}.pt"])
def test_no_part_of_a_run_is_proposed_where_numbers_have_no_words(name, tmp_path):
    for number, content in enumerate(walk(20)):
        store(tmp_path / name.format(number // 4, 50 * (1 + number % 4)), content)
    with pytest.raises(InvalidValueError) as raised:
        read(tmp_path)
    assert "paste" not in str(raised.value)


@pytest.mark.parametrize("name", ["seed{}_step{}.pt", "lr{}/ep{}.pt"])
def test_one_of_several_trainings_is_proposed(name, tmp_path):
    for seed in (1, 2, 3):
        for number, content in enumerate(walk(5), 1):
            store(
                tmp_path / name.format(seed, number),
                {"w.weight": (-1) ** seed * content["w.weight"]},
            )
    assert " x " in asked(tmp_path)


@pytest.mark.parametrize("name", ["model_{}.pt", "ckpt-{}.pt", "{}/model.pt", "{}.pt"])
@pytest.mark.parametrize("begin", [1_700_000_000, 1_700_000_000_000])
def test_seconds_since_1970_are_not_proposed_as_steps(begin, name, tmp_path):
    for number, save in enumerate(saves()):
        store(tmp_path / name.format(begin + 600 * number), save.weights)
    with pytest.raises(InvalidValueError, match="rename copies") as raised:
        read(tmp_path)
    assert "paste" not in str(raised.value)


def test_a_step_beside_seconds_is_proposed(tmp_path):
    for number, save in enumerate(saves()):
        store(tmp_path / f"{1_700_000_000 + 600 * number}_{save.step}.pt", save.weights)
    assert asked(tmp_path).endswith(r" --step-from '\d+_(\d+)\.pt$' --out run")


@pytest.mark.parametrize("last", ["[5-9]", "[3-8]", "[1-9]"])
def test_counted_updates_show_whether_epochs_begin_at_0(last, tmp_path):
    """The last epochs alone were counted from 1, and the command to paste was refused."""
    for first in (0, 1):
        place = tmp_path / str(first)
        for save in saves():
            average = {f"module.{name}": value for name, value in save.average.items()}
            average["n_averaged"] = torch.tensor(save.step)
            content = {"model": save.weights, "ema": average}
            store(place / f"epoch_{save.epoch - 1 + first}.pt", content)
        steps = [save.step for save in saves()]
        expected = steps[int(last[1]) - first : int(last[3]) - first + 1]
        assert times(place / f"epoch_{last}.pt", ema_decay=0.95)[::2] == expected


# --- one checkpoint, a damaged one, and a run below


def one_file(folder):
    store(folder / "step_40.pt", FIRST.weights)
    return folder / "step_40.pt"


def one_in_a_folder(folder):
    return one_file(folder).parent


def one_by_a_glob(folder):
    return one_file(folder).parent / "step_*.pt"


def one_average(folder):
    store(folder / "step_40.pt", {"decay": 0.95, "ema": FIRST.average, "step": 40})
    return folder


def imported(folder):
    import_checkpoints(one_file(folder), folder / "run")
    return folder / "run"


def imported_pair(folder):
    store(folder / "step_40.pt", {"model": FIRST.weights, "ema": FIRST.average})
    import_checkpoints(folder, folder / "run", ema_decay=0.95)
    return folder / "run"


ONE = [one_file, one_in_a_folder, one_by_a_glob, one_average, imported, imported_pair]


@pytest.mark.parametrize("make", ONE)
def test_an_average_of_one_checkpoint_is_refused(make, tmp_path):
    """It was made, with an unknown error."""
    run = Run(make(tmp_path))
    with refused(tmp_path / "step_40.pt", "of step 40", "ema export", kind=DirectoryError):
        run.average(0.1)
    assert run.step == 40
    assert run.info()["checkpoints"]


def test_a_damaged_file_of_a_run_may_be_moved_away(tmp_path):
    write_each(tmp_path, "step_{save.step}.pt", weights)
    damaged = tmp_path / f"step_{FIRST.step}.pt"
    os.truncate(damaged, 100)
    with refused(damaged, "move it away", kind=FileFormatError):
        read(tmp_path)
    damaged.rename(tmp_path / "damaged")
    assert len(times(tmp_path)) == 9


@pytest.mark.parametrize("run", ["ema", "run/ema", "a/b/run"])
def test_the_folder_of_a_run_is_named_above_it(run, tmp_path):
    model = torch.nn.Linear(3, 2)
    with PostHocEMA.from_model(model, tmp_path / run, update_every=1, checkpoint_every=2) as ema:
        for _ in range(4):
            ema.update_(model)
    for call in (lambda: Run(tmp_path).sources, lambda: read(tmp_path)):
        with pytest.raises(PostHocError, match=f"did you mean {tmp_path / run}"):
            call()


def test_a_setting_is_named_as_the_option_that_takes_it(tmp_path, ema):
    def content(save):
        return {"model": save.weights, "ema": {"params": save.average, "decay": 0.95}}

    write_each(tmp_path, "net_{save.epoch}.pt", content)
    for command in (["import", "--dry-run"], ["synthesize", "--sigma-rel", "0.1", "--out", "x.pt"]):
        shown = ema(*command, tmp_path)
        assert shown.code == 2
        assert "--steps-per-epoch: must be given" in " ".join(shown.err.split())


# --- numbers without words

FALLING = [826, 731, 645, 512, 498, 431, 377, 345, 301, 288]
"""Losses of the checkpoints, times 1,000: as distinct as steps are."""


def pasted_pattern(place):
    """Return the pattern of the step in the command that a question ends in."""
    words = shlex.split(asked(place).partition("paste: ")[2])
    return words[words.index("--step-from") + 1]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("net_{step}_{metric}.pt", "step"),
        ("net_{metric}_{step}.pt", "step"),
        ("{epoch}-{metric}.pth", "epoch"),
        ("{step}-{metric}/model.pt", "step"),
        ("run7_{step}_{metric}.pt", "step"),
    ],
)
def test_of_two_numbers_that_differ_the_evenly_spaced_one_is_proposed(name, unit, tmp_path):
    """The last one was, which is a loss as often as a step."""
    right = []
    for save, metric in zip(saves(), FALLING, strict=True):
        numbers = {"step": 10 * save.step, "epoch": save.epoch}
        store(tmp_path / name.format(metric=metric, **numbers), save.weights)
        right.append(numbers[unit])
    assert times(tmp_path, step_from=pasted_pattern(tmp_path)) == right


@pytest.mark.parametrize("name", ["net_{}.pt", "step_{}.pt", "{}/model.pt", "{}.pt"])
@pytest.mark.parametrize("join", ["_", ","])
def test_steps_of_which_the_larger_ones_are_grouped_are_read_together(join, name, tmp_path):
    """Of 1_000 beside 900 a glob took the larger half."""
    steps = [5 * save.step for save in saves()]
    assert min(steps) < 1000 < max(steps)
    for save, step in zip(saves(), steps, strict=True):
        store(tmp_path / name.format(f"{step:{join}}"), save.weights)
    assert times(tmp_path, step_from=pasted_pattern(tmp_path)) == steps


@pytest.mark.parametrize(
    "name",
    [
        "step{}/rank{}.pt",
        "step_{}_rank{}.pt",
        "epoch{}/model_rank_{}.pt",
        "iter{}/v{}.pt",
        "{:03}/gpu{}.pt",
    ],
)
def test_equal_files_of_several_ranks_are_copies(name, tmp_path, caplog):
    """Those in the folder of a step were called steps that begin anew."""
    for save in saves():
        for rank in range(2):
            store(tmp_path / name.format(save.epoch, rank), save.weights)
    assert times(tmp_path) == [save.epoch for save in saves()]
    assert "a copy of" in caplog.text


# --- where nothing is found


def write_a_model(folder, out):
    Run(folder).write(0.1, out)


@pytest.mark.parametrize("name", ["checkpoint-{}", "step_{}", "epoch={}"])
def test_a_folder_that_holds_the_state_of_a_training_alone_is_named(name, tmp_path, caplog):
    """As the newest one, after a save that was interrupted before the model."""
    for save in saves():
        folder = tmp_path / name.format(save.step)
        store(folder / "model.pt", save.weights)
        store(folder / "optimizer.pt", {"state": {}})
    newest = tmp_path / name.format(10_000)
    store(newest / "optimizer.pt", {"state": {}})
    store(newest / "scheduler.pt", {"last_epoch": 3})
    assert len(times(tmp_path)) == len(saves())
    assert f"{newest.name} (the state of a training alone)" in caplog.text


def test_folders_that_are_too_deep_are_mentioned(tmp_path):
    deep = tmp_path / "a" / "b" / "c" / "d"
    write_each(deep / "e", "step{save.step}.pt", weights)
    for folder in deep.parents[:4]:  # one that is alone in its folder does not count
        (folder / "logs").mkdir()
    for call in (import_checkpoints, write_a_model):
        with pytest.raises(DirectoryError, match="those below were not looked at"):
            call(tmp_path, tmp_path.parent / "out")
    assert len(times(deep.parent)) == len(saves())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_chunk_of_a_newest_checkpoint_that_was_cut_off_is_named_with_what_to_do(tmp_path):
    for save in saves()[:3]:
        dcp.save(
            {"model": save.weights}, checkpoint_id=tmp_path / f"step-{save.step}", no_dist=True
        )
    newest = tmp_path / f"step-{save.step}"
    (chunk,) = newest.glob("*.distcp")
    with chunk.open("r+b") as file:
        file.truncate(chunk.stat().st_size // 2)
    with pytest.raises(FileFormatError, match="truncated") as raised:
        import_checkpoints(tmp_path, tmp_path / "out")
    assert raised.value.hint == f"move {newest} away to leave it out"

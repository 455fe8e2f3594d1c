"""Which files at a place are one run: what they hold decides, names say times and roles."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from checking import each_heavy, refused
from checkpoint_layouts import distributed
from safetensors.torch import load_file, save_file
from saved import asked, named, read, store, times, write_each
from walks import saves

from posthoc_cli import Run
from posthoc_cli.checkpoints.describe import describe_checkpoints
from posthoc_cli.errors import FileFormatError, PostHocError

STEPS = [float(save.step) for save in saves()]
FIRST, *_, LAST = saves()


def weights(save):
    return save.weights


def others(save):
    """Return the weights of another training of the same model."""
    return {name: -value for name, value in save.weights.items()}


def check_equal(made, expected):
    """Check that averages are equal but for coefficients of other samples, by which the same
    weights in other files differ by 3e-5; two checkpoints differ by 0.1."""
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-4)


def average(place):
    """Synthesize an average of what is at a place."""
    return dict(Run(place).average(0.1))


@pytest.fixture
def expected(tmp_path):
    """Return the average of the same weights in files that nothing is said of but their steps."""
    write_each(tmp_path / "plain", "step{save.step}.pt", weights)
    return dict(Run(tmp_path / "plain").average(0.1))


# --- metrics in names

NAMES = [
    "epoch={save.epoch:02}-val_loss={metric:.2f}.ckpt",
    "epoch={save.epoch:02}-val_loss={metric:.3f}-step={save.step}.ckpt",
    "step-{save.step:06}-epoch-{save.epoch:02}-loss={metric:.4f}.pt",
    "model--step={save.step}-val_acc={metric:.1f}-last.ckpt",
    "{save.step:05}-{metric:.2f}.pt",
    "val_loss_{metric:.2f}_step_{save.step}.pt",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("highest", [2.3, *each_heavy(0.9, 12.0)])
def test_a_metric_in_a_name_is_no_time_and_splits_no_run(name, highest, tmp_path, expected):
    """A loss that falls through 1 split a run: of 20 files the 11 early ones were averaged."""
    place = tmp_path / "files"
    for save in saves():
        metric = highest * 0.97**save.epoch
        content = {"state_dict": save.weights, "global_step": save.step, "epoch": save.epoch}
        store(place / name.format(save=save, metric=metric), content)
    assert times(place) == STEPS
    check_equal(average(place), expected)


def test_decays_in_names_are_no_metrics(tmp_path):
    for save in saves():
        store(tmp_path / f"model_{save.step}.pt", save.weights)
        store(tmp_path / f"model_{save.step}_ema_0.95.pt", save.average)
    found = read(tmp_path, ema_decay=0.95)
    assert found.counts == {"weights": 10, "EMA of decay 0.95": 10}


# --- parts of a model


def split(tensors):
    """Split a model in two parts, in the order of its names."""
    names = [*tensors]
    first = {name: tensors[name] for name in names[: len(names) // 2]}
    return first, {name: value for name, value in tensors.items() if name not in first}


def in_one_file(place, save):
    body, head = split(save.weights)
    torch.save({"model": body, "head": head, "optim": {"state": {}}}, place / f"s_{save.step}.pt")


def of_no_main_part(place, save):
    actor, critic = split(save.weights)
    torch.save({"actor": actor, "critic": critic}, place / f"step_{save.step}.pt")


def in_a_folder(place, save):
    folder = place / f"checkpoint-{save.step}"
    (folder / "2_Dense").mkdir(parents=True)
    body, head = split(save.weights)
    save_file(body, folder / "model.safetensors")
    save_file(head, folder / "2_Dense" / "model.safetensors")


def in_layers(place, save):
    folder = place / f"step_{save.step}"
    folder.mkdir()
    for number, part in enumerate(split(save.weights)):
        save_file(part, folder / f"layer_{number}.safetensors")


@pytest.mark.parametrize("write", [in_one_file, of_no_main_part, in_a_folder, in_layers])
def test_all_parts_of_a_model_are_averaged_together(write, tmp_path, expected):
    place = tmp_path / "files"
    place.mkdir()
    for save in saves():
        write(place, save)
    made = average(place)
    bare = {}
    for name, value in made.items():
        bare[name if name in expected else name.partition(".")[2]] = value
    assert times(place) == STEPS
    check_equal(bare, expected)


@pytest.mark.parametrize("write", [in_one_file, in_a_folder])
def test_a_copy_of_a_checkpoint_has_the_averages_of_all_parts(write, tmp_path, expected):
    place = tmp_path / "files"
    place.mkdir()
    for save in saves():
        write(place, save)
    newest = max(place.iterdir(), key=lambda path: int("".join(filter(str.isdigit, path.name))))
    out = tmp_path / newest.name
    Run(place).write(0.1, out, like=newest)
    if newest.is_dir():
        made = load_file(out / "model.safetensors")
        made |= load_file(out / "2_Dense" / "model.safetensors")
    else:
        content = torch.load(out)
        made = content["model"] | content["head"]
    check_equal(made, expected)


def test_layers_of_one_name_and_shape_are_parts_and_not_times(tmp_path):
    for save in saves():
        folder = tmp_path / f"step_{save.step}"
        folder.mkdir()
        for number, layer in enumerate((weights(save), others(save))):
            save_file(layer, folder / f"layer_{number}.safetensors")
    assert times(tmp_path) == STEPS
    newest = read(tmp_path).checkpoints[-1]
    assert len(newest.stored) == 2 * len(LAST.weights)


EXTRAS = {
    "replay_buffer": {"states": torch.rand(9, 3)},
    "hyper_parameters": {"class_weights": torch.rand(3, 3)},
    "best_model": LAST.weights,
    "reference": FIRST.weights,
}


@pytest.mark.parametrize("key", EXTRAS)
def test_what_is_no_part_of_the_model_is_not_averaged(key, tmp_path, expected):
    write_each(
        tmp_path / "files",
        "s{save.step}.pt",
        lambda save: {"model": save.weights, key: EXTRAS[key]},
    )
    check_equal(average(tmp_path / "files"), expected)


@pytest.mark.parametrize("form", ["{}_target", "ema_{}"])
def test_averages_of_several_parts_are_a_question_about_all_of_the_model(form, tmp_path):
    """An average of one part was proposed first."""

    def content(save):
        parts = {}
        for key, sign in (("first", 1), ("other", -1)):
            parts[key] = {name: sign * value for name, value in save.weights.items()}
            average = {name: sign * value for name, value in save.average.items()}
            parts[form.format(key)] = average
        return {**parts, "step": save.step}

    write_each(tmp_path, "step_{save.step}.pt", content)
    assert asked(tmp_path).endswith(" --from checkpoints --out run")
    stored = read(tmp_path, kind="checkpoints").checkpoints[-1].stored
    assert {name.partition(".")[0] for name in stored} == {"first", "other"}


def test_a_target_network_of_a_part_is_a_question(tmp_path):
    """Of reinforcement learning: the actor is trained, too, and has no target."""

    def content(save):
        return {"actor": others(save), "critic": save.weights, "critic_target": save.average}

    write_each(tmp_path, "step_{save.step}.pt", content)
    question = asked(tmp_path)
    assert question.endswith(" --from checkpoints --out run")
    assert "'critic_target' takes its average alone" in question
    found = read(tmp_path, kind="checkpoints")
    names = {name.partition(".")[0] for name in found.checkpoints[-1].stored}
    assert names == {"actor", "critic"}
    part = read(tmp_path, average="critic_target", ema_decay=0.95)
    assert part.counts == {"weights": 10, "EMA of decay 0.95": 10}


def test_the_state_of_a_loss_is_no_other_part_beside_a_teacher(tmp_path):
    """DINO's: an import asked for the weights."""

    def content(save):
        loss = {"center": torch.full((1, 9), float(save.step))}
        return {"student": named("module.", save.weights), "teacher": save.average, "loss": loss}

    write_each(tmp_path, "step_{save.step}.pt", content)
    found = read(tmp_path, ema_decay=0.95)
    assert found.counts == {"weights": 10, "EMA of decay 0.95": 10}
    assert found.checkpoints[-1].stored.keys() == LAST.weights.keys()


def test_information_asks_what_an_import_asks(tmp_path):
    """Of I-JEPA's files it asked for the steps of an epoch instead."""

    def content(save):
        sets = {"encoder": save.weights, "predictor": others(save), "target_encoder": save.average}
        return {**sets, "epoch": save.epoch}

    write_each(tmp_path, "jepa-ep{save.epoch}.pth.tar", content)
    (note,) = Run(tmp_path).info()["notes"]
    assert note == f"cannot be used as it is: {asked(tmp_path)}"


VECTORS = [("policy", "value", "value_preprocessor"), ("encoder", "decoder", "loss_state")]


@pytest.mark.parametrize(("one", "other", "rest"), VECTORS)
def test_vectors_beside_several_networks_are_no_part(one, other, rest, tmp_path, caplog):
    """As skrl's preprocessors, which the question what the model is named, too."""

    def content(save):
        vectors = {"running": torch.full((1, 9), float(save.step)), "count": torch.tensor(3.0)}
        return {one: save.weights, other: others(save), rest: vectors}

    write_each(tmp_path, "agent_{save.step}.pt", content)
    names = {name.partition(".")[0] for name in read(tmp_path).checkpoints[-1].stored}
    assert names == {one, other}
    assert f"'{rest}', not used" in caplog.text


def test_trained_vectors_beside_networks_are_a_part(tmp_path):
    """A norm that is saved by itself would be missing in the average."""

    def content(save):
        norm = {"weight": torch.full((9,), float(save.step)), "bias": torch.ones(9)}
        return {"encoder": save.weights, "decoder": others(save), "final_norm": norm}

    write_each(tmp_path, "step_{save.step}.pt", content)
    with pytest.raises(PostHocError, match=r"unclear.*'final_norm'"):
        read(tmp_path)


def test_a_model_of_vectors_is_one_beside_a_matrix_of_data(tmp_path):
    def content(save):
        vectors = {name: value.flatten() for name, value in save.weights.items()}
        return {"model": vectors, "train": {"data": torch.ones(9, 9)}}

    write_each(tmp_path, "step_{save.step}.pt", content)
    assert read(tmp_path).checkpoints[-1].stored.keys() == LAST.weights.keys()


# --- several runs


def test_a_run_that_went_on_in_another_folder_is_proposed_up_to_there(tmp_path):
    """It was said that its steps begin anew: the two folders have two times in common."""
    for save in saves():
        if save.step <= STEPS[5]:
            store(tmp_path / f"first/step_{save.step}.pt", save.weights)
        if save.step > STEPS[4]:
            shifted = {name: value + 1e-3 for name, value in save.weights.items()}
            store(tmp_path / f"resumed/step_{save.step}.pt", shifted)
    place = shlex.split(asked(tmp_path).partition("paste: ")[2])[2]
    found = read(place).checkpoints
    assert [checkpoint.t for checkpoint in found] == STEPS
    folders = [checkpoint.path.parent.name for checkpoint in found]
    assert folders == ["first"] * 5 + ["resumed"] * 5


def test_averages_that_are_named_must_lie_at_the_place(tmp_path):
    """A line with a glob of the weights was proposed, which takes no average."""
    for save in saves():
        store(tmp_path / f"model_{save.step}.pt", save.weights)
        store(tmp_path / f"ema_{save.step}.pt", save.average)
    with refused("average", "ema_*.pt"):
        read(tmp_path / "model_*.pt", average="ema_*.pt", weights="model_*.pt")


def test_two_seeds_in_one_folder_are_a_question(tmp_path):
    for number, content in enumerate((weights, others)):
        write_each(tmp_path, f"model_seed{number}_step{{save.step}}.pt", content)
    with refused(tmp_path, "10 x model_seed0_step*.pt, 10 x model_seed1_step*.pt"):
        read(tmp_path)
    assert times(tmp_path / "model_seed1_step*.pt") == STEPS


def test_two_learning_rates_in_names_are_a_question(tmp_path):
    for rate, content in (("0.001", weights), ("0.01", others)):
        write_each(tmp_path, f"lr{rate}_step_{{save.step}}.pt", content)
    with refused(tmp_path, "10 x lr0.001_step_*.pt, 10 x lr0.01_step_*.pt"):
        read(tmp_path)


def test_two_phases_of_one_run_are_proposed_together(tmp_path):
    for number, save in enumerate(saves()):
        store(tmp_path / f"phase{1 + number // 5}" / f"step_{save.step}.pt", save.weights)
    assert asked(tmp_path).endswith(f"ema import '{tmp_path}/phase*/step_*.pt' --out run")
    assert times(tmp_path / "phase*" / "step_*.pt") == STEPS


@pytest.mark.parametrize("name", ["epoch_{}/step_{}.pt", "v_{}/checkpoints/epoch=1-step={}.ckpt"])
def test_phases_far_from_the_first_are_proposed_together(name, tmp_path):
    """The first of them was proposed alone: the last weights had moved far from the first ones."""
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(6, 6, generator=generator)
    for number in range(12):
        position = position + 0.9 * torch.randn(6, 6, generator=generator)
        content = {"w.weight": position.clone()}
        store(tmp_path / name.format(number // 4, 50 * (number + 1)), content)
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    assert times(words[2]) == [50.0 * (number + 1) for number in range(12)]


@pytest.mark.parametrize("name", ["model_{}_part{}.pt", "{}-{}.pt", "part{1}_of_step{0}.pt"])
def test_parts_of_several_times_are_no_parts_of_one_checkpoint(name, tmp_path):
    """Of 20 such files one was proposed."""
    for save in saves():
        for number, part in enumerate(split(save.weights)):
            store(tmp_path / name.format(save.step, number), part)
    with pytest.raises(PostHocError, match=r"_part1|-1|part1_"):
        read(tmp_path)


def test_a_folder_of_one_time_beside_a_run_is_a_checkpoint_of_its_own(tmp_path):
    """It was named as the folder in which both lie."""
    write_each(tmp_path, "run-1/files/step_{save.step}.pt", weights)
    store(tmp_path / "run-2" / "files" / "step_99999.pt", others(LAST))
    assert "1 x run-2" in asked(tmp_path)


def test_copies_in_another_dtype_are_not_proposed_as_averages(tmp_path):
    write_each(tmp_path, "step_{save.step}.pt", weights)
    for save in saves():
        half = {name: value.half() for name, value in save.weights.items()}
        store(tmp_path / f"step_{save.step}_fp16.safetensors", half)
    assert "--average" not in asked(tmp_path)


def test_pairs_in_files_of_other_names_are_one_run(tmp_path):
    for save, name in zip(saves(), "abcdefghij", strict=True):
        content = {"model": save.weights, "ema": save.average, "step": save.step}
        store(tmp_path / f"{name * 4}.pt", content)
    found = read(tmp_path, ema_decay=0.95)
    assert found.counts == {"weights": 10, "EMA of decay 0.95": 10}


def test_two_series_of_equal_names_are_proposed_by_their_folders(tmp_path):
    """`--average '*.pt' --weights '*.pt'` was proposed, and asked the same again."""
    for save in saves():
        store(tmp_path / "fast" / f"{save.step}.pt", save.weights)
        store(tmp_path / "slow" / f"{save.step}.pt", save.average)
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given == {"--average": "slow/*.pt", "--weights": "fast/*.pt", "--out": "run"}
    found = read(tmp_path, average="slow/*.pt", weights="fast/*.pt", ema_decay=0.95)
    assert found.counts == {"weights": 10, "EMA of decay 0.95": 10}


def test_two_models_with_as_many_files_are_a_question(tmp_path):
    write_each(tmp_path, "G_{save.step}.pth", weights)
    for step in STEPS:
        store(tmp_path / f"D_{step:.0f}.pth", {"d.weight": torch.rand(5, 5)})
    with refused(tmp_path, "several models", "10 x G_*.pth"):
        read(tmp_path)
    assert times(tmp_path / "G_*") == STEPS


def test_a_model_with_few_files_is_left_out_and_named(tmp_path, caplog):
    write_each(tmp_path, "model_{save.step}.pth", weights)
    store(tmp_path / "classifier.pth", {"c.weight": torch.rand(5, 5)})
    store(tmp_path / "pretrained" / "base.pt", others(FIRST))
    assert times(tmp_path) == STEPS
    assert "classifier.pth (another model)" in caplog.text
    assert "pretrained" in caplog.text


# --- nothing later is left out


def test_a_later_file_that_states_its_step_is_taken(tmp_path):
    for save in saves()[:-1]:
        store(tmp_path / f"model_{save.step}.pt", {"step": save.step, "model": save.weights})
    store(tmp_path / "final.pt", {"step": LAST.step, "model": LAST.weights})
    assert times(tmp_path) == STEPS


@pytest.mark.parametrize("late", ["finetune_99999.pt", "model_99999_v2.pt", "epoch_99999.pt"])
def test_a_later_number_is_never_left_out_in_silence(late, tmp_path):
    write_each(tmp_path, "model_{save.step}.pt", weights)
    store(tmp_path / late, others(LAST))
    assert f"1 x {late}" in asked(tmp_path)


def test_equal_values_are_copies_whatever_their_name(tmp_path, caplog):
    write_each(tmp_path, "model_{save.step}.pt", weights)
    for copy in ("best.pt", "last.pt", "model_best_0.93.pt", "backup/model_old.pt"):
        (tmp_path / copy).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"model_{LAST.step}.pt", tmp_path / copy)
    assert times(tmp_path) == STEPS
    assert caplog.text.count(f"(a copy of model_{LAST.step}.pt)") == 4


# --- what cannot be read


def test_a_damaged_file_of_the_run_is_an_error(tmp_path):
    file = write_each(tmp_path, "model_{save.step}.pt", weights)
    file.write_bytes(file.read_bytes()[:1000])
    with refused(file, kind=FileFormatError):
        read(tmp_path)


def test_a_later_checkpoint_whose_tensors_are_missing_is_an_error(tmp_path):
    """A folder of torch.distributed.checkpoint is written last, and was left out."""
    for save in saves():
        distributed(tmp_path / f"step_{save.step}", {"model": save.weights})
    (tmp_path / f"step_{LAST.step}" / ".metadata").unlink()
    with refused(tmp_path / f"step_{LAST.step}", "move it away", kind=FileFormatError):
        read(tmp_path)


@pytest.mark.parametrize("name", ["step_{}/ckpt_rank{}.pt", "checkpoint-{}/{}-of-2.pt"])
def test_a_damaged_file_of_a_rank_does_not_hide_what_else_there_is(name, tmp_path):
    """`ema info` showed nothing."""
    for step, ranks in ((40, 1), (80, 2)):
        for rank in range(ranks):
            damaged = tmp_path / name.format(step, rank)
            store(damaged, {"model": FIRST.weights})
    damaged.write_bytes(damaged.read_bytes()[:2000])
    described = describe_checkpoints(tmp_path)
    assert any("model (" in row["holds"] for row in described["checkpoints"])


def test_other_files_that_cannot_be_read_are_left_out_and_named(tmp_path, caplog):
    write_each(tmp_path, "model_{save.step}.pt", weights)
    (tmp_path / "brain.ckpt").write_text("a text")
    (tmp_path / "z.pt").write_bytes(b"PK\x03\x04 broken")
    assert times(tmp_path) == STEPS
    assert "brain.ckpt (" in caplog.text
    assert "z.pt (" in caplog.text


def test_a_text_with_the_ending_of_a_checkpoint_is_no_part_of_one(tmp_path):
    """As SpeechBrain's `brain.ckpt`; the epoch is in a YAML file beside it."""
    for save in saves():
        folder = tmp_path / f"CKPT+{save.epoch:02}-00"
        folder.mkdir()
        torch.save(save.weights, folder / "model.ckpt")
        (folder / "brain.ckpt").write_text("avg_train_loss: 2.5")
        (folder / "counter.ckpt").write_text(str(save.epoch))
        (folder / "CKPT.yaml").write_text(f"# yamllint\nepoch: {save.epoch}\nunixtime: 1700.5\n")
    assert times(tmp_path) == [save.epoch for save in saves()]


@pytest.mark.parametrize("link", ["last.pt", "models/last.pt"])
def test_a_link_to_a_missing_file_is_left_out_and_named(link, tmp_path, caplog):
    """As `last.ckpt` is when its file was rotated away."""
    write_each(tmp_path, "models/model_{save.step}.pt", weights)
    (tmp_path / link).symlink_to(tmp_path / "gone.pt")
    assert times(tmp_path) == STEPS
    assert "last.pt (is a link to a file that is missing)" in caplog.text


def test_a_later_link_to_a_missing_file_is_an_error(tmp_path):
    write_each(tmp_path, "model_{save.step}.pt", weights)
    link = tmp_path / "model_99999.pt"
    link.symlink_to(tmp_path / "gone.pt")
    with refused(link, kind=FileFormatError):
        read(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "rank{}.pt",
        "model_rank_{}.bin",
        "ba-rank{}.pt",
        "x-shard{}.pt",
        "w_mp{}.tar",
        "w-0{}-of-02.pt",
    ],
)
def test_partitions_of_ranks_are_refused(name, tmp_path):
    """They were averaged as two parts of a model, and under a glob of one rank as the model."""
    for save in saves():
        for number, content in enumerate((weights, others)):
            store(tmp_path / f"step{save.step}" / name.format(number), content(save))
    places = [tmp_path]
    if "of" not in name:
        places += [tmp_path / "step*" / name.format(number) for number in (0, 1)]
    for place in places:
        with pytest.raises(FileFormatError, match="partitions"):
            read(place)


@pytest.mark.parametrize("process", ["-shard0", "-shard1", "-rank1"])
@pytest.mark.parametrize("pattern", [".", "*{}.pt"])
def test_a_whole_model_of_one_process_is_no_partition(process, pattern, tmp_path, expected):
    """It was refused by the word in its name."""
    place = tmp_path / "files"
    for save in saves():
        store(place / f"step_{save.step}{process}.pt", weights(save))
    check_equal(average(place / pattern.format(process)), expected)


@pytest.mark.parametrize("name", ["epoch-{}-of-20.pt", "step_{}-shard0.pt", "step_{}_rank0.pt"])
def test_times_of_many_are_no_partitions(name, tmp_path, expected):
    place = tmp_path / "files"
    for save in saves():
        store(place / name.format(save.step), weights(save))
        if "0.pt" in name and "of" not in name:
            store(place / name.format(save.step).replace("0.pt", "1.pt"), weights(save))
    check_equal(average(place), expected)


def test_partitions_are_refused_also_through_a_glob(tmp_path):
    for save in saves():
        for number in range(2):
            store(tmp_path / f"step{save.step}" / f"consolidated.0{number}.pth", save.weights)
    for place in (tmp_path, tmp_path / "*" / "consolidated.01.pth"):
        with pytest.raises(FileFormatError, match="partitions"):
            read(place)


# --- one road


@pytest.mark.parametrize("name", ["model_{}.pt", "checkpoint_{}", "a/b/step_{}.pt", "m.pt.ep{}"])
def test_every_command_opens_what_an_import_opens(name, tmp_path, ema):
    place = tmp_path / "files"
    for save in saves():
        store(place / name.format(save.step), save.weights)
    out = tmp_path / "made.safetensors"
    assert ema("import", place, "--out", tmp_path / "run").code == 0
    for opened in (place, tmp_path / "run"):
        made = ema("synthesize", opened, "--sigma-rel", 0.1, "--out", out, "--overwrite")
        assert "from 10 checkpoints" in made.out
        assert ema("info", opened, "--json").json["t"] == LAST.step


# --- tensors that differ


def without(tensors, name="body.0.weight"):
    return {each: value for each, value in tensors.items() if each != name}


def reshaped(tensors):
    return tensors | {"body.0.weight": torch.zeros(5, 4)}


def renamed(tensors):
    return {name.replace("body.0", "body.9"): value for name, value in tensors.items()}


@pytest.mark.parametrize("key", ["model", "ema"])
@pytest.mark.parametrize("change", [without, reshaped, renamed])
@pytest.mark.parametrize("place", [0, 4, 9])
def test_a_set_that_differs_in_one_file_is_an_error_that_names_it(key, change, place, tmp_path):
    """An EMA without one of its tensors in one file ended in an unexpected error."""
    for number, save in enumerate(saves()):
        content = {"model": save.weights, "ema": save.average}
        if number == place:
            content[key] = change(content[key])
        store(tmp_path / f"step{save.step}.pt", content)
        if number == place:
            odd = f"step{save.step}.pt"
    with pytest.raises(PostHocError) as raised:
        read(tmp_path, ema_decay=0.95)
    assert odd in str(raised.value) or "step40.pt" in str(raised.value)
    assert "body.0" in str(raised.value) or "ema" in str(raised.value)


# --- proposals


@pytest.mark.parametrize(
    "name", ["mlp-{}-{}.pt", "run_{}_{}", "a{}b{}.pt", "7_{}_{}_x.pt", "a-{}_{}"]
)
def test_a_proposed_pattern_finds_the_last_number_of_a_name(name, tmp_path):
    """And not the metric before it, or a number in the path."""
    place = tmp_path / "3-run_7" / "mlp-5b1"
    for save in saves():
        store(place / name.format(70 - 3 * save.epoch, save.step), {"model": save.weights})
    pattern = shlex.split(asked(place))[-3]
    assert times(place, step_from=pattern) == STEPS


def test_proposed_globs_take_brackets_as_they_are(tmp_path):
    place = tmp_path / "run [v2]"
    for number, content in enumerate((weights, others)):
        write_each(place, f"net[{number}] step_{{save.step}}.pt", content)
    words = shlex.split(asked(place))
    assert times(words[-3]) == STEPS


def test_a_proposed_place_is_no_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, content in enumerate((weights, others)):
        write_each(tmp_path / "-runs", f"net{number}_step{{save.step}}.pt", content)
    *_, place, _, _ = shlex.split(asked(Path("-runs")))
    assert place.startswith("./-runs/")
    assert Run(place).sources[-1].t == STEPS[-1]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapper_that_came_with_a_resume_is_no_other_model(prefix, tmp_path, expected):
    place = tmp_path / "files"
    for number, save in enumerate(saves()):
        tensors = save.weights if number < 5 else named(prefix, save.weights)
        store(place / f"step{save.step}.pt", {"model": tensors, "step": save.step})
    assert times(place) == STEPS
    check_equal(average(place), expected)


@pytest.mark.parametrize("key", ["nope", "*_E.pth", "nope_*"])
def test_an_average_that_no_file_has_is_an_error(key, tmp_path):
    """It was imported as weights alone."""
    write_each(tmp_path, "step{save.step}.pt", lambda save: {"model": save.weights})
    with pytest.raises(PostHocError, match="there are 'model'"):
        read(tmp_path, average=key)

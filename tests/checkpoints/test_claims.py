"""Decays that checkpoints say, compared with the weights beside the averages; the truth is summed
here in float64."""

import re

import pytest
import torch
import walks
from saved import check_error, check_last, fault, named, store, write_each

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import InvalidValueError

CLAIMED = 0.99
EVERY = 20


def claimed(_):
    return CLAIMED


def late_cap(n):
    """The warm-up reaches 0.97 at update 290 of 400."""
    rising = (1 + n) / (10 + n)
    return min(0.97, rising)


def save(folder, decay, claim=None, dtype=torch.float32):
    """Write the weights and their average, kept in a dtype, as OpenFold does."""
    folder.mkdir()
    first = walks.weights_of(walks.new_net())
    average = {name: value.to(dtype) for name, value in first.items()}
    ema = {"params": average}
    if claim is not None:
        ema["decay"] = claim
    for step, weights in enumerate(walks.history(), 1):
        share = 1 - decay(step)
        for name, value in average.items():
            apart = weights[name].to(dtype) - value
            value += share * apart
        if step % EVERY == 0:
            content = {
                "state_dict": weights,
                "ema": ema,
                "global_step": step,
            }
            torch.save(content, folder / f"{step}.ckpt")
    return folder


@pytest.mark.parametrize("claim", [CLAIMED, None])
def test_an_average_whose_updates_round_to_nothing_is_refused(claim, files, run):
    """Such an average of decay 0.99 is 0.1 from the true one, and moves as one of 0.9892 would."""
    save(files, claimed, claim, torch.bfloat16)
    with pytest.raises(InvalidValueError, match=r"too few digits: .*takes the weights alone"):
        import_checkpoints(files, run)
    import_checkpoints(files, run, kind="checkpoints")
    check_error(run, 0.1)


def test_an_average_that_was_set_back_is_refused(files):
    """From step 300 on, the files are those of a training that went on from step 200."""
    save(files, claimed, CLAIMED)
    run = Run(files)
    run.average(0.1)
    for step in range(400, 280, -EVERY):
        content = torch.load(files / f"{step - 100}.ckpt")
        torch.save(content | {"global_step": step}, files / f"{step}.ckpt")
    with pytest.raises(InvalidValueError, match="step 300 does not follow from that of 280"):
        run.average(0.1)


def test_a_decay_that_a_warm_up_reaches_only_near_the_end_is_found(files, run):
    """Taken for unlimited, such an average is 1 % off."""
    save(files, late_cap)
    found = import_checkpoints(files, run)
    _, _, decay, *_ = found.checks[-1].split()
    assert float(decay.strip(",")) == pytest.approx(0.97, abs=0.0002)
    check_error(run, 0.01)


def unknown_rise(n):
    risen = min(1, n / 200)
    return 0.99 * risen


def test_a_decay_that_rises_by_a_rule_of_no_library_is_no_restart(files, run):
    save(files, unknown_rise)
    (line,) = import_checkpoints(files, run).checks
    assert re.search(r"^found: .* rises until step \d+ by a rule that is not known", line)
    check_error(run)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.9, 0.98, r"rises until step \d+ .*: name the files after it by a glob"),
        (0.97, 0.99, "changes near step 200: name the files of one side by a glob"),
    ],
)
def test_a_decay_that_changes_is_refused_with_the_time(before, after, said, files, run):
    save(files, lambda n: before if n <= walks.STEPS // 2 else after)
    with pytest.raises(InvalidValueError, match=said):
        import_checkpoints(files, run, ema_decay=after, ema_warmup="none")


def test_the_part_that_an_average_and_the_weights_share_is_named(files):
    """F5-TTS keeps a buffer in its average that the weights lack."""

    def content(one):
        average = named("net.", one.average) | {"window": torch.ones(4)}
        return {
            "model": named("net.", one.weights),
            "ema_model": average,
        }

    write_each(files, "model_{save.step}.pt", content)
    said = fault(files)
    assert "an EMA and weights of different models: only the EMA has 'window'" in said
    assert "'ema_model.net' with `weights` 'model.net'" in said
    check_last(files, average="ema_model.net", weights="model.net")


def test_an_average_of_another_model_is_refused(files):
    model = {
        "a.w": torch.ones(3),
        "b.w": torch.ones(2),
    }
    average = model | {"c": torch.ones(4)}
    store(files / "step1.pt", {"model": model, "ema": average})
    assert "only the EMA has 'c'; `kind` checkpoints takes the weights alone" in fault(files)


def test_a_prefix_tells_which_weights_a_list_of_averages_is_of(files):
    """As of FastGAN, whose generator `g` has an average in a list."""

    def content(one):
        other = {name: -value for name, value in one.weights.items()}
        return {
            "g": one.weights,
            "d": other,
            "g_ema": [*one.average.values()],
        }

    write_each(files, "all_{save.step}.pth", content)
    check_last(files, prefix="g.")

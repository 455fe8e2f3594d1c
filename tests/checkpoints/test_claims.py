"""Decays that checkpoints say, compared with the weights beside the averages; the truth is summed
here in float64."""

import pytest
import torch
import walks
from checking import refused
from saved import check, check_error, check_last, named, read, store, write_each
from trained import paste

from posthoc_cli import Run, import_checkpoints

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


def test_files_of_a_training_that_went_back_are_said(files, caplog):
    """From step 300 on, the files are those of a training that went on from step 200."""
    save(files, claimed, CLAIMED)
    run = Run(files)
    run.average(0.1)
    assert "as far apart" not in caplog.text
    for step in range(400, 280, -EVERY):
        content = torch.load(files / f"{step - 100}.ckpt")
        torch.save(content | {"global_step": step}, files / f"{step}.ckpt")
    run.average(0.1)
    assert "280.ckpt (average) and 300.ckpt (average) are as far apart" in caplog.text


def test_a_decay_that_a_warm_up_reaches_only_near_the_end_is_found(files, run):
    """Taken for unlimited, such an average is 1 % off."""
    save(files, late_cap)
    found = import_checkpoints(files, run, ema_decay="found")
    _, _, decay, *_ = found.checks[-1].split()
    assert float(decay.strip(",")) == pytest.approx(0.97, abs=0.0015)
    check_error(run, 0.01)


def unknown_rise(n):
    risen = min(1, n / 200)
    return 0.99 * risen


def test_a_decay_that_rises_by_a_rule_of_no_library_is_asked_for(files, run):
    save(files, unknown_rise)
    with refused("ema_decay"):
        import_checkpoints(files, run)


def test_the_decay_that_files_say_is_proposed_for_an_average_that_began_again(files, run):
    save(files, lambda n: 0.0 if n == 210 else CLAIMED, CLAIMED)
    with refused("average", "of step 220 does not follow", "--ema-decay 0.99 ") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)


def test_a_decay_that_changes_is_refused(files, run):
    save(files, lambda n: 0.97 if n <= walks.STEPS // 2 else 0.99)
    with refused("ema_decay 0.99"):
        import_checkpoints(files, run, ema_decay=0.99, ema_warmup="none")


def test_a_decay_that_changes_between_files_far_apart_is_said(files, run, caplog):
    """The first one forgets within half an interval."""
    save(files, lambda n: 0.9 if n <= walks.STEPS // 2 else 0.98)
    import_checkpoints(files, run, ema_decay=0.98, ema_warmup="none")
    assert "the files do not show" in caplog.text


def test_buffers_that_an_average_alone_has_are_left_out(files):
    """F5-TTS keeps one in its average that the weights lack."""

    def content(one):
        average = named("net.", one.average) | {"window": torch.ones(4)}
        return {
            "model": named("net.", one.weights),
            "ema_model": average,
        }

    write_each(files, "model_{save.step}.pt", content)
    last = walks.saves()[-1]
    check(files, named("net.", last.average), named("net.", last.weights), None)


def test_an_average_of_another_model_is_not_used_and_said(files, caplog):
    model = {
        "a.w": torch.ones(3),
        "b.w": torch.ones(2),
    }
    average = model | {"c": torch.ones(4)}
    store(files / "step1.pt", {"model": model, "ema": average})
    assert read(files).counts == {"weights": 1}
    assert "'ema', not used" in caplog.text


def test_weights_that_are_named_are_those_of_a_list_of_averages(files):
    """As of FastGAN, whose generator `g` has an average in a list."""

    def content(one):
        other = {name: -value for name, value in one.weights.items()}
        return {
            "g": one.weights,
            "d": other,
            "g_ema": [*one.average.values()],
        }

    write_each(files, "all_{save.step}.pth", content)
    check_last(files, weights="g")

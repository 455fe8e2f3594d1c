"""Ordinary EMAs whose files lack the warm-up, restarts or clock: an import finds, takes or requires
them."""

import pytest
import torch
from checking import refused
from predictions import assert_predicted
from trained import (
    EVERY,
    STEPS,
    TIMES,
    by,
    paste,
    ratio,
    settings_of,
    train,
    write,
)

from posthoc_cli import Run, import_checkpoints

pytestmark = pytest.mark.statistical


def again(decay, begin=850):
    """Return an EMA that goes on from the weights of a step, and then counts its updates from 0."""

    def updated(step, average, weights):
        if step == begin + 1:
            average = train()[begin - 1]
        counted = step if step <= begin else step - begin
        kept = decay(counted)
        return kept * average + (1 - kept) * weights

    return updated


def late(begin):
    """Return copies of the weights up to a step, and then an EMA."""
    return by(lambda step: 0.995 if step > begin else 0.0)


def long_power(n):
    return 1 - (1 + n) ** -0.75


@pytest.mark.parametrize(
    ("decay", "proposed"),
    [(ratio, "--ema-warmup ratio"), (long_power, "--ema-warmup power:0.75")],
)
def test_a_decay_that_still_rises_is_asked_for_with_its_warm_up(decay, proposed, files, run):
    """Any higher decay explains the files."""
    write(files, train(), by(decay))
    with refused("ema_decay", proposed) as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    assert_predicted(run, below=2e-3, low=0.2)


def test_an_average_that_began_again_is_refused(files, run):
    """A resume that lost it: 8.1e-2 from the true one, where 2.0e-2 was predicted."""
    write(files, train(), again(lambda _: 0.995))
    with refused("average", "of step 900", "--ema-decay 0.995 --out run"):
        import_checkpoints(files, run)
    later = files / "step1[0-5]00.pt"
    import_checkpoints(later, run, update_after_step=850, ema_decay=0.995)
    assert_predicted(run, below=2e-2, low=0.2)


def test_where_an_average_began_is_asked_for(files, run):
    """Taken to begin at the first step it is 5 times as wrong as predicted."""
    write(files, train(), late(430))
    with refused("update_after_step", "until step 400"):
        import_checkpoints(files, run)
    import_checkpoints(files, run, update_after_step=430, ema_decay=0.995)
    assert_predicted(run, below=2e-3, low=0.2)


def without_copies(step, weights, average):
    content = {"state_dict": weights}
    if step > 1000:
        content["state_dict_ema"] = average
    return content


def test_files_before_a_late_start_are_weights(files, run):
    """From the weights alone the error is 1.148e-2."""
    write(files, train(), late(1000), form=without_copies)
    with refused("update_after_step", "until step 1,000"):
        import_checkpoints(files, run)
    done = import_checkpoints(files, run, update_after_step=1000, ema_decay=0.995)
    after = range(1100, STEPS + 1, EVERY)
    assert done.counts["weights"] == len(TIMES)
    assert len(done.checkpoints) == len(TIMES) + len(after)
    assert_predicted(run, targets=[0.25], below=1.159e-2, low=0.4, high=2)


def counted(step, weights, average):
    ema = {
        "decay": 0.999,
        "num_updates": step,
        "shadow_params": [*average.values()],
    }
    return {"model": weights, "step": step, "ema": ema if step > 700 else {}}


def test_an_average_that_counts_its_updates_began_before_its_first_file(files):
    write(files, train(), by(ratio), form=counted)
    (audit,) = Run(files).audit()
    assert audit.verdict == "as claimed", audit.text


def test_a_start_after_the_last_file_is_refused(files):
    write(files, train(), late(1000))
    settings = {"ema_decay": 0.995, "update_after_step": 1600}
    with refused("update_after_step 1600"):
        import_checkpoints(files, None, dry_run=True, **settings)


def test_a_late_start_from_the_first_weights_is_refused(files):
    """Averages were taken to begin from the weights at the start: 5 times as wrong as predicted."""
    write(files, train(), by(lambda n: 1.0 if n <= 430 else 0.995))
    with refused("update_after_step", "step100.pt", "step400.pt"):
        import_checkpoints(files, None, dry_run=True, update_after_step=430)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_average_of_the_weights_in_the_files_asks_for_its_interval(dtype, files, run):
    """As if updated at every step it was 6 times as wrong as predicted."""
    write(files, train(), by(lambda n: 1.0 if n % EVERY else 0.9), dtype)
    with refused("update_every", "every 100"):
        import_checkpoints(files, run)
    import_checkpoints(files, run, update_every=EVERY)
    assert settings_of(run)["ema_decay"] == 0.9
    assert_predicted(run, below=0.02)


def without_a_step(_, weights, average):
    return {"net": weights, "ema": average}


def test_an_odd_decay_asks_whether_numbers_are_epochs(files):
    """With epochs for steps it was 6 times as wrong as predicted."""
    write(files, train(), by(lambda _: 0.995), form=without_a_step)
    for step in TIMES:  # epochs of 20 steps
        (files / f"step{step}.pt").rename(files / f"{step // 20}.pt")
    with refused("steps_per_epoch", "decay 0.90"):
        import_checkpoints(files, None, dry_run=True)
    found = import_checkpoints(files, None, dry_run=True, steps_per_epoch=20)
    assert {round(one.decay, 3) for one in found.checkpoints} == {0.0, 0.995}


@pytest.mark.parametrize("given", [25, 24, 17])
def test_a_wrong_length_of_epochs_is_shown_by_a_decay_that_is_not_round(given, files):
    """Epochs have 20 steps."""
    write(files, train(), by(lambda _: 0.995), form=without_a_step)
    for step in TIMES:
        (files / f"step{step}.pt").rename(files / f"epoch{step // 20}.pt")
    with refused("ema_decay", "0.99"):
        import_checkpoints(files, None, dry_run=True, steps_per_epoch=given)


def of_power(folder, exponent, weights):
    """Write averages whose n-th update keeps (1 - 1/n)^exponent; return their folder and width."""
    write(folder, weights, by(lambda n: (1 - 1 / n) ** exponent))
    variance = exponent / ((exponent + 1) ** 2 * (exponent + 2))
    return folder, variance**0.5


def of_each_10th(n):
    """Return the decays of a uniform average as icefall's."""
    return 1.0 if n % 10 else (n - 10) / n


def test_a_uniform_average_of_some_steps_asks_for_their_interval(files, run):
    """Taken for one of all steps it was 4 times as wrong as predicted."""
    write(files, train(), by(of_each_10th))
    with refused("update_every", "--update-every N --out run"):
        import_checkpoints(files, run, sigma_rels=(0.2886,))
    import_checkpoints(files, run, sigma_rels=(0.2886,), update_every=10)
    assert_predicted(run, below=1e-2, low=0.2)


def test_a_rule_that_is_given_for_rare_updates_asks_for_their_interval(files, run):
    write(files, train(), by(of_each_10th))
    for decay in (0.99999, "found", None):
        with refused("update_every", "--update-every N --out run"):
            import_checkpoints(files, run, ema_decay=decay, ema_warmup="power:1")


def test_a_power_function_is_found_if_that_is_asked_for(files, run):
    folder, width = of_power(files, 3.0, train())
    with refused("ema_decay") as asked:
        import_checkpoints(folder, run)
    paste(asked.value, run)
    settings = settings_of(run)
    (found,) = settings["sigma_rels"]
    uncertainty = settings["ema_uncertainty"]
    assert found == pytest.approx(width, rel=2 * uncertainty)
    assert_predicted(run, targets=(0.1, 0.25), low=0.0, high=2, below=1.5e-2)


def ramp_up(n):
    """Return the decay of an update by the formula, from the steps before it: of a half-life of 150
    steps, and of 0.05 of the training at first."""
    length = min(150, 0.05 * (n - 1))
    return 0.5 ** (1 / max(length, 1e-8))


def test_a_ramp_up_is_proposed(files, run):
    write(files, train(), by(ramp_up))
    with refused("ema_decay", "--ema-warmup ramp-up") as asked:
        import_checkpoints(files, run)
    paste(asked.value, run)
    assert_predicted(run, below=2e-3)


def test_a_ramp_up_is_taken_by_options(files, run):
    write(files, train(), by(ramp_up))
    done = import_checkpoints(files, run, ema_decay="half-life:150", ema_warmup="ramp-up")
    assert "as claimed" in done.checks[-1]
    assert_predicted(run, below=2e-3)


@pytest.mark.parametrize("every", [400, STEPS, 10 * STEPS])
def test_an_interval_of_updates_longer_than_the_training_is_no_crash(every, files, run):
    write(files, train(), by(ramp_up))
    with refused("ema_decay"):
        import_checkpoints(files, run, update_every=every)

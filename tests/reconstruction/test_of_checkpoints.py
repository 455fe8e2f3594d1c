"""The predicted error of averages made from checkpoints of other programs is the actual one.

Files are written as a training writes them; the truth is summed here over every step, in float64.
"""

import numpy as np
import pytest
import torch
from factories import exact_gamma, exact_weights, relative_distance

from posthoc_cli import Run, import_checkpoints

SIZE = 500
STEPS = 2000
WIDTHS = (0.03, 0.1, 0.25)


def walk(steps=STEPS, rate=0.001):
    """Return the weights after steps 0 to `steps`, as a float32 training has them."""
    random = np.random.default_rng(0)
    moves = rate * random.standard_normal((steps + 1, SIZE))
    start = random.standard_normal(SIZE)
    return in_float32(start + np.cumsum(moves, axis=0))


def in_float32(path):
    return path.astype(np.float32).astype(np.float64)


def cooled():
    """Return a walk whose learning rate falls to 0 by a cosine: late, weights hardly move."""
    angle = np.linspace(0, np.pi, STEPS + 1)
    rate = 0.0025 * (1 + np.cos(angle))
    return walk(rate=rate[:, None])


def truth(path, width):
    """Return the average over all steps: step k has the profile's mass between k - 1 and k."""
    shares = exact_weights(width, range(1, len(path)))
    return shares @ path[1:]


def weights(path, step, dtype=torch.float32):
    values = torch.from_numpy(path[step])
    return {"model": {"w": values.to(dtype)}}


def save(file, content):
    file.parent.mkdir(exist_ok=True)
    torch.save(dict(content), file)


def save_weights(folder, path, every, dtype=torch.float32):
    """Write files that say their step; return their folder."""
    for step in range(every, len(path), every):
        content = weights(path, step, dtype)
        content["step"] = step
        save(folder / f"{step}.pt", content)
    return folder


def errors(run, path, width):
    """Return the actual and the predicted error of an average, relative to the truth."""
    made = run.average(width, dtype="float64")
    vector = made["w"].double().numpy()
    actual = relative_distance(vector, truth(path, width))
    return actual, made.predicted_error


def assert_predicted(place, path, most, widths=WIDTHS):
    """Check that actual and predicted errors differ by at most a factor."""
    run = Run(place)
    for width in widths:
        actual, predicted = errors(run, path, width)
        assert 1 / most < actual / predicted < most


# --- the clock


@pytest.mark.parametrize(
    ("name", "numbered"),
    [
        ("model_{}.pth", 1),
        ("model_{}.pth", 5),
        ("epoch_{}.pt", 1),
    ],
)
def test_between_files_that_are_numbered_the_weights_move_on(name, numbered, tmp_path):
    path = walk()
    for number in range(1, 21):
        file = tmp_path / name.format(number * numbered)
        save(file, weights(path, 100 * number))
    assert_predicted(tmp_path, path, 1.4)


def test_before_the_first_of_a_few_last_files_the_weights_may_have_moved_faster(tmp_path, caplog):
    """Only the last three files of a training are kept. Taken for as quiet as they are, what came
    before made errors 180 times as large as predicted."""
    path = cooled()
    for step in (1960, 1980, 2000):
        content = weights(path, step) | {"step": step}
        save(tmp_path / f"{step}.pt", content)
    for width in (0.15, 0.28):
        actual, predicted = errors(Run(tmp_path), path, width)
        assert 1 / 8 < actual / predicted < 3
    nothing = "which show nothing of the training before t = 1,960"
    first, second = caplog.messages
    assert nothing in first
    assert nothing in second


def test_files_of_every_step_that_say_so_hold_every_update(tmp_path):
    path = walk(40)
    run = Run(save_weights(tmp_path, path, 1))
    for width in WIDTHS:
        actual, predicted = errors(run, path, width)
        assert actual < 2e-7
        assert predicted < 2e-7


def test_weights_beside_an_average_of_known_decay_are_steps_apart(tmp_path):
    path = about_a_minimum(30, 1)
    files = tmp_path / "files"
    save_both(files, path, EVEN_STEPS, 0.99)
    remove("step", files)
    import_checkpoints(files, tmp_path / "run", ema_decay=0.99)
    assert_predicted(tmp_path / "run", path, 1.2)


EVEN_STEPS = range(100, STEPS + 1, 100)


def remove(key, folder):
    """Remove what a key holds from all files."""
    for file in folder.iterdir():
        content = torch.load(file)
        del content[key]
        torch.save(content, file)


@pytest.mark.parametrize("stride", [2, 5])
def test_a_few_steps_between_files_count_one_by_one(stride, tmp_path):
    path = walk(30 * stride)
    save_weights(tmp_path, path, stride)
    assert_predicted(tmp_path, path, 1.4)


# --- copies in fewer bits


@pytest.mark.parametrize(
    ("dtype", "every"),
    [
        (torch.float16, 40),
        (torch.bfloat16, 100),
    ],
)
def test_weights_of_fewer_bits_than_the_training_has_are_rounded(dtype, every, tmp_path):
    path = cooled()
    save_weights(tmp_path, path, every, dtype)
    assert_predicted(tmp_path, path, 1.5)


def test_weights_that_stand_still_keep_their_rounding(tmp_path):
    path = walk(rate=1e-6)
    save_weights(tmp_path, path, 100, torch.bfloat16)
    assert_predicted(tmp_path, path, 1.5)


# --- uneven steps


def about_a_minimum(memory, seed):
    """Return weights that are pulled back to a minimum within so many steps."""
    random = np.random.default_rng(seed)
    kept = np.exp(-1 / memory)
    place = random.standard_normal(SIZE)
    away = np.zeros((STEPS + 1, SIZE))
    scale = 0.05 * np.sqrt(1 - kept**2)
    for step in range(1, STEPS + 1):
        moved = scale * random.standard_normal(SIZE)
        away[step] = kept * away[step - 1] + moved
    return in_float32(place + away)


def save_both(folder, path, steps, decay, every=1):
    """Write files of weights and their EMA; return the averages."""
    average = path[0]
    stored = []
    for step in range(1, STEPS + 1):
        if step % every == 0:
            average = decay * average + (1 - decay) * path[step]
        if step in steps:
            content = weights(path, step)
            content["step"] = step
            content["ema"] = {"w": torch.from_numpy(average).float()}
            save(folder / f"{step}.pt", content)
            stored.append(average)
    return np.array(stored)


def nearest(path, averages, steps, decay, width):
    """Return the combination of weights and their EMAs, with the sum 1, whose tail is nearest to
    that of a power function."""
    before = np.arange(STEPS)
    ages = np.maximum(steps[:, None] - before, 0)
    tails = np.vstack([ages > 0, 1 - decay**ages])
    values = np.vstack([path[steps], averages])
    wanted = 1 - (before / STEPS) ** (exact_gamma(width) + 1)
    others = tails[:-1] - tails[-1]
    c, *_ = np.linalg.lstsq(others.T, wanted - tails[-1], rcond=1e-12)
    return values[-1] + c @ (values[:-1] - values[-1])


def test_at_uneven_steps_no_interval_moves_for_nothing(tmp_path):
    """A fitted motion of 0 in one interval cost nothing: errors were 60 times the predicted."""
    random = np.random.default_rng(105)
    drawn = random.choice(np.arange(40, STEPS), 19, replace=False)
    steps = np.append(np.sort(drawn), STEPS)
    path = about_a_minimum(1000, 5)
    averages = save_both(tmp_path / "files", path, steps, 0.999)
    import_checkpoints(tmp_path / "files", tmp_path / "run", ema_decay=0.999)
    for width in (0.05, 0.1, 0.2):
        actual, predicted = errors(Run(tmp_path / "run"), path, width)
        plain = nearest(path, averages, steps, 0.999, width)
        assert actual < 1.05 * relative_distance(plain, truth(path, width))
        assert 1 / 2.5 < actual / predicted < 2.5


# --- averages alone


def save_alone(folder, path, update, dtype):
    """Write files of an average of weights, kept in a dtype, and stored in float32."""
    average = torch.from_numpy(path[0]).to(dtype, copy=True)
    for step in range(1, STEPS + 1):
        update(step, average, torch.from_numpy(path[step]).to(dtype))
        if step % 100 == 0:
            content = {"teacher": {"w": average.float()}, "step": step}
            save(folder / f"{step}.pt", content)


def as_dino(step, average, weights):
    angle = np.pi * (step - 1) / STEPS
    average.lerp_(weights, 0.004 * (1 + np.cos(angle)) / 2)


@pytest.mark.parametrize("rate", [0.005, "cooled"])
def test_a_teacher_alone_shows_late_motion_of_which_it_takes_in_little(rate, tmp_path):
    """Its profile was cut into groups of steps, an error larger than the mass of late intervals:
    errors were 62 times the predicted ones at 0.05, and 576 times at 0.01."""
    path = cooled() if rate == "cooled" else walk(rate=rate)
    save_alone(tmp_path / "files", path, as_dino, torch.float64)
    import_checkpoints(tmp_path / "files", tmp_path / "run", ema_warmup="cosine:0.996")
    assert_predicted(tmp_path / "run", path, 2.2, (0.01, 0.05, 0.15))


def test_averages_alone_tell_noise_from_a_walk(tmp_path):
    """Noise was taken for a walk, whose averages differ less: errors were 3.7 times the predicted
    ones at 0.15."""
    path = about_a_minimum(1, 0)
    files = tmp_path / "files"
    save_both(files, path, EVEN_STEPS, 0.99)
    remove("model", files)
    import_checkpoints(files, tmp_path / "run", ema_decay=0.99)
    assert_predicted(tmp_path / "run", path, 2, (0.05, 0.15, 0.25))


# --- averages that take in one value of several


@pytest.mark.parametrize(
    ("memory", "with_weights"),
    [
        (30, True),
        (10, False),
    ],
)
def test_noise_between_the_updates_of_an_average_is_part_of_its_error(
    memory, with_weights, tmp_path
):
    """The updated values were taken for the means of their steps: errors were 3.5 times the
    predicted ones, which contain that such files cannot confirm the decay."""
    path = about_a_minimum(memory, 0)
    files = tmp_path / "files"
    save_both(files, path, EVEN_STEPS, 0.9, every=10)
    if not with_weights:
        remove("model", files)
    import_checkpoints(files, tmp_path / "run", ema_decay=0.9, update_every=10)
    assert_predicted(tmp_path / "run", path, 2.5, (0.05, 0.1, 0.2))


def test_a_constant_tensor_makes_no_error_look_smaller(tmp_path):
    """A table of noise levels may be far longer than all weights; averages of it move by
    roundings."""
    path = walk()
    table = torch.linspace(1, 1000, 50)
    for step in range(200, STEPS + 1, 200):
        is_odd = step // 200 % 2
        content = weights(path, step)
        content["model"]["sigmas"] = table * (1 + 3e-7) ** is_odd
        save(tmp_path / f"step_{step}.pt", content)
    assert_predicted(tmp_path, path, 2, [0.1])

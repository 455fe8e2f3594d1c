"""The metric of a trial: on standard output or in JSON files, with its standard error."""

import json
import os
import re

import pytest

from posthoc_cli.sweep import Metric
from posthoc_cli.sweep.metric import NoMetricError, TrialError


def printed(text, folder, name=None, errors=""):
    (folder / "log.out").write_text(text)
    (folder / "log.err").write_text(errors)
    return Metric(name).read(folder / "log", folder, [])


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("loading\n0.5\n0.25\ndone in 3 s\n\n", None, (0.25, None)),
        (" 1e-3 \r\n", None, (0.001, None)),
        ('{"loss": 0.5}\n{"loss": 0.25, "loss_stderr": 0.1}\nbye\n', "loss", (0.25, 0.1)),
        ('{"loss": 0.25, "loss_stderr": Infinity}', "loss", (0.25, None)),
        ('{"loss": 0.25, "loss_se": 0.1}', "loss", (0.25, 0.1)),
        ("loss 2.67\nval_loss 9\nloss_2: 9", "loss", (2.67, None)),
        ("epoch 3, Loss = 2.67.", "loss", (2.67, None)),
        ("loss=9, loss=+2.67e0,acc: 1", "loss", (2.67, None)),
        ("loss 0.5\n2\n", "loss", (0.5, None)),
        ("loss 12.5e-1, loss .25\n", "loss", (0.25, None)),
        ("results.acc: .5", "results.acc", (0.5, None)),
    ],
)
def test_the_last_line_that_is_a_number_or_has_the_name_is_used(tmp_path, text, name, found):
    assert printed(text, tmp_path, name) == found


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("step 1\n loss 0.5\n", None, "`loss 0.5`"),
        ('{"acc": 1, "f1": 2}', "loss", "'loss'"),
        ("", "loss", "empty"),
        ("loss: nan", "loss", "nan"),
        ("PSNR=31.48dB", "psnr", "no number"),  # it was read as 31
        ("loss: 1,234.5", "loss", "no number"),
        ('{"loss": true}', "loss", "True"),
        ('{"loss": 0.5} of 3', "loss", "no number"),
        ("{" * 100_000, "loss", "no number"),
        ("accuracy: 89\n11.2\n", "acc", "no number after 'acc'"),
        ('{"other": 1}\n0.5\n{"other": 2}\n', "loss", "no number"),
        ("0.5\n", "loss", "`0.5`"),
        ("acc\n0.5\n", "acc", "no number"),
    ],
)
def test_an_output_without_a_metric_is_an_error_that_says_why(tmp_path, text, name, message):
    with pytest.raises(TrialError, match=message):
        printed(text, tmp_path, name)


@pytest.mark.parametrize(
    ("text", "name", "hint"),
    [
        ("epoch 3\nval/loss: 0.55", None, "add `metric` loss"),
        ("loss: 0.55, acc=0.9", None, "add `metric` loss or acc"),
        ('{"results": {"acc": 1, "f1": 2}}\nbye', "acc", "add `metric` results.acc or results.f1"),
        ("accuracy: 89\nloss=0.4\n11.2\n", "acc", "add `metric` accuracy or loss"),
        ('{"acc_norm": 1}\n0.25\n', "acc", "add `metric` acc_norm"),
        ("done", None, ""),
        ("0.5", "loss", ""),
    ],
)
def test_the_way_to_a_metric_that_was_printed_is_named(tmp_path, text, name, hint):
    with pytest.raises(NoMetricError) as raised:
        printed(text, tmp_path, name)
    assert raised.value.hint == hint


BAR = "\r 50%|##   | loss=9.5\r100%|#####| loss=9.25\n9\n"
"""What a progress bar writes to standard error."""


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("loss: 0.5\nbye\n", "loss", 0.5),
        ("\rloss=0.75\rloss=0.5", "loss", 0.5),
        ('{"eval": {"loss": 0.5}}', "eval.loss", 0.5),
        ('{\n "loss": 0.5\n}\n', "loss", 0.5),
        ("0.5\ndone\n", None, 0.5),
    ],
)
def test_what_is_on_both_streams_is_taken_from_standard_output_alone(
    tmp_path, caplog, text, name, found
):
    assert printed(text, tmp_path, name, BAR) == (found, None)
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "name", "found", "words"),
    [
        (
            "val_loss: 0.4\n",
            "loss",
            9.25,
            "standard output has no number after 'loss': the metric is taken from standard error; "
            "for the one of standard output, add `metric` val_loss",
        ),
        ('{"val": {"loss": 0.4}}', "loss", 9.25, "add `metric` val.loss"),
        ("", "loss", 9.25, "after 'loss': the metric is taken from standard error"),
        ("done\nloss: 0.4\n", None, 9, "is a number alone: .* standard error; .* `metric` loss"),
    ],
)
def test_a_metric_that_is_on_standard_error_alone_is_taken_and_said(
    tmp_path, caplog, text, name, found, words
):
    assert printed(text, tmp_path, name, BAR) == (found, None)
    (record,) = caplog.records
    assert re.search(words, record.getMessage())


@pytest.mark.parametrize(("text", "name"), [("loss: nan", "loss"), ('{"loss": true}', "loss")])
def test_what_is_no_metric_on_standard_output_is_not_replaced_by_one_on_standard_error(
    tmp_path, text, name
):
    with pytest.raises(TrialError):
        printed(text, tmp_path, name, BAR)


def test_an_object_over_several_lines_is_read_and_single_numbers_in_it_are_not(tmp_path):
    """`json.dumps(..., indent=2)` prints each number of a list on a separate line."""
    inner = {
        "loss": 0.5,
        "tasks": [{"loss": 0.9}, [1.0, 2.0]],
        "deep": {"acc,none": 1, "acc_stderr,none": 0.25},
    }
    text = f"[INFO] it works\n0.75\n{json.dumps(inner, indent=2)}\n[\n  3.0\n]\ndone\n"
    assert printed(text, tmp_path) == (0.75, None)
    assert printed(text, tmp_path, "loss") == (0.5, None)
    assert printed(text, tmp_path, "deep.acc,none") == (1.0, 0.25)
    assert printed(f"{text}0.25", tmp_path) == (0.25, None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[\n{"loss": 1}\nbroken\n]\n', 1.0),
        ('[\n{"loss": 1}\n{"loss": 2}\n', 2.0),
        ('{"x": [1 2],\n"y":\n{"loss": 3}\n}\n{"loss": 4}', 4.0),
        ('a "word\n{"loss": "5"} \n]\n} [', 5.0),
        ('{"text": "[ } \\" {", "loss": 6}', 6.0),
        ('{"loss": 7, "big": ' + "1" * 5000 + "}", 7.0),
    ],
)
def test_an_object_is_found_among_and_in_lines_that_are_no_json(tmp_path, text, found):
    assert printed(text, tmp_path, "loss") == (found, None)


MOST = 500_000  # characters; what is quadratic in them takes hours for most of these
DATED = "[2026-11-29 21:00:00,123] INFO step 12345 loss 0.51234\n"
NESTED = "[\n" * 99 + "x\n" + "]\n" * 99


@pytest.mark.parametrize(
    "text",
    [
        DATED * (5 * MOST // len(DATED)),
        NESTED * (MOST // len(NESTED) // 5),
        "[1,\n" * (MOST // 4),
        " " * MOST,
        "x" + "\t" * MOST + "x",
        "loss" + " " * MOST + "x",
        "loss " + "1" * MOST + "x",
        "loss ." + "1" * MOST + "e",
        "a" * MOST + "\n",
        "loss " * (MOST // 5),
        '"' + '\\"' * (MOST // 2),
    ],
    ids=lambda text: f"{text[:6]!r}",
)
def test_reading_is_linear_in_the_size_of_the_output(tmp_path, text):
    """What takes the square of the size would not end before the suite's limit of a test."""
    text += "\n0.5\nloss 0.25\n"
    assert printed(text, tmp_path) == (0.5, None)
    assert printed(text, tmp_path, "loss") == (0.25, None)


def test_a_metric_is_a_key_or_a_file_and_a_key():
    assert Metric.parse("eval:loss") == Metric("eval:loss")
    assert Metric.parse("*.json:a:b.json:c") == Metric("a:b.json:c", "*.json")


def test_the_newest_file_of_the_name_is_read_and_lm_evals_standard_error_is_found(tmp_path):
    """lm-eval writes names with dots and commas, into a folder named after the model; here the file
    is a link."""
    folder = tmp_path / "trial"
    path = folder / "my__model" / "results_2026.json"
    path.parent.mkdir(parents=True)
    scores = {"alias": "x", "acc_norm,none": 0.61, "acc_norm_stderr,none": 0.02}
    text = json.dumps({"results": {"hellaswag": scores}})
    (tmp_path / "elsewhere").write_text(text, encoding="utf-8-sig")
    path.symlink_to(tmp_path / "elsewhere")
    (folder / "old.json").write_text('{"acc": 0.1}')
    (folder / "nowhere.json").symlink_to(tmp_path / "nothing")
    os.utime(folder / "old.json", (1, 1))

    def read(key, file):
        return Metric(key, file).read(tmp_path, folder, [])

    key = "results.hellaswag.acc_norm,none"
    assert read(key, "*.json") == (0.61, 0.02)
    assert read(key, "my__model/results_*.json") == (0.61, 0.02)
    assert read("acc", "old.json") == (0.1, None)
    with pytest.raises(TrialError, match=r"'results.x'.*'results.hellaswag.alias'"):
        read("results.x", "*.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("results.json", "no results.json .*'memory.json', 'nested.json', 'other.json'"),
        ("../elsewhere.json", "no ../elsewhere.json .*'nested.json'"),
        ("nested.json", "nested.json cannot be read"),
        ("memory.json", "memory.json cannot be read"),
        ("other.json", "'a' is "),
    ],
)
def test_a_file_without_the_metric_is_an_error(tmp_path, name, message):
    (tmp_path / "elsewhere.json").write_text('{"a": 1}')
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / "nested.json").write_text(100_000 * "[")
    (folder / "memory.json").symlink_to("/proc/self/mem")
    (folder / "other.json").write_text('{"a": [1]}')
    with pytest.raises(TrialError, match=message):
        Metric("a", name).read(tmp_path, folder, [])

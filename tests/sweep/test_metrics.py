"""What an evaluation says: standard output, JSON and CSV files, and standard errors beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from posthoc_cli.sweep.metrics import Metric, NoMetricError


def printed(text: str, folder: Path, name: str | None = None) -> tuple[float, float | None]:
    path = folder / "log.out"
    path.write_text(text)
    return Metric(name).read(path, folder)


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("loading\n0.5\n0.25\n", None, (0.25, None)),
        ("0.5\ndone in 3 s\n\n", None, (0.5, None)),
        (" 1e-3 \r\n", None, (0.001, None)),
        ('{"loss": 0.5, "acc": 1}\n', "loss", (0.5, None)),
        ('{"loss": 0.5}\n{"loss": 0.25, "loss_stderr": 0.1}\nbye\n', "loss", (0.25, 0.1)),
        ('{"other": 1}\n0.5\n{"other": 2}\n', "loss", (0.5, None)),
        ("x" * 3_000_000 + "\n0.5\n", None, (0.5, None)),
        ('{"loss": 0.5, "loss_se": NaN}', "loss", (0.5, None)),
    ],
)
def test_the_last_line_that_is_a_number_or_has_the_name_counts(
    tmp_path: Path, text: str, name: str | None, found: tuple[float, float | None]
) -> None:
    assert printed(text, tmp_path, name) == found


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", None, "no line of its output is a number"),
        ("loss 0.5\n", None, "no line of its output is a number"),
        ('{"acc": 1, "f1": 2}', "loss", "no line of its output is a number or a JSON object with 'loss'; there are"),
        ("0.5\nnan\n", None, "its metric is nan"),
        ("inf\n", None, "its metric is inf"),
        ('{"loss": "bad"}', "loss", "'loss' is 'bad', no number"),
        ('{"loss": true}', "loss", "'loss' is True, no number"),
        ("{" * 100_000, "loss", "no line"),
    ],
)
def test_what_is_no_metric_is_told(tmp_path: Path, text: str, name: str | None, message: str) -> None:
    with pytest.raises(NoMetricError, match=message):
        printed(text, tmp_path, name)


def test_the_newest_json_file_counts_and_lm_evals_standard_error_is_found(tmp_path: Path) -> None:
    """As lm-eval writes it: names with dots and commas, in a folder of the model's name."""
    path = tmp_path / "my__model" / "results_2026.json"
    path.parent.mkdir()
    scores = {"alias": "x", "acc_norm,none": 0.61, "acc_norm_stderr,none": 0.02, "a": {"x": 1}, "a.b": {"c": 3}}
    path.write_text(json.dumps({"results": {"hellaswag": scores}}))
    (tmp_path / "old.json").write_text(json.dumps({"results": {"hellaswag": {"acc_norm,none": 0.1}}}))
    os.utime(tmp_path / "old.json", (1, 1))
    assert Metric(json="results.hellaswag.acc_norm,none").read(tmp_path, tmp_path) == (0.61, 0.02)
    assert Metric(json="results.hellaswag.a.b.c").read(tmp_path, tmp_path) == (3, None)
    with pytest.raises(NoMetricError, match=r"has no member 'results.hellaswag.nothing'; there are 'alias', 'acc_norm"):
        os.utime(tmp_path / "old.json", (1, 1))
        (tmp_path / "old.json").unlink()
        Metric(json="results.hellaswag.nothing").read(tmp_path, tmp_path)


def test_the_last_row_of_a_csv_file_counts(tmp_path: Path) -> None:
    with pytest.raises(NoMetricError, match=r"no \.csv file"):
        Metric(csv="fid").read(tmp_path, tmp_path)
    (tmp_path / "m.csv").write_text("step,fid,fid_se\n1,5.5,1\n2,4.5,0.5\n")
    assert Metric(csv="fid").read(tmp_path, tmp_path) == (4.5, 0.5)
    (tmp_path / "m.csv").write_text("step,fid,fid_se\n1,5.5,1\n2,4.5,0.5\n", encoding="utf-8-sig")  # as Excel does
    assert Metric(csv="step").read(tmp_path, tmp_path) == (2, None)
    with pytest.raises(NoMetricError, match="has no column 'is'; there are 'step', 'fid', 'fid_se'"):
        Metric(csv="is").read(tmp_path, tmp_path)
    for content in (bytes(range(256)), b"fid,text\n1," + 200_000 * b"x"):
        (tmp_path / "m.csv").write_bytes(content)
        with pytest.raises(NoMetricError, match=r"m.csv cannot be read"):
            Metric(csv="fid").read(tmp_path, tmp_path)

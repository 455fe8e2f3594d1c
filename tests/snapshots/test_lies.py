"""Headers that are rightly sealed and say what cannot be: most were found by the long experiments in `torture`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import RUN_ID, write_snapshot
from torture.examining import examine
from torture.forging import Inner, Pairs, Raw, seal, take_apart
from torture.victims import small_output, small_snapshot, small_state

from posthoc_cli.errors import FileFormatError
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.outputs import write_synthesis
from posthoc_cli.snapshots.headers import parse_json
from posthoc_cli.synthesis.plan import plan_synthesis
from posthoc_cli.synthesis.sources import disk_sources


def lie(path: Path, key: str, change: Callable[[Any], Any]) -> Path:
    """Change one value of a file's metadata, and seal it again."""
    tree, payload = take_apart(path)
    (first, metadata), *others = tree
    changed = Pairs((k, change(v) if k == key else v) for k, v in metadata)
    path.write_bytes(seal(Pairs([(first, changed), *others])) + payload)
    return path


def with_setting(name: str, value: Any) -> Callable[[Inner], Inner]:
    """A schedule with another value, or without it where that is ...."""
    return lambda inner: Inner(
        Pairs((k, value if k == name else v) for k, v in inner.value if not (k == name and value is ...))
    )


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_checkpoints", ..., "max_checkpoints is None"),
        ("checkpoint_dtype", ..., "checkpoint_dtype is None"),
        ("update_every", 7, "no multiple of update_every"),
        ("update_after_step", 10**400, "update_after_step is an int of many digits"),
        ("sigma_range", [0.05, 1.5], "must lie in"),
        ("sigma_range", [0.28, 0.05], "the first must be below the second"),
        ("sigma_range", [0.05], "sigma_range is a list"),
    ],
)
@pytest.mark.parametrize("make", [small_snapshot, small_state])
def test_a_schedule_that_no_tracker_has_is_refused(
    tmp_path: Path, make: Callable[[Path], Any], name: str, value: Any, told: str
) -> None:
    path = lie(make(tmp_path).path, "ema.schedule", with_setting(name, value))
    with pytest.raises(FileFormatError, match=rf"ema\.schedule.*{told}"):
        examine(path)


@pytest.mark.parametrize("number", ["1_0", "١", "+1", ".5", "1.", "0x1", "1e400", "infinity", "nan", ""])
def test_a_number_is_decimal_and_nothing_else(tmp_path: Path, number: str) -> None:
    path = lie(small_output(tmp_path).path, "ema.t", lambda _: number)
    with pytest.raises(FileFormatError, match=r"ema\.t"):
        examine(path)


@pytest.mark.parametrize("unit", ["", "\x1b[31m", "a\nb", "\u202e"])
def test_a_unit_is_a_word_for_people(tmp_path: Path, unit: str) -> None:
    path = lie(small_snapshot(tmp_path).path, "ema.t_unit", lambda _: unit)
    with pytest.raises(FileFormatError, match=r"ema\.t_unit: must be a printable name"):
        examine(path)


@pytest.mark.parametrize("text", [r'{"a\u0000":1}', r'{"a":["\ud800"]}', r'{"a":{"b":"\udc00\ud800"}}', r'["\u0000"]'])
def test_text_that_escapes_make_of_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(FileFormatError, match=r"^x: damaged index: .* is not Unicode text, or has a zero byte$"):
        parse_json(Path("x"), text, "index")
    assert parse_json(Path("x"), r'{"\ud83d\ude00":"\u00e9\n"}', "index") == {"\U0001f600": "é\n"}


@pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python has no such limit")
def test_endless_numbers_are_refused_whatever_python_was_told() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(FileFormatError, match="a number of 1,000,000 digits"):
            parse_json(Path("x"), "[" + "7" * 1_000_000 + "]", "index")
        assert parse_json(Path("x"), "[77]", "index") == [77]
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize(
    ("key", "told"), [("ema.sigma_rels", "finite numbers"), ("ema.clock_state", "list of numbers")]
)
def test_a_number_too_large_for_a_float_is_none_in_a_state(tmp_path: Path, key: str, told: str) -> None:
    path = lie(small_state(tmp_path).path, key, lambda inner: Inner([Raw("1e999"), *inner.value[1:]]))
    with pytest.raises(FileFormatError, match=f"{key}: .*{told}"):
        examine(path)


def test_an_alias_is_never_the_name_of_the_metadata(tmp_path: Path) -> None:
    path = lie(small_snapshot(tmp_path).path, "ema.aliases", lambda _: Inner(Pairs([("__metadata__", "a")])))
    with pytest.raises(FileFormatError, match=r"ema\.aliases: '__metadata__'"):
        examine(path)


def test_a_time_that_cannot_be_reckoned_with_is_none_of_a_training(tmp_path: Path) -> None:
    path = lie(small_snapshot(tmp_path).path, "ema.t_first", lambda _: "5e-324")
    with pytest.raises(FileFormatError, match="not a time of training"):
        examine(path)


def test_an_output_of_a_kind_that_is_not_known_is_not_exported_as_a_foreign_file(tmp_path: Path) -> None:
    path = lie(small_output(tmp_path).path, "ema.format", lambda _: "something later")
    with pytest.raises(
        FileFormatError, match=r"its ema\.format is 'something later', which this release does not know"
    ):
        export_file(path, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_a_flip_that_makes_a_nan_is_damage(tmp_path: Path) -> None:
    """Values are sampled before they are verified where headers have no measurements."""
    path = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, {"a": torch.tensor([1.0, 2.0])}, sigma_rels=(0.05,))
    data = bytearray(path.read_bytes())
    data[-1] |= 0x7F
    data[-2] |= 0xC0
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="tensor 'a' is damaged"):
        write_synthesis(plan_synthesis(disk_sources(tmp_path / "run"), [0.05]), [tmp_path / "out.safetensors"])
    assert not (tmp_path / "out.safetensors").exists()


def test_names_are_short_in_messages(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"x" * 100_000: torch.ones(1)})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"'x{200}'\.\.\. is damaged") as caught:
        examine(path)
    assert len(str(caught.value)) < 1_000

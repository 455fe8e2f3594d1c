"""Metadata that cannot be, under a checksum that is right, is one short error that names the file and the key."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import RUN_ID, read_snapshot, write_snapshot
from torture.victims import examine, forge

from posthoc_cli.errors import FileFormatError
from posthoc_cli.export.convert import export_file
from posthoc_cli.snapshots.tensor_file import read_header

Small = Callable[[str], Path]
VALUES = {"a": torch.tensor([1.0, -2.5]), "b": torch.tensor([7], dtype=torch.int16)}

NUMBERS = ["x", "--1", "0x10", "1,5", "1_0", "١", "+1", ".5", "1.", "", "nan", "-inf", "1e999", "infinity"]
WHOLE = ["", "1.5", "-1", "1e3", "\u0663", "9" * 20, "nan"]
OBJECTS = ["", "{", "[]", "null", "1", '{"a":1,"a":1}', "{'a':1}", "[" * 10**5, '"\ud800"', "NaN"]
LISTS = ["", "{", "{}", "null", "[" * 10**5, "[1]", '[["a"]]', '[{"a":1}]', "[null]", '["\ud800', "[NaN]"]
MALFORMED: dict[str, dict[str, Sequence[str]]] = {  # a key of each form, which is its annotation
    "snapshot": {
        **dict.fromkeys(("ema.gamma", "ema.t"), NUMBERS), "ema.step": WHOLE, "ema.left_out": LISTS,
        **dict.fromkeys(("ema.schedule", "ema.tensors", "ema.aliases"), OBJECTS),
        "ema.t_unit": ["", "\x1b[31m", "a\nb", "\u202e"], "ema.off_schedule": ["yes"],
        "ema.checksums": ["{}", "[]", '{"a":1,"b":1}', '"\ud800"', f'{{"a":"{"0" * 32}","b":"{"0" * 16}"}}'],
    },
    "output": {
        "ema.predicted_error": NUMBERS,
        "ema.snapshots": [
            *LISTS, *(f'[{{"file":"x","coefficient":{c}}}]' for c in ("1" * 400, "1e999", "true", '"1"', "null"))
        ],
    },
}  # fmt: skip


def schedule(**changes: Any) -> str:
    whole = {"update_every": 5, "checkpoint_every": 10, "update_after_step": 0, "max_checkpoints": None,
             "checkpoint_dtype": "F16", "sigma_range": [0.05, 0.28], **changes}  # fmt: skip
    return json.dumps({name: value for name, value in whole.items() if value is not ...})


def roles(**changes: Any) -> str:
    return json.dumps({"a": {"role": "average", "dtype": "F32"}, "b": {"role": "copy", "dtype": "I16"}, **changes})


DISTANCE = {"t": 10.0, "sigma_rel": 0.28, "squared": 0.5, "rounding": 0.0}


def measured(distance: dict[str, Any] | None = None, **changes: Any) -> str:
    first = DISTANCE | (distance or {})
    distances = [first, first | {"t": 5.0, "sigma_rel": 0.05}]
    return json.dumps({"norm": 7.25, "rounding": 1e-7, "distances": distances, **changes})


def wrong(name: str, value: str) -> str:
    return f"{name}: must be a finite number, at least 0, not {value}"


def motion(**changes: Any) -> str:
    return json.dumps({"edges": [1, 5, 10], "walk": [2, 0.5], "noise": [0, 1e-3], **changes})


def selection(**changes: Any) -> str:
    return json.dumps({"only_trainable": True, "include": ["a*"], "exclude": ["b"], "buffers": "copy", **changes})


FEW = "must have 1 to 1,000 values"
SNAPSHOT = {
    "ema.version": [("2", "")],
    "ema.run_id": [("short", ""), ("\x1b[31m" + "0" * 27, "")],
    # With a time this small nothing can be reckoned.
    "ema.t": [("-1.0", "at least 0, not -1.0"), ("1e300", "must be a time of training, not 1e+300")],
    "ema.t_first": [("0", "must be a time of training, not 0"), ("5e-324", "must be a time of training")],
    "ema.schedule": [
        ('{"update_every":1}', ""), (schedule(update_every=True), ""), (schedule(update_every=None), ""),
        (schedule(max_checkpoints=1.0), ""), (schedule(checkpoint_dtype="F13"), ""),
        (schedule(checkpoint_dtype=["F16"]), ""), (schedule(max_checkpoints=...), "max_checkpoints: is missing"),
        (schedule(checkpoint_dtype=...), "checkpoint_dtype: is missing"),
        (schedule(update_after_step=10**400), "at least 0, not an int of many digits"),
        (schedule(sigma_range=[0.05]), "sigma_range: must be a list of 2"),
    ],
    "ema.tensors": [
        ("{}", ""), (roles(a={"role": "sum", "dtype": "F32"}), ""), (roles(a={"role": "average", "dtype": "F13"}), ""),
        (roles(a={"role": ["average"], "dtype": "F32"}), ""), (roles(c={"role": "copy", "dtype": "F32"}), ""),
        (roles(a={"role": "average", "dtype": "I64"}), ""),  # an average of whole numbers
        (roles(b={"role": "average", "dtype": "I16"}), ""),
        (roles(b={"role": "copy", "dtype": "F16"}), ""),  # a copy of another dtype than its bytes
    ],
    "ema.aliases": [
        ('{"tied":"missing"}', ""), ('{"a":"b"}', ""), ('{"tied":["a"]}', ""), ('{"tied":null}', ""),
        ('{"__metadata__":"a"}', "'__metadata__'"),
    ],
    "ema.selection": [
        (selection(only_trainable=1), ""), (selection(include="a*"), ""), (selection(include={"a": 1}), ""),
        (selection(exclude=["a", 1]), ""), (selection(buffers=1), ""), ("{}", "only_trainable: is missing"),
    ],
    "ema.measurements": [
        *((measured(norm=value), wrong("norm", repr(value))) for value in (-1, True, "1", None)),
        (measured(rounding=10**400), wrong("rounding", "an int of many digits")),
        (measured(norm=1).replace("1,", "1e999,", 1), wrong("norm", "inf")),
        (measured({"rounding": float("inf")}), "Infinity is not JSON"), (measured({"t": [1]}), wrong("t", "a list")),
        (measured(distances={}), "distances: must be a list"), ('{"rounding":0,"distances":[]}', "norm: is missing"),
        (measured(distances=[1]), "distances: must be a JSON object, not 1"),
    ],
    "ema.motion": [
        (motion(walk=[-1, 1]), "walk: must be a list of finite numbers, at least 0"),
        (motion(walk=[1]), f"{FEW} of walk, as many of noise, and one more"), (motion(noise=[1, 1, 1]), FEW),
        (motion(edges=[1, 10]), FEW), (motion(edges=[1], walk=[], noise=[]), FEW),
        (motion(edges=[*range(1, 1003)], walk=[1] * 1001, noise=[0] * 1001), FEW),
    ],
    "ema.sigma_rels": [("[]", "must be a list of numbers"), ("[true]", "must be a list of finite numbers")],
    "ema.clock": [
        ("[4,10]", "must be a list of 2, not 4"), ("[[4,4.5,1],[10,10]]", "must be a list"),
        *((f"[[{pair}],[10,10]]", "ema.clock") for pair in ("4.0,4.5", "true,4.5", '4,"4"', "4,1e999", "-1,0.5")),
        (json.dumps([[k, k] for k in range(1, 1002)]), "at most 1,000"),
    ],
    "ema.checksums": [(f'{{"a":"{"0" * 16}","b":"{"0" * 16}"}}', "tensor 'a' is damaged")],
    "ema.format": [("output", "ema.profile: is missing"), ("elsewhere", "")],
}  # fmt: skip
OUTPUT = {"ema.t": [("1e300", "a time of training, not 1e+300")], "ema.predicted_error": [("-1e-9", "not -1e-09")]}
STATE = {
    "ema.schedule": SNAPSHOT["ema.schedule"], "ema.t": [("-1.0", "must be a finite number, at least 0, not -1.0")],
    "ema.step": [("61", "ema.clock: ends at step 1, t 1.0; the training is at step 61, t 1.0")],
    "ema.sigma_rels": [("[1e999,0.28]", "finite numbers")], "ema.clock_state": [("[1e999,0]", "list of a tolerance")],
}  # fmt: skip
IMPOSSIBLE = {"snapshot": SNAPSHOT, "output": OUTPUT, "state": STATE}
CASES = [(kind, key, text, "") for kind, keys in MALFORMED.items() for key, texts in keys.items() for text in texts]
CASES += [(kind, key, *case) for kind, keys in IMPOSSIBLE.items() for key, cases in keys.items() for case in cases]


@pytest.mark.parametrize(("kind", "key", "text", "told"), CASES)
def test_a_value_that_cannot_be_is_refused_in_one_short_line(
    small: Small, kind: str, key: str, text: str, told: str
) -> None:
    path = forge(small(kind), {key: text})
    with pytest.raises(FileFormatError) as caught:
        examine(path)
    assert caught.value.subject == str(path)
    assert (told or key) in caught.value.reason
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 300


SHARED = "version run_id sigma_rel gamma t t_unit checksums"
KEYS = {
    "snapshot": f"{SHARED} sigma_rels step t_first max_interval schedule tensors aliases left_out",
    "output": f"{SHARED} method profile_error predicted_error snapshots copies",
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in KEYS.items() for key in keys.split()])
def test_a_missing_key_is_named(small: Small, kind: str, key: str) -> None:
    with pytest.raises(FileFormatError, match=rf"ema\.{key}: is missing"):
        examine(forge(small(kind), {f"ema.{key}": None}))


@pytest.mark.parametrize("kind", KEYS)
def test_a_missing_checksum_is_told_and_forging_alone_changes_nothing(small: Small, kind: str) -> None:
    path = small(kind)
    before = examine(path)
    assert examine(forge(path, {})) == before
    with pytest.raises(FileFormatError, match="its checksum does not match"):
        examine(forge(path, {"ema.checksum": None}))


# --- what is unusual and can be


def test_what_may_be_missing_is_read_as_none(small: Small) -> None:
    path = small("snapshot")
    before = read_snapshot(forge(path, {"ema.measurements": measured()})).info.measurements
    older = read_snapshot(forge(path, {"ema.measurements": measured(arithmetic=1e-9)})).info.measurements  # until 0.2
    assert (older, before is None) == (before, False)
    info = read_snapshot(forge(path, {"ema.measurements": None, "ema.clock": None, "ema.motion": None})).info
    assert (info.measurements, info.clock, info.motion, info.selection) == (None, (), None, None)
    assert (info.updates, info.inherited, info.off_schedule) == (None, 0.0, False)


def test_a_clock_that_can_be_is_read(small: Small, tmp_path: Path) -> None:
    path = forge(small("snapshot"), {"ema.clock": "[[1,7],[10,10]]"})
    assert read_snapshot(path).info.clock == ((1, 7.0), (10, 10.0))
    path = write_snapshot(tmp_path / "long", 500, 0.05, RUN_ID, VALUES, step=1000)
    knots = json.dumps([[k, k / 2] for k in range(1, 1001)])
    assert len(read_snapshot(forge(path, {"ema.clock": knots})).info.clock) == 1000


def test_an_output_of_a_kind_that_is_not_known_is_not_exported_as_a_foreign_file(small: Small, tmp_path: Path) -> None:
    path = forge(small("output"), {"ema.format": "something later"})
    with pytest.raises(FileFormatError, match=r"'something later': no weights, or of a later release"):
        export_file(path, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("key", "text", "is_text"),
    [
        *(("left_out", text, False) for text in ('["a\\u0000"]', '["b","\\udbff"]', '["\\udc00\\ud800"]')),
        *(("left_out", text, True) for text in ('["\\u0001","b"]', '["\\ud7ff","\\ue000"]', '["\\ud83d\\ude00"]')),
        *(("aliases", text, False) for text in (r'{"a":{"\udc00":1}}', r'{"a":{"b":"\udc00\ud800"},"l":"b"}')),
    ],
)  # fmt: skip
def test_escapes_make_text_or_are_refused_however_deep_they_lie(
    small: Small, key: str, text: str, is_text: bool
) -> None:
    """Halves of a character and zero bytes are none."""
    path = forge(small("snapshot"), {f"ema.{key}": text})
    if is_text:
        assert read_snapshot(path).info.left_out == tuple(json.loads(text))
        return
    with pytest.raises(FileFormatError, match=rf"damaged ema\.{key}: .*is not Unicode text, or has a zero byte$"):
        read_snapshot(path)


def test_a_foreign_file_is_no_snapshot(small: Small) -> None:
    path = forge(small("snapshot"), dict.fromkeys(read_header(small("snapshot")).metadata))
    with pytest.raises(FileFormatError, match=r"not a snapshot of this package: has no ema\.format"):
        read_snapshot(path)

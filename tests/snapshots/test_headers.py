"""What headers say alike is decoded once, and never believed of a header that says something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import make_info, rewrite_snapshot, write_snapshot

from posthoc_cli.errors import FileFormatError, MismatchError
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.format import Selection, TensorSpec, encode_header, lay_out, snapshot_metadata
from posthoc_cli.snapshots.headers import DecodeCache, decode_header, parse_json

VALUES = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "n": torch.tensor(3)}


def write_times(folder: Path, times: range) -> list[Path]:
    return [write_snapshot(folder, t, 0.05, "a" * 32, VALUES) for t in times]


def start_of(changes: dict[str, Any] | None = None, dtype: str = "F32", **fields: Any) -> bytes:
    """The first bytes of a snapshot of one tensor `a` of 12 bytes."""
    info = make_info({"a": torch.zeros(3)}, **fields)
    entries = lay_out([TensorSpec("a", dtype, (12 // {"F32": 4, "F16": 2}[dtype],))])
    return encode_header(entries, snapshot_metadata(info) | (changes or {}), {"a": "0" * 16})


def test_tables_of_a_run_are_in_memory_once(tmp_path: Path) -> None:
    """A directory may have thousands of snapshots, each of which names every tensor."""
    write_times(tmp_path, range(5, 200, 13))  # numbers of other lengths, and so other padding
    found = read_directory(tmp_path)
    assert len(found) == len({s.header.metadata["ema.checksum"] for s in found}) == 15
    for same in (
        lambda s: s.header.tensors, lambda s: s.info.tensors, lambda s: s.header.metadata["ema.tensors"],
    ):  # fmt: skip
        assert len({id(same(snapshot)) for snapshot in found}) == 1


def test_what_is_read_is_what_is_read_alone(tmp_path: Path) -> None:
    """One in the middle is stored otherwise, one has another selection of what is a copy."""
    paths = write_times(tmp_path, range(10, 60, 10))
    rewrite_snapshot(paths[2], lambda values: values.update(a=values["a"].half()))
    cache = DecodeCache()
    for path in paths:
        start = path.read_bytes()
        start = start[: 8 + int.from_bytes(start[:8], "little")]
        together, alone = (decode_header(path, start, None, one) for one in (cache, None))
        assert together == alone
        assert decode_snapshot(path, together, cache) == decode_snapshot(path, alone)
    assert [s.header.tensors["a"].dtype for s in read_directory(tmp_path)] == ["F32", "F32", "F16", "F32", "F32"]


def test_the_same_words_about_other_tensors_are_refused() -> None:
    """The table of roles is checked against the entries, also where its text is that of the one before."""
    cache, path = DecodeCache(), Path("x")
    good = start_of()
    assert decode_snapshot(path, decode_header(path, good, None, cache), cache).tensors.keys() == {"a"}
    roles = json.dumps({"a": {"role": "copy", "dtype": "F32"}}, separators=(",", ":"))
    for start in (start_of({"ema.tensors": roles}, dtype="F16"), start_of({"ema.tensors": '{"b":{}}'})):
        header = decode_header(path, start, None, cache)
        for _ in range(2):  # what was refused is not remembered
            with pytest.raises(FileFormatError, match=r"x: ema\.tensors: "):
                decode_snapshot(path, header, cache)
    copies = start_of({"ema.tensors": roles})
    assert decode_snapshot(path, decode_header(path, copies, None, cache), cache).tensors["a"].role == "copy"
    with pytest.raises(FileFormatError, match=r"F16 cannot hold copy of F32"):
        decode_snapshot(path, decode_header(path, start_of({"ema.tensors": roles}, dtype="F16"), None, cache), cache)


def test_snapshots_of_one_text_and_two_shapes_do_not_match(tmp_path: Path) -> None:
    paths = write_times(tmp_path, range(10, 40, 10))
    rewrite_snapshot(paths[1], lambda values: values.update(b=torch.ones(5)))
    with pytest.raises(MismatchError, match=r"tensor 'b' has the shapes \[4\] and \[5\]"):
        read_directory(tmp_path)


ENTRY = '"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}'


@pytest.mark.parametrize(
    "order", ['{{"__metadata__":{m},{e}}}', '{{{e},"__metadata__":{m}}}', ' {{ "__metadata__" : {m} , {e} }}']
)
def test_metadata_may_stand_anywhere(order: str) -> None:
    text = order.format(m='{"k":"a},\\"b"}', e=ENTRY).encode()
    header = decode_header(Path("x"), len(text).to_bytes(8, "little") + text, None)
    assert header.metadata == {"k": 'a},"b'}
    assert {name: (e.dtype, e.shape, e.begin, e.nbytes) for name, e in header.tensors.items()} == {
        "a": ("F32", (3,), 0, 12)
    }


@pytest.mark.parametrize(
    "text",
    [
        f'{{"__metadata__":{{}},{ENTRY},"__metadata__":{{}}}}', f'{{"__metadata__":{{}},{ENTRY},{ENTRY}}}',
        f'{{"__metadata__":null,"__metadata__":{{}},{ENTRY}}}', f'{{"__metadata__":null,{ENTRY}}}',
        f'{{{ENTRY},"__metadata__":{{}},"__metadata__":{{}}}}', '{"__metadata__":{},}', '{"__metadata__":{}',
        f'{{"__metadata__":{{}},{ENTRY}', f'{{"__metadata__":{{}},{ENTRY}}}}}', f'{{"__metadata__":{{}},{ENTRY}}} x',
        f'{{"__metadata__":{{}} {ENTRY}}}', f'{{"__metadata__":{{"k":"a","k":"b"}},{ENTRY}}}',
        f'{{"__metadata__":{{"k":NaN}},{ENTRY}}}', f'{{"__metadata__":{{"k":"\\ud800"}},{ENTRY}}}',
        f'{{"__metadata__":{{}},"\\u0000":{ENTRY[4:]}}}', f'{{"__metadata__":{{"k":1}},{ENTRY}}}',
        f'{{"__metadata__":[],{ENTRY}}}', '{"__metadata__":', '{"__metadata__":"a",' + ENTRY + "}",
    ],
)  # fmt: skip
def test_a_malformed_header_is_refused_however_it_begins(text: str) -> None:
    data = text.encode()
    with pytest.raises(FileFormatError, match=r"^x: "):
        decode_header(Path("x"), len(data).to_bytes(8, "little") + data, None)


def test_a_longer_list_of_what_was_left_out_is_another_one() -> None:
    cache, path = DecodeCache(), Path("x")
    found = []
    for names in (("b",), ("b",), ("b", "c"), ()):
        start = start_of(left_out=names)
        found.append(decode_snapshot(path, decode_header(path, start, None, cache), cache))
    assert [info.left_out for info in found] == [("b",), ("b",), ("b", "c"), ()]
    assert found[0] == replace(found[2], left_out=("b",))


@pytest.mark.parametrize(
    ("text", "is_text"),
    [
        ('["a\\u0000"]', False), ('["\\u0001", "b"]', True), ('[["\\ud800"], "b"]', False),
        ('{"k": ["\\udfff"]}', False),
        ('{"k": {"\\udc00": 1}, "l": "b"}', False), ('["\\ud7ff", "\\ue000"]', True), ('["\\ud83d\\ude00"]', True),
        ('[1, ["b", "\\udbff"], 2]', False), ('["\\u0041", {"a": "\\u0000"}, {"c": "d"}]', False),
    ],
)  # fmt: skip
def test_escapes_make_text_or_are_refused(text: str, is_text: bool) -> None:
    """Halves of a character and zero bytes are none, however deep they lie and whatever follows."""
    if is_text:
        assert parse_json(Path("x"), text, "it") == json.loads(text)
        return
    with pytest.raises(FileFormatError, match=r"^x: damaged it: .*is not Unicode text, or has a zero byte$"):
        parse_json(Path("x"), text, "it")


SELECTION = {"only_trainable": True, "include": ["a*"], "exclude": ["b", "c"], "buffers": "copy"}


def test_a_selection_is_read_as_it_was_made() -> None:
    given = Selection(True, ("a*",), ("b", "c"), "copy")
    found = decode_snapshot(Path("x"), decode_header(Path("x"), start_of(selection=given), None))
    assert found.selection == given
    assert decode_header(Path("x"), start_of(selection=given), None).metadata["ema.selection"] == json.dumps(
        SELECTION, separators=(",", ":")
    )
    with_copies = Selection(True, ("a*",), ("b", "c"), "copy", ("d.*",))
    found = decode_snapshot(Path("x"), decode_header(Path("x"), start_of(selection=with_copies), None))
    assert found.selection == with_copies
    assert decode_snapshot(Path("x"), decode_header(Path("x"), start_of(), None)).selection is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"only_trainable": 1}, "must have only_trainable, include, exclude, buffers, copy_only, and nothing else"),
        ({"further": 1}, "must have only_trainable, include, exclude, buffers, copy_only, and nothing else"),
        ({"include": "a*"}, "include, exclude, copy_only must be lists of globs"),
        ({"include": {"a": 1}}, "include, exclude, copy_only must be lists of globs"),
        ({"exclude": ["a", 1]}, "include, exclude, copy_only must be lists of globs"),
        ({"buffers": "keep"}, "buffers 'keep' is none of "),
    ],
)
def test_a_selection_that_nobody_made_is_refused(changes: dict[str, Any], told: str) -> None:
    start = start_of({"ema.selection": json.dumps(SELECTION | changes)})
    with pytest.raises(FileFormatError, match=rf"^x: ema\.selection: {told}"):
        decode_snapshot(Path("x"), decode_header(Path("x"), start, None))

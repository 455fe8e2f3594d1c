"""False headers are refused by name, before they cost memory."""

import json
import os
from dataclasses import dataclass, fields

import pytest
from checking import refused
from factories import INDEX, forge
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots.recorded import examine

from posthoc_cli import Run
from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.selection import running_statistics
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.tensorfile import read_file


def craft(path, header, payload=0):
    """Write a safetensors file with exactly this header, without checksums."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(payload))
    return path


def entry(shape="[1]", begin=0, end=4, dtype="F32"):
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'.encode()


A = b'"a":' + entry()
LIES = [
    entry("[0]", 2, 2),  # leaves a gap
    entry("[0]", 0, 0),  # and bytes after it
    entry(begin="false"),
    entry(begin="Infinity"),
    entry("[-1,-1]"),
    entry("[2]"),
    entry(str([1] * 65)),
    entry("[0,576460752303423488,576460752303423488]", 4),
    entry(dtype="F13"),
    b'{"dtype":"F32","shape":[1]}',
    b'{"extra":1,' + entry()[1:],
    b"[" * 3_000 + b"]" * 3_000,
]
"""Entries of a tensor, in a file with a payload of four bytes."""
HEADERS = [
    b"{%b,%b}" % (A, A),  # duplicate keys
    b'{%b,"b":%b}' % (A, entry("[2]", 0, 8)),  # tensors that overlap
    b'{"__metadata__":null,%b}' % A,
    b'{"__metadata__":{"k":1},%b}' % A,
    b'{"__metadata__":{"k":"\\ud800"},%b}' % A,
    b"[]",
    b"\xff\xfe{}",
    b"{%b} x" % A,
]


@dataclass(frozen=True)
class Rated(Snapshot):
    rate: float | None = None


@pytest.mark.parametrize(("rate", "stored"), [(None, {}), (0.0, {"rate": 0.0}), (2.0, {"rate": 2})])
def test_a_header_has_an_optional_number_also_if_it_is_zero(run, rate, stored):
    snapshot = Run(run).snapshots[0]
    values = {each.name: getattr(snapshot, each.name) for each in fields(Snapshot)}
    rated = Rated(**values, rate=rate)
    assert rated.encode() == snapshot.encode() | stored


@pytest.mark.parametrize("header", [*HEADERS, *(b'{"a":%b}' % lie for lie in LIES)])
def test_a_false_header_is_refused(tmp_path, header):
    path = craft(tmp_path / "x.safetensors", header, 4)
    with refused(path, kind=FileFormatError) as raised:
        read_file(path)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("length", [3, 10**8 + 1, 2**64 - 1])
def test_an_impossible_header_length_is_refused_before_memory_is_allocated(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    if length == 10**8 + 1:
        os.truncate(path, 2 * length)  # the header would fit; the rest of the file is a hole
    with refused(path, f"{length:,} bytes", kind=FileFormatError):
        read_file(path)


def test_more_tensors_than_any_model_has_are_refused(tmp_path):
    """700,000 empty tensors once took minutes."""
    path = craft(tmp_path / "a.safetensors", b'"dtype"' * 200_001)
    with refused(path, "200,001 tensors", kind=FileFormatError):
        read_file(path)


def test_more_values_than_any_header_has_are_refused_before_they_are_parsed(tmp_path):
    """A value takes up to 90 bytes of memory, and two in the file."""
    values = b'{"a":[%b0]}' % (3_300_000 * b"0,")
    path = craft(tmp_path / "a.safetensors", values)
    with refused(path, "3,300,000 values", kind=FileFormatError):
        read_file(path)


def containers(inner):
    keys = st.text(max_size=8)
    return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
json_values = st.recursive(plain, containers, max_leaves=6)


@settings(deadline=None, max_examples=60)
@given(
    key=st.sampled_from(["a", "dtype", "shape", "data_offsets", "new"]),
    value=json_values,
)
def test_any_foreign_header_is_refused_or_tiles_the_payload(tmp_path_factory, key, value):
    header = {"a": json.loads(entry()), "b": json.loads(entry("[1]", 4, 8))}
    container = header["a"] if key in header["a"] else header
    container[key] = value
    path = tmp_path_factory.getbasetemp() / "x.safetensors"
    try:
        found = read_file(craft(path, json.dumps(header).encode(), 8))
    except FileFormatError as error:
        assert str(error).isprintable()
        return
    assert sum(tensor.nbytes for tensor in found.entries.values()) == 8


# --- foreign files


def test_metadata_may_be_anywhere_in_the_header(tmp_path):
    text = b' { %b , "__metadata__" : {"k":"a},\\"b"} }' % A
    header = read_file(craft(tmp_path / "x", text, 4))
    assert header.metadata == {"k": 'a},"b'}
    assert header.entries["a"].nbytes == 4


@pytest.mark.parametrize("name", ["../../x", "a\nb", "nul\0"])
def test_a_name_is_never_a_path_and_is_shown_escaped(tmp_path, name):
    (tmp_path / "folder").mkdir()
    wrong = {name: json.loads(entry("[1]", 0, 8))}
    path = craft(tmp_path / "folder" / "x.safetensors", json.dumps(wrong).encode(), 8)
    with pytest.raises(FileFormatError) as caught:
        read_file(path)
    assert repr(name) in str(caught.value) or "not Unicode text" in str(caught.value)
    assert str(caught.value).isprintable()
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "x.safetensors"]


# --- metadata


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("format", "2"),
        ("format", "5"),
        ("kind", '"output"'),
        ("kind", '"elsewhere"'),
        ("run_id", "1"),
        ("sums", '""'),
        ("schedule", "[]"),
        ("tensors", "[]"),
        ("tensors", '{"average F32": ["w", 5]}'),
        ("tensors", '{"average F32": 5}'),
        ("tensors", '{"average F32": ["of another file"]}'),
        ("aliases", '{"w": 5}'),
        ("left_out", "[5]"),
    ],
)
def test_a_header_of_another_kind_or_format_is_refused(small, key, text):
    with pytest.raises(FileFormatError):
        examine(forge(small("snapshot"), {key: text}))


@pytest.mark.parametrize("kind", ["snapshot", "output"])
def test_a_file_of_format_3_is_read(small, kind):
    path = forge(small(kind), {"format": "3"})
    assert [*examine(path)] == [path.name]


def test_a_missing_key_is_named(small):
    path = forge(small("snapshot"), {"run_id": None})
    with refused(path, "run_id", kind=FileFormatError):
        examine(path)


@pytest.mark.parametrize("mark", [b'"ema.checksum"', b'"ema":'])
def test_a_missing_checksum_is_an_error(small, mark):
    path = small("snapshot")
    data = path.read_bytes()
    path.write_bytes(data.replace(mark, mark.replace(b"ema", b"emb"), 1))
    with refused(path, "checksum", kind=FileFormatError):
        examine(path)


# --- an index of shards names only files in its own folder

END = ".safetensors"


@pytest.mark.parametrize(
    "name",
    [f"a{END}.bak", f".a{END}", f"a\\b{END}", f"a\u202e{END}", 1],
)
def test_a_hostile_name_in_an_index_is_refused(tmp_path, name):
    refuse_index(tmp_path, json.dumps({"weight_map": {"w\x1b": name}}))


@pytest.mark.parametrize("text", ["[]", '{"weight_map":[]}', '{"weight_map":{}}'])
def test_a_false_index_is_refused(tmp_path, text):
    refuse_index(tmp_path, text)


def refuse_index(folder, text):
    index = folder / INDEX
    index.write_text(text)
    with refused(index, kind=FileFormatError) as raised:
        Run(index).info()
    assert str(raised.value).isprintable()


def test_running_statistics_are_those_of_layers_that_have_all():
    statistics = {"a.running_mean", "a.running_var"}
    others = {"a.num_batches_tracked", "b.running_mean", "running_meaning"}
    assert running_statistics([*statistics, *others]) == statistics

"""The files of a training hold one program with other numbers, which is run once, and the same
sets of tensors, which are found once."""

import io
import pickle
import random
import tracemalloc
import zipfile
from collections import OrderedDict
from unittest import mock

import numpy as np
import pytest
import torch

from posthoc_cli import Run
from posthoc_cli.checkpoints import pickles
from posthoc_cli.checkpoints.pickles import Programs, read_pickled, read_tensors
from posthoc_cli.checkpoints.sets import TensorSets
from posthoc_cli.errors import FileFormatError, PostHocError
from posthoc_cli.opening import open_sources
from posthoc_cli.profiles import Point
from posthoc_cli.snapshots.opened_file import OpenedFile


def read(path, programs=None):
    with OpenedFile(path) as file:
        return read_tensors(file, programs or Programs())


@pytest.fixture
def runs(monkeypatch):
    """The programs that were run."""
    run = []
    load = pickles._Tracer.load
    monkeypatch.setattr(pickles._Tracer, "load", lambda tracer: run.append(1) or load(tracer))
    return run


def training(step, rate):
    """What a training saves: numbers as values, in lists, in tuples and as keys."""
    weights = OrderedDict((f"layers.{n}.weight", torch.full((2, 3 + n), rate)) for n in range(4))
    moments = {n: {"step": torch.tensor(float(step)), "m": torch.ones(3)} for n in range(4)}
    group = {"lr": rate, "betas": (0.9, 0.99), "eps": 1e-8, "foreach": None, "params": [0, 1, 2, 3]}
    optimizer = {"state": moments, "param_groups": [group]}
    return {"step": step, "epoch": step // 10, "model": weights, "optimizer": optimizer}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_program_with_other_numbers_is_not_run_again(tmp_path, runs, protocol):
    programs = Programs()
    for step in range(300, 340):
        rate = 1e-3 / step
        path = tmp_path / f"step{step}.pt"
        torch.save(training(step, rate), path, pickle_protocol=protocol)
        leaves = read(path, programs)
        assert leaves["step",] == step
        assert type(leaves["step",]) is int
        assert leaves["epoch",] == step // 10
        assert leaves["optimizer", "param_groups", "0", "lr"] == rate
        assert type(leaves["optimizer", "param_groups", "0", "lr"]) is float
        entry = leaves["model", "layers.2.weight"]
        stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        raw = stored[entry.begin : entry.begin + entry.nbytes].clone()
        assert torch.equal(raw.view(torch.float32).reshape(entry.shape), torch.full((2, 5), rate))
    assert len(runs) == 1


def test_what_a_reader_gets_is_its_own(tmp_path):
    programs = Programs()
    for step in (1, 2, 3):
        torch.save(training(step, 0.5), tmp_path / f"{step}.pt")
    for step in (1, 2):
        read(tmp_path / f"{step}.pt", programs)["more",] = "added"
    assert read(tmp_path / "3.pt", programs) == read(tmp_path / "3.pt")


CHANGES = {
    "a shape": lambda: [{"w": torch.zeros(2, 6)}, {"w": torch.zeros(3, 4)}],
    "strides": lambda: [{"w": torch.zeros(3, 3)}, {"w": torch.zeros(3, 3).t()}],
    "an offset": lambda: [{"w": torch.zeros(9)[k : k + 2]} for k in (3, 5)],
    "a dtype": lambda: [{"w": torch.zeros(4)}, {"w": torch.zeros(4, dtype=torch.int32)}],
    "a key": lambda: [{"state": {key: torch.zeros(2)}} for key in (3, 4)],
    "a text": lambda: [{"kind": text, "w": torch.zeros(2)} for text in ("ema", "raw")],
    "a switch": lambda: [{"on": on, "w": torch.zeros(2)} for on in (True, False)],
    "a longer number": lambda: [{"step": step, "w": torch.zeros(2)} for step in (255, 256)],
    "a kind of number": lambda: [{"x": x, "w": torch.zeros(2)} for x in (1, 70_000)],
    "a number of torch": lambda: [{"step": torch.tensor(step)} for step in (1, 2)],
    "one tensor more": lambda: [{"w": torch.zeros(2)}, {"w": torch.zeros(2), "v": torch.ones(1)}],
    "shared numbers": lambda: [shared(number) for number in (5, 6)],
}


def shared(number):
    inner = {"a": number}
    return {"one": inner, "two": [inner, (number, inner)], "w": torch.zeros(2)}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_a_program_that_differs_in_more_makes_what_it_says(tmp_path, change, protocol):
    programs = Programs()
    for number, content in enumerate(CHANGES[change]()):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path, pickle_protocol=protocol)
        assert read(path, programs) == read(path)


def test_any_numbers_of_any_structure_are_read_as_alone(tmp_path):
    """Contents of one structure, in which numbers are values, keys, sizes, items and shared."""
    for seed in range(40):
        programs = Programs()
        for turn in range(3):
            structure = random.Random(seed)
            numbers = random.Random(1000 * seed + turn)
            path = tmp_path / f"{turn}.pt"
            torch.save(draw(structure, numbers, 3), path, pickle_protocol=2 + 2 * (seed % 2))
            assert read(path, programs) == read(path), seed


def draw(structure, numbers, levels):
    """Draw a content whose numbers alone differ for other `numbers`."""
    number = numbers.choice([numbers.randrange(200), numbers.random()])
    kinds = ["number", "tensor", "text", "none"] + ["dict", "list", "tuple", "twice"] * levels
    kind = structure.choice(kinds)
    if levels == 3 or kind == "dict":
        count = structure.randrange(1, 5)
        keys = [structure.choice([f"k{n}", n]) for n in range(count)]
        return {key: draw(structure, numbers, levels - 1) for key in keys}
    inner = [draw(structure, numbers, levels - 1) for _ in range(3)] if levels > 0 else []
    made = {
        "number": number,
        "tensor": torch.zeros(structure.randrange(1, 4), numbers.randrange(1, 3)),
        "text": "text",
        "none": None,
        "list": inner,
        "tuple": tuple(inner),
        "twice": {"a": inner, "b": inner[0] if inner else number},
    }
    return made[kind]


# --- programs that nothing writes


def write_archive(path, program, padding=0):
    """Write an archive with a program, a storage of 64 bytes, and so many bytes between the two."""
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a/data.pkl")
        archive.writestr(info, program)
        info = zipfile.ZipInfo("a/data/0")
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        archive.writestr(info, bytes(range(64)))


def tensor_of(size):
    """The opcodes of a tensor, whose size other opcodes push."""
    storage = b"(X\x07\0\0\0storagectorch\nByteStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x40tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + size + b"K\x01\x85tR"


def text_of(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


SHARED = {
    "by memo": (b"K%cq\x07", b"h\x07"),
    "by memo of protocol 4": (b"K%c\x94", b"h\0"),
    "by a long index": (b"K%cr\x07\0\0\0", b"j\x07\0\0\0"),
    "by a text index": (b"K%cp7\n", b"g7\n"),
}


@pytest.mark.parametrize("way", SHARED)
def test_a_number_that_a_value_shares_with_a_size_decides_about_the_size(tmp_path, way):
    push, again = SHARED[way]
    programs = Programs()
    for number in (5, 6, 7):
        size = again + b"\x85"
        program = b"\x80\x02}(" + text_of("step") + push % number + text_of("w")
        program += tensor_of(size) + b"u."
        path = tmp_path / f"{number}.pt"
        write_archive(path, program)
        leaves = read(path, programs)
        assert leaves["step",] == number
        assert leaves["w",].shape == (number,)


def test_a_number_that_is_a_value_and_a_key_decides_about_the_key(tmp_path):
    programs = Programs()
    for number in (5, 6):
        program = b"\x80\x02}(" + text_of("step") + b"K%c2" % number  # doubled
        program += tensor_of(b"K\x08\x85") + b"u."
        path = tmp_path / f"{number}.pt"
        write_archive(path, program)
        assert [*read(path, programs)] == [("step",), (str(number),)]


def test_members_at_other_places_are_found_there(tmp_path):
    """The directory says where headers are, and headers where the content begins."""
    programs = Programs()
    program = pickle.dumps({"step": 1}, 2)
    program = b"\x80\x02}(" + text_of("w") + tensor_of(b"K\x08\x85") + b"u."
    begins = []
    for padding in (0, 7, 31):
        path = tmp_path / f"{padding}.pt"
        write_archive(path, program, padding)
        entry = read(path, programs)["w",]
        begins.append(entry.begin)
        assert path.read_bytes()[entry.begin : entry.begin + 8] == bytes(range(8))
    assert len(set(begins)) == 3


def test_a_header_that_moves_its_content_is_heeded(tmp_path):
    """Two archives of one length and one directory, whose headers alone differ: the content of the
    second begins later, beyond what is there."""
    programs = Programs()
    path = tmp_path / "a.pt"
    program = b"\x80\x02}(" + text_of("w") + tensor_of(b"K\x08\x85") + b"u."
    write_archive(path, program)
    begin = read(path, programs)["w",].begin
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x03\x04")
    content[at + 28 : at + 30] = (4 + 2).to_bytes(2, "little")
    path.write_bytes(content)
    assert read(path, programs)["w",].begin == begin + 2
    content[at : at + 4] = b"PK\x07\x08"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="is not where it should be"):
        read(path, programs)


def test_a_long_program_is_not_kept(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(pickles, "_LONGEST_KEPT", 100)
    path = tmp_path / "a.pt"
    torch.save(training(1, 0.5), path)
    assert read(path)["step",] == 1
    assert not runs


def test_numbers_of_a_list_without_end_take_little_memory(tmp_path):
    """Half a million numbers on the stack of a program: before, 8 bytes each."""
    program = b"\x80\x02}(" + text_of("step") + b"K\x01" + text_of("x") + b"](" + b"K\x02" * 500_000
    path = tmp_path / "a.pt"
    write_archive(path, program + b"eu.")
    tracemalloc.start()
    assert read(path) == {("step",): 1}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000 * 8 * 4 + 10_000 * 300


def test_few_programs_are_kept(tmp_path):
    programs = Programs()
    for size in range(1, 40):
        buffer = io.BytesIO()
        torch.save({f"w{n}": torch.zeros(1) for n in range(size)}, buffer)
        path = tmp_path / "a.pt"
        path.write_bytes(buffer.getvalue())
        assert len(read(path, programs)) == size
    assert len(programs._programs) == pickles._MOST_KEPT


# --- archives of one tensor, which a distributed checkpoint consists of


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def shown(value):
    """Return an object of a file as what compares by its content."""
    if isinstance(value, pickles.Node):
        return value.name, shown(value.arguments), shown(value.state)
    return [*map(shown, value)] if isinstance(value, tuple | list) else value


def read_object(path, begin, end, programs=None):
    """Return the object in a range of a file, or the message of its error."""
    with OpenedFile(path) as file:
        try:
            return shown(read_pickled(file, begin, end, programs))
        except FileFormatError as error:
            return str(error)


@pytest.fixture
def directories(monkeypatch):
    """The directories of archives that were read."""
    opened = mock.Mock(side_effect=zipfile.ZipFile)
    monkeypatch.setattr(pickles.zipfile, "ZipFile", opened)
    return opened


def test_archives_of_equal_tensors_are_read_once(tmp_path, directories):
    programs = Programs()
    path = tmp_path / "a"
    tensors = [torch.full(shape, n) for n in range(5) for shape in ((64, 2), (2, 64), (128,))]
    pieces = [saved(tensor) for tensor in tensors]
    path.write_bytes(b"".join(pieces))
    begin = 0
    for tensor, piece in zip(tensors, pieces, strict=True):
        entry = read_object(path, begin, begin + len(piece), programs)
        assert (entry.dtype, entry.shape) == ("I64", tuple(tensor.shape))
        stored = path.read_bytes()[entry.begin : entry.begin + entry.nbytes]
        assert stored == tensor.numpy().tobytes()
        begin += len(piece)
    assert directories.call_count == 3


def test_an_archive_in_which_any_byte_differs_is_read_as_alone(tmp_path):
    """All that is read of an archive is compared, and nothing that is not, such as values."""
    first = saved(torch.arange(6.0).reshape(2, 3))
    size = len(first)
    path = tmp_path / "a"
    programs = Programs()
    path.write_bytes(first)
    assert read_object(path, 0, size, programs).shape == (2, 3)
    results = set()
    for place in range(size):
        second = bytearray(first)
        second[place] ^= 1
        path.write_bytes(b"before" + second)
        found = read_object(path, 6, 6 + size, programs)
        assert found == read_object(path, 6, 6 + size), place
        results.add(str(found))
    assert len(results) > 20  # other shapes and places, and many errors


def test_few_archives_of_one_tensor_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST_TENSORS", 10)
    programs = Programs()
    path = tmp_path / "a"
    for size in range(1, 30):
        path.write_bytes(saved(torch.zeros(size)))
        assert read_object(path, 0, path.stat().st_size, programs).shape == (size,)
    assert sum(map(len, programs._tensors.values())) == 10


# --- what the files of a series hold is found once


def save_series(folder, change, count=6):
    """Write files of weights that walk, and their average; `change` the content of the fourth."""
    random = torch.Generator().manual_seed(0)
    weights = {"a.weight": torch.zeros(6, 5), "b.weight": torch.zeros(40)}
    average = {name: value.clone() for name, value in weights.items()}
    for step in range(1, 20 * count + 1):
        for name, value in weights.items():
            value += torch.randn(value.shape, generator=random)
            average[name].lerp_(value, 0.05)
        if step % 20 == 0:
            content = {"step": step, "rate": 0.1, "model": {**weights}, "ema": {**average}}
            if step == 80:
                change(content)
            torch.save(content, folder / f"step{step}.pt")


def test_the_sets_of_a_series_are_found_once(tmp_path, monkeypatch):
    save_series(tmp_path, lambda _: None)
    made = mock.Mock(side_effect=TensorSets.__init__)
    monkeypatch.setattr(TensorSets, "__init__", lambda *args, **options: made(*args, **options))
    sources = open_sources(tmp_path / "step*.pt", {"ema_decay": 0.95})
    assert [(source.t, source.decay) for source in sources if source.decay] == [
        (20.0 * n, 0.95) for n in range(1, 7)
    ]
    assert made.call_count == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content.pop("ema"), "weights"),
        (lambda content: content.pop("rate"), "both"),
        (lambda content: content["ema"].pop("b.weight"), "of the average"),
        (lambda content: content["ema"].update({"b.weight": torch.zeros(7)}), "do not match"),
        (lambda content: content.update(best_ema=content["model"]), "both"),
    ],
)
def test_a_file_that_differs_from_its_series_is_judged_alone(tmp_path, change, expected):
    save_series(tmp_path, change)
    try:
        sources = open_sources(tmp_path / "step*.pt", {"ema_decay": 0.95})
    except PostHocError as error:
        assert expected in str(error)
        return
    held = {
        "weights" if isinstance(each.profile, Point) else "average"
        for each in sources
        if each.t == 80
    }
    assert held == ({"weights"} if expected == "weights" else {"weights", "average"})
    for source in sources:
        stored = torch.load(source.path)["model" if isinstance(source.profile, Point) else "ema"]
        values = source.values("a.weight", 0, 30)
        assert np.array_equal(values, stored["a.weight"].double().flatten().numpy())


@pytest.mark.parametrize("swapped", [(20,), (80,), (20, 80, 100)])
def test_each_file_of_a_series_says_whether_it_was_written_swapped(tmp_path, swapped):
    """NequIP's files, whose state says which of the two sets is in the model's place."""
    random = torch.Generator().manual_seed(0)
    weights = torch.zeros(8, 5)
    average = weights.clone()
    truth = {}
    for step in range(1, 121):
        weights = weights + torch.randn(8, 5, generator=random)
        decay = min(0.95, (1 + step + 1) / (10 + step + 1))
        average = average.lerp(weights, 1 - decay)
        if step % 20:
            continue
        is_swapped = step in swapped
        model, kept = (average, weights) if is_swapped else (weights, average)
        settings = {
            "decay": 0.95,
            "num_updates": step + 1,
            "is_holding_ema_weights": not is_swapped,
        }
        state = {"model.w": model, "ema.ema_weight_0": kept, "ema._extra_state": settings}
        torch.save({"global_step": step, "state_dict": state}, tmp_path / f"step{step}.ckpt")
        truth[step] = weights, average
    sources = Run(tmp_path / "step*.ckpt").sources
    assert len(sources) == 2 * len(truth)
    for source in sources:
        expected = truth[source.t][not isinstance(source.profile, Point)]
        (name,) = source.entries
        assert np.array_equal(source.values(name, 0, 40), expected.double().flatten().numpy())

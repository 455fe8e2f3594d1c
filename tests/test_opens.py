"""How often each command opens a file and lists a folder: what is known is not read again."""

import resource
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from factories import random_walk
from safetensors.torch import save_file
from tracker.runs import Training, track

from posthoc_cli import Run, files, import_checkpoints
from posthoc_cli.errors import FileFormatError
from posthoc_cli.reconstruction import Problem
from posthoc_cli.snapshots.sampling import read_elements
from posthoc_cli.snapshots.source import ElementRange
from posthoc_cli.snapshots.sources import use


class Counts:
    """Counts the calls of the file system."""

    def __init__(self, monkeypatch):
        system = files.FileSystem()
        self.opened = Counter()
        self.listed = Counter()
        watched = mock.Mock(wraps=system)
        watched.open = self._count(system.open, self.opened)
        watched.list = self._count(system.list, self.listed)
        monkeypatch.setattr(files, "system", watched)

    def _count(self, call, counts):
        def counted(path):
            counts[str(path)] += 1
            return call(path)

        return counted

    @property
    def most_opens(self):
        return max(self.opened.values(), default=0)

    @property
    def listings(self):
        return self.listed.total()


@pytest.fixture
def folder(tmp_path, request):
    """A folder of snapshots, of files of weights, or of weights with an average, or an import."""
    kind = request.param
    place = tmp_path / "run"
    if kind == "own":
        training = Training()
        with track(training.model, place, checkpoint_every=20) as tracker:
            training.run(200, tracker)
        return place
    place.mkdir()
    walk = random_walk(200, {"w": (30, 20), "b": (20,)})
    average = {name: torch.from_numpy(value).clone() for name, value in walk[0].items()}
    for step, values in enumerate(walk, 1):
        weights = {name: torch.from_numpy(value) for name, value in values.items()}
        for name, value in average.items():
            value.lerp_(weights[name], 0.05)
        if step % 10:
            continue
        if kind == ".safetensors":
            save_file(weights, place / f"step{step}.safetensors")
            continue
        content = {"step": step, "model": weights}
        if kind != ".pt":
            content["ema"] = average
        torch.save(content, place / f"step{step}.pt")
    if kind == "import":
        import_checkpoints(place, tmp_path / "import")
        return tmp_path / "import"
    return place


def loss(tensors):
    return float(sum(value.double().square().sum() for value in tensors.values()))


def sweep(run):
    """Return the number of averages that it has made."""
    return len(run.sweep(loss, minimize=True, sigma_rels=[0.1, 0.15, 0.2, 0.25]).trials)


MOST = {
    "own": {"facts": 1, "average": 2, "curve": 1, "sweep": 1},
    ".pt": {"facts": 1, "average": 2, "curve": 2, "sweep": 2},
    ".safetensors": {"facts": 1, "average": 2, "curve": 2, "sweep": 2},
    "both": {"facts": 1, "average": 2, "curve": 2, "sweep": 2},
    "import": {"facts": 1, "average": 2, "curve": 2, "sweep": 2},
}
"""The most opens of a file by kind and command; in a sweep besides one for each average."""
CALLS = {
    "facts": repr,
    "average": lambda run: run.average(0.15),
    "curve": Run.error_curve,
    "sweep": sweep,
}


@pytest.mark.parametrize("command", CALLS)
@pytest.mark.parametrize("folder", MOST, indirect=True)
def test_a_command_opens_each_file_as_often_as_it_needs(command, folder, request, monkeypatch):
    kind = request.node.callspec.params["folder"]
    counts = Counts(monkeypatch)
    result = CALLS[command](Run(folder))
    averages = result if command == "sweep" else 0
    assert counts.most_opens <= MOST[kind][command] + averages
    assert counts.listings <= (kind != "import")


@pytest.mark.parametrize("folder", MOST, indirect=True)
def test_a_second_plan_opens_nothing(folder, monkeypatch):
    run = Run(folder)
    run.plan(0.15)
    counts = Counts(monkeypatch)
    run.plan([0.1, 0.2], t=150)
    run.error_curve()
    assert not counts.opened


def test_averages_of_one_time_are_solved_from_one_factorisation(tmp_path, monkeypatch):
    training = Training()
    with track(training.model, tmp_path, checkpoint_every=20) as tracker:
        training.run(100, tracker)
    alone = [Run(tmp_path).plan(width).coefficients for width in (0.1, 0.2)]
    run = Run(tmp_path)
    made = mock.Mock(side_effect=Problem.__init__)
    monkeypatch.setattr(Problem, "__init__", lambda *arguments: made(*arguments))
    together = [run.plan(width).coefficients for width in (0.1, 0.2)]
    assert made.call_count == 1
    run.plan(0.1, t=60)
    assert made.call_count == 2
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_the_elements_of_a_sample_are_read_by_few_requests(tmp_path, monkeypatch):
    """Small tensors of several dtypes, apart or next to each other, and a large one of which two
    ranges far from each other are read."""
    walk = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    tensors = {}
    for number in range(48):
        values = torch.randn(5 + number, generator=walk)
        tensors[f"layers.{number}.w"] = values.to(dtypes[number % 4])
    tensors["large"] = torch.randn(1_000_000, generator=walk)
    torch.save({"step": 10, "model": tensors}, tmp_path / "step10.pt")
    source, *_ = Run(tmp_path).sources
    ranges = [ElementRange(name, 1, 5) for name in reversed(tensors)]
    ranges.append(ElementRange("large", 900_000, 900_100))
    reads = Counter()
    system = files.FileSystem()
    watched = mock.Mock(wraps=system)

    def read(descriptor, view, offset):
        reads["bytes"] += len(view)
        reads["requests"] += 1
        return system.read(descriptor, view, offset)

    watched.read = read
    monkeypatch.setattr(files, "system", watched)
    values = read_elements(source, ranges)
    expected = [tensors[name][begin:end].double() for name, begin, end in ranges]
    assert np.array_equal(values, torch.cat(expected).numpy())
    assert reads["requests"] <= 4
    assert reads["bytes"] < 100_000


def test_no_more_files_stay_open_than_a_quarter_of_those_that_a_process_may_open(
    tmp_path, monkeypatch
):
    count = 30
    for step in range(1, count + 1):
        torch.save({"step": step, "model": {"w": torch.randn(3)}}, tmp_path / f"step{step}.pt")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    system = files.FileSystem()
    now = set()
    most = Counter()
    watched = mock.Mock(wraps=system)

    def opening(path):
        descriptor = system.open(path)
        now.add(descriptor)
        most["open"] = max(most["open"], len(now))
        return descriptor

    def closing(descriptor):
        now.remove(descriptor)
        system.close(descriptor)

    watched.open = opening
    watched.close = closing
    monkeypatch.setattr(files, "system", watched)
    run = Run(tmp_path)
    assert len(run.sources) == count
    assert most["open"] == 10 + 1  # and the one that is read
    assert not now
    curve = run.error_curve()
    assert curve is not None
    assert not now


def test_a_file_that_is_changed_while_it_is_kept_open_is_refused(tmp_path):
    for step in (1, 2, 3):
        torch.save({"step": step, "model": {"w": torch.randn(3)}}, tmp_path / f"step{step}.pt")
    sources = Run(tmp_path).sources
    first = sources[0]

    def work(sources):
        expected = first.values("w", 0, 3)
        path = tmp_path / "step1.pt"
        path.write_bytes(path.read_bytes()[::-1])
        first.values("w", 0, 3)
        return expected

    with pytest.raises(FileFormatError, match="was changed while it was being read"):
        use(sources, work)
    assert first.files[0].handle.file is None

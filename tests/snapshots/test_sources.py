"""The sources of a run, as they were read once."""

import os
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from checking import refused
from checkpoint_layouts import filled
from factories import random_walk, write_run

from posthoc_cli import Beta, Request, Run, import_checkpoints, plan_synthesis
from posthoc_cli.errors import FileFormatError, InvalidValueError, VanishedError
from posthoc_cli.opening import open_sources
from posthoc_cli.snapshots.sources import Sources, use


@pytest.fixture
def run(tmp_path):
    walk = random_walk(100, {"w": (6, 5)})
    write_run(tmp_path / "run", walk, range(10, 101, 10))
    return Run(tmp_path / "run")


def touch(path):
    """Change the time of a file, as a copy over it does."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_sources_are_a_sequence_that_does_not_change(run):
    sources = run.sources
    assert len(sources) == 20
    assert [source.t for source in sources[-2:]] == [100, 100]
    assert sources[0] in sources
    assert sources == open_sources(run.directory)
    assert sources != Sources.of(sources[:3])
    assert "20 snapshots up to 100 steps" in repr(sources)
    with pytest.raises(FrozenInstanceError):
        sources.items = ()


def test_facts_are_of_all_sources_whichever_an_average_is_made_of(run):
    """A plan and the curve take the clock, the first update and the end from them."""
    sources = run.sources
    plan = run.plan(Beta(0.9), t=45)
    curve = run.error_curve(t=45, others=Beta(0.9))
    assert curve.others[0].predicted_error == pytest.approx(plan.reconstruction.predicted_error[0])
    assert plan.run_end == sources.t == 100
    assert sources.times == tuple(range(10, 101, 10))
    assert sources.t_first == 1.0
    assert sources.choose(45).profiles == [source.profile for source in sources if source.t <= 45]


def test_the_first_update_is_that_of_all_sources(run):
    """Also of a profile of which only later snapshots show that it has begun earlier."""
    items = []
    for source in run.sources:
        items.append(replace(source, t_first=5.0 if source.t < 50 else 2.0))
    early = plan_synthesis(items, Request(Beta(0.9), t=40))
    all_two = [replace(source, t_first=2.0) for source in items]
    expected = plan_synthesis(all_two, Request(Beta(0.9), t=40))
    assert early.profile_error(0) == expected.profile_error(0)


def test_the_same_files_are_read_once(run):
    assert run.sources is run.sources
    assert run.sources.prior() is run.sources.prior(range(20))


CHANGES = {
    "a file of another time": touch,
    "a file that was removed": lambda path: path.unlink(),
    "a file that was replaced": lambda path: path.with_suffix(".new").rename(path),
    "another file beside it": lambda path: (path.parent / "notes.txt").write_text("x"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("named_by", ["folder", "glob", "deeper"])
def test_a_change_of_files_is_seen_by_the_next_call(tmp_path, change, named_by):
    folder = filled(tmp_path / "run", 10, 20, 30)
    place = {"folder": folder, "glob": folder / "*.pt", "deeper": tmp_path}[named_by]
    run = Run(place)
    before = run.sources
    file = folder / "step20.pt"
    same = file.with_suffix(".new")
    same.write_bytes(file.read_bytes())
    os.utime(same, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    before = run.sources
    assert run.sources is before
    CHANGES[change](file)
    is_seen = not (named_by == "glob" and change == "another file beside it")
    assert (run.sources is not before) == is_seen


def test_an_import_is_read_again_if_its_files_change(tmp_path):
    folder = filled(tmp_path / "files", 10, 20, 30)
    import_checkpoints(folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.sources is run.sources
    torch.save({"w": torch.ones(3)}, folder / "step20.pt")
    with pytest.raises(FileFormatError, match=r"step20\.pt: was replaced"):
        run.sources  # noqa: B018


def test_a_file_that_vanishes_is_left_out_of_what_is_read_again(run):
    sources = run.sources
    gone = sources[4].path
    gone.unlink()
    tried = []

    def work(sources):
        tried.append(len(sources))
        if any(source.path == gone for source in sources):
            raise VanishedError(gone, "cannot be opened")
        return sources.t

    renewed = []
    assert use(sources, work, renewed.append) == 100
    assert tried == [20, 19]
    assert [len(sources) for sources in renewed] == [19]


def test_a_file_that_cannot_be_opened_and_is_still_listed_is_an_error_at_once(run):
    tried = []

    def work(sources):
        tried.append(sources)
        raise VanishedError(sources[0].path, "cannot be opened")

    with refused(str(run.sources[0].path), kind=VanishedError):
        use(run.sources, work)
    assert len(tried) == 1


def test_a_part_of_a_run_knows_no_other_place(run):
    some = Sources.of(run.sources[:4])
    some[0].path.unlink()
    assert some.again() is some


def test_an_average_of_unknown_decay_is_not_planned_with(tmp_path):
    for step in (10, 20, 30):
        content = {"step": step, "model": {"w": torch.full((4,), 1.0 * step)}}
        content["ema"] = {"w": torch.full((4,), 0.9 * step)}
        torch.save(content, tmp_path / f"step{step}.pt")
    sources = open_sources(tmp_path, settle=False)
    with refused("sources", "unknown decay", kind=InvalidValueError):
        plan_synthesis(sources, Request(0.1))


def test_what_a_result_can_say_is_logged_when_something_is_made(tmp_path, caplog):
    """Not by a look at the run or a plan, which hold it as values."""
    folder = filled(tmp_path / "run", 10, 20, 30)
    torch.save({"other": torch.ones(4)}, folder / "another.pt")
    run = Run(folder)
    plan = run.plan(0.05)
    run.error_curve()
    run.info()
    assert run.t == 30
    assert not caplog.messages
    (note,) = run.sources.notes
    (warning,) = plan.warnings
    run.average(0.05)
    assert caplog.messages[-2:] == [f"{folder}: {note}", warning]

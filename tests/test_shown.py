"""The texts of objects in a prompt and a notebook: a line or a short table of at most 20 lines."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser

import forked
import pytest
from factories import random_walk, write_run

from posthoc_cli import Run
from posthoc_cli.checkpoints.audit import Audit, Interval
from posthoc_cli.run import error_report, plan_training
from posthoc_cli.sweep import sweep


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("shown") / "<b>"
    write_run(folder, random_walk(60, {"a": (30, 10), "b": (7,)}), range(1, 61))
    return Run(folder)


MANY = [k / 1000 for k in range(50, 80)]
THINGS: dict[str, Callable[[Run], object]] = {
    "run": lambda run: run,
    "no run": lambda _: Run("nowhere"),
    "snapshot": lambda run: run.snapshots[0],
    "plan": lambda run: run.plan(MANY),
    "weights": lambda run: run.average(0.1),
    "synthesis": lambda run: run.write(MANY, None, dry_run=True),
    "candidate": lambda run: run.candidate(),
    "curve": lambda run: run.error_curve(),
    "curves": lambda run: error_report([run] * 16),
    "proposals": lambda _: plan_training(10_000, 1000),
    "check": lambda run: run.check(),
    "audit": lambda _: [Audit("", "found", "decay 0.99", intervals=(Interval(1, 2, 100.0, None, 0.1),) * 100)],
    "pruning": lambda run: run.prune(keep=20, dry_run=True),
    "sweep": lambda run: sweep(run, lambda weights: abs(weights["a"].norm().item()), values=[0.05, 0.1, 0.2]),
    "estimate": lambda run: sweep(run, lambda weights: weights["a"].norm().item(), values=[0.05, 0.1, 0.2]).found,
}


@pytest.mark.parametrize("name", THINGS)
def test_the_text_in_a_prompt_is_short(run: Run, name: str) -> None:
    text = repr(THINGS[name](run))
    assert len(text.splitlines()) <= 20
    assert max(map(len, text.splitlines())) < 600
    assert "array(" not in text


@pytest.mark.parametrize("name", ["run", "no run", "plan", "sweep", "figure"])
def test_the_html_in_a_notebook_is_well_formed_and_names_are_escaped(run: Run, name: str) -> None:
    shown = run.plot_errors() if name == "figure" else THINGS[name](run)
    text = shown._repr_html_()  # type: ignore[union-attr]
    assert "<b>" not in text
    open_tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: open_tags.append(tag)  # type: ignore[method-assign]
    parser.handle_endtag = lambda tag: open_tags.remove(tag)  # type: ignore[method-assign]
    parser.handle_startendtag = lambda *_: None  # type: ignore[method-assign]
    parser.feed(text)
    assert open_tags == []
    assert text.count("<tr>") <= 40
    contents = {"run": "<th>snapshots</th><td>120</td>", "no run": "no such", "plan": "<div style="}
    assert contents.get(name, "<svg") in text


def test_a_warning_without_logging_names_the_package_and_is_printed_once(run: Run) -> None:
    code = """import sys
from posthoc_cli import Run
for width in (0.01, 0.01, 0.012):
    Run(sys.argv[1]).plan([width], t=31.5)"""
    lines = forked.check(code, run.directory).err.splitlines()
    assert [line.partition(": predicted error")[0] for line in lines] == [
        f"posthoc_cli: sigma_rel {width}" for width in (0.01, 0.012)
    ]
    quiet = forked.check(f"import logging; logging.basicConfig(level=logging.ERROR)\n{code}", run.directory)
    assert quiet.err == ""

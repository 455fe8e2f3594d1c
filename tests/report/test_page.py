"""The page: complete in one file, no requests, names run no scripts, and a file that is no sweep is refused."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checking import refused
from ema_command import Ema, unmeasured_environment
from factories import random_walk, write_run

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import FileFormatError, MismatchError
from posthoc_cli.report import render
from posthoc_cli.sweep import Axis, Sweep
from posthoc_cli.sweep.trials import Metric

EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "link", "br", "circle"}


class Page(HTMLParser):
    """The parsed parts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts += data
        elif "style" not in self.open:
            self.text += f"{data} "

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def sweep(run: Run, out: Path, kind: str, values: list[float], **options: Any) -> None:
    """Sweep over a metric that is the sigma_rel of each trial."""
    Sweep(run, "sh -c 'echo {sigma_rel}' {weights}", Metric(), out, Axis.of_values(kind, values), **options).run_all()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run with a tensor of an evil name, and a sweep with an evil command and folder, and with a failed trial."""
    folder = tmp_path_factory.mktemp("reported")
    write_run(folder / "run", random_walk(20, {EVIL: (30, 10), "b": (7,)}), range(1, 21))
    out = folder / "a b<i>"
    fails = f'echo "{EVIL[:-3]}" >&2; exit 1'
    command = f"sh -c 'if [ {{sigma_rel}} = 0.05 ]; then {fails}; fi; echo {{sigma_rel}}' {{weights}}"
    axis = Axis.of_values("sigma_rel", [0.05, 0.1, 0.2, 0.25])
    Sweep(Run(folder / "run"), command, Metric(), out, axis, again="ema sweep --run <b>").run_all()
    return Run(folder / "run"), out


@pytest.fixture(scope="module")
def text(swept: tuple[Run, Path]) -> str:
    """The page, next to the folder of the sweep."""
    run, out = swept
    return render(run, [out], out.parent / "report.html")


def test_a_page_has_the_answer_its_figures_and_every_trial(swept: tuple[Run, Path], text: str) -> None:
    _, out = swept
    page = Page(text)
    result = json.loads((out / "sweep.json").read_text())
    assert f"Best: {result['best']['target']}" in page.text
    for words in ("are equal within the noise", "below 1 %", "How the network moved", "none in the headers"):
        assert words in page.text
    assert len(page.all("svg")) == 2 * 3  # each with a logarithmic and a linear axis
    assert page.text.count("sigma_rel 0.1 ") >= 1
    assert "ended with exit code 1" in page.text
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(links) == 8
    assert "a%20b%3Ci%3E/logs/sigma_rel-0.05-seed-0.out" in links
    assert "ema sweep --run <b>" in page.text
    curves = [json.loads(attributes["data-curve"]) for attributes in page.all("div") if "data-curve" in attributes]
    assert [sum(curve["log"]) for curve in curves] == [1, 0, 2, 1, 1, 0]
    for curve in curves:
        assert len(curve["xs"]) == len(curve["ys"]) > 1
        assert 0 <= curve["box"][0] < curve["box"][2] <= 1
        assert all(curve["words"])


def test_a_page_makes_no_request_and_runs_only_its_own_script(text: str) -> None:
    page = Page(text)
    loading = {"img", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
    assert not {tag for tag, _ in page.tags} & loading
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert not re.search(r"@import|url\((?!#)", text)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
    digest = base64.b64encode(hashlib.sha256(page.scripts.encode()).digest()).decode()
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert len(page.all("script")) == 1
    assert "alert(1)" in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(used) <= set(ids)


def test_a_page_needs_no_sweep_and_draws_distances_over_the_snapshots_of_each_average(ema: Ema, tmp_path: Path) -> None:
    """A time that thinning has removed is no gap; a snapshot without its distance is one."""
    model, out = torch.nn.Linear(3, 3), tmp_path / "report.html"
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=2) as tracker, torch.no_grad():
        for _ in range(16):
            model.weight += torch.randn(3, 3)
            tracker.update_(model)
    for snapshot in Run(tmp_path / "run").snapshots:
        if snapshot.info.t % 4 == 2 and snapshot.info.sigma_rel == 0.05:
            snapshot.path.unlink()
    done = ema("report", tmp_path / "run", "--out", out)
    assert (done.code, done.out) == (0, f"wrote {out}\n")
    assert ema("report", tmp_path / "run", "--out", out).code == 1
    page = Page(out.read_text())
    assert "Distance from the raw weights" in page.text
    assert "Best:" not in page.text
    (curve,) = (
        json.loads(div["data-curve"])
        for div, svg in zip(page.all("div"), page.all("svg"), strict=True)
        if svg["aria-label"] == "distance-0"
    )
    assert curve["xs"] == [4, 8, 12, 16]
    assert None not in curve["ys"]


def test_a_watched_page_follows_the_run_and_reloads_until_ctrl_c(tmp_path: Path) -> None:
    model, page = torch.nn.Linear(3, 3), tmp_path / "report.html"

    def shows(words: str) -> bool:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if page.exists() and words in page.read_text():
                return True
            time.sleep(0.1)
        return False

    (tmp_path / "run").mkdir()
    command = [sys.executable, "-m", "posthoc_cli", "report", str(tmp_path / "run"), "--watch", "--out", str(page)]
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL, env=unmeasured_environment()) as watching,
        PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=4) as tracker,
    ):
        try:
            for step in (4, 8):
                for _ in range(4):
                    tracker.update_(model)
                tracker.flush()
                assert shows(f"<dt>step</dt><dd>{step}</dd>")
            assert shows('http-equiv="refresh"')
            watching.send_signal(signal.SIGINT)
            assert watching.wait(60) == 130
        finally:
            watching.kill()  # after a failure it is still running
            signal.signal(signal.SIGINT, usual)
    assert shows("<dt>step</dt><dd>8</dd>")
    assert 'http-equiv="refresh"' not in page.read_text()


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("beta", [0.6, 0.8, 0.9], r"Best: beta.*1 / \(1 - beta\)"),
        ("decay:linear", [0.1, 0.2, 0.4], r"Best: decay:linear:.*--target decay:linear:0\.\d+ --out"),
    ],
)
def test_sweeps_of_other_targets_have_a_page(
    swept: tuple[Run, Path], tmp_path: Path, kind: str, values: list[float], expected: str
) -> None:
    sweep(swept[0], tmp_path / "out", kind, values)
    assert re.search(expected, render(swept[0], [tmp_path / "out"], tmp_path / "page.html"), re.DOTALL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "--out model.safetensors"),
        ({"t": 12}, "--t 12 --out model.safetensors"),
    ],
)
def test_the_command_of_a_page_makes_the_same_average(
    ema: Ema, swept: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, words: str
) -> None:
    sweep(swept[0], tmp_path / "out", "sigma_rel", [0.1, 0.2, 0.25], **options)
    page = Page(render(swept[0], [tmp_path / "out"], tmp_path / "page.html"))
    (command,) = re.findall(r"ema (synthesize .*)", page.text)
    assert command.endswith(words)
    monkeypatch.chdir(tmp_path)
    assert ema(*shlex.split(command)).code == 0
    name = words.split()[-1]
    made, best = ((tmp_path / path).read_bytes() for path in (name, f"out/best{Path(name).suffix}"))
    assert made == best


HARMS: dict[str, Any] = {
    "settings": None, "curve": [], "trials": [{}], "estimate": "x", "equal_within_noise": [0.1], "best": {}, "axis": 1,
}  # fmt: skip


@pytest.mark.parametrize("harm", ["empty", "list", *HARMS])
def test_a_file_that_is_no_result_of_a_sweep_is_refused(swept: tuple[Run, Path], tmp_path: Path, harm: str) -> None:
    run, out = swept
    path, result = tmp_path / "sweep.json", json.loads((out / "sweep.json").read_text())
    texts = {"empty": "", "list": "[]"}
    path.write_text(texts.get(harm) if harm in texts else json.dumps(result | {harm: HARMS[harm]}))
    with refused(str(path), "no result of a sweep", kind=FileFormatError):
        render(run, [tmp_path])


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")


def browse(page: Path, option: str) -> str:
    """The document that a browser makes of a page, if without an error in its console."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent}/profile", option]
    command = ["chromium", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return "" if "CONSOLE" in done.stderr else done.stdout


def with_script(text: str, script: str) -> str:
    """A page that runs one more script, which its policy would forbid."""
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    return free.replace("</body>", f"<script>{script}</script></body>")


@needs_chromium
def test_a_browser_shows_the_values_that_a_reader_points_at(text: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(text)
    shown = browse(page, "--enable-logging=stderr")
    assert "</svg>" in shown
    assert 'class="mark"' not in shown
    # A reader points at the middle of each curve, and taps it on the other axis.
    pointing = """for (const click of [false, true]) for (const figure of document.querySelectorAll("figure")) {
        if (click) figure.querySelector("button").click();
        const svg = figure.querySelector("div:not([hidden]) svg"), box = svg.getBoundingClientRect();
        const kind = click ? "pointerdown" : "pointermove", clientX = box.left + box.width / 2;
        svg.dispatchEvent(new PointerEvent(kind, {clientX, clientY: box.top + 9}));
        document.body.append("reads " + figure.querySelector("output").textContent + ";");
    }"""
    page.write_text(with_script(text, pointing))
    shown = browse(page, "--enable-logging=stderr")
    read = [tuple(map(float, pair)) for pair in re.findall(r"reads [a-z_ ]+ (\S+): (\S+) [^;]+;", shown)]
    curves = [
        json.loads(attributes["data-curve"]) for attributes in Page(text).all("div") if "data-curve" in attributes
    ]
    assert len(read) == len(curves)
    for (x, y), curve in zip(read, curves[::2] + curves[1::2], strict=True):
        place, ends = (0.5 - curve["box"][0]) / (curve["box"][2] - curve["box"][0]), np.array(curve["x"])
        logarithmic = curve["log"][0]
        low, high = np.log(ends) if logarithmic else ends
        pointed = low + place * (high - low)
        nearest = np.abs((np.log(curve["xs"]) if logarithmic else np.array(curve["xs"])) - pointed).argmin()
        assert x == pytest.approx(curve["xs"][nearest], rel=0.005)
        assert y == pytest.approx(curve["ys"][nearest], rel=0.0005)


@needs_chromium
def test_a_phone_shows_every_figure_completely_and_copies_the_trials(text: str, tmp_path: Path) -> None:
    """In a frame of 390 pixels, since chromium's windows are wider."""
    looking = """
        const wide = document.documentElement.scrollWidth, hints = [...document.querySelectorAll(".hint")];
        for (const svg of document.querySelectorAll("div:not([hidden]) > svg")) {
            const box = svg.getBoundingClientRect();
            document.title += " " + (box.right <= 390 && box.width > 300);
        }
        document.title += " hints " + hints.every((hint) => getComputedStyle(hint).display === "block");
        const copying = new ClipboardEvent("copy", {clipboardData: new DataTransfer()});
        document.execCommand = (what) => document.dispatchEvent(copying);  // as of a user's click
        document.querySelector("[data-csv]").click();
        const copied = copying.clipboardData.getData("text/plain");
        parent.document.body.append(`${document.title} wide ${wide}; csv ${JSON.stringify(copied)} end`);
    """
    (tmp_path / "page.html").write_text(with_script(text, looking))
    (tmp_path / "phone.html").write_text('<body><iframe src="page.html" width="390" height="800"></iframe></body>')
    document = browse(tmp_path / "phone.html", "--allow-file-access-from-files")
    found = re.search(r"((?: true| false)+) hints (\w+) wide (\d+); csv (.*) end", document)
    assert found is not None, document
    assert found[1].split() == ["true"] * 3
    assert found[2] == "true"
    assert int(found[3]) <= 390  # nothing is wider; a scroll bar takes some
    (csv_text,) = (button["data-csv"] for button in Page(text).all("button") if "data-csv" in button)
    assert json.loads(found[4]) == csv_text


def test_trials_are_sorted_by_length_with_the_best_in_its_place_and_as_csv(swept: tuple[Run, Path], text: str) -> None:
    _, out = swept
    result = json.loads((out / "sweep.json").read_text())
    (csv_text,) = (button["data-csv"] for button in Page(text).all("button") if "data-csv" in button)
    header, *rows = csv.reader(io.StringIO(csv_text))
    assert header == ["target", "seed", "value", "standard_error", "predicted_error", "seconds"]
    widths = [float(row[0].split()[-1]) for row in rows]
    assert widths == sorted(widths)
    assert set(widths) == {0.05, 0.1, 0.2, 0.25}
    (best,) = (row for row in rows if row[0].startswith("best: "))
    assert float(best[2]) == result["estimate"]
    measured = {trial["x"]: trial["value"] for trial in result["trials"]}
    assert {float(row[0].split()[-1]): float(row[2]) if row[2] else None for row in rows if row != best} == measured
    assert re.search(rf'<tr class="best"><td>best: {result["best"]["target"]}</td>', text)


def test_two_runs_and_two_sweeps_are_compared_on_one_page(ema: Ema, swept: tuple[Run, Path], tmp_path: Path) -> None:
    run, out = swept
    write_run(tmp_path / "other", random_walk(20, {"a": (30, 10)}), range(1, 21), run_id="0123" * 8)
    sweep(Run(tmp_path / "other"), tmp_path / "s", "sigma_rel", [0.1, 0.2, 0.25], again="ema sweep the other")
    both = [run.directory, tmp_path / "other", "--sweep", tmp_path / "s", "--sweep", out]
    done = ema("report", *both, "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    page = Page((tmp_path / "page.html").read_text())
    compared = page.text.partition("The best of each sweep")[2].partition("How exact each run")[0]
    for folder in (tmp_path / "s", out):
        best = json.loads((folder / "sweep.json").read_text())["best"]["target"]
        assert re.search(rf"{re.escape(str(folder))} +{re.escape(best)}", compared)
    first, second = page.text.partition("How exact each run")[2].split(f" {tmp_path / 'other'} ", 1)
    assert ("ended with exit code 1" in first, "ended with exit code 1" in second) == (True, False)
    for words in ("The run", "How the network moved", "Trials of"):
        assert words in first
        assert words in second
    assert "ema sweep the other" in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    with refused(str(tmp_path / "s" / "sweep.json"), "another run", kind=MismatchError):
        render(run, [out, tmp_path / "s"])

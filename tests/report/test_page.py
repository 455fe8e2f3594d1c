"""The page: complete in one file, no requests, names run no scripts, and a file that is no sweep is
refused."""

import base64
import hashlib
import html
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, browser
from checking import refused
from factories import random_walk, write_run
from matplotlib.figure import Figure
from safetensors.torch import save_file

from posthoc_cli import Run
from posthoc_cli.errors import FileFormatError, MismatchError
from posthoc_cli.report.page import render
from posthoc_cli.sweep import Axis, Metric, Sweep

EVIL = "<script>alert(1)</script>\"'&"


def shown(page):
    """Return the text that a page shows."""
    body = re.sub(r"<(style|script)>.*?</\1>|</?(span|code)>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub("<[^>]*>", " ", body))


def images(page, kind):
    """Return the contents of the images of a kind, in order."""
    found = re.findall(rf'<img[^>]* src="data:image/{kind};base64,([^"]*)"', page)
    return [base64.b64decode(content) for content in found]


def sweep(run, out, axis, command="sh -c 'echo {sigma_rel}' {weights}", **options):
    """Sweep over a metric that is by default the length of each trial."""
    Sweep(run, command, Metric(), out, axis, **options).run_all()
    return json.loads((out / "sweep.json").read_text())


def widths(*values):
    return Axis.of_values("sigma_rel", values)


def twenty_snapshots(folder, shapes, **fields):
    write_run(folder, random_walk(20, shapes), range(1, 21), **fields)
    return Run(folder)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A run with a tensor of an evil name, and a sweep with an evil command and folder, and with a
    failed trial."""
    folder = tmp_path_factory.mktemp("reported")
    run = twenty_snapshots(folder / "run", {EVIL: (30, 10), "b": (7,)})
    out = folder / "a b<i>"
    fails = f'echo "{EVIL[:-3]}" >&2; exit 1'
    script = f"if [ {{sigma_rel}} = 0.05 ]; then {fails}; fi; echo {{sigma_rel}}"
    command = f"sh -c '{script}' {{weights}}"
    sweep(run, out, widths(0.05, 0.1, 0.2, 0.25), command, again="ema sweep --run <b>")
    return run, out


@pytest.fixture(scope="module")
def text(swept):
    run, out = swept
    return render(run, [out], out.parent / "report.html")


def test_a_page_has_the_answer_its_figures_and_every_trial(text):
    for words in (
        "Best: sigma_rel 0.1 ",
        "are equal within the noise",
        "below 1\xa0%",
        "none in the headers",
        "ended with exit code 1",
        "ema sweep --run <b>",
    ):
        assert words in shown(text)
    of_sweep, of_errors = images(text, r"svg\+xml")
    assert b"best: 0.1" in of_sweep
    assert b"expected relative L2 error" in of_errors
    links = re.findall('<a href="(.*?)"', text)
    assert len(links) == 8
    assert "a%20b%3Ci%3E/logs/sigma_rel-0.05-seed-0.out" in links


def test_a_page_makes_no_request_and_runs_no_script_but_its_own(text):
    assert not re.search(r"https?://|@import|url\(", text)
    assert not re.search(r"<[^>]* on\w+=|<(iframe|object|embed|base|form|svg)\b", text)
    (script,) = re.findall("<script.*?>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    policy = f"{allowed}; script-src 'sha256-{digest}'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert "alert(1)" in shown(text)


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """The page of a run of checkpoints and a sweep whose trials have left two pictures, the raw
    weights' among them."""
    folder = tmp_path_factory.mktemp("looks")
    for step in (5, 10, 15, 20):
        save_file({"a": torch.full((9,), float(step))}, folder / f"step-{step}.safetensors")
    one = folder / "one.png"
    Figure((0.4, 0.4)).savefig(one)
    script = f'cp {one} "$3/{EVIL[:8]}.png"; cp {one} "$3/two.png"; echo $2 | sed s/raw/9/'
    command = f"sh -c '{script}' sh {{weights}} {{sigma_rel}} {{dir}}"
    run = Run(folder / "step-*.safetensors")
    sweep(run, folder / "sweep", widths(0.1, 0.05, 0.2), command, minimize=False)
    page = folder / "report.html"
    page.write_text(render(run, [folder / "sweep"], page))
    return page


def test_a_page_shows_the_images_of_each_length_after_those_of_raw_weights(looks):
    page = looks.read_text()
    picture = (looks.parent / "one.png").read_bytes()
    assert images(page, "png") == [picture] * 8
    names = re.findall('<img[^>]* title="(.*?)"', page)
    assert names == [html.escape(f"{EVIL[:8]}.png"), "two.png"] * 4
    text = " ".join(shown(page).split())
    titles = re.findall(r"(?:raw weights|sigma_rel 0\.\d+), metric [\d.]+", text)
    assert titles == [
        "raw weights, metric 9",
        "sigma_rel 0.05, metric 0.05",
        "sigma_rel 0.1, metric 0.1",
        "sigma_rel 0.2, metric 0.2",
    ]
    assert "Best: sigma_rel 0.2 98 % worse than the raw weights metric: 0.2." in text


def test_of_many_large_images_a_page_shows_the_first_of_each_length(looks, monkeypatch):
    size = (looks.parent / "one.png").stat().st_size
    monkeypatch.setattr("posthoc_cli.report.page._MOST_IMAGES", 4 * size)
    text = render(Run(looks.parent / "step-*.safetensors"), [looks.parent / "sweep"], looks)
    assert text.count("; 1 more are in") == 4


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
def test_in_a_browser_a_slider_and_arrow_keys_choose_the_length(looks, tmp_path):
    backgrounds = set()
    with browser(tmp_path) as page:
        for width, is_dark in ((400, False), (1200, True)):
            page.open(looks, width, is_dark)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(f"{ALL}.filter({SCROLLS}).length") == 0
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            copied = page.evaluate(COPIED)
            assert re.fullmatch(r"ema synthesize \S+ --sigma-rel 0\.2 --out \S+", copied)
            sizes = page.evaluate(f"{ALL}.filter(one => one.title).map(one => one.clientWidth)")
            assert max(sizes) > width / 4  # two images share the width of the page
            choose_lengths(page)
            assert page.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
            for event in page.events:
                assert event["method"] != "Log.entryAdded"
                if "request" in event["params"]:
                    url = event["params"]["request"]["url"]
                    assert url.startswith(("file:", "data:"))
    assert len(backgrounds) == 2


COPIED = "getSelection().selectAllChildren(document.querySelector('pre')) ?? `${getSelection()}`"
ALL = "[...document.querySelectorAll('*')]"
SCROLLS = (
    "one => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX != 'visible'"
)
SHOWN = f"{ALL}.filter(one => one.tagName == 'FIGURE').map(one => one.checkVisibility())"


def choose_lengths(page):
    """Go through the four lengths of a page: at first the best one, which is the last, is shown."""
    assert page.evaluate(SHOWN) == [False, False, False, True]
    page.press("ArrowLeft")
    assert page.evaluate(SHOWN) == [False, False, True, False]
    for _ in range(4):
        page.press("ArrowLeft")
    assert page.evaluate(SHOWN) == [True, False, False, False]
    page.evaluate("document.querySelector('input[type=range]').focus()")
    page.press("ArrowRight")
    assert page.evaluate(SHOWN) == [False, True, False, False]
    page.evaluate("document.querySelector('input[type=checkbox]').click()")
    assert page.evaluate(SHOWN) == [True] * 4


def test_a_page_needs_no_sweep_and_replaces_none_unasked(ema, tmp_path):
    """The directory's name is no valid text."""
    run = tmp_path / os.fsdecode(b"caf\xe9")
    twenty_snapshots(run, {"a": (3,)})
    out = tmp_path / "report.html"
    assert ema("report", run, "--out", out).out == f"wrote {out}\n"
    assert ema("report", run, "--out", out).code == 1
    page = shown(out.read_text())
    assert "Best:" not in page
    assert "caf\\udce9" in page


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("sigma_rel", {"t": 12}, r"--sigma-rel 0\.1 --t 12 --out sigma_rel-0\.1\.safetensors"),
        ("decay:linear", {}, r"--target decay:linear:0\.1 --out decay-linear-0\.1\.safetensors"),
    ],
)
def test_the_command_of_a_page_makes_the_same_average(
    ema, swept, tmp_path, monkeypatch, kind, options, words
):
    run, _ = swept
    sweep(run, tmp_path / "out", Axis.of_values(kind, [0.1, 0.2, 0.25]), **options)
    page = render(run, [tmp_path / "out"], tmp_path / "page.html")
    (command,) = re.findall(r"ema (synthesize .*)", shown(page))
    assert re.search(f"{words}$", command)
    monkeypatch.chdir(tmp_path)
    ema(*shlex.split(command))
    made = Path(shlex.split(command)[-1]).read_bytes()
    assert made == Path("out/best.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", None),
        ("trials", [{}]),
        ("estimate", 10**400),
        ("metric", "a\ud800"),
    ],
)
def test_a_file_that_is_no_result_of_a_sweep_is_refused(swept, tmp_path, name, value):
    run, out = swept
    result = json.loads((out / "sweep.json").read_text())
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(result | {name: value}))
    with refused(str(path), "not the result of a sweep", kind=FileFormatError):
        render(run, [tmp_path])


@pytest.fixture
def other(tmp_path):
    """Another run than `swept`."""
    return twenty_snapshots(tmp_path / "other", {"a": (30, 10)}, run_id="0123" * 8)


def test_two_runs_and_two_sweeps_are_compared_on_one_page(ema, swept, other, tmp_path):
    run, out = swept
    second = tmp_path / "s"
    sweep(other, second, widths(0.1, 0.2, 0.25), minimize=False)
    both = [run.directory, other.directory, "--sweep", second, "--sweep", out]
    ema("report", *both, "--out", tmp_path / "page.html")
    page = shown((tmp_path / "page.html").read_text())
    assert f" {second}  sigma_rel 0.25 " in page
    assert f" {out}  sigma_rel 0.1 " in page


def test_a_sweep_of_another_run_is_refused(swept, other):
    _, out = swept
    with refused(str(out / "sweep.json"), "another run", kind=MismatchError):
        render(other, [out])

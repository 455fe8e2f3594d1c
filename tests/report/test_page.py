"""The page of a sweep: complete in one file, no requests, names run no scripts."""

import base64
import hashlib
import html
import re
import shlex
from pathlib import Path

import pytest
from browser import CHROMIUM, browser
from checking import heavy
from factories import random_walk, write_ema_checkpoints, write_run
from matplotlib.figure import Figure

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.report.page import write_page
from posthoc_cli.request import SweepRequest
from posthoc_cli.sweep import Sweep

EVIL = "<script>alert(1)</script>\"'&"


def shown(page):
    """Return the text that a page shows."""
    body = re.sub(r"<(style|script)>.*?</\1>|</?(span|code)>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub("<[^>]*>", " ", body))


def images(page, kind):
    """Return the contents of the images of a kind, in order."""
    found = re.findall(rf'<img[^>]* src="data:image/{kind};base64,([^"]*)"', page)
    return [base64.b64decode(content) for content in found]


def sweep(run, out, lengths, command="sh -c 'echo {sigma_rel}' {weights}", again="", **options):
    """Sweep over a metric that is by default the length of each trial; write the page."""
    request = SweepRequest(command, sigma_rels=lengths, out=out, **{"minimize": True} | options)
    report = Sweep(run.sources, request, again).run()
    (*_, page) = write_page(report, out).outputs
    return page


def twenty_snapshots(folder, shapes, **fields):
    write_run(folder, random_walk(20, shapes), range(1, 21), **fields)
    return Run(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The page of a sweep with an evil command and folder, and with a failed trial, of a run with a
    tensor of an evil name."""
    folder = tmp_path_factory.mktemp("reported")
    run = twenty_snapshots(folder / "run", {EVIL: (30, 10), "b": (7,)})
    fails = f'echo "{EVIL[:-3]}" >&2; exit 1'
    script = f"if [ {{sigma_rel}} = 0.05 ]; then {fails}; fi; echo {{sigma_rel}}"
    command = f"sh -c '{script}' {{weights}}"
    lengths = [0.05, 0.1, 0.2, 0.25]
    again = "ema sweep --eval <b>"
    return sweep(run, folder / "a b<i>", lengths, command, again).read_text()


def test_a_page_has_the_answer_its_figure_and_every_trial(text):
    for words in (
        "best sigma_rel 0.1 ",
        "statistically tied unknown",
        "4 trials, 1 of them failed",
        "ended with exit code 1",
        "ema sweep --eval <b>",
    ):
        assert words in " ".join(shown(text).split())
    (picture,) = images(text, r"svg\+xml")
    assert b"best: 0.1" in picture
    assert b"fill: #ffffff" not in picture  # its background is the page's, light or dark
    links = re.findall('<a href="(.*?)"', text)
    assert len(links) == 8
    assert "logs/sigma_rel-0.05-seed-0.out" in links


def test_a_page_makes_no_request_and_runs_no_script_but_its_own(text):
    assert not re.search(r"https?://|@import|url\(", text)
    assert not re.search(r"<[^>]* on\w+=|<(iframe|object|embed|base|form|svg)\b", text)
    (script,) = re.findall("<script.*?>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    policy = f"{allowed}; script-src 'sha256-{digest}'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert "alert(1)" in shown(text)


def looks(folder, count):
    """Return the page of a sweep of checkpoints whose trials have left so many pictures, those of
    the user's EMA and of the last weights among them."""
    folder.mkdir()
    write_ema_checkpoints(folder)
    import_checkpoints(folder, folder / "run", ema_decay=0.9)
    drawn = folder / "drawn.png"
    Figure((0.4, 0.4)).savefig(drawn)
    copies = "; ".join(f'cp {drawn} "$3/{number}{EVIL[:8]}.png"' for number in range(count))
    script = f"{copies}; echo $2 | sed 's/raw/9/; s/ema/8/'"
    command = f'sh -c "{script}" sh {{weights}} {{sigma_rel}} {{dir}}'.replace('"$3/', '\\"$3/')
    command = command.replace('.png"', '.png\\"')
    run = Run(folder / "run")
    return sweep(run, folder / "sweep", [0.1, 0.05, 0.2], command, minimize=False)


@pytest.fixture(scope="module", params=[1, 2])
def page(request, tmp_path_factory):
    return looks(tmp_path_factory.mktemp("looks") / "files", request.param)


TITLES = ["last weights", "your EMA (0.9)", *(f"sigma_rel {x}" for x in (0.05, 0.1, 0.2))]


def test_a_page_shows_the_images_of_the_last_weights_the_own_ema_and_each_length(page):
    text = page.read_text()
    picture = (page.parent.parent / "drawn.png").read_bytes()
    drawn = images(text, "png")
    assert {*drawn} == {picture}
    names = re.findall('<img[^>]* title="(.*?)"', text)
    assert html.escape(f"0{EVIL[:8]}.png") in names
    assert len(names) == len(drawn)
    titles = re.findall(r"<figcaption><b>(.*?)(?: \(as decay [\d.]+\))?</b>, metric", text)
    assert sorted(titles) == sorted(TITLES)
    words = " ".join(shown(text).split())
    gain = "gain -7.8 (98 %) worse than your EMA (0.9), -8.8 (98 %) worse than the last weights"
    assert f"{gain}, by one measurement each" in words


@heavy
def test_of_many_large_images_a_page_shows_the_first_of_each_length(tmp_path, monkeypatch):
    monkeypatch.setattr("posthoc_cli.report.page._MOST_IMAGES", 1)
    text = looks(tmp_path / "files", 2).read_text()
    assert text.count("; 1 more are in") == 5


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
def test_in_a_browser_samples_fill_the_width_side_by_side_and_a_slider_chooses_the_length(
    page, tmp_path
):
    backgrounds = set()
    with browser(tmp_path) as opened:
        for width, is_dark in ((400, False), (1200, True)):
            opened.open(page, width, is_dark)
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
            assert opened.evaluate(f"{ALL}.filter({SCROLLS}).length") == 0
            backgrounds.add(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
            copied = opened.evaluate(COPIED)
            assert re.search(r"ema synthesize \S+ --sigma-rel 0\.2 --out \S+$", copied)
            rows = opened.evaluate(ROWS)
            assert max(rows) > 0.85 * (width - 32)
            single = len(images(page.read_text(), "png")) == 5
            if width == 1200 or single:
                assert opened.evaluate(TOPS) == 1
            choose_lengths(opened)
            assert opened.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
            for event in opened.events:
                assert event["method"] != "Log.entryAdded"
                if "request" in event["params"]:
                    url = event["params"]["request"]["url"]
                    assert url.startswith(("file:", "data:"))
    assert len(backgrounds) == 2


COPIED = (
    "getSelection().selectAllChildren(document.querySelector('.take pre')) ?? `${getSelection()}`"
)
ALL = "[...document.querySelectorAll('*')]"
SCROLLS = (
    "one => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX != 'visible'"
)
FIGURES = "[...document.querySelectorAll('figure')]"
SHOWN = f"{FIGURES}.map(one => one.checkVisibility())"
VISIBLE = f"{FIGURES}.filter(one => one.checkVisibility())"
IMAGES = f"{VISIBLE}.flatMap(one => [...one.querySelectorAll('img')])"
ROWS = (
    f"(() => {{ const rows = {{}}; for (const one of {IMAGES}) {{ const box = "
    "one.getBoundingClientRect(); rows[box.top] = (rows[box.top] || 0) + box.width; } "
    "return Object.values(rows); })()"
)
"""The widths of the images in each row of the page."""
TOPS = f"new Set({VISIBLE}.map(one => one.getBoundingClientRect().top)).size"
"""The number of rows of figures."""


def choose_lengths(page):
    """Go through the three lengths of a page, of which the best, the last one, is shown at first,
    beside what averages are compared with."""
    assert page.evaluate(SHOWN) == [True, True, False, False, True]
    page.press("ArrowLeft")
    assert page.evaluate(SHOWN) == [True, True, False, True, False]
    for _ in range(4):
        page.press("ArrowLeft")
    assert page.evaluate(SHOWN) == [True, True, True, False, False]
    page.evaluate("document.querySelector('input[type=range]').focus()")
    page.press("ArrowRight")
    assert page.evaluate(SHOWN) == [True, True, False, True, False]
    page.evaluate("document.querySelector('input[type=checkbox]').click()")
    assert page.evaluate(SHOWN) == [True] * 5


def test_the_command_of_a_page_makes_the_same_average(ema, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = twenty_snapshots(tmp_path / "run", {"a": (30, 10)})
    page = sweep(run, tmp_path / "out", [0.1, 0.2, 0.25], t=12)
    (command,) = re.findall(r"ema (synthesize .*)", shown(page.read_text()))
    assert re.search(r"--sigma-rel 0\.1 --t 12 --out sigma_rel-0\.1\.safetensors *$", command)
    assert ema(*shlex.split(command)).code == 0
    made = Path(shlex.split(command)[-1]).read_bytes()
    assert made == Path("out/best.safetensors").read_bytes()

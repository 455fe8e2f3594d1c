"""The page: complete in one file, no requests, names run no scripts, and a file that is no sweep is
refused."""

import base64
import hashlib
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from browser import CHROMIUM, Browser, browser
from checking import refused
from ema_command import Ema
from factories import random_walk, write_run
from matplotlib.figure import Figure
from safetensors.torch import save_file

import posthoc_cli
from posthoc_cli import Run
from posthoc_cli.errors import FileFormatError, MismatchError
from posthoc_cli.report.page import render
from posthoc_cli.sweep import Axis, Metric, Sweep

EVIL = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(re.sub(r"<(style|script)>.*?</\1>|</?(span|code)>", "", text, flags=re.DOTALL))

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def sweep(run: Run, out: Path, axis: Axis, **options: Any) -> None:
    """Sweep over a metric that is the sigma_rel of each trial."""
    command = "sh -c 'echo {sigma_rel}' {weights}"
    Sweep(run, command, Metric(), out, axis, **options).run_all()


def twenty_snapshots(folder: Path, shapes: dict[str, tuple[int, ...]], **fields: Any) -> Run:
    write_run(folder, random_walk(20, shapes), range(1, 21), **fields)
    return Run(folder)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run with a tensor of an evil name, and a sweep with an evil command and folder, and with a
    failed trial."""
    folder = tmp_path_factory.mktemp("reported")
    run = twenty_snapshots(folder / "run", {EVIL: (30, 10), "b": (7,)})
    out = folder / "a b<i>"
    fails = f'echo "{EVIL[:-3]}" >&2; exit 1'
    script = f"if [ {{sigma_rel}} = 0.05 ]; then {fails}; fi; echo {{sigma_rel}}"
    axis = Axis.of_values("sigma_rel", [0.05, 0.1, 0.2, 0.25])
    again = "ema sweep --run <b>"
    Sweep(run, f"sh -c '{script}' {{weights}}", Metric(), out, axis, again=again).run_all()
    return run, out


@pytest.fixture(scope="module")
def text(swept: tuple[Run, Path]) -> str:
    run, out = swept
    return render(run, [out], out.parent / "report.html")


def test_a_page_has_the_answer_its_figures_and_every_trial(
    swept: tuple[Run, Path],
    text: str,
) -> None:
    _, out = swept
    page = Page(text)
    result = json.loads((out / "sweep.json").read_text())
    assert f"Best: {result['best']['target']}" in page.text
    for words in ("are equal within the noise", "below 1\xa0%", "none in the headers"):
        assert words in page.text
    of_sweep, of_errors = map(decoded, page.all("img"))
    assert "expected relative L2 error" in of_errors
    assert f"best: {result['best']['sigma_rel']:g}" in of_sweep
    assert page.text.count("sigma_rel 0.1 ") >= 1
    assert "ended with exit code 1" in page.text
    links = [attributes["href"] for attributes in page.all("a")]
    assert len(links) == 8
    assert "a%20b%3Ci%3E/logs/sigma_rel-0.05-seed-0.out" in links
    assert "ema sweep --run <b>" in page.text


def decoded(image: dict[str, str]) -> str:
    _, _, data = image["src"].partition("base64,")
    return base64.b64decode(data).decode()


def test_a_page_makes_no_request_and_runs_no_script_but_its_own(text: str) -> None:
    page = Page(text)
    for image in page.all("img"):
        assert image["src"].startswith("data:image/svg+xml;base64,")
    assert not re.search(r"https?://|@import|url\(", text)
    assert not re.search(r"<[^>]* on\w+=|<(iframe|object|embed|base|form|svg)\b", text)
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = hashlib.sha256(script.encode()).digest()
    own_script = f"script-src 'sha256-{base64.b64encode(digest).decode()}'"
    policies = [meta for meta in page.all("meta") if meta.get("http-equiv")]
    (policy,) = [meta["content"] for meta in policies]
    allowed = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert policy == f"{allowed}; {own_script}"
    assert "alert(1)" in page.text


def test_no_line_of_a_page_ends_between_a_number_and_its_unit(text: str) -> None:
    shown = Page(text).text
    assert re.findall(r"\d (?:%|±|x|[kMG]?B)\s", shown) == []
    assert len(re.findall(r"\d\xa0(?:%|±|[kMG]?B)\s", shown)) >= 7


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of checkpoints and a sweep whose trials have left two pictures, the raw
    weights' among them."""
    folder = tmp_path_factory.mktemp("looks")
    for step in (5, 10, 15, 20):
        save_file({"a": torch.full((9,), float(step))}, folder / f"step-{step}.safetensors")
    figure = Figure((0.4, 0.4))
    figure.savefig(folder / "one.png")
    script = f'cp {folder}/one.png "$3/{EVIL[:8]}.png"; cp {folder}/one.png "$3/two.png"; echo $2'
    command = f"sh -c '{script} | sed s/raw/9/' sh {{weights}} {{sigma_rel}} {{dir}}"
    run = Run(folder / "step-*.safetensors")
    out = folder / "sweep"
    axis = Axis.of_values("sigma_rel", [0.1, 0.05, 0.2])
    Sweep(run, command, Metric(), out, axis, minimize=False).run_all()
    page = folder / "report.html"
    page.write_text(render(run, [out], page))
    return page


def test_a_page_shows_the_images_of_each_length_after_those_of_raw_weights(looks: Path) -> None:
    page = Page(looks.read_text())
    image = base64.b64encode((looks.parent / "one.png").read_bytes()).decode()
    shown = [one for one in page.all("img") if one["src"].startswith("data:image/png")]
    assert {one["src"] for one in shown} == {f"data:image/png;base64,{image}"}
    assert [one["alt"] for one in shown] == [f"{EVIL[:8]}.png", "two.png"] * 4
    titles = re.findall(r"(?:raw weights|sigma_rel 0\.\d+), metric \d\S*", page.text)
    assert titles == [
        "raw weights, metric 9",
        "sigma_rel 0.05, metric 0.05",
        "sigma_rel 0.1, metric 0.1",
        "sigma_rel 0.2, metric 0.2",
    ]
    text = " ".join(page.text.split())
    assert "Best: sigma_rel 0.2 98 % worse than the raw weights metric: 0.2." in text


def test_of_many_large_images_a_page_shows_the_first_of_each_length(
    looks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = (looks.parent / "one.png").stat().st_size
    monkeypatch.setattr("posthoc_cli.report.page._MOST_IMAGES", 4 * size)
    text = render(Run(looks.parent / "step-*.safetensors"), [looks.parent / "sweep"], looks)
    assert text.count("data:image/png") == 4
    assert text.count("; 1 more are in") == 4


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
def test_in_a_browser_a_slider_and_arrow_keys_choose_the_length(
    looks: Path,
    tmp_path: Path,
) -> None:
    backgrounds = set()
    with browser(tmp_path) as page:
        for width, is_dark in ((400, False), (1200, True)):
            page.open(looks, width, is_dark)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(f"{ALL}.filter({SCROLLS}).length") == 0
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            copied = page.evaluate(COPIED)
            assert re.fullmatch(r"ema synthesize \S+ --sigma-rel 0\.2 --out \S+", copied)
            widths = page.evaluate(f"{ALL}.filter(one => one.title).map(one => one.clientWidth)")
            assert max(widths) > width / 4  # two images share the width of the page
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


def choose_lengths(page: Browser) -> None:
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


def test_a_page_needs_no_sweep_and_replaces_none_unasked(ema: Ema, tmp_path: Path) -> None:
    run = twenty_snapshots(tmp_path / "run", {"a": (3,)})
    out = tmp_path / "report.html"
    done = ema("report", run.directory, "--out", out)
    assert done.code == 0
    assert done.out == f"wrote {out}\n"
    assert ema("report", run.directory, "--out", out).code == 1
    page = Page(out.read_text())
    assert "The run" in page.text
    assert "Best:" not in page.text


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("sigma_rel", {"t": 12}, r"--sigma-rel 0\.1 --t 12 --out model.safetensors"),
        ("decay:linear", {}, r"--target decay:linear:0\.1 --out model.safetensors"),
    ],
)
def test_the_command_of_a_page_makes_the_same_average(
    ema: Ema,
    swept: tuple[Run, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    options: Any,
    words: str,
) -> None:
    run, _ = swept
    sweep(run, tmp_path / "out", Axis.of_values(kind, [0.1, 0.2, 0.25]), **options)
    page = Page(render(run, [tmp_path / "out"], tmp_path / "page.html"))
    assert f"Best: {kind}" in page.text
    (command,) = re.findall(r"ema (synthesize .*)", page.text)
    assert re.search(f"{words}$", command)
    monkeypatch.chdir(tmp_path)
    assert ema(*shlex.split(command)).code == 0
    made = Path("model.safetensors").read_bytes()
    assert made == Path("out/best.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", None),
        ("trials", [{}]),
        ("estimate", 10**400),
        ("best", {}),
        ("axis", 1),
        ("metric", "a\ud800"),
    ],
)
def test_a_file_that_is_no_result_of_a_sweep_is_refused(
    swept: tuple[Run, Path],
    tmp_path: Path,
    name: str,
    value: Any,
) -> None:
    run, out = swept
    result = json.loads((out / "sweep.json").read_text())
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(result | {name: value}))
    with refused(str(path), "no result of a sweep", kind=FileFormatError):
        render(run, [tmp_path])


def test_two_runs_and_two_sweeps_are_compared_on_one_page(
    ema: Ema,
    swept: tuple[Run, Path],
    tmp_path: Path,
) -> None:
    run, out = swept
    other = twenty_snapshots(tmp_path / "other", {"a": (30, 10)}, run_id="0123" * 8)
    second_out = tmp_path / "s"
    axis = Axis.of_values("sigma_rel", [0.1, 0.2, 0.25])
    sweep(other, second_out, axis, again="ema sweep the other")
    both = [run.directory, other.directory, "--sweep", second_out, "--sweep", out]
    done = ema("report", *both, "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    page = Page((tmp_path / "page.html").read_text())
    for folder in (second_out, out):
        result = json.loads((folder / "sweep.json").read_text())
        best = result["best"]["target"]
        assert re.search(rf"{re.escape(str(folder))} +{re.escape(best)}", page.text)
    _, _, details = page.text.partition("How exact each run")
    first, second = details.split(f" {other.directory} ", 1)
    assert "ended with exit code 1" in first
    assert "ended with exit code 1" not in second
    with refused(str(second_out / "sweep.json"), "another run", kind=MismatchError):
        render(run, [out, second_out])


ARCHIVED = """
import sys
for name in [*sys.modules]:
    if name.startswith("posthoc_cli"):
        del sys.modules[name]
sys.path.insert(0, "archive.zip")
import posthoc_cli
assert "archive.zip" in posthoc_cli.__file__
"""


def test_a_page_is_made_by_a_package_in_an_archive(tmp_path: Path) -> None:
    write_run(tmp_path / "run", random_walk(20, {"a": (3,)}), range(1, 21))
    package = Path(posthoc_cli.__file__).parent
    shutil.make_archive(str(tmp_path / "archive"), "zip", package.parent, package.name)
    forked.check(ARCHIVED + forked.EMA, "report", "run", "--out", "page.html", cwd=tmp_path)
    assert "</html>" in (tmp_path / "page.html").read_text()

"""`ema guide`: show a guide, or list the guides."""

from __future__ import annotations

import importlib.resources
import os
import sys

from typer import Argument

from posthoc_cli.cli import options, output
from posthoc_cli.errors import check_word

_WIDEST_GUIDE = 120


def _read_guides() -> dict[str, str]:
    """Read the Markdown source of each guide by name."""
    pages = (importlib.resources.files("posthoc_cli") / "guides").iterdir()
    return {
        page.name[:-3]: page.read_text("utf-8")
        for page in sorted(pages, key=lambda page: page.name)
    }


def guide(
    name: str | None = Argument(None, metavar="NAME", help="The guide (default: a list)."),
    as_json: bool = options.JSON,
) -> None:
    """Show a guide, or list the guides.

    On a terminal the guide is rendered and shown in the pager; in a pipe the Markdown source is
    printed.
    """
    guides = _read_guides()
    if name is not None:
        check_word("guide", name, guides)
    rows = []
    for page in guides if name is None else [name]:
        # A guide begins with a line such as "# Training: record averages while a model trains".
        title, *_ = guides[page].splitlines()
        _, _, about = title.partition(": ")
        rows.append({"guide": page, "about": about})
    if as_json:
        if name is not None:
            rows[0]["text"] = guides[name]
        output.print_json({"guides": rows})
    elif name is None:
        output.print_rows(rows, ["guide", "about"])
    elif not sys.stdout.isatty():
        output.write(guides[name])
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        # show colours, and quit at once if the text fits the screen
        os.environ.setdefault("LESS", "-RFX")
        console = Console(width=min(Console().width, _WIDEST_GUIDE))
        with console.pager(styles=True):
            console.print(Markdown(guides[name], hyperlinks=False))

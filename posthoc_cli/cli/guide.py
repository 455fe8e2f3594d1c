"""`ema guide`: the documentation in the terminal, offline."""

from __future__ import annotations

import os
import sys
from importlib.resources import files

from typer import Argument

from posthoc_cli.cli import options, output
from posthoc_cli.errors import check_word

EPILOG = "Example:  ema guide training"
WIDEST = 120


def _read_guides() -> dict[str, str]:
    """Return the Markdown source of each guide by name."""
    pages = (files("posthoc_cli") / "guides").iterdir()
    return {page.name[:-3]: page.read_text("utf-8") for page in sorted(pages, key=lambda page: page.name)}


def _names(incomplete: str) -> list[str]:
    return [name for name in _read_guides() if name.startswith(incomplete)]


def guide(
    name: str | None = Argument(None, metavar="NAME", autocompletion=_names, help="The guide; default: list all."),
    as_json: bool = options.JSON,
) -> None:
    """Show a guide, or list the guides.

    On a terminal the guide is rendered and shown in the pager; in a pipe the Markdown source is printed.
    """
    guides = _read_guides()
    if name is not None:
        check_word("guide", name, guides)
    # Each guide begins with a line such as "# Training: record averages while a model trains".
    about = {page: source.splitlines()[0].partition(": ")[2] for page, source in guides.items()}
    if as_json:
        chosen = guides if name is None else [name]
        text = {} if name is None else {"text": guides[name]}
        output.print_json({"guides": [{"guide": page, "about": about[page]} | text for page in chosen]})
    elif name is None:
        output.print_rows([{"guide": page, "about": said} for page, said in about.items()], ["guide", "about"])
    elif not sys.stdout.isatty():
        output.write(guides[name])
    else:
        from rich.console import Console
        from rich.markdown import Markdown

        os.environ.setdefault("LESS", "-RFX")  # show colours, and quit at once if the text fits the screen
        console = Console(width=min(Console().width, WIDEST))
        with console.pager(styles=True):
            console.print(Markdown(guides[name], hyperlinks=False))

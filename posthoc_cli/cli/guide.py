"""`ema guide`: the documentation in the terminal, offline."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Annotated

import typer

from posthoc_cli.cli import output
from posthoc_cli.errors import InvalidValueError

EPILOG = "Example:  ema guide training"
WIDEST = 120


def _read_guides() -> dict[str, str]:
    """Markdown source of each guide, by name."""
    pages = (files("posthoc_cli") / "guides").iterdir()
    return {page.name[:-3]: page.read_text("utf-8") for page in sorted(pages, key=lambda page: page.name)}


def _names(incomplete: str) -> list[str]:
    return [name for name in _read_guides() if name.startswith(incomplete)]


def guide(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", autocompletion=_names, help="The guide; default: list all.")
    ] = None,
) -> None:
    """Show a guide, or list the guides.

    On a terminal the page is rendered; in a pipe it is the Markdown source.
    """
    guides = _read_guides()
    if name is None:
        output.print_table(["guide", "about"], [_row(*page) for page in guides.items()], left=["guide", "about"])
    elif name not in guides:
        raise InvalidValueError("guide", f"must be one of {', '.join(guides)}", value=name)
    elif sys.stdout.isatty():
        _render(guides[name])
    else:
        sys.stdout.write(guides[name])


def _row(name: str, source: str) -> list[str]:
    """Name and subject, from a first line such as "# Training: record averages while a model trains"."""
    return [name, source.splitlines()[0].partition(": ")[2]]


def _render(source: str) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=min(Console().width, WIDEST)).print(Markdown(source, hyperlinks=False))

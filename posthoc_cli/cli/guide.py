"""`ema guide`: show a guide, or list the guides."""

from __future__ import annotations

import importlib.resources
import os
import re
import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

from typer import Argument

from posthoc_cli.cli import options, output
from posthoc_cli.errors import check_word

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDEST_GUIDE = 120
_GROUPS = {
    "Guides": (
        "gain", "training", "trainers", "distributed", "checkpoints", "sweep", "synthesis",
        "exactness", "troubleshooting",
    ),
    "Reference": ("layouts", "averages", "snapshots"),
}  # fmt: skip


def _read_guides() -> dict[str, str]:
    """Read the Markdown source of each guide by name."""
    room = importlib.resources.files("posthoc_cli") / "guides"
    names = chain(*_GROUPS.values())
    return {name: (room / f"{name}.md").read_text("utf-8") for name in names}


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
    for group, pages in _GROUPS.items():
        for page in pages:
            # A guide begins with a line such as "# Training: record averages while a model trains".
            title, *_ = guides[page].splitlines()
            _, _, about = title.partition(": ")
            rows.append({"guide": page, "about": about, "group": group})
    if as_json:
        if name is not None:
            rows = [row | {"text": guides[name]} for row in rows if row["guide"] == name]
        output.print_json({"guides": rows})
    elif name is None:
        _print_list(rows)
    elif not sys.stdout.isatty():
        output.write(guides[name])
    else:
        from rich.console import Console

        # show colours, and quit at once if the text fits the screen
        os.environ.setdefault("LESS", "-RFX")
        console = Console(width=min(Console().width, _WIDEST_GUIDE))
        with console.pager(styles=True):
            console.print(render(guides[name]), crop=False)


def _print_list(rows: list[dict[str, Any]]) -> None:
    listed = []
    for group in _GROUPS:
        listed.append({"guide": f"{group}:"})
        for row in rows:
            if row["group"] == group:
                listed.append({"guide": f"  {row['guide']}", "about": row["about"]})
    output.print_rows(listed, ["guide", "about"])


def render(page: str) -> RenderableType:
    """Render a guide for a terminal: lines of code and words in tables stay whole, so that they can
    be copied, links to guides are commands, and pictures their descriptions."""
    from rich.markdown import CodeBlock, Markdown, TableElement
    from rich.table import Table
    from rich.text import Text

    class Code(CodeBlock):
        def __rich_console__(self, *_: object) -> Any:
            for line in str(self.text).splitlines():
                yield Text(f" {line}", style="bold", no_wrap=True, overflow="ignore")

    class Rows(TableElement):
        def __rich_console__(self, *arguments: Any) -> Any:
            for table in super().__rich_console__(*arguments):
                if isinstance(table, Table):
                    for column in table.columns:
                        column.overflow = "fold"
                yield table

    class Page(Markdown):
        elements = Markdown.elements | {"fence": Code, "table_open": Rows}

    page = re.sub(r"\[(\w+)\]\(\1\.md\)", r"`ema guide \1`", page)
    page = re.sub(r"!\[(.+)\]\(.+\)", r"*Picture: \1*", page)
    return Page(page, hyperlinks=False)

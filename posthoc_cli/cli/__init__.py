"""The command `ema`: a file a command, each of which parses, calls and prints.

Nothing here loads torch or matplotlib before a command needs it, so that help is instant.
"""

from __future__ import annotations

import functools
import io
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any, NoReturn

import typer

import posthoc_cli
from posthoc_cli import files
from posthoc_cli.cli import demo, error_plot, export, guide, info, output, plan, profile, prune, synthesize, verify
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    PostHocError,
    VanishedError,
    printable,
)

# typer brings its own click or uses the installed one, depending on its release; this is the base class of all
# mistakes on the command line in either.
_USAGE_ERROR: Any = typer.BadParameter.__base__
_DEBUG = "--debug"
_LONGEST_LINE = 5_000

_HYPHEN = "\u2011"  # one that text is not wrapped at
_CONTEXT: Any = typer.core.TyperCommand.context_class


class _Formatter(_CONTEXT.formatter_class):  # type: ignore[misc]
    """Help in which no line ends within --sigma-range or posthoc-cli."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Sequence[tuple[str, str]], *widths: int, **spacing: int) -> None:
        super().write_dl([(term, text.replace("-", _HYPHEN)) for term, text in rows], *widths, **spacing)

    def getvalue(self) -> str:
        return str(super().getvalue()).replace(_HYPHEN, "-")


class _Context(_CONTEXT):  # type: ignore[misc]
    formatter_class = _Formatter


class _Command(typer.core.TyperCommand):
    context_class = _Context


class _Group(typer.core.TyperGroup):
    context_class = _Context


app = typer.Typer(
    name="ema",
    cls=_Group,
    help="Choose the length of a model's weight average after training.",
    epilog="Example:  ema synthesize run/ema --sigma-rel 0.15 --out model.safetensors",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _leading_to_verify(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, which where something in a directory that it reads is broken says how to go on."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        try:
            command(**options)
        except VanishedError:
            raise
        except (FileFormatError, MismatchError) as error:
            for directory in [options.get("directory"), *(options.get("directories") or ())]:
                if directory is not None and str(error).startswith(f"{files.expanded(directory)}{os.sep}"):
                    hint = f"`ema verify {directory}` checks every file, and with --repair sets aside what is broken"
                    raise error.with_hint(hint) from error
            raise

    return run


for _module in (synthesize, error_plot, info, verify, export, plan, prune, profile, demo, guide):
    app.command(cls=_Command, epilog=_module.EPILOG)(_leading_to_verify(_module.COMMAND))


def _names(incomplete: str) -> list[str]:
    """What a shell offers as the name of a command."""
    return [name for name in _commands() if name.startswith(incomplete)]


@app.command("help", cls=_Command, epilog="Example:  ema help synthesize")
def _help(
    context: typer.Context,
    command: Annotated[
        str | None, typer.Argument(metavar="[COMMAND]", autocompletion=_names, help="The command; all by default.")
    ] = None,
) -> None:
    """Show the help of a command, or of all."""
    root: Any = context.find_root().command
    root.main([*([] if command is None else [command]), "--help"], prog_name="ema", standalone_mode=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ema {posthoc_cli.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show a traceback when something goes wrong.")] = False,
) -> None:
    """Choose the length of a model's weight average after training."""


def main() -> NoReturn:
    """Run the command line and exit.

    0: done. 1: the run failed, or what was checked is not in order. 2: the command line is wrong: an unknown option, a
    value that cannot be, a path that does not exist or is of another kind, an output whose folder does not exist.
    130: interrupted. 141: the reader of the output has gone, as `head` does.
    """
    arguments = sys.argv[1:] or ["--help"]
    debug = _DEBUG in arguments
    sys.excepthook = _show_traceback if debug else _report_unexpected
    output.log_to_stderr(False)
    warnings.showwarning = _show_warning
    # Streams that the caller has closed.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # of names that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    _clean_up_on_signals()
    _allow_many_files()
    try:
        # Not app(...): that would put typer's own excepthook in the place of ours.
        command: Any = typer.main.get_command(app)
        code = command.main([a for a in arguments if a != _DEBUG], prog_name="ema", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except PostHocError as error:
        if debug:
            raise
        message = str(error).replace("overwrite=True", "--force")
        code = _fail(_as_options(message) if isinstance(error, InvalidValueError) else message, error.exit_code)
    except BrokenPipeError:
        code = _reader_has_gone()
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):  # which the parser makes an exit code 1 of
            raise
        code = _reader_has_gone()
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"{where}{(error.strerror or str(error)).lower()}", 1)
    except typer.Abort:
        code = 130
    except _USAGE_ERROR as error:
        code = _fail(f"{error.format_message()}{_see_help(error)}", 2)
    if code == 130:
        print("ema: interrupted", file=sys.stderr)  # noqa: T201
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    _print_message("error", message)
    return code


def _print_message(kind: str, message: str) -> None:
    """One line, with what steers a terminal escaped, and not longer than the longest path and a sentence."""
    line = printable(" ".join(message.split()))
    print(f"ema: {kind}: {line[:_LONGEST_LINE]}{'...' * (len(line) > _LONGEST_LINE)}", file=sys.stderr)  # noqa: T201


def _report_unexpected(kind: type[BaseException], error: BaseException, _: object) -> None:
    _fail(f"unexpected {kind.__name__}: {error}; run again with {_DEBUG} to see where, and report it", 1)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        print(printable(line), file=sys.stderr)  # noqa: T201


def _see_help(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return "" if context is None else f" (see {context.command_path} --help)"


def _reader_has_gone() -> int:
    """Let the interpreter close a stream that works; the exit code of a process that SIGPIPE ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + 13


def _as_options(message: str) -> str:
    """A message about arguments, "sigma_rel 0.4: ..." or "t and step: ...", said of the options of these names."""
    match = re.match(r"[a-z_]+\b(?:(?:, | and )[a-z_]+\b)*", message)
    if match is None:
        return message
    known = _option_names()
    subject = re.sub(
        r"[a-z_]+", lambda name: f"--{name[0].replace('_', '-')}" if name[0] in known else name[0], match[0]
    )
    return subject + message[match.end() :]


def _commands() -> dict[str, Any]:
    root: Any = typer.main.get_command(app)
    return dict(root.commands)


def _option_names() -> set[str]:
    return {
        name.removeprefix("--").replace("-", "_")
        for command in _commands().values()
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--")
    }


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _print_message("warning", str(message))


def _allow_many_files() -> None:
    """As many open files as the system grants: a run may have more snapshots than the usual 1,024."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if most == resource.RLIM_INFINITY else min(65_536, most)
    with suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), most))


def _clean_up_on_signals() -> None:
    """End as after an error, with nothing left behind: when told to, and when the terminal goes away."""
    signal.signal(signal.SIGTERM, _terminate)
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup wants it
        signal.signal(hangup, _terminate)


def _terminate(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)

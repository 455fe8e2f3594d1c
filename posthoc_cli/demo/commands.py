"""The `ema` commands that a demo runs: told first, as a reader would type them, then run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable

from posthoc_cli.errors import PostHocError

Say = Callable[[str], None]
"""Takes a line that a reader should see."""


class Commands:
    """Runs `ema` in a process of its own, and remembers what was run.

    Attributes:
        lines: the commands so far, quoted for a shell; they hold in the current directory.
    """

    def __init__(self, say: Say) -> None:
        self.lines: list[str] = []
        self._say = say

    def run(self, *arguments: str) -> None:
        """Run `ema` with `arguments` and tell what it prints.

        Raises:
            PostHocError: it ended with an exit code other than 0.
        """
        line = shlex.join(["ema", *arguments])
        self._say("")
        self._say(f"$ {line}")
        command = [sys.executable, "-m", "posthoc_cli", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                out, err = process.communicate()
            except BaseException:
                process.terminate()  # and not kill, as subprocess.run does: it would leave half of what it writes
                raise
        for printed in (out + err).splitlines():
            self._say(printed)
        if process.returncode != 0:
            raise PostHocError(f"`{line}`", f"ended with exit code {process.returncode}")
        self.lines.append(line)

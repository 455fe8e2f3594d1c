"""Try an installed wheel as a newcomer: its version, guides and demo, and the code and commands of the README.

    python scripts/try_wheel.py README.md

Runs in an empty folder, with the interpreter of an environment that has the wheel and no copy of the repository.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import posthoc_cli


def main() -> None:
    """Run everything in turn; stop at the first failure."""
    page, package = Path(sys.argv[1]).resolve(), Path(posthoc_cli.__file__).parent
    assert package.parent.name == "site-packages", f"{package} is not an installed wheel"
    blocks = re.findall(r"^```(python|console)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        run(folder, "ema", "--version")
        run(folder, "ema", "guide", "training")
        run(folder, "ema", "demo", "--steps", "300", "--out", "demo")
        for language, text in blocks:
            name = text.partition("\n")[0].removeprefix("# ")
            if language == "python":
                Path(folder, name).write_text(text)
        for language, text in blocks:
            for line in re.findall(r"^\$ (.*?)\s*(?:#.*)?$", text, re.MULTILINE) if language == "console" else ():
                run(folder, *shlex.split(line))
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    print(f"posthoc-cli {posthoc_cli.__version__} works with {versions}")


def run(folder: str, program: str, *arguments: str) -> None:
    """Run the installed command, or Python."""
    programs = Path(sys.executable).parent
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment
    print("$", program, *arguments, flush=True)
    subprocess.run(
        [str(programs / program), *arguments],
        cwd=folder, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path},
    )  # fmt: skip


if __name__ == "__main__":
    main()

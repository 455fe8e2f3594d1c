"""`python -m posthoc_cli` is the command `ema`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; Ctrl-C is no traceback also while the imports go on."""
    try:
        from posthoc_cli.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("ema: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

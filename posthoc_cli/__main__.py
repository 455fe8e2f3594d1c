"""`python -m posthoc_cli` is the command `ema`."""

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, without a traceback on Ctrl-C, also during imports and at the end of
    the interpreter."""
    try:
        from posthoc_cli.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("ema: interrupted\n")
        sys.exit(130)
    finally:
        # All work is done or undone. Libraries take a while to unload, and would print a traceback
        # for each signal.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()

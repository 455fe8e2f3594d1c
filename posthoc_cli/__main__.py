"""`python -m posthoc_cli` is the command `ema`."""

from posthoc_cli.cli import main

if __name__ == "__main__":
    main()

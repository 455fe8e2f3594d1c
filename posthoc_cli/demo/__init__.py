"""The training that `ema demo` runs, and what it does with the snapshots afterwards.

    digits.py     the images
    denoiser.py   the network and its loss
    training.py   the training loop with the hook, and averages tracked directly beside it
    folder.py     the folder that everything goes to
    commands.py   the `ema` commands that are run on it
    measuring.py  validation losses, and distances between weights
    job.py        the whole job, in order

Nothing here prints: what there is to say goes to a function that the caller gives.
"""

from posthoc_cli.demo.job import Result, run

__all__ = ["Result", "run"]

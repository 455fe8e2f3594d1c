"""The processes of a torchrun job, which make outputs together."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from posthoc_cli.errors import (
    RankError,
)
from posthoc_cli.group import Group


def is_rank() -> bool:
    """Return whether this process is one of several ranks of a torchrun job."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(map(os.environ.get, names)) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def all_ranks() -> Iterator[Group]:
    """Connect the ranks of a torchrun job for the block; raise RankError if they do not meet."""
    wait = timedelta(minutes=30)  # for other ranks to begin, or to finish their current shards
    # or torch prints a stack trace when a rank has died
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    is_own = not dist.is_initialized()
    try:
        if is_own:
            dist.init_process_group("gloo", timeout=wait)
        group = dist.new_group(backend="gloo", timeout=wait)
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        reason = f"did not meet by torch.distributed: {line[:200]}"
        raise RankError("the processes of this job", reason) from error
    if dist.get_rank():  # the first rank logs for all
        logging.getLogger("posthoc_cli").setLevel(logging.ERROR)
    try:
        yield Group(dist.get_rank(), tuple(range(dist.get_world_size())), processes=group)
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group(None if is_own else group)

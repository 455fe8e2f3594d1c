"""The environment that accelerate expects in the processes of `groups`, and its FSDP without an accelerator."""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def announce(rank: int, world: int) -> None:
    """Set the environment as a launcher does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def use_fsdp_on_the_cpu() -> None:
    """Let accelerate shard models on the CPU: it can, but accepts its FSDP plugin for accelerators only."""
    real = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init

"""Trainings in separate processes, which can be killed, and what accelerate expects of a group."""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from forked import Forked

FRAMEWORKS = ("accelerate", "diffusers", "lightning.pytorch", "transformers.trainer")
"""What processes have imported when they start: that takes ten seconds of processor time."""


def start(program, *arguments, **environment):
    """Start a program of Python, or a module of this folder by its name."""
    if program.isidentifier():
        options = f"'integrations.{program}', run_name='__main__', alter_sys=True"
        program = f"import runpy; runpy.run_module({options})"
    return Forked(program, *arguments, env=os.environ | environment, modules=FRAMEWORKS)


def exit_codes_of_two(program, *arguments, **environment):
    """Run a program in two processes, which meet at a store of this one; print their errors."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment |= {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the first process opens no store of its own
    }
    processes = []
    for rank in "01":
        own = environment | {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(start(program, *arguments, **own))
    for process in processes:
        _, errors = process.communicate(250)
        print(errors)
    return [process.wait() for process in processes]


def task():
    """Return what this program is asked for: see `train`."""
    warnings.simplefilter("ignore")
    folder, kind, resumes = sys.argv[1:]
    return Path(folder), kind, resumes == "True"


def train(program, folder, kind, resumes):
    """Run a module of this folder, "alone" or in two processes that are replicas ("ddp") or have a
    "sharded" model. It kills itself unless it resumes.

    Each process saves to `made-RANK.pt` the weights after each step, the live average, the number
    of updates, the weights that were evaluated last, and a step with the weights in its checkpoint;
    before it kills itself, the first of these only. Return the exit codes.
    """
    if kind == "alone":
        return [start(program, folder, kind, resumes).wait(250)]
    return exit_codes_of_two(program, folder, kind, resumes)


def end(folder, weights):
    """Save the weights after each step, and kill this process."""
    torch.save(weights, folder / f"before-{os.environ.get('RANK')}.pt")
    os.kill(os.getpid(), signal.SIGKILL)


def forget():
    """Reset the state that accelerate's objects share, as in a new process."""
    module = sys.modules.get("accelerate.state")
    if module is not None:
        module.AcceleratorState._reset_state()
        module.GradientState._reset_state()
        module.PartialState._reset_state()


def use_fsdp_on_the_cpu():
    """Let accelerate shard models on the CPU: it can, but accepts its FSDP plugin for accelerators
    only."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init

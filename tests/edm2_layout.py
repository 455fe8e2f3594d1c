"""Pickles in the layout of EDM2's training: a dict of objects whose classes carry their own source.

The classes are made here, to the same layout: an object is rebuilt by a call with its source and
its state, where unpickling in Python would run that source.
"""

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn


class EasyDict(dict[str, Any]):
    """A dict that is pickled with its class."""


class Persistent(nn.Module):
    """A module that is pickled with its source."""

    def __reduce__(self) -> tuple[Any, ...]:
        meta = EasyDict(
            type="class",
            version=6,
            module_src=SOURCE,
            class_name=type(self).__name__,
            state=self.__dict__,
        )
        return _reconstruct_persistent_obj, (meta,)


SOURCE = "raise SystemExit('the source of a pickle was executed')"


def _reconstruct_persistent_obj(meta: EasyDict) -> None:
    raise SystemExit("a pickle was executed")


def network() -> nn.Module:
    inner = Persistent()
    inner.weight = nn.Parameter(torch.randn(20, 30))
    inner.register_buffer("freqs", torch.randn(7))
    net = Persistent()
    net.unet = Persistent()
    net.unet.enc = nn.ModuleDict({"64x64_conv": inner, "norm": nn.Linear(3, 2)})
    net.logvar = inner
    return net


def save(
    path: Path,
    net: nn.Module,
    half: bool = True,
    under: str = "ema",
    **others: nn.Module,
) -> None:
    """Write a pickle of EDM2; or of EDM or StyleGAN, which do not round, and have other networks in
    it."""
    modules = {
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib.util": {"EasyDict": EasyDict},
    }
    for name, values in modules.items():  # under the names of the training's modules
        module = types.ModuleType(name)
        for key, value in values.items():
            value.__module__ = name
            value.__qualname__ = key
            setattr(module, key, value)
        sys.modules[name] = module
    sys.modules["torch_utils"], sys.modules["dnnlib"] = (
        types.ModuleType("torch_utils"),
        types.ModuleType("dnnlib"),
    )
    content = EasyDict(
        encoder=Persistent(), dataset_kwargs=EasyDict(path="x.zip"), loss_fn=Persistent(), **others
    )
    content[under] = net.half() if half else net
    try:
        path.write_bytes(pickle.dumps(content))
    finally:
        for name in ("torch_utils", "dnnlib", *modules):
            del sys.modules[name]

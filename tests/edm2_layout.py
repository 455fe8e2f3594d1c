"""Pickles in the layout of EDM2's training: a dict of objects whose classes carry their own source.

The classes are made here, to the same layout: an object is rebuilt by a call with its source and
its state, where unpickling in Python would run that source.
"""

import pickle
import sys
import types
from typing import Any
from unittest import mock

import torch
from torch import nn


class EasyDict(dict[str, Any]):
    """A dict that is pickled with its class."""


class Persistent(nn.Module):
    """A module that is pickled with its source."""

    def __reduce__(self):
        meta = EasyDict(
            type="class",
            version=6,
            module_src=SOURCE,
            class_name=type(self).__name__,
            state=self.__dict__,
        )
        return _reconstruct_persistent_obj, (meta,)


SOURCE = "raise SystemExit('the source of a pickle was executed')"


def _reconstruct_persistent_obj(meta):
    raise SystemExit("a pickle was executed")


def network():
    inner = Persistent()
    inner.weight = nn.Parameter(torch.randn(20, 30))
    inner.register_buffer("freqs", torch.randn(7))
    net = Persistent()
    net.unet = Persistent()
    net.unet.enc = nn.ModuleDict({"64x64_conv": inner, "norm": nn.Linear(3, 2)})
    net.logvar = inner
    return net


MODULES = {
    "dnnlib": types.ModuleType("dnnlib"),
    "dnnlib.util": types.ModuleType("dnnlib.util"),
    "torch_utils": types.ModuleType("torch_utils"),
    "torch_utils.persistence": types.ModuleType("torch_utils.persistence"),
}
"""The training's modules, which pickles name."""
for value, name in (
    (EasyDict, "dnnlib.util"),
    (_reconstruct_persistent_obj, "torch_utils.persistence"),
):
    value.__module__ = name
    setattr(MODULES[name], value.__name__, value)


def save(path, net, half=True, under="ema", **others):
    """Write a pickle of EDM2; or of EDM or StyleGAN, which do not round, and have other networks in
    it."""
    content = EasyDict(
        encoder=Persistent(), dataset_kwargs=EasyDict(path="x.zip"), loss_fn=Persistent(), **others
    )
    content[under] = net.half() if half else net
    with mock.patch.dict(sys.modules, MODULES):
        path.write_bytes(pickle.dumps(content))

"""The device of the tests marked `cuda`: CUDA's, or the simulated one if EMA_DEVICE is "sim"."""

import os

import torch
from accelerator import simulator

DEVICE = os.environ.get("EMA_DEVICE", "cuda")
IS_SIMULATED = DEVICE == "sim"
if IS_SIMULATED:
    simulator.load()
MODULE = getattr(torch, DEVICE)

"""Checkpoints and averages that other programs wrote, as sources of a synthesis. Nothing in a file is executed.

A file is read once for its index: where in it the bytes of each tensor are. A synthesis then streams these bytes, as it
does those of snapshots. `pickles` finds the tensors of pickled files, `tensor_files` those of any file, `layouts` those
of a model in one file or several, `steps` when it was saved. `ordinary` finds EMAs, `kinds` knows what other programs
store, and makes `checkpoint`s of it. `opening` makes a run of these. `importing` is what `ema import` does, `imported`
what it leaves. `audit` says whether an average is what it claims to be, by the decays that `fitting` finds.
"""

KINDS = (
    "edm2", "ema-pytorch", "posthoc-ema", "torchtitan", "diffusers-ema", "timm", "lightning-ema", "averaged-model",
    "ema-pytorch-ema", "lit-ema", "torch-ema", "mmengine", "edm", "ema", "checkpoints",
)  # fmt: skip
"""The kinds of `kinds.TABLE`; `checkpoints` are files or folders of weights, also of LoRA series."""

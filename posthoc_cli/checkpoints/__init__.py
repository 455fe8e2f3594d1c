"""Checkpoints and averages that other programs wrote, as sources of a synthesis. Nothing in a file is executed.

    read_pickle, read_model, read_step    where in a file the bytes of each tensor are, those of a model, when
    source, formats                       a checkpoint to average from, and what is told of it; what programs store
    open_run                              all that are in a folder, as one run
    import_run, import_files              what `ema import` does, and what it leaves
    audit, audit_decay                    is an average what it claims to be, and which decay has it

A file is read once for its index; a synthesis then streams the bytes of its tensors, as it does those of snapshots.
"""

KINDS = (
    "edm2", "ema-pytorch", "posthoc-ema", "torchtitan", "diffusers-ema", "timm", "lightning-ema", "averaged-model",
    "ema-pytorch-ema", "lit-ema", "torch-ema", "mmengine", "edm", "ema", "checkpoints",
)  # fmt: skip
"""The kinds of `formats.TABLE`; `checkpoints` are files or folders of weights, also of LoRA series."""

"""Checkpoints and averages that other programs wrote, as sources of a synthesis. Nothing in a file is executed.

    read_pickle, read_model, read_step              where in a file the bytes of each tensor are, those of a model, when
    formats, ema_formats, settings                  what other programs store, and what must be told of it
    source, open_run                                a checkpoint to average from; all that are in a folder
    import_run, import_manifest, import_copies      what `ema import` does, and what it leaves
    audit, audit_case, audit_decay, audit_together  is an average what it claims to be, and which decay has it

A file is read once for its index; a synthesis then streams the bytes of its tensors, as it does those of snapshots.
"""

KINDS = (
    "edm2", "ema-pytorch", "posthoc-ema", "torchtitan", "diffusers-ema", "timm", "lightning-ema", "averaged-model",
    "ema-pytorch-ema", "lit-ema", "torch-ema", "mmengine", "edm", "ema", "checkpoints",
)  # fmt: skip
"""The kinds of `formats.TABLE`; `checkpoints` are files or folders of weights, also of LoRA series."""

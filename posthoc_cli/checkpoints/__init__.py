"""Checkpoints and averages that other programs wrote, as sources of a synthesis. Nothing in a file
is executed.

    programs                    the names of values, files and folders that programs use
    pickles, content            the tensors and values of a file or folder
    sets, clock                 the weights and an average among them; the times of files
    settings, updates           what an import adds to files; how an ordinary EMA was updated
    source, layouts             a checkpoint as a source; what programs write
    open_run                    all checkpoints of a folder as one run
    import_run, manifest        the work of `ema import`, and its output
    audit, audit_decay          the check of an average, and the search for its decay

A file is read once for its index; a synthesis then streams the bytes of its tensors, as it does
those of snapshots.
"""

KINDS = (
    "edm2", "ema-pytorch", "posthoc-ema", "torchtitan", "diffusers-ema", "lightning-ema",
    "averaged-model", "ema-pytorch-ema", "torch-ema", "mmengine", "mmcv", "edm", "ultralytics",
    "audiocraft", "composer", "ema", "checkpoints",
)  # fmt: skip
"""The kinds of files; `checkpoints` are files or folders of weights, also of LoRA series.
"""

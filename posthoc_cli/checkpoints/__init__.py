"""Checkpoints and averages that other programs wrote, opened as sources of a synthesis. Nothing in a file is executed.

A file is read once for its index: where in it the bytes of each tensor are. A synthesis then streams these bytes, as it
does those of snapshots. `archives` finds the tensors of pickled files, `tensor_files` those of any file,
`contents` those of a model in one file or several; `opening` knows how libraries name files, steps and tensors, and
makes a run of `checkpoint`s. `imported` is what `ema import` does.
"""

KINDS = ("snapshots", "checkpoints", "dcp", "torchtitan", "ema-pytorch", "posthoc-ema", "edm2")
"""What may be opened; `checkpoints` are files or folders of weights, also of LoRA series."""

NUMBERED = ("ema-pytorch", "posthoc-ema")
"""Those whose files name an average by its number: its width and update_every must be given."""

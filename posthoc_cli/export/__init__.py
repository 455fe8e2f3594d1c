"""Outputs on disk: of a synthesis, in one process or in the ranks of a torchrun job, and of an
export.

`options` says what the user wants, and names the outputs. `writing` makes the tensors and writes
them to `outputs`, one class a layout, or to a copy of a checkpoint (`like`). `convert` exports a
model. An output appears complete or not at all.
"""

"""Outputs on disk: of a synthesis, in one process or in the ranks of a torchrun job, and of an
export.

`writing` says what a user may want, makes the tensors and writes them to outputs, one class a
layout; `like` is the checkpoint that a copy is made of. `convert` exports a model. An output
appears complete or not at all.
"""

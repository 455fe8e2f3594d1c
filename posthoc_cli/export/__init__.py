"""Outputs: one safetensors file, shards with an index, a .pt state dict, a DCP folder, a copy of a model folder.

`writing.Outputs` writes averages of a run, in one process or in the ranks of a torchrun job; `convert.export_file`
writes models in another layout. A sink takes tensors, and its output appears complete or not at all.
"""

"""Outputs: one safetensors file, shards with an index, a .pt state dict.

`writing.Outputs` are averages of a run as files, made in one process or by those of `torchrun`; `convert.export_file`
writes models in another layout. A sink takes tensors and appears complete, at the end, or not at all.
"""

"""Outputs: one safetensors file, shards with an index, a .pt state dict.

`job.Synthesis` writes averages of a run to files, in one process, in parts or in a torchrun job; `convert.export_file`
writes models in another layout. A sink takes tensors and appears complete, at the end, or not at all.
"""

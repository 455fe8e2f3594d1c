"""Outputs: one safetensors file, shards with an index, a .pt state dict.

`writing.Synthesis` writes averages of a run to files, `torchrun` by several processes; `convert.export_file` writes
models in another layout. A sink takes tensors and appears complete, at the end, or not at all.
"""

"""Outputs: one safetensors file, shards with an index, a .pt state dict, a DCP folder, a copy of a
model folder.

`writing.write_synthesis` writes averages of a run, in one process or in the ranks of a torchrun
job, and `convert.export_file` a model in another layout. Both fill a `writing.Output`, which
appears complete or not at all.
"""

"""Outputs: one safetensors file, shards with an index, a .pt state dict, a DCP folder, or a copy of
a checkpoint or model folder with other values for some of its tensors.

`writing.write_synthesis` writes averages of a run, in one process or in the ranks of a torchrun
job, and `convert.export_file` a model in another layout. Both decide on an `Arrangement` of files
(`layouts`, for copies `like`), and fill `outputs` or a `copying.Copy`, which appear complete or not
at all.
"""

"""Output layouts: one safetensors file, shards with an index, a .pt state dict.

Each layout is a sink (`layouts.Sink`): it takes tensors one by one and appears whole, at the end, or not at all.
`write_synthesis` fills sinks from snapshots, `export_file` from any safetensors file.
"""

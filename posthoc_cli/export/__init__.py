"""Output layouts: one safetensors file, shards with an index, a .pt state dict.

Each layout is a sink (`layouts.Sink`): it takes tensors one by one and appears whole, at the end, or not at all.
`write_synthesis` fills sinks from snapshots, `export_file` from any safetensors file.
"""

from posthoc_cli.export.convert import Exported, export_file
from posthoc_cli.export.layouts import LAYOUTS, layout_of, output_exists, parse_size
from posthoc_cli.export.synthesized import existing_outputs, write_synthesis

__all__ = [
    "LAYOUTS",
    "Exported",
    "existing_outputs",
    "export_file",
    "layout_of",
    "output_exists",
    "parse_size",
    "write_synthesis",
]

"""The names of axes: the mesh's, and the logical ones by which arrays speak of their dimensions."""

from __future__ import annotations

from typing import Literal, get_args

MeshAxis = Literal["data", "fsdp", "expert", "context", "tensor"]
MESH_AXES: tuple[MeshAxis, ...] = get_args(MeshAxis)

LogicalAxis = Literal[
    # of activations
    "batch",
    "length",
    "activation",
    # of parameters and activations
    "heads",
    "kv_heads",
    "head_dim",
    "hidden",
    "vocab",
    "experts",
    # of parameters
    "layers",
    "embed",
    "expert_embed",
    "norm",
]
LOGICAL_AXES: tuple[LogicalAxis, ...] = get_args(LogicalAxis)

Names = tuple[LogicalAxis | None, ...]

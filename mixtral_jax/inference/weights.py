"""Weights in the form that decodes fastest: each layer's, and each expert's, arrays of their own.

Slices of a stack are copied before a product reads them; arrays of their own are read in place, and an expert that no
token chose is not read at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.model.feed_forward import SwiGLU

_EXPERT_WEIGHTS = ("gate", "up", "down")
_FLOAT32 = ("scale", "router")
"""Never in a shorter form: they are small, and decide by small differences."""


class Prepared(NamedTuple):
    """The prepared tree."""

    embedding_VD: jax.Array
    layers: tuple[Any, ...]
    """For each layer the variables of a Block: its `params`, and for a Mixtral `prepared` experts."""
    norm: Any
    unembedding_DV: jax.Array | None
    """None where the embeddings are tied."""


def prepare(params: Any, config: ModelConfig, execution: Execution) -> Prepared:
    """The prepared form of a public tree, matrices in the dtype of products."""

    def convert(path: Any, leaf: Any) -> jax.Array:
        short = path[-1].key not in _FLOAT32
        return jnp.asarray(leaf, execution.product_dtype if short else jnp.float32)

    layers = []
    for index in range(config.num_layers):
        # The leaf's own slice is converted, so that no second copy of the whole stack is ever alive.
        layer = jax.tree_util.tree_map_with_path(lambda path, leaf, i=index: convert(path, leaf[i]), params["layers"])
        layers.append(_layer(layer))
    return Prepared(
        embedding_VD=jnp.asarray(params["embedding"], execution.product_dtype),
        layers=tuple(layers),
        norm=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params["norm"]),
        unembedding_DV=None if config.tie_embeddings else jnp.asarray(params["unembedding"], execution.product_dtype),
    )


def _layer(layer: dict[str, Any]) -> dict[str, Any]:
    if "moe" not in layer:
        return {"params": layer}
    stacked = [layer["moe"][name] for name in _EXPERT_WEIGHTS]
    experts = tuple(SwiGLU(*(leaf[e] for leaf in stacked)) for e in range(stacked[0].shape[0]))
    return {
        "params": {**layer, "moe": {"router": layer["moe"]["router"]}},
        "prepared": {"moe": {"experts": experts}},
    }


def restore(prepared: Prepared) -> Any:
    """The public tree again, layers and experts stacked, in the dtypes that were prepared."""
    layers = [_public_layer(layer) for layer in prepared.layers]
    params = {
        "embedding": prepared.embedding_VD,
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),
        "norm": prepared.norm,
    }
    return params if prepared.unembedding_DV is None else {**params, "unembedding": prepared.unembedding_DV}


def _public_layer(layer: dict[str, Any]) -> dict[str, Any]:
    if "prepared" not in layer:
        return layer["params"]
    experts = layer["prepared"]["moe"]["experts"]
    stacked = {name: jnp.stack([getattr(each, name) for each in experts]) for name in _EXPERT_WEIGHTS}
    return {**layer["params"], "moe": {**layer["params"]["moe"], **stacked}}

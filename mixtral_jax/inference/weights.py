"""Weights in the form that decodes fastest: each layer's, and each expert's, arrays of their own.

Slices of a stack are copied before a product reads them; arrays of their own are read in place, and an expert that no
token chose is not read at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixtral_jax.config import Execution, ModelConfig
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.model.tensors import Tensor, assign, look_up, tensors
from mixtral_jax.sharding.partition import check_divisible, place
from mixtral_jax.sharding.rules import DECODING

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
    return assemble(lambda tensor: look_up(params, tensor), config, execution)


def assemble(
    read: Callable[[Tensor], Any], config: ModelConfig, execution: Execution, mesh: Mesh | None = None
) -> Prepared:
    """The prepared form from single tensors, read and put on the devices one after another.

    Args:
      read: gives a tensor in our layout, in any float dtype.
      mesh: where to put them, as DECODING says; None: on the default device.

    Raises:
      InputError: the mesh does not divide the model; nothing is read then.
    """
    if mesh is not None:
        wanted = {tensor.name: jax.ShapeDtypeStruct(tensor.shape, jnp.float32) for tensor in tensors(config)}
        specs = {tensor.name: DECODING.storage(tensor.axes) for tensor in tensors(config)}
        check_divisible(wanted, specs, mesh.shape)
    top: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{"params": {}} for _ in range(config.num_layers)]
    experts: dict[tuple[int, int], dict[str, jax.Array]] = {}
    for tensor in tensors(config):
        dtype = jnp.float32 if tensor.path[-1] in _FLOAT32 else execution.product_dtype
        whole = np.asarray(read(tensor))
        if mesh is None:
            array = jnp.asarray(whole.astype(dtype, copy=False))
        else:
            array = place(whole, tensor.axes, DECODING, mesh, dtype)
        if tensor.layer is None:
            assign(top, tensor.path, array)
        elif tensor.expert is None:
            assign(layers[tensor.layer]["params"], tensor.path[1:], array)
        else:
            experts.setdefault((tensor.layer, tensor.expert), {})[tensor.path[-1]] = array
    if config.moe is not None:
        for index, layer in enumerate(layers):
            each = tuple(SwiGLU(**experts[index, number]) for number in range(config.moe.num_experts))
            layer["prepared"] = {"moe": {"experts": each}}
    return Prepared(top["embedding"], tuple(layers), top["norm"], top.get("unembedding"))


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

"""The weights that a run begins from: read from files of any kind, a layer's tensors at a time, onto the mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.source import Source, bits_for
from mixtral_jax.config import ModelConfig, to_table
from mixtral_jax.errors import InputError
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor, assign, tensors
from mixtral_jax.quantization import FLOAT32, is_quantized
from mixtral_jax.sharding.axes import Names
from mixtral_jax.sharding.partition import place
from mixtral_jax.sharding.rules import Rules

Held = Literal["float32", "bfloat16", "int8"]


def open_base(path: str, config: ModelConfig) -> Source:
    """The model at `init_from`.

    Raises:
      InputError: it can't be opened, is damaged, or is another model than the run's.
    """
    try:
        source = open_source(path)
    except InputError as error:
        raise InputError("init_from", error.value, error.allowed) from None
    wanted, found = to_table(config), to_table(source.config)
    other = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    if other:
        differences = "; ".join(f"model.{key} is {wanted.get(key)!r}, there {found.get(key)!r}" for key in other)
        raise InputError("init_from", path, f"another model: {differences}")
    source.check()
    return source


def read_params(source: Source, mesh: Mesh, rules: Rules, held: Held = "float32") -> Any:
    """The parameter tree of a source, its layers stacked, laid out as the rules store it.

    A layer's tensors of a kind are in the host's memory together, never more; on the devices each has its shards alone.

    Args:
      held: the dtype of matrices; `int8`: those that inference quantises, as Quantized, and the others in bfloat16.
    """
    if held == "int8":
        bits_for(source, "int8")
    tree: dict[str, Any] = {}
    for path, members in groupby(tensors(source.config), key=lambda tensor: tensor.path):
        assign(tree, path, _leaf(list(members), partial(_read, source, held=held), mesh, rules))
    return tree


def _read(source: Source, tensor: Tensor, held: Held) -> tuple[np.ndarray, ...]:
    """A tensor on the host: (array,), or (values, scale)."""
    if held == "int8" and is_quantized(tensor):
        whole = source.read_quantized(tensor, "int8")
        return np.asarray(whole.values), np.asarray(whole.scale)
    dtype = jnp.float32 if held == "float32" or tensor.path[-1] in FLOAT32 else jnp.bfloat16
    return (source.read(tensor).astype(dtype),)


def _leaf(
    members: list[Tensor], read: Callable[[Tensor], tuple[np.ndarray, ...]], mesh: Mesh, rules: Rules
) -> jax.Array | Quantized:
    """All tensors of one kind, by layer and expert."""
    layers = [list(each) for _, each in groupby(members, key=lambda tensor: tensor.layer)]
    leaves: list[jax.Array] = []
    for number, layer in enumerate(layers):
        by_expert = zip(*map(read, layer), strict=True)
        parts = [np.stack(part) if layer[0].expert is not None else part[0] for part in by_expert]
        if layer[0].layer is None:
            leaves = [place(part, _names(layer[0], part), rules, mesh, part.dtype) for part in parts]
            break
        if not number:
            leaves = [_zeros(len(layers), part, _names(layer[0], part), rules, mesh) for part in parts]
        for at, part in enumerate(parts):
            whole, sharding = leaves[at], leaves[at].sharding
            names = _names(layer[0], part)
            put = jax.jit(
                jax.lax.dynamic_update_index_in_dim, static_argnums=3, donate_argnums=0, out_shardings=sharding
            )
            leaves[at] = put(whole, place(part, names, rules, mesh, part.dtype), number, 0)
    return leaves[0] if len(leaves) == 1 else Quantized(*leaves)


def _names(tensor: Tensor, part: np.ndarray) -> Names:
    """The axes of a layer's tensors of a kind; of scales, none where there is one for all."""
    names = tensor.axes if tensor.expert is None else ("experts", *tensor.axes)
    return tuple(None if size == 1 else name for name, size in zip(names, part.shape, strict=True))


def _zeros(count: int, part: np.ndarray, names: Names, rules: Rules, mesh: Mesh) -> jax.Array:
    sharding = NamedSharding(mesh, rules.storage(("layers", *names)))
    make = jax.jit(lambda: jnp.zeros((count, *part.shape), part.dtype), out_shardings=sharding)
    return make()

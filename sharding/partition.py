"""From abstract arrays with named axes to shardings, and constraints inside a computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.errors import InputError
from mixtral_jax.sharding.axes import Names
from mixtral_jax.sharding.mesh import current_mesh
from mixtral_jax.sharding.rules import Rules


def constrain(x: jax.Array, names: Names, rules: Rules) -> jax.Array:
    """x, laid out on the current mesh as the rules say for axes of these names; unchanged where there is no mesh."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, rules.use(names))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def use_weight(weight: jax.Array, names: Names, rules: Rules) -> jax.Array:
    """A stored weight as a layer uses it: gathered over the axes that only store it. Its gradient is scattered back."""
    return constrain(weight, names, rules)


def _use_forward(weight: jax.Array, names: Names, rules: Rules) -> tuple[jax.Array, None]:
    return constrain(weight, names, rules), None


def _use_backward(names: Names, rules: Rules, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    if current_mesh() is None:
        return (gradient,)
    return (jax.lax.with_sharding_constraint(gradient, rules.storage(names)),)


use_weight.defvjp(_use_forward, _use_backward)


def named_shardings(mesh: Mesh, abstract: Any, rules: Rules) -> Any:
    """A NamedSharding for each leaf of a tree from `jax.eval_shape`; leaves without axis names are replicated.

    Raises:
      InputError: dimensions that the mesh does not divide, all of them in one message.
    """
    specs = jax.tree.map(
        lambda leaf: rules.storage(leaf.names) if isinstance(leaf, nn.Partitioned) else PartitionSpec(),
        abstract,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    check_divisible(nn.unbox(abstract), specs, mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def check_divisible(abstract: Any, specs: Any, axis_sizes: Mapping[str, int]) -> None:
    """Raises InputError with every dimension of every leaf that its mesh axes do not divide."""
    problems = []
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(specs), strict=True):
        for dimension, (size, axes) in enumerate(zip(leaf.shape, spec, strict=False)):
            parts = math.prod(axis_sizes[axis] for axis in _as_tuple(axes))
            if size % parts:
                name, over = jax.tree_util.keystr(path, simple=True, separator="."), " x ".join(_as_tuple(axes))
                problems.append(f"dimension {dimension} of {name} is {size}, not divisible by {over} = {parts}")
    if problems:
        sizes = ", ".join(f"{axis}={size}" for axis, size in axis_sizes.items() if size > 1)
        raise InputError("mesh", sizes, "the model does not divide over it:\n  " + "\n  ".join(problems))


def over_tokens(function: Callable, tokens: PartitionSpec, weights: PartitionSpec) -> Callable:
    """The function run on each shard's own tokens; without a mesh, the function itself.

    Only the axes that the two layouts name are the function's own to use; the compiler goes on partitioning the others.
    The weights' gradient is summed over the shards that share them, once.

    Args:
      function: takes arrays [B, T, ...] and, last, a tree of weights, by position; returns arrays whose first two
        dimensions are laid out like tokens.
      tokens: the layout of the first two dimensions of each token array.
      weights: the layout of each weight.
    """
    if current_mesh() is None:
        return function
    manual = {axis for spec in (tokens, weights) for axes in spec for axis in _as_tuple(axes)}

    def run(*arguments: Any) -> Any:
        layouts = (*(tokens for _ in arguments[:-1]), weights)
        # Unchecked replication: a custom VJP can't say that its weight gradient is yet to be summed over the shards.
        mapped = jax.shard_map(function, in_specs=layouts, out_specs=tokens, axis_names=manual, check_vma=False)
        return mapped(*arguments)

    return run


def over_parts(function: Callable, layouts: Any, axes: tuple[str, ...]) -> Callable:
    """The function run on each shard's part of the weights, its results summed; without a mesh, the function itself.

    One sum crosses shards, after all that the function does: collectives inside its branches might meet in another
    order on another device.

    Args:
      function: takes arrays that are whole on every shard and, last, a tree of weights; linear in them as a sum over
        parts.
      layouts: a PartitionSpec for each weight, over the axes.
    """
    if current_mesh() is None:
        return function

    def run(*arguments: Any) -> Any:
        def part(*given: Any) -> Any:
            return jax.tree.map(lambda each: jax.lax.psum(each, axes), function(*given))

        specs = (*(PartitionSpec() for _ in arguments[:-1]), layouts)
        names = set(axes)
        mapped = jax.shard_map(part, in_specs=specs, out_specs=PartitionSpec(), axis_names=names, check_vma=False)
        return mapped(*arguments)

    return run


def place(array: np.ndarray, names: Names, rules: Rules, mesh: Mesh, dtype: Any) -> jax.Array:
    """A host's array on the mesh, in the layout of its axes; each shard takes its part only, in the dtype wanted."""
    sharding = NamedSharding(mesh, rules.storage(names))
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part].astype(dtype))


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes

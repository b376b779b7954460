"""From abstract arrays with named axes to shardings, and constraints inside a computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from mixtral_jax.errors import InputError
from mixtral_jax.sharding.axes import LogicalAxis, Names
from mixtral_jax.sharding.mesh import current_mesh
from mixtral_jax.sharding.rules import Rules

GATHERED = "gathered"
"""The name of weights that were gathered, for policies of what a backward pass keeps."""


def constrain(x: jax.Array, names: Names, rules: Rules) -> jax.Array:
    """x, laid out on the current mesh as the rules say for axes of these names; unchanged where there is no mesh."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, rules.use(names))


def use_weight(weight: jax.Array, names: Names, rules: Rules, dtype: DTypeLike | None = None) -> jax.Array:
    """A stored weight as a layer uses it: gathered over the axes that only store it. Its gradient is scattered back.

    On a mesh it comes in dtype, so that no more is gathered than is multiplied; without one as it is. It is named
    GATHERED, for a backward pass that gathers it again rather than keep it.
    """
    if current_mesh() is None:
        return weight
    return checkpoint_name(_used(weight, names, rules, weight.dtype if dtype is None else dtype), GATHERED)


def keep_all_but_gathered(primitive: Any, *_: Any, **settings: Any) -> bool:
    """A policy of jax.checkpoint: all is kept but weights that were gathered.

    Refusing their name alone would keep what is named, or what a product makes of it: nothing is kept that was only
    moved, which for tokens costs next to nothing to do again.
    """
    if primitive.name == "custom_vjp_call":  # as `use_weight` and `gather_weight` are, before they are differentiated
        inside = {each.primitive.name for each in settings["call_jaxpr"].eqns}
        return not inside <= {*_MOVES, "convert_element_type"}
    return primitive.name not in _MOVES and settings.get("name") != GATHERED


_MOVES = {"all_gather", "sharding_constraint", "optimization_barrier", "reshape", "transpose", "squeeze"}


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _used(weight: jax.Array, names: Names, rules: Rules, dtype: DTypeLike) -> jax.Array:
    return jax.lax.with_sharding_constraint(_cast(weight, dtype), rules.use(names))


def _used_forward(weight: jax.Array, names: Names, rules: Rules, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    return _used(weight, names, rules, dtype), jnp.zeros((0,), weight.dtype)  # an array, since a dtype can't be saved


def _used_backward(
    names: Names, rules: Rules, dtype: DTypeLike, like: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient.astype(like.dtype), rules.storage(names)),)


_used.defvjp(_used_forward, _used_backward)


def storage_specs(abstract: Any, rules: Rules) -> Any:
    """The layout at rest of each leaf of a tree from `jax.eval_shape`; leaves without axis names are replicated."""
    return jax.tree.map(
        lambda leaf: rules.storage(leaf.names) if isinstance(leaf, nn.Partitioned) else PartitionSpec(),
        abstract,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def named_shardings(mesh: Mesh, abstract: Any, rules: Rules) -> Any:
    """A NamedSharding for each leaf of a tree from `jax.eval_shape`; leaves without axis names are replicated.

    Raises:
      InputError: dimensions that the mesh does not divide, all of them in one message.
    """
    specs = storage_specs(abstract, rules)
    check_divisible(nn.unbox(abstract), specs, mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def check_divisible(abstract: Any, specs: Any, axis_sizes: Mapping[str, int]) -> None:
    """Raises InputError with every dimension of every leaf that its mesh axes do not divide."""
    problems = indivisible(abstract, specs, axis_sizes)
    if problems:
        sizes = ", ".join(f"{axis}={size}" for axis, size in axis_sizes.items() if size > 1)
        raise InputError("mesh", sizes, "the model does not divide over it:\n  " + "\n  ".join(problems))


def indivisible(abstract: Any, specs: Any, axis_sizes: Mapping[str, int]) -> list[str]:
    """A phrase for every dimension of every leaf that its mesh axes do not divide."""
    problems = []
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(specs), strict=True):
        for dimension, (size, axes) in enumerate(zip(leaf.shape, spec, strict=False)):
            parts = math.prod(axis_sizes[axis] for axis in _as_tuple(axes))
            if size % parts:
                name, over = jax.tree_util.keystr(path, simple=True, separator="."), " x ".join(_as_tuple(axes))
                problems.append(f"dimension {dimension} of {name} is {size}, not divisible by {over} = {parts}")
    return problems


def over_tokens(function: Callable, names: Any, rules: Rules, split: tuple[LogicalAxis, ...] = ()) -> Callable:
    """The function run on each shard's own tokens and parts of weights; itself, where the mesh splits neither.

    Only the axes that tokens are split over are the function's own to use; the compiler goes on partitioning the
    others. A weight's gradient is summed over the shards that hold the same part of it.

    Args:
      function: takes arrays [B, T, ...] and, last, a tree of weights, by position; returns arrays whose first two
        dimensions are laid out like tokens. It gathers weights by `gather_weight`.
      names: the tree of weights, of the names of each one's axes.
      split: axes of weights of which the function has a shard's part alone; it sums its results over their mesh axes.
    """
    tokens, manual = (
        rules.use(_TOKENS),
        (*token_axes(rules), *(axis for name in split for axis in rules.mesh_axes(name))),
    )
    if not _is_split(manual):
        return function

    def run(*arguments: Any) -> Any:
        *arrays, weights = arguments
        at_rest = jax.tree.map(lambda _, each: _restricted(rules.storage(each), manual), weights, names)
        layouts = (*(tokens for _ in arrays), at_rest)
        # Unchecked replication: a custom VJP can't say that its weight gradient is yet to be summed over the shards.
        mapped = jax.shard_map(function, in_specs=layouts, out_specs=tokens, axis_names=set(manual), check_vma=False)
        return mapped(*arguments)

    return run


def gather_weight(part: jax.Array, names: Names, rules: Rules, dtype: DTypeLike) -> jax.Array:
    """Inside a function over tokens: a weight, whole on the axes that only store it, from this shard's part; in dtype.

    Its gradient is summed over those axes in the dtype of the part. Named GATHERED, as by `use_weight`. Where the mesh
    does not split tokens, the part as it is.
    """
    if not _is_split(token_axes(rules)):
        return part
    return checkpoint_name(_gather(part, _only_stored(names, rules), jnp.dtype(dtype)), GATHERED)


def scatter_gradient(gradient: jax.Array, names: Names, rules: Rules) -> jax.Array:
    """Inside a function over tokens: this shard's part of the sum of what each shard gives for the whole weight."""
    if not _is_split(token_axes(rules)):
        return gradient
    return _scatter(gradient, _only_stored(names, rules))


_TOKENS: Names = ("batch", "length")


def token_axes(rules: Rules) -> tuple[str, ...]:
    """The mesh axes that tokens are split over."""
    return tuple(axis for axes in rules.use(_TOKENS) for axis in _as_tuple(axes))


def split_axes(name: LogicalAxis, rules: Rules) -> tuple[str, ...]:
    """The axes of the current mesh that do split a logical axis; none where there is no mesh."""
    mesh = current_mesh()
    return () if mesh is None else tuple(axis for axis in rules.mesh_axes(name) if mesh.shape[axis] > 1)


def num_parts(name: LogicalAxis, rules: Rules) -> int:
    """How many parts the current mesh splits a logical axis into."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in rules.mesh_axes(name))


def _is_split(axes: tuple[str, ...]) -> bool:
    mesh = current_mesh()
    return mesh is not None and any(mesh.shape[axis] > 1 for axis in axes)


def _only_stored(names: Names, rules: Rules) -> tuple[tuple[str, ...], ...]:
    """For each dimension, the axes of tokens that it is split over in storage and not in use."""
    stored, used = (_restricted(spec(names), token_axes(rules)) for spec in (rules.storage, rules.use))
    apart = [() if wanted else _as_tuple(axes) for axes, wanted in zip(stored, used, strict=True)]
    return tuple(tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1) for axes in apart)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, over: tuple[tuple[str, ...], ...], dtype: DTypeLike) -> jax.Array:
    """The whole of an array of which each shard has a part: dimension d of it is split over the axes over[d]."""
    part = _cast(part, dtype)
    for dimension, axes in enumerate(over):
        if axes:
            part = jax.lax.all_gather(part, axes, axis=dimension, tiled=True)
    return part


def _gather_forward(part: jax.Array, over: tuple, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    return _gather(part, over, dtype), jnp.zeros((0,), part.dtype)


def _gather_backward(over: tuple, dtype: DTypeLike, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (_scatter(gradient.astype(like.dtype), over),)


_gather.defvjp(_gather_forward, _gather_backward)


def _scatter(gradient: jax.Array, over: tuple[tuple[str, ...], ...]) -> jax.Array:
    for dimension, axes in enumerate(over):
        if axes:
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
    return gradient


def _cast(weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A layer's weight in dtype. The compiler would else cast all layers' before the first one, and keep them."""
    return weight if weight.dtype == dtype else jax.lax.optimization_barrier(weight).astype(dtype)


def _restricted(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The spec without the mesh axes that are not among these."""
    kept = (tuple(axis for axis in _as_tuple(each) if axis in axes) for each in spec)
    return PartitionSpec(*[each or None for each in kept])


def over_parts(function: Callable, layouts: Any, axes: tuple[str, ...]) -> Callable:
    """The function run on each shard's part of the weights, its results summed; without a mesh, the function itself.

    One sum crosses shards, after all that the function does: collectives inside its branches might meet in another
    order on another device.

    Args:
      function: takes arrays that are whole on every shard and, last, a tree of weights; linear in them as a sum over
        parts.
      layouts: a PartitionSpec for each weight, over the axes.
    """
    mesh = current_mesh()
    if mesh is None:
        return function
    # All of the mesh's, though it is whole on the others: kernels the compiler can't divide.
    names = set(mesh.axis_names)

    def run(*arguments: Any) -> Any:
        def part(*given: Any) -> Any:
            return jax.tree.map(lambda each: jax.lax.psum(each, axes), function(*given))

        specs = (*(PartitionSpec() for _ in arguments[:-1]), layouts)
        mapped = jax.shard_map(part, in_specs=specs, out_specs=PartitionSpec(), axis_names=names, check_vma=False)
        return mapped(*arguments)

    return run


def place(array: np.ndarray, names: Names, rules: Rules, mesh: Mesh, dtype: Any) -> jax.Array:
    """A host's array on the mesh, in the layout of its axes; each shard takes its part only, in the dtype wanted."""
    sharding = NamedSharding(mesh, rules.storage(names))
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part].astype(dtype))


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes

"""The single tensors of a model: the parameter tree without its stacks, as published files hold it.

The tree stacks layers and experts, [L, E, D, F]; a file has a matrix for each. Weights travel between files and devices
as single tensors, so that no stack is ever whole in the host's memory, but for a layer's experts that are one array on
a GPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
from flax import linen as nn

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import abstract_params
from mixtral_jax.sharding.axes import Names

_STACKED = ("layers", "experts")


@dataclass(frozen=True)
class Tensor:
    """One matrix or scale, of one layer and one expert where it has them."""

    path: tuple[str, ...]
    """The keys that lead to its leaf in the parameter tree."""
    index: tuple[int, ...]
    """Its place in the leaf: (), (layer,) or (layer, expert)."""
    shape: tuple[int, ...]
    """Without the stacked dimensions."""
    axes: Names
    """A logical axis for each dimension of shape."""

    @property
    def name(self) -> str:
        """What it is called in our files and messages, such as `layers.3.moe.gate.7`."""
        if not self.index:
            return ".".join(self.path)
        layer, *expert = map(str, self.index)
        return ".".join([self.path[0], layer, *self.path[1:], *expert])

    @property
    def kind(self) -> str:
        """What it is in any layer, such as `moe.gate`."""
        return ".".join(self.path[1:] if self.index else self.path)

    @property
    def inputs(self) -> int:
        """How many dimensions of a matrix, its first, products sum over."""
        return 2 if self.kind == "attention.output" else 1

    @property
    def layer(self) -> int | None:
        return self.index[0] if self.index else None

    @property
    def expert(self) -> int | None:
        return self.index[1] if len(self.index) > 1 else None


@cache
def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every single tensor of a model, leaf after leaf, within a leaf by layer and expert.

    Worked out once for a config: it traces the model, which takes half a second.
    """
    leaves = jax.tree_util.tree_leaves_with_path(
        abstract_params(config), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    return tuple(each for path, leaf in leaves for each in _of_leaf(tuple(key.key for key in path), leaf))


def _of_leaf(path: tuple[str, ...], leaf: nn.Partitioned) -> list[Tensor]:
    stacked = sum(name in _STACKED for name in leaf.names)
    counts, shape = leaf.value.shape[:stacked], leaf.value.shape[stacked:]
    axes: Any = leaf.names[stacked:]
    return [Tensor(path, index, shape, axes) for index in itertools.product(*map(range, counts))]


def assign(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Puts a value into a tree of dictionaries, making those that lead to it."""
    *parents, last = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def look_up(tree: Any, tensor: Tensor) -> Any:
    """A tensor of a parameter tree."""
    for key in tensor.path:
        tree = tree[key]
    return tree[tensor.index]

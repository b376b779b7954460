"""Functions that the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function, of which autodiff keeps the arguments and nothing that lies between.

    For what is cheap beside reading and writing it. `jax.checkpoint` says the same, but the policy of another around it
    decides in its place.
    """
    wrapped = jax.custom_vjp(function)

    def forward(*arguments: Any) -> tuple[jax.Array, tuple[Any, ...]]:
        return function(*arguments), arguments

    def backward(arguments: tuple[Any, ...], cotangent: jax.Array) -> tuple[Any, ...]:
        # Not before the cotangent is there; and apart from what was computed before, which would else be kept.
        arguments, cotangent = jax.lax.optimization_barrier((arguments, cotangent))
        return tuple(jax.vjp(function, *arguments)[1](cotangent))

    wrapped.defvjp(forward, backward)
    return wrapped

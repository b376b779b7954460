"""`jax.jit` for the programs of inference, with what the compiler of the platform has to be told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from mixtral_jax.model.backends import few_rows
from mixtral_jax.sharding.mesh import current_mesh


def program(**options: Any) -> Callable[[Callable[..., Any]], Program]:
    """A decorator like `jax.jit`, with its options."""
    return functools.partial(Program, options=options)


class Program:
    """A jitted function, compiled for the devices of the current mesh or else for the default one."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._anywhere = jax.jit(function, **options)
        self._on_cpu = jax.jit(function, compiler_options=few_rows.OPTIONS, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted.lower(*args, **kwargs)

    @property
    def jitted(self) -> Any:
        """What `jax.jit` made of it for the platform."""
        on_default = current_mesh() is None
        platform = jax.default_backend() if on_default else jax.sharding.get_mesh().devices.flat[0].platform
        return self._on_cpu if platform == "cpu" else self._anywhere

"""`jax.jit` for the programs of inference, with what the compiler has to be told where they use `few_rows`, and several
of them compiled side by side."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from mixtral_jax.model.backends import few_rows
from mixtral_jax.sharding.mesh import current_mesh, platform


def program(**options: Any) -> Callable[[Callable[..., Any]], Program]:
    """A decorator like `jax.jit`, with its options."""
    return functools.partial(Program, options=options)


class Program:
    """A jitted function, for a mesh and for a single device."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._anywhere = jax.jit(function, **options)
        self._of_few_rows = jax.jit(function, compiler_options=few_rows.OPTIONS, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self.jitted.lower(*args, **kwargs)

    @property
    def jitted(self) -> Any:
        """What `jax.jit` made of it, as weights are prepared here."""
        return self._of_few_rows if current_mesh() is None and few_rows.are_for_this_host() else self._anywhere


def compile_together(calls: Sequence[functools.partial[Any]]) -> None:
    """Compiles what calls of programs need, side by side, and calls none; each call then finds it.

    Not for a CPU, whose compiler gains nothing by it (docs/performance.md).
    """
    if platform() == "cpu":
        return
    with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1), thread_name_prefix="compiling") as pool:
        lowered = [call.func.lower(*call.args, **call.keywords) for call in calls]  # type: ignore[attr-defined]
        for each in [pool.submit(each.compile) for each in lowered]:
            each.result()

"""XLA's flags for programs that are compiled far more than they compute, and a way to do without for others."""

from collections.abc import Iterator
from contextlib import contextmanager

FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""The older of two ways to write a fusion down. With LLVM's optimisations left out, by a variable of the environment
that all tests and what they start have, compiling takes a third of the time. And a program in one piece: to divide it
among threads that have other tests to run takes longer."""


@contextmanager
def optimised() -> Iterator[None]:
    """For programs that compute more than they are compiled: 135 million weights decode 40 times as fast."""
    import jax  # not before the environment is set

    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)

"""The compilers for TPUs and GPUs, which need no such device."""

import os
import sys
from pathlib import Path

import pytest

from mixtral_jax.planning.compilers import has_compiler
from mixtral_jax.planning.topology import topology

GPU_COMPILER = Path(sys.prefix) / "gpu-compiler"
"""Where `make` has put it: in every process of the tests, jax would load it."""

needs_compiler = pytest.mark.skipif(
    not has_compiler(topology("v5p:4x4x4")), reason="libtpu is built for Linux on x86-64 alone"
)
needs_gpu_compiler = pytest.mark.skipif(
    not GPU_COMPILER.is_dir(), reason="jax's plug-in for CUDA is built for Linux on x86-64 alone"
)


def with_gpu_compiler() -> dict[str, str]:
    """The environment of a process that finds it."""
    return os.environ | {"PYTHONPATH": str(GPU_COMPILER), "JAX_PLATFORMS": "cpu"}

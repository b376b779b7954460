"""The compiler for TPUs, which needs no TPU."""

import pytest

from mixtral_jax.planning.topology import has_compiler

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="libtpu is built for Linux on x86-64 alone")

"""Faults, each put into a real run of a toy by the real command line: `python -m benchmarks.chaos`."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with the compiler for TPUs installed, jax would look for one

"""Every test runs on eight CPU devices, with warnings as errors and implicit rank promotion refused."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far more than they compute: without LLVM's optimisations they take half the time.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

pytest_plugins = ["toy_run"]

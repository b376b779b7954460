"""Every test runs on eight CPU devices, with warnings as errors and implicit rank promotion refused."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

pytest_plugins = ["toy_run"]

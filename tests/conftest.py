"""Every test runs on eight CPU devices, with warnings as errors and implicit rank promotion refused."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far more than they compute: without LLVM's optimisations they take half the time.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
# Eight devices on two busy cores may keep each other waiting for longer than the 40 seconds after which XLA aborts.
_FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The eight devices share two threads: two programs in flight, each waiting for some of them, would wait forever.
jax.config.update("jax_cpu_enable_async_dispatch", False)

pytest_plugins = ["toy_run", "command_line"]

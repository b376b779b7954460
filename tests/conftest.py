"""Every test runs on eight CPU devices, with warnings as errors and implicit rank promotion refused."""

import gc
import os
import subprocess
import sys

import quick_compiler

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
# Programs for several devices of a CPU hang once they are loaded, not compiled; see `cli.platform.start`.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# XLA gives eight devices eight threads, on which a collective blocks and a product waits for others: let all have one.
os.environ["PJRT_NPROC"] = "32"
_FLAGS = f"--xla_force_host_platform_device_count=8 {quick_compiler.FLAGS}"
# Eight devices on two busy cores may keep each other waiting for longer than the 40 seconds after which XLA aborts.
_FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import jax  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402

# Tracing makes many objects, hardly any of them in cycles: to look for those as often as Python does takes up to an
# eighth of the time.
gc.set_threshold(100_000, 50, 50)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Eight devices share few threads: two programs in flight, each waiting for some of them, would wait forever.
jax.config.update("jax_cpu_enable_async_dispatch", False)

pytest_plugins = ["toy_run", "toy_tuning", "command_line", "object_store"]

MOST_MEMORY = 3 << 30
"""Bytes of a worker after which it forgets its programs: a module's are of no use to the next."""


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Keeps the programs of many modules from adding up."""
    yield
    if psutil.Process().memory_info().rss > MOST_MEMORY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def optimised_programs():
    """For a module all of whose programs compute more than they are compiled."""
    with quick_compiler.optimised():
        yield


@pytest.fixture(scope="module")
def blocks_of_three_slots():
    """For a module whose caches are smaller than a block is: every attention goes by how many slots are filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixtral_jax.model.backends.cached.SLOTS_AT_ONCE", {"cpu": 3})
        yield


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_handlecrashitem(crashitem, report):
    """A worker died in this test, by XLA's abort or the limit for a test that hangs: eight devices on two cores may do
    that to each other. Runs it again, alone; it fails if it does not pass then."""
    command = [sys.executable, "-m", "pytest", "-n", "0", crashitem]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    outcome = "passed" if again.returncode == 0 else "failed"
    print(f"\n{report.longrepr}; alone it {outcome}", file=sys.stderr, flush=True)
    if outcome == "passed":
        report.when, report.outcome, report.longrepr = "call", outcome, None
    else:
        report.longrepr = f"{report.longrepr}\n{again.stdout}\n{again.stderr}"

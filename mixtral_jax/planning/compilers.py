"""Compilers for machines that are not here: libtpu for TPUs, jax's plug-in for CUDA for GPUs. Neither needs one."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mixtral_jax.errors import InputError
from mixtral_jax.planning.topology import Topology
from mixtral_jax.sharding.chips import quiet_compiler


@dataclass(frozen=True)
class _Gpu:
    """What XLA asks of a GPU besides its memory: NVIDIA's data sheets and compute capabilities (CUDA C++ Programming
    Guide, "Technical Specifications per Compute Capability")."""

    device_kind: str
    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    fpus: int
    """Float32 units of each."""
    clock: float
    """GHz."""
    cache: int
    """MiB, of the second level."""
    shared: int
    """KiB of shared memory a core; a block has at most one less."""


_GPUS = {
    "A100": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 40, 164),
    "H100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 50, 228),
    "H200": _Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 50, 228),
}
_CUDA = ("13", "12")
"""Versions that jax has a plug-in for, the preferred first."""


def devices(machine: Topology) -> Sequence[Any]:
    """Devices to compile for: of a TPU or GPU described by its compiler, of a CPU this host's.

    Raises:
      InputError: there is no compiler for it here.
    """
    if machine.chip is None:
        if len(jax.devices("cpu")) < machine.num_chips:
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={machine.num_chips}"
            raise InputError("--topology", machine.name, f"jax shows {len(jax.devices('cpu'))} here; set {flag}")
        return jax.devices("cpu")[: machine.num_chips]
    require_compiler(machine)
    quiet_compiler()
    return _tpus(machine) if machine.is_tpu else _gpus(machine)


def _tpus(machine: Topology) -> Sequence[Any]:
    from jax.experimental import topologies

    assert machine.chip is not None
    options: dict[str, Any] = {}
    if machine.slices > 1:
        options["num_slices"] = machine.slices
    if machine.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # else it describes each chip as two devices
    if machine.num_chips // machine.slices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{machine.chip.name}:{'x'.join(str(size) for size in machine.shape)}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # of many types: the plug-in's
        raise InputError("--topology", machine.name, f"the TPU compiler refuses it: {error}") from None


def _gpus(machine: Topology) -> Sequence[Any]:
    from jax.experimental import topologies

    assert machine.chip is not None
    gpu = _GPUS[machine.chip.name]
    major, minor = gpu.capability
    # The text form of XLA's GpuTargetConfigProto (xla/stream_executor/device_description.proto).
    target = f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.device_kind}"
        runtime_version {{ major: 12 minor: 9 patch: 0 }}
        dnn_version_info {{ major: 9 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock}
          l2_cache_size: {gpu.cache << 20}
          device_memory_size: {int(machine.chip.memory_bytes)}
          memory_bandwidth: {int(machine.chip.memory_bandwidth)}
          shared_memory_per_block: {48 << 10}
          shared_memory_per_core: {gpu.shared << 10} shared_memory_per_block_optin: {gpu.shared - 1 << 10}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""
    # Nodes, processes a node, devices a process.
    shape = f"{machine.num_chips // machine.island}x1x{machine.island}"
    try:
        return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target).devices
    except Exception as error:  # of many types: the plug-in's
        raise InputError("--topology", machine.name, f"the GPU compiler refuses it: {error}") from None


def compile_ahead(lowered: Any) -> Any:
    """A lowered program, compiled for devices that are not here.

    jax would write it to the persistent cache of programs, and fail to read it from there the next time.
    """
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        return lowered.compile()
    finally:
        jax.config.update(option, before)


def has_compiler(machine: Topology) -> bool:
    """Whether a compiler for the machine is installed."""
    if machine.chip is None:
        return True
    return _is_installed("libtpu") if machine.is_tpu else _plug_in() is not None


def _plug_in() -> str | None:
    """The package of jax's plug-in for CUDA, if it and the compiler that it calls are installed."""
    for cuda in _CUDA:
        if _is_installed(f"jax_cuda{cuda}_plugin") and _is_installed(f"jax_plugins.xla_cuda{cuda}"):
            return f"jax-cuda{cuda}-plugin"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package isn't there either
        return False


def advice(machine: Topology) -> str:
    """How to get a compiler for the machine."""
    kind, extra = ("TPUs", "plan") if machine.is_tpu else ("GPUs", "plan-gpu")
    return (
        f"the compiler for {kind} is needed: pip install 'mixtral-jax[{extra}]', or --no-compile for the counts alone"
    )


def require_compiler(machine: Topology) -> None:
    """Raises InputError unless a compiler for the machine is installed, of the version that this jax wants."""
    package = "libtpu" if machine.is_tpu else _plug_in() or "jax-cuda12-plugin"
    if not has_compiler(machine):
        raise InputError(package, None, f"is not installed; {advice(machine)}")
    from importlib import metadata

    # A plug-in of another version is passed over, as if it were not there (jaxlib.plugin_support).
    of_jaxlib = ".".join(metadata.version("jaxlib").split(".")[:3])
    wanted = _wanted_version(metadata.requires("jax") or []) if machine.is_tpu else of_jaxlib
    here = metadata.version(package)
    if wanted is not None and not f"{here}.".startswith(f"{wanted}."):
        raise InputError(package, here, f"this jax {metadata.version('jax')} wants {wanted}; {advice(machine)}")


def _wanted_version(requirements: Sequence[str]) -> str | None:
    """The version of libtpu that jax pins, without its last part: 0.0.42 of `libtpu==0.0.42.*`."""
    pins = [re.match(r"libtpu\s*\(?==\s*([\d.]+?)(?:\.\*)?\)?\s*(?:;|$)", each) for each in requirements]
    return next((pin[1] for pin in pins if pin), None)

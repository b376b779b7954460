"""What each accelerator can do, from its maker's data sheet, found by the device kind that jax reports or by name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
from jax.sharding import AbstractDevice

from mixtral_jax.errors import InputError, nearest


@dataclass(frozen=True)
class Torus:
    """Chips wired to their neighbours in a grid whose long enough dimensions are closed to rings."""

    dimensions: int
    link_bandwidth: float
    """Bytes a second over one link, one way; a chip has two links a dimension."""
    ring_from: int
    """The length from which a dimension is closed to a ring."""


@dataclass(frozen=True)
class Switched:
    """Chips of a node joined by a switch."""

    node: int
    """Chips a node."""
    bandwidth: float
    """Bytes a second that a chip sends within the node."""


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip."""

    name: str
    bf16_flops: float
    """Floating-point operations a second of dense bfloat16 products."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes a second."""
    wiring: Torus | Switched
    network_bandwidth: float
    """Bytes a second that a chip sends out of its slice or node."""
    host_bandwidth: float
    """Bytes a second between a chip and its host's memory, one way."""
    most_ragged: int | None = None
    """Chips that its compiler makes a ragged all-to-all for, at most; None: any number."""

    def exchanges_ragged(self, chips: int) -> bool:
        """Whether so many of them can do a ragged all-to-all."""
        return self.most_ragged is None or chips <= self.most_ragged


_GIB = 2**30
# Wiring of TPUs: cloud.google.com/tpu/docs, a page a version, gives the bandwidth a chip of all links both ways
# (v5e 400, v5p 1,200, v6e 800, v7x 1,200 GB/s; v4 2,400 Gbit/s one way); a link one way is that over four or six links
# and two ways. Their network, same pages: v5p 50 Gbit/s a chip, v5e 6.4 and v6e 25.6 Tbit/s a pod of 256; v4 and v7x,
# which name none, are taken to be as v5p. GPUs: NVIDIA's data sheets of NVLink (900 GB/s both ways on H100 and H200,
# 600 on A100) and of DGX systems, which have one 400 (A100: 200) Gbit/s InfiniBand card a GPU. Ragged exchanges: libtpu
# 0.0.42 refuses them on slices of v5e beyond 4 x 4, "not supported in limited ICI routing settings".
# To the host: TPUs by "How to Scale Your Model" (jax-ml.github.io/scaling-book, part 2), about 15 GB/s a chip, v6e 32,
# and v7x, which it leaves out, is taken to be as that; GPUs by NVIDIA's data sheets, 16 lanes of PCIe 5 (A100: 4).
_V4 = Chip("v4", 275e12, 32e9, 1228e9, Torus(3, 50e9, 4), 6.25e9, 15e9)
_V5E = Chip("v5e", 197e12, 16e9, 819e9, Torus(2, 50e9, 16), 3.125e9, 15e9, most_ragged=16)
_V5P = Chip("v5p", 459e12, 95 * _GIB, 2765e9, Torus(3, 100e9, 4), 6.25e9, 15e9)
_V6E = Chip("v6e", 918e12, 32e9, 1638e9, Torus(2, 100e9, 16), 12.5e9, 32e9)
_V7X = Chip("v7x", 2307e12, 192 * _GIB, 7380e9, Torus(3, 100e9, 4), 6.25e9, 32e9)
_A100 = Chip("A100", 312e12, 80e9, 2039e9, Switched(8, 300e9), 25e9, 32e9)
_H100 = Chip("H100", 989e12, 80e9, 3350e9, Switched(8, 450e9), 50e9, 64e9)
_H200 = Chip("H200", 989e12, 141e9, 4800e9, Switched(8, 450e9), 50e9, 64e9)

# By a prefix of jax's device kind; the first match counts, so longer names come first.
_CHIPS: tuple[tuple[str, Chip], ...] = (
    ("TPU v6 lite", _V6E),
    ("TPU v5 lite", _V5E),
    ("TPU7x", _V7X),
    ("TPU v5", _V5P),
    ("TPU v4", _V4),
    ("NVIDIA H200", _H200),
    ("NVIDIA H100", _H100),
    ("NVIDIA A100", _A100),
)


def chip(device: jax.Device | AbstractDevice) -> Chip | None:
    """The chip of a device, or None where its peaks are unknown (a CPU, say)."""
    return next((chip for prefix, chip in _CHIPS if device.device_kind.startswith(prefix)), None)


def names() -> list[str]:
    """The chips that are known, in lower case."""
    return sorted(chip.name.lower() for _, chip in _CHIPS)


def chip_by_name(name: str) -> Chip:
    """The chip of a name such as `v5p` or `h100`.

    Raises:
      InputError: no chip is known by it.
    """
    found = next((chip for _, chip in _CHIPS if chip.name.lower() == name.lower()), None)
    if found is None:
        raise InputError("chip", name, f"{nearest(name.lower(), names())}known: {', '.join(names())}")
    return found


def multiplies_bfloat16(platform: str) -> bool:
    """Whether a platform has units for products of bfloat16: all but old GPUs, and CPUs without AMX or AVX512-BF16.

    Elsewhere XLA:CPU converts the operands on the way, which at decoding takes twice the time of float32. Where a CPU
    does not say what it has, as outside of Linux on x86-64, it is taken to have none.
    """
    if platform != "cpu":
        return not computes_on_old_gpu()
    return has_amx() or "avx512_bf16" in cpu_flags()


def has_amx() -> bool:
    """Whether this host's CPU has matrix units."""
    return "amx_bf16" in cpu_flags()


def has_avx512() -> bool:
    """Whether this host's CPU has vectors of 512 bits."""
    return "avx512f" in cpu_flags()


@cache
def cpu_flags() -> frozenset[str]:
    """What this host's CPU says that it has; nothing where it does not say."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", told, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def computes_on_old_gpu() -> bool:
    """Whether jax computes on an NVIDIA GPU from before Ampere, such as a T4 or V100: it has no units for bfloat16, and
    Triton compiles nothing for it."""
    device = jax.devices()[0]
    major, _, _ = str(getattr(device, "compute_capability", "")).partition(".")
    return device.platform == "gpu" and major.isdigit() and int(major) < 8


def has_tpu() -> bool:
    """Whether a TPU is attached to this host, by its device files."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is attached to this host, by its device files; within Windows it is another's."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def quiet_compiler() -> None:
    """Keeps libtpu and jax's plug-in for CUDA, where they are installed for their compilers, from complaining that the
    host has no such device.

    libtpu asks the network and the environment which TPU there is; any answer will do.
    """
    if not has_tpu():
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if not has_gpu():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

"""What each accelerator can do, from its maker's data sheet, found by the device kind that jax reports."""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """Peaks of one chip."""

    name: str
    bf16_flops: float
    """Floating-point operations a second of dense bfloat16 products."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes a second."""


_GIB = 2**30
# By a prefix of jax's device kind; the first match counts, so longer names come first.
_CHIPS: tuple[tuple[str, Chip], ...] = (
    ("TPU v6 lite", Chip("v6e", 918e12, 32e9, 1638e9)),
    ("TPU v5 lite", Chip("v5e", 197e12, 16e9, 819e9)),
    ("TPU7x", Chip("v7x", 2307e12, 192 * _GIB, 7380e9)),
    ("TPU v5", Chip("v5p", 459e12, 95 * _GIB, 2765e9)),
    ("TPU v4", Chip("v4", 275e12, 32e9, 1228e9)),
    ("NVIDIA H200", Chip("H200", 989e12, 141e9, 4800e9)),
    ("NVIDIA H100", Chip("H100", 989e12, 80e9, 3350e9)),
    ("NVIDIA A100", Chip("A100", 312e12, 80e9, 2039e9)),
)


def chip(device: jax.Device) -> Chip | None:
    """The chip of a device, or None where its peaks are unknown (a CPU, say)."""
    return next((chip for prefix, chip in _CHIPS if device.device_kind.startswith(prefix)), None)

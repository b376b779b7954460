"""Machines by name: `v5p:4x4x4`, `2xv5e:16x16` (two slices, or joined nodes), `h100:64`, `cpu:8`."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixtral_jax.errors import InputError, nearest
from mixtral_jax.sharding import chips
from mixtral_jax.sharding.chips import Chip, Switched, Torus, quiet_compiler

EXAMPLES = "such as v5p:4x4x4, v6e:8x8, 2xv5e:16x16, h100:64 or cpu:8"

_NAME = re.compile(r"(?:(\d+)x(?=[a-z]))?([a-z]\w*):(\d+(?:x\d+)*)")
# Slices that can be had (cloud.google.com/tpu/docs); cubes of 4 x 4 x 4 also join to others.
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_PLANNED = tuple(name for name in chips.names() if name != "v7x")  # of which jax shows two devices a chip


@dataclass(frozen=True)
class Topology:
    """Chips and how they are joined."""

    name: str
    chip: Chip | None
    """None for a CPU: nothing is estimated of it."""
    shape: tuple[int, ...]
    """Of a slice's torus, or how many chips a switched machine has."""
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        return self.chip is not None and isinstance(self.chip.wiring, Torus)

    @property
    def island(self) -> int:
        """Chips that only fast links join: of a slice, or of a node."""
        if self.chip is not None and isinstance(self.chip.wiring, Switched):
            return min(self.num_chips, self.chip.wiring.node)
        return self.num_chips // self.slices

    def larger(self) -> Topology | None:
        """The next larger one of the same chip; None where there is none."""
        if self.chip is None:
            return None
        if not self.is_tpu:
            return topology(f"{self.chip.name.lower()}:{self.num_chips * 2}")
        known = [topology(f"{self.chip.name}:{each}") for each in _shapes(self.chip)]
        wider = [each for each in known if each.num_chips > self.num_chips]
        return min(wider, key=lambda each: each.num_chips) if wider else None


def topology(name: str) -> Topology:
    """The machine of a name.

    Raises:
      InputError: no such machine; the nearest is named.
    """
    found = _NAME.fullmatch(name.strip().lower())
    if found is None:
        raise InputError("--topology", name, f"written as chip:shape, {EXAMPLES}")
    slices, kind, shape = int(found[1] or 1), found[2], tuple(int(size) for size in found[3].split("x"))
    if kind not in (*_PLANNED, "cpu"):
        known = [*_PLANNED, "cpu"]
        raise InputError("--topology", name, f"{nearest(kind, known)}known chips: {', '.join(known)}")
    if slices < 1 or 0 in shape:
        raise InputError("--topology", name, "at least one chip is needed")
    chip = None if kind == "cpu" else chips.chip_by_name(kind)
    canonical = f"{f'{slices}x' if slices > 1 else ''}{kind}:{found[3]}"
    if chip is None or isinstance(chip.wiring, Switched):
        if len(shape) > 1 or slices > 1:
            raise InputError("--topology", name, f"a number of devices, such as {kind}:{slices * math.prod(shape)}")
        if chip is not None and isinstance(chip.wiring, Switched) and shape[0] > 8 and shape[0] % chip.wiring.node:
            raise InputError("--topology", name, f"whole nodes of {chip.wiring.node}, or part of one")
        return Topology(canonical, chip, shape)
    _check_slice(name, chip, chip.wiring, found[3], shape)
    return Topology(canonical, chip, shape, slices)


def _shapes(chip: Chip) -> tuple[str, ...]:
    assert isinstance(chip.wiring, Torus)
    return _CUBES if chip.wiring.dimensions == 3 else _SQUARES


def _check_slice(name: str, chip: Chip, torus: Torus, written: str, shape: tuple[int, ...]) -> None:
    whole_cubes = len(shape) == torus.dimensions == 3 and all(size % 4 == 0 and size <= 24 for size in shape)
    if written in _shapes(chip) or whole_cubes:
        return
    num_chips = math.prod(shape)
    same = [each for each in _shapes(chip) if math.prod(int(size) for size in each.split("x")) == num_chips]
    hint = f"did you mean {chip.name}:{same[0]}? " if same else nearest(written, _shapes(chip))
    more = ", or sizes that 4 divides" if torus.dimensions == 3 else ""
    raise InputError("--topology", name, f"{hint}{chip.name} comes as {', '.join(_shapes(chip))}{more}")


def devices(machine: Topology) -> Sequence[Any]:
    """Devices to compile for: of a TPU described by its compiler, of a CPU this host's.

    Raises:
      InputError: there is no compiler for it here.
    """
    import jax

    if machine.chip is None:
        if len(jax.devices("cpu")) < machine.num_chips:
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={machine.num_chips}"
            raise InputError("--topology", machine.name, f"jax shows {len(jax.devices('cpu'))} here; set {flag}")
        return jax.devices("cpu")[: machine.num_chips]
    if not machine.is_tpu:
        raise InputError("--topology", machine.name, "GPUs are planned from counts alone; use --no-compile")
    require_compiler()
    from jax.experimental import topologies

    quiet_compiler()
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


def compile_ahead(lowered: Any) -> Any:
    """A lowered program, compiled for devices that are not here.

    jax would write it to the persistent cache of programs, and fail to read it from there the next time.
    """
    import jax

    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        return lowered.compile()
    finally:
        jax.config.update(option, before)


def has_compiler() -> bool:
    """Whether a compiler for TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def require_compiler() -> None:
    """Raises InputError unless a compiler for TPUs is installed, of the version that this jax wants."""
    advice = "the compiler for TPUs is needed: pip install 'mixtral-jax[plan]', or --no-compile for the counts alone"
    if not has_compiler():
        raise InputError("libtpu", None, f"is not installed; {advice}")
    from importlib import metadata

    here, wanted = metadata.version("libtpu"), _wanted_version(metadata.requires("jax") or [])
    if wanted is not None and not f"{here}.".startswith(f"{wanted}."):
        raise InputError("libtpu", here, f"this jax {metadata.version('jax')} wants {wanted}; {advice}")


def _wanted_version(requirements: Sequence[str]) -> str | None:
    """The version of libtpu that jax pins, without its last part: 0.0.42 of `libtpu==0.0.42.*`."""
    pins = [re.match(r"libtpu\s*\(?==\s*([\d.]+?)(?:\.\*)?\)?\s*(?:;|$)", each) for each in requirements]
    return next((pin[1] for pin in pins if pin), None)

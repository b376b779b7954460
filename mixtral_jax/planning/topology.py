"""Machines by name: `v5p:4x4x4`, `2xv5e:16x16` (two slices, or joined nodes), `h100:64`, `cpu:8`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mixtral_jax.errors import InputError, nearest
from mixtral_jax.planning.job import Platform
from mixtral_jax.sharding import chips
from mixtral_jax.sharding.chips import Chip, Switched, Torus

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
    def platform(self) -> Platform:
        """Jax's name of it."""
        return "cpu" if self.chip is None else "tpu" if self.is_tpu else "cuda"

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

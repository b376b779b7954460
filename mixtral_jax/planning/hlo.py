"""The collectives of a compiled program: what moves between devices, how much of it, and over which mesh axes.

Devices are numbered by their place in the mesh, as compiled programs number them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mixtral_jax.planning.hlo_text import Call, Computation, Instruction, Program, parse, trips

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

Groups = list[tuple[int, ...]]


class HasShape(Protocol):
    """A mesh, or an abstract one."""

    @property
    def shape(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    kind: str
    """What it does, of KINDS. An all-reduce of parts put into zeros is an all-gather, and one of which each device
    keeps a slice a reduce-scatter, as they are in effect."""
    written: str
    """What the program says, of KINDS."""
    axes: tuple[str, ...]
    """The mesh axes along which it moves data; none where its groups are of one device."""
    group_size: int
    """Devices that take part together."""
    bytes: int
    """Of a device's data each time: the whole of what is gathered, reduced, scattered, exchanged or sent on. Of a
    ragged exchange, the most that fits the smaller of its two buffers."""
    count: int
    """Times a run of the program does it."""
    count_is_known: bool
    """False in a loop whose length only running tells; it is counted as if it went round once."""
    shape: str
    """The type of its result."""
    source: str
    """The operation of the model that it is for, as jax names it; empty where it says none."""

    @property
    def total_bytes(self) -> int:
        return self.bytes * self.count

    @property
    def sent_bytes(self) -> float:
        """What a device sends in a run of the program if its group passes data round a ring."""
        return self.total_bytes * sent_fraction(self.kind, self.group_size)


def sent_fraction(kind: str, group_size: int) -> float:
    """The part of a collective's data that each device sends: 7/8 of what eight gather, twice that of what they sum."""
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group_size - 1) / group_size


def collectives(text: str, mesh: HasShape) -> list[Collective]:
    """Each collective of a compiled program.

    Args:
      text: `compiled.as_text()`.
      mesh: that it was compiled for.
    """
    program = parse(text)
    found = []
    for computation, instruction, count, known in _walk(program, program.entry, 1, True, None):
        written = instruction.opcode.removesuffix("-start")
        if written in KINDS:
            found.append(_collective(program, computation, instruction, written, count, known, mesh))
    return found


def bytes_by_axes(found: list[Collective]) -> dict[tuple[tuple[str, ...], str], float]:
    """What a device sends, by axes and kind."""
    total: Counter[tuple[tuple[str, ...], str]] = Counter()
    for each in found:
        total[each.axes, each.kind] += each.sent_bytes  # type: ignore[assignment]  # a Counter of floats
    return dict(total)


def _walk(
    program: Program, computation: Computation, count: int, known: bool, path: Call | None
) -> Iterator[tuple[Computation, Instruction, int, bool]]:
    """Every instruction that runs, and how often; each branch of a conditional as if it were taken."""
    for instruction in computation.instructions.values():
        yield computation, instruction, count, known
        call = Call(computation, instruction, path)
        if instruction.opcode == "while":
            times = trips(instruction, program, call)
            body = program.computations[instruction.called("body")]
            yield from _walk(program, body, count * (1 if times is None else times), known and times is not None, call)
        elif instruction.opcode.removesuffix("-start") not in (*KINDS, "reduce", "fusion"):
            for name in instruction.calls:
                yield from _walk(program, program.computations[name], count, known, call)
        elif instruction.opcode == "fusion":
            yield from _walk(program, program.computations[instruction.called("calls")], count, known, None)


def _collective(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    written: str,
    count: int,
    known: bool,
    mesh: HasShape,
) -> Collective:
    groups = _groups(instruction.attributes, math.prod(mesh.shape.values()), written)
    # A permutation's pairs are (source, target): of a mesh axis, whatever the distance.
    size = 2 if written == "collective-permute" else max(len(group) for group in groups)
    kind = _effect(program, computation, instruction) if written == "all-reduce" else written
    given = [computation.instructions[name].bytes for name in instruction.operands]
    if written == "ragged-all-to-all":
        data = min(given[:2])
    elif written == "all-gather":
        data = sum(given) * size
    elif written == "all-reduce":
        # TPU casts within the operation: what travels is the narrower.
        data = min(sum(given), instruction.bytes)
    else:
        data = sum(given)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(
        kind=kind,
        written=written,
        axes=_axes(groups, mesh),
        group_size=size,
        bytes=data,
        count=count,
        count_is_known=known,
        shape=re.sub(r"\{[^}]*\}", "", instruction.type),
        source=source[1] if source else "",
    )


def _groups(attributes: str, num_devices: int, written: str) -> Groups:
    """The devices that take part together, in any of the ways to write them; see `_parsed`."""
    if written == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}|source_target_pairs=\{\}", attributes)
        assert pairs is not None, attributes
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", "{" + (pairs[1] or "").lstrip("{"))] or [(0,)]
    found = re.search(r"replica_groups=(.*?)(?:, (?:[a-z_]+=)(?<!device_ids=)|$)", attributes)
    assert found is not None, attributes
    return _parsed(found[1]) or [tuple(range(num_devices))]


def _parsed(text: str) -> Groups:
    """Groups from `{{0,1},{2,3}}`, `[2,2]<=[4]` with a transpose `T(1,0)`, or `mesh['a'=2,'b'=2] {'b'}`."""
    if text.startswith("mesh"):
        head, _, chosen = text.rpartition(" {")
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", head)}
        listed = re.search(r"device_ids=\(([^)]*\)?[^)]*)\)", head)
        devices = _iota(listed[1]) if listed else np.arange(math.prod(sizes.values()))
        return _along(devices.reshape(list(sizes.values())), list(sizes), chosen)
    if text.startswith("["):
        shape, _, order = text.partition("<=")
        return [tuple(group) for group in _iota(order).reshape(json_list(shape)).tolist()]
    return [tuple(json_list(group)) for group in re.findall(r"\{([\d,]+)\}", text)]


def _along(devices: np.ndarray, names: list[str], chosen: str) -> Groups:
    """Groups along the chosen axes; of `'a':(2)4` only along the 4 parts inside each of 2."""
    shape: list[int] = []
    moved: list[int] = []
    parts = {name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", chosen)}
    for name, size in zip(names, devices.shape, strict=True):
        before, inside = parts.get(name, (1, size))
        if f"'{name}'" in chosen:
            moved.append(len(shape) + 1)
        shape += [before, inside, size // (before * inside)]
    split = devices.reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in moved]
    size = math.prod(shape[axis] for axis in moved)
    return [tuple(group) for group in split.transpose(rest + moved).reshape(-1, size).tolist()]


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers 0..7 as [2, 4], transposed; `[8]` as they are; or a list of numbers."""
    shape, _, order = text.partition("T")
    sizes = json_list(shape)
    if "[" not in shape:
        return np.array(sizes)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(json_list(order)) if order else numbers


def json_list(text: str) -> list[int]:
    """The integers in a text."""
    return [int(each) for each in re.findall(r"\d+", text)]


def _axes(groups: Groups, mesh: HasShape) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    moved = set()
    for group in groups:
        places = np.unravel_index(np.array(group), tuple(mesh.shape.values()))
        moved |= {axis for axis, place in zip(mesh.shape, places, strict=True) if len(set(place.tolist())) > 1}
    return tuple(axis for axis in mesh.shape if axis in moved)


def _effect(program: Program, computation: Computation, instruction: Instruction) -> str:
    """What an all-reduce is for: `all-gather` of parts that each device put into zeros, or `reduce-scatter`."""
    if all(_is_part_in_zeros(program, computation, name) for name in instruction.operands):
        return "all-gather"
    users = computation.users(instruction.name)
    elements = [user.name for user in users if user.opcode == "get-tuple-element"]
    taken = [(user, name) for name in elements or [instruction.name] for user in computation.users(name)]
    if taken and all(_takes_slice(program, user, name) for user, name in taken):
        return "reduce-scatter"
    return "all-reduce"


def _is_part_in_zeros(program: Program, computation: Computation, name: str) -> bool:
    found = computation.source(name)
    if found is None:
        return False
    if found.opcode == "dynamic-update-slice":
        whole = computation.source(found.operands[0])
        return whole is not None and whole.opcode == "broadcast"
    if found.opcode == "fusion":
        inner = program.computations[found.called("calls")]
        update = inner.source(inner.root)
        if update is None or update.opcode != "dynamic-update-slice":
            return False
        whole = inner.source(update.operands[0])
        if whole is not None and whole.opcode == "parameter":
            whole = computation.source(found.operands[int(whole.inside)])
        return whole is not None and whole.opcode == "broadcast"
    return False


def _takes_slice(program: Program, user: Instruction, name: str) -> bool:
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name
    if user.opcode != "fusion":
        return False
    inner = program.computations[user.called("calls")]
    places = [str(index) for index, operand in enumerate(user.operands) if operand == name]
    own = [each.name for each in inner.instructions.values() if each.opcode == "parameter" and each.inside in places]
    users = [each for parameter in own for each in _direct_users(inner, parameter)]
    return bool(users) and all(each.opcode == "dynamic-slice" for each in users)


def _direct_users(computation: Computation, name: str) -> list[Instruction]:
    """Who uses a value, looking through changes of layout and dtype."""
    direct: list[Instruction] = []
    for user in computation.users(name):
        same = user.opcode in ("bitcast", "convert", "copy", "reshape")
        direct += _direct_users(computation, user.name) if same else [user]
    return direct

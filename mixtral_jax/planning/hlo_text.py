"""Reads the text of a compiled program (HLO): its computations, their instructions, and how often loops run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME_VALUE = {"copy", "copy-start", "copy-done", "bitcast", "reshape", "transpose", "convert", "optimization-barrier"}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    """Names of instructions of the same computation; of a constant or a parameter none."""
    inside: str
    """What stands between the parentheses, as it is written."""
    attributes: str

    @property
    def bytes(self) -> int:
        """Of its result, without padding."""
        return array_bytes(self.type)

    @property
    def calls(self) -> list[str]:
        """The computations that it runs, a loop's condition among them."""
        branches = _BRANCHES.search(self.attributes)
        listed = [each.strip().lstrip("%") for each in branches[1].split(",")] if branches else []
        return _CALLED.findall(self.attributes) + listed

    def called(self, role: str) -> str:
        """The computation of a role, such as `body`."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        assert found is not None, (self.name, role)
        return found[1]


@dataclass
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def source(self, name: str) -> Instruction | None:
        """The instruction whose value the named one passes on, through copies and changes of layout or dtype."""
        found = self.instructions.get(name)
        while found is not None and found.opcode in _SAME_VALUE and found.operands:
            found = self.instructions.get(found.operands[0])
        return found

    def users(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions.values() if name in each.operands]


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation


@dataclass(frozen=True)
class Call:
    """A loop or a call on the way to a computation, for what its parameter holds."""

    caller: Computation
    instruction: Instruction
    before: Call | None


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations[head[2]] = Computation(head[2])
            entry = current if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, type_, opcode, rest = found.groups()
            inside, attributes = _split_at_close(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            current.instructions[name] = Instruction(name, type_, opcode, operands, inside, attributes)
            current.root = name if root else current.root
    assert entry is not None, "no ENTRY computation"
    return Program(computations, entry)


def _split_at_close(rest: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and after it."""
    depth = 1
    for index, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:index], rest[index + 1 :]
    return rest, ""


def array_bytes(type_: str) -> int:
    """Bytes of a type's arrays, a tuple's together: 24 for `(f32[2,2]{1,0}, bf16[4]{0})`."""
    return sum(
        math.ceil(_bits(dtype) * math.prod(int(size) for size in shape.split(",") if size) / 8)
        for dtype, shape in _ARRAY.findall(type_)
    )


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"^[a-z]+", "", dtype))


def trips(loop: Instruction, program: Program, path: Call) -> int | None:
    """How often a `while` runs its body; None where the text does not tell, as of a loop until something is done.

    Args:
      path: the call that has the loop as its instruction.
    """
    known = _TRIPS.search(loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.called("condition")]
    compare = condition.instructions[condition.root]
    if compare.opcode == "fusion":  # the CPU's compiler wraps even this
        return None
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, limit = (_constant(condition, name, path) for name in compare.operands)
    return None if limit is None else limit - (counter or 0)


def _constant(computation: Computation, name: str, path: Call | None) -> int | None:
    """An integer that is known when compiling; of a loop's variable, what it begins with."""
    found = computation.source(name)
    if found is None:
        return None
    if found.opcode == "constant":
        return int(found.inside) if re.fullmatch(r"-?\d+", found.inside) else None
    if found.opcode != "get-tuple-element" or path is None:
        return None
    holder = computation.source(found.operands[0])
    index = re.search(r"index=(\d+)", found.attributes)
    assert index is not None
    if holder is None or holder.opcode != "parameter":
        return None
    given = path.caller.source(path.instruction.operands[0])
    if given is None or given.opcode != "tuple":
        return None
    return _constant(path.caller, given.operands[int(index[1])], path.before)

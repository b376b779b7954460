"""Whether a run's checkpoint is what was written: the size and SHA-256 of every file of a step, kept in the step.

Orbax commits a step whole or not at all, but loads a flipped bit without a word. Once a step is committed each of the
processes that wrote it reads its share of the files, and leaves their digests beside them:

checkpoints/STEP/DIGESTS.0-of-2    a line with the SHA-256 of the rest, and the rest, a JSON object

A step is verified where all of these are there and all that they name is as they say.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any, NamedTuple

from mixtral_jax.checkpoints.buckets import Folder, filesystem
from mixtral_jax.errors import InputError

PREFIX = "DIGESTS."
READERS = 4
_CHUNK = 4 << 20


class Standing(IntEnum):
    """How a step stands; of several processes the worst counts."""

    VERIFIED = 0
    UNFINISHED = 1
    """No, or not all, digests: what wrote it was ended, or it is no checkpoint."""
    DAMAGED = 2


class Verdict(NamedTuple):
    """What was found of a step."""

    standing: Standing
    fault: str
    """The file and what is wrong with it; empty where nothing is."""


class NotDigests(ValueError):
    """A file of digests that is damaged itself."""


def saved_steps(checkpoints: Folder) -> list[int]:
    """The steps that have a folder, whatever it holds, in order."""
    system, root = filesystem(checkpoints)
    if not system.exists(root):
        return []
    names = (each["name"].rstrip("/").rpartition("/")[2] for each in system.ls(root, detail=True))
    return sorted(int(name) for name in names if name.isdigit() and str(int(name)) == name)


def write_digests(step: Folder, part: int = 0, parts: int = 1, about: dict[str, Any] | None = None) -> None:
    """Reads this process's share of a committed step's files and writes their digests.

    Args:
      step: its folder.
      part: which process this is, of `parts`.
      about: kept with them; `read_about` gives it back.
    """
    system, root = filesystem(step)
    mine = _files(system, root)[part::parts]
    digests = {name: [system.size(f"{root}/{name}"), _sha256(system, f"{root}/{name}")] for name in mine}
    body = json.dumps({"about": about or {}, "files": digests}, sort_keys=True).encode()
    target = f"{root}/{PREFIX}{part}-of-{parts}"
    partial = f"{root}/{PREFIX}{part}.partial"
    system.pipe_file(partial, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    system.mv(partial, target)


def read_about(step: Folder) -> dict[str, Any]:
    """What was written as `about` by process 0; empty where there is nothing readable."""
    system, root = filesystem(step)
    for name in _records(system, root):
        if name.startswith(f"{PREFIX}0-of-"):
            try:
                return dict(_read_record(system, f"{root}/{name}")["about"])
            except (NotDigests, OSError):
                return {}
    return {}


def verify(step: Folder, part: int = 0, parts: int = 1, item: str | None = None) -> Verdict:
    """Reads a step's files, or this process's share of them, and compares them with their digests.

    Args:
      step: its folder.
      part: which process this is, of `parts`.
      item: such as `params`: of the step's folders only this one counts.
    """
    system, root = filesystem(step)
    records = _records(system, root)
    counts = {name.rpartition("-of-")[2] for name in records}
    wanted = [f"{PREFIX}{number}-of-{count}" for count in counts if count.isdigit() for number in range(int(count))]
    absent = sorted(set(wanted) - set(records)) if records else [f"{PREFIX}0-of-1"]
    if absent or len(counts) != 1 or not wanted:
        return Verdict(Standing.UNFINISHED, f"{root}/{(absent or records)[0]}: no digests of this step's files")
    expected: dict[str, Any] = {}
    for name in records:
        try:
            expected |= _read_record(system, f"{root}/{name}")["files"]
        except (NotDigests, OSError):
            return Verdict(Standing.DAMAGED, f"{root}/{name}: damaged itself")
    needed = [name for name in sorted(expected) if item is None or "/" not in name or name.startswith(f"{item}/")]
    sizes = {name: info["size"] for name, info in system.find(root, detail=True).items()}

    def fault(name: str) -> str:
        path, (size, digest) = f"{root}/{name}", expected[name]
        found = sizes.get(path)
        if found is None:
            return f"{path}: missing"
        if found != size:
            return f"{path}: {found} bytes instead of {size}"
        try:
            return "" if _sha256(system, path) == digest else f"{path}: its SHA-256 is not what was written"
        except OSError as error:
            return f"{path}: {error.strerror or error}"

    with ThreadPoolExecutor(READERS) as pool:
        first = next(filter(None, pool.map(fault, needed[part::parts])), "")
    return Verdict(Standing.DAMAGED if first else Standing.VERIFIED, first)


class Choice(NamedTuple):
    """The step to read, and what spoke against those after it."""

    step: int | None
    """None: there is no step at all."""
    verified: bool
    passed_by: dict[int, str]
    """The newer steps, and the fault of each."""


def choose(
    checkpoints: Folder,
    look: Callable[[Folder], Verdict],
    is_checkpoint: Callable[[Folder], bool],
    steps: Iterable[int] | None = None,
) -> Choice:
    """The newest step that is verified.

    Where none is, the newest that was committed without its digests: by a process that was ended just then.

    Args:
      checkpoints: the folder of the steps.
      look: judges a step's folder.
      is_checkpoint: whether a folder without digests holds what a checkpoint does.
      steps: those to choose from; by default all.

    Raises:
      InputError: there are steps, and all that hold something are damaged.
    """
    found = saved_steps(checkpoints) if steps is None else sorted(steps)
    passed_by: dict[int, str] = {}
    unfinished: int | None = None
    damaged = False
    for step in reversed(found):
        standing, fault = look(checkpoints / str(step))
        if standing == Standing.VERIFIED:
            return Choice(step, True, passed_by)
        damaged |= standing == Standing.DAMAGED
        if unfinished is None and standing == Standing.UNFINISHED and is_checkpoint(checkpoints / str(step)):
            unfinished = step
        passed_by[step] = fault
    if unfinished is not None:
        return Choice(unfinished, False, {step: fault for step, fault in passed_by.items() if step > unfinished})
    if damaged:
        faults = "; ".join(passed_by.values())
        raise InputError(os.fspath(checkpoints), sorted(passed_by), f"none of these steps is whole: {faults}")
    return Choice(None, True, passed_by)


def warn_of(choice: Choice) -> None:
    """Says which steps are passed by, and that one is used unverified."""
    used = "the run begins anew" if choice.step is None else f"step {choice.step} is used"
    for step, fault in choice.passed_by.items():
        warnings.warn(f"CHECKPOINT {step} IS NOT USED: {fault}; {used}", stacklevel=3)
    if not choice.verified:
        warnings.warn(
            f"CHECKPOINT {choice.step} IS NOT VERIFIED: what wrote it was ended before it wrote the digests",
            stacklevel=3,
        )


def _files(system: Any, root: str) -> list[str]:
    names = sorted(name.removeprefix(f"{root}/") for name in system.find(root))
    return [name for name in names if not name.startswith(PREFIX)]


def _records(system: Any, root: str) -> list[str]:
    names = (name.removeprefix(f"{root}/") for name in system.find(root, maxdepth=1))
    return sorted(name for name in names if name.startswith(PREFIX) and not name.endswith(".partial"))


def _read_record(system: Any, path: str) -> dict[str, Any]:
    digest, _, body = system.cat_file(path).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise NotDigests(path)
    record: dict[str, Any] = json.loads(body)
    return record


def _sha256(system: Any, path: str) -> str:
    digest = hashlib.sha256()
    with system.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

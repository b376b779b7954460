"""Several processes, each with devices of its own, that run one program: joining them, and what they must agree on."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.errors import InputError

HEARTBEAT = 60
"""Seconds without a sign of life after which the others take a process for dead, and end."""

_Result = TypeVar("_Result")


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of several; to be called before jax looks for devices. Alone, it stays alone.

    Without arguments jax looks whether a cluster has started it: Slurm, Cloud TPU, GKE, or Open MPI.

    Args:
      coordinator: host:port of process 0, the same in all.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      InputError: some arguments without the others, or the coordinator is not reached.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise InputError(missing[0], None, f"is needed with {', '.join(name for name in given if name not in missing)}")
    if not missing:
        _check(str(coordinator), int(num_processes or 0), int(process_id or 0))
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError:
        if not missing:
            raise
        # No cluster has started this process.
    except RuntimeError as error:
        raise InputError("--coordinator", coordinator, f"not joined: {str(error).splitlines()[0]}") from None


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError("--coordinator", coordinator, "written as host:port")
    if num_processes < 1:
        raise InputError("--num-processes", num_processes, "a number above zero is needed")
    if not 0 <= process_id < num_processes:
        raise InputError("--process-id", process_id, f"from 0 to --num-processes - 1 = {num_processes - 1}")


@contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Ends this process at once on an error, where there are several: at a tidy exit it would wait for the others, who
    wait for it."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, InputError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, InputError) else 1)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once, and speaks."""
    return jax.process_index() == 0


def together(task: Callable[[], _Result]) -> _Result:
    """The task's result, once it is done in every process.

    Raises:
      InputError: it failed in this process; or, here and in all others, it failed elsewhere.
    """
    if jax.process_count() == 1:
        return task()
    failure: InputError | None = None
    try:
        result = task()
    except InputError as error:
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.bool_(failure is not None)))
    if failure is not None:
        raise failure
    if len(failed):
        raise InputError(f"process {failed[0]}", None, "stopped, with a message of its own")
    return result


def first_alone(task: Callable[[], _Result]) -> _Result:
    """The task's result in every process; the others begin when the first is done, and find what it has left."""
    if jax.process_count() > 1 and not is_first():
        together(lambda: None)
        return together(task)
    result = together(task)
    if jax.process_count() > 1:
        together(lambda: None)
    return result


def same_in_all(value: bytes) -> bool:
    """Whether all processes have the same bytes, of a length that they share."""
    if jax.process_count() == 1:
        return True
    values = multihost_utils.process_allgather(np.frombuffer(value, np.uint8))
    return bool((values == values[:1]).all())


def largest(value: int) -> int:
    """The largest of all processes' values, in every one."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())

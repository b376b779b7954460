"""The command line with a fault in it: `python -m benchmarks.chaos.injected nan=3,4 train CONFIG ...`.

For what can't be done to a process from outside. Faults are joined by `+`; steps count from 0.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

Change = Callable[[int, Any], Any]
"""Makes of a step and its batch the batch that is used."""


def _steps(text: str) -> set[int]:
    return set(map(int, text.split(",")))


def nan(steps: str) -> Change:
    """The batches of these steps have a loss that is not a number."""
    wrong = np.float32("nan")
    return lambda step, batch: batch._replace(loss_weight=batch.loss_weight * wrong) if step in _steps(steps) else batch


def noise(steps: str) -> Change:
    """The batches of these steps ask for tokens that the text hardly has."""

    def change(step: int, batch: Any) -> Any:
        if step not in _steps(steps):
            return batch
        return batch._replace(targets=np.random.default_rng(0).integers(0, 40, batch.targets.shape, np.int32))

    return change


def slow(seconds: str) -> Change:
    """A step takes at least so long."""

    def change(step: int, batch: Any) -> Any:
        time.sleep(float(seconds))
        return batch

    return change


def hang(at: str) -> Change:
    """A step never ends."""

    def change(step: int, batch: Any) -> Any:
        while step == int(at):
            time.sleep(3600)
        return batch

    return change


def error(at: str) -> Change:
    """An exception before a step, in the process of this number: `STEP,PROCESS`."""
    import jax

    step_number, process = map(int, at.split(","))

    def change(step: int, batch: Any) -> Any:
        if step == step_number and jax.process_index() == process:
            raise RuntimeError(f"injected at step {step}")
        return batch

    return change


def room(free: str) -> Change:
    """The disk is said to have so many bytes free."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=int(free))  # type: ignore[attr-defined]
    return lambda step, batch: batch


FAULTS: dict[str, Callable[[str], Change]] = {
    "nan": nan,
    "noise": noise,
    "slow": slow,
    "hang": hang,
    "error": error,
    "room": room,
}


def main() -> None:
    """Puts the faults in, and runs the command line."""
    from mixtral_jax.cli.main import main as command_line
    from mixtral_jax.train.feed import Feed

    faults = [each.partition("=") for each in sys.argv.pop(1).split("+")]
    changes = [FAULTS[name](value) for name, _, value in faults]
    training = Feed.training

    def changed(self: Feed, first: int) -> Generator[Any]:
        for step, batch in enumerate(training(self, first), first):
            for change in changes:
                batch = change(step, batch)
            yield batch

    Feed.training = changed  # type: ignore[method-assign]
    command_line()


if __name__ == "__main__":
    main()

"""Follows a run from another terminal: the numbers of its steps as they are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from mixtral_jax.errors import InputError
from mixtral_jax.train.metrics import METRICS, VALIDATION, read
from mixtral_jax.train.report import readable
from mixtral_jax.train.run_folder import read_config


def follow(run: str, every: float, sleep: Callable[[float], None] = time.sleep) -> Iterator[dict[str, Any]]:
    """Each line of a run's metrics and validation, those that are there first; ends with the run's last step.

    A run that was resumed from an earlier step is followed from there on.

    Args:
      every: seconds between two looks.

    Raises:
      InputError: it is no run, or the time between looks is not above zero.
    """
    if not every > 0:
        raise InputError("--every", every, "seconds above zero are needed")
    seen = {METRICS: -1, VALIDATION: -1}
    while True:
        with readable(run, also="config.toml") as folder:
            steps = read_config(folder).steps
            lines = {name: read(folder / name) for name in seen}
        for name, found in lines.items():
            newest = found[-1]["step"] if found else -1
            last = min(seen[name], newest) if newest < seen[name] else seen[name]
            yield from (line for line in found if line["step"] > last)
            seen[name] = newest
        if seen[METRICS] + 1 >= steps:
            return
        sleep(every)


def describe(line: dict[str, Any]) -> str:
    """A line of numbers; those of a step count it from 1."""
    if "unigram_entropy" in line:
        return f"step {line['step']}: held-out loss {line['loss']:.3f}"
    shown = ("loss", "balance_loss", "dropped_fraction", "expert_load_max", "grad_norm", "tokens_per_second", "mfu")
    numbers = "  ".join(f"{key} {line[key]:,.4g}" for key in shown if line.get(key) is not None)
    return f"step {line['step'] + 1}  {numbers}" + ("  skipped" if line.get("skipped") else "")

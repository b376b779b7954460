"""The guard: steps without an update, spikes of the loss, and when a run gives up."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from mixtral_jax.config import STRICT, require, require_positive
from mixtral_jax.train.metrics import METRICS, read

LEAST_SPREAD = 0.01
"""Of the median: a deviation counts as at least this, lest a loss that hardly moves have spikes in its last digits."""


class Diverged(RuntimeError):
    """Too many steps without an update; the last checkpoint is from before the last of them in a row."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GuardConfig:
    """What a run does when its loss goes wrong or a step does not end.

    A step whose loss or gradient is not finite makes no update, whatever is set here.
    """

    skipped_in_a_row: int = 5
    """Steps in a row without an update after which the run gives up."""
    skipped_in_all: int | None = None
    """Steps without an update, since the run began, after which it gives up; unset: any number."""
    spike_deviations: float = 10.0
    """A loss is a spike that is so many median absolute deviations above the median of those before; inf: none is."""
    spike_window: int = 50
    """Losses that the median is of; with fewer none is a spike."""
    skip_spikes: bool = False
    """Whether a step whose loss is a spike makes no update. All are told."""
    hang_seconds: float = 1800.0
    """Seconds without the end of a step after which the process writes the stacks of its threads and ends; inf: it
    waits. The first step, which is compiled, may take any time."""

    @model_validator(mode="after")
    def check(self) -> GuardConfig:
        require_positive(self, ("skipped_in_a_row", "skipped_in_all", "spike_window"))
        for name in ("spike_deviations", "hang_seconds"):
            require(getattr(self, name) > 0, name, getattr(self, name), "a number above zero, or inf")
        return self


def spike_limit(losses: Sequence[float], deviations: float) -> float:
    """The largest loss that is no spike, a float32, after these.

    Median and median absolute deviation, which a few spikes among the losses hardly move: of 2.0 2.1 2.2 2.3 9.0 they
    are 2.2 and 0.1, and with 10 deviations the limit is 3.2.
    """
    median = float(np.median(losses))
    spread = float(np.median(np.abs(np.asarray(losses) - median)))
    return float(np.float32(median + deviations * max(spread, LEAST_SPREAD * abs(median))))


class Guard:
    """Remembers a run's losses and the steps that made no update. The same in all processes, and after a resume."""

    def __init__(self, config: GuardConfig):
        self._config = config
        # When a step is begun the loss of the one before is not known yet: one more is kept than the window has.
        self._losses: deque[tuple[int, float]] = deque(maxlen=config.spike_window + 1)
        self.in_a_row = 0
        self.in_all = 0

    def recall(self, folder: Path | None) -> None:
        """Sees all that is in metrics.jsonl: of several processes the first has the folder, and tells the others."""
        for line in [] if folder is None else read(folder / METRICS):
            self._note(line["step"], math.nan if line["loss"] is None else line["loss"], line["skipped"])
        if jax.process_count() > 1:
            room = self._config.spike_window + 1 - len(self._losses)
            steps, losses = zip(*self._losses, *[(-1, 0.0)] * room, strict=True)
            counts = [self.in_a_row, self.in_all]
            own = np.array(steps, np.int32), np.array(losses, np.float32), np.array(counts, np.int32)
            at, found, both = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(own))
            self._losses.clear()
            self._losses.extend((int(step), float(loss)) for step, loss in zip(at, found, strict=True) if step >= 0)
            self.in_a_row, self.in_all = map(int, both)

    def limit(self, step: int) -> float:
        """The largest loss of a step, counted from 0, that is no spike, by those up to the step before the last."""
        losses = [loss for at, loss in self._losses if at < step - 1][-self._config.spike_window :]
        if math.isinf(self._config.spike_deviations) or len(losses) < self._config.spike_window:
            return math.inf
        return spike_limit(losses, self._config.spike_deviations)

    def argument(self, step: int) -> dict[str, Any]:
        """What a step that skips spikes is called with; nothing for any other, which is then the same program."""
        return {"limit": np.float32(self.limit(step))} if self._config.skip_spikes else {}

    def see(self, step: int, loss: float, skipped: bool) -> tuple[bool, list[str]]:
        """Takes a step's outcome: whether the loss is a spike, and what is to be told."""
        limit = self.limit(step)
        self._note(step, loss, skipped)
        spike = math.isfinite(loss) and loss > limit
        made = ", the update is skipped" if skipped else ""
        if spike:
            return True, [f"warning: step {step + 1}: loss {loss:.3f} is a spike, above {limit:.3f}{made}"]
        return False, [f"warning: step {step + 1}: loss or gradient is not finite{made}"] if skipped else []

    def check(self, step: int) -> None:
        """Raises Diverged if it is time to give up."""
        config = self._config
        bad = "loss or gradient was not finite" + (", or the loss a spike," if config.skip_spikes else "")
        kept = "the last checkpoint is from before"
        if self.in_a_row >= config.skipped_in_a_row:
            raise Diverged(f"{bad} in {self.in_a_row} steps in a row, up to step {step + 1}; {kept}")
        if self.in_a_row and config.skipped_in_all is not None and self.in_all >= config.skipped_in_all:
            raise Diverged(f"{bad} in {self.in_all} steps of this run, the last of them step {step + 1}; {kept}")

    def _note(self, step: int, loss: float, skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.in_all += skipped
        if math.isfinite(loss):
            self._losses.append((step, loss))

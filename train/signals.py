"""SIGTERM and SIGINT ask a run to stop at the end of the step; a second SIGINT stops it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_ASKING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Listens while the context lasts. `received` is the first signal that came, or None."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)

    def __enter__(self) -> Signals:
        self._before = {each: signal.signal(each, self._note) for each in _ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)


class Agreement:
    """Which signal all processes stop for, at the same step.

    Args:
      signals: this process's.
      mesh: the run's.
      largest: of an array with an element a device, jitted.
    """

    def __init__(self, signals: Signals, mesh: Mesh, largest: Callable[[jax.Array], jax.Array]):
        self._signals, self._mesh, self._largest = signals, mesh, largest
        self._asked: jax.Array | None = None

    def reached(self) -> signal.Signals | None:
        """To be called once a step.

        Alone: this process's signal, if it has one. Among several: what some process had when the step before was
        begun; the exchange of what they have by now goes on beside the step.
        """
        if jax.process_count() == 1:
            return self._signals.received
        before, self._asked = self._asked, self._exchange()
        return signal.Signals(int(before)) if before is not None and int(before) else None

    def _exchange(self) -> jax.Array:
        every = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        own = np.array([self._signals.received or 0], np.int32)
        return self._largest(jax.make_array_from_callback((self._mesh.size,), every, lambda _: own))

"""SIGTERM and SIGINT ask a run to stop at the end of the step; a second SIGINT stops it at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

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

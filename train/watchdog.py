"""Ends a process in which no step ends: what starts runs sees an exit status, where it would see nothing."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import jax

STACKS = "hang.txt"


class Watchdog:
    """A thread that waits for signs of life; a context manager.

    Args:
      seconds: without a sign after which the stack of every thread is written, to stderr and to `hang.txt`, and the
        process ends with exit status 1; inf: never.
      folder: the run's; None: of several processes, one that writes to stderr alone.
    """

    def __init__(self, seconds: float, folder: Path | None):
        self._seconds = seconds
        self._file = None if folder is None else folder / STACKS
        self._last: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self) -> None:
        """A sign of life; the first begins the watch."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if self._last is not None and time.monotonic() - self._last > self._seconds:
                self._end()

    def _end(self) -> None:
        try:
            where = "follows" if self._file is None else f"is in {self._file} and follows"
            number = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
            told = f"error: {number}no step has ended for {self._seconds:g} s (guard.hang_seconds)"
            print(f"{told}; the stack of every thread {where}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            if self._file is not None:
                with self._file.open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
        finally:
            os._exit(1)  # a tidy exit would wait for what hangs

    def __enter__(self) -> Watchdog:
        if math.isfinite(self._seconds):
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if math.isfinite(self._seconds):
            self._thread.join()

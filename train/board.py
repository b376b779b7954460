"""TensorBoard's file of a run."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

FLUSH_EVERY = 60.0
"""Seconds."""


class Board:
    """Writes scalars, in the caller's thread.

    tensorboardX's SummaryWriter leaves that to a thread of its own, whose end, say for a full disk, it does not notice:
    it waits for it for ever.

    Args:
      folder: made if it is not there.
      first_step: TensorBoard forgets what files before this one say of steps from here on.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(exist_ok=True)
        # Its names tell seconds apart: two starts within one would share a file.
        self._file = EventsWriter(os.fspath(folder / "events"), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))
        self._due = 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a step's numbers by their names."""
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))
        if time.monotonic() >= self._due:
            self._file.flush()
            self._due = time.monotonic() + FLUSH_EVERY

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()

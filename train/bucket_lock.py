"""Who has a run's folder in a bucket, where no lock of the operating system reaches.

The lock is an object that its owner writes anew every few seconds. One that stays as it is was left behind by a process
that died, however its clock is set, and is taken over.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

from mixtral_jax.checkpoints.buckets import Folder, filesystem
from mixtral_jax.errors import InputError

REFRESH = 10.0
"""Seconds between two signs of life."""
GRACE = 45.0
"""Seconds without one after which the owner is taken for dead."""


class BucketLock:
    """Takes the lock, waiting GRACE seconds where a dead process may have left it.

    Raises:
      InputError: another process is alive that has it.
    """

    def __init__(self, folder: Folder):
        self._system, root = filesystem(folder)
        self._folder, self._object = str(folder), f"{root}/.lock"
        self._name, self._beats = uuid.uuid4().hex, 0
        self._lost = False
        while not self._created():
            self._wait_for_the_other()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="bucket lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises InputError if another process has taken the lock over: this one was silent for too long."""
        if self._lost:
            raise InputError("--run-dir", self._folder, "another process has taken it over; this one stops")

    def release(self) -> None:
        """Gives the lock back."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            self._system.rm_file(self._object)

    @property
    def _own(self) -> bytes:
        return f"{self._name} {self._beats}".encode()

    def _created(self) -> bool:
        try:
            self._system.pipe_file(self._object, self._own, mode="create")
        except FileExistsError:
            return False
        return True

    def _read(self) -> Any:
        """What the lock says; None if there is none."""
        try:
            return self._system.cat_file(self._object)
        except FileNotFoundError:
            return None

    def _wait_for_the_other(self) -> None:
        """Until the lock is gone."""
        seen, end = self._read(), time.monotonic() + GRACE
        while time.monotonic() < end:
            time.sleep(REFRESH / 10)
            said = self._read()
            if said is None:
                return
            if said != seen:
                raise InputError("--run-dir", self._folder, "in use by another process")
        if self._read() == seen:
            self._system.rm_file(self._object)

    def _beat(self) -> None:
        while not self._ended.wait(REFRESH):
            try:
                self._lost = self._read() != self._own
                if self._lost:
                    return
                self._beats += 1
                self._system.pipe_file(self._object, self._own)
            except Exception:  # the bucket is out of reach: tried again at the next beat
                self._beats = self._said(self._beats)

    def _said(self, beats: int) -> int:
        """How many beats the lock has: a write that failed may have been one that was done."""
        try:
            said = self._read() or b""
        except Exception:  # still out of reach
            return beats - 1
        return int(said.split()[1]) if said.startswith(self._name.encode()) else beats

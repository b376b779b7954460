"""A run's folder: locked while in use, with the resolved config and what machine the run is on."""

from __future__ import annotations

import errno
import fcntl
import json
import platform
import sys
import time
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import tomli_w

from mixtral_jax.checkpoints.buckets import Folder, fetched, filesystem, is_remote, send, told_of_bucket
from mixtral_jax.checkpoints.run import CHECKPOINTS, CONFIG
from mixtral_jax.config import build, to_table
from mixtral_jax.errors import InputError
from mixtral_jax.train.bucket_lock import BucketLock
from mixtral_jax.train.config import TrainConfig, check_resumable

_LOCK = ".lock"
SYNC_EVERY = 30.0
"""Seconds between two sendings of a run's small files to its bucket, at least."""


class RunFolder:
    """Takes a folder for a run; a context manager that gives it back.

    Attributes:
      local: where the run's small files are written, all but checkpoints: the folder itself, or a copy of a bucket's.

    Args:
      path: the folder; made if it is not there. One that a run was begun in is resumed.
      config: what to train.

    Raises:
      InputError: it can't be written, another process uses it, it holds something else than a run, or a run whose
        config differs in what may not change.
    """

    def __init__(self, path: Folder, config: TrainConfig):
        self.path, self.local = path, self._make(path)
        try:
            if (self.local / CONFIG).is_file():
                check_resumable(read_config(self.local), config)
            elif self._holds_something():
                raise InputError("--run-dir", str(self.path), "holds files but no run; give a new folder or a run's")
            _write(self.local / CONFIG, tomli_w.dumps(to_table(config)))
            _write(self.local / "environment.json", json.dumps(environment(), indent=2) + "\n")
            self._begin()
        except BaseException:
            self._give_back()
            raise

    def sync(self, soon: bool = False) -> None:
        """Sees to it that the small files are where the folder is.

        Args:
          soon: at once, not only every so often.
        """

    def _make(self, path: Folder) -> Path:
        """Locks the folder; gives where its small files are."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / _LOCK, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError("--run-dir", str(path), f"{error.strerror}; a writable folder is needed") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError("--run-dir", str(path), "in use by another process") from None
        found: Path = path
        return found

    def _holds_something(self) -> bool:
        return any(each.name != _LOCK for each in self.path.iterdir())

    def _begin(self) -> None:
        (self.path / CHECKPOINTS).mkdir(exist_ok=True)

    def _give_back(self) -> None:
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()


class BucketFolder(RunFolder):
    """A run's folder in a bucket. Small files are written to a copy, whose changes are sent every so often, and when a
    checkpoint has been begun."""

    _lock_object: BucketLock
    _copy: AbstractContextManager[Path]

    def __init__(self, path: Folder, config: TrainConfig):
        self._sent: dict[Path, tuple[int, int]] = {}
        self._due = 0.0
        super().__init__(path, config)

    def sync(self, soon: bool = False) -> None:
        """See RunFolder. Takes a twentieth of the time at most; what fails is tried again the next time."""
        self._lock_object.check()
        if not soon and time.monotonic() < self._due:
            return
        started = time.monotonic()
        try:
            self._send()
        except InputError as error:
            warnings.warn(f"not sent yet: {error}", stacklevel=2)
        self._due = time.monotonic() + max(SYNC_EVERY, 20 * (time.monotonic() - started))

    def _send(self) -> None:
        with told_of_bucket(self.path, "--run-dir"):
            state = {file: file.stat() for file in self.local.rglob("*") if file.is_file()}
            found = {file: (stat.st_size, stat.st_mtime_ns) for file, stat in state.items()}
            send(self.local, self.path, (file for file, about in found.items() if self._sent.get(file) != about))
            self._sent = found

    def _make(self, path: Folder) -> Path:
        with told_of_bucket(path, "--run-dir"):
            self._lock_object = BucketLock(path)
            try:
                self._copy = fetched(path, lambda name: name != _LOCK)
                return self._copy.__enter__()
            except BaseException:
                self._lock_object.release()
                raise

    def _holds_something(self) -> bool:
        system, root = filesystem(self.path)
        return any(not each.endswith(f"/{_LOCK}") for each in system.ls(root, detail=False))

    def _begin(self) -> None:
        self._send()

    def _give_back(self) -> None:
        with told_of_bucket(self.path, "--run-dir"):
            self._lock_object.release()
        self._copy.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._lock_object.check()
            self._send()
        finally:
            self._give_back()


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk, or the user's share of it, has no room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def told_of_full_disk(folder: Folder) -> Iterator[None]:
    """Raises InputError where the disk that a run writes its files to is full."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise InputError(
            "--run-dir", str(folder), f"{error.strerror}{where}; the checkpoints are as they were"
        ) from None


def take(path: Folder, config: TrainConfig) -> RunFolder:
    """The folder of a path that `folder_at` gave, taken; see RunFolder."""
    return BucketFolder(path, config) if is_remote(path) else RunFolder(path, config)


def read_config(folder: Path) -> TrainConfig:
    """The resolved config of a run's folder.

    Raises:
      InputError: there is none, or it is not a run's.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise InputError("run", str(folder), f"not the folder of a training run: it has no {CONFIG}")
    return build(TrainConfig, tomllib.loads(file.read_text(encoding="utf-8")))


def environment() -> dict[str, Any]:
    """What decides a run's numbers besides its config."""
    packages = ("mixtral-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "packages": {name: _version(name) for name in packages},
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)

"""A run's folder: locked while in use, with the resolved config and what machine the run is on."""

from __future__ import annotations

import fcntl
import json
import platform
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import tomli_w

from mixtral_jax.checkpoints.run import CHECKPOINTS, CONFIG
from mixtral_jax.config import build, to_table
from mixtral_jax.errors import InputError
from mixtral_jax.train.config import TrainConfig, check_resumable

_LOCK = ".lock"


class RunFolder:
    """Takes a folder for a run; a context manager that gives it back.

    Args:
      path: the folder; made if it is not there. One that a run was begun in is resumed.
      config: what to train.

    Raises:
      InputError: it can't be written, another process uses it, it holds something else than a run, or a run whose
        config differs in what may not change.
    """

    def __init__(self, path: Path, config: TrainConfig):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / _LOCK, "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError("--run-dir", str(path), f"{error.strerror}; a writable folder is needed") from None
        try:
            self._take(config)
        except BaseException:
            self._lock.close()
            raise

    def _take(self, config: TrainConfig) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError("--run-dir", str(self.path), "in use by another process") from None
        if (self.path / CONFIG).is_file():
            check_resumable(read_config(self.path), config)
        elif any(each.name != _LOCK for each in self.path.iterdir()):
            raise InputError("--run-dir", str(self.path), "holds files but no run; give a new folder or a run's")
        _write(self.path / CONFIG, tomli_w.dumps(to_table(config)))
        _write(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        (self.path / CHECKPOINTS).mkdir(exist_ok=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()


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

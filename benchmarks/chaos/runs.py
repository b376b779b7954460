"""Runs of a toy in processes of their own, and what is seen of them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.toy import MODEL, TEXT
from mixtral_jax.checkpoints.digests import saved_steps
from mixtral_jax.train.metrics import METRICS, read

ROOT = Path(__file__).parents[2]
STEPS = 200
SAVE_EVERY = 10
TOY = f"""
steps = {STEPS}
save_every = {SAVE_EVERY}
log_every = 50
{MODEL}
[data]
sources = ["text"]
vocab_size = 300
sequence_length = 32
batch_size = 8
validation_fraction = 0.1
cache_dir = "cache"

[optimizer]
learning_rate = 1e-2
schedule = "constant"  # the losses of a shorter run are the first of a longer one

[dispatch]
capacity_factor = 1.25
group_size = 16
"""


@dataclass
class Seen:
    """What was seen of a fault, and whether all of it was as it should be."""

    facts: list[str] = field(default_factory=list)
    ok: bool = True

    def that(self, true: bool, fact: str) -> None:
        """A fact that should be true."""
        self.facts.append(fact if true else f"NOT SO: {fact}")
        self.ok &= true

    def __str__(self) -> str:
        return "; ".join(self.facts)


class Run:
    """Processes that train together."""

    def __init__(self, folder: Path, processes: list[subprocess.Popen], logs: list[Path]):
        self.folder, self.processes, self._logs = folder, processes, logs

    def wait(self, seconds: float = 180.0) -> list[int | None]:
        """Exit statuses; None for one that did not end, and is killed."""
        end, statuses = time.monotonic() + seconds, []
        for each in self.processes:
            try:
                statuses.append(each.wait(max(end - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                statuses.append(None)
                each.kill()
        return statuses

    def wait_for_step(self, step: int, seconds: float = 180.0) -> None:
        """Returns once so many steps have been written down."""
        end, file = time.monotonic() + seconds, self.folder / METRICS
        while not file.is_file() or file.read_bytes().count(b"\n") < step:
            if time.monotonic() > end or any(each.poll() is not None for each in self.processes):
                raise RuntimeError(f"no step {step}: {self.said()}")
            time.sleep(0.002)

    def said(self) -> str:
        """All that the processes have printed."""
        return "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in self._logs)

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        return read(self.folder / METRICS)

    def losses(self) -> list[float]:
        """The loss of each step so far."""
        return [line["loss"] for line in self.lines()]

    def saved(self) -> list[int]:
        """The steps of the checkpoints."""
        return saved_steps(self.folder / "checkpoints")


class Workshop:
    """Where runs are made. Its folder holds the toy's config, text and caches, and each run.

    Attributes:
      folder: all of it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "toy.toml").write_text(TOY, encoding="utf-8")
        (folder / "text").mkdir()
        for part in range(12):
            (folder / "text" / f"{part}.py").write_text(TEXT[part * 900 : part * 900 + 4000], encoding="utf-8")
        self._started = 0

    @cached_property
    def reference(self) -> list[float]:
        """The losses of a run that nothing happens to."""
        run = self.start("reference")
        if run.wait() != [0]:
            raise RuntimeError(run.said())
        return run.losses()

    @cached_property
    def finished(self) -> Path:
        """The folder of a run with the steps 10 and 20, to be copied."""
        run = self.start("finished", "steps=20")
        if run.wait() != [0] or run.saved() != [10, 20]:
            raise RuntimeError(run.said())
        return run.folder

    def copy(self, name: str) -> Path:
        """A copy of `finished`."""
        return Path(shutil.copytree(self.finished, self.folder / name))

    def last_said(self) -> str:
        """The end of what the process that was started last has said."""
        logs = sorted(self.folder.glob("*.log"), key=lambda log: log.stat().st_mtime_ns)
        return "\n".join(log.read_text(encoding="utf-8", errors="replace")[-6000:] for log in logs[-1:])

    def start(
        self,
        name: str | Path,
        *settings: str,
        fault: str | None = None,
        processes: int = 1,
        command: tuple[str, ...] = (),
    ) -> Run:
        """Starts a run of the toy, or goes on with one of this name.

        Args:
          name: its folder's.
          settings: such as steps=20.
          fault: see injected.
          processes: that train together, with a device each.
          command: what else the command line is given.
        """
        code = ["-c", "from mixtral_jax.cli.main import main; main()"]
        if fault is not None:
            code = ["-m", "benchmarks.chaos.injected", fault]
        folder = self.folder / name
        line = [sys.executable, "-W", "ignore:os.fork", *code, "train", "toy.toml", "--run-dir", str(folder), *command]
        line += [f"--set={each}" for each in settings]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        if processes > 1:
            line += ["--coordinator", f"127.0.0.1:{_port()}", "--num-processes", str(processes), "--process-id"]
        found, logs = [], []
        for number in range(processes):
            self._started += 1
            logs.append(self.folder / f"{folder.name}-{self._started}.log")
            own = [*line, str(number)] if processes > 1 else line
            with logs[-1].open("w") as log:
                found.append(
                    subprocess.Popen(own, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.folder)
                )
        return Run(folder, found, logs)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])

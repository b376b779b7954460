"""Where a run's numbers go: metrics.jsonl and routing.jsonl, one object a step, and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import unless_told
from mixtral_jax.model.flops import training_flops
from mixtral_jax.sharding.chips import chip
from mixtral_jax.train.board import Board

METRICS = "metrics.jsonl"
ROUTING = "routing.jsonl"
VALIDATION = "validation.jsonl"


class MetricsLog:
    """Appends to the files of a run's folder; a context manager.

    Args:
      folder: the run's; None: of several processes, one that only reads the numbers.
      first_step: steps at and after it are forgotten, since they will be done again.
    """

    def __init__(self, folder: Path | None, first_step: int):
        self._writes = folder is not None
        if folder is None:
            return
        for name in (METRICS, ROUTING, VALIDATION):
            _forget(folder / name, first_step)
        self._metrics = open(folder / METRICS, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._routing = open(folder / ROUTING, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._board = Board(folder / "tensorboard", first_step)

    def write(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Writes a step's numbers; gives them back as plain ones, an array by layer and expert left out."""
        load_LE = values.pop("expert_load", None)
        collapsed = values.pop("collapsed", None)
        plain = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        if not self._writes:
            return plain
        self._metrics.write(json.dumps(plain) + "\n")
        if load_LE is not None:
            load = np.round(np.asarray(load_LE, float), 4).tolist()
            alarm = {"collapsed": [each._asdict() for each in collapsed]} if collapsed else {}
            self._routing.write(json.dumps({"step": step, "load": load, **alarm}) + "\n")
        self._board.write(step, {key: each for key, each in plain.items() if key != "step" and each is not None})
        return plain

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        for each in (self._metrics, self._routing, self._board):
            with unless_told(error):
                each.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, without a last line that was cut off in the writing."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _forget(path: Path, first_step: int) -> None:
    kept = [each for each in read(path) if each["step"] < first_step]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(each) + "\n" for each in kept), encoding="utf-8")
    partial.replace(path)  # a process that is killed here leaves the one or the other, whole


def _plain(value: Any) -> Any:
    number = np.asarray(value).item() if value is not None else None
    return None if isinstance(number, float) and not math.isfinite(number) else number


def utilisation(config: ModelConfig, length: int, tokens_per_second: float) -> dict[str, float | None]:
    """Model FLOPs utilisation of all devices in both counts of attention; None where the chip's peak is unknown."""
    known = chip(jax.devices()[0])
    if known is None:
        return {"mfu": None, "mfu_full": None}
    peak = known.bf16_flops * jax.device_count()
    flops = training_flops(config, length)
    return {"mfu": flops.causal * tokens_per_second / peak, "mfu_full": flops.full * tokens_per_second / peak}

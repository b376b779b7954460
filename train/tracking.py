"""What else follows a run when it is asked to: a profile of some steps, and Weights & Biases."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from mixtral_jax.config import to_table
from mixtral_jax.errors import InputError
from mixtral_jax.train.config import TrainConfig

PROFILE = "profile"


@dataclass(frozen=True)
class Tracking:
    """How a run is followed: no part of what it is."""

    profile: range | None = None
    """Steps, counted from 1, that are traced into the run's folder; None: none."""
    wandb: str | None = None
    """The project of Weights & Biases that the metrics are sent to; None: none."""


NOTHING_MORE = Tracking()


def profile_steps(text: str | None) -> range | None:
    """The steps of `A:B`, from the A-th up to and with the B-th.

    Raises:
      InputError: it is no such thing.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError("--profile-steps", text, "A:B is needed, from 1, such as 10:12 for steps 10, 11 and 12")
    return range(int(found[1]), int(found[2]) + 1)


class Tracker:
    """What is on while a run goes on; a context manager.

    Args:
      tracking: what is asked for.
      config: the run's.
      folder: the run's; None: of several processes, one that writes nothing.

    Raises:
      InputError: Weights & Biases is not installed.
    """

    def __init__(self, tracking: Tracking, config: TrainConfig, folder: Path | None):
        self._steps = None if folder is None else tracking.profile
        self._folder, self._tracing = folder, False
        self._wandb = None
        if tracking.wandb is not None and folder is not None:
            self._wandb = _wandb().init(project=tracking.wandb, dir=str(folder), config=to_table(config))

    def before(self, step: int) -> None:
        """Before a step is begun, counted from 0: a trace begins with its first, as soon as that is the next."""
        if self._steps is not None and not self._tracing and step + 1 in self._steps:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call in every thread: it slows the steps that it is to show
            jax.profiler.start_trace(str(self._folder / PROFILE), profiler_options=options)  # type: ignore[operator]
            self._tracing = True

    def after(self, values: dict[str, Any]) -> None:
        """When a step's numbers are there, with the step itself under `step`, counted from 0."""
        if self._wandb is not None:
            numbers = {key: value for key, value in values.items() if key != "step" and value is not None}
            self._wandb.log(numbers, step=values["step"])
        if self._tracing and self._steps is not None and values["step"] + 1 >= self._steps[-1]:
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
        self._tracing, self._steps = False, None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def _wandb() -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise InputError("--wandb", "not installed", "pip install wandb") from None
    return wandb

"""What a run costs around its step: metrics, guard, watchdog, data and asynchronous checkpoints, beside the bare step.

A run is stopped in between for some steps of the same program alone, on a batch that is there: in one process, in
turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import jax

from benchmarks.timing import Row, rates
from mixtral_jax import configs
from mixtral_jax.config import build, override, read_toml
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train import loop
from mixtral_jax.train.config import TrainConfig
from mixtral_jax.train.optimizer import make_optimizer
from mixtral_jax.train.progress import Progress
from mixtral_jax.train.state import init_state

STEPS = 50
"""Of a turn, and between two checkpoints: each turn of the run has one in its middle."""
ALONE = 10
"""Bare steps of a turn."""
MOST = 1.03
SETTINGS = (
    # A step of some half a second; the demo's own takes three times as long.
    "data.batch_size=3",
    "validate_every=none",
    f"save_every={STEPS}",
    "log_every=1000000",
)


class Timed(loop.Run):
    """A run that is stopped in between."""

    took: dict[str, list[float]]
    _bare: Any = None
    _began = 0.0

    def _between(self, state: Any, done: int) -> None:
        super()._between(state, done)
        if done % STEPS != STEPS // 2:
            return
        self._settle()
        if self._bare is None:
            optimizer = make_optimizer(self.config.optimizer, self.config.steps)
            self._bare = init_state(self.config.model, optimizer, self.programs.mesh, TRAINING, 0)
            self._batch = self.feed.place(next(self.feed.training(0)))
        else:
            self.took["all of it on"].append(time.perf_counter() - self._began)
            self.took["the bare step"].append(self._alone())
        self._began = time.perf_counter()

    def _alone(self) -> float:
        began = time.perf_counter()
        for _ in range(ALONE):
            self._bare, metrics = self.programs.step(self._bare, self._batch)
        jax.block_until_ready((self._bare, metrics))
        return (time.perf_counter() - began) / ALONE * STEPS


def overhead(repeats: int) -> list[Row]:
    """At least twenty pairs, whatever the repeats."""
    pairs = max(20, repeats)
    table = override(read_toml(configs.find("runs/demo")), [*SETTINGS, f"steps={(pairs + 1) * STEPS}"])
    config = build(TrainConfig, table)
    Timed.took = {"all of it on": [], "the bare step": []}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "Run", Timed):
        loop.train(config, f"{folder}/run", Progress())
    on, bare = Timed.took.values()
    ratios = [with_all / alone for with_all, alone in zip(on, bare, strict=True)]
    low, high = interval(ratios)
    print(
        f"time with all of it on over the bare step's: median {statistics.median(ratios):.4f} of {len(ratios)} pairs of"
        f" {STEPS} steps, 95% interval {low:.4f} to {high:.4f}; {MOST} at most is wanted"
    )
    return rates("overhead", "steps/s", STEPS, Timed.took, "all of it on")


def interval(ratios: list[float], draws: int = 10_000) -> tuple[float, float]:
    """The 95% interval of the median, by bootstrap."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[round(0.025 * draws)], medians[round(0.975 * draws)]

"""The training loop: from a config and a folder to a trained model in it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from mixtral_jax.checkpoints.buckets import folder_at
from mixtral_jax.errors import InputError
from mixtral_jax.model.transformer import count_parameters
from mixtral_jax.sharding import distributed
from mixtral_jax.sharding.mesh import make_mesh
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train import metrics as log
from mixtral_jax.train.checkpoint import Checkpoints
from mixtral_jax.train.collapse import CollapseAlarm
from mixtral_jax.train.config import TrainConfig
from mixtral_jax.train.data import PreparedData
from mixtral_jax.train.feed import Feed
from mixtral_jax.train.goodput import Goodput, describe
from mixtral_jax.train.guard import Guard
from mixtral_jax.train.mixture import text_entropy
from mixtral_jax.train.optimizer import make_optimizer
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.programs import Programs, make_programs
from mixtral_jax.train.progress import Progress
from mixtral_jax.train.run_folder import RunFolder, take, told_of_full_disk
from mixtral_jax.train.setting import Setting
from mixtral_jax.train.signals import Agreement, Signals
from mixtral_jax.train.state import TrainState, abstract_state, init_state, state_of
from mixtral_jax.train.tracking import NOTHING_MORE, Tracker, Tracking
from mixtral_jax.train.validation import Validator
from mixtral_jax.train.watchdog import Watchdog


class Ending(NamedTuple):
    """How a run ended."""

    step: int
    signal: signal.Signals | None
    """What asked it to stop before its last step, or None."""


def train(
    config: TrainConfig,
    folder: str | os.PathLike[str],
    progress: Progress,
    strict: bool = False,
    tracking: Tracking = NOTHING_MORE,
) -> Ending:
    """Trains until the last step, or until a signal asks to stop; either way the state is saved.

    Args:
      config: what to train.
      folder: the run's, on a disk or, as a URL, in a bucket; one that a run was begun in goes on with it.
      progress: tells the user.
      strict: a checkpoint that is not verified is an error, where otherwise the one before is used.
      tracking: what else follows the run.

    Raises:
      InputError: the config does not fit the devices, the data or the folder.
      Diverged: see guard.Diverged.
    """
    mesh_config = config.check_mesh(jax.device_count())
    where = folder_at(folder, "--run-dir")
    taken = distributed.together(lambda: take(where, config) if distributed.is_first() else nullcontext())
    with (
        told_of_full_disk(where),
        taken as run_folder,
        Signals() as signals,
        Checkpoints(where, config.retention, strict) as checkpoints,
    ):
        progress.start(config, mesh_config, count_parameters(config.model))
        setting = distributed.together(lambda: Setting(config))
        data = distributed.first_alone(lambda: setting.prepare(progress.reading))
        if not distributed.same_in_all(bytes.fromhex(data.digest)):
            raise InputError("data.sources", list(config.data.sources), "the processes read different text from them")
        if run_folder is not None:
            data.tokenizer.save_into(run_folder.local, "native")
        progress.data(data, config)
        mesh = make_mesh(mesh_config)
        state = restore_or_init(config, mesh, checkpoints, setting)
        frozen = setting.frozen(mesh)
        written = None if run_folder is None else run_folder.local
        first, tokens = int(state.step), config.data.batch_size * config.data.sequence_length
        with (
            jax.set_mesh(mesh),
            Tracker(tracking, config, written) as tracker,
            Goodput(written, first, tokens) as goodput,
            log.MetricsLog(written, first) as metrics,
        ):
            programs = make_programs(config, mesh, setting, frozen)
            followed = Followed(metrics, progress, tracker, goodput)
            run = Run(config, data, programs, checkpoints, followed, signals, run_folder)
            run.refer(setting, frozen)
            state = run.steps(state)
            finished = int(state.step) >= config.steps
            loss = run.validate(state) if finished else None
            progress.say("saving")
            run.sync(soon=True)
            with goodput.of("checkpoint"):
                checkpoints.save(state, loss)
            progress.say(describe(goodput.summary()))
        return Ending(int(state.step), None if finished else run.stopping)


def restore_or_init(config: TrainConfig, mesh: Mesh, checkpoints: Checkpoints, setting: Setting) -> TrainState:
    """The newest saved state, or a fresh one; each array made where it belongs."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    abstract, _ = abstract_state(config.model, optimizer, mesh, TRAINING, setting.init)
    if checkpoints.latest_step() is None:
        begun = setting.begin(mesh)
        if begun is not None:
            return state_of(begun, config.model, optimizer, mesh, TRAINING)
        return init_state(config.model, optimizer, mesh, TRAINING, config.seed, setting.init)
    state = checkpoints.restore(abstract)
    if int(state.step) > config.steps:
        raise InputError("steps", config.steps, f"the run has already done {int(state.step)}")
    return state


class Followed(NamedTuple):
    """Where a run's numbers and times go."""

    metrics: log.MetricsLog
    progress: Progress
    tracker: Tracker
    goodput: Goodput


class Run:
    """The loop's state besides the arrays."""

    def __init__(
        self,
        config: TrainConfig,
        data: PreparedData,
        programs: Programs,
        checkpoints: Checkpoints,
        followed: Followed,
        signals: Signals,
        folder: RunFolder | None,
    ):
        self.config, self.data, self.programs = config, data, programs
        self.checkpoints, self.folder = checkpoints, folder
        self.metrics, self.progress, self.tracker, self.goodput = followed
        self.feed = Feed(data, config.data, programs.batch_sharding)
        self.stopping: signal.Signals | None = None
        """The signal that the processes stop for, once they agree."""
        self._agreement = Agreement(signals, programs.mesh, programs.largest)
        self._written = None if folder is None else folder.local
        self._watchdog = Watchdog(config.guard.hang_seconds, self._written)
        self._guard = Guard(config.guard)
        self._guard.recall(self._written)
        self._alarm = CollapseAlarm(config.model.moe.experts_per_token) if config.model.moe is not None else None
        self._pending: tuple[int, Any, float | None] | None = None  # a step, its metrics, its end if seen
        self._saved = False  # a checkpoint was begun, and no step recorded since
        self._clock: float | None = None  # when a step was last seen to end; None: something else was done since
        self._took: float | None = None  # seconds of the step that is recorded
        entropy = text_entropy(data.validation, config.model.vocab_size)
        self._validator = Validator(
            programs.validation, self._held_out, entropy, self._written, self.progress.validation
        )

    def refer(self, setting: Setting, frozen: Any) -> None:
        """See Setting.refer."""
        setting.refer(self.data, self.programs.mesh, frozen, self.feed.place, self.feed.rows, self._written)

    def steps(self, state: TrainState) -> TrainState:
        """Steps until the last one or a signal; the metrics of a step are read when the next one is under way."""
        config, first = self.config, int(state.step)
        if first >= config.steps:
            return state
        batches = self.feed.training(first)
        self.progress.say("compiling")
        with self._watchdog:
            for step in range(first, config.steps):
                with self.goodput.of("data"):
                    batch = self.feed.place(next(batches))
                self.tracker.before(step)
                # The first call compiles.
                with self.goodput.of("compile" if step == first else "step"):
                    state, metrics = self.programs.step(state, batch, **self._guard.argument(step))
                # A device that is not asynchronous is done by now: its step's end is not that of the next.
                ended = time.perf_counter() if metrics["loss"].is_ready() else None
                self._settle()
                self._pending = step, metrics, ended
                self.stopping = self._agreement.reached()
                if self.stopping is not None:
                    self.progress.say(f"{self.stopping.name}: stopping after step {step + 1}")
                    break
                self._between(state, step + 1)
            self._settle()
        batches.close()
        return state

    def _settle(self) -> None:
        """Waits for the step that was begun last, and records it."""
        if self._pending is not None:
            (step, metrics, ended), self._pending = self._pending, None
            with self.goodput.of("step"):
                values = jax.device_get(metrics)  # waits for the step
            before, self._clock = self._clock, ended or time.perf_counter()
            self._took = None if before is None else self._clock - before
            self._record(step, values)
            self._watchdog.alive()

    def _record(self, step: int, values: dict[str, Any]) -> None:
        values["spike"], told = self._guard.see(step, float(values["loss"]), bool(values["skipped"]))
        if self._alarm is not None:
            values["collapsed"], more = self._alarm.see(step, values["expert_load"])
            told += more
        tokens = self.config.data.batch_size * self.config.data.sequence_length
        rate = None if self._took is None else tokens / self._took
        if rate is not None:
            values |= log.utilisation(self.config.model, self.config.data.sequence_length, rate)
        plain = self.metrics.write(step, values | {"tokens_per_second": rate})
        self.progress.step(plain, self.config)
        for text in told:
            self.progress.say(text)
        self.tracker.after(plain)
        self.sync(soon=self._saved)
        self._saved = False
        self._guard.check(step)

    def _between(self, state: TrainState, done: int) -> None:
        config = self.config
        if done == config.steps:
            return  # what follows the loop does both
        loss = None
        if config.validate_every is not None and done % config.validate_every == 0:
            self._settle()
            loss = self.validate(state)
            self._clock = None
        if done % config.save_every == 0:
            # A step's line is written before its checkpoint is: a run that goes on from there lacks none.
            self._settle()
            if self._guard.in_a_row:
                return  # what follows may be no better; the checkpoints that are there are from before
            with self.goodput.of("checkpoint"):
                self.checkpoints.save(state, loss)
            self.goodput.write()
            self._saved = True

    def sync(self, soon: bool) -> None:
        """See RunFolder.sync; on the process that has the folder."""
        if self.folder is not None:
            self.folder.sync(soon)

    def validate(self, state: TrainState) -> float | None:
        """The loss on held-out text; None where there is no such text."""
        if self.data.validation.num_tokens < 2:
            return None
        with self.goodput.of("validation"):
            return self._validator(state)

    def _held_out(self) -> Iterator[Batch]:
        for batch in self.feed.validation():
            yield batch
            self._watchdog.alive()

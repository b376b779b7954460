"""The training loop: from a config and a folder to a trained model in it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from mixtral_jax.errors import InputError
from mixtral_jax.model.transformer import Transformer, count_parameters
from mixtral_jax.sharding.mesh import make_mesh
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train import metrics as log
from mixtral_jax.train.checkpoint import Checkpoints
from mixtral_jax.train.config import TrainConfig
from mixtral_jax.train.data import PreparedData, host_rows, prepare, training_batches, validation_batches
from mixtral_jax.train.optimizer import learning_rate, make_optimizer
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.progress import Progress
from mixtral_jax.train.run_folder import RunFolder
from mixtral_jax.train.signals import Signals
from mixtral_jax.train.state import TrainState, abstract_state, init_state
from mixtral_jax.train.step import make_step
from mixtral_jax.train.token_index import unigram_entropy
from mixtral_jax.train.validation import Validation, make_validation, validate

MOST_SKIPPED = 5
"""Steps in a row that are skipped for want of a finite loss or gradient before the run gives up."""


class Diverged(RuntimeError):
    """Loss or gradient was not finite for too many steps in a row; the last checkpoint is from before."""


class Ending(NamedTuple):
    """How a run ended."""

    step: int
    signal: signal.Signals | None
    """What asked it to stop before its last step, or None."""


class Programs(NamedTuple):
    """A run's jitted functions and where its arrays lie."""

    mesh: Mesh
    step: Any
    validation: Any
    batch_sharding: NamedSharding


def train(config: TrainConfig, folder: Path, progress: Progress) -> Ending:
    """Trains until the last step, or until a signal asks to stop; either way the state is saved.

    Args:
      config: what to train.
      folder: the run's; one that a run was begun in goes on with it.
      progress: tells the user.

    Raises:
      InputError: the config does not fit the devices, the data or the folder.
      Diverged: see there.
    """
    mesh_config = config.check_mesh(jax.device_count())
    with RunFolder(folder, config), Signals() as signals, Checkpoints(folder, config.keep_checkpoints) as checkpoints:
        progress.start(config, mesh_config, count_parameters(config.model))
        data = prepare(config.data, config.model.vocab_size, progress.reading)
        data.tokenizer.save_into(folder, "native")
        progress.data(data, config)
        mesh = make_mesh(mesh_config)
        state = restore_or_init(config, mesh, checkpoints)
        with jax.set_mesh(mesh), log.MetricsLog(folder, int(state.step)) as metrics:
            run = Run(config, data, _programs(config, mesh), checkpoints, metrics, progress, signals, folder)
            state = run.steps(state)
            finished = int(state.step) >= config.steps
            if finished:
                run.validate(state)
            progress.say("saving")
            checkpoints.save(state)
        return Ending(int(state.step), None if finished else signals.received)


def restore_or_init(config: TrainConfig, mesh: Mesh, checkpoints: Checkpoints) -> TrainState:
    """The newest saved state, or a fresh one; each array made where it belongs."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    abstract, _ = abstract_state(config.model, optimizer, mesh, TRAINING)
    if checkpoints.latest_step() is None:
        return init_state(config.model, optimizer, mesh, TRAINING, config.seed)
    state = checkpoints.restore(abstract)
    if int(state.step) > config.steps:
        raise InputError("steps", config.steps, f"the run has already done {int(state.step)}")
    return state


def _programs(config: TrainConfig, mesh: Mesh) -> Programs:
    model = Transformer(config.model, config.execution, config.dispatch, TRAINING)
    optimizer = make_optimizer(config.optimizer, config.steps)
    schedule = learning_rate(config.optimizer, config.steps)
    _, shardings = abstract_state(config.model, optimizer, mesh, TRAINING)
    step = make_step(model, config.losses, optimizer, schedule, config.accumulation)
    return Programs(
        mesh=mesh,
        # The state comes out laid out as it went in, so that the next step is the same program.
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        validation=jax.jit(make_validation(model, config.losses)),
        batch_sharding=NamedSharding(mesh, TRAINING.use(("batch", "length"))),
    )


class Run:
    """The loop's state besides the arrays."""

    def __init__(
        self,
        config: TrainConfig,
        data: PreparedData,
        programs: Programs,
        checkpoints: Checkpoints,
        metrics: log.MetricsLog,
        progress: Progress,
        signals: Signals,
        folder: Path,
    ):
        self.config, self.data, self.programs = config, data, programs
        self.checkpoints, self.metrics, self.progress = checkpoints, metrics, progress
        self.signals, self.folder = signals, folder
        self._skipped = 0
        self._clock: float | None = None  # when a step was last seen to end; None: something else was done since
        self._entropy = unigram_entropy(data.validation, config.model.vocab_size)

    def steps(self, state: TrainState) -> TrainState:
        """Steps until the last one or a signal; the metrics of a step are read when the next one is under way."""
        config, first = self.config, int(state.step)
        if first >= config.steps:
            return state
        batches = self._batches(first)
        self.progress.say("compiling")
        before: tuple[int, Any] | None = None
        for step in range(first, config.steps):
            state, metrics = self.programs.step(state, self._place(next(batches)))
            if before is not None:
                self._record(*before)
            before = step, metrics
            if self.signals.received is not None:
                self.progress.say(f"{self.signals.received.name}: stopping after step {step + 1}")
                break
            self._between(state, step + 1)
        if before is not None:
            self._record(*before)
        batches.close()
        return state

    def _batches(self, first: int) -> Any:
        rows = host_rows(self.config.data.batch_size, jax.process_index(), jax.process_count())
        return training_batches(self.data.training, self.config.data, first, rows)

    def _place(self, batch: Batch) -> Batch:
        return jax.tree.map(partial(jax.make_array_from_process_local_data, self.programs.batch_sharding), batch)

    def _record(self, step: int, values: dict[str, Any]) -> None:
        values = jax.device_get(values)  # waits for the step
        before, self._clock = self._clock, time.perf_counter()
        tokens = self.config.data.batch_size * self.config.data.sequence_length
        rate = None if before is None else tokens / (self._clock - before)
        if rate is not None:
            values |= log.utilisation(self.config.model, self.config.data.sequence_length, rate)
        plain = self.metrics.write(step, values | {"tokens_per_second": rate})
        self.progress.step(plain, self.config)
        self._skipped = self._skipped + 1 if plain["skipped"] else 0
        if self._skipped >= MOST_SKIPPED:
            raise Diverged(f"loss or gradient was not finite in {MOST_SKIPPED} steps up to {step}")

    def _between(self, state: TrainState, done: int) -> None:
        config = self.config
        if done == config.steps:
            return  # what follows the loop does both
        if config.validate_every is not None and done % config.validate_every == 0:
            self.validate(state)
            self._clock = None
        if done % config.save_every == 0:
            self.checkpoints.save(state)

    def validate(self, state: TrainState) -> Validation | None:
        """The loss on held-out text, told beside that text's unigram entropy; None where there is no such text."""
        if self.data.validation.num_tokens < 2:
            return None
        found = validate(self.programs.validation, state.params, self._validation_batches())
        line = {"step": int(state.step), "loss": found.loss, "unigram_entropy": self._entropy, "tokens": found.tokens}
        if found.load_LE is not None:
            line["load"] = found.load_LE.round(4).tolist()
        with open(self.folder / log.VALIDATION, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.progress.validation(found, self._entropy)
        return found

    def _validation_batches(self) -> Iterator[Batch]:
        rows = host_rows(self.config.data.batch_size, jax.process_index(), jax.process_count())
        return map(self._place, validation_batches(self.data.validation, self.config.data, rows))

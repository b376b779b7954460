"""The training loop: from a config and a folder to a trained model in it."""

from __future__ import annotations

import json
import signal
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.errors import InputError
from mixtral_jax.model.transformer import Transformer, count_parameters
from mixtral_jax.sharding import distributed
from mixtral_jax.sharding.mesh import make_mesh
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train import metrics as log
from mixtral_jax.train.checkpoint import Checkpoints
from mixtral_jax.train.config import TrainConfig
from mixtral_jax.train.data import PreparedData, device_rows, prepare, training_batches, validation_batches
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
    largest: Any
    """Of an array with an element a device."""


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
    taken = distributed.together(lambda: RunFolder(folder, config) if distributed.is_first() else nullcontext())
    with taken, Signals() as signals, Checkpoints(folder, config.keep_checkpoints) as checkpoints:
        progress.start(config, mesh_config, count_parameters(config.model))
        data = distributed.first_alone(lambda: prepare(config.data, config.model.vocab_size, progress.reading))
        if not distributed.same_in_all(bytes.fromhex(data.digest)):
            raise InputError("data.sources", list(config.data.sources), "the processes read different text from them")
        if distributed.is_first():
            data.tokenizer.save_into(folder, "native")
        progress.data(data, config)
        mesh = make_mesh(mesh_config)
        state = restore_or_init(config, mesh, checkpoints)
        with jax.set_mesh(mesh), log.MetricsLog(folder, int(state.step), distributed.is_first()) as metrics:
            run = Run(config, data, _programs(config, mesh), checkpoints, metrics, progress, signals, folder)
            state = run.steps(state)
            finished = int(state.step) >= config.steps
            if finished:
                run.validate(state)
            progress.say("saving")
            checkpoints.save(state)
        return Ending(int(state.step), None if finished else run.stopping)


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
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = make_step(model, config.losses, optimizer, schedule, config.accumulation)
    return Programs(
        mesh=mesh,
        # The state comes out laid out as it went in, so that the next step is the same program; numbers, on every
        # process.
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere)),
        validation=jax.jit(make_validation(model, config.losses), out_shardings=everywhere),
        batch_sharding=NamedSharding(mesh, TRAINING.use(("batch", "length"))),
        largest=jax.jit(jnp.max, out_shardings=everywhere),
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
        self.stopping: signal.Signals | None = None
        """The signal that the processes stop for, once they agree."""
        self._rows = device_rows(programs.batch_sharding, self._batch_shape)
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
        asked: Any = None
        for step in range(first, config.steps):
            state, metrics = self.programs.step(state, self._place(next(batches)))
            if before is not None:
                self._record(*before)
            before = step, metrics
            asked, self.stopping = self._ask(), self._agreed(asked)
            if self.stopping is not None:
                self.progress.say(f"{self.stopping.name}: stopping after step {step + 1}")
                break
            self._between(state, step + 1)
        if before is not None:
            self._record(*before)
        batches.close()
        return state

    def _ask(self) -> Any:
        """This process's signal, if it has one; among several, the start of an exchange of them."""
        if jax.process_count() == 1:
            return self.signals.received
        every = NamedSharding(self.programs.mesh, PartitionSpec(self.programs.mesh.axis_names))
        own = np.array([self.signals.received or 0], np.int32)
        shape = (self.programs.mesh.size,)
        return self.programs.largest(jax.make_array_from_callback(shape, every, lambda _: own))

    def _agreed(self, asked: Any) -> signal.Signals | None:
        """The signal that some process had when the step before was begun: the same for all, so that all stop there."""
        if jax.process_count() == 1:
            return self.signals.received
        return signal.Signals(int(asked)) if asked is not None and int(asked) else None

    @property
    def _batch_shape(self) -> tuple[int, int]:
        return self.config.data.batch_size, self.config.data.sequence_length

    def _batches(self, first: int) -> Any:
        return training_batches(self.data.training, self.config.data, first, self._rows)

    def _place(self, batch: Batch) -> Batch:
        """The batch on the mesh, of which this process has the rows that its devices hold parts of."""

        def place(rows: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                first, last, _ = index[0].indices(self._batch_shape[0])
                start = bisect_left(self._rows, first)
                return rows[start : start + last - first, index[1]]

            return jax.make_array_from_callback(self._batch_shape, self.programs.batch_sharding, part)

        return jax.tree.map(place, batch)

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
        if not distributed.is_first():
            return found
        line = {"step": int(state.step), "loss": found.loss, "unigram_entropy": self._entropy, "tokens": found.tokens}
        if found.load_LE is not None:
            line["load"] = found.load_LE.round(4).tolist()
        with open(self.folder / log.VALIDATION, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.progress.validation(found, self._entropy)
        return found

    def _validation_batches(self) -> Iterator[Batch]:
        return map(self._place, validation_batches(self.data.validation, self.config.data, self._rows))

"""What a run's objective, its beginning and its factors make of the loop's parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mixtral_jax.checkpoints.source import Source
from mixtral_jax.errors import InputError
from mixtral_jax.model.transformer import Transformer, init_params
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.text.files import load_tokenizer
from mixtral_jax.text.tokenizer import Tokenizer
from mixtral_jax.train.answers import PairIndex, prepare_pairs, prepare_supervised
from mixtral_jax.train.base import open_base, read_params
from mixtral_jax.train.batches import validation_batches
from mixtral_jax.train.config import TrainConfig
from mixtral_jax.train.corpus import Progress
from mixtral_jax.train.data import PreparedData, prepare
from mixtral_jax.train.dpo import make_reference
from mixtral_jax.train.lora import init_factors, merge
from mixtral_jax.train.objective import DpoConfig, PretrainConfig
from mixtral_jax.train.state import Init

REFERENCE = "reference"
"""The folder of a run for the reference's log-probabilities, a file a data set."""


class Setting:
    """A run's base, if it has one, and what follows from its objective.

    Attributes:
      init: makes what is trained: the model's parameters, or factors.
      whole: makes the model's parameters of what is trained and of what is frozen.

    Raises:
      InputError: `init_from` is not there, damaged or of another model.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.base: Source | None = None if config.init_from is None else open_base(config.init_from, config.model)
        self.init: Init = init_params
        self.whole: Callable[[Any, Any], Any] = lambda params, frozen: params
        if config.lora is not None:
            lora = config.lora
            self.init = lambda model, key: init_factors(model, lora, key)
            self.whole = merge(config.model, lora)

    def prepare(self, progress: Progress | None = None) -> PreparedData:
        """The data of the objective."""
        config, chosen = self.config, self.config.objective
        if isinstance(chosen, PretrainConfig):
            if config.data.tokenizer is None and self.base is not None:
                raise InputError("data.tokenizer", None, "is missing; weights that are there have theirs already")
            return prepare(config.data, config.model.vocab_size, progress)
        reading = prepare_pairs if isinstance(chosen, DpoConfig) else prepare_supervised
        return reading(config.data, self._tokenizer(), chosen, config.model.vocab_size, progress)

    def _tokenizer(self) -> Tokenizer:
        if self.config.data.tokenizer is not None:
            try:
                return load_tokenizer(self.config.data.tokenizer)
            except InputError as error:
                raise InputError("data.tokenizer", error.value, error.allowed) from None
        found = None if self.base is None else self.base.tokenizer()
        if found is None:
            raise InputError("data.tokenizer", None, "is missing, and init_from brings none")
        return found

    def begin(self, mesh: Mesh) -> Any:
        """The parameters that all weights are trained from; None where fresh ones or factors are."""
        if self.base is None or self.config.lora is not None:
            return None
        return read_params(self.base, mesh, TRAINING)

    def frozen(self, mesh: Mesh) -> Any:
        """What the step reads and leaves as it is; None where all weights are trained."""
        if self.base is None or self.config.lora is None:
            return None
        return read_params(self.base, mesh, TRAINING, self.config.lora.base)

    def refer(
        self, data: PreparedData, mesh: Mesh, frozen: Any, place: Callable, rows: list[int], folder: Path | None
    ) -> None:
        """Fills in the reference's log-probabilities of a run with pairs: from the run's folder, or by the weights that
        it began from, once.

        Args:
          frozen: what `frozen` gave.
          place: puts a batch on the mesh.
          rows: those of a batch that this process reads.
          folder: the run's, on the process that has it.
        """
        if not isinstance(data.training, PairIndex) or not isinstance(data.validation, PairIndex):
            return
        indexes = (data.training, data.validation)
        file = None if folder is None else folder / REFERENCE / f"{data.digest}.npy"
        sizes = [len(index.reference) for index in indexes]
        known = np.load(file) if file is not None and file.is_file() else np.full(sum(sizes), np.nan, np.float32)
        if jax.process_count() > 1:
            known = np.asarray(multihost_utils.broadcast_one_to_all(known))
        if len(known) != sum(sizes) or not np.isfinite(known).all():
            known = self._computed(indexes, mesh, frozen, place, rows)
            if file is not None:
                file.parent.mkdir(exist_ok=True)
                partial_file = file.with_suffix(".partial.npy")
                np.save(partial_file, known)
                os.replace(partial_file, file)
        data.training.reference, data.validation.reference = np.split(known, sizes[:1])

    def _computed(
        self, indexes: tuple[PairIndex, ...], mesh: Mesh, frozen: Any, place: Callable, rows: list[int]
    ) -> np.ndarray:
        config = self.config
        model = Transformer(config.model, config.execution, config.dispatch, TRAINING)
        params = frozen
        if params is None:
            assert self.base is not None
            params = read_params(self.base, mesh, TRAINING)
        whole = merge(config.model, config.lora) if config.lora else self.whole
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        score = make_reference(model, config.losses)
        program = jax.jit(
            lambda frozen, batch: score(whole({}, frozen) if config.lora else frozen, batch), out_shardings=everywhere
        )
        found = []
        for index in indexes:
            scores: list[np.ndarray] = []
            for batch in validation_batches(index, config.data, rows):
                row_B = np.asarray(jax.device_get(program(params, place(batch))))
                # A batch has the chosen rows first; the index has each pair's rows together.
                scores.append(row_B.reshape(2, -1).T.reshape(-1))
            found.append(np.concatenate([*scores, np.zeros(0, np.float32)])[: len(index.reference)])
        return np.concatenate(found)

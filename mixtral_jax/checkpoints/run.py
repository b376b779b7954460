"""A training run's folder: its layout, and its checkpoints as Orbax writes them, whose commits are atomic.

config.toml        the resolved config; its section `model` is the ModelConfig
tokenizer.model
checkpoints/STEP/  params and optimizer, an item each, so that inference reads the weights alone
"""

from __future__ import annotations

import logging
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from mixtral_jax.checkpoints.source import FLOAT32, Source
from mixtral_jax.config import ModelConfig, build
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import Tensor, look_up
from mixtral_jax.model.transformer import abstract_params
from mixtral_jax.text.files import load_tokenizer
from mixtral_jax.text.tokenizer import Tokenizer

CONFIG = "config.toml"
TOKENIZER = "tokenizer.model"
CHECKPOINTS = "checkpoints"
PARAMS = "params"
OPTIMIZER = "optimizer"

# Orbax tells of each step of its work, at a level that reaches the terminal.
logging.getLogger("absl").setLevel(logging.ERROR)


def open_manager(folder: Path, keep: int | None = None) -> ocp.CheckpointManager:
    """Orbax's manager of a run's checkpoints; it keeps the last few, or all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
    return ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options, item_names=(PARAMS, OPTIMIZER))


def is_run(folder: Path) -> bool:
    """Whether the folder is a training run's."""
    return (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()


def read_run_config(folder: Path) -> ModelConfig:
    """The model of a run's folder."""
    table = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return build(ModelConfig, table["model"], "model")


def read_params(folder: Path, config: ModelConfig, step: int | None = None) -> tuple[Any, int]:
    """The weights of a run's newest checkpoint, or of the one at a step, on this process's first device.

    Raises:
      InputError: there is no such checkpoint.
    """
    with open_manager(folder) as manager:
        found = sorted(manager.all_steps())
        wanted = found[-1] if step is None and found else step
        if wanted is None or wanted not in found:
            raise InputError(str(folder), step, f"no checkpoint; saved steps: {found or 'none'}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            nn.unbox(abstract_params(config)),
        )
        items = ocp.args.Composite(**{PARAMS: ocp.args.StandardRestore(target)})
        return manager.restore(wanted, args=items)[PARAMS], wanted


class RunSource(Source):
    """The newest checkpoint of a training run."""

    def __init__(self, folder: Path):
        super().__init__(folder, "training run", read_run_config(folder))

    @cached_property
    def _params(self) -> Any:
        return read_params(self.path, self.config)[0]

    def problems(self) -> list[str]:
        """See Source; Orbax compares the shapes when it reads."""
        return []

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return FLOAT32

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return "F32"

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source; the first call reads the whole checkpoint."""
        return np.asarray(look_up(self._params, tensor))

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        path = self.path / TOKENIZER
        return load_tokenizer(path) if path.is_file() else None

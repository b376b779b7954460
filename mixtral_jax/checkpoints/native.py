"""The layout of a training run's folder and of its checkpoints, written by Orbax, whose commits are atomic.

config.toml        the resolved config; its section `model` is the ModelConfig
tokenizer.model
checkpoints/STEP/  params and optimizer, an item each, so that inference reads the weights alone
"""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import linen as nn

from mixtral_jax.config import ModelConfig, build
from mixtral_jax.errors import InputError
from mixtral_jax.model.transformer import abstract_params

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

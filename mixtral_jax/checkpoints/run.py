"""A training run's folder: its layout, and its checkpoints as Orbax writes them, whose commits are atomic.

config.toml        the resolved config; its section `model` is the ModelConfig
tokenizer.model    or tokenizer.json, and what belongs to it
checkpoints/STEP/  params and optimizer, an item each, so that inference reads the weights alone
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from mixtral_jax.checkpoints.archive import told_of_damage
from mixtral_jax.checkpoints.source import Source, misfits
from mixtral_jax.config import ModelConfig, build
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import Tensor, assign, look_up
from mixtral_jax.model.transformer import abstract_params

CONFIG = "config.toml"
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
    def _step(self) -> int:
        with open_manager(self.path) as manager:
            steps = sorted(manager.all_steps())
        if not steps:
            raise InputError(str(self.path), None, "no checkpoint yet")
        return steps[-1]

    @property
    def _checkpoint(self) -> Path:
        return (self.path / CHECKPOINTS / str(self._step) / PARAMS).absolute()

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        """The shape and type of each leaf, by its path with dots."""
        with ocp.PyTreeCheckpointer() as checkpointer, told_of_damage(self._checkpoint):
            tree = checkpointer.metadata(self._checkpoint).item_metadata.tree
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    @lru_cache(maxsize=1)  # noqa: B019
    def _leaf(self, path: tuple[str, ...]) -> np.ndarray:
        """One leaf, its layers stacked: the tensors are asked for leaf after leaf."""
        target: dict[str, Any] = {}
        assign(target, path, ocp.RestoreArgs(restore_type=np.ndarray))
        arguments = ocp.args.PyTreeRestore(item=target, restore_args=target, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer, told_of_damage(self._checkpoint):
            return look_up(checkpointer.restore(self._checkpoint, args=arguments), Tensor(path, (), (), ()))

    def problems(self) -> list[str]:
        """See Source."""
        leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(abstract_params(self.config)))
        wanted = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        return misfits(wanted, {name: leaf.shape for name, leaf in self._metadata.items()})

    def files(self) -> Iterable[Path]:
        """See Source."""
        return [self._checkpoint]

    def dtype(self, tensor: Tensor) -> np.dtype:
        """See Source."""
        return np.dtype(self.stored_as(tensor))

    def stored_as(self, tensor: Tensor) -> str:
        """See Source."""
        return np.dtype(self._metadata[".".join(tensor.path)].dtype).name

    def read(self, tensor: Tensor) -> np.ndarray:
        """See Source."""
        return self._leaf(tensor.path)[tensor.index]

"""A training run's folder: its layout, and its checkpoints as Orbax writes them, whose commits are atomic.

config.toml        the resolved config; its section `model` is the ModelConfig
tokenizer.model    or tokenizer.json, and what belongs to it
checkpoints/STEP/  params and optimizer, an item each, so that inference reads the weights alone; digests of all files
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from mixtral_jax.checkpoints.archive import told_of_damage
from mixtral_jax.checkpoints.buckets import Folder, absolute, fetched, is_remote
from mixtral_jax.checkpoints.digests import choose, saved_steps, verify, warn_of
from mixtral_jax.checkpoints.source import Source, misfits
from mixtral_jax.config import ModelConfig, build
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import Tensor, assign, look_up
from mixtral_jax.model.transformer import abstract_params
from mixtral_jax.text.files import find_tokenizer, load_tokenizer
from mixtral_jax.text.tokenizer import Tokenizer

CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"
PARAMS = "params"
OPTIMIZER = "optimizer"

# Orbax tells of each step of its work, at a level that reaches the terminal.
logging.getLogger("absl").setLevel(logging.ERROR)


def open_manager(folder: Folder, create: bool = False) -> ocp.CheckpointManager:
    """Orbax's manager of a run's checkpoints; it removes none."""
    options = ocp.CheckpointManagerOptions(create=create)
    return ocp.CheckpointManager(absolute(folder / CHECKPOINTS), options=options, item_names=(PARAMS, OPTIMIZER))


def holds_checkpoint(step: Folder) -> bool:
    """Whether a step's folder holds what Orbax commits."""
    return all((step / item / "_METADATA").is_file() for item in (PARAMS, OPTIMIZER))


def find_step(folder: Folder, step: int | None = None) -> int:
    """A run's newest step whose weights are verified; each that is passed by is warned of.

    Args:
      folder: the run's.
      step: this one or none.

    Raises:
      InputError: there is none.
    """
    checkpoints = absolute(folder / CHECKPOINTS)
    found = saved_steps(checkpoints)
    if not found or step not in (None, *found):
        raise InputError(str(folder), step, f"no checkpoint; saved steps: {found or 'none'}")
    wanted = found if step is None else [step]
    choice = choose(checkpoints, partial(verify, item=PARAMS), holds_checkpoint, wanted)
    if choice.step is None:
        raise InputError(str(folder), step, f"no checkpoint: {'; '.join(choice.passed_by.values())}")
    warn_of(choice)
    return choice.step


def is_run(folder: Folder) -> bool:
    """Whether the folder is a training run's."""
    # In a bucket a folder is there only with what is in it.
    return (folder / CONFIG).is_file() and (is_remote(folder) or (folder / CHECKPOINTS).is_dir())


def read_run_config(folder: Folder) -> ModelConfig:
    """The model of a run's folder."""
    return build(ModelConfig, read_table(folder)["model"], "model")


def read_table(folder: Folder) -> dict[str, Any]:
    """The resolved config of a run's folder, as TOML gives it."""
    return tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))


def read_params(folder: Folder, config: ModelConfig, step: int | None = None) -> tuple[Any, int]:
    """The weights of a run's newest checkpoint, or of the one at a step, on this process's first device.

    Raises:
      InputError: there is no such checkpoint, or it is damaged.
    """
    wanted = find_step(folder, step)
    with open_manager(folder) as manager:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            nn.unbox(abstract_params(config)),
        )
        items = ocp.args.Composite(**{PARAMS: ocp.args.StandardRestore(target)})
        return manager.restore(wanted, args=items)[PARAMS], wanted


class RunSource(Source):
    """The newest checkpoint of a training run."""

    def __init__(self, folder: Folder):
        super().__init__(folder, "training run", read_run_config(folder))

    def tokenizer(self) -> Tokenizer | None:
        """See Source."""
        if not is_remote(self.path):
            return super().tokenizer()
        with fetched(self.path, lambda name: name.endswith((".json", ".model", ".jinja"))) as copy:
            return load_tokenizer(copy) if find_tokenizer(copy) else None

    def identity(self) -> dict[str, Any]:
        """See Source."""
        return {str(self._checkpoint): self._step} if is_remote(self.path) else super().identity()

    @cached_property
    def _step(self) -> int:
        return find_step(self.path)

    @property
    def _checkpoint(self) -> Folder:
        return absolute(self.path / CHECKPOINTS / str(self._step) / PARAMS)

    @cached_property
    def _tree(self) -> Any:
        with ocp.PyTreeCheckpointer() as checkpointer, told_of_damage(self._checkpoint):
            return checkpointer.metadata(self._checkpoint).item_metadata.tree

    @cached_property
    def _metadata(self) -> dict[str, Any]:
        """The shape and type of each leaf, by its path with dots."""
        leaves = jax.tree_util.tree_leaves_with_path(self._tree)
        return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    @lru_cache(maxsize=1)  # noqa: B019
    def _leaf(self, path: tuple[str, ...]) -> np.ndarray:
        """One leaf, its layers stacked: the tensors are asked for leaf after leaf."""
        target: dict[str, Any] = {}
        assign(target, path, ocp.RestoreArgs(restore_type=np.ndarray))
        arguments = ocp.args.PyTreeRestore(item=target, restore_args=target, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer, told_of_damage(self._checkpoint):
            return look_up(checkpointer.restore(self._checkpoint, args=arguments), Tensor(path, (), (), ()))

    def read_all(self) -> Any:
        """The whole tree, as numpy arrays: for one that is small."""
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._tree)
        with ocp.PyTreeCheckpointer() as checkpointer, told_of_damage(self._checkpoint):
            return checkpointer.restore(self._checkpoint, args=ocp.args.PyTreeRestore(restore_args=arguments))

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

"""Saves and restores a run's state through Orbax."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import jax.numpy as jnp
import orbax.checkpoint as ocp

from mixtral_jax.checkpoints.run import OPTIMIZER, PARAMS, open_manager
from mixtral_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints of a run's folder. Saving goes on in the background; the end of the context waits for it."""

    def __init__(self, folder: Path, keep: int):
        self._manager = open_manager(folder, keep)

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves a state under its step, unless that is there already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {PARAMS: ocp.args.StandardSave(state.params), OPTIMIZER: ocp.args.StandardSave(state.optimizer)}
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, in the shapes, dtypes and shardings given."""
        step = self._manager.latest_step()
        assert step is not None
        items = {
            PARAMS: ocp.args.StandardRestore(abstract.params),
            OPTIMIZER: ocp.args.StandardRestore(abstract.optimizer),
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(jnp.int32(step), restored[PARAMS], restored[OPTIMIZER])

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

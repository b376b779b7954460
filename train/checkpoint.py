"""Saves and restores a run's state through Orbax, verified, and retires old steps."""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mixtral_jax.checkpoints.buckets import Folder, filesystem, is_remote
from mixtral_jax.checkpoints.digests import (
    Choice,
    Standing,
    Verdict,
    choose,
    read_about,
    saved_steps,
    verify,
    warn_of,
    write_digests,
)
from mixtral_jax.checkpoints.run import CHECKPOINTS, OPTIMIZER, PARAMS, holds_checkpoint, open_manager
from mixtral_jax.errors import InputError, unless_told
from mixtral_jax.sharding import distributed
from mixtral_jax.train.retention import Retention, kept
from mixtral_jax.train.run_folder import is_full_disk
from mixtral_jax.train.state import TrainState

DAMAGED = "damaged"
"""The folder in a run's, beside that of its checkpoints, that damaged steps are moved to."""
_TORN = ".orbax-checkpoint-tmp"
"""In the name of a step that is being written, or being removed."""


class Checkpoints:
    """The checkpoints of a run's folder, which this process has the lock of.

    Saving goes on in the background: Orbax writes, then the files' digests are written, and only then older steps are
    removed. The end of the context waits for it. Opened, the folder has the newest verified step as its newest: what
    is torn is removed, what is damaged moved to the folder `damaged`, with a warning.

    Args:
      folder: the run's.
      retention: which steps to keep.
      strict: a newer step that is not verified is an error.

    Raises:
      InputError: no step is whole; or with `strict`, the newest is not.
    """

    def __init__(self, folder: Folder, retention: Retention, strict: bool = False):
        self._folder, self._steps, self._retention = folder, folder / CHECKPOINTS, retention
        self._background: threading.Thread | None = None
        self._failure: BaseException | None = None
        distributed.first_alone(self._remove_torn)
        choice = choose(self._steps, self._look, holds_checkpoint)
        if strict and (choice.passed_by or not choice.verified):
            faults = "; ".join(choice.passed_by.values()) or f"{self._steps / str(choice.step)}: no digests"
            raise InputError("--strict", None, f"a checkpoint is not verified: {faults}")
        if distributed.is_first():
            warn_of(choice)
        distributed.first_alone(lambda: self._settle(choice) if distributed.is_first() else None)
        self._latest = choice.step
        self._manager = open_manager(folder, create=True)

    def latest_step(self) -> int | None:
        """The newest verified step when the folder was opened, or None."""
        return self._latest

    def save(self, state: TrainState, validation_loss: float | None = None) -> None:
        """Begins to save a state under its step, unless that is there already; waits for the save before.

        Raises:
          InputError: the disk has not the room, or had not for the save before; the earlier steps are as they were.
        """
        self.wait()
        step = int(state.step)
        if step in saved_steps(self._steps):
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.optimizer)))
        self._check_room(step, needed)
        about = {"arrays": arrays(state), "validation_loss": validation_loss}
        items = {PARAMS: ocp.args.StandardSave(state.params), OPTIMIZER: ocp.args.StandardSave(state.optimizer)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._told(error, step, needed) from error
        self._background = threading.Thread(target=self._finish, args=(step, needed, about), name="checkpoint")
        self._background.start()

    def wait(self) -> None:
        """Waits for what is being saved.

        Raises:
          InputError: it could not be.
        """
        if self._background is not None:
            self._background.join()
            self._background = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest verified state, in the shapes, dtypes and shardings given.

        Raises:
          InputError: before anything is read: it is of another model or optimizer.
        """
        step = self._latest
        assert step is not None
        self._check_arrays(step, arrays(abstract))
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
        told = error
        try:
            self.wait()
        except Exception as failure:
            told = failure
            if error is None:
                raise
            warnings.warn(f"the last checkpoint was not saved: {failure}", stacklevel=2)
        finally:
            # What Orbax failed in, it raises here once more.
            with unless_told(told, Exception):
                self._manager.close()

    def _look(self, step: Folder) -> Verdict:
        """A step as all processes together find it, each of which reads a share."""
        mine = verify(step, jax.process_index(), jax.process_count())
        worst = Standing(distributed.largest(int(mine.standing)))
        return mine if mine.standing == worst else Verdict(worst, f"{step}: found by another process")

    def _finish(self, step: int, needed: int, about: dict[str, Any]) -> None:
        """What is done in the background."""
        try:
            self._manager.wait_until_finished()
            folder, part, parts = self._steps / str(step), jax.process_index(), jax.process_count()
            write_digests(folder, part, parts, about)
            if part == 0:
                _await_digests(folder, parts)
                self._retire()
        except BaseException as error:
            self._failure = self._told(error, step, needed)

    def _retire(self) -> None:
        """Removes the steps that are not to be kept, now that the newest is verified."""
        losses = {step: read_about(self._steps / str(step)).get("validation_loss") for step in saved_steps(self._steps)}
        for step in losses.keys() - kept(losses, self._retention):
            old = self._steps / str(step)
            if is_remote(old):
                system, root = filesystem(old)
                system.rm(root, recursive=True)
            else:
                # By this name it is known for what it is, should its removal be cut off.
                shutil.rmtree(old.rename(old.with_name(f"{step}{_TORN}-removed")))

    def _remove_torn(self) -> None:
        """Removes what a process was writing, or removing, when it was ended."""
        if distributed.is_first() and not is_remote(self._steps) and self._steps.is_dir():
            for each in self._steps.iterdir():
                if _TORN in each.name:
                    shutil.rmtree(each)

    def _settle(self, choice: Choice) -> None:
        """Moves away what is newer than the step that is used; writes the digests that this one lacks."""
        system, root = filesystem(self._folder)
        for step in choice.passed_by:
            system.makedirs(f"{root}/{DAMAGED}", exist_ok=True)
            aside = f"{root}/{DAMAGED}/{step}-{time.time_ns()}"
            system.mv(f"{root}/{CHECKPOINTS}/{step}", aside, recursive=True)
        if not choice.verified:
            write_digests(self._steps / str(choice.step))

    def _check_room(self, step: int, needed: int) -> None:
        if is_remote(self._folder) or not distributed.is_first():
            return
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise _no_room(self._steps / str(step), needed, f"{free:,} are free")

    def _told(self, error: BaseException, step: int, needed: int) -> BaseException:
        """A disk that was full, in one message; anything else as it is."""
        if is_full_disk(error) or "No space left on device" in str(error) or "quota exceeded" in str(error):
            return _no_room(self._steps / str(step), needed, "the disk is full")
        return error

    def _check_arrays(self, step: int, wanted: dict[str, str]) -> None:
        found = read_about(self._steps / str(step)).get("arrays")
        if found is None:
            return
        differences = [
            f"{name} is {found.get(name, 'missing')}, not {wanted.get(name, 'there in this config')}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if differences:
            more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
            said = "; ".join(differences[:5]) + more
            raise InputError(str(self._steps / str(step)), None, f"a checkpoint of another config: {said}")


def arrays(state: TrainState) -> dict[str, str]:
    """The type and shape of each array of a state, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path({PARAMS: state.params, OPTIMIZER: state.optimizer})
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _await_digests(step: Folder, parts: int, seconds: float = 3600.0) -> None:
    """Waits until every process has left its digests."""
    system, root = filesystem(step)
    end = time.monotonic() + seconds
    while len([name for name in system.ls(root, detail=False) if f"-of-{parts}" in name]) < parts:
        if time.monotonic() > end:
            raise TimeoutError(f"{step}: not all of {parts} processes have written its digests")
        time.sleep(0.2)


def _no_room(path: Folder, needed: int, why: str) -> InputError:
    return InputError("--run-dir", str(path), f"{needed:,} bytes are needed, {why}; the steps before are as they were")

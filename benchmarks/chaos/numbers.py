"""Losses that go wrong, and a step that does not end."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.chaos.runs import Run, Seen, Workshop
from mixtral_jax.checkpoints.run import OPTIMIZER, PARAMS

SPIKE = 100


def _arrays(run: Run, step: int) -> list[np.ndarray]:
    folder = run.folder / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as reader:
        trees: list[Any] = [reader.restore(folder / item) for item in (PARAMS, OPTIMIZER)]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trees)]


def nan_once(shop: Workshop) -> Seen:
    """The batch of step 12, the last: checkpoints before and after are compared."""
    seen = Seen()
    run = shop.start("nan-once", "steps=12", "save_every=11", fault="nan=11")
    (status,) = run.wait()
    seen.that(status == 0, f"exit {status}")
    skipped = [line["step"] + 1 for line in run.lines() if line["skipped"]]
    seen.that(skipped == [12], f"skipped {skipped}")
    pairs = list(zip(_arrays(run, 11), _arrays(run, 12), strict=True))
    same = all(np.array_equal(before, after) for before, after in pairs)
    seen.that(same, f"{len(pairs)} arrays of parameters and moments bitwise as before")
    seen.that("step 12: loss or gradient is not finite, the update is skipped" in run.said(), "told")
    seen.that(run.losses()[:11] == shop.reference[:11], "the losses before are the same")
    return seen


def nan_five(shop: Workshop) -> Seen:
    """From step 16 on, with a checkpoint every step of which one is kept."""
    seen = Seen()
    steps = ",".join(map(str, range(15, 40)))
    run = shop.start("nan-five", "steps=40", "save_every=1", "keep_checkpoints=1", fault=f"nan={steps}")
    (status,) = run.wait()
    seen.that(status == 1, f"exit {status}")
    told = "error: loss or gradient was not finite in 5 steps in a row, up to step 20"
    seen.that(told in run.said(), f"'{told}'")
    seen.that(run.saved() == [15], f"saved {run.saved()}")
    return seen


def spike(shop: Workshop) -> Seen:
    """A batch that is learnt from as any other."""
    seen = Seen()
    run = shop.start("spike", f"steps={SPIKE + 10}", fault=f"noise={SPIKE}")
    _spike(seen, run)
    seen.that(not any(line["skipped"] for line in run.lines()), "not skipped")
    seen.that(run.losses()[:SPIKE] == shop.reference[:SPIKE], "the losses before are the same")
    return seen


def spike_skipped(shop: Workshop) -> Seen:
    """With guard.skip_spikes."""
    seen, settings = Seen(), (f"steps={SPIKE + 1}", f"save_every={SPIKE}", "guard.skip_spikes=true")
    run = shop.start("spike-skipped", *settings, fault=f"noise={SPIKE}")
    _spike(seen, run)
    seen.that(", the update is skipped" in run.said() and run.lines()[SPIKE]["skipped"], "skipped")
    pairs = list(zip(_arrays(run, SPIKE), _arrays(run, SPIKE + 1), strict=True))
    seen.that(all(np.array_equal(*pair) for pair in pairs), f"{len(pairs)} arrays bitwise as before")
    return seen


def _spike(seen: Seen, run: Run) -> None:
    (status,) = run.wait()
    seen.that(status == 0, f"exit {status}")
    spikes = [line["step"] for line in run.lines() if line["spike"]]
    seen.that(spikes == [SPIKE], f"in metrics.jsonl at {spikes}")
    told = [line for line in run.said().splitlines() if "is a spike" in line]
    seen.that(len(told) == 1, f"'{' '.join(told)}'")


def hang(shop: Workshop) -> Seen:
    """A step that waits for ever."""
    seen = Seen()
    run = shop.start("hang", "guard.hang_seconds=3", fault="hang=12")
    run.wait_for_step(11)
    (status,) = run.wait(60)
    seen.that(status == 1, f"exit {status}")
    seen.that("no step has ended for 3 s" in run.said(), "told")
    stacks = (run.folder / "hang.txt").read_text(encoding="utf-8")
    seen.that(
        "in change" in stacks, f"hang.txt has the stacks of {stacks.count('hread 0x')} threads, and where it hung"
    )
    seen.that(run.saved() == [10], f"saved {run.saved()}")
    return seen

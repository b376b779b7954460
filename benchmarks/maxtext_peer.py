"""MaxText's training step, done once at a time for a parent that says when, which is `maxtext.py`.

.venv-maxtext/bin/python -I maxtext_peer.py KEY=VALUE ...

The keys are those of MaxText's own configs. Each line of standard input is answered, after a step, by a line: the loss.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

# What MaxText prints goes to standard error: standard output is for answers alone.
answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

import jax  # noqa: E402
from flax import nnx  # noqa: E402
from flax.core.spmd import logical_axis_rules  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.trainers.pre_train.train import train_step  # noqa: E402
from maxtext.utils import sharding, train_utils  # noqa: E402


def train(config: Any) -> Callable[[], object]:
    """A call that does its training step, always on the same synthetic batch."""
    _, _, shardings, _, mesh, _, _, loader, rampup, _, state = train_utils.setup_train_loop(config, None)
    graph, state = nnx.split(state)
    params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train_step, None, None, params_shardings
    )
    batch = loader.load_next_batch(rampup_manager=rampup)

    def call() -> object:
        nonlocal state
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = step(state, batch)
        return float(metrics["scalar"]["learning/loss"])

    return call


def main() -> None:
    """Answers until standard input ends."""
    call = train(pyconfig.initialize(["", *sys.argv[1:]]))
    for _ in sys.stdin:
        print(call(), file=answers)


if __name__ == "__main__":
    main()

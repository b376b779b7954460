"""One of MaxText's programs, run a call at a time for a parent that says when, which is `maxtext.py`.

.venv-maxtext/bin/python -I maxtext_peer.py train|decode KEY=VALUE ...

The keys are those of MaxText's own configs. Says `ready` once the program is compiled; then each line of standard input
is answered by a line, the seconds of one call.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

# What MaxText prints goes to standard error: standard output is for answers alone.
answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from flax.core.spmd import logical_axis_rules  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.inference.maxengine import maxengine  # noqa: E402
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


def decode(config: Any) -> Callable[[], object]:
    """A call that continues a prompt in each of its engine's slots up to the longest text, greedily."""
    # Where JetStream is not installed, its results are of a class that jit does not know.
    jax.tree_util.register_dataclass(
        maxengine.engine_api.ResultTokens,
        ["data", "log_prob"],
        ["tokens_idx", "valid_idx", "length_idx", "samples_per_slot"],
    )
    engine = maxengine.MaxEngine(config)
    rng = jax.random.PRNGKey(0)
    params = engine.load_params(rng=rng)
    slots, length = int(config.per_device_batch_size), config.max_prefill_predict_length
    prompts_BT = np.random.default_rng(0).integers(0, config.vocab_size, (slots, length), np.int32)

    def call() -> object:
        state = engine.init_decode_state(rng)
        for slot, prompt_T in enumerate(prompts_BT):
            prefix, _ = engine.prefill(params=params, padded_tokens=prompt_T, true_length=length, rng=rng, slot=slot)
            state = engine.insert(prefix, state, slot=slot)
        results = []
        # The prompt's own pass has given the first token.
        for _ in range(config.max_target_length - length - 1):
            state, result = engine.generate(params, state, rng=rng)
            results.append(result.data)
        return [np.asarray(data) for data in results]

    return call


def main() -> None:
    """Answers until standard input ends."""
    program, *settings = sys.argv[1:]
    call = {"train": train, "decode": decode}[program](pyconfig.initialize(["", *settings]))
    call()
    print("ready", file=answers)
    for _ in sys.stdin:
        begin = time.perf_counter()
        call()
        print(time.perf_counter() - begin, file=answers)


if __name__ == "__main__":
    main()

"""The same work by this project."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from mixtral_jax.config import Dispatch, Execution, ModelConfig
from mixtral_jax.inference import generate as generation
from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.inference.weights import prepare
from mixtral_jax.model.transformer import Transformer, init_params
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from mixtral_jax.train.packing import Batch
from mixtral_jax.train.state import TrainState, abstract_state
from mixtral_jax.train.step import make_step


def draw(config: ModelConfig, batch: int, length: int) -> tuple[Any, np.ndarray]:
    """Weights and tokens [B, T], the same each time."""
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), np.int32)
    return nn.unbox(init_params(config, jax.random.key(0))), tokens_BT


def prefill(config: ModelConfig, params: Any, tokens_BT: np.ndarray, dtype: str) -> Callable[[], object]:
    """A call that takes in the prompts and gives the last token's logits."""
    execution = Execution(product_dtype=dtype)
    weights = prepare(params, config, execution)
    prompts = tokens_BT.tolist()

    def call() -> object:
        state = generation.start(weights, prompts, 1, SamplingConfig(), 0, (), config, execution)
        return jax.block_until_ready(state.token_B)

    return call


def decode(config: ModelConfig, params: Any, tokens_BT: np.ndarray, steps: int, dtype: str) -> Callable[[], object]:
    """A call that continues the prompts by so many tokens, greedily."""
    execution = Execution(product_dtype=dtype)
    weights = prepare(params, config, execution)
    prompts = tokens_BT.tolist()

    def call() -> object:
        *_, state = generation.generate(
            weights, prompts, max_new_tokens=steps, sampling=SamplingConfig(), config=config, execution=execution
        )
        return generation.outputs(state)

    return call


def train(
    config: ModelConfig,
    params: Any,
    tokens_BT: np.ndarray,
    dtype: str,
    capacity_factor: float | None = 1.25,
    mesh: Mesh | None = None,
) -> Callable[[], object]:
    """A call that does a training step with AdamW: float32 masters, products in dtype; on a mesh, if one is given."""
    model = Transformer(config, Execution(product_dtype=dtype), Dispatch(capacity_factor=capacity_factor))
    settings = OptimizerConfig(learning_rate=1e-4, schedule="constant")
    optimizer = make_optimizer(settings, 1000)
    step = jax.jit(make_step(model, LossConfig(), optimizer, learning_rate(settings, 1000)), donate_argnums=0)
    # The step gives its arguments' memory away: it gets copies.
    own = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.int32(0), own, optimizer.init(own))
    length = tokens_BT.shape[1]
    batch = Batch(
        tokens=tokens_BT,
        targets=np.roll(tokens_BT, -1, axis=1),
        segment=np.ones_like(tokens_BT),
        position=np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape),
        loss_weight=np.ones(tokens_BT.shape, np.float32),
    )

    if mesh is not None:
        _, shardings = abstract_state(config, optimizer, mesh, TRAINING)
        rows = NamedSharding(mesh, TRAINING.use(("batch", "length")))
        state, batch = jax.device_put(state, shardings), jax.device_put(batch, rows)

    def call() -> object:
        nonlocal state
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        return float(metrics["loss"])

    return call

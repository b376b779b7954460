"""Sparse decode: a mixture beside dense models of its active and of its total size, and where by_need should switch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import ours
from benchmarks.timing import Row, interleave, rates
from mixtral_jax.config import Execution, ModelConfig, MoEConfig
from mixtral_jax.inference.compiling import program
from mixtral_jax.inference.weights import prepare
from mixtral_jax.model.backends import by_need
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.model.transformer import count_parameters, init_params

STEPS = 32
PROMPT = 16

MIXTURE = ModelConfig(
    dim=512,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    hidden_dim=1792,
    vocab_size=512,
    moe=MoEConfig(num_experts=8, experts_per_token=2),
)
"""In the proportions of the 8x7B: a hidden width of 3.5 times the model's, a token using 0.28 of the parameters."""


def decode(repeats: int) -> list[Row]:
    """Steps a second at batch 1. The goals: at least 0.8 of the dense model of the active size, 2.5 of the total's."""
    assert MIXTURE.moe is not None
    hidden, moe = MIXTURE.hidden_dim, MIXTURE.moe
    configs = {
        "mixture of 8, two a token": MIXTURE,
        "dense, its active parameters": replace(MIXTURE, moe=None, hidden_dim=hidden * moe.experts_per_token),
        "dense, its total parameters": replace(MIXTURE, moe=None, hidden_dim=hidden * moe.num_experts),
    }
    contenders = {_named(name, config): _decoder(config) for name, config in configs.items()}
    first = next(iter(contenders))
    return rates("sparse decode B1", "steps/s", STEPS, interleave(contenders, repeats), first)


def _named(name: str, config: ModelConfig) -> str:
    total, active = count_parameters(config)
    return f"{name} ({active / 1e6:.0f} of {total / 1e6:.0f}M)"


def _decoder(config: ModelConfig) -> Callable[[], object]:
    params = nn.unbox(init_params(config, jax.random.key(0)))
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (1, PROMPT), np.int32)
    return ours.decode(config, params, tokens_BT, STEPS, "float32")


def switch(repeats: int) -> list[Row]:
    """A layer's experts for so many tokens: all rows through each chosen one, or sorted and in blocks as on a CPU."""
    moe = MIXTURE.moe
    assert moe is not None
    params = nn.unbox(init_params(replace(MIXTURE, num_layers=1), jax.random.key(0)))
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16"):
        execution = Execution(product_dtype=dtype)
        experts = prepare(params, replace(MIXTURE, num_layers=1), execution).layers[0]["prepared"]["moe"]["experts"]
        if isinstance(experts, SwiGLU):  # a stack, for the kernel of GPUs
            experts = tuple(jax.tree.map(itemgetter(index), experts) for index in range(moe.num_experts))
        for tokens in (2, 4, 8, 16, 32, 64, 128, 256):
            rng = np.random.default_rng(tokens)
            chosen = [rng.permutation(moe.num_experts)[: moe.experts_per_token] for _ in range(tokens)]
            expert_NA = jnp.asarray(np.array(chosen), jnp.int32)
            gate_NA = jnp.full(expert_NA.shape, 1 / moe.experts_per_token, jnp.float32)
            x_ND = jnp.asarray(rng.standard_normal((tokens, MIXTURE.dim)), jnp.float32)
            inputs = x_ND, expert_NA, gate_NA, jnp.ones(tokens, bool), experts
            block = by_need.block_on_cpu(expert_NA.size, experts, execution)
            forms: dict[str, Callable[..., jax.Array]] = {"all rows": by_need.all_rows}
            if block is not None:
                forms["in blocks"] = partial(by_need.sorted_rows, block=block)
            calls = {name: _call(form, inputs, execution) for name, form in forms.items()}
            rows += rates(f"{tokens} tokens, {dtype}", "calls/s", 1, interleave(calls, repeats), "all rows")
    return rows


def _call(form: Callable[..., jax.Array], inputs: tuple[Any, ...], execution: Execution) -> Callable[[], object]:
    compiled = program()(partial(form, execution=execution))
    return lambda: jax.block_until_ready(compiled(*inputs))

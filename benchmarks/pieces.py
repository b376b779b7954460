"""Pieces of the tiny Mixtral beside torch's and transformers': cross-entropy, a layer's experts, attention.

Each call gives its results and gradients. bfloat16 is, for torch, autocast where gradients are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from torch.nn import functional

from benchmarks import huggingface
from benchmarks.timing import Row, interleave, rates
from mixtral_jax.config import Dispatch, Execution, ModelConfig, model_config
from mixtral_jax.inference.compiling import program
from mixtral_jax.inference.weights import prepare
from mixtral_jax.model.backends.chunked import Keys, self_attention
from mixtral_jax.model.moe import MoE
from mixtral_jax.model.transformer import init_params
from mixtral_jax.sharding.rules import DECODING, TRAINING
from mixtral_jax.train import losses

Calls = dict[str, Callable[[], Any]]

CONFIG = model_config("tiny-mixtral")
LAYER = replace(CONFIG, num_layers=1, vocab_size=16)
TRAINED = 4, 512  # rows and tokens a row
SERVED = 512
AT_A_TIME = (1, 8, 64, 512)
LENGTHS = (512, 1024, 2048, 4096)
WINDOW = 1024
OURS = "ours, bfloat16 products"


def timed(piece: Callable[[], Iterator[tuple[str, int, Calls]]], repeats: int) -> list[Row]:
    """Tokens a second of a piece's contenders."""
    rows = []
    for name, tokens, calls in piece():
        rows += rates(name, "tokens/s", tokens, interleave(calls, repeats, warm_up=1), OURS)
    return rows


def cross_entropy() -> Iterator[tuple[str, int, Calls]]:
    """The loss of a training step's tokens over the vocabulary, with its gradients: its name, tokens, contenders."""
    hidden_BTD, unembedding_DV = draw(*TRAINED, CONFIG.dim), draw(CONFIG.dim, CONFIG.vocab_size) * CONFIG.dim**-0.5
    target_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, TRAINED, np.int32)
    yield "cross-entropy", target_BT.size, cross_entropy_calls(hidden_BTD, unembedding_DV, target_BT)


def cross_entropy_calls(hidden_BTD: np.ndarray, unembedding_DV: np.ndarray, target_BT: np.ndarray) -> Calls:
    """Calls that give the mean over tokens, and the gradients by hidden states and unembedding."""
    weight_BT = np.full(target_BT.shape, 1 / target_BT.size, np.float32)
    arrays = jax.device_put((hidden_BTD, unembedding_DV, target_BT, weight_BT))
    hidden, unembedding = (torch.from_numpy(each).requires_grad_() for each in (hidden_BTD, unembedding_DV))
    target = torch.from_numpy(target_BT.astype(np.int64)).flatten()

    def ours(dtype: str) -> Callable[[], Any]:
        def loss(*arrays: jax.Array) -> jax.Array:
            return losses.cross_entropy(*arrays, losses.LossConfig().chunk, dtype)

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return lambda: jax.block_until_ready(compiled(*arrays))

    def theirs(dtype: str) -> Any:
        with autocast(dtype):
            loss = functional.cross_entropy((hidden @ unembedding).flatten(0, 1), target)
        return loss, torch.autograd.grad(loss, (hidden, unembedding))

    return contenders(ours, "torch", theirs)


def experts() -> Iterator[tuple[str, int, Calls]]:
    """A layer's router and experts: forward and backward of a training step's tokens, and forward of so many a time."""
    params = nn.unbox(init_params(LAYER, jax.random.key(0)))
    calls = trained_experts_calls(LAYER, params, draw(*TRAINED, LAYER.dim), draw(*TRAINED, LAYER.dim))
    yield "experts, training", TRAINED[0] * TRAINED[1], calls
    for tokens in AT_A_TIME:
        x_XBTD = draw(SERVED // tokens, 1, tokens, LAYER.dim)
        yield f"experts, {tokens} at a time", SERVED, served_experts_calls(LAYER, params, x_XBTD)


def trained_experts_calls(config: ModelConfig, params: Any, x_BTD: np.ndarray, cotangent_BTD: np.ndarray) -> Calls:
    """Calls that give the layer's result, and the gradients by its weights and its input."""
    arrays = jax.device_put((params["layers"]["moe"], x_BTD, cotangent_BTD))
    layer = huggingface.model(config, params, "float32").model.layers[0].mlp.train()
    x, cotangent = torch.from_numpy(x_BTD).requires_grad_(), torch.from_numpy(cotangent_BTD)

    def ours(dtype: str, capacity_factor: float | None = 1.25) -> Callable[[], Any]:
        moe = MoE(config, Execution(product_dtype=dtype), Dispatch(capacity_factor=capacity_factor), TRAINING)

        def forward(weights: Any, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
            first = jax.tree.map(lambda leaf: leaf[0], weights)
            return moe.apply({"params": first}, x_BTD, jnp.ones(x_BTD.shape[:2], bool))

        @jax.jit
        def both(weights: Any, x_BTD: jax.Array, cotangent_BTD: jax.Array) -> Any:
            y_BTD, backward, _ = jax.vjp(forward, weights, x_BTD, has_aux=True)
            return y_BTD, backward(cotangent_BTD)

        return lambda: jax.block_until_ready(both(*arrays))

    def theirs(dtype: str) -> Any:
        with autocast(dtype):
            y = layer(x)
        return y, torch.autograd.grad(y, (*layer.parameters(), x), cotangent.to(y.dtype))

    dropless = {"ours, bfloat16, dropless": ours("bfloat16", None), "ours, float32, dropless": ours("float32", None)}
    return contenders(ours, "transformers", theirs) | dropless


def served_experts_calls(config: ModelConfig, params: Any, x_XBTD: np.ndarray) -> Calls:
    """Calls that give the layer's result for one piece after another; ours in one program, as the decode loop is."""

    def ours(dtype: str) -> Callable[[], Any]:
        execution = Execution(product_dtype=dtype)
        layer = prepare(params, config, execution).layers[0]
        variables = {form: leaves["moe"] for form, leaves in layer.items()}
        moe = MoE(config, execution, Dispatch(), DECODING)

        def serve(variables: Any, x_BTD: jax.Array) -> jax.Array:
            return moe.apply(variables, x_BTD, jnp.ones(x_BTD.shape[:2], bool))[0]

        @program()
        def compiled(variables: Any, x_XBTD: jax.Array) -> jax.Array:
            return jax.lax.map(partial(serve, variables), x_XBTD)

        arrays = variables, jnp.asarray(x_XBTD)
        return lambda: jax.block_until_ready(compiled(*arrays))

    layers = {dtype: huggingface.model(config, params, dtype).model.layers[0].mlp for dtype in huggingface.DTYPES}
    pieces = {dtype: torch.from_numpy(x_XBTD).to(huggingface.DTYPES[dtype]) for dtype in layers}

    def theirs(dtype: str) -> Any:
        with torch.inference_mode():
            return [layers[dtype](piece) for piece in pieces[dtype]]

    return contenders(ours, "transformers", theirs)


def attention() -> Iterator[tuple[str, int, Calls]]:
    """Attention of one row with the tiny Mixtral's heads, forward and backward, by length: W = 1024 and none."""
    for length in LENGTHS:
        for window in (None, WINDOW) if length > WINDOW else (None,):
            name = f"attention T{length}, {'no window' if window is None else f'W{window}'}"
            yield name, length, attention_calls(CONFIG, length, window)


def attention_calls(config: ModelConfig, length: int, window: int | None) -> Calls:
    """Calls that give the result, and the gradients by queries, keys and values; ours [B, T, ...], torch's by heads."""
    grouped = config.num_kv_heads, config.queries_per_kv_head, config.head_dim
    q_BTKGH, cotangent_BTKGH = draw(1, length, *grouped), draw(1, length, *grouped)
    k_BTKH, v_BTKH = (draw(1, length, config.num_kv_heads, config.head_dim) for _ in range(2))
    arrays = jax.device_put((q_BTKGH, k_BTKH, v_BTKH))
    by_heads = [torch.from_numpy(each).flatten(2, -2).transpose(1, 2) for each in (q_BTKGH, k_BTKH, v_BTKH)]
    q, k, v = (each.contiguous().requires_grad_() for each in by_heads)
    cotangent = torch.from_numpy(cotangent_BTKGH).flatten(2, -2).transpose(1, 2)
    # Without a window torch knows the mask by its name, and skips what it hides.
    mask = None if window is None else torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)

    def ours(dtype: str) -> Callable[[], Any]:
        chunk = Execution().attention_chunk

        @jax.jit
        def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
            y, backward = jax.vjp(lambda q, k, v: self_attention(q, Keys(k, v), None, window, chunk, dtype), q, k, v)
            return y, backward(cotangent)

        return lambda: jax.block_until_ready(both(*arrays, cotangent_BTKGH))

    def theirs(dtype: str) -> Any:
        with autocast(dtype):
            y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return y, torch.autograd.grad(y, (q, k, v), cotangent.to(y.dtype))

    return contenders(ours, "torch", theirs)


def contenders(ours: Callable[[str], Callable[[], Any]], who: str, theirs: Callable[[str], Any]) -> Calls:
    """Ours and theirs, each with products in both dtypes."""
    calls = {OURS: ours("bfloat16"), "ours, float32 products": ours("float32")}
    return calls | {f"{who}, {dtype}": partial(theirs, dtype) for dtype in huggingface.DTYPES}


def autocast(dtype: str) -> torch.autocast:
    """As users of torch train in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def draw(*shape: int) -> np.ndarray:
    """float32 numbers, the same each time."""
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)

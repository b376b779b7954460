"""Hugging Face transformers on the same weights: prefill, decode and a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mixtral_jax.config import ModelConfig
from tests.oracles.huggingface import to_huggingface

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model(config: ModelConfig, params: Any, dtype: str) -> Any:
    """Its model with our weights (None: random ones), with its own choice of attention and experts kernels."""
    theirs = to_huggingface(config, params, DTYPES[dtype])
    theirs.set_attn_implementation("sdpa")
    return theirs


def prefill(config: ModelConfig, params: Any, tokens_BT: np.ndarray, dtype: str) -> Callable[[], object]:
    """A call that takes in the prompts and gives the last token's logits."""
    theirs, tokens = model(config, params, dtype), torch.from_numpy(tokens_BT.astype(np.int64))

    def call() -> object:
        with torch.inference_mode():
            return theirs(tokens, use_cache=True, logits_to_keep=1).logits

    return call


def decode(config: ModelConfig, params: Any, tokens_BT: np.ndarray, steps: int, dtype: str) -> Callable[[], object]:
    """A call that continues the prompts by so many tokens, greedily."""
    theirs, tokens = model(config, params, dtype), torch.from_numpy(tokens_BT.astype(np.int64))
    theirs.generation_config.eos_token_id = None
    settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}

    def call() -> object:
        with torch.inference_mode():
            return theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)

    return call


def train(config: ModelConfig, params: Any, tokens_BT: np.ndarray, dtype: str) -> Callable[[], object]:
    """A call that does a training step with AdamW: float32 masters, products in dtype by autocast."""
    theirs = model(config, params, "float32").train()
    theirs.config.output_router_logits = True
    theirs.config.router_aux_loss_coef = 0.02
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.from_numpy(tokens_BT.astype(np.int64))

    def call() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = theirs(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return call

"""Our weights in Hugging Face transformers' models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from mixtral_jax.config import ModelConfig


def to_huggingface(config: ModelConfig, params: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A MistralForCausalLM or MixtralForCausalLM with these weights, for inference, with eager attention.

    None for the weights: its own, drawn at random.
    """
    common = {
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }
    if config.moe is None:
        model: PreTrainedModel = MistralForCausalLM(MistralConfig(**common))
    else:
        experts = {"num_local_experts": config.moe.num_experts, "num_experts_per_tok": config.moe.experts_per_token}
        model = MixtralForCausalLM(MixtralConfig(**common, **experts))
    if params is not None:
        state = {name: torch.from_numpy(np.array(array)) for name, array in _tensors(config, params).items()}
        model.load_state_dict(state, strict=not config.tie_embeddings)
    return model.to(dtype).eval()


def _tensors(config: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Every tensor of the model by its name; a linear layer's is [out, in]."""
    tensors = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = np.transpose(params["unembedding"])
    layers, dim = params["layers"], config.dim
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        tensors[prefix + "input_layernorm.weight"] = layers["attention_norm"]["scale"][index]
        tensors[prefix + "post_attention_layernorm.weight"] = layers["feed_forward_norm"]["scale"][index]
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            w_DNH = np.asarray(layers["attention"][ours][index])
            tensors[f"{prefix}self_attn.{theirs}.weight"] = w_DNH.reshape(dim, -1).T
        output_NHD = np.asarray(layers["attention"]["output"][index])
        tensors[prefix + "self_attn.o_proj.weight"] = output_NHD.reshape(-1, dim).T
        mlp = layers["feed_forward" if config.moe is None else "moe"]
        gate, up, down = (np.swapaxes(mlp[name][index], -1, -2) for name in ("gate", "up", "down"))
        if config.moe is None:
            tensors[prefix + "mlp.gate_proj.weight"] = gate
            tensors[prefix + "mlp.up_proj.weight"] = up
            tensors[prefix + "mlp.down_proj.weight"] = down
        else:
            tensors[prefix + "mlp.gate.weight"] = np.transpose(mlp["router"][index])
            tensors[prefix + "mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            tensors[prefix + "mlp.experts.down_proj"] = down
    return tensors


def logits(model: PreTrainedModel, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens_BT, np.int64)), use_cache=False).logits.float().numpy()

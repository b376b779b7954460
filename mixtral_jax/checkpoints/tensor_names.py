"""What each format calls a tensor, and how it lays it out: one table for each layout of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mixtral_jax.checkpoints.archive import WHOLE, Part
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import Tensor, tensors

_BLOCK = 16
"""Rows that are transposed at a time: their destinations share cache lines. Five times numpy's own transposed copy."""


@dataclass(frozen=True)
class Stored:
    """Where a format keeps a tensor."""

    name: str
    part: Part = WHOLE
    """Which of the rows, where several tensors are stacked in one."""
    inputs: int = 0
    """How many of our first dimensions are a linear layer's inputs: files have it as [out, in]. 0: it lies as ours."""
    interleaved: bool = False
    """Rows of queries and keys stand in pairs (2i, 2i + 1), as the original rope rotates them, not (i, i + H / 2)."""


Layout = dict[Tensor, Stored]

_INPUTS = {
    "attention.output": 2,
    "embedding": 0,
    "attention_norm.scale": 0,
    "feed_forward_norm.scale": 0,
    "norm.scale": 0,
}
"""Of the tensors that are no plain linear layer with one input dimension."""
_ROTATED = ("attention.query", "attention.key")


def _stored(tensor: Tensor, name: str, part: Part = WHOLE, interleaved: bool = False) -> Stored:
    return Stored(name, part, _INPUTS.get(tensor.kind, 1), interleaved and tensor.kind in _ROTATED)


_HUGGINGFACE = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding": "lm_head.weight",
    "attention.query": "model.layers.{layer}.self_attn.q_proj.weight",
    "attention.key": "model.layers.{layer}.self_attn.k_proj.weight",
    "attention.value": "model.layers.{layer}.self_attn.v_proj.weight",
    "attention.output": "model.layers.{layer}.self_attn.o_proj.weight",
    "attention_norm.scale": "model.layers.{layer}.input_layernorm.weight",
    "feed_forward_norm.scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "feed_forward.gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "feed_forward.up": "model.layers.{layer}.mlp.up_proj.weight",
    "feed_forward.down": "model.layers.{layer}.mlp.down_proj.weight",
    "moe.router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "moe.gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "moe.down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    "moe.up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
}
_HUGGINGFACE_FUSED = _HUGGINGFACE | {
    "moe.router": "model.layers.{layer}.mlp.gate.weight",
    "moe.gate": "model.layers.{layer}.mlp.experts.gate_up_proj",
    "moe.up": "model.layers.{layer}.mlp.experts.gate_up_proj",
    "moe.down": "model.layers.{layer}.mlp.experts.down_proj",
}
_CONSOLIDATED = {
    "embedding": "tok_embeddings.weight",
    "norm.scale": "norm.weight",
    "unembedding": "output.weight",
    "attention.query": "layers.{layer}.attention.wq.weight",
    "attention.key": "layers.{layer}.attention.wk.weight",
    "attention.value": "layers.{layer}.attention.wv.weight",
    "attention.output": "layers.{layer}.attention.wo.weight",
    "attention_norm.scale": "layers.{layer}.attention_norm.weight",
    "feed_forward_norm.scale": "layers.{layer}.ffn_norm.weight",
    "feed_forward.gate": "layers.{layer}.feed_forward.w1.weight",
    "feed_forward.down": "layers.{layer}.feed_forward.w2.weight",
    "feed_forward.up": "layers.{layer}.feed_forward.w3.weight",
    "moe.router": "layers.{layer}.feed_forward.gate.weight",
    "moe.gate": "layers.{layer}.feed_forward.experts.{expert}.w1.weight",
    "moe.down": "layers.{layer}.feed_forward.experts.{expert}.w2.weight",
    "moe.up": "layers.{layer}.feed_forward.experts.{expert}.w3.weight",
}
_CONSOLIDATED_STACKED = _CONSOLIDATED | {
    "moe.router": "layers.{layer}.block_sparse_moe.gate.weight",
    "moe.gate": "layers.{layer}.block_sparse_moe.w1",
    "moe.down": "layers.{layer}.block_sparse_moe.w2",
    "moe.up": "layers.{layer}.block_sparse_moe.w3",
}
_GGUF = {
    "embedding": "token_embd.weight",
    "norm.scale": "output_norm.weight",
    "unembedding": "output.weight",
    "attention.query": "blk.{layer}.attn_q.weight",
    "attention.key": "blk.{layer}.attn_k.weight",
    "attention.value": "blk.{layer}.attn_v.weight",
    "attention.output": "blk.{layer}.attn_output.weight",
    "attention_norm.scale": "blk.{layer}.attn_norm.weight",
    "feed_forward_norm.scale": "blk.{layer}.ffn_norm.weight",
    "feed_forward.gate": "blk.{layer}.ffn_gate.weight",
    "feed_forward.up": "blk.{layer}.ffn_up.weight",
    "feed_forward.down": "blk.{layer}.ffn_down.weight",
    "moe.router": "blk.{layer}.ffn_gate_inp.weight",
    "moe.gate": "blk.{layer}.ffn_gate_exps.weight",
    "moe.up": "blk.{layer}.ffn_up_exps.weight",
    "moe.down": "blk.{layer}.ffn_down_exps.weight",
}
_GGUF_APART = _GGUF | {
    "moe.gate": "blk.{layer}.ffn_gate.{expert}.weight",
    "moe.up": "blk.{layer}.ffn_up.{expert}.weight",
    "moe.down": "blk.{layer}.ffn_down.{expert}.weight",
}


def _layout(config: ModelConfig, names: Mapping[str, str], interleaved: bool = False) -> Layout:
    """A tensor of its own for each; where a name says no expert, one for all experts of a layer."""
    experts = config.moe.num_experts if config.moe else 1
    if config.moe and config.moe.selection_bias:
        raise InputError("model.moe.selection_bias", True, "no published format has a place for it; ours does: native")
    layout = {}
    for tensor in tensors(config):
        name = names[tensor.kind]
        together = tensor.expert is not None and "{expert}" not in name
        part = Part(tensor.expert or 0, experts) if together else WHOLE
        layout[tensor] = _stored(tensor, name.format(layer=tensor.layer, expert=tensor.expert), part, interleaved)
    return layout


def huggingface(config: ModelConfig) -> Layout:
    """As transformers publishes them, in its versions 4 and 5."""
    return _layout(config, _HUGGINGFACE)


def huggingface_fused(config: ModelConfig) -> Layout:
    """As transformers 5 holds a Mixtral in memory: [E, 2F, D], an expert's gate before its up, and [E, D, F]."""
    layout = _layout(config, _HUGGINGFACE_FUSED)
    for tensor, stored in layout.items():
        if tensor.kind in ("moe.gate", "moe.up"):
            place = Part(2 * stored.part.index + (tensor.kind == "moe.up"), 2 * stored.part.count)
            layout[tensor] = Stored(stored.name, place, stored.inputs)
    return layout


def consolidated(config: ModelConfig) -> Layout:
    """Mistral's own files, an expert's matrices each by itself."""
    return _layout(config, _CONSOLIDATED, interleaved=True)


def consolidated_stacked(config: ModelConfig) -> Layout:
    """Mixtral's files of 2023, the experts stacked by rows, [E * F, D]; those of w2 lie transposed, as we have them."""
    layout = _layout(config, _CONSOLIDATED_STACKED, interleaved=True)
    for tensor, stored in layout.items():
        if tensor.kind == "moe.down":
            layout[tensor] = Stored(stored.name, stored.part, inputs=0)
    return layout


def gguf(config: ModelConfig) -> Layout:
    """llama.cpp's files, experts stacked, [E, F, D]."""
    return _layout(config, _GGUF, interleaved=True)


def gguf_apart(config: ModelConfig) -> Layout:
    """llama.cpp's Mixtral files until April 2024, experts apart."""
    return _layout(config, _GGUF_APART, interleaved=True)


LAYOUTS: dict[str, tuple[Callable[[ModelConfig], Layout], ...]] = {
    "huggingface": (huggingface, huggingface_fused),
    "consolidated": (consolidated, consolidated_stacked),
    "gguf": (gguf, gguf_apart),
}
"""For each format its layouts; the first is the one that is written."""


def file_shape(tensor: Tensor, stored: Stored) -> tuple[int, ...]:
    """The shape that a tensor, or its part, has in a file: [rows, columns], or [n]."""
    if not stored.inputs:
        return tensor.shape
    inputs, outputs = tensor.shape[: stored.inputs], tensor.shape[stored.inputs :]
    return int(np.prod(outputs)), int(np.prod(inputs))


def from_file(array: np.ndarray, tensor: Tensor, stored: Stored, in_order: bool = True) -> np.ndarray:
    """An array as a file has it, in our layout; not `in_order`, a matrix is a view of it, whose inputs come last."""
    if stored.interleaved:
        array = deinterleave(array, tensor.shape[-1])
    if stored.inputs:
        array = transposed(array) if in_order else array.T
    return array.reshape(tensor.shape)


def to_file(array: np.ndarray, tensor: Tensor, stored: Stored) -> np.ndarray:
    """The inverse of from_file."""
    if stored.inputs:
        array = transposed(array.reshape(file_shape(tensor, stored)[::-1]))
    if stored.interleaved:
        array = interleave(array, tensor.shape[-1])
    return array


def deinterleave(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from pairs (2i, 2i + 1) to halves: 0 1 2 3 4 5 become 0 2 4 1 3 5."""
    return array.reshape(-1, head_dim // 2, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def interleave(array: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of deinterleave: 0 2 4 1 3 5 become 0 1 2 3 4 5."""
    return array.reshape(-1, 2, head_dim // 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def transposed(array: np.ndarray) -> np.ndarray:
    """A transposed copy of a matrix, in its own memory order."""
    result = np.empty(array.shape[::-1], array.dtype)
    for start in range(0, len(array), _BLOCK):
        result[:, start : start + _BLOCK] = array[start : start + _BLOCK].T
    return result

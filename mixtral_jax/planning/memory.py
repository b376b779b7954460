"""Memory of a device by kind, counted from shapes and layouts, for where no compiler says it.

Weights, moments, batch and cache are exact. What a step makes besides is an estimate: what the forward pass keeps, plus
the widest moment of the backward pass, each array in it counted as our programs make it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
from flax import linen as nn

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.backends.cached import queries_at_once, slots_at_once
from mixtral_jax.model.backends.chunked import KEYS_AT_ONCE, goes_by_blocks
from mixtral_jax.model.backends.runs import keys_of
from mixtral_jax.model.cache import num_slots
from mixtral_jax.model.context_parallel import has_kernel_for_cache
from mixtral_jax.model.tensors import Tensor
from mixtral_jax.model.transformer import abstract_params
from mixtral_jax.planning.job import DTYPE_BYTES, Job
from mixtral_jax.quantization import is_quantized, scale_shape
from mixtral_jax.sharding.axes import Names
from mixtral_jax.sharding.mesh import MeshConfig
from mixtral_jax.sharding.rules import DECODING, TRAINING, Rules
from mixtral_jax.train.losses import chunks_of

_FLOAT = 4
UPDATE_COPIES = 2
"""Arrays as large as a device's weights that TPU programs hold besides gradients: found by compiling with fewer layers,
which leaves so much a layer unexplained (docs/plan.md)."""
MARGIN = 0.15
"""Of a chip's memory, left aside by counts: where both were made, up to 13% below the compiler (docs/plan.md)."""


class Leaf(NamedTuple):
    """A parameter of the tree, over all layers."""

    kind: str
    """`attention`, `router`, `norm`, `experts`, `feed_forward`, `embedding` or `unembedding`."""
    shape: tuple[int, ...]
    names: Names
    path: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stacked(self) -> int:
        """Its leading dimensions, of layers and experts."""
        return sum(name in ("layers", "experts") for name in self.names)

    @property
    def tensor(self) -> Tensor:
        """One of the tensors that are stacked in it."""
        return Tensor(self.path, (0,) * self.stacked, self.shape[self.stacked :], self.names[self.stacked :])


@cache
def leaves(model: ModelConfig) -> tuple[Leaf, ...]:
    """The parameters of a model."""
    boxed = jax.tree_util.tree_leaves_with_path(
        abstract_params(model), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    return tuple(
        Leaf(_kind(jax.tree_util.keystr(path)), leaf.value.shape, leaf.names, tuple(key.key for key in path))
        for path, leaf in boxed
    )


def _kind(path: str) -> str:
    if "'moe'" in path:
        return "router" if "router" in path else "experts"
    known = ("unembedding", "embedding", "norm", "feed_forward", "attention")
    return next(kind for kind in known if kind in path)


@cache
def parts(names: Names, rules: Rules, mesh: MeshConfig) -> int:
    """Devices that an array is split over at rest."""
    return math.prod(mesh.size(axis) for name in names for axis in rules.mesh_axes(name))


def training_shards(job: Job) -> int:
    """A device's part of the weights, in float32."""
    return sum(_FLOAT * leaf.size // parts(leaf.names, TRAINING, job.mesh) for leaf in leaves(job.model))


def in_use(leaf: Leaf, job: Job) -> int:
    """Elements of a parameter that a device has when its layers run, all layers together."""
    return leaf.size // parts(_names_in_use(leaf.names), TRAINING, job.mesh)


@cache
def _names_in_use(names: Names) -> Names:
    return tuple(None if name in TRAINING.only_stored else name for name in names)


class DecodingWeights(NamedTuple):
    """Bytes on a device, in the dtype of products or in fewer bits."""

    embedding: int
    attention: int
    """And dense feed-forwards, norms and routers."""
    experts: int
    unembedding: int


def decoding_weights(job: Job) -> DecodingWeights:
    """What a device holds of the weights to serve."""
    held = dict.fromkeys(DecodingWeights._fields, 0)
    for leaf in leaves(job.model):
        group = leaf.kind if leaf.kind in held else "attention"
        held[group] += _decoding_bytes(leaf, job)
    return DecodingWeights(**held)


def _decoding_bytes(leaf: Leaf, job: Job) -> int:
    local = leaf.size // parts(leaf.names, DECODING, job.mesh)
    if job.quantize is None or not is_quantized(leaf.tensor):
        return local * (_FLOAT if leaf.kind in ("norm", "router") else DTYPE_BYTES[job.execution.held_dtype])
    scales = scale_shape(leaf.tensor, job.quantize)
    # What has one scale has nothing to split.
    names = tuple(None if size == 1 else name for size, name in zip(scales, leaf.tensor.axes, strict=True))
    copies = math.prod(leaf.shape[: leaf.stacked])
    of_scales = _FLOAT * copies * math.prod(scales) // parts(names, DECODING, job.mesh)
    return (local // 2 if job.quantize == "int4" else local) + of_scales


@dataclass(frozen=True)
class Memory:
    """Bytes on a device by kind."""

    weights: float
    moments: float = 0
    gradients: float = 0
    activations: float = 0
    """What is kept for the backward pass."""
    buffers: float = 0
    """The widest moment: gathered weights, and what lies between products."""
    batch: float = 0
    cache: float = 0

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(job: Job) -> Memory:
    """The estimate for a step of training, or for serving."""
    return _serving(job) if job.serve else _training(job)


def _training(job: Job) -> Memory:
    shards = training_shards(job)
    return Memory(
        weights=shards,
        moments=2 * shards,
        gradients=shards * (2 if job.accumulation > 1 else 1),
        activations=kept_activations(job),
        buffers=max(_layer(job), _loss(job), _embedding(job)) + UPDATE_COPIES * shards,
        batch=5 * 4 * job.local_tokens * job.accumulation,
    )


def kept_activations(job: Job) -> float:
    """What lies from the forward pass to the backward one: of each layer its input, or more."""
    model, remat = job.model, job.execution.remat
    if remat == "offload":
        return 0.0  # but for those on their way, which are few
    stream = DTYPE_BYTES[job.execution.activation_dtype]
    kept = _layer_input(job)
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // job.mesh.tensor
    hidden, rows = model.hidden_dim // job.mesh.tensor, job.expert_rows / max(job.local_tokens, 1)
    if remat != "full":
        kept += stream * (heads + model.dim)
        if model.moe is None:
            kept += stream * 2 * hidden
    if remat == "none":
        # Normalised inputs, rotated queries and keys, what attention gives, in float32 by XLA, and hidden activations.
        mixed = model.num_heads * model.head_dim // job.mesh.tensor
        kept += stream * (2 * model.dim + 2 * heads) + (_FLOAT if job.kernel == "xla" else stream) * mixed
        kept += stream * (hidden if model.moe is None else rows * (2 * model.dim + 3 * hidden))
    return model.num_layers * job.local_tokens * kept


def on_host(job: Job) -> float:
    """Bytes in the host's memory for a device: what goes there in the forward pass, and comes back in the other."""
    if job.serve or job.execution.remat != "offload":
        return 0.0
    return job.model.num_layers * job.local_tokens * _layer_input(job)


def _layer_input(job: Job) -> float:
    """Bytes of a token on a device between two layers, where the residual stream is split over `tensor`."""
    return job.model.dim // job.mesh.tensor * DTYPE_BYTES[job.execution.activation_dtype]


def _layer(job: Job) -> float:
    """A layer's backward pass."""
    model = job.model
    product, stream = DTYPE_BYTES[job.execution.product_dtype], DTYPE_BYTES[job.execution.activation_dtype]
    layer = [leaf for leaf in leaves(model) if "layers" in leaf.names]
    shared = sum(in_use(leaf, job) for leaf in layer if leaf.kind != "experts") / model.num_layers
    held = sum(in_use(leaf, job) for leaf in layer if leaf.kind == "experts") / model.num_layers
    tokens = job.local_tokens
    common = shared * (product + _FLOAT) + 4 * tokens * model.dim * stream
    # The compiler begins on one before it is done with the other.
    return common + _attention(job) + (_experts(job, held) if model.moe else _dense(job))


def _attention(job: Job) -> float:
    """Queries, keys, values, their cotangents, and, by XLA, a chunk's scores, of all keys or of a block."""
    model, chunk = job.model, min(job.execution.attention_chunk, job.local_length)
    stream = DTYPE_BYTES[job.execution.activation_dtype]
    heads = model.num_heads // job.mesh.tensor
    of_keys = model.num_kv_heads // job.mesh.tensor * model.head_dim * job.local_rows * 4 * stream
    shared_keys = of_keys * (job.length if model.sliding_window is None else job.local_length)
    of_tokens = job.local_tokens * heads * model.head_dim * (4 * stream + _FLOAT)
    by_blocks = goes_by_blocks(job.local_length, job.length, model.sliding_window, chunk, job.platform)
    keys = KEYS_AT_ONCE if by_blocks else keys_of(chunk, model.sliding_window, job.length)
    scores = job.local_rows * heads * chunk * keys if job.kernel == "xla" else 0
    return of_tokens + shared_keys + 3 * _FLOAT * scores


def _dense(job: Job) -> float:
    hidden = job.model.hidden_dim // job.mesh.tensor
    return job.local_tokens * hidden * 5 * DTYPE_BYTES[job.execution.activation_dtype]


def _experts(job: Job, held: float) -> float:
    """Rows at home and where they are served, and weights and gradients of the experts served together."""
    model, moe = job.model, job.model.moe
    assert moe is not None
    product, stream = DTYPE_BYTES[job.execution.product_dtype], DTYPE_BYTES[job.execution.activation_dtype]
    hidden, rows = model.hidden_dim // job.mesh.tensor, job.expert_rows
    own = moe.num_experts // job.mesh.expert
    at_home = 3 * rows * model.dim * product
    if job.dispatch.capacity_factor is None:
        served = min(job.dispatch.exchange_rows, rows * (job.mesh.expert if job.mesh.expert > 1 else 1))
        at_once, away = held, 3 * served * model.dim * product
    else:
        served, at_once = rows // own, held / own
        away = at_home if job.mesh.expert > 1 else 0
    if not job.repeats_no_experts:
        served, at_once = rows, held
    between = served * hidden * (5 * stream + _FLOAT)
    return at_home + away + between + at_once * (product + _FLOAT)


def _loss(job: Job) -> float:
    """The unembedding, its gradient, the hidden states with theirs, and a chunk's logits."""
    model, vocab = job.model, job.model.vocab_size // job.mesh.tensor
    product, stream = DTYPE_BYTES[job.execution.product_dtype], DTYPE_BYTES[job.execution.activation_dtype]
    _, of_row = chunks_of(job.local_rows, job.local_length, job.loss_chunk)
    logits = job.local_rows * of_row * vocab * 3 * _FLOAT
    return model.dim * vocab * (product + _FLOAT) + 2 * job.local_tokens * model.dim * stream + logits


def _embedding(job: Job) -> float:
    """The table's gradient, whole, before it is scattered."""
    stream = DTYPE_BYTES[job.execution.activation_dtype]
    table = job.model.dim * job.model.vocab_size // job.mesh.tensor
    return 2 * _FLOAT * table + job.local_tokens * job.model.dim * (stream + _FLOAT)


PREFILL_CHUNK = 512


def _serving(job: Job) -> Memory:
    model, chunk = job.model, min(PREFILL_CHUNK, job.length)
    stream = DTYPE_BYTES[job.execution.activation_dtype]
    tokens = job.rows * chunk
    hidden = model.hidden_dim // (job.mesh.fsdp * job.mesh.expert * job.mesh.tensor)
    rows = tokens * (1 if model.moe is None else model.moe.experts_per_token)
    buffers = tokens * model.dim * 6 * stream + max(_attention_to_cache(job, chunk), rows * hidden * 3 * stream)
    buffers += _FLOAT * job.rows * model.vocab_size
    return Memory(weights=sum(decoding_weights(job)), cache=cache_bytes(job), buffers=buffers)


def _attention_to_cache(job: Job, chunk: int) -> float:
    """Scores, and what they weigh: of all blocks so far, and of one. Of a kernel what it gives, and that divided; and
    who sees whom, twice, which no scores dwarf there."""
    model, heads = job.model, job.rows * job.model.num_heads // job.mesh.tensor
    slots = num_slots(model, job.length)
    slots += 0 if model.sliding_window is None else chunk
    if has_kernel_for_cache(job.execution, model.head_dim, job.platform):
        return _FLOAT * heads * chunk * 2 * model.head_dim + 2 * job.rows * chunk * slots
    keys = slots_at_once(slots, job.platform)
    queries = queries_at_once(min(chunk, job.execution.attention_chunk), heads * keys)
    return _FLOAT * heads * queries * (2 * keys + 3 * model.head_dim)


def cache_bytes(job: Job) -> int:
    """Keys and values of a copy's texts on a device; in int8 with a scale for each token and head."""
    model, kept = job.model, job.execution.kept_dtype
    heads = model.num_kv_heads // job.mesh.tensor
    head = model.head_dim * DTYPE_BYTES[kept] + (_FLOAT if kept == "int8" else 0)
    return 2 * model.num_layers * job.rows * num_slots(model, job.length) * heads * head

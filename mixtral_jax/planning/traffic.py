"""What a device exchanges with others in a step, by mesh axes, counted from shapes as our programs do it.

Bytes are those of `hlo.Collective`: the whole of what is gathered, reduced or exchanged, of one device.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_jax.planning.counts import halo_tokens
from mixtral_jax.planning.hlo import sent_fraction
from mixtral_jax.planning.job import DTYPE_BYTES, Job
from mixtral_jax.planning.memory import Leaf, in_use, leaves, training_shards
from mixtral_jax.sharding.axes import MeshAxis
from mixtral_jax.sharding.rules import DECODING, TRAINING

_FLOAT = 4


@dataclass(frozen=True)
class Transfer:
    """A kind of collective, all of a step together."""

    what: str
    kind: str
    axes: tuple[MeshAxis, ...]
    group_size: int
    bytes: float
    hidden: bool
    """Whether the compiler can do it while the device computes: weights and their gradients, a layer ahead or behind;
    not tokens, which the next product waits for."""

    @property
    def sent_bytes(self) -> float:
        """What a device sends round a ring."""
        return self.bytes * sent_fraction(self.kind, self.group_size)


def training_transfers(job: Job) -> list[Transfer]:
    """Of a step of training."""
    found = [
        *_weights(job),
        *_copies(job),
        *_tokens_to_experts(job),
        *_keys_and_values(job),
        *_tensor_sums(job),
    ]
    return [each for each in found if each.group_size > 1 and each.bytes]


def _transfer(job: Job, what: str, kind: str, axes: tuple[MeshAxis, ...], size: float, hidden: bool) -> Transfer:
    wide = tuple(axis for axis in axes if job.mesh.size(axis) > 1)
    group = 1
    for axis in wide:
        group *= job.mesh.size(axis)
    return Transfer(what, kind, wide, group, size, hidden)


def _stored_over(leaf: Leaf) -> tuple[MeshAxis, ...]:
    """The axes that a parameter is split over at rest and not in use."""
    return tuple(axis for name in leaf.names if name in TRAINING.only_stored for axis in TRAINING.mesh_axes(name))


def gather_times(leaf: Leaf) -> int:
    """A layer's weights are gathered forward and again backward; the embeddings once, with the loss or the look-up."""
    return 2 if "layers" in leaf.names else 1


def gathered_dtype(leaf: Leaf, job: Job) -> str:
    """The router multiplies in float32."""
    return "float32" if leaf.kind == "router" else job.execution.product_dtype


def gradient_dtype(leaf: Leaf, job: Job) -> str:
    """What gradients are summed over the mesh in."""
    return "float32"


def _weights(job: Job) -> list[Transfer]:
    """Weights gathered where they are used, and gradients scattered to where they are stored."""
    gathered: dict[tuple[MeshAxis, ...], float] = {}
    scattered: dict[tuple[MeshAxis, ...], float] = {}
    for leaf in leaves(job.model):
        axes = _stored_over(leaf)
        if not axes:
            continue
        whole = in_use(leaf, job) * job.accumulation
        width = DTYPE_BYTES[gathered_dtype(leaf, job)]
        gathered[axes] = gathered.get(axes, 0) + whole * width * gather_times(leaf)
        scattered[axes] = scattered.get(axes, 0) + whole * DTYPE_BYTES[gradient_dtype(leaf, job)]
    return [
        *(_transfer(job, "weights", "all-gather", axes, size, True) for axes, size in gathered.items()),
        *(_transfer(job, "gradients", "reduce-scatter", axes, size, True) for axes, size in scattered.items()),
    ]


def _copies(job: Job) -> list[Transfer]:
    """Gradients summed over copies of the weights: those of `data`, and of `context`, whose shards share weights."""
    shards = training_shards(job)
    return [_transfer(job, "gradients", "all-reduce", ("data", "context"), shards * job.accumulation, True)]


def expert_sends(job: Job) -> int:
    """How often rows travel: there and back; backward there with their cotangents and back, and what is repeated."""
    if job.repeats_no_experts:
        return 5
    return 4 if job.execution.remat == "none" else 6


def _tokens_to_experts(job: Job) -> list[Transfer]:
    model = job.model
    if model.moe is None:
        return []
    size = DTYPE_BYTES[job.execution.product_dtype] * job.expert_rows * model.dim
    size *= expert_sends(job) * model.num_layers * job.accumulation
    kind = "ragged-all-to-all" if job.dispatch.capacity_factor is None else "all-to-all"
    return [_transfer(job, "tokens to experts", kind, ("expert",), size, False)]


def _keys_and_values(job: Job) -> list[Transfer]:
    """With a window a halo, forward, again and backward; without, all of them, and their cotangents summed back."""
    model = job.model
    if job.mesh.context == 1:
        return []
    width = 2 * model.num_kv_heads // job.mesh.tensor * model.head_dim
    width *= DTYPE_BYTES[job.execution.activation_dtype] * model.num_layers * job.accumulation * job.local_rows
    forwards = 1 if job.execution.remat == "none" else 2
    if model.sliding_window is not None:
        size = width * halo_tokens(job) * (forwards + 1)
        return [_transfer(job, "halo of keys", "collective-permute", ("context",), size, False)]
    return [
        _transfer(job, "keys", "all-gather", ("context",), width * job.length * forwards, False),
        _transfer(job, "keys", "reduce-scatter", ("context",), width * job.length, False),
    ]


def tensor_sums(job: Job) -> int:
    """How often a layer sums its residual stream, or its cotangent, over `tensor`, each device keeping its part: after
    attention and the feed-forward; backward for each product that splits its result: queries, keys, values, gate, up;
    and for attention again, where it is repeated."""
    return 2 + 3 + 2 + job.execution.repeats_layers


def tensor_gathers(job: Job) -> int:
    """How often a layer gathers it: for attention and the feed-forward, their cotangents, and both inputs again; the
    repeated queries and keys of a mixture's layer take one more. The compiler may do with one more or less."""
    return 6 + (job.model.moe is not None and job.execution.repeats_layers)


def _tensor_sums(job: Job) -> list[Transfer]:
    """Those of the layers, and around them: the looked-up embeddings and the loss's cotangent are summed, the latter
    twice, and the last layer's output and its cotangent gathered."""
    model = job.model
    values = job.local_tokens * model.dim * job.accumulation
    summed = _FLOAT * values * (tensor_sums(job) * model.num_layers + 3)
    gathered = DTYPE_BYTES[job.execution.activation_dtype] * values * (tensor_gathers(job) * model.num_layers + 2)
    return [
        _transfer(job, "sums over heads and widths", "reduce-scatter", ("tensor",), summed, False),
        _transfer(job, "residual streams", "all-gather", ("tensor",), gathered, False),
    ]


def decoding_transfers(job: Job, tokens: int) -> list[Transfer]:
    """Of a step in which a copy's devices take in so many tokens (one a row to decode)."""
    model = job.model
    stream = tokens * model.dim * model.num_layers * _FLOAT
    found = [
        _transfer(job, "sums over heads", "all-reduce", DECODING.mesh_axes("heads"), stream, False),
        _transfer(job, "sums over widths", "all-reduce", DECODING.mesh_axes("hidden"), stream, False),
        _transfer(
            job, "logits", "all-gather", DECODING.mesh_axes("vocab"), job.rows * model.vocab_size * _FLOAT, False
        ),
    ]
    return [each for each in found if each.group_size > 1]

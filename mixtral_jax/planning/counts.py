"""What a device computes and reads in a step, counted from shapes, as our programs do it.

A product counts when it is done, so a forward pass that is repeated counts again, and so do empty slots of a capacity
and keys that a mask hides. Utilisation is of the model's own operations (`model.flops`), which are fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixtral_jax.model.backends import flash, runs, splash
from mixtral_jax.model.cache import num_slots
from mixtral_jax.planning.job import DTYPE_BYTES, AttentionKernel, Job
from mixtral_jax.planning.memory import cache_bytes, decoding_weights, training_shards
from mixtral_jax.train.losses import chunks_of

# Bytes of memory traffic that a score of attention causes where XLA computes it, but on a CPU, whose time is not
# estimated: written and read in float32, and its exponential in the product dtype. Backward, its cotangent too, and
# twice read in that dtype. Read off the passes in `backends/chunked.py`.
SCORE_BYTES_FORWARD = 12
SCORE_BYTES_BACKWARD = 26
OPTIMIZER_PASSES = 7
"""Arrays as large as the weights that an update moves: weights and two moments read and written, gradients read."""


@dataclass(frozen=True)
class Work:
    """A part of a step, on one device."""

    name: str
    flops: float
    bytes: float
    """Moved between memory and the chip."""


def attended_keys(length: int, before: int | None, total: int, window: int | None, chunk: int) -> int:
    """Scores a head computes for a sequence of queries: the keys of each chunk, times its queries.

    Args:
      length: queries.
      before: keys before the first query; None where only running tells, and any key may be seen.
      total: keys.
    """
    found = runs.plan(length, total, before, window, chunk)
    return sum(run.chunks * run.queries * run.keys for run in found)


def local_scores(job: Job) -> int:
    """Scores of a row and a head on a device, in training."""
    window, chunk, own = job.model.sliding_window, job.execution.attention_chunk, job.local_length
    if job.mesh.context == 1:
        return attended_keys(own, 0, own, window, chunk)
    if window is None:
        return attended_keys(own, None, job.length, None, chunk)
    halo = halo_tokens(job)
    return attended_keys(own, halo, halo + own, window, chunk)


def halo_tokens(job: Job) -> int:
    """Keys that a shard has from its neighbours: W - 1, no more than there are."""
    window = job.model.sliding_window
    assert window is not None
    own = job.local_length
    return min(window - 1, own * (job.mesh.context - 1))


def training_work(job: Job, kernel: AttentionKernel | None = None) -> list[Work]:
    """A step's parts, with attention by a kernel, or by the job's."""
    return [_projections(job), _attention(job, kernel or job.kernel), _feed_forward(job), _loss(job), _update(job)]


def _passes(job: Job) -> int:
    """Forward, backward twice, and forward again where a layer is repeated with its products."""
    return 4 if job.execution.repeats_layers else 3


def _product_bytes(job: Job, rows: float, width_in: float, width_out: float) -> float:
    """Operands and result of a product of activations, and its weight, which each of its passes reads once."""
    size = DTYPE_BYTES[job.execution.product_dtype]
    return size * (rows * (width_in + width_out) + width_in * width_out)


def _projections(job: Job) -> Work:
    model, tokens, tensor = job.model, job.local_tokens, job.mesh.tensor
    heads, keys = model.num_heads * model.head_dim // tensor, model.num_kv_heads * model.head_dim // tensor
    flops = 2 * model.dim * (2 * heads + 2 * keys) * tokens
    moved = sum(_product_bytes(job, tokens, model.dim, width) for width in (heads, heads, keys, keys))
    # Besides the products: two norms, rope and two sums, each reading and writing the residual stream about once.
    moved += 6 * tokens * model.dim * DTYPE_BYTES[job.execution.activation_dtype]
    times = _passes(job) * model.num_layers * job.accumulation
    return Work("projections", flops * times, moved * times)


def _attention(job: Job, kernel: AttentionKernel) -> Work:
    model, remat = job.model, job.execution.remat != "none"
    # A pass is two products as large as the scores. Forward is one, and again where a layer is repeated. Backward, XLA
    # does five products, of which one are the scores anew; kernels do seven, in two that both compute them.
    passes = {"xla": 3.5, "splash": 4.5, "flash": 4.5, "ideal": 3.0}[kernel] + remat
    heads = job.local_rows * model.num_heads // job.mesh.tensor
    scores, moved = local_scores(job) * heads, 0.0
    if kernel == "xla":
        moved = scores * ((1 + remat) * SCORE_BYTES_FORWARD + SCORE_BYTES_BACKWARD)
    elif kernel != "ideal":
        scores = block_scores(job, splash.BLOCKS if kernel == "splash" else (flash.LANES,)) * heads
    else:
        span = job.length if model.sliding_window is None else min(model.sliding_window, job.length)
        visible = span * (span + 1) / 2 + (job.length - span) * span
        scores = int(visible / job.mesh.context * heads)
    times = model.num_layers * job.accumulation
    return Work("attention", 4 * model.head_dim * scores * passes * times, moved * times)


def block_scores(job: Job, blocks: Sequence[int]) -> int:
    """Scores of a row and a head in blocks that some query of theirs sees, of the first size that divides; of the
    shard with the most."""
    window, own = job.model.sliding_window, job.local_length
    block = next(size for size in blocks if own % size == 0)
    before = job.length - own if window is None else -(-halo_tokens(job) // block) * block
    scores = 0
    for start in range(before, before + own, block):
        first = 0 if window is None else max(0, start - window + 1) // block * block
        scores += block * (start + block - first)
    return scores


def expert_passes(job: Job) -> int:
    """How often a product of an expert is done, summed over its three: 3 forward, 6 backward, and what is repeated."""
    if job.repeats_no_experts:
        return 3 + 8  # gate and up again: what lies between
    return 9 if job.execution.remat == "none" else 12


def _feed_forward(job: Job) -> Work:
    model, tensor = job.model, job.mesh.tensor
    hidden = model.hidden_dim // tensor
    if model.moe is None:
        # Repeated, its last product is left out: nothing needs it.
        products, rows, router = 11 if job.execution.repeats_layers else 9, job.local_tokens, 0
    else:
        products, rows = expert_passes(job), job.expert_rows
        router = 2 * model.dim * model.moe.num_experts * job.local_tokens * _passes(job)
    flops = 2 * model.dim * hidden * rows * products + router
    moved = products * _product_bytes(job, rows, model.dim, hidden)
    if model.moe is not None:
        held = model.moe.num_experts // job.mesh.expert
        weights = held * model.dim * hidden * DTYPE_BYTES[job.execution.product_dtype]
        moved += products * weights * (held - 1) / held  # one expert's are counted above
        # Tokens to slots and back, and the same of their gradients.
        moved += 8 * rows * model.dim * DTYPE_BYTES[job.execution.product_dtype]
    times = model.num_layers * job.accumulation
    return Work("experts" if model.moe else "feed-forward", flops * times, moved * times)


def _loss(job: Job) -> Work:
    model, vocab = job.model, job.model.vocab_size // job.mesh.tensor
    chunks, of_row = chunks_of(job.local_rows, job.local_length, job.loss_chunk)
    tokens = job.local_rows * chunks * of_row
    moved = 3 * _product_bytes(job, tokens, model.dim, vocab) + 8 * tokens * vocab
    moved += 8 * model.dim * vocab * chunks  # the gradient, added to at each chunk
    return Work("loss", 3 * 2 * model.dim * vocab * tokens * job.accumulation, moved * job.accumulation)


def _update(job: Job) -> Work:
    elements = training_shards(job) / 4
    return Work("update", 12 * elements, OPTIMIZER_PASSES * 4 * elements)


def decoding_work(job: Job) -> list[Work]:
    """One step of decoding: every weight that is used is read once, and the cache."""
    model = job.model
    weights = decoding_weights(job)
    parts = job.mesh.fsdp * job.mesh.expert * job.mesh.tensor
    heads = model.num_heads * model.head_dim // job.mesh.tensor
    projections = 2 * model.dim * 2 * (heads + model.num_kv_heads * model.head_dim // job.mesh.tensor)
    chosen = 1 if model.moe is None else model.moe.experts_per_token
    feed_forward = 6 * model.dim * model.hidden_dim * chosen / parts
    unembed = 2 * model.dim * model.vocab_size / parts
    read = weights.attention + weights.unembedding + weights.experts * used_experts(job)
    keys = num_slots(model, job.length)
    mixing = 4 * heads * keys * model.num_layers
    flops = (model.num_layers * (projections + feed_forward) + unembed) * job.rows
    return [Work("weights", flops, read), Work("attention", mixing * job.rows, cache_bytes(job))]


def used_experts(job: Job) -> float:
    """The part of the experts that a batch chooses, if it chooses evenly: 1 - (1 - k / E) ** B."""
    moe = job.model.moe
    if moe is None:
        return 1.0
    return 1 - (1 - moe.experts_per_token / moe.num_experts) ** job.rows


def prefill_work(job: Job, chunk: int) -> list[Work]:
    """The prefill of a copy's texts, as long as they may grow, in chunks."""
    model = job.model
    one = {each.name: each for each in decoding_work(job)}
    chunks = -(-job.length // chunk)
    keys = num_slots(model, job.length, chunk)
    heads = model.num_heads * model.head_dim // job.mesh.tensor
    scores = job.rows * job.length * keys * model.num_heads // job.mesh.tensor
    per_token = one["weights"].flops / job.rows
    everything = decoding_weights(job)
    read = (everything.attention + everything.experts + everything.unembedding) * chunks
    return [
        Work("weights", per_token * job.rows * job.length, read),
        Work("attention", 4 * heads * keys * model.num_layers * job.rows * job.length, scores * SCORE_BYTES_FORWARD),
    ]

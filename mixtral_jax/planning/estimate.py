"""How long a step might take: an estimate from counts, with its assumptions; nothing is measured.

Each part of a step takes the longer of its arithmetic and its memory traffic, and the parts follow one another. Weights
and their gradients travel meanwhile, as far as there is time; tokens travel in between. What waits in the host's memory
goes there beside the forward pass, of four passes one, and comes back beside the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mixtral_jax.errors import InputError
from mixtral_jax.model.flops import training_flops
from mixtral_jax.planning.counts import Work, decoding_work, prefill_work, training_work
from mixtral_jax.planning.interconnect import seconds
from mixtral_jax.planning.job import AttentionKernel, Job
from mixtral_jax.planning.memory import PREFILL_CHUNK, on_host
from mixtral_jax.planning.topology import Topology
from mixtral_jax.planning.traffic import Transfer, decoding_transfers, training_transfers
from mixtral_jax.sharding.chips import Chip

COMPUTE_EFFICIENCY = 0.6
"""Of a chip's peak, over all products of a step: what partial tiles, grouped products, the ends of loops and a lowered
clock leave. Published rows need from 0.42 (v6e) to 0.63 (v5p); docs/plan.md holds the estimate against each."""
MEMORY_EFFICIENCY = 0.8
"""Of the data sheet's bandwidth: what long streams of reads and writes reach."""
LINK_EFFICIENCY = 0.8
"""Of the wires' speed, in messages of the size of a layer's weights."""

_PASSES = 4
"""Of a layer that is repeated: forward, again, and backward twice."""

ASSUMPTIONS = (
    f"products run at {COMPUTE_EFFICIENCY:.0%} of the peak, memory at {MEMORY_EFFICIENCY:.0%} and links at "
    f"{LINK_EFFICIENCY:.0%} of the data sheet",
    "weights and their gradients travel while the chip computes, and so does what is offloaded; tokens, keys and sums "
    "over heads do not",
    "routing is balanced, input is never waited for, and checkpoints and validation take no time",
)


@dataclass(frozen=True)
class Link:
    """A transfer and its time."""

    transfer: Transfer
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Of one program: a step of training, the prefill of a batch, or one step of its decoding."""

    seconds: float
    work: list[Work]
    links: list[Link]
    compute_seconds: float
    """Of the parts that arithmetic bounds."""
    memory_seconds: float
    """Of the parts that memory traffic bounds."""
    exposed_seconds: float
    """Of transfers that nothing hides."""
    hidden_seconds: float
    """Of transfers that go on beside the work."""
    host_seconds: float
    """Of the way to the host's memory and the one back, which go on beside the work too: a step takes at least twice as
    long, since beside the one there is a quarter of it."""
    bound: str
    """What takes the longest."""
    tokens_per_second: float
    """Of all chips."""
    mfu: float | None
    """The model's own operations, causal and windowed, over the chips' peak; None of serving."""
    mfu_full: float | None
    """With each query against the whole sequence."""


def estimate(job: Job, machine: Topology, kernel: AttentionKernel | None = None) -> Estimate:
    """Of a step of training.

    Args:
      kernel: of attention; None: the machine's.

    Raises:
      InputError: nothing is known of the chip.
    """
    peak = _chip(machine).bf16_flops * job.num_chips
    kernel = kernel or replace(job, platform=machine.platform).kernel
    found = _timed(job, machine, training_work(job, kernel), training_transfers(job), job.tokens)
    model = training_flops(job.model, job.length)
    rate = found.tokens_per_second
    return Estimate(**{**vars(found), "mfu": model.causal * rate / peak, "mfu_full": model.full * rate / peak})


def estimate_prefill(job: Job, machine: Topology) -> Estimate:
    """Of taking in a copy's texts at their full length; tokens of all copies."""
    chunk = min(PREFILL_CHUNK, job.length)
    chunks = -(-job.length // chunk)
    transfers = [
        Transfer(each.what, each.kind, each.axes, each.group_size, each.bytes * chunks, each.hidden)
        for each in decoding_transfers(job, job.rows * chunk)
    ]
    return _timed(job, machine, prefill_work(job, chunk), transfers, job.rows * job.length * job.copies)


def estimate_decode(job: Job, machine: Topology) -> Estimate:
    """Of one token of each of a copy's texts at their full length; tokens of all copies."""
    return _timed(job, machine, decoding_work(job), decoding_transfers(job, job.rows), job.rows * job.copies)


def chip_hours(tokens: float, tokens_per_second: float, num_chips: int) -> float:
    """What so many tokens take."""
    return tokens / tokens_per_second * num_chips / 3600


def _chip(machine: Topology) -> Chip:
    if machine.chip is None:
        raise InputError("--topology", machine.name, "a CPU's peaks are unknown: nothing is estimated of it")
    return machine.chip


def _timed(job: Job, machine: Topology, work: list[Work], transfers: list[Transfer], tokens: int) -> Estimate:
    chip = _chip(machine)
    compute = [each.flops / (chip.bf16_flops * COMPUTE_EFFICIENCY) for each in work]
    memory = [each.bytes / (chip.memory_bandwidth * MEMORY_EFFICIENCY) for each in work]
    pairs = list(zip(compute, memory, strict=True))
    computing, reading = sum(c for c, m in pairs if c >= m), sum(m for c, m in pairs if c < m)
    links = [Link(each, seconds(each, machine, job.mesh) / LINK_EFFICIENCY) for each in transfers]
    exposed = sum(link.seconds for link in links if not link.transfer.hidden)
    hidden = sum(link.seconds for link in links if link.transfer.hidden)
    host = 2 * on_host(job) * job.accumulation / (chip.host_bandwidth * LINK_EFFICIENCY)
    total = max(computing + reading, hidden, _PASSES / 2 * host) + exposed
    return Estimate(
        seconds=total,
        work=work,
        links=links,
        compute_seconds=computing,
        memory_seconds=reading,
        exposed_seconds=exposed,
        hidden_seconds=hidden,
        host_seconds=host,
        bound=_bound(computing, reading, _PASSES / 2 * host, links),
        tokens_per_second=tokens / total,
        mfu=None,
        mfu_full=None,
    )


def _bound(computing: float, reading: float, offloading: float, links: list[Link]) -> str:
    terms = {"compute": computing, "memory bandwidth": reading}
    if offloading > computing + reading:
        terms["link to the host"] = offloading
    for link in links:
        name = "interconnect over " + " x ".join(link.transfer.axes)
        terms[name] = terms.get(name, 0.0) + link.seconds
    return max(terms, key=lambda name: terms[name])

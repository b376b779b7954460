"""Tries meshes, batches, remat and dispatch by counts, and ranks what fits by the estimated time of a token, with a
margin for what an estimate knows little of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mixtral_jax.config import CacheDtype, Dispatch, ModelConfig, Remat
from mixtral_jax.errors import InputError
from mixtral_jax.planning.estimate import Estimate, estimate, estimate_decode
from mixtral_jax.planning.job import EXECUTION, Job, mesh_text, problems
from mixtral_jax.planning.memory import MARGIN, memory
from mixtral_jax.planning.topology import Topology, topology
from mixtral_jax.quantization import Bits
from mixtral_jax.sharding.axes import MESH_AXES
from mixtral_jax.sharding.mesh import MeshConfig

MOST_TOKENS = 2**23
"""Tokens of a step, at most: a larger batch learns less from each token."""
MOST_SECONDS_A_TOKEN = 0.05
"""To decode one token of each text, at most: a reader waits."""
NEAR = 1.02
"""Of plans this close to the fastest, the one with the smallest batch and the fewest axes is the best."""
OFFLOADED = 1.1
"""A plan that keeps layers' inputs in the host's memory is ranked as if it took so many times as long: how fast they
get there an estimate knows least."""
_ROWS = (1, 2, 4, 8, 16, 32)
_TEXTS = tuple(2**power for power in range(11))
_REMATS: tuple[Remat, ...] = ("none", "products", "full", "offload")
_MOST_CHIPS = 1024
_LONG = 16384
_CHUNKS = (512, 128)
"""Queries at a time: of long texts, more scores than a small chip has room for."""
_OTHER_CHIP = "v5p:4x4x4"
"""What to try where the largest machine of a chip is too small: of TPUs the one with the most memory."""


@dataclass(frozen=True)
class Candidate:
    """A job that fits, and its estimate."""

    job: Job
    estimate: Estimate
    bytes: float

    @property
    def cost(self) -> float:
        """Seconds a token, with the margin."""
        return (OFFLOADED if self.job.execution.remat == "offload" else 1) / self.estimate.tokens_per_second


@dataclass(frozen=True)
class Wanted:
    """What is given; None where the search may choose."""

    model: ModelConfig
    length: int
    serve: bool = False
    mesh: MeshConfig | None = None
    batch_per_chip: float | None = None
    remat: Remat | None = None
    dispatch: Dispatch | None = None
    attention_chunk: int | None = None
    quantize: Bits | None = None
    """To serve; nothing is quantised or kept in another type unless it is asked for."""
    cache_dtype: CacheDtype | None = None


def budget(machine: Topology) -> float:
    """Bytes that a plan may use of a chip's memory."""
    assert machine.chip is not None
    return machine.chip.memory_bytes * (1 - MARGIN)


def search(wanted: Wanted, machine: Topology) -> list[Candidate]:
    """What fits, the best first, then by cost."""
    found = [
        Candidate(job, estimated(job, machine), size)
        for job in candidates(wanted, machine)
        if (size := memory(job).total) <= budget(machine)
    ]
    if wanted.serve and wanted.batch_per_chip is None:
        quick = [each for each in found if each.estimate.seconds <= MOST_SECONDS_A_TOKEN]
        found = quick or sorted(found, key=lambda each: each.estimate.seconds)[:1]
    found.sort(key=lambda each: each.cost)
    near = [each for each in found if each.cost <= found[0].cost * NEAR]
    best = min(near, key=_preference, default=None)
    return [] if best is None else [best, *(each for each in found if each is not best)]


def estimated(job: Job, machine: Topology) -> Estimate:
    """The estimate by which plans are ranked."""
    return estimate_decode(job, machine) if job.serve else estimate(job, machine)


def _preference(each: Candidate) -> tuple[float, ...]:
    axes = sum(each.job.mesh.size(axis) > 1 for axis in MESH_AXES)
    return (each.job.rows * each.job.copies if each.job.serve else each.job.rows, axes, each.cost)


def candidates(wanted: Wanted, machine: Topology) -> Iterator[Job]:
    """Jobs whose sizes divide."""
    for mesh in [wanted.mesh] if wanted.mesh else meshes(wanted, machine):
        for job in _of_mesh(wanted, mesh, machine):
            if not problems(job) and (wanted.mesh or not _sends_whole_buffers(job, machine)):
                yield job


def _sends_whole_buffers(job: Job, machine: Topology) -> bool:
    """Whether dropless rows have to travel without a ragged all-to-all, which is slow, and whose buffers aren't
    counted."""
    if job.serve or job.mesh.expert == 1 or job.dispatch.capacity_factor is not None or machine.chip is None:
        return False
    return not machine.chip.exchanges_ragged(machine.num_chips)


def meshes(wanted: Wanted, machine: Topology) -> list[MeshConfig]:
    """Every way to lay the axes on the chips that the model allows."""
    model = wanted.model
    experts = 1 if model.moe is None or wanted.serve else model.moe.num_experts
    # Decoding splits widths over fsdp and expert alike, so one of them will do.
    contexts = [1] if wanted.serve else _divisors(machine.num_chips)
    found = []
    for tensor, expert, context in itertools.product(_divisors(model.num_kv_heads), _divisors(experts), contexts):
        inner = tensor * expert * context
        if machine.num_chips % inner or (wanted.length // context < 2048 and context > 1):
            continue
        for fsdp in _divisors(machine.num_chips // inner):
            data = machine.num_chips // inner // fsdp
            if data % machine.slices == 0:
                found.append(MeshConfig(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor))
    return found


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _of_mesh(wanted: Wanted, mesh: MeshConfig, machine: Topology) -> Iterator[Job]:
    execution = replace(EXECUTION, cache_dtype=wanted.cache_dtype)
    base = Job(wanted.model, mesh, 1, wanted.length, execution, serve=wanted.serve, platform=machine.platform)
    base = replace(base, quantize=wanted.quantize)
    if wanted.batch_per_chip is not None:
        rows = [rows_of(base, wanted.batch_per_chip)]
    elif wanted.serve:
        rows = list(_TEXTS)
    else:
        rows = [base.copies * each for each in _ROWS if base.copies * each * wanted.length <= MOST_TOKENS]
        rows = rows or [base.copies]
    if wanted.serve:
        yield from (replace(base, rows=each) for each in rows)
        return
    remats = [wanted.remat] if wanted.remat else _REMATS
    dispatches = [wanted.dispatch] if wanted.dispatch or wanted.model.moe is None else _dispatches()
    chunks: tuple[int, ...] = _CHUNKS if wanted.length >= _LONG else (EXECUTION.attention_chunk,)
    if wanted.attention_chunk is not None:
        chunks = (wanted.attention_chunk,)
    for number, remat, dispatch, chunk in itertools.product(rows, remats, dispatches, chunks):
        execution = replace(EXECUTION, remat=remat, attention_chunk=chunk)
        yield replace(base, rows=number, execution=execution, dispatch=dispatch or Dispatch())


def _dispatches() -> list[Dispatch]:
    return [Dispatch(), Dispatch(capacity_factor=1.25)]


def rows_of(job: Job, batch_per_chip: float) -> int:
    """Rows of a step, or of a copy, for so many a chip; 0 where they are no whole number."""
    rows = batch_per_chip * job.num_chips / (job.copies if job.serve else 1)
    return round(rows) if abs(rows - round(rows)) < 1e-6 else 0


@dataclass(frozen=True)
class Remedy:
    """A change after which it fits."""

    change: str
    """In words, with the flags that make it."""
    machine: Topology
    candidate: Candidate


def remedies(job: Job, machine: Topology) -> list[Remedy]:
    """What would fit, the smallest change first: remat, batch, the host's memory, mesh, all of them, more chips."""
    asked = Wanted(job.model, job.length, job.serve, job.mesh, job.batch_per_chip, job.execution.remat, job.dispatch)
    asked = replace(asked, quantize=job.quantize, cache_dtype=job.execution.cache_dtype)
    smaller, moved = replace(asked, batch_per_chip=None), replace(asked, mesh=None)
    free = replace(asked, mesh=None, remat=None, batch_per_chip=None)
    if job.serve:
        tries = [("a smaller batch", smaller), ("another mesh", moved), ("another mesh and a smaller batch", free)]
        if job.quantize is None:
            tries.insert(0, ("weights in fewer bits", replace(asked, quantize="int8")))
    else:
        tries = [
            ("--remat full", replace(asked, remat="full")),
            ("a smaller batch", smaller),
            ("--remat offload", replace(asked, remat="offload")),
            ("another mesh", moved),
            ("another mesh and --remat full", replace(moved, remat="full")),
            ("a smaller batch and --remat full", replace(smaller, remat="full")),
            ("another mesh and a smaller batch", free),
        ]
    found = []
    for change, wanted in tries:
        best = next((each for each in search(wanted, machine) if _is_smaller(each.job, job)), None)
        if best is not None:
            found.append(Remedy(f"{change}: {flags(best.job)}", machine, best))
    larger = fits_on(free, machine)
    return [*found[:3], *([larger] if larger else [])]


def fits_on(wanted: Wanted, machine: Topology) -> Remedy | None:
    """The smallest machine of this chip, larger than this one, on which something fits; else one of another chip."""
    smallest_remats: tuple[Remat, ...] = (wanted.remat,) if wanted.remat else ("full", "offload")

    def remedy(what: str, there: Topology) -> Remedy | None:
        for remat in smallest_remats:
            if found := search(replace(wanted, remat=remat), there):
                return Remedy(f"{what}: --topology {there.name} {flags(found[0].job)}", there, found[0])
        return None

    here = machine.larger()
    while here is not None:
        if found := remedy("more chips", here):
            return found
        here = here.larger() if here.num_chips < _MOST_CHIPS else None
    other = topology(_OTHER_CHIP)
    return remedy("another chip", other) if machine.chip != other.chip else None


def _is_smaller(job: Job, than: Job) -> bool:
    return job.batch_per_chip <= than.batch_per_chip and job != than


def flags(job: Job) -> str:
    """The command line's flags for a job."""
    text = f"--mesh {mesh_text(job.mesh)} --batch-per-chip {job.batch_per_chip:g}"
    if job.serve:
        text += "" if job.quantize is None else f" --quantize {job.quantize}"
        kept = job.execution.cache_dtype
        return text + ("" if kept is None else f" --cache-dtype {kept}")
    text += f" --remat {job.execution.remat}"
    if job.execution.attention_chunk != EXECUTION.attention_chunk:
        text += f" --attention-chunk {job.execution.attention_chunk}"
    if job.model.moe is None:
        return text
    factor = job.dispatch.capacity_factor
    return text + (" --dropless" if factor is None else f" --capacity-factor {factor:g}")


def smallest(wanted: Wanted, machine: Topology) -> Job:
    """The job that takes the least memory, whether it fits or not.

    Raises:
      InputError: nothing divides.
    """
    jobs = list(candidates(wanted, machine))
    if not jobs:
        allowed = "no mesh of these chips divides the model and the batch"
        raise InputError("--batch-per-chip", wanted.batch_per_chip, allowed)
    return min(jobs, key=lambda job: memory(job).total)

"""A plan as a table of plain values, for `--json`, and as text."""

from __future__ import annotations

from typing import Any

from mixtral_jax.planning.compile import Compiled
from mixtral_jax.planning.counts import training_work
from mixtral_jax.planning.estimate import (
    ASSUMPTIONS,
    Estimate,
    chip_hours,
    estimate,
    estimate_decode,
    estimate_prefill,
)
from mixtral_jax.planning.hlo import bytes_by_axes
from mixtral_jax.planning.job import Job, mesh_text
from mixtral_jax.planning.memory import MARGIN, memory, on_host
from mixtral_jax.planning.search import Candidate, Remedy, flags
from mixtral_jax.planning.topology import Topology
from mixtral_jax.planning.traffic import decoding_transfers, training_transfers

GIB = 2**30


def describe(
    job: Job, machine: Topology, compiled: list[Compiled], tokens: float | None, remedies: list[Remedy]
) -> dict[str, Any]:
    """All that is known of a job on a machine.

    Args:
      compiled: what the compiler says; empty where it was not asked.
      tokens: a budget to price, or None.
      remedies: what would fit, where it does not.
    """
    plan: dict[str, Any] = {
        "topology": machine.name,
        "chips": machine.num_chips,
        "purpose": "serve" if job.serve else "train",
        "mesh": {axis: size for axis, size in vars(job.mesh).items() if size > 1},
        "batch_per_chip": job.batch_per_chip,
        "rows": job.rows,
        "sequence": job.length,
        "quantize": job.quantize,
        "cache_dtype": job.execution.kept_dtype if job.serve else None,
        "flags": flags(job),
        "memory_by_counts": _bytes(vars(memory(job))),
        "host_bytes_by_counts": on_host(job),
        "traffic_by_counts": _traffic(job),
        "work": [vars(each) for each in ([] if job.serve else training_work(job))],
        "compiled": [_compiled(each) for each in compiled],
    }
    plan |= fit(job, machine, compiled)
    plan["remedies"] = [each.change for each in remedies]
    if machine.chip is not None:
        plan["estimates"] = _estimates(job, machine)
        plan["assumptions"] = list(ASSUMPTIONS)
        if tokens is not None and not job.serve:
            rate = plan["estimates"]["train"]["tokens_per_second"]
            plan["chip_hours"] = chip_hours(tokens, rate, machine.num_chips)
            plan["token_budget"] = tokens
    return plan


def fit(job: Job, machine: Topology, compiled: list[Compiled]) -> dict[str, Any]:
    """Whether it fits and by how many bytes; by the compiler where it was asked, else by counts with a margin."""
    if machine.chip is None:
        return {"fits": None, "spare_bytes": None, "fits_by": None}
    capacity = machine.chip.memory_bytes
    if not compiled:
        spare = capacity * (1 - MARGIN) - memory(job).total
        return {"fits": spare >= 0, "spare_bytes": spare, "fits_by": "counts"}
    spare = min(-each.missing if each.missing else capacity - each.total for each in compiled)
    return {
        "fits": all(not each.missing for each in compiled) and spare >= 0,
        "spare_bytes": spare,
        "fits_by": "compiler",
    }


def verdict(plan: dict[str, Any]) -> str:
    """In words; of a plan that does not fit, what would."""
    if plan["fits"] is None:
        return "whether it fits is unknown: so is this machine's memory"
    spare = plan["spare_bytes"] / GIB
    how = "by the compiler" if plan["fits_by"] == "compiler" else f"by counts, {MARGIN:.0%} of the memory left aside"
    if plan["fits"]:
        return f"fits with {spare:.1f} GiB a chip to spare ({how})"
    text = f"does not fit by {-spare:.1f} GiB a chip ({how})"
    if not plan["remedies"]:
        return f"{text}; nothing that was tried would"
    return f"{text}; what would: " + "; or ".join(plan["remedies"])


def ranking(found: list[Candidate], machine: Topology, most: int = 10) -> list[dict[str, Any]]:
    """The first of a search's results."""
    return [
        {
            "flags": flags(each.job),
            "mesh": mesh_text(each.job.mesh),
            "batch_per_chip": each.job.batch_per_chip,
            "remat": None if each.job.serve else each.job.execution.remat,
            "capacity_factor": each.job.dispatch.capacity_factor,
            "memory_bytes": each.bytes,
            "seconds": each.estimate.seconds,
            "tokens_per_second_per_chip": each.estimate.tokens_per_second / machine.num_chips,
            "mfu": each.estimate.mfu,
            "bound": each.estimate.bound,
        }
        for each in found[:most]
    ]


def _bytes(kinds: dict[str, float]) -> dict[str, float]:
    return {kind: size for kind, size in kinds.items() if size}


def _traffic(job: Job) -> list[dict[str, Any]]:
    transfers = decoding_transfers(job, job.rows) if job.serve else training_transfers(job)
    return [
        {"what": each.what, "kind": each.kind, "axes": list(each.axes), "sent_bytes": each.sent_bytes}
        for each in transfers
    ]


def _compiled(each: Compiled) -> dict[str, Any]:
    return {
        "program": each.name,
        "seconds": each.seconds,
        "memory": each.memory,
        "host_bytes": None if each.missing else each.on_host,
        "missing_bytes": each.missing,
        "traffic": [
            {"axes": list(axes), "kind": kind, "sent_bytes": size}
            for (axes, kind), size in sorted(bytes_by_axes(each.collectives).items(), key=lambda item: -item[1])
            if axes
        ],
        "traffic_is_complete": all(item.count_is_known for item in each.collectives),
    }


def _estimates(job: Job, machine: Topology) -> dict[str, Any]:
    if not job.serve:
        return {"train": _estimate(estimate(job, machine), machine)}
    return {
        "prefill": _estimate(estimate_prefill(job, machine), machine),
        "decode": _estimate(estimate_decode(job, machine), machine),
    }


def _estimate(found: Estimate, machine: Topology) -> dict[str, Any]:
    links = [
        {"what": link.transfer.what, "axes": list(link.transfer.axes), "seconds": link.seconds} for link in found.links
    ]
    return {
        "seconds": found.seconds,
        "bound": found.bound,
        "compute_seconds": found.compute_seconds,
        "memory_seconds": found.memory_seconds,
        "interconnect_seconds": {"exposed": found.exposed_seconds, "hidden": found.hidden_seconds},
        "host_seconds": found.host_seconds,
        "links": links,
        "flops_per_chip": sum(each.flops for each in found.work),
        "memory_traffic_per_chip": sum(each.bytes for each in found.work),
        "tokens_per_second": found.tokens_per_second,
        "tokens_per_second_per_chip": found.tokens_per_second / machine.num_chips,
        "mfu": found.mfu,
        "mfu_full": found.mfu_full,
    }


def heading(plan: dict[str, Any]) -> str:
    """What is planned, in a line."""
    batch = f"{plan['rows']} texts a copy" if plan["purpose"] == "serve" else f"{plan['rows']} rows a step"
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items()) or "data=1"
    machine = f"{plan['topology']} ({plan['chips']} chip{'s' if plan['chips'] > 1 else ''})"
    text = f"{plan['purpose']} on {machine}, mesh {mesh}, {batch} of {plan['sequence']:,}"
    if plan["purpose"] == "serve":
        text += f", weights in {plan['quantize'] or 'bfloat16'}, cache in {plan['cache_dtype']}"
    return text

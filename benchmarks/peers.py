"""Mixtral 8x7B as a peer compiled it ahead of time for TPUs, compiled by us: live memory a chip beside the peer's.

python -m benchmarks.peers FOLDER   compiles the rows that FOLDER has no result of yet, then prints them all

A row of full size takes minutes; started again, it goes on with those that are missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from mixtral_jax.config import Dispatch, model_config
from mixtral_jax.planning.compile import compile_job
from mixtral_jax.planning.job import EXECUTION, Job, check, mesh_text
from mixtral_jax.planning.report import GIB
from mixtral_jax.planning.topology import topology
from mixtral_jax.sharding.mesh import MeshConfig


class Row(NamedTuple):
    """What was compiled, and the peer's arguments + temporaries + outputs - aliased in GiB a chip."""

    topology: str
    mesh: dict[str, int]
    capacity_factor: float | None
    batch_per_chip: int
    live: float
    exchange_rows: int = Dispatch().exchange_rows
    """Choices that are served at a time; by half as many, a step has that much less in its buffers."""

    @property
    def name(self) -> str:
        axes = "-".join(f"{axis}{size}" for axis, size in self.mesh.items())
        served = "" if self.exchange_rows == Dispatch().exchange_rows else f".{self.exchange_rows}"
        return f"{self.topology.replace(':', '-')}.{axes}.{self.capacity_factor or 'dropless'}{served}"


# MaxText 0.2.5, sequence 4096, AdamW with float32 weights and moments, remat full. It refuses the last mesh of v5p
# unless it is told to split physical axes.
ROWS = (
    Row("v5p:4x4x4", {"fsdp": 64}, 1.25, 4, 32.9),
    Row("v5p:4x4x4", {"fsdp": 64}, None, 4, 30.7),
    Row("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, None, 4, 32.8),
    Row("v5p:4x4x4", {"fsdp": 16, "expert": 4}, 1.25, 4, 32.4),
    Row("v5p:4x4x4", {"fsdp": 16, "expert": 4}, None, 4, 39.3, 4096),
    Row("v5p:4x4x4", {"fsdp": 8, "expert": 8}, None, 4, 38.9),
    Row("v6e:8x8", {"fsdp": 64}, None, 2, 24.6, 4096),
    Row("v6e:8x8", {"fsdp": 64}, 1.25, 2, 25.1),
    Row("v5e:16x16", {"fsdp": 256}, None, 1, 11.3, 2048),
)


def job_of(row: Row) -> Job:
    """The same step of ours: sequence 4096, weights and moments in float32, remat full."""
    mesh = MeshConfig(**{"data": 1, **row.mesh})
    rows = row.batch_per_chip * topology(row.topology).num_chips
    dispatch = Dispatch(capacity_factor=row.capacity_factor, exchange_rows=row.exchange_rows)
    return check(Job(model_config("mixtral-8x7b"), mesh, rows, 4096, EXECUTION, dispatch))


def compare(folder: Path) -> str:
    """Compiles what has no result in the folder yet, one row after another; gives all as markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "| topology | mesh | MoE | rows a chip | MaxText, GiB a chip | ours | compile s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        file = folder / f"{row.name}.json"
        if not file.exists():
            print(f"compiling {row.name}", file=sys.stderr, flush=True)
            (compiled,) = compile_job(job_of(row), topology(row.topology))
            found = {"live": compiled.total / GIB, "missing": compiled.missing / GIB, "seconds": compiled.seconds}
            file.write_text(json.dumps(found) + "\n")
        result = json.loads(file.read_text())
        ours = f"too large by {result['missing']:.1f}" if result["missing"] else f"{result['live']:.1f}"
        moe = "dropless" if row.capacity_factor is None else f"capacity {row.capacity_factor}"
        cells = (row.topology, mesh_text(job_of(row).mesh), moe, row.batch_per_chip, row.live, ours)
        lines.append(f"| {' | '.join(map(str, cells))} | {result['seconds']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    jax.config.update("jax_platforms", "cpu")
    print(compare(Path(sys.argv[1])))

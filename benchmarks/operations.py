"""Operations of a training step compiled ahead of time for TPUs, as its compiler counts them, beside ours from shapes.

python -m benchmarks.operations

Two layers of full width, sequence 4096, on 64 chips of v5p; minutes a row. Both counts have what `remat = "full"`
computes again and the empty slots of capacity 1.25, and neither the attention kernel's, of which the compiler knows
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import jax
from flax import linen as nn

from mixtral_jax.config import Dispatch, model_config
from mixtral_jax.planning import counts
from mixtral_jax.planning.compile import lower, training_program
from mixtral_jax.planning.compilers import compile_ahead, devices
from mixtral_jax.planning.job import EXECUTION, Job, check, mesh_text
from mixtral_jax.planning.topology import Topology, topology
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh

ROWS = (
    ("mixtral-8x7b", {"fsdp": 8, "expert": 8}),
    ("mixtral-8x7b", {"fsdp": 64}),
    ("mistral-7b-v0.1", {"fsdp": 64}),
)
LAYERS = 2


@contextmanager
def unrolled() -> Iterator[None]:
    """Within it all loops are unrolled: of a loop the compiler counts the body once."""
    scan, remat = jax.lax.scan, nn.remat

    def unroll(*given: Any, **settings: Any) -> Any:
        return scan(*given, **{**settings, "unroll": True})

    def keep_apart(block: Any, **settings: Any) -> Any:
        # Out of its loop, a layer's second forward pass would be taken for the first.
        return remat(block, **{**settings, "prevent_cse": True})

    with (
        patch.object(jax.lax, "scan", unroll),
        patch.object(jax.lax, "map", _map),
        patch.object(nn, "remat", keep_apart),
    ):
        yield


def _map(function: Callable[[Any], Any], inputs: Any) -> Any:
    count = len(jax.tree.leaves(inputs)[0])
    results = [function(jax.tree.map(lambda x, index=index: x[index], inputs)) for index in range(count)]
    return jax.tree.map(lambda *parts: jax.numpy.stack(parts), *results)


def on_a_tpu(job: Job, machine: Topology) -> tuple[float, float]:
    """Of a step, a chip: what is counted from shapes, and what the compiler counts."""
    counted = sum(each.flops for each in counts.training_work(job) if each.name != "attention")
    mesh = make_mesh(job.mesh, devices(machine))
    with unrolled(), jax.set_mesh(mesh):
        compiled = compile_ahead(lower(training_program(job, mesh)))
    return counted, compiled.cost_analysis()["flops"]


def main() -> None:
    """Prints a row as soon as it is compiled."""
    argparse.ArgumentParser(prog="python -m benchmarks.operations", description=__doc__).parse_args()
    jax.config.update("jax_platforms", "cpu")
    machine = topology("v5p:4x4x4")
    print("| model | mesh | TFLOP a chip, counted | compiled | compiled over counted |\n|---|---|---|---|---|")
    for name, axes in ROWS:
        model, mesh = replace(model_config(name), num_layers=LAYERS), MeshConfig(**{"data": 1, **axes})
        dispatch = Dispatch(capacity_factor=1.25)
        job = check(Job(model, mesh, machine.num_chips, 4096, replace(EXECUTION, remat="full"), dispatch))
        assert job.kernel == "splash"
        counted, compiled = on_a_tpu(job, machine)
        cells = name, mesh_text(job.mesh), f"{counted / 1e12:.2f}", f"{compiled / 1e12:.2f}"
        print(f"| {' | '.join(cells)} | {compiled / counted:.4f} |", flush=True)


if __name__ == "__main__":
    main()

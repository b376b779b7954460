"""The engine's programs for TPUs that are not here: caches are written in place, and experts stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from oracles.compiler import needs_compiler

from mixtral_jax.config import Execution, ModelConfig, MoEConfig
from mixtral_jax.inference import programs
from mixtral_jax.inference.proposals import Lookup, NoProposals
from mixtral_jax.inference.slots import Model, Slots, empty_settings
from mixtral_jax.planning.compile import abstract_cache, abstract_weights, local_bytes
from mixtral_jax.planning.compilers import compile_ahead, devices
from mixtral_jax.planning.hlo import collectives
from mixtral_jax.planning.job import Job, check
from mixtral_jax.planning.topology import topology
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(
    dim=256,
    num_layers=2,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    hidden_dim=512,
    vocab_size=1024,
    moe=MoEConfig(num_experts=8, experts_per_token=2),
)
SLOTS, LENGTH = 8, 8192


def _abstract(axes, bits, kept, machine):
    execution = Execution(product_dtype="bfloat16", activation_dtype="bfloat16", cache_dtype=kept)
    job = check(Job(MODEL, MeshConfig(data=1, **axes), SLOTS, LENGTH, execution, serve=True, quantize=bits))
    mesh = make_mesh(job.mesh, devices(topology(machine)))
    whole = NamedSharding(mesh, PartitionSpec())

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    settings = jax.eval_shape(lambda: empty_settings(SLOTS))
    slots = Slots(
        caches=(abstract_cache(job, mesh),),
        settings=jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype), settings),
        token_B=shaped((SLOTS,), jnp.int32),
        count_B=shaped((SLOTS,), jnp.int32),
        active_B=shaped((SLOTS,), jnp.bool_),
        seen_BV=shaped((SLOTS, MODEL.vocab_size), jnp.bool_),
        history_BN=shaped((SLOTS, LENGTH), jnp.int32),
    )
    return mesh, (abstract_weights(job, mesh),), slots, (Model(MODEL, execution),)


@needs_compiler
@pytest.mark.parametrize(
    ("machine", "axes", "bits", "kept", "proposer"),
    [
        ("v6e:2x2", {"tensor": 4}, "int8", None, NoProposals()),
        ("v5e:2x4", {"expert": 2, "tensor": 4}, "int8", "int8", Lookup(3)),
    ],
)
def test_decoding_for_tpu(machine, axes, bits, kept, proposer):
    mesh, weights, slots, models = _abstract(axes, bits, kept, machine)
    static = {"models": models, "proposer": proposer, "most_steps": 8}
    goes_on_B, allowed_BW = np.ones((SLOTS,), bool), np.zeros((SLOTS, MODEL.vocab_size // 32), np.uint32)
    with jax.set_mesh(mesh):
        lowered = programs.decode.lower(weights, slots, goes_on_B, np.int32(8), allowed_BW, **static)
        compiled = compile_ahead(lowered)
    _assert_lean(compiled, mesh, slots)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 4])
def test_taking_in_prompts_for_tpu(rows):
    """One long prompt's piece, and pieces of four."""
    mesh, weights, slots, models = _abstract({"tensor": 4}, "int8", None, "v6e:2x2")
    size = 256 // rows
    tokens_PT, real_PT = np.zeros((rows, size), np.int32), np.ones((rows, size), bool)
    with jax.set_mesh(mesh):
        lowered = programs.prefill.lower(
            weights, slots, np.arange(rows, dtype=np.int32), tokens_PT, real_PT, models=models, fresh=False
        )
        compiled = compile_ahead(lowered)
    _assert_lean(compiled, mesh, slots)


def _assert_lean(compiled, mesh, slots):
    cache = sum(map(local_bytes, jax.tree.leaves(slots.caches[0].layers)))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.98 * cache  # what comes out lies where it came in
    assert memory.temp_size_in_bytes < cache / 2
    gathered = [each.bytes for each in collectives(compiled.as_text(), mesh) if each.kind == "all-gather"]
    assert max(gathered, default=0) < MODEL.dim * MODEL.hidden_dim // 4  # of a matrix of an expert

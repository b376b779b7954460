"""Programs compiled for machines that are not here: the real ones, of a tiny model."""

from dataclasses import replace

import jax
import pytest
from oracles.communication import assert_tokens_travel_and_experts_stay
from oracles.compiler import needs_compiler

from mixtral_jax.config import Dispatch, Execution, ModelConfig, MoEConfig
from mixtral_jax.inference.weights import assemble
from mixtral_jax.model.cache import empty_cache
from mixtral_jax.planning.compile import abstract_cache, abstract_weights, compile_job, local_bytes, too_large_by
from mixtral_jax.planning.job import Job, check
from mixtral_jax.planning.memory import memory
from mixtral_jax.planning.topology import topology
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(
    dim=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    hidden_dim=256,
    vocab_size=512,
    moe=MoEConfig(num_experts=4, experts_per_token=2),
)
SHORT = Execution(activation_dtype="bfloat16", product_dtype="bfloat16", attention_chunk=64, remat="full")


def _job(factor=None, serve=False, **mesh):
    rows = 4 if serve else 8
    dispatch = Dispatch(capacity_factor=factor, group_size=128)
    return check(Job(MODEL, MeshConfig(**{"data": 1, **mesh}), rows, 128, SHORT, dispatch, serve=serve))


@needs_compiler
@pytest.mark.parametrize(("factor", "kind"), [(None, "ragged-all-to-all"), (1.25, "all-to-all")])
def test_a_step_for_tpu(factor, kind):
    job = _job(factor, fsdp=2, expert=4)
    (compiled,) = compile_job(job, topology("v5p:2x2x2"))
    assert compiled.memory["weights"] == memory(job).weights
    large = [each for each in compiled.collectives if each.bytes > 1024]
    assert {each.kind for each in large if each.axes == ("expert",)} == {kind}
    assert compiled.memory["weights"] < compiled.memory["temporaries"] < 64 * 2**20


@needs_compiler
@pytest.mark.parametrize("factor", [None, 1.25], ids=["dropless", "capacity"])
@pytest.mark.parametrize("axes", [{"expert": 4, "fsdp": 2}, {"expert": 2, "context": 4}], ids=str)
def test_what_a_step_for_tpu_moves(axes, factor):
    """With rows enough that shards have several, which tell tokens from numbers of a layer."""
    job = replace(_job(factor, **axes), rows=16, length=512, model=replace(MODEL, hidden_dim=320, sliding_window=48))
    (compiled,) = compile_job(check(job), topology("v5p:2x2x2"))
    assert_tokens_travel_and_experts_stay(compiled.collectives, job.model, job.mesh, job.local_tokens)


@needs_compiler
def test_serving_for_tpu():
    prefill, decode = compile_job(_job(serve=True, fsdp=2, tensor=2), topology("v6e:2x2"))
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.memory["weights"] == decode.memory["weights"] == memory(_job(serve=True, fsdp=2, tensor=2)).weights
    assert {each.kind for each in decode.collectives if each.axes} <= {"all-reduce", "all-gather"}


def test_weights_are_laid_out_as_inference_lays_them():
    job = _job(serve=True, fsdp=2, expert=2, tensor=2)
    mesh = make_mesh(job.mesh, jax.devices())
    real = assemble(lambda tensor: jax.numpy.zeros(tensor.shape), MODEL, SHORT, mesh)
    planned = abstract_weights(job, mesh)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), real) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), planned
    )
    assert sum(map(local_bytes, jax.tree.leaves(planned))) == memory(job).weights


def test_the_cache_is_as_inference_makes_it():
    job = _job(serve=True, tensor=2)
    planned = abstract_cache(job, make_mesh(job.mesh, jax.devices()[:2]))
    real = jax.eval_shape(lambda: empty_cache(MODEL, 4, 128, "bfloat16"))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), real
    )
    assert sum(map(local_bytes, jax.tree.leaves(planned.layers))) == memory(job).cache


@needs_compiler
def test_what_does_not_fit_is_told_by_how_much():
    wide = ModelConfig(
        dim=8192, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, hidden_dim=65536, vocab_size=512
    )
    job = check(Job(wide, MeshConfig(data=1), 1, 128, SHORT))
    (compiled,) = compile_job(job, topology("v5e:1x1"))
    assert compiled.missing > 2**30


def test_the_compilers_refusals():
    text = "Ran out of memory in memory space hbm. Used 120.05G of 95.74G hbm. Exceeded hbm capacity by 24.31G."
    assert too_large_by(text) == 24.31 * 2**30
    assert too_large_by("Exceeded hbm capacity by 512.0M.") == 2**29
    assert too_large_by("HLO temporaries (54.28G) exceeds available HBM (15.75G).") == 54.28 * 2**30 - 15.75 * 2**30
    assert too_large_by("INTERNAL: something else") is None

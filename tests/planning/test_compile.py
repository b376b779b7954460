"""Programs compiled for machines that are not here: the real ones, of a tiny model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from oracles.communication import assert_tokens_travel_and_experts_stay
from oracles.compiler import needs_compiler

from mixtral_jax.config import Dispatch, Execution, ModelConfig, MoEConfig
from mixtral_jax.inference.weights import assemble
from mixtral_jax.model.cache import empty_cache
from mixtral_jax.planning.compile import (
    abstract_cache,
    abstract_weights,
    compile_job,
    local_bytes,
    lower,
    serving_programs,
    too_large_by,
    training_program,
)
from mixtral_jax.planning.compilers import compile_ahead, devices
from mixtral_jax.planning.job import Job, check
from mixtral_jax.planning.memory import memory, on_host
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
def test_dropless_on_a_large_slice_of_v5e():
    """Its compiler refuses a ragged all-to-all; one of whole buffers takes its place."""
    job = replace(_job(fsdp=2, expert=4), rows=32, mesh=MeshConfig(data=1, fsdp=8, expert=4))
    (compiled,) = compile_job(check(job), topology("v5e:4x8"))
    kinds = {each.kind for each in compiled.collectives if each.bytes > 1024 and each.axes == ("expert",)}
    assert kinds == {"all-to-all"}


@needs_compiler
@pytest.mark.parametrize("factor", [None, 1.25], ids=["dropless", "capacity"])
@pytest.mark.parametrize("axes", [{"expert": 4, "fsdp": 2}, {"expert": 2, "context": 4}], ids=str)
def test_what_a_step_for_tpu_moves(axes, factor):
    """With rows enough that shards have several, which tell tokens from numbers of a layer."""
    job = replace(_job(factor, **axes), rows=16, length=512, model=replace(MODEL, hidden_dim=320, sliding_window=48))
    (compiled,) = compile_job(check(job), topology("v5p:2x2x2"))
    assert_tokens_travel_and_experts_stay(compiled.collectives, job.model, job.mesh, job.local_tokens)


@needs_compiler
@pytest.mark.parametrize("kernel", ["kernel", "xla"])
def test_without_remat_a_layer_keeps_what_is_counted(kernel):
    """No scores, and nothing that is cheap to make again; see `model.recompute`."""
    model = ModelConfig(
        dim=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128, hidden_dim=1024, vocab_size=256
    )

    def of_depth(layers):
        execution = replace(SHORT, remat="none", attention=kernel, attention_chunk=128)
        job = check(Job(replace(model, num_layers=layers), MeshConfig(data=1, fsdp=4), 4, 512, execution))
        (compiled,) = compile_job(job, topology("v5p:2x2x1"))
        return compiled.memory["temporaries"], memory(job)

    (few, counted), (many, counted_many) = of_depth(2), of_depth(6)
    expected = counted_many.activations - counted.activations + counted_many.gradients - counted.gradients
    assert many - few == pytest.approx(expected, rel=0.25)


@needs_compiler
def test_offloaded_layers_inputs_are_on_the_host():
    """To the byte; not on the device, but for those on their way; and copied while something else is computed."""
    model = ModelConfig(
        dim=256, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=128, hidden_dim=512, vocab_size=256
    )
    full = check(Job(model, MeshConfig(data=1, fsdp=4), 16, 512, SHORT))
    offload = replace(full, execution=replace(SHORT, remat="offload"))
    (kept,), (moved,) = (compile_job(job, topology("v5p:2x2x1")) for job in (full, offload))
    assert (kept.on_host, moved.on_host) == (0, on_host(offload))
    assert on_host(offload) == memory(full).activations == 12 * 4 * 512 * 256 * 2
    assert on_host(full) == memory(offload).activations == 0
    assert kept.memory["temporaries"] - moved.memory["temporaries"] > on_host(offload) / 2
    mesh = make_mesh(offload.mesh, devices(topology("v5p:2x2x1")))
    with jax.set_mesh(mesh):
        text = compile_ahead(lower(training_program(offload, mesh))).as_text()
    assert {f"dynamic-{copy}-start" in text for copy in ("update-slice", "slice")} == {True}


@needs_compiler
@pytest.mark.parametrize(
    ("machine", "axes", "bits", "kept"),
    [
        ("v6e:2x2", {"fsdp": 4}, None, None),
        ("v5e:2x4", {"expert": 2, "tensor": 4}, "int8", "int8"),
    ],
)
def test_serving_for_tpu(machine, axes, bits, kept):
    """Weights and cache take what they should, the cache is written in place, and experts stay where they are."""
    job = _serving(axes, bits, kept)
    prefill, decode = compile_job(job, topology(machine))
    assert (prefill.name, decode.name) == ("prefill", "decode")
    counted = memory(job)
    for each in (prefill, decode):
        assert each.memory["weights"] == counted.weights
        assert each.memory["cache"] == pytest.approx(counted.cache, rel=0.02)  # and its positions
        assert {found.kind for found in each.collectives if found.axes} <= {"all-reduce", "all-gather"}
        gathered = [found.bytes for found in each.collectives if found.kind == "all-gather"]
        assert max(gathered, default=0) < job.model.dim * job.model.hidden_dim // 8
    assert decode.memory["temporaries"] < counted.cache / 4


@needs_compiler
def test_more_layers_take_no_more_temporaries_to_decode():
    """So there is no second cache at any depth; the full size is compiled by `mixtral-jax plan`."""

    def temporaries(layers):
        job = _serving({"tensor": 4}, "int8", "int8", layers)
        mesh = make_mesh(job.mesh, devices(topology("v6e:2x2")))
        with jax.set_mesh(mesh):
            _, decode = serving_programs(job, mesh)
            return compile_ahead(lower(decode)).memory_analysis().temp_size_in_bytes, memory(job).cache / layers

    (few, a_layer), (many, _) = temporaries(1), temporaries(3)
    assert many - few < 2 * a_layer / 4


def _serving(axes, bits, kept, layers=2):
    """With a cache that is large beside all else: 8192 tokens a text."""
    model = replace(MODEL, num_layers=layers, num_heads=16, num_kv_heads=8, head_dim=128)
    execution = replace(SHORT, cache_dtype=kept)
    return check(Job(model, MeshConfig(data=1, **axes), 8, 8192, execution, serve=True, quantize=bits))


@pytest.mark.parametrize("bits", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "as on a GPU"])
def test_weights_are_laid_out_as_inference_lays_them(monkeypatch, stacked, bits):
    for module in ("inference.weights", "planning.compile"):
        monkeypatch.setattr(f"mixtral_jax.{module}.stacks_experts", lambda *_: stacked)
    job = replace(_job(serve=True, fsdp=2, expert=2, tensor=2), quantize=bits)
    mesh = make_mesh(job.mesh, jax.devices())
    real = assemble(lambda tensor: jax.numpy.zeros(tensor.shape), MODEL, SHORT, mesh, bits)
    planned = abstract_weights(job, mesh)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), real) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), planned
    )
    assert sum(map(local_bytes, jax.tree.leaves(planned))) == memory(job).weights


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_the_cache_is_as_inference_makes_it(kept):
    job = _job(serve=True, tensor=2)
    job = replace(job, execution=replace(SHORT, cache_dtype=kept))
    planned = abstract_cache(job, make_mesh(job.mesh, jax.devices()[:2]))
    real = jax.eval_shape(lambda: empty_cache(MODEL, 4, 128, kept))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), real
    )
    assert sum(map(local_bytes, jax.tree.leaves(planned.layers))) == memory(job).cache


@needs_compiler
def test_the_cache_is_in_the_form_of_the_platform():
    """On a CPU it would be kept as bits."""
    job = _job(serve=True, tensor=2)
    for machine, expected in ((jax.devices(), jnp.uint16), (devices(topology("v5e:2x2")), jnp.bfloat16)):
        planned = abstract_cache(job, make_mesh(job.mesh, machine[:2]))
        assert {leaf.dtype for leaf in jax.tree.leaves(planned.layers)} == {jnp.dtype(expected)}


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

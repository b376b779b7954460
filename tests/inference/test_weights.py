"""Prepared weights."""

import contextlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.config import Execution
from mixtral_jax.inference import weights as w
from mixtral_jax.inference.decode import forward
from mixtral_jax.inference.weights import assemble, prepare, restore, stacks_experts
from mixtral_jax.model.backends import by_need, experts_gpu, few_rows
from mixtral_jax.model.backends.few_rows import ByOutput
from mixtral_jax.model.backends.half_bytes import HalfBytes
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.cache import empty_cache
from mixtral_jax.model.feed_forward import SwiGLU
from mixtral_jax.model.tensors import look_up
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh


@pytest.fixture(params=[True, False], ids=["as-they-lie", "by-output"])
def as_they_lie(request, monkeypatch):
    """Whether matrices do, as elsewhere than on a CPU, or by output."""
    monkeypatch.setattr(few_rows, "are_for_this_host", lambda: not request.param)
    return request.param


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_restores_the_public_tree(family, tie, as_they_lie):
    config = tiny.config(family, tie_embeddings=tie)
    params = tiny.params(config)
    chex.assert_trees_all_equal(restore(prepare(params, config, Execution())), params)
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    found = restore(prepare(short, config, Execution(weight_dtype="bfloat16")))
    chex.assert_trees_all_equal(jax.tree.map(jnp.float32, found), jax.tree.map(jnp.float32, short))


@pytest.mark.parametrize("execution", [Execution(product_dtype="bfloat16"), Execution(weight_dtype="bfloat16")])
def test_matrices_are_short_and_what_decides_is_not(execution, as_they_lie):
    config = tiny.config("mixtral")
    prepared = prepare(tiny.params(config), config, execution)
    layer = prepared.layers[0]
    query = layer["params" if as_they_lie else "prepared"]["attention"]["query"]
    assert isinstance(query, ByOutput) != as_they_lie
    assert {leaf.dtype for leaf in jax.tree.leaves((query, prepared.unembedding_DV))} == {jnp.dtype(jnp.bfloat16)}
    assert layer["params"]["moe"]["router"].dtype == jnp.float32
    assert layer["params"]["attention_norm"]["scale"].dtype == jnp.float32


def test_each_expert_is_an_array_of_its_own(as_they_lie):
    config = tiny.config("mixtral")
    params = tiny.params(config)
    experts = prepare(params, config, Execution()).layers[1]["prepared"]["moe"]["experts"]
    assert len(experts) == 4
    found = experts[2].down if as_they_lie else experts[2].down.values.T
    np.testing.assert_array_equal(found, params["layers"]["moe"]["down"][1, 2])


def test_a_matrix_in_bfloat16_stays_so_where_it_is_as_exact_and_faster(as_they_lie):
    """Whatever it is multiplied in."""
    config = tiny.config("mistral", tie_embeddings=True)
    short = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params(config))
    prepared = prepare(short, config, Execution())
    query = prepared.layers[0]["params" if as_they_lie else "prepared"]["attention"]["query"]
    assert jax.tree.leaves(query)[0].dtype == (jnp.float32 if as_they_lie else jnp.bfloat16)
    assert prepared.embedding_VD.dtype == jnp.float32  # for what one row of it is added to


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_embedding_lies_by_output_as_it_is(dtype, as_they_lie):
    config = tiny.config("mistral", tie_embeddings=True)
    prepared = prepare(tiny.params(config), config, Execution(weight_dtype=dtype))
    assert prepared.embedding_VD.dtype == dtype
    assert prepared.unembedding_DV is None if as_they_lie else prepared.unembedding_DV.values is prepared.embedding_VD


@pytest.mark.parametrize(("bits", "form"), [("int8", ByOutput), ("int4", HalfBytes), ("fp8", Quantized)])
def test_what_is_quantised_lies_as_few_rows_take_it(bits, form, as_they_lie):
    config = tiny.config("mixtral", dim=128, hidden_dim=128)
    params = tiny.params(config)
    prepared = assemble(lambda tensor: look_up(params, tensor), config, Execution(), quantize_to=bits)
    layer = prepared.layers[0]["prepared"]
    matrices = [layer["attention"]["query"], *layer["moe"]["experts"][1], prepared.unembedding_DV]
    assert {type(matrix) for matrix in matrices} == {Quantized if as_they_lie else form}


WIDE = {"dim": 64, "hidden_dim": 128}
SHORT = Execution(product_dtype="bfloat16")


@pytest.fixture
def stacked(monkeypatch):
    """As on a GPU, whose kernel runs step by step."""
    monkeypatch.setattr(w, "stacks_experts", lambda *_: True)
    monkeypatch.setattr(by_need, "_of_a_stack", partial(experts_gpu.by_need, interpret=True))


@pytest.mark.parametrize("bits", [None, "int8", "fp8"])
@pytest.mark.parametrize("axes", [None, {"data": 2, "tensor": 2}], ids=["one device", "mesh"])
def test_experts_in_a_stack_are_the_same_experts(monkeypatch, stacked, axes, bits):
    """To the weights bitwise, and to a step over them but for what the kernel does not round."""
    config = tiny.config("mixtral", **WIDE)
    params = tiny.params(config)
    mesh = None if axes is None else make_mesh(MeshConfig(**axes), jax.devices()[:4])

    def found(tokens):
        weights = assemble(lambda tensor: look_up(params, tensor), config, SHORT, mesh, bits)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            cache = empty_cache(config, *tokens.shape[:1], 16, "bfloat16")
            step = jax.jit(lambda weights: forward(weights, tokens, tokens >= 0, cache, config, SHORT)[0])
            return weights, step(weights)

    for tokens in (jnp.arange(6).reshape(3, 2), jnp.array([[5]])):
        stack, ours = found(tokens)
        assert isinstance(stack.layers[1]["prepared"]["moe"]["experts"], SwiGLU)
        with monkeypatch.context() as patch:
            patch.setattr(w, "stacks_experts", lambda *_: False)
            apart, expected = found(tokens)
        assert len(apart.layers[1]["prepared"]["moe"]["experts"]) == 4
        chex.assert_trees_all_equal(restore(stack), restore(apart))
        chex.assert_trees_all_close(ours, expected, atol=0.02)


@pytest.mark.parametrize(
    ("platform", "changes", "execution", "bits", "stacks"),
    [
        ("gpu", {}, SHORT, None, True),
        ("cuda", {}, SHORT, "int8", True),
        ("gpu", {}, SHORT, "int4", False),
        ("gpu", {}, Execution(), None, False),
        ("gpu", {"hidden_dim": 96}, SHORT, None, False),
        ("cpu", {}, SHORT, None, False),
        ("tpu", {}, SHORT, None, False),
    ],
)
def test_where_experts_are_in_a_stack(monkeypatch, platform, changes, execution, bits, stacks):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert stacks_experts(tiny.config("mixtral", **WIDE | changes), execution, None, bits) is stacks
    assert not stacks_experts(tiny.config("mistral", **WIDE), execution, None, bits)

"""Shardings of whole trees, the one message of what does not divide, and functions on each shard's own tokens."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import tiny

from mixtral_jax.errors import InputError
from mixtral_jax.model.transformer import abstract_params
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.partition import (
    constrain,
    gather_weight,
    named_shardings,
    over_parts,
    over_tokens,
    place,
    use_weight,
)
from mixtral_jax.sharding.rules import DECODING, TRAINING


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, expert=2))


def test_named_shardings(mesh):
    shardings = named_shardings(mesh, abstract_params(tiny.config("mixtral")), TRAINING)
    layers = shardings["layers"]
    assert shardings["embedding"] == NamedSharding(mesh, P(("tensor",), ("fsdp", "expert")))
    assert layers["moe"]["gate"] == NamedSharding(mesh, P(None, ("expert",), ("fsdp",), ("tensor",)))
    assert layers["attention"]["key"] == NamedSharding(mesh, P(None, ("fsdp", "expert"), ("tensor",), None))
    assert layers["attention_norm"]["scale"] == NamedSharding(mesh, P(None, None))


def test_leaves_without_names_are_replicated(mesh):
    assert named_shardings(mesh, {"count": jax.ShapeDtypeStruct((), jnp.int32)}, TRAINING)["count"].spec == P()


def test_one_message_names_everything_that_does_not_divide():
    """Of 4 experts, 4 heads, 2 key-value heads, width 16, 24 hidden, vocabulary 40 over expert = 3 and tensor = 5."""
    mesh = AbstractMesh((1, 1, 3, 1, 5), ("data", "fsdp", "expert", "context", "tensor"))
    with pytest.raises(InputError, match=r"^mesh = 'expert=3, tensor=5': the model does not divide") as caught:
        named_shardings(mesh, abstract_params(tiny.config("mixtral")), TRAINING)
    lines = str(caught.value).splitlines()[1:]
    assert "  dimension 1 of layers.moe.gate is 4, not divisible by expert = 3" in lines
    assert "  dimension 3 of layers.moe.gate is 24, not divisible by tensor = 5" in lines
    assert "  dimension 2 of layers.attention.key is 2, not divisible by tensor = 5" in lines
    assert "  dimension 1 of embedding is 16, not divisible by fsdp x expert = 3" in lines
    attention = 2 * 4  # query, key and value by width and heads; output by heads and width
    mixture = 1 + 3 * 2  # the router by width; gate, up and down by experts and hidden
    assert len(lines) == attention + mixture + 2  # and the embeddings by width: 40 divides by 5


def test_what_divides_is_accepted():
    mesh = AbstractMesh((1, 4, 4, 1, 2), ("data", "fsdp", "expert", "context", "tensor"))
    named_shardings(mesh, abstract_params(tiny.config("mixtral")), TRAINING)


def test_constrain(mesh):
    x = jnp.ones((8, 4, 2))
    names = ("batch", "length", "activation")
    assert constrain(x, names, TRAINING) is x
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, names, TRAINING))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp", "expert"))), 3)


def test_a_used_weight_is_gathered_and_its_gradient_scattered(mesh):
    names = ("embed", "hidden")

    def used(w):
        return use_weight(w, names, TRAINING)

    def value_and_gradient(w):
        value, vjp = jax.vjp(used, w)
        return value, vjp(2 * value)[0]

    w = jnp.arange(32.0).reshape(8, 4)
    stored = NamedSharding(mesh, TRAINING.storage(names))
    with jax.set_mesh(mesh):
        value, gradient = jax.jit(value_and_gradient)(jax.device_put(w, stored))
    assert value.sharding.is_fully_replicated
    assert gradient.sharding.is_equivalent_to(stored, 2)
    assert gradient.addressable_shards[0].data.shape == (2, 4)
    for actual, expected in zip((value, gradient), value_and_gradient(w), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_over_tokens_is_the_function_itself_without_a_mesh():
    def function(x, w):
        return x * w

    assert over_tokens(function, ("norm",), TRAINING) is function


@pytest.mark.parametrize("names", [("norm",), ("embed",), ("expert_embed",)])
def test_over_tokens_sums_the_weights_gradient_over_shards(mesh, names):
    """Of a weight that each shard has, and of one that is stored in parts."""
    x, w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4, 16)), jnp.float32), jnp.arange(16.0) / 8

    def loss(x, w):
        def on_shard(x, w):
            w = gather_weight(w, names, TRAINING, w.dtype)
            assert w.shape == (16,)
            return jnp.tanh(x * w[None, None])

        return jnp.sum(over_tokens(on_shard, names, TRAINING)(x, w) ** 2)

    expected = jax.grad(loss, (0, 1))(x, w)
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    for ours, plain in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_over_tokens_sees_its_own_shard(mesh):
    def shard_sum(x, w):
        return jnp.broadcast_to(jnp.sum(x), x.shape) + w

    with jax.set_mesh(mesh):
        spread = over_tokens(shard_sum, (), TRAINING)
        sums = jax.jit(spread)(jnp.ones((16, 4)), jnp.zeros(()))
    np.testing.assert_array_equal(sums, np.full((16, 4), 2 * 4))


def test_weights_are_gathered_in_the_dtype_wanted_and_their_gradients_scattered_in_their_own(mesh):
    names = ("embed", "hidden")
    w = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, TRAINING.storage(names)))

    def loss(w):
        def on_shard(x, w):
            return x * jnp.sum(gather_weight(w, names, TRAINING, jnp.bfloat16))

        spread = over_tokens(on_shard, names, TRAINING)(jnp.ones((8, 4), jnp.bfloat16), w)
        used = use_weight(w, names, TRAINING, jnp.bfloat16)
        return jnp.sum(spread.astype(jnp.float32)) + jnp.sum(used.astype(jnp.float32))

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(w)
        _, gradient = lowered.compile()(w)
    np.testing.assert_array_equal(gradient, np.full((8, 4), 8 * 4 + 1))
    text = lowered.as_text()
    gathers = re.findall(r"all_gather.*-> tensor<8x4x(\w+)>", text)
    scatters = re.findall(r"reduce_scatter.*?-> tensor<2x4x(\w+)>", text, re.DOTALL)
    assert (set(gathers), set(scatters)) == ({"bf16"}, {"f32"})


def test_over_parts_sums_the_parts_of_a_product(mesh):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 5), (5, 8, 4)))

    def function(x, weights):
        return jnp.einsum("nd,dfk->nk", x, weights[0])

    layout = (P(None, ("fsdp", "expert", "tensor")),)
    assert over_parts(function, layout, ("fsdp",)) is function
    with jax.set_mesh(mesh):
        spread = jax.jit(over_parts(function, layout, ("fsdp", "expert", "tensor")))
        np.testing.assert_allclose(spread(x, (w,)), function(x, (w,)), atol=1e-5)
        assert spread.lower(x, (w,)).compile().as_text().count("all-reduce(") == 1


def test_place_gives_each_shard_its_part_alone(mesh):
    array = np.arange(64.0).reshape(8, 8)
    placed = place(array, ("embed", "hidden"), DECODING, mesh, jnp.bfloat16)
    assert placed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(placed, array)
    parts = mesh.size // mesh.shape["data"] // mesh.shape["context"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(8, 8 // parts)}


def test_the_names_of_boxes_survive_the_layer_scan():
    boxed = abstract_params(tiny.config("mixtral"))["layers"]["moe"]["down"]
    assert isinstance(boxed, nn.Partitioned)
    assert boxed.names == ("layers", "experts", "hidden", "expert_embed")

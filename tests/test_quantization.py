"""Rounding weights to eight and four bits, and models with such weights."""

import jax
import numpy as np
import pytest
from oracles import huggingface, tiny

import mixtral_jax as mj
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor, tensors
from mixtral_jax.quantization import is_quantized, quantize, scale_shape

PLAIN = Tensor(("layers", "feed_forward", "gate"), (0,), (128, 3), ("embed", "hidden"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_int8_every_value_is_the_nearest(family):
    for weight, found in _quantized(family, "int8"):
        assert np.abs(found.values).max() == 127
        step = Quantized(np.ones_like(found.values), found.scale).dequantized()
        assert np.all(np.abs(found.dequantized() - weight) <= step * 0.5001)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_int4_the_error_is_less_than_that_of_the_plain_scale(family):
    """Of 32 normal values, absmax / 7 leaves 0.1 of their deviation."""
    for weight, found in _quantized(family, "int4"):
        values = found.values.astype(int)
        assert (values.min(), values.max()) == (-8, 7)
        plain = Quantized(np.ones_like(values), np.abs(found.scale) * 8 / 7).dequantized()
        nearest = np.clip(np.rint(weight / plain), -7, 7) * plain
        error, plain_error = (np.std(each - weight) for each in (found.dequantized(), nearest))
        assert error < min(0.09, plain_error)


def _quantized(family, bits):
    rng = np.random.default_rng(0)
    for tensor in filter(is_quantized, tensors(tiny.config(family, dim=96, head_dim=128, hidden_dim=192))):
        weight = rng.standard_normal(tensor.shape).astype(np.float32)
        found = quantize(weight, tensor, bits)
        assert found.values.dtype == bits
        assert found.scale.shape == scale_shape(tensor, bits)
        yield weight, found


def test_scales_are_a_channels_or_a_groups():
    output = Tensor(("layers", "attention", "output"), (0,), (4, 128, 96), ("heads", "head_dim", "embed"))
    assert scale_shape(PLAIN, "int8") == (1, 3)
    assert scale_shape(PLAIN, "int4") == (4, 3)
    assert scale_shape(output, "int8") == (1, 1, 96)
    assert scale_shape(output, "int4") == (4, 4, 96)


def test_one_large_value_costs_its_channel_or_its_group_alone():
    weight = np.full((128, 3), 0.01, np.float32)
    weight[0, 0] = 100
    by_channel, by_group = (np.asarray(quantize(weight, PLAIN, bits).dequantized()) for bits in ("int8", "int4"))
    assert not by_channel[1:, 0].any()
    assert not by_group[1:32, 0].any()
    np.testing.assert_allclose(by_channel[:, 1:], 0.01, rtol=1e-6)
    np.testing.assert_allclose(by_group[32:, 0], 0.01, rtol=1e-6)


def test_zeros_stay_zeros():
    for bits in ("int8", "int4"):
        assert not np.any(quantize(np.zeros(PLAIN.shape), PLAIN, bits).dequantized())


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request, tmp_path_factory):
    config = tiny.config(request.param, dim=64, num_heads=8, num_kv_heads=4, hidden_dim=64)
    folder = tmp_path_factory.mktemp("model")
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("bits", "error"), [("int8", 0.03), ("int4", 0.5)])
def test_a_quantised_model_computes_what_its_weights_stand_for(folder, bits, error):
    whole, quantised = mj.load(folder, dtype="float32"), mj.load(folder, dtype="float32", quantize=bits)
    tokens = tiny.tokens(whole.config, 2, 40)
    logits = np.asarray(quantised.logits(tokens))
    stands_for = mj.Transformer(whole.config).apply({"params": quantised.params}, tokens).logits_BTV
    np.testing.assert_allclose(logits, stands_for, atol=1e-4 * np.std(logits))
    # Routers of the mixture choose otherwise here and there: the median speaks of rounding.
    assert 0 < np.median(np.abs(logits - whole.logits(tokens))) < error * np.std(logits)
    prompts = [tokens[0, :9].tolist(), tokens[1, :17].tolist()]
    (alone,) = quantised.generate(prompts[1:], max_new_tokens=12, stop_at_eos=False)
    assert quantised.generate(prompts, max_new_tokens=12, stop_at_eos=False)[1] == alone


def test_what_decides_and_what_is_looked_up_stay_as_they_are(folder):
    model = mj.load(folder, dtype="float32", quantize="int8")
    whole = mj.load(folder, dtype="float32").params
    assert isinstance(model._weights.unembedding_DV, Quantized)
    np.testing.assert_array_equal(model.params["embedding"], whole["embedding"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(model._weights):
        name = jax.tree_util.keystr(path)
        assert (leaf.dtype == np.int8) == (".values" in name)
        assert leaf.ndim < 2 or ".values" in name or ".scale" in name or "router" in name or "embedding_VD" in name, (
            name
        )


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_on_a_mesh(folder, bits):
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), devices=jax.devices()[:4])
    alone = mj.load(folder, dtype="float32", quantize=bits)
    if bits == "int4":  # two groups over four devices
        with pytest.raises(mj.InputError, match=r"down.*\(scales\) is 2, not divisible by fsdp x expert x tensor = 4"):
            mj.load(folder, dtype="float32", quantize=bits, mesh=mesh)
        mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])
    spread = mj.load(folder, dtype="float32", quantize=bits, mesh=mesh)
    tokens = tiny.tokens(alone.config, 2, 40)
    np.testing.assert_allclose(spread.logits(tokens), alone.logits(tokens), atol=5e-5)
    assert spread.generate([[1, 2, 3]], 12) == alone.generate([[1, 2, 3]], 12)


def test_refuses(folder):
    with pytest.raises(mj.InputError, match="quantize = 'int2': int8 or int4, or nothing"):
        mj.load(folder, quantize="int2")

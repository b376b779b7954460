"""Rounding weights to eight and four bits, and models with such weights."""

import json
import tracemalloc
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from oracles import huggingface, tiny

import mixtral_jax as mj
from mixtral_jax.checkpoints import native
from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.source import nbytes
from mixtral_jax.cli import platform
from mixtral_jax.config import Execution, MoEConfig
from mixtral_jax.inference.weights import assemble
from mixtral_jax.model.backends.few_rows import ByOutput
from mixtral_jax.model.backends.quantized import Quantized
from mixtral_jax.model.tensors import Tensor, tensors
from mixtral_jax.quantization import DTYPES, Bits, is_quantized, pack, quantize, scale_shape, unpack

PLAIN = Tensor(("layers", "feed_forward", "gate"), (0,), (128, 3), ("embed", "hidden"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_int8_every_value_is_the_nearest(family):
    for weight, found in _quantized(family, "int8"):
        assert np.abs(found.values).max() == 127
        step = Quantized(np.ones_like(found.values), found.scale).dequantized()
        assert np.all(np.abs(found.dequantized() - weight) <= step * 0.5001)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_fp8_every_value_is_the_nearest(family):
    """Of 16 a power of two, the largest of a channel 448: half a sixteenth, or half of what is smallest, 2 ** -9."""
    for weight, found in _quantized(family, "fp8"):
        assert np.abs(found.values.astype(np.float32)).max() == 448
        step = np.maximum(np.abs(weight) / 16, np.broadcast_to(found.scale, weight.shape) * 2.0**-10)
        assert np.all(np.abs(found.dequantized() - weight) <= step * 1.0001)


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
        stands_for = np.asarray(found.dequantized())
        np.testing.assert_array_equal(stands_for.astype(jnp.bfloat16), stands_for)


def _quantized(family, bits):
    rng = np.random.default_rng(0)
    for tensor in filter(is_quantized, tensors(tiny.config(family, dim=96, head_dim=128, hidden_dim=192))):
        weight = rng.standard_normal(tensor.shape).astype(np.float32)
        found = quantize(weight, tensor, bits)
        assert found.values.dtype == DTYPES[bits]
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
    np.testing.assert_allclose(by_group[32:, 0], 0.01, rtol=1 / 32)


def test_zeros_stay_zeros():
    for bits in get_args(Bits):
        assert not np.any(quantize(np.zeros(PLAIN.shape), PLAIN, bits).dequantized())


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request, tmp_path_factory):
    config = tiny.config(request.param, dim=64, num_heads=8, num_kv_heads=4, hidden_dim=64)
    folder = tmp_path_factory.mktemp("model")
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("bits", "error"), [("int8", 0.03), ("int4", 0.5), ("fp8", 0.15)])
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


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_in_bfloat16_a_text_does_not_depend_on_how_many_are_beside_it(folder, bits):
    """One goes through loops, and many through matrices made of the same numbers."""
    model = mj.load(folder, quantize=bits)
    tokens = tiny.tokens(model.config, 40, 3)
    many = np.asarray(model.logits(tokens))
    np.testing.assert_allclose(model.logits(tokens[:1])[0], many[0], atol=1e-3 * np.std(many))


def test_what_decides_and_what_is_looked_up_stay_as_they_are(folder):
    model = mj.load(folder, dtype="float32", quantize="int8")
    whole = mj.load(folder, dtype="float32").params
    assert isinstance(model._weights.unembedding_DV, Quantized | ByOutput)
    np.testing.assert_array_equal(model.params["embedding"], whole["embedding"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(model._weights):
        name = jax.tree_util.keystr(path)
        assert (leaf.dtype == np.int8) == (".values" in name)
        assert leaf.ndim < 2 or ".values" in name or ".scale" in name or "router" in name or "embedding_VD" in name, (
            name
        )


@pytest.mark.parametrize("bits", get_args(Bits))
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


@pytest.mark.parametrize("bits", [None, "int8"])
def test_an_int8_cache(folder, bits):
    """On a mesh the same as on one device, and scoring sees what it would keep."""
    alone = mj.load(folder, dtype="float32", quantize=bits, cache_dtype="int8")
    whole = mj.load(folder, dtype="float32", quantize=bits)
    tokens = tiny.tokens(alone.config, 2, 40)
    real = np.ones(tokens.shape, bool)
    rounded, plain = (np.asarray(each.score(tokens, real).nats_BT)[:, 1:] for each in (alone, whole))
    assert 0 < np.median(np.abs(rounded - plain)) < 0.02
    prompts = [tokens[0, :9].tolist(), tokens[1, :17].tolist()]
    texts = alone.generate(prompts, max_new_tokens=12, stop_at_eos=False)
    assert [alone.generate([each], 12, stop_at_eos=False)[0] for each in prompts] == texts
    mesh = jax.make_mesh((2, 2), ("expert", "tensor"), devices=jax.devices()[:4])
    spread = mj.load(folder, dtype="float32", quantize=bits, cache_dtype="int8", mesh=mesh)
    assert spread.generate(prompts, max_new_tokens=12, stop_at_eos=False) == texts


def test_refuses(folder):
    with pytest.raises(mj.InputError, match="cache_dtype = 'int4': float32, bfloat16, int8, or nothing"):
        mj.load(folder, cache_dtype="int4")
    with pytest.raises(mj.InputError, match="quantize = 'int2': int8, int4, fp8, or nothing"):
        mj.load(folder, quantize="int2")


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_numbers_of_int4_are_packed_in_pairs(size):
    values = np.random.default_rng(0).integers(-8, 8, size).astype("int4")
    np.testing.assert_array_equal(pack(np.array([1, -1, -8], values.dtype)), [0xF1, 0x08])
    assert pack(values).nbytes == (size + 1) // 2
    np.testing.assert_array_equal(unpack(pack(values), (size,)), values)


def leaves(model):
    """The bytes of every leaf, and its dtype, by its place."""
    found = jax.tree_util.tree_leaves_with_path(model._weights)
    return {jax.tree_util.keystr(path): (leaf.dtype, np.asarray(leaf).tobytes()) for path, leaf in found}


@pytest.mark.parametrize("bits", get_args(Bits))
def test_what_convert_stores_loads_as_if_it_were_rounded_while_loading(folder, tmp_path, monkeypatch, bits):
    monkeypatch.setattr(native, "CHUNK_BYTES", 20_000)
    source = open_source(folder)
    convert(source, tmp_path / "out", "native", quantize=bits)
    stored = open_source(tmp_path / "out")
    assert (stored.bits, stored.form, stored.problems()) == (bits, f"mixtral-jax checkpoint in {bits}", [])
    rounded = mj.load(folder, dtype="float32", quantize=bits)
    monkeypatch.setattr("mixtral_jax.checkpoints.source.quantize", None)  # nothing is rounded anew
    for asked in (None, bits):
        assert leaves(mj.load(tmp_path / "out", dtype="float32", quantize=asked)) == leaves(rounded)
    convert(stored, tmp_path / "again", "native", quantize=bits)
    assert leaves(mj.load(tmp_path / "again", dtype="float32")) == leaves(rounded)
    # Other formats have what the numbers stand for.
    convert(stored, tmp_path / "plain", "huggingface")
    plain = mj.load(tmp_path / "plain", dtype="float32")
    for found, expected in zip(jax.tree.leaves(plain.params), jax.tree.leaves(rounded.params), strict=True):
        np.testing.assert_array_equal(found, expected)
    other = {"int8": "int4", "int4": "fp8", "fp8": "int8"}[bits]
    with pytest.raises(mj.InputError, match=f"quantize = '{other}': .*out has its matrices in {bits} already; take"):
        mj.load(tmp_path / "out", quantize=other)
    with pytest.raises(mj.InputError, match=f"quantize = '{other}': .*out has its matrices in {bits} already; take"):
        convert(stored, tmp_path / "x", "native", quantize=other)


@pytest.mark.parametrize("part", ["values", "scales"])
def test_damage_of_what_is_stored_rounded_is_found(folder, tmp_path, part):
    convert(open_source(folder), tmp_path / "out", "native", quantize="int4")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    name = next(name for name, fields in manifest["tensors"].items() if fields["dtype"] == "int4")
    (chunk,) = {fields["chunk"] for fields in manifest["tensors"].values()}
    path = tmp_path / "out" / "params" / chunk
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = checkpointer.restore(path)
        changed = f"{name}.scales" if part == "scales" else name
        arrays[changed] = np.asarray(arrays[changed]).copy()
        arrays[changed].flat[0] += 1
        checkpointer.save(path, arrays, force=True)
    with pytest.raises(mj.InputError, match=f"{chunk}: tensor {name} is not what was written: its digest differs"):
        mj.load(tmp_path / "out")
    manifest["quantized"] = "int2"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(mj.InputError, match=r"manifest.json: quantized = 'int2': int8, int4, fp8, or nothing"):
        mj.load(tmp_path / "out")
    del manifest["quantized"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(mj.InputError, match="chunk, dtype, shape and sha256 are wanted"):
        mj.load(tmp_path / "out")


@pytest.mark.parametrize("to", ["huggingface", "consolidated"])
def test_other_formats_have_no_place_for_it(folder, tmp_path, to):
    with pytest.raises(mj.InputError, match=f"--quantize = 'int8': our rounding is no part of the {to} format; --to"):
        convert(open_source(folder), tmp_path / "out", to, quantize="int8")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Mixtral whose 48 expert matrices are its largest tensors, a quarter of a megabyte each in float32."""
    folder = tmp_path_factory.mktemp("large")
    moe = MoEConfig(num_experts=8, experts_per_token=2)
    config = tiny.config("mixtral", dim=128, hidden_dim=512, moe=moe)
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", get_args(Bits))
def test_few_tensors_are_in_memory_at_once_while_converting(large, tmp_path, monkeypatch, bits):
    largest = 128 * 512 * 4
    monkeypatch.setattr(native, "CHUNK_BYTES", largest)
    source = open_source(large)
    assert source.tensors
    tracemalloc.start()
    convert(source, tmp_path / "out", "native", quantize=bits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < peak < 8 * largest < 48 * largest / 4
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "params").rglob("*") if path.is_file())
    counted = sum(nbytes(each, DTYPES[bits] if is_quantized(each) else source.dtype(each)) for each in source.tensors)
    assert size < counted * 1.1


@pytest.mark.parametrize("bits", get_args(Bits))
def test_loading_takes_the_rounded_size_and_a_few_tensors(large, bits, monkeypatch):
    """As arrays of numpy, whose memory tracemalloc sees; those of jax would lie beside it."""
    monkeypatch.setattr("mixtral_jax.inference.weights._on_devices", lambda array, *_: np.array(array))
    largest, source = 128 * 512 * 4, open_source(large)
    kept = sum(nbytes(each, DTYPES[bits] if is_quantized(each) else np.dtype(np.float32)) for each in source.tensors)
    kept *= 2 if bits == "int4" else 1  # numpy has no half bytes
    tracemalloc.start()
    weights = assemble(source.read, source.config, Execution(), quantize_to=bits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) <= kept
    assert peak < kept + 8 * largest < 48 * largest * 0.6


def test_the_command_line_knows_them_all():
    assert get_args(platform.Bits) == get_args(Bits)

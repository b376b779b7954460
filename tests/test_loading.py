"""`load`: from runs and files, onto devices and meshes, and what it refuses."""

import math
import shutil

import chex
import jax
import numpy as np
import pytest
from oracles import huggingface, tiny

import mixtral_jax as mj
from mixtral_jax.checkpoints import tensor_names
from mixtral_jax.train import config as configs


def test_a_run_loads(whole, toy_config):
    model = mj.load(whole[0], dtype="float32")
    assert model.config == configs.load(toy_config).model
    assert model.params["layers"]["moe"]["gate"].shape == (2, 4, 16, 16)
    assert model.tokenizer.vocab_size == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nowhere"}, "model = 'nowhere': no such file or folder"),
        ({"path": "."}, "none of the kinds is in this folder"),
        ({"path": ".", "dtype": "float16"}, "dtype = 'float16': 'bfloat16', 'float32' or 'auto'"),
    ],
)
def test_load_refuses(arguments, message):
    with pytest.raises(mj.InputError, match=message):
        mj.load(**arguments)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"expert": 4, "tensor": 2}, {"fsdp": 2, "data": 2, "expert": 2}])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_mesh_changes_nothing_but_where_weights_lie(family, sizes, tmp_path):
    config = tiny.config(family)
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(tmp_path)
    devices = jax.devices()[: math.prod(sizes.values())]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)
    alone, spread = mj.load(tmp_path, dtype="float32"), mj.load(tmp_path, dtype="float32", mesh=mesh)
    tokens = tiny.tokens(config, 2, 40)
    np.testing.assert_allclose(spread.logits(tokens), alone.logits(tokens), atol=2e-5)
    prompts = [tokens[0, :9].tolist(), tokens[1, :3].tolist(), tokens[1, :17].tolist()]
    expected = alone.generate(prompts, max_new_tokens=24, stop_at_eos=False)
    assert spread.generate(prompts, max_new_tokens=24, stop_at_eos=False) == expected
    assert spread.generate(prompts[:1], max_new_tokens=24, stop_at_eos=False) == expected[:1]
    parts = math.prod(sizes.get(axis, 1) for axis in ("fsdp", "expert", "tensor"))
    layer = spread._weights.layers[1]
    up = layer["prepared"]["moe"]["experts"][3].up if family == "mixtral" else layer["params"]["feed_forward"]["up"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(config.dim, config.hidden_dim // parts)}
    assert {shard.data.shape[0] for shard in spread._weights.embedding_VD.addressable_shards} == {40 // parts}
    chex.assert_trees_all_equal(spread.params, alone.params)


def test_a_tokenizer_of_another_model_is_refused(whole, tmp_path):
    config = tiny.config("mistral")
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(tmp_path)
    shutil.copy(whole[0] / "tokenizer.model", tmp_path)
    with pytest.raises(mj.InputError, match="tokenizer = 300: ids, and the embedding has 40 rows: this tokenizer is"):
        mj.load(tmp_path)


def test_a_mesh_that_does_not_divide_the_model_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    config = tiny.config("mixtral")
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(tmp_path)
    monkeypatch.setattr("mixtral_jax.checkpoints.source.ArchiveSource.read", None)
    mesh = jax.make_mesh((4,), ("tensor",), devices=jax.devices()[:4])
    with pytest.raises(mj.InputError, match=r"(?s)mesh = 'tensor=4': .*of layers.0.attention.key is 2, .*layers.1"):
        mj.load(tmp_path, mesh=mesh)
    with pytest.raises(mj.InputError, match="mesh = 'model': no axis of this name; the axes are data, fsdp, expert"):
        mj.load(tmp_path, mesh=jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("axes", [None, {"tensor": 2}])
def test_auto_is_what_the_device_multiplies_fast(tmp_path, monkeypatch, fast, axes):
    """Matrices are short all the same, but on a mesh, where each product would write them out anew."""
    config = tiny.config("mistral")
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr("mixtral_jax.loading.multiplies_bfloat16", lambda platform: asked.append(platform) or fast)
    mesh = axes and jax.make_mesh((2,), tuple(axes), devices=jax.devices()[:2])
    model = mj.load(tmp_path, dtype="auto", mesh=mesh)
    assert asked == ["cpu"]
    assert model.params["layers"]["attention"]["query"].dtype == ("bfloat16" if fast or mesh is None else "float32")
    short = mj.load(tmp_path, dtype="bfloat16", mesh=mesh)
    assert (model.logits([[1, 2, 3]]) == short.logits([[1, 2, 3]])).all() == fast  # rounded are the operands


def test_only_what_is_public_is_there():
    assert {"load", "Transformer", "ModelConfig"} <= set(dir(mj))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = mj.laod


@pytest.mark.parametrize("by_output", [True, False])
def test_matrices_that_are_to_lie_as_in_files_are_not_transposed(tmp_path, monkeypatch, by_output):
    config = tiny.config("mixtral")
    params = tiny.params(config)
    huggingface.to_huggingface(config, params).save_pretrained(tmp_path)
    copies = []
    monkeypatch.setattr(tensor_names, "transposed", lambda array: copies.append(array) or array.T.copy())
    monkeypatch.setattr("mixtral_jax.model.backends.few_rows.are_for_this_host", lambda: by_output)
    chex.assert_trees_all_equal(mj.load(tmp_path, dtype="float32").params, params)
    assert bool(copies) != by_output

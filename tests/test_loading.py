"""The public face: a trained run loaded, scored and made to speak."""

import itertools
import math
import shutil

import chex
import jax
import numpy as np
import pytest
from oracles import huggingface, tiny

import mixtral_jax as mj
from mixtral_jax.checkpoints import tensor_names
from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.train import config as configs

PROMPTS = ["def f", "    return x + 12"]


@pytest.fixture(scope="module")
def model(whole):
    return mj.load(whole[0], dtype="float32")


def test_a_run_loads(model, toy_config):
    assert model.config == configs.load(toy_config).model
    assert model.params["layers"]["moe"]["gate"].shape == (2, 4, 16, 16)
    assert model.tokenizer.vocab_size == 300


def test_logits_are_the_transformers(model):
    tokens = np.arange(3, 63).reshape(2, 30)
    expected = mj.Transformer(model.config).apply({"params": model.params}, tokens).logits_BTV
    assert model.logits(tokens).dtype == np.float32
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-5)


def test_strings_and_ids_say_the_same(model):
    ids = [model.tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
    texts = model.generate(PROMPTS, max_new_tokens=20)
    for text, row, prompt in zip(texts, model.generate(ids, max_new_tokens=20), ids, strict=True):
        row = row[:-1] if row[-1] == model.tokenizer.eos_id else row
        assert model.tokenizer.decode(prompt + row) == model.tokenizer.decode(prompt) + text
    assert model.generate([]) == []


def test_generation_repeats_with_its_seed(model):
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    first = model.generate(PROMPTS, seed=1, **settings)
    assert model.generate(PROMPTS, seed=1, **settings) == first
    assert model.generate(PROMPTS, seed=2, **settings) != first


def test_a_stream_grows_to_the_whole_text(model):
    pieces = [texts[0] for texts in model.stream(PROMPTS[:1], 20, SamplingConfig())]
    assert pieces[-1] == model.generate(PROMPTS[:1], max_new_tokens=20)[0]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
    assert len(set(pieces)) > 1


def test_a_stop_string_and_what_follows_are_cut_off(model):
    (free,) = model.generate(PROMPTS[:1], max_new_tokens=24, stop_at_eos=False)
    stop = free[4:7]
    (stopped,) = model.generate(PROMPTS[:1], max_new_tokens=24, stop_at_eos=False, stop=[stop, "never said"])
    assert stopped == free[: free.index(stop)]
    for (shown,) in model.stream(PROMPTS[:1], 24, SamplingConfig(), stop=[stop], stop_at_eos=False):
        assert stopped.startswith(shown)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate("text"), "prompts = 'text': a list is needed"),
        (lambda model: model.generate(["a", [1]]), "prompts = 'strings and ids': all of one kind"),
        (lambda model: model.generate([[1]], stop=["x"]), r"stop = \['x'\]: needs prompts that are strings"),
        (lambda model: model.generate(["a"], stop=[""]), r"stop = \[''\]: an empty string"),
        (lambda model: model.generate([[300]]), r"prompts\[0\] = 300: token ids go from 0 to 299"),
        (lambda model: model.generate([[1]], temperature=-1.0), "temperature = -1.0"),
        (lambda model: model.generate([[1]], max_new_tokens=64), r"with max_new_tokens that is 65, over 64"),
        (lambda model: model.logits([1, 2]), r"tokens_BT = 'int64\[2\]': integers \[B, T\]"),
        (lambda model: model.logits([[0.5]]), "integers"),
        (lambda model: model.logits([[-1]]), "tokens_BT = -1: token ids go from 0"),
    ],
)
def test_refuses(model, call, message):
    with pytest.raises(mj.InputError, match=message):
        call(model)


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
    monkeypatch.setattr("mixtral_jax.model.backends.few_rows.are_for_this_host", lambda: not fast)
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

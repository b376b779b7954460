"""Folders of transformers: the same logits and tokens as its own models, and every config that it writes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import huggingface as oracle
from oracles import tiny
from safetensors.torch import load_file, save_file

import mixtral_jax as mj
from mixtral_jax.checkpoints.huggingface import config_json, open_huggingface, read_config
from mixtral_jax.config import MoEConfig
from mixtral_jax.errors import InputError

NEW = 48
CASES = {
    "mistral": tiny.config("mistral", num_layers=1, sliding_window=None),
    "mistral-window": tiny.config("mistral"),
    "mistral-tied": tiny.config("mistral", num_layers=1, tie_embeddings=True),
    "mistral-plain-heads": tiny.config("mistral", num_layers=1, head_dim=4),
    "mixtral": tiny.config("mixtral", num_layers=1, sliding_window=None),
    "mixtral-window": tiny.config("mixtral"),
    "mixtral-5-top-3": tiny.config("mixtral", num_layers=1, moe=MoEConfig(num_experts=5, experts_per_token=3)),
}
"""head_dim is 8 unless said, not dim / heads = 4."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model of a case, and the folder that transformers saved it in."""
    made = {}

    def get(case):
        if case not in made:
            config = CASES[case]
            model = oracle.to_huggingface(config, tiny.params(config))
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = model, folder
        return made[case]

    return get


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a small folder, to be damaged."""
    return copied(saved("mistral-tied")[1], tmp_path)


def copied(source, target):
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def greedy(model, prompt):
    tokens = torch.tensor([prompt])
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW)
    return output[0, len(prompt) :].tolist()


def edit(path, **changes):
    """Sets keys of a JSON file; ... deletes one."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))
    return path


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_of_a_ragged_batch_are_those_of_transformers(saved, case):
    model, folder = saved(case)
    loaded = mj.load(folder, dtype="float32")
    assert loaded.config == CASES[case]
    tokens = tiny.tokens(loaded.config, 2, 20)
    expected = oracle.logits(model, tokens)
    assert np.abs(loaded.logits(tokens) - expected).max() < 2e-4 * expected.std()
    prompts = [tokens[0, :14].tolist(), [1], [5, 3, 17]]
    assert loaded.generate(prompts, NEW, stop_at_eos=False) == [greedy(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("case", ["mistral-window", "mixtral"])
def test_bfloat16_chooses_as_transformers_where_rounding_cannot_decide(saved, tmp_path, case):
    config = CASES[case]
    single, _ = saved(case)
    half = oracle.to_huggingface(config, tiny.params(config), torch.bfloat16)
    half.save_pretrained(tmp_path)
    tokens = tiny.tokens(config, 4, 24)
    expected_BTV = oracle.logits(half, tokens)
    rounding = np.abs(expected_BTV - oracle.logits(single, tokens)).max()
    second_BT, first_BT = np.sort(expected_BTV, axis=-1)[..., -2:].transpose(2, 0, 1)
    clear_BT = first_BT - second_BT > 2 * rounding
    assert clear_BT.mean() > 0.3
    chosen_BT = np.argmax(mj.load(tmp_path).logits(tokens), axis=-1)
    np.testing.assert_array_equal(chosen_BT[clear_BT], expected_BTV.argmax(-1)[clear_BT])


@pytest.mark.parametrize("case", ["mistral", "mixtral-window"])
def test_several_files_are_one_model(saved, tmp_path, case):
    model, folder = saved(case)
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    whole, shards = open_huggingface(folder), open_huggingface(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert shards.problems() == []
    assert "safetensors files" in shards.form
    for tensor in whole.tensors:
        np.testing.assert_array_equal(shards.read(tensor), whole.read(tensor))


def test_the_fused_naming_reads_the_same(saved, tmp_path):
    model, folder = saved("mixtral-5-top-3")
    copied(folder, tmp_path)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    assert any("experts.gate_up_proj" in name for name in state)
    save_file(state, tmp_path / "model.safetensors")
    apart, fused = open_huggingface(folder), open_huggingface(tmp_path)
    assert fused.problems() == []
    for tensor in apart.tensors:
        np.testing.assert_array_equal(fused.read(tensor), apart.read(tensor))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("window", [None, 6])
def test_the_config_of_version_4(tmp_path, family, window):
    config = tiny.config(family, sliding_window=window, head_dim=4, rope_theta=12345.0)
    table = config_json(config, "float32") | {"head_dim": None, "rope_scaling": None}
    del table["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert read_config(tmp_path / "config.json") == config
    del table["head_dim"], table["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_config_of_version_5(tmp_path, family):
    config = tiny.config(family, rope_theta=12345.0)
    table = config_json(config, "float32")
    del table["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("family", "absent"),
    [
        ("mistral", {"sliding_window": 4096, "norm_eps": 1e-6, "rope_theta": 1e4, "max_position": 131072}),
        ("mixtral", {"sliding_window": None, "norm_eps": 1e-5, "rope_theta": 1e6, "max_position": 131072}),
    ],
)
def test_absent_keys_mean_what_transformers_takes_them_for(tmp_path, family, absent):
    config = tiny.config(family)
    table = config_json(config, "float32")
    keys = ("sliding_window", "rms_norm_eps", "rope_theta", "rope_parameters", "max_position_embeddings")
    for key in (*keys, "tie_word_embeddings"):
        del table[key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(table))
    assert read_config(path) == replace(config, **absent)
    assert read_config(edit(path, sliding_window=None)).sliding_window is None
    theirs = oracle.MistralConfig if family == "mistral" else oracle.MixtralConfig
    left_out = theirs.from_pretrained(tmp_path)
    assert left_out.rms_norm_eps == absent["norm_eps"]
    assert left_out.rope_parameters["rope_theta"] == absent["rope_theta"]
    assert read_config(edit(path, rope_theta=None)).rope_theta == absent["rope_theta"]
    heads = edit(path, num_attention_heads=16, num_key_value_heads=...)
    assert read_config(heads).num_kv_heads == theirs.from_pretrained(tmp_path).num_key_value_heads == 8
    assert read_config(edit(path, num_key_value_heads=None)).num_kv_heads == 16


def test_a_mixtral_of_unsaid_experts_has_eight_and_two(tmp_path):
    table = config_json(tiny.config("mixtral"), "float32")
    del table["num_local_experts"], table["num_experts_per_tok"]
    (tmp_path / "config.json").write_text(json.dumps(table))
    assert read_config(tmp_path / "config.json").moe == MoEConfig(num_experts=8, experts_per_token=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': mistral, mixtral, llama can be read"),
        ({"model_type": ...}, "model_type"),
        ({"hidden_size": ...}, "hidden_size: is missing"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"num_attention_heads": "4"}, "num_attention_heads = '4'"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"vocab_size": 40.5}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide"),
        ({"intermediate_size": ...}, "intermediate_size"),
        ({"attention_bias": True}, "attention_bias = True: only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only silu or swish"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type = 'yarn': only 'default'"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type = 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters .*one rope for all layers"),
        ({"rope_parameters": ..., "rope_theta": "1e4"}, "rope_theta"),
        ({"rope_parameters": ..., "rope_theta": [1e4]}, "rope_theta"),
    ],
)
def test_refuses_a_config_naming_the_key(folder, changes, message):
    path = edit(folder / "config.json", **changes)
    with pytest.raises(InputError, match=f"{path}: {message}"):
        open_huggingface(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: (not JSON|a JSON object)"):
        open_huggingface(folder)


def test_all_that_does_not_fit_is_listed_at_once(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.7.extra.weight"] = torch.zeros(3)
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # known to be no weight
    save_file(tensors, path)
    source = open_huggingface(folder)
    assert sorted(source.problems()) == [
        "missing: model.layers.0.mlp.up_proj.weight",
        "missing: model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight is [3, 16], [32, 16] is wanted",
        "unknown: model.layers.7.extra.weight [3]",
    ]
    with pytest.raises(InputError, match=r"don't fit the config(.|\n)*up_proj(.|\n)*extra(.|\n)*q_proj"):
        mj.load(folder)


def test_a_long_list_is_cut(folder):
    edit(folder / "config.json", num_hidden_layers=9)
    assert open_huggingface(folder).problems()[-1] == "and 60 more like these"  # 9 tensors of 8 layers, less 12


@pytest.fixture
def shards(saved, tmp_path):
    saved("mistral-tied")[0].save_pretrained(tmp_path, max_shard_size="5KB")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../x.safetensors", "weight_map = '../x.safetensors': the plain name of a file beside it"),
        ("/etc/passwd", "weight_map = '/etc/passwd': the plain name"),
        ("sub/x.safetensors", "the plain name"),
        ("..", "the plain name"),
        ("", "the plain name"),
        ("none.safetensors", "weight_map = 'none.safetensors': there is no such file"),
        ("model-00001-of-{n}.safetensors", "weight_map.lm_head.weight = .*: the tensor is in no file"),
        (3, "weight_map = '3': there is no such file"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(shards, file, message):
    index = shards / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    count = len(set(table.values()))
    table["lm_head.weight"] = file.format(n=f"{count:05}") if isinstance(file, str) else file
    edit(index, weight_map=table)
    with pytest.raises(InputError, match=message):
        open_huggingface(shards)


def test_an_index_that_is_wrong_about_a_file_is_refused(shards):
    index = shards / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    first, last = min(table.values()), max(table.values())
    name = next(name for name, file in table.items() if file == first)
    edit(index, weight_map=table | {name: last})
    with pytest.raises(InputError, match=f"weight_map.{name} = '{last}': the tensor is in {first}"):
        open_huggingface(shards)


@pytest.mark.parametrize("listed", [None, {}, []])
def test_an_index_without_a_table_is_refused(shards, listed):
    edit(shards / "model.safetensors.index.json", weight_map=listed)
    with pytest.raises(InputError, match=r"weight_map.*a table from tensor to file is wanted"):
        open_huggingface(shards)


def test_a_tensor_in_two_files_is_refused(folder):
    (folder / "model-2.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"is in model-2\.safetensors and again in model\.safetensors"):
        open_huggingface(folder)

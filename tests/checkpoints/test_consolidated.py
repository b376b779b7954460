"""Mistral's own folders, made here from transformers' weights without our code."""

import json
import os

import numpy as np
import pytest
import torch
from oracles import huggingface as oracle
from oracles import tiny
from safetensors.torch import save_file

import mixtral_jax as mj
from mixtral_jax.checkpoints.consolidated import open_consolidated
from mixtral_jax.errors import InputError
from mixtral_jax.model.tensors import look_up

CONFIGS = {family: tiny.config(family) for family in tiny.FAMILIES}


def interleaved(w, heads):
    """The inverse of section 2's w.reshape(H, hd/2, 2, D).transpose(0, 2, 1, 3).reshape(H*hd, D)."""
    rows, dim = w.shape
    return w.reshape(heads, 2, rows // heads // 2, dim).permute(0, 2, 1, 3).reshape(rows, dim).contiguous()


def consolidated(config, stacked=False):
    """The tensors of tiny.params as Mistral names them."""
    state = oracle.to_huggingface(config, tiny.params(config)).state_dict()
    table = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        attention = {name: state[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkvo"}
        table[ours + "attention.wq.weight"] = interleaved(attention["q"], config.num_heads)
        table[ours + "attention.wk.weight"] = interleaved(attention["k"], config.num_kv_heads)
        table[ours + "attention.wv.weight"] = attention["v"]
        table[ours + "attention.wo.weight"] = attention["o"]
        table[ours + "attention_norm.weight"] = state[theirs + "input_layernorm.weight"]
        table[ours + "ffn_norm.weight"] = state[theirs + "post_attention_layernorm.weight"]
        if config.moe is None:
            for number, name in ((1, "gate"), (2, "down"), (3, "up")):
                table[f"{ours}feed_forward.w{number}.weight"] = state[f"{theirs}mlp.{name}_proj.weight"]
            continue
        router, w2 = state[theirs + "mlp.gate.weight"], state[theirs + "mlp.experts.down_proj"]
        w1, w3 = state[theirs + "mlp.experts.gate_up_proj"].chunk(2, dim=1)
        if stacked:
            table[ours + "block_sparse_moe.gate.weight"] = router
            table[ours + "block_sparse_moe.w1"] = w1.reshape(-1, config.dim)
            table[ours + "block_sparse_moe.w2"] = w2.transpose(1, 2).reshape(-1, config.dim)
            table[ours + "block_sparse_moe.w3"] = w3.reshape(-1, config.dim)
            continue
        table[ours + "feed_forward.gate.weight"] = router
        for expert in range(config.moe.num_experts):
            for number, w in ((1, w1), (2, w2), (3, w3)):
                table[f"{ours}feed_forward.experts.{expert}.w{number}.weight"] = w[expert]
    return {name: each.clone().contiguous() for name, each in table.items()}


def params_json(config, **changes):
    table = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "sliding_window": config.sliding_window,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position,
    }
    if config.moe is not None:
        moe = config.moe
        table["moe"] = {"num_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token}
    table |= changes
    return {key: value for key, value in table.items() if value is not ...}


def write(folder, config, split=1, suffix="safetensors", stacked=False, **changes):
    tensors = consolidated(config, stacked)
    (folder / "params.json").write_text(json.dumps(params_json(config, **changes)))
    for number in range(split):
        part = {name: each for place, (name, each) in enumerate(tensors.items()) if place % split == number}
        file = folder / (f"consolidated.{number:02}.{suffix}" if split > 1 else f"consolidated.{suffix}")
        save_file(part, file) if suffix == "safetensors" else torch.save(part, file)
    return folder


@pytest.mark.parametrize(("split", "suffix"), [(1, "safetensors"), (1, "pth"), (4, "pth"), (3, "safetensors")])
@pytest.mark.parametrize(("family", "stacked"), [("mistral", False), ("mixtral", False), ("mixtral", True)])
def test_every_layout_in_every_kind_of_file(tmp_path, family, stacked, split, suffix):
    config = CONFIGS[family]
    source = open_consolidated(write(tmp_path, config, split, suffix, stacked))
    assert source.config == config
    assert source.problems() == []
    assert f"{split} .{suffix} file" in source.form
    params = tiny.params(config)
    for tensor in source.tensors:
        assert source.dtype(tensor) == np.float32
        np.testing.assert_array_equal(source.read(tensor), look_up(params, tensor), tensor.name)


def test_a_loaded_one_is_the_model(tmp_path):
    config = CONFIGS["mixtral"]
    model = mj.load(write(tmp_path, config, 4, "pth", stacked=True), dtype="float32")
    tokens = tiny.tokens(config, 2, 12)
    logits = oracle.logits(oracle.to_huggingface(config, tiny.params(config)), tokens)
    assert np.abs(model.logits(tokens) - logits).max() < 2e-4 * logits.std()


@pytest.mark.parametrize(
    ("window", "theta", "said"),
    [(4096, 1e4, "10000 is assumed, since a window is set"), (None, 1e6, "1e+06 is assumed, since no window is set")],
)
def test_absent_rope_theta_follows_the_window(tmp_path, window, theta, said):
    folder = write(tmp_path, CONFIGS["mistral"], rope_theta=..., sliding_window=window)
    source = open_consolidated(folder)
    assert source.config.rope_theta == theta
    assert source.notes == [f"params.json has no rope_theta: {said}"]


def test_what_is_left_out_is_assumed_and_said(tmp_path):
    changes = {"vocab_size": -1, "max_position_embeddings": ..., "strange": 1}
    source = open_consolidated(write(tmp_path, CONFIGS["mistral"], **changes))
    assert (source.config.vocab_size, source.config.max_position) == (40, 32768)
    said = "\n".join(source.notes)
    assert all(key in said for key in ("strange", "positions", "vocab_size"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": ...}, "dim"),
        ({"n_heads": "4"}, "n_heads"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3"),
        ({"rope_theta": "high"}, "rope_theta"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"sliding_window": [4, 8]}, "sliding_window"),
        ({"moe": [8]}, "moe = .*a table with num_experts"),
        ({"moe": {"num_experts": 4}}, "moe.*num_experts_per_tok"),
        ({"quantization": {"qformat_weight": "fp8"}}, "quantization.*not supported"),
        ({"lora": {"rank": 4}}, "lora.*not supported"),
    ],
)
def test_refuses_params_naming_the_key(tmp_path, changes, message):
    folder = write(tmp_path, CONFIGS["mistral"], **changes)
    with pytest.raises(InputError, match=f"{folder / 'params.json'}: {message}"):
        open_consolidated(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write(tmp_path, CONFIGS["mistral"], 2, "pth")
    torch.save({"norm.weight": torch.ones(16)}, folder / "consolidated.02.pth")
    with pytest.raises(InputError, match=r"norm\.weight is in .* and again in consolidated\.02\.pth"):
        open_consolidated(folder)


def test_a_missing_file_is_its_missing_tensors(tmp_path):
    folder = write(tmp_path, CONFIGS["mistral"], 4, "pth")
    (folder / "consolidated.02.pth").unlink()
    source = open_consolidated(folder)
    assert len(source.problems()) == 5
    assert all(problem.startswith("missing: ") for problem in source.problems())
    with pytest.raises(InputError, match="the weights don't fit the config"):
        source.check()


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    folder = write(tmp_path, CONFIGS["mistral"], 2, "pth")
    torch.save({"x": Code(tmp_path / "ran")}, folder / "consolidated.01.pth")
    with pytest.raises(InputError, match=r"consolidated\.01\.pth: refused"):
        open_consolidated(folder)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_is_refused(tmp_path):
    folder = write(tmp_path, CONFIGS["mistral"], 2, "pth")
    file = folder / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"consolidated\.01\.pth: not a whole torch file"):
        open_consolidated(folder)

"""Models that transformers wrote, read by us: the same logits and the same greedy text."""

import json

import numpy as np
import pytest
import torch
from oracles import huggingface, tiny
from safetensors.numpy import load_file, save_file

import mixtral_jax as mj
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.config import MoEConfig

VARIANTS = {
    "mistral full": ("mistral", {"sliding_window": None}),
    "mistral windowed": ("mistral", {}),
    "mistral tied": ("mistral", {"tie_embeddings": True}),
    "mistral head_dim": ("mistral", {"head_dim": 12}),
    "mixtral full": ("mixtral", {"sliding_window": None}),
    "mixtral windowed": ("mixtral", {}),
    "mixtral 5 experts, top 3": ("mixtral", {"moe": MoEConfig(num_experts=5, experts_per_token=3)}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_text_are_those_of_transformers(variant, tmp_path):
    family, changes = VARIANTS[variant]
    config = tiny.config(family, **changes)
    theirs = huggingface.to_huggingface(config, tiny.params(config))
    # A shard for every few tensors.
    theirs.save_pretrained(tmp_path, max_shard_size="6KB" if "full" in variant else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == ("full" in variant)
    ours = mj.load(tmp_path, dtype="float32")
    assert ours.config == config
    tokens = tiny.tokens(config, 2, 30)
    expected = huggingface.logits(theirs, tokens)
    assert np.abs(ours.logits(tokens) - expected).max() < 2e-4 * expected.std()
    prompts = [tokens[0, :9].tolist(), tokens[1, :3].tolist(), tokens[1, :17].tolist()]
    for prompt, found in zip(prompts, ours.generate(prompts, max_new_tokens=48, stop_at_eos=False), strict=True):
        assert found == _greedy(theirs, prompt, 48)


def _greedy(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(huggingface.logits(model, np.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bfloat16_chooses_what_transformers_does_where_its_rounding_lets_it(family, tmp_path):
    config = tiny.config(family)
    params = tiny.params(config)
    huggingface.to_huggingface(config, params).save_pretrained(tmp_path)
    tokens = tiny.tokens(config, 4, 30)
    exact = huggingface.logits(huggingface.to_huggingface(config, params), tokens)
    theirs = huggingface.logits(huggingface.to_huggingface(config, params, torch.bfloat16), tokens)
    ours = np.asarray(mj.load(tmp_path, dtype="bfloat16").logits(tokens))
    rounding = np.abs(theirs - exact).max(-1)
    first, second = np.sort(theirs, axis=-1)[..., ::-1][..., :2].transpose(2, 0, 1)
    clear = first - second > 2 * rounding
    assert clear.sum() > 20
    np.testing.assert_array_equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_the_names_that_transformers_5_has_in_memory(tmp_path):
    config = tiny.config("mixtral")
    model = huggingface.to_huggingface(config, tiny.params(config))
    model.save_pretrained(tmp_path)
    published = open_source(tmp_path)
    read = {tensor.name: published.read(tensor) for tensor in published.tensors}
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    fused = open_source(tmp_path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused.archive.entries
    assert fused.problems() == []
    for tensor in fused.tensors:
        np.testing.assert_array_equal(fused.read(tensor), read[tensor.name])


def test_mistrals_files_of_2023(tmp_path):
    """Experts stacked by rows, w2's transposed; queries and keys in the order of the original rope; split by name."""
    config = tiny.config("mixtral", sliding_window=None, rope_theta=1e6)
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(tmp_path / "hf")
    theirs = load_file(tmp_path / "hf" / "model.safetensors")

    def interleaved(rows):
        return rows.reshape(-1, 2, config.head_dim // 2, config.dim).swapaxes(1, 2).reshape(rows.shape)

    renamed = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    tensors = {f"{ours}.weight": theirs[f"{name}.weight"] for ours, name in renamed.items()}
    for layer in range(config.num_layers):
        here, there = f"layers.{layer}.", f"model.layers.{layer}."
        for ours, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "o")):
            weight = theirs[f"{there}self_attn.{name}_proj.weight"]
            tensors[f"{here}attention.w{ours}.weight"] = interleaved(weight) if ours in "qk" else weight
        tensors[f"{here}attention_norm.weight"] = theirs[f"{there}input_layernorm.weight"]
        tensors[f"{here}ffn_norm.weight"] = theirs[f"{there}post_attention_layernorm.weight"]
        tensors[f"{here}block_sparse_moe.gate.weight"] = theirs[f"{there}block_sparse_moe.gate.weight"]
        for name in ("w1", "w2", "w3"):
            each = [theirs[f"{there}block_sparse_moe.experts.{e}.{name}.weight"] for e in range(4)]
            tensors[f"{here}block_sparse_moe.{name}"] = np.concatenate([w.T if name == "w2" else w for w in each])
    folder = tmp_path / "mistral"
    folder.mkdir()
    for part in range(3):
        some = {name: torch.from_numpy(np.ascontiguousarray(tensors[name])) for name in sorted(tensors)[part::3]}
        torch.save(some, folder / f"consolidated.{part:02}.pth")
    params = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 24}
    params |= {"vocab_size": 40, "norm_eps": 1e-5, "moe": {"num_experts": 4, "num_experts_per_tok": 2}}
    (folder / "params.json").write_text(json.dumps(params))
    source = open_source(folder)
    assert source.config == config
    assert "params.json has no rope_theta: 1e+06 is assumed, since no window is set" in source.notes
    published = open_source(tmp_path / "hf")
    for tensor in source.tensors:
        np.testing.assert_array_equal(source.read(tensor), published.read(tensor))

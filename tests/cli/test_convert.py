"""The verbs that write and look at weights, on a trained toy."""

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtral_jax as mj


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("def f1(x):\n    return x + 1\n\n\n" * 6)
    return path


def test_a_run_goes_through_every_format(run, whole, tmp_path, text):
    chain = [whole[0]]
    for to in ("huggingface", "consolidated", "native"):
        status, out, err = run("convert", chain[-1], tmp_path / to, "--to", to)
        assert (status, out) == (0, f"wrote {tmp_path / to}\n"), err
        chain.append(tmp_path / to)
    tokens = np.arange(3, 63).reshape(2, 30)
    models = [mj.load(path, dtype="float32") for path in chain]
    for model in models[1:]:
        assert model.config == models[0].config
        assert model.tokenizer.encode("def f(x): é") == models[0].tokenizer.encode("def f(x): é")
        np.testing.assert_array_equal(model.logits(tokens), models[0].logits(tokens))
    theirs = AutoModelForCausalLM.from_pretrained(chain[1]).eval()
    assert theirs.config.model_type == "mixtral"
    assert AutoTokenizer.from_pretrained(chain[1]).encode("def f(x)") == models[0].tokenizer.encode(
        "def f(x)", bos=True
    )
    status, out, _ = run("generate", chain[-1], "--prompt", "def f", "--max-new-tokens", 3)
    assert status == 0
    assert out.startswith("def f")
    status, out, _ = run("perplexity", chain[-1], text, "--window", 32, "--dtype", "float32", "--json")
    found = json.loads(out)
    assert (status, found["window"], found["stride"]) == (0, 32, 16)
    assert found["perplexity"] == pytest.approx(models[0].perplexity(text.read_text(), 32).value, rel=1e-6)
    assert "bits a byte" in run("perplexity", chain[-1], text, "--window", 32)[1]


def test_inspect_weights(run, whole, tmp_path):
    run("convert", whole[0], tmp_path / "hf", "--to", "huggingface", "--dtype", "bfloat16")
    status, out, _ = run("inspect", tmp_path / "hf", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["format"] == "Hugging Face, 1 safetensors file"
    assert report["stored"] == {"BF16": report["parameters"]}
    assert report["findings"] == []
    assert "nothing is off" in run("inspect", tmp_path / "hf")[1]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"vocab_size": 299, "num_hidden_layers": 3}))
    status, out, _ = run("inspect", tmp_path / "hf")
    assert status == 0
    assert "missing: model.layers.2.self_attn.q_proj.weight" in out
    assert "model.embed_tokens.weight is [300, 16], [299, 16] is wanted" in out
    assert "the tokenizer has 300 ids, the embedding 299" in out
    status, _, err = run("generate", tmp_path / "hf", "--prompt", "x")
    assert status == 2
    assert "the weights don't fit the config" in err


def test_a_run_is_stored_in_int8(run, whole, tmp_path):
    status, out, _ = run("convert", whole[0], tmp_path / "out", "--to", "native", "--quantize", "int8")
    assert (status, out) == (0, f"wrote {tmp_path / 'out'}\n")
    report = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert report["format"] == "mixtral-jax checkpoint in int8"
    assert report["stored"]["int8"] > 0.6 * report["parameters"]
    assert report["stored"]["int8"] + report["stored"]["float32"] == report["parameters"]
    assert report["findings"] == []
    said = run("generate", tmp_path / "out", "--prompt", "def f", "--max-new-tokens", 5, "--cache-dtype", "int8")
    assert said[0] == 0
    assert (
        said[1]
        == run(
            "generate",
            whole[0],
            "--prompt",
            "def f",
            "--max-new-tokens",
            5,
            "--quantize",
            "int8",
            "--cache-dtype",
            "int8",
        )[1]
    )


def test_refuses(run, whole, tmp_path, text):
    (tmp_path / "there").mkdir()
    for arguments, message in (
        (("convert", whole[0], tmp_path / "there", "--to", "native"), "is there already, and is not written over"),
        (("convert", whole[0], tmp_path / "x", "--to", "gguf"), "'gguf' is not one of"),
        (
            ("convert", whole[0], tmp_path / "x", "--to", "huggingface", "--quantize", "int8"),
            "no part of the huggingface",
        ),
        (("convert", tmp_path / "there", tmp_path / "x", "--to", "native"), "none of the kinds is in this folder"),
        (("upcycle", whole[0], tmp_path / "x"), "is a mixture already"),
        (("perplexity", whole[0], tmp_path / "none.txt"), "can't be read: No such file"),
        (("perplexity", whole[0], text, "--window", "65"), "window = 65: from 2 to the model's 64 positions"),
        (("inspect", tmp_path / "none"), "no such file or folder"),
    ):
        status, _, err = run(*arguments)
        assert status == 2, arguments
        assert message in " ".join(err.split()), (arguments, err)

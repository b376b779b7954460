"""A tokenizer is found in a folder, read with what stands beside it, and refused by name if it is none."""

from __future__ import annotations

import json
import shutil

import pytest
from oracles import mistral

from mixtral_jax.errors import InputError
from mixtral_jax.text.fast import FastTokenizer
from mixtral_jax.text.files import find_tokenizer, load_tokenizer
from mixtral_jax.text.sentencepiece import SentencePieceTokenizer


def test_saved_and_loaded_it_is_the_same(ours, tmp_path):
    path = tmp_path / "new" / "a.model"
    ours.save(path)
    assert load_tokenizer(path).digest == ours.digest
    assert [file.name for file in path.parent.iterdir()] == ["a.model"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file or directory; a SentencePiece .model file, a tokenizer.json or a folder"),
        (b"", "the file is empty; a SentencePiece"),
        (b"not a model", r"\(11 bytes\) is not a whole SentencePiece model"),
        (-40, "is not a whole SentencePiece model"),
    ],
)
def test_what_is_no_model_is_refused_by_name(ours, tmp_path, capfd, content, problem):
    path = tmp_path / "some.model"
    if content == -40:
        ours.save(path)
        content = path.read_bytes()[:-40]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"tokenizer = '.*some\.model': .*{problem}"):
        load_tokenizer(path)
    assert capfd.readouterr().err == ""


def test_a_folder_without_one_is_refused(tmp_path):
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(InputError, match="no tokenizer is in this folder; a SentencePiece"):
        load_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(InputError, match=r"tekken\.json is not supported"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", r"not JSON \(Expecting property name"),
        ("[]", "no tokenizer is in it"),
        ('{"version": "1.0"}', "no tokenizer is in it"),
        ('{"model": {}, "added_tokens": [{"id": 1}]}', r"\{'id': 1\} is no added token"),
        ('{"model": {"type": "BPE"}}', r"not a whole tokenizer\.json"),
        (None, "its decoder is neither byte-level nor SentencePiece's"),
    ],
)
def test_what_is_no_tokenizer_json_is_refused_by_name(smollm2, tmp_path, content, problem):
    path = tmp_path / "tokenizer.json"
    if content is None:
        smollm2.save(path)
        content = json.dumps({**json.loads(path.read_text()), "decoder": {"type": "BPEDecoder", "suffix": "</w>"}})
    path.write_text(content)
    with pytest.raises(InputError, match=rf"tokenizer = '.*tokenizer\.json': .*{problem}"):
        load_tokenizer(path)


def test_the_key_is_the_users(tmp_path):
    with pytest.raises(InputError, match="model = "):
        load_tokenizer(tmp_path, key="model")


def test_the_newest_version_of_mistrals_goes_first(ours, v1, tmp_path):
    ours.save(tmp_path / "tokenizer.model")
    assert find_tokenizer(tmp_path).name == "tokenizer.model"
    shutil.copy(mistral.model_path("v1"), tmp_path / "tokenizer.model.v1")
    loaded = load_tokenizer(tmp_path)
    assert (loaded.digest, loaded.hints.chat_version) == (v1.digest, "v1")
    ours.save(tmp_path / "tokenizer.model.v3")
    assert find_tokenizer(tmp_path).name == "tokenizer.model.v3"


def test_a_model_of_any_name_with_a_version_is_found(v2, tmp_path):
    shutil.copy(mistral.model_path("v2"), tmp_path)
    assert load_tokenizer(tmp_path).hints.chat_version == "v2"
    assert load_tokenizer(tmp_path).digest == v2.digest


def test_tokens_that_a_fine_tune_added_win_over_the_model(v1, fast_v1, tmp_path):
    v1.save_into(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition["added_tokens"].append({"id": 32000, "content": "<|im_end|>", **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, FastTokenizer)
    assert (loaded.vocab_size, loaded.controls["<|im_end|>"]) == (32001, 32000)
    assert loaded.encode("some text") == v1.encode("some text")

    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 32000}')
    with pytest.raises(InputError, match=r"tokens up to 32000 are added to the 32000 of tokenizer\.model\S*; token"):
        load_tokenizer(tmp_path)


def test_what_stands_beside_is_read(v1, smollm2, tmp_path):
    v1.save(tmp_path / "tokenizer.model")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    config = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_ids, loaded.chat_template) == ((2, 7), "D")
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(tmp_path / "tokenizer.model").chat_template == "J"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(InputError, match=r"tokenizer_config\.json': its chat_template is neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("3")
    with pytest.raises(InputError, match=r"tokenizer\.json': no tokenizer is in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json': not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config.json": {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}},
        {"special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}},
        {"generation_config.json": {"bos_token_id": 1, "eos_token_id": 2}},
    ],
)
def test_the_ends_of_a_tokenizer_json_come_from_beside(smollm2, tmp_path, beside):
    smollm2.save(tmp_path / "tokenizer.json")
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.eos_ids, loaded.adds_bos) == (1, 2, (2,), False)


def test_whether_a_text_begins_with_a_token_comes_from_beside(fast_v1, tmp_path):
    fast_v1.save_into(tmp_path)
    assert load_tokenizer(tmp_path).adds_bos
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    assert not load_tokenizer(tmp_path).adds_bos


@pytest.mark.parametrize("layout", ["huggingface", "consolidated", "native"])
@pytest.mark.parametrize("name", ["v1", "v2", "v3", "smollm2", "ours"])
def test_saved_into_a_folder_and_loaded_it_is_the_same(request, tmp_path, layout, name):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_into(tmp_path, layout)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.digest == tokenizer.digest
    assert (loaded.hints, loaded.eos_ids) == (tokenizer.hints, tokenizer.eos_ids)


def test_all_ends_and_the_template_are_saved(v3, tmp_path):
    model = mistral.model_path("v3").read_bytes()
    tokenizer = SentencePieceTokenizer(model, v3.hints.__class__("{{ bos_token }}", "v3", (9,)))
    for layout in ("huggingface", "consolidated", "native"):
        tokenizer.save_into(tmp_path / layout, layout)
        loaded = load_tokenizer(tmp_path / layout)
        assert (loaded.eos_ids, loaded.chat_template, loaded.hints.chat_version) == ((2, 9), "{{ bos_token }}", "v3")

"""A tokenizer.json gives what the library gives, without what it does with special tokens."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from oracles import smollm

from mixtral_jax.text.fast import FastTokenizer, Names

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def changed(tokenizer: FastTokenizer, names: Names | None = None, **parts) -> FastTokenizer:
    """The same with other parts in its file."""
    return FastTokenizer(json.dumps({**json.loads(tokenizer._content), **parts}), names or tokenizer._names)


@pytest.fixture(scope="module")
def library(smollm2) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(smollm2._content)


@given(ids=st.lists(st.one_of(st.integers(0, 49151), st.integers(17, 280))))
def test_bytes_are_decoded_as_the_library_does(smollm2, library, ids):
    assert smollm2.decode(ids) == library.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def library_v1(fast_v1) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(fast_v1._content)


# Bytes apart: the library turns a whole run of them into U+FFFD if one is stray.
@given(ids=st.lists(st.one_of(st.integers(0, 2), st.integers(259, 31999))))
def test_pieces_are_decoded_as_the_library_does(fast_v1, library_v1, ids):
    assert fast_v1.decode(ids) == library_v1.decode(ids)


@given(text=TEXTS)
def test_text_without_special_tokens_has_the_librarys_ids(smollm2, library, text):
    assert smollm2.encode(text) == library.encode(text, add_special_tokens=False).ids


@given(text=TEXTS)
def test_text_comes_back_but_for_bytes_that_the_model_lacks(smollm2, text):
    text = "".join(character for character in text if not set(character.encode()) & smollm.MISSING_BYTES)
    assert smollm2.decode(smollm2.encode(text)) == text


def test_a_begin_that_the_file_adds_comes_once(fast_v1):
    plain = fast_v1.encode("text")
    assert fast_v1.adds_bos
    assert 1 not in plain
    assert fast_v1.encode("text", bos=True) == [1, *plain]
    assert not changed(fast_v1, post_processor=None).adds_bos


def test_truncation_and_padding_of_the_file_are_not_heeded(smollm2):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    text = "one two three four"
    assert changed(smollm2, truncation=truncation).encode(text) == smollm2.encode(text)
    assert changed(smollm2, padding=padding).encode("one") == smollm2.encode("one")


def test_added_tokens_that_are_not_special_are_text(smollm2):
    added = [
        *json.loads(smollm2._content)["added_tokens"],
        {"id": 49152, "content": "<tool>\u00e9 ", **FLAGS, "special": False},
    ]
    tokenizer = changed(smollm2, added_tokens=added)
    ids = tokenizer.encode("a<tool>\u00e9 b")
    assert 49152 in ids
    assert not tokenizer.is_control(49152)
    assert tokenizer.decode(ids) == "a<tool>\u00e9 b"
    assert tokenizer.vocab_size == 49153


def test_an_end_that_the_file_does_not_call_special_is_a_control(smollm2):
    added = [{**each, "special": False} for each in json.loads(smollm2._content)["added_tokens"]]
    tokenizer = changed(smollm2, added_tokens=added)
    assert set(tokenizer.controls) == {"<|im_start|>", "<|im_end|>"}
    assert 2 not in tokenizer.encode("<|im_end|>")
    assert set(changed(smollm2, added_tokens=[]).controls) == {"<|im_start|>", "<|im_end|>"}
    beyond = [*added, {"id": 49152, "content": "<end>", **FLAGS, "special": False}]
    tokenizer = changed(smollm2, Names(eos="<end>"), added_tokens=beyond)
    assert (tokenizer.eos_id, tokenizer.controls) == (49152, {"<end>": 49152})
    assert 49152 not in tokenizer.encode("<end>")


def test_merges_that_would_make_a_control_are_dropped(fast_v1):
    model = json.loads(fast_v1._content)["model"]
    vocabulary = model["vocab"] if "</s" in model["vocab"] else {**model["vocab"], "</s": 32000}
    for merges in ([["<", "/"], ["</", "s"], ["</s", ">"]], ["< /", "</ s", "</s >"]):
        tokenizer = changed(fast_v1, model={**model, "vocab": vocabulary, "merges": merges})
        ids = tokenizer.encode("</s>")
        assert vocabulary["</s"] in ids
        assert 2 not in ids


def test_controls_may_swallow_the_blanks_beside_them(smollm2):
    plain = json.loads(smollm2._content)["added_tokens"]
    added = [{**each, "lstrip": each["id"] == 2, "rstrip": each["id"] == 1} for each in plain]
    tokenizer = changed(smollm2, added_tokens=added)
    library = tokenizers.Tokenizer.from_str(tokenizer._content)
    text = "a <|im_start|> \n b c \t<|im_end|> d<|im_end|>"
    parts = ["a ", 1, " \n b c \t", 2, " d", 2]
    assert tokenizer.encode_parts(parts) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_parts(parts) != smollm2.encode_parts(parts)


@pytest.mark.parametrize("name", ["fast_v1", "fast_v3", "smollm2"])
def test_parts_are_encoded_as_the_library_splits_a_text(request, name):
    tokenizer = request.getfixturevalue(name)
    bos, eos = (tokenizer.control_names[token] for token in (tokenizer.bos_id, tokenizer.eos_id))
    library = tokenizers.Tokenizer.from_str(tokenizer._content)
    for first, second, third in [("", " Hi", "Yo"), ("x", "Hi there", " a"), (" x", "", "  y")]:
        expected = library.encode(f"{first}{bos}{second}{eos}{third}", add_special_tokens=False).ids
        parts = [part for part in (first, tokenizer.bos_id, second, tokenizer.eos_id, third) if part != ""]
        assert tokenizer.encode_parts(parts) == expected


def test_an_id_beyond_the_vocabulary_is_silent(smollm2):
    assert smollm2.decode([17, 60000, 18]) == '!"'


def test_the_digest_depends_on_the_ends(smollm2):
    assert changed(smollm2).digest != changed(smollm2, Names(eos="<|endoftext|>")).digest

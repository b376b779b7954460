"""Text goes to ids and back unchanged, whole and token by token, whatever file the tokenizer came from."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracles.smollm import MISSING_BYTES

from mixtral_jax.text.tokenizer import StreamDecoder

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
ALL = ["ours", "with_dummy_prefix", "v1", "v3", "fast_v1", "fast_v3", "smollm2"]
CONTROLS = "<s>[INST]</s><unk><|im_start|>user<|im_end|>[TOOL_CALLS][/INST]<|endoftext|>[control_8]"


@given(TEXTS)
@example("")
@example("  two, then a tab\t, a line\r\n\n\n        deep\n ")
@example("\u2581a\u2581\u2581 b\n\u2581   ")
@example("<s>[INST]</s><unk><0x0A>\u2047\ufeff\ufffd\0")
@example("\U0001f600\u0301 \u4f60\u597d")
def test_text_comes_back_unchanged(ours, text):
    assert ours.decode(ours.encode(text)) == text


@given(TEXTS)
def test_streamed_text_comes_back_unchanged(ours, text):
    decoder = StreamDecoder(ours)
    assert "".join(map(decoder.feed, ours.encode(text))) + decoder.flush() == text


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_streaming_any_ids_equals_decoding_them(request, name, data):
    tokenizer = request.getfixturevalue(name)
    some = [*range(8), *tokenizer.encode("  \u20ac"), *range(100, 103)]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(some), st.integers(0, tokenizer.vocab_size - 1))))
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_a_character_of_four_bytes_is_streamed_whole(ours):
    ids = ours.encode("a\U0001f600b")
    decoder = StreamDecoder(ours)
    assert [decoder.feed(token) for token in ids] == ["a", "", "", "", "\U0001f600", "b"]


def test_flush_gives_what_was_held_back(ours):
    decoder = StreamDecoder(ours)
    assert [decoder.feed(token) for token in ours.encode("\U0001f600")[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd\ufffd"
    assert decoder.flush() == ""


def test_the_dummy_prefix_is_dropped_at_the_start_only(with_dummy_prefix):
    ids = with_dummy_prefix.encode("self self")
    assert with_dummy_prefix.decode(ids) == "self self"
    decoder = StreamDecoder(with_dummy_prefix, after=with_dummy_prefix.encode("self", bos=True))
    assert "".join(map(decoder.feed, with_dummy_prefix.encode("self"))) == " self"


def test_a_model_that_wants_no_begin_gets_none(smollm2):
    plain = smollm2.encode("start")
    assert smollm2.bos_id == 1
    assert smollm2.encode("start", bos=True, eos=True) == [*plain, 2]


def test_begin_and_end_are_added_when_asked(ours):
    plain = ours.encode("start")
    assert ours.encode("start", bos=True, eos=True) == [1, *plain, 2]
    assert ours.decode([1, *plain, 2]) == "start"


@pytest.mark.parametrize("name", ALL)
@given(text=st.lists(st.one_of(TEXTS, st.sampled_from(["<s>", "</s>", "[INST]", "<|im_end|>", "[TOOL_CALLS]"]))))
@example([CONTROLS])
@example([" ", CONTROLS, " "])
def test_text_never_becomes_a_control_id(request, name, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("".join(text))
    assert not any(map(tokenizer.is_control, ids))
    can_write = "\u2581" not in "".join(text) and (name != "smollm2" or not set("".join(text).encode()) & MISSING_BYTES)
    assert not can_write or tokenizer.decode(ids) == "".join(text)


def test_no_control_by_its_own_name(v3, fast_v3, smollm2):
    for tokenizer in (v3, fast_v3, smollm2):
        assert len(tokenizer.controls) > 15
        for name, token in tokenizer.controls.items():
            assert tokenizer.is_control(token)
            assert not any(map(tokenizer.is_control, tokenizer.encode(name)))


@pytest.mark.parametrize("name", ALL)
def test_a_stream_after_a_prompt_goes_on_from_it(request, name):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("Say: \U0001f600 it is")
    for cut in range(1, len(ids)):
        decoder, before = StreamDecoder(tokenizer, after=ids[:cut]), StreamDecoder(tokenizer)
        start = "".join(map(before.feed, ids[:cut]))
        assert start + "".join(map(decoder.feed, ids[cut:])) + decoder.flush() == "Say: \U0001f600 it is"


@given(st.lists(TEXTS))
def test_a_batch_equals_its_texts_apart(ours, smollm2, texts):
    for tokenizer in (ours, smollm2):
        assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]

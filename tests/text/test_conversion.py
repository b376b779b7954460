"""A SentencePiece model as a tokenizer.json gives the same ids, in the library and in transformers."""

from __future__ import annotations

from functools import cache

import pytest
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from mixtral_jax.text.conversion import fast_from_sentencepiece
from mixtral_jax.text.fast import FastTokenizer
from mixtral_jax.text.sentencepiece import SentencePieceTokenizer

# U+2581 is a space to a tokenizer.json, and a text that begins with a user-defined piece gets no space there.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
PROSE = "  It's  3.14 or 100,000:\n\n\tna\u00efve \u4f60\u597d \U0001f600\u0301 </s>[INST] [REFERENCE_DOC_3] x\t \t<s>"


@cache
def as_json(tokenizer: SentencePieceTokenizer) -> FastTokenizer:
    return fast_from_sentencepiece(tokenizer._model, tokenizer.hints)


@pytest.mark.parametrize("name", ["v1", "v3", "ours", "with_dummy_prefix"])
@given(
    text=st.lists(st.one_of(TEXTS, st.sampled_from(["  ", " the", "\n\n  ", "    ", "ing", "12", "aaa"]))).map("".join)
)
@example(PROSE)
@example(" " * 37)
@example("a" * 50)
def test_ids_and_text_are_the_same(request, name, text):
    tokenizer = request.getfixturevalue(name)
    fast = as_json(tokenizer)
    assert fast.encode(text) == tokenizer.encode(text)
    assert fast.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("name", ["v1", "v3", "ours", "smollm2"])
def test_transformers_reads_the_same_ids(request, name, tmp_path, code):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_into(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*code, "", " ", "  two  3 ", " it's \u4f60\U0001f600\n\n", "1  234.5   x"):
        ids = tokenizer.encode(text, bos=True)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    ends = (theirs.bos_token_id, theirs.eos_token_id, theirs.chat_template)
    assert ends == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template)
    assert name != "smollm2" or theirs.chat_template.startswith("{% for message")

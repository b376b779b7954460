"""The tokenizers that the tests of text share."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from oracles import mistral, smollm

from mixtral_jax.text.conversion import fast_from_sentencepiece
from mixtral_jax.text.files import load_tokenizer
from mixtral_jax.text.gguf_vocabulary import tokenizer_from_gguf
from mixtral_jax.text.sentencepiece import SentencePieceTokenizer
from mixtral_jax.text.tokenizer import Tokenizer
from mixtral_jax.text.training import train_tokenizer

CODE = '''def total(values, start=0):
    """The sum of all values."""
    for value in values:
        if value is not None:
            start += value

    return start


class Account:
    def __init__(self, owner):
        self.owner = owner
        self.balance = 2024
'''
VARIANTS = [CODE.replace("value", name).replace("owner", name * 2) for name in ("item", "word", "number", "line")]


@pytest.fixture(scope="session")
def code() -> list[str]:
    """Some documents to learn from."""
    return [CODE, *VARIANTS]


@pytest.fixture(scope="session")
def ours(code) -> SentencePieceTokenizer:
    return train_tokenizer(code, 352)


@pytest.fixture(scope="session")
def with_dummy_prefix() -> SentencePieceTokenizer:
    """A model that puts a space before the text, as Mistral's do."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="session")
def v1() -> SentencePieceTokenizer:
    return load_tokenizer(mistral.model_path("v1"))


@pytest.fixture(scope="session")
def v2() -> SentencePieceTokenizer:
    return load_tokenizer(mistral.model_path("v2"))


@pytest.fixture(scope="session")
def v3() -> SentencePieceTokenizer:
    return load_tokenizer(mistral.model_path("v3"))


@pytest.fixture(scope="session")
def fast_v1(v1) -> Tokenizer:
    """Version 1 as a tokenizer.json."""
    return fast_from_sentencepiece(v1._model, v1.hints)


@pytest.fixture(scope="session")
def fast_v3(v3) -> Tokenizer:
    """Version 3 as a tokenizer.json."""
    return fast_from_sentencepiece(v3._model, v3.hints)


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """A byte-level tokenizer with ChatML's controls."""
    return tokenizer_from_gguf(smollm.metadata())

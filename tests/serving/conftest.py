"""What the tests of the server share."""

from __future__ import annotations

import pytest
from oracles import mistral, smollm
from stub_server import stub

from mixtral_jax.text.files import load_tokenizer
from mixtral_jax.text.gguf_vocabulary import tokenizer_from_gguf


@pytest.fixture(scope="session")
def v1():
    return load_tokenizer(mistral.model_path("v1"))


@pytest.fixture(scope="session")
def v2():
    return load_tokenizer(mistral.model_path("v2"))


@pytest.fixture(scope="session")
def v3():
    return load_tokenizer(mistral.model_path("v3"))


@pytest.fixture(scope="session")
def smollm2():
    """A byte-level tokenizer with ChatML's controls, and a template."""
    return tokenizer_from_gguf(smollm.metadata())


@pytest.fixture(scope="session")
def server(v3):
    """One that says ANSWER to all, in the format v3."""
    with stub(v3) as started:
        yield started


@pytest.fixture(scope="session", params=[1, 4], ids=lambda tokens: f"{tokens} tokens a step")
def paced(request, v3):
    """One that brings so many tokens at a time."""
    with stub(v3, tokens_a_step=request.param) as started:
        yield started

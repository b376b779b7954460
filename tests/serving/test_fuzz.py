"""Whatever JSON comes: an answer or a refusal, never a failure."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stub_server import NAME, error_of, settle, stub, user

from mixtral_jax.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

BODIES = {
    "/v1/completions": (CompletionRequest, {"model": NAME, "prompt": "Hi"}),
    "/v1/chat/completions": (ChatRequest, {"model": NAME, "messages": user("Hi")}),
    "/tokenize": (TokenizeRequest, {"prompt": "Hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 5]}),
}
WORDS = [
    "",
    "a",
    "user",
    "assistant",
    "tool",
    "function",
    "json_object",
    "json_schema",
    "auto",
    "any",
    "</s>",
    "\ud83d",
    "\0",
]
KEYS = [
    "role",
    "content",
    "type",
    "text",
    "name",
    "function",
    "parameters",
    "schema",
    "json_schema",
    "tool_calls",
    "id",
]
NUMBERS = [0, 1, 2, -1, 0.5, 2**31, 2**63, 2**64, 1e308, True, False]
JSON = st.recursive(
    st.one_of(
        st.none(), st.sampled_from(NUMBERS), st.integers(), st.floats(), st.sampled_from(WORDS), st.text(max_size=4)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def server(v3):
    with stub(v3, tokens_a_step=64, settings={"max_texts": 8}) as started:
        yield started
        settle(started)


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_makes_the_server_fail(server, path, data):
    kind, good = BODIES[path]
    names = [field.alias or name for name, field in kind.model_fields.items()]
    changes = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    content = json.dumps(good | changes)
    answer = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    if answer.status_code != 200:
        assert answer.status_code in (400, 404)
        error_of(answer, answer.status_code)
    else:
        assert '"error"' not in answer.text or "schema_too_hard" in answer.text

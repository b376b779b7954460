"""What a request may not be is refused with a 4xx and the reason, and the next request is answered."""

from __future__ import annotations

import json

import pytest
from stub_server import NAME, error_of, user

PROMPT = {"model": NAME, "prompt": "Hi"}
CHAT = {"model": NAME, "messages": user("Hi")}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
DEEP = "[" * 100_000 + "]" * 100_000
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "objekt"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

BODIES = {
    "nothing": b"",
    "no JSON": b"prompt=Hi",
    "truncated": json.dumps(PROMPT).encode()[:-4],
    "a list": b"[]",
    "a number": b"1",
    "not UTF-8": b'{"model": "toy", "prompt": "\xff\xfe"}',
    "NUL": b'{"model": "toy", "prompt": "a\x00b"}',
    "NaN": b'{"model": "toy", "prompt": "Hi", "temperature": NaN}',
    "infinity": b'{"model": "toy", "prompt": "Hi", "temperature": Infinity}',
    "an exponent without end": b'{"model": "toy", "prompt": "Hi", "temperature": 1e999}',
    "ten thousand digits": b'{"model": "toy", "prompt": "Hi", "seed": ' + b"9" * 10_000 + b"}",
    "half a surrogate pair": b'{"model": "toy", "prompt": "\\ud83d"}',
    "nested deeply": f'{{"model": "toy", "prompt": {DEEP}}}'.encode(),
    "objects nested deeply": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
}
PROMPTS = {
    "no model": ({"model": None}, "model"),
    "a model of another type": ({"model": 1}, "model"),
    "no prompt": ({"prompt": None}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "an empty list": ({"prompt": []}, "prompt"),
    "a list with an empty text": ({"prompt": ["Hi", ""]}, "prompt"),
    "no ids": ({"prompt": [[]]}, "prompt"),
    "a number": ({"prompt": 5}, "prompt"),
    "ids and texts": ({"prompt": [1, "a"]}, "prompt"),
    "a boolean as id": ({"prompt": [True]}, "prompt"),
    "an id over the vocabulary": ({"prompt": [1, 32768]}, "prompt"),
    "a negative id": ({"prompt": [-1]}, "prompt"),
    "a float as id": ({"prompt": [1.0]}, "prompt"),
    "an id of 2 ** 63": ({"prompt": [2**63]}, "prompt"),
    "ten thousand prompts": ({"prompt": ["Hi"] * 10_000}, "prompt"),
    "U+0000": ({"prompt": "a\0b"}, "prompt"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens -1": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens 1e9": ({"max_tokens": 10**9}, "max_tokens"),
    "max_tokens 1e9 as a float": ({"max_tokens": 1e9}, "max_tokens"),
    "max_tokens as text": ({"max_tokens": "5"}, "max_tokens"),
    "max_tokens true": ({"max_tokens": True}, "max_tokens"),
    "n 0": ({"n": 0}, "n"),
    "n 1e6": ({"n": 10**6}, "n"),
    "best_of under n": ({"n": 3, "best_of": 2}, None),
    "best_of 1e6": ({"best_of": 10**6}, "n"),
    "the best, streamed": ({"best_of": 2, "stream": True}, None),
    "temperature -1": ({"temperature": -1}, "temperature"),
    "temperature 1e308": ({"temperature": 1e308}, "temperature"),
    "temperature as text": ({"temperature": "1"}, "temperature"),
    "top_p 0": ({"top_p": 0}, "top_p"),
    "top_p 1.5": ({"top_p": 1.5}, "top_p"),
    "top_k -5": ({"top_k": -5}, "top_k"),
    "top_k 2 ** 40": ({"top_k": 2**40}, "top_k"),
    "min_p 2": ({"min_p": 2}, "min_p"),
    "repetition_penalty 0": ({"repetition_penalty": 0}, "repetition_penalty"),
    "a thousand stop strings": ({"stop": ["a"] * 1000}, "stop"),
    "an empty stop": ({"stop": ""}, "stop[0]"),
    "an empty stop among others": ({"stop": ["a", ""]}, "stop[1]"),
    "stop as a number": ({"stop": 3}, "stop"),
    "logprobs 1e6": ({"logprobs": 10**6}, "logprobs"),
    "logprobs -1": ({"logprobs": -1}, "logprobs"),
    "logprobs with echo": ({"logprobs": 1, "echo": True}, None),
    "seed -1": ({"seed": -1}, "seed"),
    "seed 2 ** 64": ({"seed": 2**64}, "seed"),
    "stream as text": ({"stream": "yes"}, "stream"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, None),
    "a penalty that is not offered": ({"presence_penalty": 0.5}, "presence_penalty"),
    "biases": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "a typo": ({"temprature": 1}, "temprature"),
}
CHAT_CASES = {
    "no messages": ({"messages": None}, "messages"),
    "an empty list": ({"messages": []}, "messages"),
    "text": ({"messages": "Hi"}, "messages"),
    "a message that is none": ({"messages": ["Hi"]}, "messages[0]"),
    "a bad role": ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
    "no role": ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    "the assistant last": ({"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, "messages[1].role"),
    "U+0000": ({"messages": user("a\0")}, "messages[0].content"),
    "two limits": ({"max_tokens": 2, "max_completion_tokens": 2}, None),
    "top_logprobs alone": ({"top_logprobs": 2}, None),
    "top_logprobs 21": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "a tool that is none": ({"tools": [{"type": "function"}]}, "tools[0]"),
    "a tool's name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    "tool_choice without tools": ({"tool_choice": "auto"}, None),
    "tool_choice of another tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        None,
    ),
    "tool_choice as a number": ({"tools": [TOOL], "tool_choice": 1}, "tool_choice"),
    "a format that is none": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "a schema that is none": ({"response_format": SCHEMA}, "response_format"),
    "json_schema without one": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "n 65": ({"n": 65}, "n"),
}


@pytest.fixture
def http(server):
    """Raw HTTP to a server of which each test leaves a working one."""
    yield server.http
    good = server.http.post(COMPLETIONS, json={**PROMPT, "max_tokens": 2})
    assert good.status_code == 200
    assert server.worker.open_texts == 0


def post(http, path, body):
    return http.post(path, content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/tokenize", "/detokenize"])
def test_bodies(http, path, body):
    error = error_of(post(http, path, body))
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("change", "param"), PROMPTS.values(), ids=PROMPTS)
def test_completions(http, change, param):
    error = error_of(http.post(COMPLETIONS, json=PROMPT | change))
    assert error["param"] == param
    assert (param or next(iter(change))).partition("[")[0] in error["message"]


@pytest.mark.parametrize(("change", "param"), CHAT_CASES.values(), ids=CHAT_CASES)
def test_chats(http, change, param):
    assert error_of(http.post(CHATS, json=CHAT | change))["param"] == param


def test_messages_name_key_value_and_what_is_allowed(http):
    told = error_of(http.post(COMPLETIONS, json={**PROMPT, "top_p": 1.5}))
    assert told["message"] == "top_p = 1.5: input should be less than or equal to 1"
    told = error_of(http.post(COMPLETIONS, json={**PROMPT, "temprature": 1}))
    assert told["message"] == "temprature = 1: unknown key; did you mean 'temperature'?"
    assert told["code"] == "unknown_parameter"
    told = error_of(http.post(COMPLETIONS, json={"model": NAME}))
    assert (told["message"], told["code"]) == ("prompt: missing", "missing_required_parameter")
    told = error_of(http.post(COMPLETIONS, json={**PROMPT, "prompt": [1, 40000]}))
    assert told["message"] == "prompt = 40000: token ids go from 0 to 32767"


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_content_type(http, path):
    error_of(http.post(path, content=json.dumps(PROMPT)), 415)
    error_of(http.post(path, data={"prompt": "Hi"}), 415)
    good = http.post(
        COMPLETIONS, content=json.dumps(PROMPT), headers={"Content-Type": "Application/JSON; charset=utf-8"}
    )
    assert good.status_code == 200


@pytest.mark.parametrize("name", ["other", "../toy", "..%2f..%2fetc%2fpasswd", "toy%2f..", "toy%00", "a" * 5000])
def test_models_of_other_names(http, name):
    error = error_of(http.get(f"/v1/models/{name}"), 404)
    assert error["type"] == "not_found_error"
    for path, body in ((COMPLETIONS, PROMPT), (CHATS, CHAT), ("/tokenize", {"prompt": "Hi"})):
        assert error_of(http.post(path, json=body | {"model": name}), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", COMPLETIONS, 405),
        ("PUT", CHATS, 405),
        ("DELETE", f"/v1/models/{NAME}", 405),
        ("POST", "/health", 405),
    ],
)
def test_routes_and_verbs(http, verb, path, status):
    error_of(http.request(verb, path), status)


def test_a_prompt_at_and_one_over_the_context(http, server):
    limit = server.engine.max_length
    for length, new, status in [(limit - 3, 3, 200), (limit - 2, 3, 400), (limit, 1, 400), (limit + 1, 1, 400)]:
        answer = http.post(COMPLETIONS, json={**PROMPT, "prompt": [5] * length, "max_tokens": new})
        assert answer.status_code == status
        if status == 400:
            error = error_of(answer)
            assert error["code"] == "context_length_exceeded"
            assert f"the prompt has {length} tokens" in error["message"]
    # Without a number the answer takes the room that is left, and none is left at the limit.
    full = http.post(COMPLETIONS, json={**PROMPT, "prompt": [5] * (limit - 1)})
    assert full.json()["usage"]["completion_tokens"] == 1
    error_of(http.post(COMPLETIONS, json={**PROMPT, "prompt": [5] * limit}))


def test_a_key_that_is_null_is_as_if_not_there(http):
    nulls = dict.fromkeys(("max_tokens", "n", "stop", "stream", "temperature", "user", "stream_options"))
    assert http.post(COMPLETIONS, json=PROMPT | nulls).status_code == 200


def test_tokens_that_are_none(http):
    for tokens in ([-1], [32768], [2**63], [1.5], "5", [None]):
        error_of(http.post("/detokenize", json={"tokens": tokens}))
    error_of(http.post("/tokenize", json={}))
    error_of(http.post("/tokenize", json={"prompt": "a", "messages": user("a")}))

"""Tool calls are read out of an answer, and an answer that only looks like one is text."""

from __future__ import annotations

import json

import pytest
from oracles import mistral

from mixtral_jax.text.chat import encode_chat
from mixtral_jax.text.tool_calls import new_call_id, parse_answer

USER = {"role": "user", "content": "How warm is it?"}
CALLS = 5


def call(name="weather", arguments='{"city": "\u00c9vian </s>"}', call_id="abcdefghi"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(tokenizer, messages) -> list[int]:
    """What the model would have written for the last message: all ids after the question's."""
    whole = encode_chat([USER, *messages], tokenizer, complete=True)
    return whole[len(encode_chat([USER], tokenizer)) :]


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_calls_come_back(request, version):
    tokenizer = request.getfixturevalue(version)
    calls = [call(), call("now", "{}", "123456789"), call("f", '{"a": [1, null, 2.5, "x"]}', "zzzzzzzzz")]
    ids = answer(tokenizer, [{"role": "assistant", "tool_calls": calls}])
    assert ids[0] == CALLS
    content, found = parse_answer(ids, tokenizer)
    assert content == ""
    assert [each["function"] for each in found] == [each["function"] for each in calls]
    assert all(each["type"] == "function" for each in found)
    if version == "v3":
        assert [each["id"] for each in found] == [each["id"] for each in calls]


def test_the_calls_that_are_read_can_be_sent_back(v2, v3):
    for tokenizer, version in ((v2, "v2"), (v3, "v3")):
        ids = [CALLS, *tokenizer.encode('[{"name": "f", "arguments": {"x": 1}}]'), 2]
        (found,) = parse_answer(ids, tokenizer).tool_calls
        result = {"role": "tool", "tool_call_id": found["id"], "name": "f", "content": "1"}
        messages = [USER, {"role": "assistant", "tool_calls": [found]}, result]
        assert encode_chat(messages, tokenizer) == mistral.encode(messages, version)


def test_text_is_text(v1, v3, smollm2):
    assert parse_answer(answer(v3, [{"role": "assistant", "content": "22 [TOOL_CALLS] []"}]), v3) == (
        "22 [TOOL_CALLS] []",
        (),
    )
    assert parse_answer([*v1.encode("[TOOL_CALLS] []"), 2], v1) == ("[TOOL_CALLS] []", ())
    assert parse_answer([*smollm2.encode("Hi"), 2], smollm2) == ("Hi", ())


def test_what_was_said_before_the_calls_is_kept(v3):
    ids = [*v3.encode("Let me see."), CALLS, *v3.encode(json.dumps([{"name": "f", "arguments": "{}"}]))]
    content, (found,) = parse_answer(ids, v3)
    assert content == "Let me see."
    assert found["function"] == {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    "text",
    ['[{"name": "f", "argu', '{"name": "f"}', "[1]", "7", '[{"name": 3, "arguments": {}}]', "", '[{"name": "f"}]'],
)
def test_calls_that_are_none_are_text(v3, text):
    assert parse_answer([CALLS, *v3.encode(text), 2], v3) == (text, ())


def test_ids_of_calls_differ_and_have_the_form(v3):
    made = {new_call_id() for _ in range(99)}
    assert len(made) == 99
    assert all(len(each) == 9 and each.isascii() and each.isalnum() for each in made)

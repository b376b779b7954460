"""Calls of functions in Mistral's formats, and answers that are held to a schema."""

from __future__ import annotations

import json

import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import mistral
from stub_server import NAME, stub, user

from mixtral_jax.errors import InputError
from mixtral_jax.serving.grammar import Form, Grammars
from mixtral_jax.serving.tools import CallReader

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 5}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "How warm.", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}}
TOOLS = [WEATHER, NOW]
LISTS = {
    "v2": '[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
    "v3": '[{"name": "weather", "arguments": {"city": "Paris"}, "id": "a1b2c3d4e"}, '
    '{"name": "now", "arguments": {}, "id": "f1b2c3d4e"}]',
}
CALL = {"name": "weather", "arguments": '{"city": "Paris"}'}
CALLED = [("weather", {"city": "Paris"}), ("now", {})]


def says(tokenizer, text, before=""):
    """A script: text, then calls."""
    marker = tokenizer.controls["[TOOL_CALLS]"]
    said = tokenizer.encode(before) if before else []
    return lambda request: [*said, marker, *tokenizer.encode(text), tokenizer.eos_id]


def ask(server, **more):
    body = {"model": NAME, "messages": user("How warm is it?"), "tools": TOOLS}
    return server.openai.chat.completions.create(**body | more)


def streamed(server, **more):
    """A streamed answer put together: content, calls, how it ended."""
    content, calls, finish = "", [], None
    for chunk in ask(server, stream=True, **more):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            assert call.index == len(calls)
            calls.append(call)
        finish = choice.finish_reason or finish
    return content, calls, finish


def named(calls):
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("before", ["", "Let me see."])
def test_calls(request, version, before):
    tokenizer = request.getfixturevalue(version)
    with stub(tokenizer, says(tokenizer, LISTS[version], before)) as server:
        reply = ask(server)
        assert list(server.engine.requests[-1].prompt) == mistral.encode(
            user("How warm is it?"), version, [WEATHER, {**NOW}]
        )
        content, calls, finish = streamed(server)
    (choice,) = reply.choices
    assert choice.finish_reason == finish == "tool_calls"
    assert named(choice.message.tool_calls) == named(calls) == CALLED
    assert choice.message.content == (before or None)
    assert content == before
    for call in (*choice.message.tool_calls, *calls):
        assert call.type == "function"
        assert len(call.id) == 9
    if version == "v3":
        assert [call.id for call in calls] == ["a1b2c3d4e", "f1b2c3d4e"]


def test_a_call_is_streamed_when_it_is_whole(v3):
    with stub(v3, says(v3, LISTS["v3"])) as server:
        places = [chunk.choices[0].delta.tool_calls is not None for chunk in ask(server, stream=True)]
    first, second = (place for place, has_call in enumerate(places) if has_call)
    assert first < second


def test_the_result_goes_back(v3):
    messages = [
        *user("How warm is it?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": CALL}],
        },
        {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": '{"celsius": 22}'},
    ]
    with stub(v3) as server:
        ask(server, messages=messages)
        assert list(server.engine.requests[-1].prompt) == mistral.encode(messages, "v3", TOOLS)


@pytest.mark.parametrize(
    ("text", "content", "calls", "finish"),
    [
        ("no list", "no list", [], "stop"),
        ('{"name": "now", "arguments": {}}', '{"name": "now", "arguments": {}}', [], "stop"),
        ("[]", "[]", [], "stop"),
        ('[{"name": "now"}]', '[{"name": "now"}]', [], "stop"),
        ('[{"name": 3, "arguments": {}}]', '[{"name": 3, "arguments": {}}]', [], "stop"),
        ('[{"name": "now", "arguments": {}}, {"nam', None, ["now"], "tool_calls"),
        ('[{"name": "now", "arguments": {}}} x', None, ["now"], "tool_calls"),
        ('[{"name": "now", "arguments": "{\\"a\\": 1}"}]', None, ["now"], "tool_calls"),
    ],
)
def test_what_is_no_call_is_text(v3, text, content, calls, finish):
    with stub(v3, says(v3, text)) as server:
        (choice,) = ask(server).choices
        assert streamed(server)[0] == (content or "")
    assert (choice.message.content, choice.finish_reason) == (content, finish)
    assert [call.function.name for call in choice.message.tool_calls or []] == calls


def test_calls_that_were_cut_short(v3):
    with stub(v3, says(v3, LISTS["v3"])) as server:
        (choice,) = ask(server, max_tokens=len(v3.encode(LISTS["v3"])) - 5).choices
    assert (choice.finish_reason, named(choice.message.tool_calls)) == ("length", CALLED[:1])


def test_without_tools_calls_are_text(v3):
    with stub(v3, says(v3, LISTS["v3"])) as server:
        for more in ({"tools": []}, {"tool_choice": "none"}):
            (choice,) = ask(server, **more).choices
            assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
            assert list(server.engine.requests[-1].prompt) == mistral.encode(user("How warm is it?"), "v3")


def test_v1_has_no_tools(v1):
    with stub(v1) as server, pytest.raises(openai.BadRequestError, match="the format v1 has no tools"):
        ask(server)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("choice", ["required", "any", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_calls_that_are_asked_for(request, version, choice):
    """The stub draws at random what the grammar allows."""
    tokenizer = request.getfixturevalue(version)
    with stub(tokenizer) as server:
        for seed in range(2):
            (answer,) = ask(server, tool_choice=choice, seed=seed).choices
            assert answer.finish_reason == "tool_calls"
            assert answer.message.content is None
            called = named(answer.message.tool_calls)
            for name, arguments in called:
                tool = {"weather": WEATHER, "now": NOW}[name]
                jsonschema.validate(arguments, tool["function"]["parameters"])
            if isinstance(choice, dict):
                assert [name for name, _ in called] == ["weather"]
        (answer,) = ask(server, tool_choice="required", parallel_tool_calls=False, seed=1).choices
        assert len(answer.message.tool_calls) == 1


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def held_to(schema):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_answers_obey_a_schema(request, version):
    with stub(request.getfixturevalue(version)) as server:
        reply = ask(server, tools=[], response_format=held_to(SCHEMA), n=4, seed=3)
        values = [json.loads(choice.message.content) for choice in reply.choices]
        for value in values:
            jsonschema.validate(value, SCHEMA)
        assert len({json.dumps(value) for value in values}) > 1
        streamed_text = streamed(server, tools=[], response_format=held_to(SCHEMA), seed=3)[0]
        assert streamed_text == reply.choices[0].message.content


def test_any_object(v3):
    with stub(v3) as server:
        (choice,) = ask(server, tools=[], response_format={"type": "json_object"}, seed=2).choices
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        assert choice.message.content.lstrip().startswith("{")
        (choice,) = ask(server, tools=[], response_format={"type": "text"}).choices
        assert choice.message.content.startswith("Deux")


def test_a_schema_or_a_call(v3):
    with stub(v3, lambda request: [v3.controls["[TOOL_CALLS]"]]) as server:
        (choice,) = ask(server, response_format=held_to(SCHEMA), seed=1).choices
        assert choice.finish_reason == "tool_calls"
        (choice,) = ask(server, response_format=held_to(SCHEMA), seed=1, tool_choice="none").choices
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


@pytest.mark.parametrize(
    "schema", [{"type": "objekt"}, {"$ref": "#/nowhere"}, {"not": {}}, {"anyOf": []}, {"properties": 3}]
)
def test_schemas_that_can_not_be_held_to(server, schema):
    with pytest.raises(openai.BadRequestError, match="this schema can't be held to"):
        ask(server, tools=[], response_format=held_to(schema))


def test_a_schema_that_proves_too_hard_is_told(v3, monkeypatch):
    from mixtral_jax.serving import grammar

    with stub(v3) as server:
        monkeypatch.setattr(grammar.Matched, "_note_error", lambda self: setattr(self, "error", "too many states"))
        with pytest.raises(openai.BadRequestError, match="too hard to hold to: too many states"):
            ask(server, tools=[], response_format=held_to(SCHEMA))
        with pytest.raises(openai.APIError, match="too many states"):
            list(ask(server, tools=[], response_format=held_to(SCHEMA), stream=True))


def test_a_grammar_needs_an_end_and_a_marker(v1, v3, monkeypatch):
    with pytest.raises(InputError, match=r"has no control \[TOOL_CALLS\]"):
        Grammars(v1, v1.vocab_size).constraint(Form(tools=TOOLS))
    monkeypatch.setattr(v3, "eos_ids", ())
    with pytest.raises(InputError, match="no end token"):
        Grammars(v3, v3.vocab_size).constraint(Form(schema=SCHEMA))


def test_masks_have_a_bit_for_each_of_the_models_ids(v3):
    for size in (v3.vocab_size, v3.vocab_size + 1, v3.vocab_size + 70):
        constraint = Grammars(v3, size).constraint(Form(schema=SCHEMA))
        words = constraint.allowed()
        assert words.shape == (-(-size // 32),)
        assert not words[v3.vocab_size // 32 :].any()


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer"},
            {"type": "number", "minimum": -2.5, "maximum": 9},
            {"type": "string", "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"enum": ["a", 1, None, "\u00e9"]},
            {"const": {"a": [1, "x"]}},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
        st.builds(
            lambda fields, few: {
                "type": "object",
                "properties": fields,
                "required": list(fields)[:few],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b", "\u00e9 c", '"d"']), inner, min_size=1, max_size=3),
            st.integers(0, 3),
        ),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module", params=["v3", "smollm2"])
def tokenizer(request):
    """One of SentencePiece, one of bytes."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, tokenizer.vocab_size)


@given(schema=SCHEMAS, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_whatever_a_grammar_allows_obeys_the_schema(grammars, tokenizer, schema, seed):
    from stub_engine import StubEngine

    from mixtral_jax.inference.requests import Request

    constraint = grammars.constraint(Form(schema=schema))
    engine = StubEngine(lambda request: [5], max_length=10_000, vocab_size=tokenizer.vocab_size)
    ends = tokenizer.eos_ids
    engine.submit(Request(prompt=(1,), max_new_tokens=400, seed=seed, stop_ids=ends, constraint=constraint))
    ids, ended = [], None
    while ended is None:
        (update,) = engine.step()
        ids += [token.id for token in update.tokens]
        ended = update.ended
    assert constraint.error is None
    if ended == "stop":
        jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)


@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(["f", "g_2"]),
            st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.text(max_size=6), st.none()), max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    indent=st.sampled_from([None, 1]),
)
@settings(max_examples=40, deadline=None)
def test_lists_of_calls_are_read_as_json_is(v3, calls, indent):
    text = json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], indent=indent)
    reader = CallReader(v3)
    for token in v3.encode(text):
        reader.feed(token)
    reader.finish()
    read = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reader.calls]
    assert read == calls
    assert json.loads(reader.text) == json.loads(text)

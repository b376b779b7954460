"""Conversations have the ids that Mistral's own library gives, or are refused where it refuses them."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mistral_common.exceptions import MistralCommonException
from oracles import mistral

from mixtral_jax.errors import InputError
from mixtral_jax.text.chat import chat_format, encode_chat
from mixtral_jax.text.files import load_tokenizer
from mixtral_jax.text.sentencepiece import SentencePieceTokenizer
from mixtral_jax.text.tokenizer import Hints

VERSIONS = ["v1", "v2", "v3"]


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def calls(*ids, name="weather", arguments='{"city": "Paris"}'):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": each, "type": "function", "function": function} for each in ids]}


def result(call_id, content="22"):
    return {"role": "tool", "tool_call_id": call_id, "name": "weather", "content": content}


A, B = "abcdefghi", "123456789"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The temperature \u2103 of \u4f60",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]
S, Q = system("Be brief."), user("How warm is it?")
CONTROLS = "<s>[INST] x [/INST]</s>[TOOL_CALLS][AVAILABLE_TOOLS]<unk>"

PLAIN = {
    "one question": [user("Hi")],
    "empty": [user("")],
    "blanks": [user("  \n "), assistant("  a "), user(" b  ")],
    "only a system prompt": [S],
    "an empty system prompt": [system(""), Q],
    "several turns": [user("a"), assistant("b"), user("c"), assistant("d"), user("e")],
    "system first": [S, Q, assistant("Warm."), user("Thanks")],
    "system prompts joined": [S, system("Be kind."), Q],
    "system in between": [user("a"), S, user("b"), assistant("c"), user("d")],
    "system last": [Q, S],
    "users in a row": [user("a"), user(""), user("b"), assistant("c"), assistant("d"), user("e"), user("f")],
    "assistant first": [assistant("Hello"), Q],
    "system and assistant first": [S, assistant("Hello"), Q],
    "begun": [Q, assistant("It is", prefix=True)],
    "begun with a blank": [Q, assistant("It is ", prefix=True)],
    "begun in two": [Q, assistant("It"), assistant("is", prefix=True)],
    "controls as text": [system(CONTROLS), user(CONTROLS), assistant(CONTROLS), user(CONTROLS)],
    "unicode": [user("\u4f60\u597d \U0001f600\u0301\ufeff\u2581x"), assistant("na\u00efve\r\n\t"), user("\0")],
    "chunks": [user([{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}])],
    "chunks of a system prompt": [system([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), user("c")],
}
WITH_TOOLS = {
    "called": [Q, calls(A), result(A)],
    "answered": [Q, calls(A), result(A), assistant("22 degrees."), user("And now?")],
    "called again": [S, Q, calls(A), result(A), assistant("22."), user("And there?"), calls(B), result(B)],
    "called twice in a turn": [Q, calls(A), result(A), calls(B), result(B)],
    "history of two at once": [Q, calls(A, B), result(A), result(B), assistant("x"), user("y")],
    "JSON results": [Q, calls(A), result(A, '{"t":  1.50, "\u4f60": [null, "\\u00e9"]}')],
    "text results": [Q, calls(A), result(A, "not { JSON")],
    "no result": [Q, calls(A), result(A, "")],
    "result in chunks": [Q, calls(A), result(A, [{"type": "text", "text": "[1,"}, {"type": "text", "text": "2]"}])],
    "controls in calls": [Q, calls(A, arguments=f'{{"city": "{CONTROLS}"}}'), result(A, CONTROLS)],
    "arguments that are no JSON": [Q, calls(A, arguments="{city"), result(A)],
    "no arguments": [Q, calls(A, arguments=""), result(A)],
    "arguments as a dict": [Q, calls(A, arguments={"city": "\u00c9vian"}), result(A)],
}
ONLY_V3 = {"two at once": [Q, calls(A, B), result(A), result(B)]}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PLAIN)
def test_ids_are_mistrals(request, version, name):
    tokenizer = request.getfixturevalue(version)
    assert encode_chat(PLAIN[name], tokenizer) == mistral.encode(PLAIN[name], version)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("tools", [[], TOOLS[:1], TOOLS], ids=len)
@pytest.mark.parametrize("name", [*WITH_TOOLS, "several turns", "system in between", "system last", *ONLY_V3])
def test_ids_with_tools_are_mistrals(request, version, tools, name):
    tokenizer = request.getfixturevalue(version)
    messages = {**PLAIN, **WITH_TOOLS, **ONLY_V3}[name]
    if name in ONLY_V3 and version == "v2":
        with pytest.raises(InputError, match="the format v2 has one result"):
            encode_chat(messages, tokenizer, tools=tools)
        return
    assert encode_chat(messages, tokenizer, tools=tools) == mistral.encode(messages, version, tools)


@pytest.mark.parametrize("version", VERSIONS)
def test_complete_conversations_are_mistrals(request, version):
    tokenizer = request.getfixturevalue(version)
    for messages in (
        [S, Q, assistant("22 ")],
        [Q, assistant("a"), assistant("b")],
        [user("a"), assistant("b"), Q, assistant("c")],
    ):
        assert encode_chat(messages, tokenizer, complete=True) == mistral.encode(messages, version, complete=True)
        assert encode_chat(messages, tokenizer, complete=True)[-1] == 2
    if version != "v1":
        for messages in ([Q, calls(A)], [Q, calls(A), result(A), assistant("22")]):
            assert encode_chat(messages, tokenizer, complete=True) == mistral.encode(messages, version, complete=True)


def test_golden_ids(v1, v3):
    turns = [system("S"), user("Hi"), assistant("Yo"), user("Bye")]
    assert encode_chat([user("Hi")], v1) == [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793]
    assert encode_chat([user("Hi")], v3) == [1, 3, 16127, 4]
    assert encode_chat(turns, v1) == [
        *(1, 733, 16289, 28793, 318, 13, 13, 23809, 733, 28748, 16289, 28793, 627, 28709, 2),
        *(733, 16289, 28793, 2463, 28706, 733, 28748, 16289, 28793),
    ]
    assert encode_chat(turns, v3) == [1, 3, 16127, 4, 1395, 29477, 2, 3, 1086, 781, 781, 2698, 29474, 4]


WORDS = [
    "a",
    " b",
    "[INST]",
    "[/INST]",
    "</s>",
    "[TOOL_CALLS]",
    "  ",
    "\n\n",
    "\u2581",
    "\u4f60",
    "\U0001f600",
    '{"k": [1]}',
    "22",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=4).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
)
SOME = TEXTS.filter(bool)
CONTENTS = st.one_of(TEXTS, st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3))
IDS = st.text("abcXYZ019", min_size=9, max_size=9)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), TEXTS
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=4,
)
NAMES = st.text("abcXYZ019_-", min_size=1, max_size=5)
FUNCTIONS = st.fixed_dictionaries(
    {
        "name": NAMES,
        "parameters": st.dictionaries(st.sampled_from(["title", "description", "$comment"]), TEXTS, max_size=2),
    },
    optional={"description": TEXTS},
)
TOOL_LISTS = st.lists(st.builds(lambda function: {"type": "function", "function": function}, FUNCTIONS), max_size=2)


@st.composite
def conversations(draw, version: str):
    """Turns in an order that is allowed, the model's next, with system prompts anywhere that they may be."""
    messages = draw(st.lists(CONTENTS.map(system), max_size=2))
    for is_last in [False] * draw(st.integers(0, 2)) + [True]:
        messages += draw(st.lists(CONTENTS.map(user), min_size=1, max_size=2))
        if draw(st.integers(0, 4)) == 0:
            messages += [system(draw(CONTENTS)), user(draw(TEXTS))]
        for _ in range(draw(st.integers(0, 2)) if version != "v1" else 0):
            ids = draw(st.lists(IDS, min_size=1, max_size=1 if version == "v2" and is_last else 2))
            arguments = draw(st.one_of(TEXTS, st.dictionaries(TEXTS, VALUES, max_size=2)))
            messages.append(calls(*ids, name=draw(NAMES), arguments=arguments))
            messages += [result(each, draw(CONTENTS)) for each in ids]
        if not is_last:
            messages += draw(st.lists(SOME.map(assistant), min_size=1, max_size=2))
    if draw(st.integers(0, 3)) == 0:
        messages.append(assistant(draw(SOME), prefix=True))
    return messages


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=150)
@given(data=st.data())
def test_ids_of_any_conversation_are_mistrals(request, version, data):
    tokenizer = request.getfixturevalue(version)
    messages = data.draw(conversations(version))
    tools = data.draw(TOOL_LISTS) if version != "v1" else []
    ids = encode_chat(messages, tokenizer, tools=tools)
    assert ids == mistral.encode(messages, version, tools)


MESSAGES = [
    S,
    Q,
    user(""),
    assistant("a"),
    assistant("a", prefix=True),
    calls(A),
    calls(A, B),
    result(A),
    assistant(""),
]


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=300)
@given(messages=st.lists(st.sampled_from(MESSAGES), max_size=6))
def test_any_order_is_refused_where_mistrals_library_refuses_it(request, version, messages):
    # It does not count the calls and results of a conversation's first message, which can hardly be meant.
    assume(not messages or (messages[0]["role"] != "tool" and "tool_calls" not in messages[0]))
    try:
        expected = mistral.encode(messages, version)
    except (MistralCommonException, ValueError):
        with pytest.raises(InputError):
            encode_chat(messages, request.getfixturevalue(version))
    else:
        assert encode_chat(messages, request.getfixturevalue(version)) == expected


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"messages = \[\]: at least one"),
        (["Hi"], r"messages\[0\] = 'Hi': a dict with role and content"),
        ([Q, {"role": "bot", "content": ""}], r"messages\[1\]\.role = 'bot': one of system, user, assistant, tool"),
        ([Q, {"role": "user"}], r"messages\[1\]\.content: missing; the user's message needs a text"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content = 3: a text or a list of texts"),
        ([user([{"type": "image_url"}])], r"messages\[0\]\.content\[0\] = \{'type': 'image_url'\}: only "),
        ([assistant("x")], r"messages\[0\]\.role = 'assistant': system or user is wanted, alone"),
        ([Q, result(A)], r"messages\[1\]\.role = 'tool': after user: system, user, assistant"),
        ([Q, assistant("a"), S], r"messages\[2\]\.role = 'system': after assistant: user, assistant, tool"),
        ([Q, assistant("a")], r"messages\[1\]\.role = 'assistant': the last is the user's or a tool's, or .* prefix"),
        ([Q, assistant("a", prefix=True), Q], r"messages\[1\]\.prefix = True: only the last"),
        ([Q, assistant("")], r"messages\[1\] = 'neither': .* either content or tool_calls"),
        ([Q, {**calls(A), "content": "x"}], r"messages\[1\] = 'both': .* either content or tool_calls"),
        (
            [Q, calls(A), Q, assistant("a", prefix=True)],
            r"messages\[3\] = 'assistant': 1 tool results are missing before it",
        ),
        (
            [Q, calls(A), result(A), result(A), assistant("a", prefix=True)],
            r"messages\[4\] = 'assistant': 1 .* too many",
        ),
        ([Q, assistant("a"), calls(A), result(A)], r"content and tool_calls in a row"),
        ([Q, calls("call_1")], r"messages\[1\]\.tool_calls\[0\]\.id = 'call_1': 9 of a-z"),
        ([Q, calls(A), result("call_1")], r"messages\[2\]\.tool_call_id = 'call_1': 9 of a-z"),
        ([Q, calls(A, name="no name")], r"messages\[1\]\.tool_calls\[0\]\.function\.name = 'no name': 1 to 64"),
        ([Q, {"role": "assistant", "tool_calls": [1]}], r"messages\[1\]\.tool_calls\[0\] = 1: a dict with id"),
        ([Q, calls(A, arguments=3)], r"messages\[1\]\.tool_calls\[0\]\.function\.arguments = 3: JSON as a text"),
        ([user("\ud83d")], r"messages: half of a surrogate pair"),
    ],
)
def test_a_refusal_names_the_message_and_what_is_allowed(v3, messages, problem):
    with pytest.raises(InputError, match=problem):
        encode_chat(messages, v3)


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        (3, r"tools\[1\] = 3: a dict"),
        ({"function": {"name": ""}}, r"tools\[1\]\.function\.name = '': 1 to 64"),
        ({"function": {"name": "f", "parameters": "x"}}, r"tools\[1\]\.function\.parameters = 'x': a JSON schema"),
    ],
)
def test_a_refusal_names_the_tool(v3, tool, problem):
    with pytest.raises(InputError, match=problem):
        encode_chat([Q], v3, tools=[TOOLS[0], tool])


def test_the_first_version_has_no_tools(v1):
    with pytest.raises(InputError, match="tools = 2: the format v1 has no tools"):
        encode_chat([Q], v1, tools=TOOLS)
    with pytest.raises(InputError, match=r"messages\[1\]\.tool_calls = .*: the format v1 has no tools"):
        encode_chat([Q, calls(A)], v1)


def test_a_complete_conversation_ends_with_an_answer(v3):
    for messages in ([Q], [Q, assistant("a", prefix=True)]):
        with pytest.raises(InputError, match=r"a complete conversation ends with the assistant"):
            encode_chat(messages, v3, complete=True)


def test_a_format_that_can_not_be_is_refused(v1):
    with pytest.raises(InputError, match="format = 'v9': one of v1, v2, v3, template"):
        encode_chat([Q], v1, "v9")
    with pytest.raises(InputError, match=r"this tokenizer has no control \[INST\]"):
        encode_chat([Q], v1, "v3")
    with pytest.raises(InputError, match="format = 'template': the tokenizer has no chat template"):
        encode_chat([Q], v1, "template")


# Written as Mistral's own are: the roles alternate, with and without a place for the system prompt.
WRITES_V1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{%- elif m.role == 'assistant' %} {{ m.content + eos_token }}{% else %}{{ raise_exception('no system prompt') }}
{%- endif %}{% endfor %}"""
WRITES_V3 = """{% set s, turns = '', messages %}
{%- if messages[0].role == 'system' %}{% set s, turns = messages[0].content + '\n\n', messages[1:] %}{% endif %}
{{- bos_token }}{% for m in turns %}
{%- if m.role == 'user' %}[INST] {{ (s if loop.last else '') + m.content }}[/INST]
{%- else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
WRITES_LLAMA_2 = WRITES_V3.replace("= messages[0].content", "= '<<SYS>>' + messages[0].content + '<</SYS>>'")
WRITES_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("version", "template", "chosen"),
    [
        ("v1", None, "v1"),
        ("v1", WRITES_V1, "v1"),
        ("v1", WRITES_V3, "v1"),
        ("v1", WRITES_LLAMA_2, "template"),
        ("v1", WRITES_CHATML, "template"),
        ("v1", "{% if", "template"),
        ("v3", WRITES_V3, "v3"),
        ("v3", WRITES_V1, "v3"),
        ("v3", WRITES_CHATML, "template"),
        ("v2", WRITES_V3, "v2"),
        ("v7", WRITES_V3, "template"),
    ],
)
def test_mistrals_templates_mean_its_exact_format(version, template, chosen):
    named = version if version != "v7" else None
    tokenizer = SentencePieceTokenizer(mistral.model_path(version).read_bytes(), Hints(template, named))
    assert chat_format(tokenizer) == chosen


def test_without_a_version_in_the_name_controls_mean_the_third(v1, v2, ours):
    for tokenizer, chosen in ((v1, "v1"), (v2, "v3")):
        assert chat_format(SentencePieceTokenizer(tokenizer._model)) == chosen
    assert chat_format(ours) == "v1"


def test_a_later_version_without_template_is_refused():
    with pytest.raises(InputError, match=r"chat format = 'v7 or later': .* a chat template is wanted"):
        chat_format(load_tokenizer(mistral.model_path("v7")))


def test_a_tokenizer_json_encodes_the_same(fast_v1, fast_v3):
    for tokenizer, version in ((fast_v1, "v1"), (fast_v3, "v3")):
        assert chat_format(tokenizer) == version
        for name in ("system first", "controls as text", "blanks", "users in a row"):
            assert encode_chat(PLAIN[name], tokenizer) == mistral.encode(PLAIN[name], version)

"""Which ids of a conversation are the assistant's: in each of Mistral's formats, with tools, and by a template."""

from __future__ import annotations

import json

import pytest

from mixtral_jax.errors import InputError
from mixtral_jax.text.chat import encode_answers, encode_chat
from mixtral_jax.text.fast import FastTokenizer
from mixtral_jax.text.tokenizer import Hints

SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How warm is it?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}]
FUNCTION = {"name": "weather", "arguments": '{"city": "Paris"}'}
CALL = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": FUNCTION}]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "22"}
CHAT = [SYSTEM, QUESTION, CALL, RESULT, {"role": "assistant", "content": "It is 22."}]
TALK = [SYSTEM, QUESTION, {"role": "assistant", "content": "Yes."}, QUESTION, {"role": "assistant", "content": "No."}]


def spans(encoded):
    """The runs of the assistant's ids, each with the id before it."""
    found, run = [], None
    for before, token, is_answer in zip([None, *encoded.ids], encoded.ids, encoded.answers, strict=False):
        if is_answer and run is None:
            run = (before, [])
            found.append(run)
        if is_answer:
            run[1].append(token)
        else:
            run = None
    return found


def texts(encoded, tokenizer):
    """What each says, without the end id that each has."""
    for _, run in spans(encoded):
        assert run[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in run[:-1]
    return [tokenizer.decode(run[:-1]).strip() for _, run in spans(encoded)]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_answers_of_a_talk(version, request):
    tokenizer = request.getfixturevalue(version)
    encoded = encode_answers(TALK, tokenizer, version)
    assert encoded.ids == encode_chat(TALK, tokenizer, version, complete=True)
    assert texts(encoded, tokenizer) == ["Yes.", "No."]
    if version != "v1":
        assert [before for before, _ in spans(encoded)] == 2 * [tokenizer.controls["[/INST]"]]


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_calls_are_answers_and_results_are_not(version, request):
    tokenizer = request.getfixturevalue(version)
    encoded = encode_answers(CHAT, tokenizer, version, TOOLS)
    assert encoded.ids == encode_chat(CHAT, tokenizer, version, TOOLS, complete=True)
    controls = tokenizer.controls
    (before_call, call), (before_text, text) = spans(encoded)
    assert (before_call, call[0]) == (controls["[/INST]"], controls["[TOOL_CALLS]"])
    assert before_text == controls["[/TOOL_RESULTS]"]
    expected = {"name": "weather", "arguments": {"city": "Paris"}} | ({"id": "abcdefghi"} if version == "v3" else {})
    assert json.loads(tokenizer.decode(call[1:-1])) == [expected]
    assert (tokenizer.decode(text[:-1]).strip(), text[-1]) == ("It is 22.", tokenizer.eos_id)


def test_v2_forgets_the_calls_before_the_last_question(v2, v3):
    longer = [*CHAT, QUESTION, {"role": "assistant", "content": "Still 22."}]
    assert texts(encode_answers(longer, v2, "v2", TOOLS), v2) == ["It is 22.", "Still 22."]
    assert len(spans(encode_answers(longer, v3, "v3", TOOLS))) == 3


def test_a_templates_answers(smollm2):
    encoded = encode_answers(TALK, smollm2, "template")
    assert encoded.ids == encode_chat(TALK, smollm2, "template", complete=True)
    assert texts(encoded, smollm2) == ["Yes.", "No."]
    asked = smollm2.encode("<|im_start|>assistant\n")[-1]
    assert [before for before, _ in spans(encoded)] == [asked, asked]


def with_template(tokenizer, template):
    return FastTokenizer(tokenizer._content, tokenizer._names, Hints(template), tokenizer.adds_bos)


def test_a_template_that_tells_answers_otherwise_later_is_refused(smollm2):
    """Of this one only the last answer is told."""
    template = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = with_template(smollm2, template)
    assert texts(encode_answers(TALK[:3], tokenizer, "template"), tokenizer) == ["Yes."]
    with pytest.raises(InputError, match=r"messages\[2\]: the chat template writes this answer differently"):
        encode_answers(TALK, tokenizer, "template")

"""Conversations to token ids: Mistral's formats v1, v2 and v3 exactly, and Jinja templates of other models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from mixtral_jax.errors import InputError
from mixtral_jax.text.conversation import Conversation, Message, ToolCall, Version, check_name, read_conversation
from mixtral_jax.text.template import encode_with_template, render
from mixtral_jax.text.tokenizer import Tokenizer

ChatFormat = Literal["v1", "v2", "v3", "template"]
FORMATS: tuple[ChatFormat, ...] = ("v1", "v2", "v3", "template")

PROBE = [{"role": role, "content": f"probe{n}"} for n, role in enumerate(("user", "assistant", "user"))]
PROBE_WITH_SYSTEM = [{"role": "system", "content": "rule"}, *PROBE[:1]]


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """How the tokenizer's model wants conversations.

    Without a template, Mistral's own: v1 if the tokenizer lacks the control `[INST]`, else what the file's name ends
    with, else v3 (the vocabulary is no guide: Mistral shipped v2's under the name of v3). With a template, the same
    where it writes a short conversation as Mistral's formats do, blanks aside; any other template is taken itself.

    Raises:
      InputError: the tokenizer is of a later version, which has controls around the system prompt, without a template.
    """
    if tokenizer.chat_template is not None and not _writes_like_mistral(tokenizer, tokenizer.chat_template):
        return "template"
    if "[INST]" not in tokenizer.controls:
        return "v1"
    if "[SYSTEM_PROMPT]" in tokenizer.controls:
        wanted = "this tokenizer's version has no exact format here; one with a chat template is wanted"
        raise InputError("chat format", "v7 or later", wanted)
    return tokenizer.hints.chat_version or "v3"


def _writes_like_mistral(tokenizer: Tokenizer, template: str) -> bool:
    if "[SYSTEM_PROMPT]" in tokenizer.controls:
        return False
    eos = tokenizer.control_names.get(tokenizer.eos_id, "")
    plain = _without_blanks(tokenizer, template, PROBE)
    with_system = _without_blanks(tokenizer, template, PROBE_WITH_SYSTEM)
    return plain == f"[INST]probe0[/INST]probe1{eos}[INST]probe2[/INST]" and with_system in (
        "[INST]ruleprobe0[/INST]",
        None,  # Mistral's first templates refuse a system prompt
    )


def _without_blanks(tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What the template writes, without blanks and the begin token; None if it refuses."""
    try:
        text = render(template, messages, tokenizer)
    except InputError:
        return None
    return "".join(text.split()).removeprefix(tokenizer.control_names.get(tokenizer.bos_id, ""))


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    format: ChatFormat | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    complete: bool = False,
) -> list[int]:
    """The ids of a conversation, the begin token included; text in it never becomes a control id.

    Args:
      messages: dicts as in OpenAI's API: "role" (system, user, assistant, tool), "content" (a text or a list of
        {"type": "text", "text": ...}), the assistant's "tool_calls", a tool's "tool_call_id" and "name". The
        assistant's last message is continued if it has "prefix": True.
      tokenizer: the model's.
      format: None for what `chat_format` says.
      tools: dicts as in OpenAI's API: {"type": "function", "function": {"name", "description", "parameters"}}.
      complete: whether the conversation ends with the assistant's whole answer, as for training. Otherwise the model
        is to answer.

    Raises:
      InputError: naming the message by its index ("messages[2].role") or the tool, what it is and what is allowed.
    """
    chosen = _chosen(tokenizer, format)
    with _told_of_surrogates():
        if chosen == "template":
            return encode_with_template(messages, tokenizer, tools, complete)
        return _encode(read_conversation(messages, chosen, complete), tokenizer, chosen, tools).ids


class Encoded(NamedTuple):
    """A conversation's ids, and which of them are the assistant's, the end of each answer among them."""

    ids: list[int]
    answers: list[bool]


def encode_answers(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    format: ChatFormat | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Encoded:
    """What `encode_chat` gives for a complete conversation, with the assistant's ids told apart, as for training.

    Raises:
      InputError: as `encode_chat`; or a chat template writes an answer differently once more messages follow.
    """
    chosen = _chosen(tokenizer, format)
    with _told_of_surrogates():
        if chosen == "template":
            return _template_answers(messages, tokenizer, tools)
        return _encode(read_conversation(messages, chosen, True), tokenizer, chosen, tools)


def _template_answers(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]]
) -> Encoded:
    """An answer is what the conversation up to it has more than the one that asks for it, up to the last end id."""
    ids = encode_with_template(messages, tokenizer, tools, complete=True)
    answers = [False] * len(ids)
    for place, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        asked = encode_with_template(messages[:place], tokenizer, tools, complete=False)
        told = encode_with_template(messages[: place + 1], tokenizer, tools, complete=True)
        if told[: len(asked)] != asked or ids[: len(told)] != told:
            why = "the chat template writes this answer differently before it is given or once others follow it"
            raise InputError(f"messages[{place}]", None, f"{why}, so that its tokens can't be told apart")
        ends = [spot + 1 for spot in range(len(asked), len(told)) if told[spot] in tokenizer.eos_ids]
        end = ends[-1] if ends else len(told)
        answers[len(asked) : end] = [True] * (end - len(asked))
    return Encoded(ids, answers)


def _chosen(tokenizer: Tokenizer, format: ChatFormat | None) -> ChatFormat:
    chosen = chat_format(tokenizer) if format is None else format
    if chosen not in FORMATS:
        raise InputError("format", chosen, f"one of {', '.join(FORMATS)} is wanted")
    return chosen


@contextmanager
def _told_of_surrogates() -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError:
        raise InputError(
            "messages", None, "half of a surrogate pair is in a text; whole characters are wanted"
        ) from None


def _encode(
    conversation: Conversation, tokenizer: Tokenizer, version: Version, tools: Sequence[Mapping[str, Any]]
) -> Encoded:
    described = [describe_tool(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    if version == "v1":
        if tools:
            raise InputError("tools", len(tools), "the format v1 has no tools")
        parts = _parts_v1(conversation)
    else:
        parts = _parts_v2_v3(conversation, described, version)
    encoded = Encoded([tokenizer.bos_id], [False])
    for part in parts:
        bare = part.part if isinstance(part, Answer) else part
        if isinstance(bare, str):
            bare.encode()  # the tokenizers' own errors do not say what is wrong
            ids = tokenizer.encode(bare)
        else:
            ids = [_control(tokenizer, *bare)]
        encoded.ids.extend(ids)
        encoded.answers.extend([isinstance(part, Answer)] * len(ids))
    return encoded


Bare = str | tuple[str]
"""A text, or the name of a control in a tuple of its own; EOS is the end id, whatever its name."""
EOS = "end"


class Answer(NamedTuple):
    """A part that the assistant writes."""

    part: Bare


Part = Bare | Answer


def _control(tokenizer: Tokenizer, name: str) -> int:
    if name == EOS:
        return tokenizer.eos_id
    if name not in tokenizer.controls:
        raise InputError("format", None, f"this tokenizer has no control {name}, which the formats v2 and v3 need")
    return tokenizer.controls[name]


def _parts_v1(conversation: Conversation) -> Iterator[Part]:
    """The system prompt goes before the first user's message, the one that a conversation begins with."""
    for place, message in enumerate(conversation.messages):
        if message.role == "user":
            prompt = conversation.system if place == 0 else None
            yield f"[INST] {_with_system(prompt, message.content)} [/INST]"
        else:
            yield Answer(message.content)
            yield from map(Answer, _end(message))


def _parts_v2_v3(conversation: Conversation, tools: Sequence[Any], version: Version) -> Iterator[Part]:
    """Tools and the system prompt go with the last user's message; v2 forgets the calls and results before it."""
    last_user = max(place for place, message in enumerate(conversation.messages) if message.role == "user")
    results = 0
    for place, message in enumerate(conversation.messages):
        results = results + 1 if message.role == "tool" and place > last_user else 0
        if version == "v2" and results > 1:
            raise InputError("messages", "several tool results", "the format v2 has one result for each of its turns")
        if message.tool_calls and message.content:
            raise InputError("messages", "content and tool_calls in a row", "the assistant has one of them in a turn")
        if message.role == "user":
            yield from _user(conversation, message, tools, place == last_user)
        elif version == "v2" and place < last_user and (message.role == "tool" or message.tool_calls):
            continue
        elif message.role == "tool":
            yield from (("[TOOL_RESULTS]",), _result(message, version), ("[/TOOL_RESULTS]",))
        else:
            yield from map(Answer, _assistant(message, version))


def _user(conversation: Conversation, message: Message, tools: Sequence[Any], is_last: bool) -> Iterator[Part]:
    if is_last and tools:
        yield from (("[AVAILABLE_TOOLS]",), _json(tools), ("[/AVAILABLE_TOOLS]",))
    prompt = conversation.system if is_last else None
    yield from (("[INST]",), _with_system(prompt, message.content), ("[/INST]",))


def _with_system(prompt: str | None, text: str) -> str:
    return f"{prompt}\n\n{text}" if prompt else text


def _assistant(message: Message, version: Version) -> Iterator[Bare]:
    if message.tool_calls:
        yield from (("[TOOL_CALLS]",), _json([_call(call, version) for call in message.tool_calls]))
    else:
        yield message.content.rstrip(" ")
    yield from _end(message)


def _end(message: Message) -> Iterator[Bare]:
    if not message.prefix:
        yield (EOS,)


def _call(call: ToolCall, version: Version) -> dict[str, Any]:
    described = {"name": call.name, "arguments": call.arguments}
    return {**described, "id": call.id} if version == "v3" else described


def _result(message: Message, version: Version) -> str:
    if version == "v2":
        return _json([{"name": message.name, "content": message.content}])
    return _json({"content": message.content, "call_id": message.call_id})


def describe_tool(tool: Any, key: str) -> dict[str, Any]:
    """A tool as Mistral's formats write it. Raises InputError, under `key`, for what is none."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise InputError(key, tool, 'a dict {"type": "function", "function": {"name": ...}} is wanted')
    name, parameters = function.get("name"), function.get("parameters")
    check_name(name, f"{key}.function.name")
    if not isinstance(parameters, Mapping | None):
        raise InputError(f"{key}.function.parameters", parameters, "a JSON schema as a dict is wanted")
    described = {"name": name, "description": function.get("description") or "", "parameters": dict(parameters or {})}
    return {"type": "function", "function": described}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

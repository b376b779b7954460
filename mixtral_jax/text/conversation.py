"""Conversations in the form of OpenAI's API, checked and brought into the form that Mistral's formats encode."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from mixtral_jax.errors import InputError

Version = Literal["v1", "v2", "v3"]

ROLES = ("system", "user", "assistant", "tool")
FOLLOWERS: Mapping[str | None, tuple[str, ...]] = {
    None: ROLES,
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("user", "assistant", "tool"),
}
JOIN = "\n\n"
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


@dataclass(frozen=True)
class ToolCall:
    """The model's wish to call a function; `arguments` is what their JSON says, or the text if it is none."""

    name: str
    arguments: Any
    id: str | None


@dataclass(frozen=True)
class Message:
    """One message; a user's and the assistant's stand for all that followed each other.

    `content` is text, and for a tool what its JSON says. `name` and `call_id` are a tool's.
    """

    role: str
    content: Any = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prefix: bool = False
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True)
class Conversation:
    """What Mistral's formats encode: the messages without the system's, which are one prompt; the first is a user's."""

    system: str | None
    messages: tuple[Message, ...]


def read_conversation(messages: Sequence[Mapping[str, Any]], version: Version, complete: bool) -> Conversation:
    """Checks messages as Mistral's own library does, and joins those of one role in a row by an empty line.

    Args:
      messages: OpenAI's dicts: role, content (a text, or a list of {"type": "text", "text": ...}), for the assistant
        tool_calls and prefix, for a tool tool_call_id and name.
      version: whose rules hold.
      complete: whether the assistant has the last word; otherwise it is the assistant's turn, or the last message is
        its own with "prefix" set, to be continued.

    Raises:
      InputError: naming the message by its index.
    """
    read = [_message(message, f"messages[{index}]", version) for index, message in enumerate(messages)]
    _check_order(read, complete)
    _check_tool_results(read)
    prompts = [each.content for each, given in zip(read, messages, strict=True) if _is_prompt(given)]
    joined = [each for role, group in groupby(read, lambda each: each.role) for each in _join(role, list(group))]
    if not joined or joined[0].role != "user":
        joined.insert(0, Message("user"))
    return Conversation(JOIN.join(prompts) if prompts else None, tuple(joined))


def _is_prompt(message: Mapping[str, Any]) -> bool:
    return message["role"] == "system" and bool(message["content"])


def _message(message: Mapping[str, Any], key: str, version: Version) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(key, message, "a dict with role and content is wanted")
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{key}.role", role, f"one of {', '.join(ROLES)} is wanted")
    content = message.get("content")
    if content is None and role != "assistant":
        raise InputError(f"{key}.content", None, f"missing; the {role}'s message needs a text")
    text = JOIN.join(filter(None, _texts(content, f"{key}.content")))
    if role == "assistant":
        return _assistant(message, text, key, version)
    if role == "tool":
        return _tool_result(message, text, key, version)
    return Message(role, text)


def _texts(content: Any, key: str) -> list[str]:
    if content is None or isinstance(content, str):
        return [content or ""]
    if not isinstance(content, list):
        raise InputError(key, content, "a text or a list of texts is wanted")
    for place, chunk in enumerate(content):
        if not isinstance(chunk, Mapping) or chunk.get("type") != "text" or not isinstance(chunk.get("text"), str):
            raise InputError(f"{key}[{place}]", chunk, 'only {"type": "text", "text": ...} is possible')
    return [chunk["text"] for chunk in content]


def _assistant(message: Mapping[str, Any], text: str, key: str, version: Version) -> Message:
    calls = message.get("tool_calls") or ()
    if bool(text) == bool(calls):
        got = "both" if text else "neither"
        raise InputError(key, got, "an assistant's message has either content or tool_calls")
    if calls and version == "v1":
        raise InputError(f"{key}.tool_calls", calls, "the format v1 has no tools")
    read = tuple(_tool_call(call, f"{key}.tool_calls[{place}]", version) for place, call in enumerate(calls))
    return Message("assistant", text, read, bool(message.get("prefix")))


def _tool_call(call: Any, key: str, version: Version) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InputError(key, call, 'a dict with id and function {"name": ..., "arguments": ...} is wanted')
    check_name(function.get("name"), f"{key}.function.name")
    call_id = call.get("id")
    if version == "v3":
        _check_id(call_id, f"{key}.id")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments)
    if not isinstance(arguments, str | None):
        raise InputError(f"{key}.function.arguments", arguments, "JSON as a text, or a dict, is wanted")
    return ToolCall(function["name"], _json_or_text(arguments), call_id)


def _tool_result(message: Mapping[str, Any], text: str, key: str, version: Version) -> Message:
    if version == "v1":
        raise InputError(f"{key}.role", "tool", "the format v1 has no tools")
    name, call_id = message.get("name"), message.get("tool_call_id")
    if name is not None:
        check_name(name, f"{key}.name")
    if version == "v3":
        _check_id(call_id, f"{key}.tool_call_id")
    return Message("tool", _json_or_text(text), name=name, call_id=call_id)


def check_name(name: Any, key: str) -> None:
    """Raises InputError if it can't be a function's name."""
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise InputError(key, name, "1 to 64 of a-z, A-Z, 0-9, _ and - are wanted")


def _check_id(call_id: Any, key: str) -> None:
    if not isinstance(call_id, str) or not CALL_ID.fullmatch(call_id):
        raise InputError(key, call_id, "9 of a-z, A-Z and 0-9 are wanted")


def _json_or_text(text: str | None) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _check_order(messages: Sequence[Message], complete: bool) -> None:
    if not messages:
        raise InputError("messages", [], "at least one is wanted")
    if len(messages) == 1 and messages[0].role not in ("system", "user"):
        raise InputError("messages[0].role", messages[0].role, "system or user is wanted, alone as it is")
    previous = None
    for index, message in enumerate(messages):
        allowed = FOLLOWERS[previous]
        if message.role not in allowed:
            raise InputError(f"messages[{index}].role", message.role, f"after {previous}: {', '.join(allowed)}")
        if message.prefix and index < len(messages) - 1:
            raise InputError(f"messages[{index}].prefix", True, "only the last message can be continued")
        previous = message.role
    _check_last(messages[-1], f"messages[{len(messages) - 1}]", complete)


def _check_last(last: Message, key: str, complete: bool) -> None:
    if complete and (last.role != "assistant" or last.prefix):
        raise InputError(f"{key}.role", last.role, "a complete conversation ends with the assistant, without prefix")
    if not complete and last.role == "assistant" and not last.prefix:
        allowed = "the last is the user's or a tool's, or the assistant's with prefix set"
        raise InputError(f"{key}.role", last.role, allowed)


def _check_tool_results(messages: Sequence[Message]) -> None:
    """Between two messages of the assistant stand as many results as calls."""
    missing = 0
    for index, message in enumerate(messages):
        if message.role == "tool":
            missing -= 1
        elif message.role == "assistant":
            if missing:
                problem = f"{abs(missing)} tool results {'are missing' if missing > 0 else 'too many stand'} before it"
                raise InputError(f"messages[{index}]", message.role, problem)
            missing = len(message.tool_calls)


def _join(role: str, messages: Sequence[Message]) -> Sequence[Message]:
    if role == "system":
        return ()
    if role == "tool":
        return messages
    content = JOIN.join(message.content for message in messages if message.content)
    calls = tuple(call for message in messages for call in message.tool_calls)
    return (Message(role, content, calls, any(message.prefix for message in messages)),)

"""Reads the tool calls out of an answer in Mistral's formats v2 and v3."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

from mixtral_jax.text.tokenizer import Tokenizer

LETTERS = string.ascii_letters + string.digits


class Answer(NamedTuple):
    """What a model answered.

    Attributes:
      content: its text; empty if it called tools and said nothing before.
      tool_calls: OpenAI's dicts {"id", "type": "function", "function": {"name", "arguments"}}, the arguments as JSON.
    """

    content: str
    tool_calls: tuple[dict[str, Any], ...]


def parse_answer(ids: Sequence[int], tokenizer: Tokenizer) -> Answer:
    """Splits an answer's ids into text and tool calls.

    What follows the control `[TOOL_CALLS]` is a JSON list of {"name", "arguments"} and, in v3, "id"; a call without a
    usable id gets one. If it is anything else, all of the answer is text.
    """
    marker = tokenizer.controls.get("[TOOL_CALLS]")
    if marker is None or marker not in ids:
        return Answer(tokenizer.decode(ids), ())
    place = list(ids).index(marker)
    try:
        calls = tuple(read_call(call) for call in json.loads(tokenizer.decode(ids[place + 1 :])))
    except (ValueError, TypeError, KeyError, RecursionError):
        return Answer(tokenizer.decode(ids), ())
    return Answer(tokenizer.decode(ids[:place]), calls)


def read_call(call: Any) -> dict[str, Any]:
    """A call as OpenAI writes it, of one as Mistral's models do. Raises TypeError or KeyError if it is none."""
    name, arguments, call_id = call["name"], call["arguments"], call.get("id")
    if not isinstance(name, str):
        raise TypeError(name)
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": name, "arguments": written}
    return {
        "id": call_id if isinstance(call_id, str) and call_id else new_call_id(),
        "type": "function",
        "function": function,
    }


def new_call_id() -> str:
    """Nine letters and digits, as the format v3 demands of a call's id."""
    return "".join(secrets.choice(LETTERS) for _ in range(9))

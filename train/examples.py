"""Conversations and preferences from JSON lines, as ids of which some are learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from mixtral_jax.errors import InputError, nearest
from mixtral_jax.text.chat import ChatFormat, encode_answers
from mixtral_jax.text.tokenizer import Tokenizer
from mixtral_jax.train.corpus import SourceFile
from mixtral_jax.train.packing import Batch, empty_row

_Read = TypeVar("_Read")
_SFT_KEYS = ("messages", "tools", "prompt", "completion")
_DPO_KEYS = ("prompt", "messages", "tools", "chosen", "rejected")


class Example(NamedTuple):
    """A text and what of it is learnt.

    Attributes:
      ids: int32 [n].
      answers: bool [n], the tokens that are learnt.
    """

    ids: np.ndarray
    answers: np.ndarray


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example


class Line(NamedTuple):
    """A line of a file: its text, and where it stands for messages."""

    text: str
    where: str
    file: SourceFile


def read_lines(files: Sequence[SourceFile]) -> Iterator[Line]:
    """The lines of JSON-lines files that are not blank.

    Raises:
      InputError: a file is of another kind, can't be read, or is not UTF-8.
    """
    for file in files:
        if not file.is_json_lines:
            raise file.error("a .jsonl file with an object a line is wanted")
        try:
            with file.open() as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield Line(line.decode(), f"line {number}", file)
        except UnicodeDecodeError:
            raise file.error(f"line {number} is not UTF-8") from None
        except (OSError, EOFError) as error:
            raise file.error(f"{error}; a whole, readable file is wanted") from None


def parse(line: Line, read: Callable[[dict[str, Any]], _Read]) -> _Read:
    """What the function makes of a line's object. Raises InputError naming the file and the line."""
    try:
        found = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise line.file.error(f"{line.where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise line.file.error(f"{line.where} is {type(found).__name__}; an object is wanted")
    try:
        return read(found)
    except InputError as error:
        raise line.file.error(f"{line.where}: {error}") from None


def supervised(
    fields: dict[str, Any], tokenizer: Tokenizer, format: ChatFormat | None, answers: Literal["all", "last"]
) -> Example:
    """An example of {"messages": [...], "tools": [...]} or {"prompt": ..., "completion": ...}."""
    _check_keys(fields, _SFT_KEYS)
    if ("messages" in fields) == ("prompt" in fields or "completion" in fields):
        raise InputError("keys", sorted(fields), "either messages, or prompt and completion are wanted")
    if "messages" in fields:
        messages, tools = _listed(fields, "messages"), _listed(fields, "tools")
        return _conversation(messages, tools, tokenizer, format, last=answers == "last")
    return _answered(fields, "prompt", "completion", tokenizer, format)


def preferred(fields: dict[str, Any], tokenizer: Tokenizer, format: ChatFormat | None) -> Pair:
    """A pair of {"prompt" or "messages": ..., "chosen": ..., "rejected": ...}."""
    _check_keys(fields, _DPO_KEYS)
    if ("messages" in fields) == ("prompt" in fields):
        raise InputError("keys", sorted(fields), "either prompt or messages is wanted, with chosen and rejected")
    prompt = "messages" if "messages" in fields else "prompt"
    return Pair(*(_answered(fields, prompt, side, tokenizer, format) for side in ("chosen", "rejected")))


def _answered(
    fields: dict[str, Any], prompt_key: str, answer_key: str, tokenizer: Tokenizer, format: ChatFormat | None
) -> Example:
    """A prompt and its answer: texts, or messages of which the answer is the assistant's next."""
    prompt, answer = fields.get(prompt_key), fields.get(answer_key)
    for key, value in ((prompt_key, prompt), (answer_key, answer)):
        if not isinstance(value, str | list):
            raise InputError(key, value, "a text or a list of messages is wanted")
    if isinstance(prompt, str) and isinstance(answer, str):
        return _text(prompt, answer, tokenizer)
    if not isinstance(prompt, list):
        raise InputError(prompt_key, prompt, f"{answer_key} is a list of messages, so that this is to be one too")
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or len(answer) != 1 or _role(answer[0]) != "assistant":
        raise InputError(answer_key, answer, "a text or a list of one message of the assistant is wanted")
    if prompt and _role(prompt[-1]) == "assistant":
        raise InputError(prompt_key, prompt[-1], "its last message is the assistant's, whose turn is the answer")
    return _conversation([*prompt, *answer], _listed(fields, "tools"), tokenizer, format, last=True)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _text(prompt: str, answer: str, tokenizer: Tokenizer) -> Example:
    """The two encoded as one text, as when the model goes on with the prompt; learnt from where their ids part."""
    if not answer:
        raise InputError("completion", answer, "an empty answer teaches nothing")
    try:
        before = tokenizer.encode(prompt, bos=True)
        ids = tokenizer.encode(prompt + answer, bos=True, eos=True)
    except UnicodeEncodeError:
        raise InputError("prompt", None, "half of a surrogate pair is in a text; whole characters are wanted") from None
    shared = next((place for place, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
    return Example(np.array(ids, np.int32), np.arange(len(ids)) >= shared)


def _conversation(
    messages: list[Any], tools: list[Any], tokenizer: Tokenizer, format: ChatFormat | None, last: bool
) -> Example:
    ids, answers = encode_answers(messages, tokenizer, format, tools)
    learnt = np.array(answers, bool)
    if not learnt.any():
        raise InputError("messages", None, "no answer of the assistant is among them")
    if last:
        # Answers are apart by what asks for them.
        others = np.flatnonzero(~learnt[: np.flatnonzero(learnt)[-1]])
        learnt[: others[-1] + 1] = False
    return Example(np.array(ids, np.int32), learnt)


def _listed(fields: dict[str, Any], key: str) -> list[Any]:
    found = fields.get(key) or []
    if not isinstance(found, list):
        raise InputError(key, found, "a list is wanted")
    return found


def _check_keys(fields: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in fields:
        close = nearest(key, known)
        if key not in known and close:
            raise InputError(key, fields[key], f"unknown key; {close}known: {', '.join(known)}")


def fill_row(examples: Sequence[Example], length: int) -> Batch:
    """A row [T] of whole examples one after another, each a segment of its own.

    With length 8, `1 5 6 2` of which `6 2` are learnt and `1 7 2` of which `7 2` are:

        tokens    1 5 6 1 7 0 0 0
        targets   5 6 2 7 2 0 0 0
        segment   1 1 1 2 2 0 0 0
        position  0 1 2 0 1 0 0 0
        weight    0 1 1 1 1 0 0 0
    """
    row, start = empty_row(length), 0
    for number, (ids, answers) in enumerate(examples, 1):
        place = slice(start, start + len(ids) - 1)
        row.tokens[place], row.targets[place] = ids[:-1], ids[1:]
        row.segment[place], row.position[place] = number, np.arange(len(ids) - 1)
        row.loss_weight[place] = answers[1:]
        start = place.stop
    return row

"""Answers that obey a schema: JSON, and calls of functions, by the library llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mixtral_jax.errors import InputError
from mixtral_jax.serving.tools import MARKER
from mixtral_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

# A model may otherwise write blanks without an end.
_OPTIONS = {"whitespace_pattern": r"[ \n]{0,32}"}


_BEFORE = "\x02"
"""A character that no token joins with others."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an answer may be: text of a schema, calls of tools, or either.

    Attributes:
      schema: of the text; None: no text.
      tools: OpenAI's descriptions of the functions that may be called; none: no calls.
      with_ids: whether a call bears an id, as in the format v3.
      several: whether there may be more than one call.
    """

    schema: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    with_ids: bool = True
    several: bool = True


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """Args: vocab_size: V of the engine's masks, at least the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()

    def constraint(self, form: Form) -> Matched:
        """A constraint for one text.

        Raises:
          InputError: the schema can't be obeyed, or the tokenizer has no end token.
        """
        import llguidance

        if not self._tokenizer.eos_ids:
            raise InputError("response_format", None, "this model's tokenizer has no end token")
        with self._lock:  # the first takes part of a second
            vocabulary = self._vocabulary
        grammar = llguidance.LLMatcher.grammar_from_lark(self._written(form))
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            key = "response_format" if form.schema is not None else "tools"
            raise InputError(key, None, f"this schema can't be held to: {_reason(matcher)}")
        return Matched(matcher, self._vocab_size, self._tokenizer.eos_ids)

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        import llguidance

        ends = list(self._tokenizer.eos_ids)
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size))
        return llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=ends)

    def _written(self, form: Form) -> str:
        """The grammar in llguidance's dialect of Lark. Schemas are rules of their own: `#` in one is its own root."""
        # A text begins with the space that SentencePiece puts before it and takes away from it.
        first = "/ ?/ " if self._tokenizer.drops_first_space else ""
        rules = []
        if form.schema is not None:
            rules += [f"text: {first}json", _json_rule("json", form.schema)]
        if form.tools:
            marker = self._tokenizer.controls.get(MARKER)
            if marker is None:
                raise InputError("tools", None, f"this model's tokenizer has no control {MARKER}")
            more = ' ("," / ?/ call)*' if form.several else ""
            calls = " | ".join(f"call_{place}" for place in range(len(form.tools)))
            rules += [f'calls: <[{marker}]> {first}"[" call{more} "]"', f"call: {calls}"]
            for place, tool in enumerate(form.tools):
                rules += _call_rules(place, tool, form.with_ids)
        starts = [name for name, there in (("text", form.schema is not None), ("calls", form.tools)) if there]
        return "\n".join([f"start: {' | '.join(starts)}", *rules]) + "\n"


def _call_rules(place: int, tool: Mapping[str, Any], with_ids: bool) -> list[str]:
    """A call as Mistral's formats write it: {"name": "f", "arguments": {...}, "id": "a1b2c3d4e"}."""
    function = tool["function"]
    begin = json.dumps(f'{{"name": "{function["name"]}", "arguments": ')
    end = r'", \"id\": \"" /[a-zA-Z0-9]{9}/ "\"}"' if with_ids else '"}"'
    schema = {"type": "object", **(function.get("parameters") or {})}
    return [f"call_{place}: {begin} arguments_{place} {end}", _json_rule(f"arguments_{place}", schema)]


def _json_rule(name: str, schema: Mapping[str, Any]) -> str:
    try:
        return f"{name}: %json {json.dumps({**schema, 'x-guidance': _OPTIONS})}"
    except RecursionError:
        raise InputError("schema", None, "nested too deeply") from None


class Matched:
    """The engine's Constraint of one text.

    Attributes:
      error: why the library gave up, which ends the text; None: it did not.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, ends: Sequence[int]):
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        self._ends = ends
        self.error: str | None = None

    def allowed(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]; the end alone where nothing else fits, or where the library gave up."""
        mask = np.zeros((self._words,), np.uint32)
        if self.error is None:
            given = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
            mask[: given.size] = given
            self._note_error()
        if self.error is not None or not mask.any():
            mask[:] = 0
            for token in self._ends:
                mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def accept(self, token: int) -> None:
        """The token was chosen."""
        if self.error is None and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._note_error()

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = _reason(self._matcher)


def _reason(matcher: llguidance.LLMatcher) -> str:
    return matcher.get_error().splitlines()[0]


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.eos_token_id = tokenizer.eos_ids[0]
        self.bos_token_id = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
        silent = {*tokenizer.control_names, *tokenizer.eos_ids, tokenizer.unk_id} - {-1}
        names = {token: tokenizer.control_names.get(token, f"<{token}>") for token in silent}
        self.special_token_ids = sorted(silent)
        self.tokens = [
            names[token].encode() if token in names else _bytes(tokenizer.piece(token))
            for token in range(tokenizer.vocab_size)
        ]
        self.tokens += [b""] * (vocab_size - tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._before = tokenizer.encode(_BEFORE)

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text inside another: a space that the tokenizer puts before all texts would be wrong there."""
        ids = self._tokenizer.encode(_BEFORE + text.decode())
        assert ids[: len(self._before)] == self._before, "a tokenizer that joins a control character with a text"
        return ids[len(self._before) :]


def _bytes(piece: str | bytes) -> bytes:
    return piece if isinstance(piece, bytes) else piece.encode()

"""The calls of functions in an answer, each as soon as it is whole."""

from __future__ import annotations

import json
from typing import Any

from mixtral_jax.text.tokenizer import StreamDecoder, Tokenizer
from mixtral_jax.text.tool_calls import read_call

MARKER = "[TOOL_CALLS]"
"""The control before a list of calls, in Mistral's formats v2 and v3."""
_BLANKS = " \t\r\n"
_DECODER = json.JSONDecoder()


class CallReader:
    """What follows the control [TOOL_CALLS]: a JSON list, read while it is written.

    Attributes:
      text: all of it, as text.
      calls: OpenAI's dicts of the calls that are whole; what breaks the form ends the list.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = StreamDecoder(tokenizer)
        self._place = 0
        self._ended = False
        self.text = ""
        self.calls: list[dict[str, Any]] = []

    def feed(self, token: int) -> None:
        """Takes in one more token."""
        piece = self._decoder.feed(token)
        self.text += piece
        if "}" in piece:  # only there a call may have become whole
            self._read()

    def finish(self) -> None:
        """No more tokens come."""
        self.text += self._decoder.flush()

    def _read(self) -> None:
        while not self._ended:
            self._skip(_BLANKS)
            separator = self.text[self._place : self._place + 1]
            if not separator:
                return
            if separator != ("," if self.calls else "["):
                self._ended = True
                return
            begin = self._place + 1
            while self.text[begin : begin + 1] in tuple(_BLANKS):
                begin += 1
            try:
                call, end = _DECODER.raw_decode(self.text, begin)
                self.calls.append(read_call(call))
            except json.JSONDecodeError:
                return  # not whole
            except (TypeError, KeyError, ValueError, RecursionError):
                self._ended = True
                return
            self._place = end

    def _skip(self, characters: str) -> None:
        while self.text[self._place : self._place + 1] in tuple(characters):
            self._place += 1

"""One text of an answer while it grows: what of it can be sent, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mixtral_jax.inference.requests import Token, Update
from mixtral_jax.serving.tools import CallReader
from mixtral_jax.text.growing import GrowingText
from mixtral_jax.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "tool_calls"]


class Placed(NamedTuple):
    """A token and the character of the text that it begins at."""

    token: Token
    offset: int


class Delta(NamedTuple):
    """What can be sent since the last time."""

    text: str
    tokens: tuple[Placed, ...]
    calls: tuple[dict[str, Any], ...]


class Choice:
    """A text by its tokens, up to the first stop string, with the calls of functions in it.

    Attributes:
      count: tokens taken in, up to the one that ended the text.
      finish: how it ended; None: it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int], stop: Sequence[str], marker: int | None = None):
        """Args: after: the ids that the text continues; marker: the control before calls, None where it is text."""
        self._tokenizer = tokenizer
        # An embedding may have rows beyond the tokenizer's ids: they have no text.
        self._text = GrowingText(tokenizer, [token for token in after if token < tokenizer.vocab_size], stop)
        self._ids: list[int] = []
        self._placed: list[Placed] = []
        self._marker = marker
        self._calls: CallReader | None = None
        self._whole = ""
        self._sent_text = self._sent_tokens = self._sent_calls = 0
        self.count = 0
        self.finish: Finish | None = None

    def take(self, update: Update) -> None:
        """Takes in what is new; what comes after a stop string is not."""
        for token in update.tokens:
            if self.finish is not None:
                return
            self.count += 1
            self._add(token)
        if self.finish is None and update.ended is not None:
            self._end("length" if update.ended == "length" else "stop")

    @property
    def whole(self) -> Delta:
        """All of a text that has ended."""
        assert self.finish is not None
        self._sent_text = self._sent_tokens = self._sent_calls = 0
        return self.delta()

    def delta(self) -> Delta:
        """What has become certain since the last call."""
        shown = self._whole if self.finish is not None else self._text.shown
        text, self._sent_text = shown[self._sent_text :], len(shown)
        begin = self._sent_tokens
        while self._sent_tokens < len(self._placed) and self._placed[self._sent_tokens].offset < len(shown):
            self._sent_tokens += 1
        calls = () if self._calls is None else tuple(self._calls.calls[self._sent_calls :])
        self._sent_calls += len(calls)
        return Delta(text, tuple(self._placed[begin : self._sent_tokens]), calls)

    @property
    def mean_logprob(self) -> float:
        """Of the tokens taken in, which have to have one."""
        logprobs = [placed.token.logprob for placed in self._placed]
        return sum(each for each in logprobs if each is not None) / max(1, len(logprobs))

    def _add(self, token: Token) -> None:
        if token.id >= self._tokenizer.vocab_size:
            return
        if self._calls is not None:
            self._calls.feed(token.id)
        elif token.id == self._marker:
            self._calls = CallReader(self._tokenizer)
        else:
            self._ids.append(token.id)
            self._placed.append(Placed(token, self._text.length))
            self._text.grow(self._ids)
            if self._text.stopped:
                self._end("stop")

    def _end(self, finish: Finish) -> None:
        self._whole = self._text.finish()
        self.finish = finish
        if self._calls is not None:
            self._calls.finish()
            if not self._calls.calls:
                self._whole += self._calls.text  # no calls after all
            elif finish == "stop":
                self.finish = "tool_calls"

"""A text while it is generated: what of it can be shown, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence

from mixtral_jax.text.tokenizer import StreamDecoder, Tokenizer


class GrowingText:
    """One text as its tokens come, up to the first stop string or end token.

    Attributes:
      stopped: whether a stop string was found; what comes after is not taken in.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer, after=prompt)
        self._ends = tokenizer.eos_ids
        self._stop = stop
        self._taken = 0
        self._text = ""
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters so far, with those that may yet turn out to be the start of a stop string."""
        return len(self._text)

    @property
    def shown(self) -> str:
        """The text so far, without an end that may yet turn out to be the start of a stop string."""
        if self.stopped:
            return self._text
        held = max((_overlap(self._text, stop) for stop in self._stop), default=0)
        return self._text[: len(self._text) - held]

    def grow(self, tokens: list[int]) -> None:
        """Takes in the row's new tokens so far."""
        for token in tokens[self._taken :]:
            if not self.stopped and token not in self._ends:
                self._add(self._decoder.feed(token))
        self._taken = len(tokens)

    def finish(self) -> str:
        """The whole text."""
        if not self.stopped:
            self._add(self._decoder.flush())
        return self._text

    def _add(self, text: str) -> None:
        self._text += text
        found = [place for place in (self._text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True


def _overlap(text: str, stop: str) -> int:
    """How many last characters of the text are first characters of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

"""Continuous batching: texts come and go while others are being continued.

An engine has a fixed number of slots. A step takes in at most `prefill_chunk` tokens of prompts, of the texts that have
a slot in turn, and then continues all texts whose prompts are in. One thread steps; any may submit and cancel.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax

from mixtral_jax.inference import requests
from mixtral_jax.inference.prefixes import Prefixes
from mixtral_jax.inference.requests import Counts, EngineConfig, Request, Token, Update
from mixtral_jax.inference.runner import MOST_STEPS, Loaded, Runner, sizes
from mixtral_jax.inference.slots import Chosen


@dataclass(eq=False)
class _Text:
    """A request and how far it has come."""

    ticket: int
    request: Request
    names: list[bytes]
    row: int = -1
    done: int = 0
    """Tokens of the prompt that are taken in."""
    new: int = 0
    """Tokens that were chosen."""

    @property
    def left(self) -> int:
        """Tokens of the prompt to take in; its last one is for the first step of decoding."""
        return len(self.request.prompt) - 1 - self.done


class Engine:
    """Continues texts of token ids.

    Attributes:
      config: the shapes.
    """

    def __init__(
        self,
        model: Loaded,
        config: EngineConfig | None = None,
        draft: Loaded | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Allocates the caches.

        Args:
          config: None: the defaults.
          draft: a smaller model with the same vocabulary; needed where config.speculation is "draft".
          mesh: that the weights lie on.

        Raises:
          InputError: config asks for what the model does not have, or the draft does not fit.
        """
        self.config = EngineConfig() if config is None else config
        self._runner = Runner(model, self.config, draft, mesh)
        self._prefixes = Prefixes(self.config.prefix_blocks, self.config.prefill_chunk, self._runner.ring)
        self._lock = threading.Lock()
        self._tickets = itertools.count(1)
        self._waiting: deque[_Text] = deque()
        self._prefilling: deque[_Text] = deque()
        self._decoding: dict[int, _Text] = {}
        self._free = list(reversed(range(self.config.slots)))
        self._cancelled: set[int] = set()
        self._counts = Counts()

    def check(self, request: Request) -> None:
        """Raises InputError for what can't be done, naming the request's field. From any thread."""
        requests.check(request, self._runner.model, self._runner.max_length)

    def submit(self, request: Request) -> int:
        """Puts a text into the queue: its ticket, which updates of it bear. From any thread.

        Raises:
          InputError: see `check`.
        """
        self.check(request)
        names = self._prefixes.names(request.prompt[:-1]) if self.config.prefix_blocks else []
        with self._lock:
            text = _Text(next(self._tickets), request, names)
            self._waiting.append(text)
        return text.ticket

    def cancel(self, ticket: int) -> None:
        """Ends a text at the next step, whose updates say so; one that has ended already is let be. From any thread."""
        with self._lock:
            self._cancelled.add(ticket)

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its continuation together, at most."""
        return self._runner.max_length

    @property
    def waiting(self) -> int:
        """Texts without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts in slots."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._prefilling or self._decoding or self._cancelled)

    def statistics(self) -> Counts:
        """What was done so far."""
        return self._counts

    def step(self) -> list[Update]:
        """The next piece of work: what it brought of each text."""
        with self._runner.on_mesh():
            cancelled = list(self._end_cancelled())
            self._prefill()
            return [*cancelled, *self._decode()]

    def warm_up(self) -> None:
        """Runs every program, so that none is compiled later. Before the first text."""
        assert not self.running, "an engine warms up before its first text"
        with self._runner.on_mesh():
            self._runner.warm_up()

    def _end_cancelled(self) -> Iterator[Update]:
        with self._lock:
            asked, self._cancelled = self._cancelled, set()
            ended = [text for text in self._waiting if text.ticket in asked]
            for text in ended:
                self._waiting.remove(text)
        in_slots = [text for text in (*self._prefilling, *self._decoding.values()) if text.ticket in asked]
        for text in in_slots:
            if text in self._prefilling:
                self._prefilling.remove(text)
            self._leave(text)
        self._count(cancelled=len(ended) + len(in_slots))
        yield from (Update(text.ticket, (), "cancelled") for text in (*ended, *in_slots))

    def _leave(self, text: _Text) -> None:
        """Frees a text's slot; the next decode call finds it inactive."""
        self._decoding.pop(text.row, None)
        self._free.append(text.row)

    def _admit(self) -> None:
        with self._lock:
            while self._waiting and self._free:
                text = self._waiting.popleft()
                text.row = self._free.pop()
                self._prefilling.append(text)
                self._count(prompt_tokens=len(text.request.prompt))

    def _prefill(self) -> None:
        """Takes in one chunk: pieces of one size, of texts in turn, so that a short prompt passes a long one."""
        self._admit()
        pieces: list[tuple[_Text, int]] = []
        kind: tuple[int, bool] | None = None
        for text in self._prefilling:
            self._look_up(text)
            if not text.left:
                continue
            size, real = _piece(text.left, self.config.prefill_chunk)
            own = size, text.done == 0
            kind = kind or own
            if own == kind and len(pieces) < self._runner.rows(size):
                pieces.append((text, real))
        if kind is not None:
            tokens = {text.row: text.request.prompt[text.done : text.done + real] for text, real in pieces}
            self._runner.take_in(tokens, *kind)
        for text, real in pieces:
            text.done += real
            self._keep(text, real)
            self._prefilling.remove(text)
            self._prefilling.append(text)
        self._begin([text for text in self._prefilling if not text.left])

    def _begin(self, texts: list[_Text]) -> None:
        self._runner.begin({text.row: text.request for text in texts})
        for text in texts:
            self._prefilling.remove(text)
            self._decoding[text.row] = text

    def _look_up(self, text: _Text) -> None:
        """Moves a text on to the longest beginning that is kept."""
        block = self.config.prefill_chunk
        if not text.names or text.done % block:
            return
        found = self._prefixes.find(text.names, text.done // block)
        if found:
            length = (max(found) + 1) * block
            self._runner.restore(text.row, found)
            self._count(cached_tokens=length - text.done)
            text.done = length

    def _keep(self, text: _Text, real: int) -> None:
        """Saves the block that was just taken in, if it was a whole one."""
        place = text.done // self.config.prefill_chunk - 1
        if real < self.config.prefill_chunk or place >= len(text.names):
            return
        block = self._prefixes.take(text.names[place])
        if block is not None:
            self._runner.save(text.row, text.done - real, block)

    def _decode(self) -> Iterator[Update]:
        texts = list(self._decoding.values())
        if not texts:
            return
        constrained = {text.row: text.request.constraint for text in texts if text.request.constraint is not None}
        allowed_BW = self._runner.everything_BW
        if constrained:
            allowed_BW = allowed_BW.copy()
            for row, constraint in constrained.items():
                allowed_BW[row] = constraint.allowed()
        steps = 1 if constrained or self._prefilling else MOST_STEPS
        chosen = self._runner.decode(list(self._decoding), steps, allowed_BW)
        self._count(decode_calls=1, proposed=int(chosen.proposed), accepted=int(chosen.accepted))
        yield from (self._update(text, chosen, text.row) for text in texts)

    def _update(self, text: _Text, chosen: Chosen, row: int) -> Update:
        """What a call brought of a text; one that has ended leaves its slot."""
        request, count = text.request, int(chosen.count_B[row])
        ids = chosen.token_BM[row, :count].tolist()
        tokens = tuple(_token(request, chosen, row, place, token) for place, token in enumerate(ids))
        if request.constraint is not None:
            for token in ids:
                request.constraint.accept(token)
        text.new += count
        self._count(new_tokens=count)
        ended: Literal["stop", "length"] | None = None
        if ids and ids[-1] in request.stop_ids:
            ended = "stop"
        elif text.new >= request.max_new_tokens:
            ended = "length"
        if ended is not None:
            self._leave(text)
            self._count(finished=1)
        return Update(text.ticket, tokens, ended)

    def _count(self, **more: int) -> None:
        self._counts = self._counts._replace(**{key: getattr(self._counts, key) + n for key, n in more.items()})


def _token(request: Request, chosen: Chosen, row: int, place: int, token: int) -> Token:
    if request.logprobs is None:
        return Token(token, None, ())
    ids = chosen.top_BMA[row, place, : request.logprobs].tolist()
    pairs = zip(ids, chosen.top_logprob_BMA[row, place].tolist(), strict=False)
    return Token(token, float(chosen.logprob_BM[row, place]), tuple(pair for pair in pairs if pair[0] >= 0))


def _piece(left: int, chunk: int) -> tuple[int, int]:
    """The next piece of what is left of a prompt: its size, and how many real tokens are in it.

    It depends on what is left alone, so that a prompt is always cut in the same way. Of 256, 64 and 16, 100 tokens take
    64 and then 64 with 36 in it, not 256 with 100.
    """
    known = sizes(chunk)
    if left >= chunk:
        return chunk, chunk
    fitting = min((size for size in known if size >= left), default=chunk)
    smaller = [size for size in known if size < left]
    if fitting <= 2 * left or not smaller:
        return fitting, left
    return smaller[0], smaller[0]

"""An engine without a model: it says what a script says, at a pace that a test sets."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque

import numpy as np

from mixtral_jax.errors import InputError
from mixtral_jax.inference.requests import Counts, EngineConfig, Token, Update


class StubEngine:
    """Has the interface of mixtral_jax.inference.engine.Engine.

    Attributes:
      go: steps wait while it is not set.
      requests: all that were submitted.
      most_running: the most texts that were in slots at a time.
    """

    def __init__(self, script, slots=4, max_length=512, vocab_size=32768, tokens_a_step=1, step_seconds=0.0):
        """Args: script: from a request to its tokens, repeated where they are too few."""
        self.config = EngineConfig(slots=slots, max_length=max_length)
        self.max_length = max_length
        self._script, self._vocab_size = script, vocab_size
        self._tokens_a_step, self._step_seconds = tokens_a_step, step_seconds
        self._lock = threading.Lock()
        self._tickets = itertools.count(1)
        self._waiting, self._running, self._cancelled = deque(), {}, set()
        self._counts = Counts()
        self.go = threading.Event()
        self.go.set()
        self.requests = []
        self.most_running = 0
        self.broken = None

    @property
    def waiting(self):
        return len(self._waiting)

    @property
    def running(self):
        return len(self._running)

    @property
    def busy(self):
        return bool(self._waiting or self._running or self._cancelled)

    def statistics(self):
        return self._counts

    def warm_up(self):
        pass

    def check(self, request):
        wrong = next((token for token in request.prompt if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise InputError("prompt", wrong, f"token ids go from 0 to {self._vocab_size - 1}")
        assert request.prompt
        assert len(request.prompt) + request.max_new_tokens <= self.max_length

    def submit(self, request):
        self.check(request)
        with self._lock:
            ticket = next(self._tickets)
            self.requests.append(request)
            self._waiting.append((ticket, request))
        return ticket

    def cancel(self, ticket):
        with self._lock:
            self._cancelled.add(ticket)

    def step(self):
        self.go.wait()
        if self.broken is not None:
            raise self.broken
        time.sleep(self._step_seconds)
        return [*self._end_cancelled(), *self._advance()]

    def _end_cancelled(self):
        with self._lock:
            asked, self._cancelled = self._cancelled, set()
            ended = [ticket for ticket, _ in self._waiting if ticket in asked]
            self._waiting = deque(each for each in self._waiting if each[0] not in asked)
        ended += [ticket for ticket in asked if self._running.pop(ticket, None)]
        self._count(cancelled=len(ended))
        return [Update(ticket, (), "cancelled") for ticket in ended]

    def _advance(self):
        with self._lock:
            while self._waiting and len(self._running) < self.config.slots:
                ticket, request = self._waiting.popleft()
                self._running[ticket] = [request, itertools.cycle(self._script(request)), 0]
                self._count(prompt_tokens=len(request.prompt))
        self.most_running = max(self.most_running, len(self._running))
        return [self._grow(ticket, *text) for ticket, text in list(self._running.items())]

    def _grow(self, ticket, request, script, done):
        tokens, ended = [], None
        while ended is None and len(tokens) < self._tokens_a_step:
            token = self._choose(request, next(script), done + len(tokens))
            tokens.append(_token(request, token, self._vocab_size))
            if token in request.stop_ids:
                ended = "stop"
            elif done + len(tokens) >= request.max_new_tokens:
                ended = "length"
        self._running[ticket][2] += len(tokens)
        self._count(new_tokens=len(tokens))
        if ended:
            del self._running[ticket]
            self._count(finished=1)
        return Update(ticket, tuple(tokens), ended)

    def _choose(self, request, token, place):
        """The script's token; where a constraint forbids it a random one, an end rather than others."""
        if request.constraint is None:
            return token
        bits = np.unpackbits(request.constraint.allowed().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        rng = np.random.default_rng([request.seed, request.index, place])
        ends = [each for each in request.stop_ids if bits[each]]
        chosen = int(ends[0] if ends and rng.random() < 0.5 else rng.choice(allowed))
        chosen = token if bits[token] else chosen
        request.constraint.accept(chosen)
        return chosen

    def _count(self, **more):
        self._counts = self._counts._replace(**{key: getattr(self._counts, key) + n for key, n in more.items()})


def _token(request, token, vocab_size):
    if request.logprobs is None:
        return Token(token, None, ())
    others = tuple(((token + place) % vocab_size, -0.5 - place) for place in range(request.logprobs))
    return Token(token, -0.5 - request.index, others)

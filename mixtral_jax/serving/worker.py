"""A thread that steps the engine, and what it brings handed to the event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from mixtral_jax.inference.engine import Engine
from mixtral_jax.inference.requests import Request, Update
from mixtral_jax.serving.errors import ApiError

_log = logging.getLogger(__name__)
_LONGEST_WAIT = 60
"""Seconds that a client is told to wait at most."""


class Texts:
    """The texts of one request, on their way; a context that cancels what has not ended.

    Whoever reads slowly finds more at a time: what waits here is never more than the texts' own length.
    """

    def __init__(self, worker: Worker, tickets: Sequence[int]):
        self._worker = worker
        self._tickets = tickets
        self._places = {ticket: place for place, ticket in enumerate(tickets)}
        self._waiting: list[tuple[int, Update]] = []
        self._error: BaseException | None = None
        self._news = asyncio.Event()

    async def updates(self) -> list[tuple[int, Update]]:
        """All that is new, with the place of its text; waits until something is.

        Raises:
          ApiError: the engine failed.
        """
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            raise ApiError(500, "the engine failed", code="engine_failed") from self._error
        found, self._waiting = self._waiting, []
        return found

    def cancel(self, place: int) -> None:
        """Ends a text; what comes of it until then is not told."""
        ticket = self._tickets[place]
        if self._places.pop(ticket, None) is not None:
            self._worker.cancel(ticket)

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, *error: object) -> None:
        for place in range(len(self._tickets)):
            self.cancel(place)

    def tell(self, update: Update) -> None:
        """Called by the worker, in the event loop."""
        place = self._places.get(update.ticket)
        if update.ended is not None:
            self._places.pop(update.ticket, None)
        if place is not None:
            self._waiting.append((place, update))
            self._news.set()

    def fail(self, error: BaseException) -> None:
        """Called by the worker, in the event loop."""
        self._error = error
        self._news.set()


class Worker:
    """Steps an engine in a thread of its own. All but that thread is used from one event loop.

    Attributes:
      failed: what the engine raised, after which nothing works any more.
      on_failure: called then, in the event loop.
    """

    def __init__(self, engine: Engine, max_waiting: int):
        self._engine = engine
        self._most = engine.config.slots + max_waiting
        self._texts: dict[int, Texts] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seconds_a_text = 1.0
        self._last_end = 0.0
        self.failed: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None

    @property
    def open_texts(self) -> int:
        """Texts that were submitted and of which no end has come."""
        return len(self._texts)

    def start(self) -> None:
        """Begins to step; called in the event loop that will be told."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after its step."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def submit(self, requests: Sequence[Request]) -> Texts:
        """Puts a request's texts into the queue, all or none.

        Raises:
          ApiError: 429, the queue is full; 500, the engine failed.
          InputError: the engine refuses one of them.
        """
        if self.failed is not None:
            raise ApiError(500, "the engine failed", code="engine_failed")
        if len(self._texts) + len(requests) > self._most:
            wait = min(_LONGEST_WAIT, math.ceil(self._seconds_a_text * len(requests)))
            message = f"{len(self._texts)} texts are under way; more can't wait"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(max(1, wait))})
        for request in requests:
            self._engine.check(request)
        tickets = [self._engine.submit(request) for request in requests]
        texts = Texts(self, tickets)
        self._texts |= dict.fromkeys(tickets, texts)
        self._wake.set()
        return texts

    def cancel(self, ticket: int) -> None:
        """Ends a text."""
        if ticket in self._texts:
            self._engine.cancel(ticket)
            self._wake.set()

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while not self._stopping:
                self._wake.clear()  # before the look: what is submitted after it sets it again
                if not self._engine.busy:
                    self._wake.wait()
                elif updates := self._engine.step():
                    self._loop.call_soon_threadsafe(self._tell, updates)
        except BaseException as error:  # what a library in Rust panics with is no Exception
            _log.exception("the engine failed")
            self._loop.call_soon_threadsafe(self._fail, error)

    def _tell(self, updates: Sequence[Update]) -> None:
        for update in updates:
            texts = self._texts.get(update.ticket)
            if texts is None:
                continue
            texts.tell(update)
            if update.ended is not None:
                del self._texts[update.ticket]
                self._note_end()

    def _note_end(self) -> None:
        """Keeps a running mean of the time between two ends."""
        before, self._last_end = self._last_end, time.monotonic()
        if before:
            self._seconds_a_text += 0.1 * (min(self._last_end - before, _LONGEST_WAIT) - self._seconds_a_text)
        if not self._texts:
            self._last_end = 0.0  # idle time is nobody's

    def _fail(self, error: BaseException) -> None:
        self.failed = error
        for texts in set(self._texts.values()):
            texts.fail(error)
        self._texts.clear()
        self.on_failure()

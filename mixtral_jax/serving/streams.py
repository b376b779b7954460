"""Answers that last: work that ends when its client has gone, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixtral_jax.serving.worker import Texts

Result = TypeVar("Result")

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies are to hand on what they get at once."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives; it is cancelled once the client has hung up. The request's body has to be read.

    Raises:
      ClientGone: it has.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of texts, which are cancelled with it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], texts: Texts, send_seconds: float):
        """Args: send_seconds: how long the client may read nothing while something waits."""
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events, self._texts, self._send_seconds = events, texts, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._texts, suppress(ClientGone, TimeoutError):
            await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            async with asyncio.timeout(self._send_seconds):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(value: Any) -> bytes:
    """One event with a JSON value, in ASCII: many clients end a line at U+0085 and U+2028 too."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"

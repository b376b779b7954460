"""Reads a request's body within bounds of size and time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request

from mixtral_jax.serving.errors import ApiError
from mixtral_jax.serving.schemas import Body, read
from mixtral_jax.serving.settings import Settings

_DRAINED_BYTES, _DRAINED_SECONDS = 64 << 20, 5.0
"""What is read and thrown away of a body that is too large, so that a client that sends first sees the answer."""
_QUICK = 1 << 14
"""Bytes that are read faster than a thread is asked to."""


async def read_body(request: Request, kind: type[Body], settings: Settings) -> Body:
    """The body, checked.

    Raises:
      ApiError: 400 no JSON or not what is wanted, 408 too slow, 413 too large, 415 not called JSON.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = f"content-type = {content_type!r}: application/json is wanted"
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        async with asyncio.timeout(settings.body_seconds):
            body = await _bytes(request, settings.max_body_bytes)
    except TimeoutError:
        message = f"the body took longer than {settings.body_seconds:g} seconds"
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the body is not whole", code="invalid_json") from None
    return read(kind, body) if len(body) <= _QUICK else await asyncio.to_thread(read, kind, body)


async def _bytes(request: Request, limit: int) -> bytes:
    """Counts while it reads: a body in chunks does not say its length."""
    stream = request.stream()
    declared = request.headers.get("content-length", "")
    body = bytearray()
    if not declared.isdigit() or int(declared) <= limit:
        async for chunk in stream:
            body += chunk
            if len(body) > limit:
                break
        else:
            return bytes(body)
        body.clear()
    if "expect" not in request.headers:
        await _drain(stream)
    message = f"the body is over {limit} bytes"
    raise ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


async def _drain(stream: AsyncIterator[bytes]) -> None:
    left, end = _DRAINED_BYTES, time.monotonic() + _DRAINED_SECONDS
    async for chunk in stream:
        left -= len(chunk)
        if left < 0 or time.monotonic() > end:
            return

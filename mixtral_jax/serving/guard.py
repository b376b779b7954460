"""What stands before every route: keys, and the door that a draining server closes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from mixtral_jax.serving.errors import ApiError
from mixtral_jax.serving.service import Service

OPEN = "/health"
WHILE_DRAINING = (OPEN, "/metrics")


class Keys:
    """The keys that open the server; none: anybody may enter."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key.encode()) for key in keys]

    def admits(self, authorization: bytes) -> bool:
        """Whether the header bears a key: `Bearer KEY`, or `Basic` with it as the password, as browsers send it."""
        if not self._digests:
            return True
        scheme, _, credentials = authorization.partition(b" ")
        given = credentials.strip()
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        # All are compared, each in constant time: how long it takes tells nothing of any.
        return any([hmac.compare_digest(_digest(given), digest) for digest in self._digests])  # noqa: C419


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    """Lets requests in, counts them and what they are answered.

    Attributes:
      service: what it guards.
      draining: whether requests are refused.
      active: requests under way.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self.service = service
        self._keys = Keys(service.settings.api_keys)
        self.draining = False
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.active += 1
        try:
            with self.service.metrics.request(scope) as noting:
                refusal = self._refusal(scope)
                app = self._app if refusal is None else refusal.response()
                await app(scope, receive, noting(send))
        finally:
            self.active -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = scope["path"]
        authorization = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if path != OPEN and not self._keys.admits(authorization):
            # A browser asks for a name and a password where it opens the page; elsewhere it must not.
            scheme = 'Basic realm="mixtral-jax", charset="UTF-8"' if path == "/" else "Bearer"
            message = "a key is wanted: Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": scheme})
        if self.draining and path not in WHILE_DRAINING:
            headers = {"Connection": "close", "Retry-After": "5"}
            return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)
        return None

"""Errors as OpenAI's API writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from mixtral_jax.errors import InputError, nearest

_LONGEST = 400
"""Characters of a message: what was sent is shown in it, and may be long."""

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused.

    Args:
      status: HTTP's.
      message: what is wrong, for people.
      param: the key of the request that it is about.
      code: what is wrong, for programs.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message if len(self.message) <= _LONGEST else f"{self.message[:_LONGEST]}..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def from_input(error: InputError) -> ApiError:
    """A value that something below the server refused."""
    return ApiError(400, str(error), error.key, "invalid_value")


def from_validation(error: ValidationError, known: Mapping[str, Any]) -> ApiError:
    """The first of a body's faults; `known` are the keys that it may have."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = _path(first["loc"])
    said = _allowed(first, known)
    return ApiError(400, f"{param}{_got(first)}: {said}" if param else said, param or None, _code(first))


def _path(loc: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return path.removeprefix(".")


def _got(fault: ErrorDetails) -> str:
    if fault["type"] == "missing" or isinstance(fault["input"], list | dict):
        return ""
    return f" = {_short(fault['input'])}"


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) >> 128:
        return "a number of many digits"  # Python refuses to write some of them
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _allowed(fault: ErrorDetails, known: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        guess = nearest(str(fault["loc"][-1]), known) if len(fault["loc"]) == 1 else ""
        return f"unknown key; {guess}".rstrip("; ").strip()
    if fault["type"] == "missing":
        return "missing"
    message = fault["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _code(fault: ErrorDetails) -> str:
    return {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(
        fault["type"], "invalid_value"
    )

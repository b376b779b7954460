"""What a server may be told."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_jax.errors import InputError
from mixtral_jax.text.chat import ChatFormat


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A server's name, keys and limits; checked at construction.

    Raises:
      InputError: a value out of bounds.
    """

    model_name: str
    """What clients call the model."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route; none: all are open."""
    chat_format: ChatFormat | None = None
    """How conversations are written; None: as the tokenizer's model was trained."""
    max_waiting: int = 256
    """Texts that may wait for a slot; a request for more is refused with 429."""
    max_texts: int = 64
    """Texts of one request: its prompts times how many are drawn of each."""
    max_stops: int = 16
    """Stop strings of one request."""
    max_body_bytes: int = 4 << 20
    """Bytes of a request's body."""
    body_seconds: float = 30.0
    """How long a body may take to come."""
    send_seconds: float = 60.0
    """How long a client may read nothing while something waits to be sent."""
    drain_seconds: float = 30.0
    """How long running requests may go on after SIGTERM."""

    def __post_init__(self) -> None:
        for key in ("max_texts", "max_stops", "max_body_bytes"):
            if getattr(self, key) < 1:
                raise InputError(key, getattr(self, key), "one or more")
        for key in ("max_waiting", "drain_seconds"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise InputError(key, getattr(self, key), "zero or more")
        for key in ("body_seconds", "send_seconds"):
            if not 0 < getattr(self, key) < float("inf"):
                raise InputError(key, getattr(self, key), "above zero")
        if not self.model_name:
            raise InputError("model_name", self.model_name, "a name is wanted")
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            raise InputError("api_key", "(not shown)", "printable ASCII without blanks is wanted, and not nothing")

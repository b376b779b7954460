"""What all routes share: the model's tokenizer, the engine's worker, limits and counters."""

from __future__ import annotations

import secrets
import time

from mixtral_jax.errors import InputError
from mixtral_jax.inference.engine import Engine
from mixtral_jax.inference.requests import Constraint, Request
from mixtral_jax.serving.errors import ApiError
from mixtral_jax.serving.grammar import Grammars
from mixtral_jax.serving.metrics import Metrics
from mixtral_jax.serving.schemas import Sampled
from mixtral_jax.serving.settings import Settings
from mixtral_jax.serving.worker import Worker
from mixtral_jax.text.tokenizer import Tokenizer


class Service:
    """A model that is served.

    Attributes:
      tokenizer, settings, worker, metrics, grammars: the parts.
      vocab_size: the model's ids; the tokenizer may have fewer.
      max_length: tokens of a prompt and its continuation together.
      created: when, in seconds since 1970.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, vocab_size: int, settings: Settings):
        """Raises InputError if the model has no tokenizer, or a request may ask for more than there is room for."""
        if tokenizer is None:
            raise InputError("MODEL", None, "it came without a tokenizer, which a server needs")
        room = engine.config.slots + settings.max_waiting
        if settings.max_texts > room:
            raise InputError("max_texts", settings.max_texts, f"at most slots and max_waiting together: {room}")
        self.tokenizer, self.settings = tokenizer, settings
        self.max_length, self.vocab_size = engine.max_length, vocab_size
        self.metrics = Metrics()
        self.worker = Worker(engine, settings.max_waiting)
        self.grammars = Grammars(tokenizer, vocab_size)
        self.created = int(time.time())
        self._watch(engine)

    def _watch(self, engine: Engine) -> None:
        metrics = self.metrics
        metrics.watch("slots", "Texts that are continued at a time.", lambda: engine.config.slots)
        metrics.watch("texts_running", "Texts in slots.", lambda: engine.running)
        metrics.watch("texts_waiting", "Texts without a slot.", lambda: engine.waiting)
        metrics.watch("texts_open", "Texts whose end has not come.", lambda: self.worker.open_texts)
        metrics.watch_counts(engine.statistics)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError, 404, for another model's name."""
        if name is not None and name != self.settings.model_name:
            message = f"model = {name[:80]!r}: this server has {self.settings.model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_counts(self, prompts: int, body: Sampled, drawn: int) -> None:
        """Raises ApiError, 400, for more texts or stop strings than a request may have."""
        limit = self.settings.max_texts
        if prompts * drawn > limit:
            param, value = ("prompt", prompts) if prompts > limit else ("n", body.n)
            raise ApiError(400, f"{param}: {value} is too many; {limit} texts a request", param, "too_many_texts")
        if len(body.stop) > self.settings.max_stops:
            message = f"stop: {len(body.stop)} strings; at most {self.settings.max_stops}"
            raise ApiError(400, message, "stop", "too_many_stops")

    def new_tokens(self, prompt: list[int], asked: int | None, default: int | None) -> int:
        """How many tokens a text may get: what was asked for, or the default within the room that there is.

        Raises:
          ApiError: 400, the prompt is empty or there is no room.
          InputError: an id is none of the model's.
        """
        if not prompt:
            raise ApiError(400, "prompt: at least one token is needed", "prompt", "invalid_value")
        wrong = next((token for token in prompt if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise InputError("prompt", wrong, f"token ids go from 0 to {self.vocab_size - 1}")
        room = self.max_length - len(prompt)
        wanted = asked or min(default or room, room)
        if room < 1 or wanted > room:
            what = f"max_tokens = {wanted}" if room > 0 else "prompt"
            message = f"{what}: the prompt has {len(prompt)} tokens; there is room for {self.max_length} together"
            raise ApiError(400, message, what.partition(" ")[0], "context_length_exceeded")
        return wanted

    def seed(self, body: Sampled) -> int:
        """The one that was given, or one by chance."""
        return secrets.randbits(32) if body.seed is None else body.seed

    def request(
        self,
        body: Sampled,
        prompt: list[int],
        max_new_tokens: int,
        seed: int,
        index: int,
        logprobs: int | None,
        constraint: Constraint | None = None,
    ) -> Request:
        """The engine's request for one text."""
        ends = () if body.ignore_eos and constraint is None else self.tokenizer.eos_ids
        return Request(
            prompt=tuple(prompt),
            max_new_tokens=max_new_tokens,
            sampling=body.sampling,
            seed=seed,
            index=index,
            stop_ids=ends,
            logprobs=logprobs,
            constraint=constraint,
        )

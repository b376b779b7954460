"""From a job, which is a request of either API made ready, to its answer."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from mixtral_jax.inference.requests import Request
from mixtral_jax.serving.choice import Choice
from mixtral_jax.serving.errors import ApiError
from mixtral_jax.serving.grammar import Matched
from mixtral_jax.serving.schemas import Sampled
from mixtral_jax.serving.service import Service
from mixtral_jax.serving.streams import DONE, ClientGone, EventStream, event, unless_gone
from mixtral_jax.serving.worker import Texts
from mixtral_jax.version import __version__

Json = dict[str, Any]


class Job(ABC):
    """Texts that were asked for, and how their answer is written.

    Attributes:
      body: the request's.
      requests: the engine's, one a text.
      choices: the texts, in the same order.
      prompt_tokens: of the prompts, each counted once.
    """

    kind: str
    """OpenAI's name of the answer."""
    chunk_kind: str
    """And of its pieces."""
    id_prefix: str
    """What ids begin with."""

    def __init__(self, body: Sampled, requests: Sequence[Request], choices: Sequence[Choice], prompt_tokens: int):
        self.body, self.requests, self.choices, self.prompt_tokens = body, requests, choices, prompt_tokens
        self._id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    @abstractmethod
    def first_pieces(self) -> Iterator[Json]:
        """Entries of `choices` that a stream begins with."""

    @abstractmethod
    def piece(self, place: int) -> Json | None:
        """The entry of `choices` for what is new of a text; None: nothing."""

    @abstractmethod
    def wholes(self) -> list[Json]:
        """All entries of `choices`, at the end."""

    @property
    def usage(self) -> Json:
        """Tokens taken in and given; of texts that were drawn and not given too."""
        new = sum(choice.count for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    def frame(self, kind: str, choices: Sequence[Json], **more: Any) -> Json:
        """An answer, or a piece of one."""
        begin = {"id": self._id, "object": kind, "created": self._created, "model": self.body.model}
        return {**begin, "system_fingerprint": f"mixtral-jax-{__version__}", "choices": choices, **more}


async def answer(service: Service, job: Job, http: HttpRequest) -> Response:
    """Runs a job.

    Raises:
      ApiError: the queue is full, the engine failed, or a schema proved too hard.
      InputError: the engine refuses one of the texts.
    """
    begin = time.monotonic()
    try:
        texts = service.worker.submit(job.requests)
    except ApiError as error:
        service.metrics.refused.inc(error.status == 429)
        raise
    service.metrics.texts.inc(len(job.requests))
    service.metrics.prompt_tokens.inc(job.prompt_tokens)
    steps = _steps(service, job, texts, begin)
    if job.body.stream:
        return EventStream(_events(job, steps), texts, service.settings.send_seconds)
    with texts:
        try:
            await unless_gone(http.receive, _exhaust(steps))
        except ClientGone:
            return Response(status_code=499)  # goes nowhere
    return JSONResponse(job.frame(job.kind, job.wholes(), usage=job.usage))


async def _exhaust(steps: AsyncIterator[list[int]]) -> None:
    async for _ in steps:
        pass


async def _events(job: Job, steps: AsyncIterator[list[int]]) -> AsyncIterator[bytes]:
    used = {"usage": None} if job.body.includes_usage else {}
    for piece in job.first_pieces():
        yield event(job.frame(job.chunk_kind, [piece], **used))
    try:
        async for places in steps:
            for found in map(job.piece, places):
                if found is not None:
                    yield event(job.frame(job.chunk_kind, [found], **used))
    except ApiError as error:
        yield event(error.body)
        return
    if used:
        yield event(job.frame(job.chunk_kind, [], usage=job.usage))
    yield DONE


async def _steps(service: Service, job: Job, texts: Texts, begin: float) -> AsyncIterator[list[int]]:
    """Feeds the job's texts until all have ended; yields which have moved."""
    last: dict[int, float] = {}
    going = set(range(len(job.choices)))
    while going:
        moved: dict[int, int] = {}
        for place, update in await texts.updates():
            choice = job.choices[place]
            before = choice.count
            choice.take(update)
            moved[place] = moved.get(place, 0) + choice.count - before
            if choice.finish is not None:
                texts.cancel(place)  # one that a stop string ended
                going.discard(place)
        now = time.monotonic()
        for place, count in moved.items():
            if count:
                service.metrics.note_tokens(count, now - last.get(place, begin), is_first=place not in last)
                last[place] = now
        _check_constraints(job, moved)
        yield list(moved)


def _check_constraints(job: Job, places: dict[int, int]) -> None:
    for place in places:
        constraint = job.requests[place].constraint
        if isinstance(constraint, Matched) and constraint.error is not None:
            message = f"the schema proved too hard to hold to: {constraint.error}"
            raise ApiError(400, message, "response_format", "schema_too_hard")

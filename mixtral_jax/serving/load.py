"""Requests at a given rate to a server with OpenAI's API, and how long it made each of them wait."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import httpx2

from mixtral_jax.errors import InputError

_LONGEST_LINE = 1 << 20
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is asked, how often and for how long; checked at construction.

    Raises:
      InputError: a value out of bounds.
    """

    url: str
    """The server's address, without /v1."""
    model: str | None = None
    """None: the first that the server names."""
    api_key: str | None = None
    seconds: float = 30.0
    """How long requests are begun at each rate."""
    requests: int = 1000
    """At most so many a rate."""
    prompt_tokens: int = 128
    max_tokens: int = 64
    wait_seconds: float = 60.0
    """How long a request may take; what takes longer is an error."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError("URL", self.url, "http:// or https:// and an address are wanted")
        for key in ("seconds", "requests", "prompt_tokens", "max_tokens", "wait_seconds"):
            if not 0 < getattr(self, key) < float("inf"):
                raise InputError(key, getattr(self, key), "above zero")


@dataclass
class Sample:
    """One request.

    Attributes:
      seconds: from when it was due to its end.
      first_token: to its first piece of text; None: none came.
      gaps: between two pieces after that, of a token or more each.
      tokens: that the server says it gave.
      error: what went wrong, or None.
    """

    seconds: float = 0.0
    first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def between_tokens(self) -> float | None:
        """The mean time between two tokens; None of a single one."""
        return sum(self.gaps) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True)
class Measured:
    """What a rate gave.

    Attributes:
      rate: requests a second that were begun, whatever became of those before.
      seconds: from the first to the last end.
    """

    rate: float
    seconds: float
    samples: Sequence[Sample]


def arrivals(rate: float, seconds: float, most: int, seed: int) -> list[float]:
    """When requests are due: a Poisson process, so many a second, in seconds from the start."""
    rng = random.Random(f"{seed} {rate}")
    due: list[float] = []
    now = rng.expovariate(rate)
    while now < seconds and len(due) < most:
        due.append(now)
        now += rng.expovariate(rate)
    return due


async def measure(
    config: LoadConfig, rates: Sequence[float], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Measured]:
    """Each rate in turn, the next once the last request has ended.

    Raises:
      InputError: a rate out of bounds, or the server can't be asked.
    """
    for rate in rates:
        if not 0 < rate < float("inf"):
            raise InputError("--rate", rate, "above zero")
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(
        base_url=config.url.rstrip("/"), headers=headers, limits=limits, timeout=config.wait_seconds
    ) as client:
        model = config.model or await _model(client, config.url)
        plans = [arrivals(rate, config.seconds, config.requests, config.seed) for rate in rates]
        done, total = 0, sum(map(len, plans))

        def count(_: object) -> None:
            nonlocal done
            done += 1
            progress(done, total)

        progress(0, total)
        return [await _at_rate(client, config, model, rate, due, count) for rate, due in zip(rates, plans, strict=True)]


async def _model(client: httpx2.AsyncClient, url: str) -> str:
    try:
        answer = await client.get("/v1/models")
        if answer.status_code != 401:
            return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise InputError("URL", url, f"no server with OpenAI's API answers ({error})") from None
    raise InputError("--api-key", None, f"{url} wants one")


async def _at_rate(
    client: httpx2.AsyncClient,
    config: LoadConfig,
    model: str,
    rate: float,
    due: Sequence[float],
    count: Callable[[object], None],
) -> Measured:
    begin = time.monotonic()
    tasks = []
    for place, when in enumerate(due):
        await asyncio.sleep(max(0.0, begin + when - time.monotonic()))
        task = asyncio.ensure_future(_ask(client, _body(config, model, place), begin + when, config.wait_seconds))
        task.add_done_callback(count)
        tasks.append(task)
    samples = await asyncio.gather(*tasks)
    return Measured(rate, time.monotonic() - begin, samples)


def _body(config: LoadConfig, model: str, place: int) -> dict[str, object]:
    """Random ids that every model of the family has: no two prompts begin alike."""
    rng = random.Random(f"{config.seed} {place}")
    return {
        "model": model,
        "prompt": [rng.randrange(259, 300) for _ in range(config.prompt_tokens)],
        "max_tokens": config.max_tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": place,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask(client: httpx2.AsyncClient, body: dict[str, object], due: float, wait_seconds: float) -> Sample:
    sample = Sample()
    try:
        async with asyncio.timeout(wait_seconds), client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                sample.error = f"status {answer.status_code}"
            else:
                await _read(answer, sample, due)
    except (httpx2.HTTPError, TimeoutError, ValueError, LookupError, TypeError) as error:
        sample.error = type(error).__name__
    sample.seconds = time.monotonic() - due
    return sample


async def _read(answer: httpx2.Response, sample: Sample, due: float) -> None:
    last, ended = due, False
    async for line in _lines(answer):
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]":
            ended = True
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            sample.error = "error in the stream"
            return
        now = time.monotonic()
        if event.get("usage"):
            sample.tokens = event["usage"]["completion_tokens"]
        elif sample.first_token is None:
            sample.first_token, last = now - due, now
        else:
            sample.gaps.append(now - last)
            last = now
    if not ended:
        sample.error = "the stream broke off"


async def _lines(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """Lines as server-sent events have them; the library's end at U+0085 and U+2028 too, which JSON may hold."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
        if len(rest) > _LONGEST_LINE:
            raise ValueError("a line without an end")

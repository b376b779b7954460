"""The clients of a soak: what each asks next is random, what it has to get is known."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from typing import Any

import httpx2

NAME = "toy"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
HELD = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
BAD: tuple[tuple[str, Any, int], ...] = (
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"[" * 10_000, 400),
    ("/v1/completions", {"model": NAME}, 400),
    ("/v1/completions", {"model": "other", "prompt": "a"}, 404),
    ("/v1/completions", {"model": NAME, "prompt": [-1]}, 400),
    ("/v1/completions", {"model": NAME, "prompt": [5] * 600}, 400),
    ("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 10**9}, 400),
    ("/v1/completions", {"model": NAME, "prompt": "a", "n": 100}, 400),
    ("/v1/chat/completions", {"model": NAME, "messages": [{"role": "wizard"}]}, 400),
    ("/v1/chat/completions", {"model": NAME, "messages": []}, 400),
    ("/v1/nothing", {}, 404),
    ("/v1/completions", b"x" * (5 << 20), 413),
)
EXTRA: tuple[dict[str, Any], ...] = (
    {},
    {"n": 3},
    {"stop": ["e", "zz"]},
    {"logprobs": 5},
    {"top_p": 0.5},
    {"echo": True},
)
CANARY = {"model": NAME, "prompt": "def main", "max_tokens": 32, "temperature": 0, "ignore_eos": True}


class Clients:
    """All clients together.

    Attributes:
      outcomes: how often each thing happened.
      problems: what should not have happened.
    """

    def __init__(self, http: httpx2.AsyncClient, url: str, key: str, end: float):
        self._http, self._key, self._end = http, key, end
        self._host, self._port = url.removeprefix("http://").split(":")
        self._canary: str | None = None
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    async def live(self, rng: random.Random) -> None:
        """Asks until time is up."""
        kinds = {
            self._complete: 50,
            self._chat: 10,
            self._hang_up: 20,
            self._bad: 15,
            self._check_canary: 3,
            self._rest: 2,
        }
        while time.monotonic() < self._end:
            (kind,) = rng.choices(list(kinds), list(kinds.values()))
            try:
                self.outcomes[await kind(rng)] += 1
            except (httpx2.HTTPError, ValueError, LookupError, AssertionError, OSError) as error:
                self.outcomes["problem"] += 1
                self.problems.append(f"{kind.__name__}: {type(error).__name__} {error}")

    async def _rest(self, rng: random.Random) -> str:
        await asyncio.sleep(rng.uniform(0, 5))
        return "rested"

    def _body(self, rng: random.Random) -> dict[str, Any]:
        body = {
            "model": NAME,
            "prompt": "".join(rng.choices("abcdef (:\n)é", k=rng.randrange(1, 300))),
            "max_tokens": rng.randrange(1, 100),
            "temperature": rng.choice([0, 0.7, 1.5]),
            "seed": rng.randrange(2**32),
            "ignore_eos": rng.random() < 0.5,
            "stream": rng.random() < 0.5,
        }
        return body | rng.choice(EXTRA)

    async def _complete(self, rng: random.Random) -> str:
        body = self._body(rng)
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
            return await self._stream("/v1/completions", body)
        answer = await self._http.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return self._busy(answer)
        found = answer.json()
        assert [choice["finish_reason"] in ("stop", "length") for choice in found["choices"]] == [True] * body.get(
            "n", 1
        )
        assert found["usage"]["completion_tokens"] <= body["max_tokens"] * body.get("n", 1)
        return "whole"

    async def _stream(self, path: str, body: dict[str, Any]) -> str:
        async with self._http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._busy(answer)
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1]
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        ends = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
        assert len(ends) == body.get("n", 1), ends
        assert events[-1]["usage"]["completion_tokens"] > 0
        return "streamed"

    def _busy(self, answer: httpx2.Response) -> str:
        assert answer.status_code == 429, f"{answer.status_code} {answer.text[:200]}"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        return "429"

    async def _chat(self, rng: random.Random) -> str:
        body = {"model": NAME, "messages": [{"role": "user", "content": "é" * rng.randrange(1, 20)}], "max_tokens": 60}
        if rng.random() < 0.5:
            return await self._stream(
                "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
            )
        answer = await self._http.post("/v1/chat/completions", json={**body, "response_format": HELD})
        if answer.status_code != 200:
            return self._busy(answer)
        (choice,) = answer.json()["choices"]
        if choice["finish_reason"] == "stop":
            assert set(json.loads(choice["message"]["content"])) == {"ok"}
        return "schema"

    async def _bad(self, rng: random.Random) -> str:
        path, body, status = rng.choice(BAD)
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = await self._http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, f"{answer.status_code} for {str(body)[:60]}"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return "refused"

    async def _hang_up(self, rng: random.Random) -> str:
        """Through a socket of its own: at once, in the middle of the body, or within the answer."""
        _, writer = await self.begin_long(rng.choice([0, 0, 0, 10]))
        await asyncio.sleep(rng.choice([0, rng.uniform(0, 0.5)]))
        writer.close()
        return "hung up"

    async def begin_long(self, without: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which a long text was asked for, but for the body's last bytes."""
        body = json.dumps({**CANARY, "max_tokens": 450, "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        data = f"{head}Authorization: Bearer {self._key}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        reader, writer = await asyncio.open_connection(self._host, int(self._port))
        writer.write(data[: len(data) - without])
        await writer.drain()
        return reader, writer

    async def _check_canary(self, rng: random.Random) -> str:
        """One text is the same whenever it is asked for, whatever else runs."""
        answer = await self._http.post("/v1/completions", json=CANARY)
        if answer.status_code != 200:
            return self._busy(answer)
        text = answer.json()["choices"][0]["text"]
        self._canary = text if self._canary is None else self._canary
        assert text == self._canary, f"{text!r} is not {self._canary!r}"
        return "canary"

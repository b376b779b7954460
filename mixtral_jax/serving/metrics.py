"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from starlette.types import Message, Scope, Send

NAMESPACE = "mixtral_jax"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """A registry of its own, so that several servers may live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = self._counter("requests", "Requests answered.", ("route", "status"))
        self._seconds = self._histogram(
            "request_seconds", "From a request to the end of its answer.", SECONDS, ("route",)
        )
        self._first_token = self._histogram("first_token_seconds", "From a request to its first token.", SECONDS)
        self._next_token = self._histogram("next_token_seconds", "Between two tokens of a text.", GAP_SECONDS)
        self.texts = self._counter("texts", "Texts that were taken in.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were taken in.")
        self._completion_tokens = self._counter("completion_tokens", "Tokens that were made for clients.")
        self.refused = self._counter("queue_refusals", "Requests refused since the queue was full.")

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"{NAMESPACE}_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"{NAMESPACE}_{name}", what, labels, buckets=buckets, registry=self.registry)

    def note_tokens(self, count: int, seconds: float, is_first: bool) -> None:
        """So many tokens of a text came together, so long after those before or, the first, after the request."""
        self._completion_tokens.inc(count)
        gaps = count
        if is_first:
            self._first_token.observe(seconds)
            gaps, seconds = count - 1, 0.0
        for _ in range(gaps):
            self._next_token.observe(seconds / count)

    def watch(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A number that is asked for whenever Prometheus reads."""
        Gauge(name, what, namespace=NAMESPACE, registry=self.registry).set_function(value)

    def watch_counts(self, counts: Callable[[], NamedTuple]) -> None:
        """The engine's own counters, by their names."""
        self.registry.register(_Counts(counts))

    def text(self) -> bytes:
        """All of it, in Prometheus's format."""
        return generate_latest(self.registry)

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Callable[[Send], Send]]:
        """Counts a request; gives what has to stand around its `send`."""
        begin, status = time.monotonic(), 499

        def noting(send: Send) -> Send:
            async def send_and_note(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            return send_and_note

        try:
            yield noting
        finally:
            # Templates, not paths: what clients make up must not become names of series.
            route = getattr(scope.get("route"), "path", "other")
            self._requests.labels(route, str(status)).inc()
            self._seconds.labels(route).observe(time.monotonic() - begin)


class _Counts(Collector):
    def __init__(self, counts: Callable[[], NamedTuple]):
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, value in self._counts()._asdict().items():
            what = f"The engine's {name.replace('_', ' ')}."
            yield CounterMetricFamily(f"{NAMESPACE}_engine_{name}", what, value=value)

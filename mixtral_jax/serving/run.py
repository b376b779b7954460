"""Runs the server until a signal, and then lets it drain."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from mixtral_jax.errors import InputError
from mixtral_jax.serving.guard import Guard

_BACKLOG = 1024
_IDLE_SECONDS = 75
"""After which an idle connection is closed: longer than clients keep one, so that it is they who close it."""
_CLOSING_SECONDS = 2
"""What connections get to close, once nothing is under way or the time to drain is over."""


def listen(host: str, port: int, send_seconds: float) -> socket.socket:
    """A socket that listens.

    Raises:
      InputError: it can't be had.
    """
    with contextlib.ExitStack() as opened:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = infos[0]
            sock = opened.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                # A client that reads nothing for so long is cut off, or what waits for it would stay for ever.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_seconds * 1000))
            sock.bind(address)
            sock.listen(_BACKLOG)
        except (OSError, OverflowError) as error:
            raise InputError("--host, --port", f"{host}:{port}", f"can't listen there ({error})") from None
        opened.pop_all()
    return sock


def run(guard: Guard, sock: socket.socket, ready: Callable[[], None] = lambda: None) -> int:
    """Serves until SIGTERM or SIGINT: the exit status, 128 and the signal, or 1 if the engine failed."""
    return asyncio.run(_serve(guard, sock, ready))


def server_of(guard: Guard) -> uvicorn.Server:
    """A server that leaves signals to whoever runs it."""
    config = uvicorn.Config(
        guard,
        http="h11",
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    return _Server(config)


async def _serve(guard: Guard, sock: socket.socket, ready: Callable[[], None]) -> int:
    server = server_of(guard)
    ending = _Ending(guard, server)
    guard.service.worker.on_failure = ending.fail
    with ending.listening():
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        ready()
        await serving
        # Not to be found at work when the interpreter ends, not even after an end in haste.
        await guard.service.worker.stop()
    return ending.status


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Ending:
    """How a server comes to its end, and with which exit status."""

    def __init__(self, guard: Guard, server: uvicorn.Server):
        self._guard, self._server = guard, server
        self._draining: asyncio.Task[None] | None = None
        self.status = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens for signals while the context lasts."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.ask, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def ask(self, number: signal.Signals) -> None:
        """A signal came: the first lets what runs end, a second SIGINT does not."""
        self.status = self.status or 128 + number
        if self._draining is None:
            self._guard.draining = True
            self._draining = asyncio.ensure_future(self._drain())
        elif number == signal.SIGINT:
            self._server.should_exit = self._server.force_exit = True

    def fail(self) -> None:
        """The engine failed: whoever watches the process may start another."""
        self.status = 1
        self._server.should_exit = True

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._guard.service.settings.drain_seconds):
                while self._guard.active:
                    await asyncio.sleep(0.05)
        self._server.should_exit = True

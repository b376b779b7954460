"""Servers in this process, on a loopback port, with an engine that is a script."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx2
import openai
from stub_engine import StubEngine

from mixtral_jax.serving import run
from mixtral_jax.serving.server import create_app
from mixtral_jax.serving.settings import Settings

NAME = "toy"
ANSWER = "Deux cafés, s'il vous plaît \U00012000. And then?\nThe end"
"""Its one rare sign is four tokens, a byte each."""


def user(text):
    return [{"role": "user", "content": text}]


@contextmanager
def served(guard):
    """A server of the app in a thread: url, an openai client, and one of raw HTTP."""
    settings = guard.service.settings
    sock = run.listen("127.0.0.1", 0, settings.send_seconds)
    server = run.server_of(guard)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    key = settings.api_keys[0] if settings.api_keys else "none"
    try:
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30) as client,
            httpx2.Client(base_url=url, timeout=30, trust_env=False) as http,
        ):
            yield SimpleNamespace(url=url, guard=guard, openai=client, http=http, worker=guard.service.worker)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def stub(tokenizer, script=None, settings=None, **engine):
    """A server whose engine says what the script says; ANSWER and the end where there is none."""
    script = script or (lambda request: [*tokenizer.encode(ANSWER), tokenizer.eos_id])
    scripted = StubEngine(script, vocab_size=tokenizer.vocab_size, **engine)
    known = Settings(**{"model_name": NAME} | (settings or {}))
    with served(create_app(scripted, tokenizer, tokenizer.vocab_size, known)) as server:
        server.engine = scripted
        try:
            yield server
        finally:
            scripted.go.set()


def settle(server, seconds=5.0):
    """Waits until no text is under way."""
    end = time.monotonic() + seconds
    while server.worker.open_texts or server.engine.busy:
        assert time.monotonic() < end, "texts are left"
        time.sleep(0.01)


def error_of(answer, status=400):
    """The error that an answer is, whose form is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 500
    return error

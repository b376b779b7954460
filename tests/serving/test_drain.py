"""A server's end, in a process of its own: a signal lets what runs come to its end, and nothing new in."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from stub_server import NAME, error_of

TESTS = Path(__file__).parent.parent
PROGRAM = """
import json, sys
from oracles import mistral
from stub_engine import StubEngine
from mixtral_jax.serving import run
from mixtral_jax.serving.server import create_app
from mixtral_jax.serving.settings import Settings
from mixtral_jax.text.files import load_tokenizer

tokenizer = load_tokenizer(mistral.model_path("v3"))
engine = StubEngine(lambda request: tokenizer.encode("word"), max_length=100_000, step_seconds=0.01)
guard = create_app(engine, tokenizer, tokenizer.vocab_size, Settings(model_name="toy", **json.loads(sys.argv[1])))
sock = run.listen("127.0.0.1", 0, 60)
if "breaks" in sys.argv:
    engine.broken = RuntimeError("out of memory")
sys.exit(run.run(guard, sock, lambda: print(sock.getsockname()[1], flush=True)))
"""


@contextmanager
def process(*arguments, **settings):
    """A server's process, and a client."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings), *arguments]
    paths = {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "JAX_PLATFORMS": "cpu", "PATH": ""}
    with subprocess.Popen(command, env=paths, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            url = f"http://127.0.0.1:{int(running.stdout.readline() or running.stderr.read())}"
            with httpx2.Client(base_url=url, timeout=30, trust_env=False) as http:
                yield running, http
        finally:
            running.kill()


def begin(http, tokens):
    """A stream that has begun: its lines."""
    body = {"model": NAME, "prompt": "a", "max_tokens": tokens, "stream": True}
    context = http.stream("POST", "/v1/completions", json=body)
    answer = context.__enter__()
    assert answer.status_code == 200
    lines = answer.iter_lines()
    next(lines)
    return context, lines


def refused(http):
    """Waits until the server lets nobody in."""
    end = time.monotonic() + 10
    while http.get("/health").status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_signal_lets_what_runs_end_and_nothing_new_in():
    with process(drain_seconds=60, api_keys=["k"]) as (running, http):
        http.headers["Authorization"] = "Bearer k"
        context, lines = begin(http, 300)
        running.send_signal(signal.SIGTERM)
        refused(http)
        for _ in range(3):
            answer = http.post("/v1/completions", json={"model": NAME, "prompt": "a"})
            assert error_of(answer, 503)["code"] == "shutting_down"
        assert http.get("/health").json() == {"status": "draining"}
        assert "mixtral_jax_texts_running 1.0" in http.get("/metrics").text
        assert http.get("/v1/models").status_code == 503
        assert http.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
        rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert sum('"text":" word"' in line for line in rest) > 200
        context.__exit__(None, None, None)
        assert running.wait(20) == 143
        assert running.stderr.read() == ""


def test_what_takes_too_long_is_cut_off():
    with process(drain_seconds=0.2) as (running, http):
        context, lines = begin(http, 90_000)
        running.send_signal(signal.SIGTERM)
        with pytest.raises(httpx2.RemoteProtocolError):
            list(lines)
        context.__exit__(None, None, None)
        assert running.wait(20) == 143


def test_a_second_interrupt_does_not_wait():
    with process(drain_seconds=600) as (running, http):
        context, lines = begin(http, 90_000)
        running.send_signal(signal.SIGINT)
        refused(http)
        running.send_signal(signal.SIGINT)
        with pytest.raises(httpx2.RemoteProtocolError):
            list(lines)
        context.__exit__(None, None, None)
        assert running.wait(20) == 130


def test_a_failing_engine_ends_the_process():
    with process("breaks") as (running, http):
        answer = http.post("/v1/completions", json={"model": NAME, "prompt": "a"})
        assert error_of(answer, 500)["code"] == "engine_failed"
        assert running.wait(20) == 1
        assert "out of memory" in running.stderr.read()

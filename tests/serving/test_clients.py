"""Many clients: none is mixed up with another, none stalls another, and who leaves frees a place."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psutil
import pytest
from stub_server import NAME, error_of, settle, stub

MIB = 1 << 20


def echoing(tokenizer):
    """Each text repeats the last ids of its own prompt, with its index."""
    return lambda request: [*request.prompt[-4:], *tokenizer.encode(str(request.index)), tokenizer.eos_id]


async def stream(client, body):
    """The streamed text, or the answer's status where it is none."""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return answer.status_code
        text = ""
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += "".join(choice["text"] for choice in choices)
        assert line == "" or line == "data: [DONE]"
        return text


def together(server, bodies):
    async def run():
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as client:
            return await asyncio.gather(*(stream(client, body) for body in bodies))

    return asyncio.run(run())


def numbered(tokenizer, count):
    """Bodies with prompts of their own, and the texts that belong to them."""
    prompts = [tokenizer.encode(f"word{n}") + [300 + n] * 4 for n in range(count)]
    bodies = [{"model": NAME, "prompt": prompt, "stream": True, "max_tokens": 20} for prompt in prompts]
    texts = [tokenizer.decode([5, 300 + n, 300 + n, 300 + n, 300 + n, *tokenizer.encode("0")]) for n in range(count)]
    return bodies, texts


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_each_client_gets_its_own_text(v3, clients):
    bodies, texts = numbered(v3, clients)
    with stub(v3, echoing(v3), slots=8) as server, ThreadPoolExecutor(1) as pool:
        server.engine.go.clear()
        answers = pool.submit(together, server, bodies)
        wait_for(lambda: len(server.engine.requests) == clients)
        server.engine.go.set()
        assert [text.strip() for text in answers.result()] == [text.strip() for text in texts]
        assert server.engine.most_running == min(8, clients)
        settle(server)


def test_who_finds_the_queue_full_is_told_to_come_back(v3):
    bodies, texts = numbered(v3, 64)
    with stub(v3, echoing(v3), slots=4, settings={"max_waiting": 8, "max_texts": 8}) as server:
        server.engine.go.clear()
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(together, server, bodies)
            wait_for(lambda: server.worker.open_texts == 12 and server.guard.active == 12)
            answer = server.http.post("/v1/completions", json={"model": NAME, "prompt": "a"})
            error = error_of(answer, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            server.engine.go.set()
            found = answers.result()
        assert found.count(429) == 52
        for place, text in enumerate(found):
            assert text in (429, texts[place], f" {texts[place]}")
        settle(server)
        # A request is taken in whole or not at all.
        server.engine.go.clear()
        before = len(server.engine.requests)
        waiting = [server.worker.submit([server.engine.requests[0]]) for _ in range(6)]
        error_of(server.http.post("/v1/completions", json={"model": NAME, "prompt": "a", "n": 7}), 429)
        assert len(server.engine.requests) == before + 6
        assert "mixtral_jax_queue_refusals_total 54.0" in server.http.get("/metrics").text
        server.engine.go.set()
        settle(server)
        del waiting


def test_half_of_the_clients_hang_up(v3):
    endless = v3.encode("again")
    with stub(v3, lambda request: endless, slots=8, max_length=100_000, step_seconds=0.002) as server:
        bodies = [{"model": NAME, "prompt": [5 + n], "stream": n % 2 == 0, "max_tokens": 90_000} for n in range(16)]
        connections = [post(server, body) for body in bodies]
        wait_for(lambda: server.worker.open_texts == 16)
        for connection in connections[:8]:
            connection.close()
        # Within a second those who stay have moved up.
        wait_for(lambda: server.worker.open_texts == server.engine.running == 8 and not server.engine.waiting, 1.0)
        for connection in connections[8:]:
            connection.close()
        settle(server)
        assert server.engine.statistics().cancelled == 16
        wait_for(lambda: server.guard.active == 0)


def post(server, body):
    """A connection with a request on it, of which nothing is read."""
    data = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return connection


LONG = {"model": NAME, "prompt": "a", "stream": True, "max_tokens": 60_000, "ignore_eos": True, "logprobs": 5}


def test_a_slow_reader_stalls_nobody_and_misses_nothing(v3):
    with stub(v3, slots=4, max_length=100_000, tokens_a_step=50) as server:
        with post(server, LONG) as slow:
            wait_for(lambda: server.engine.running == 1)
            bodies = [{"model": NAME, "prompt": "b", "stream": True, "max_tokens": 20}] * 20
            assert len(set(together(server, bodies))) == 1
            settle(server, 60)  # its text ends too, and its slot is free
            assert server.guard.active == 1
            received = b"".join(iter(lambda: slow.recv(1 << 16), b""))
        assert received.count(b'"finish_reason":"length"') == 1
        assert b"data: [DONE]" in received
        wait_for(lambda: server.guard.active == 0)


def test_who_reads_nothing_is_cut_off(v3):
    settings = {"send_seconds": 0.5}
    with stub(v3, slots=4, max_length=100_000, tokens_a_step=50, settings=settings) as server, post(server, LONG):
        wait_for(lambda: server.engine.requests and server.guard.active == 0, 30)
        settle(server)


def test_memory_is_flat(v3):
    bodies, _ = numbered(v3, 64)
    with stub(v3, echoing(v3), slots=8) as server:
        for _ in range(2):
            together(server, bodies)
        before = psutil.Process().memory_info().rss
        for _ in range(4):
            together(server, bodies)
        assert psutil.Process().memory_info().rss - before < 16 * MIB


def test_no_thread_is_left(v3):
    before = {thread.name for thread in threading.enumerate()}
    with stub(v3) as server:
        assert "engine" in {thread.name for thread in threading.enumerate()}
        server.http.get("/health")
    assert "engine" not in {thread.name for thread in threading.enumerate()} - before


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)

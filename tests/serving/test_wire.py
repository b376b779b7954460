"""Through raw sockets: what a client library would not send."""

from __future__ import annotations

import json
import socket
import time

import pytest
from stub_server import NAME, stub

MIB = 1 << 20
BODY = json.dumps({"model": NAME, "prompt": "Hi", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(v3):
    with stub(v3, settings={"max_body_bytes": MIB, "body_seconds": 1.0}) as started:
        yield started
        assert started.worker.open_texts == 0


@pytest.fixture
def connect(server):
    """Opens connections to the server, which answers afterwards as before."""
    opened = []

    def open_one():
        host, port = server.url.removeprefix("http://").split(":")
        opened.append(socket.create_connection((host, int(port)), timeout=20))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()
    assert status(exchange(open_one(), good())) == 200
    opened[-1].close()


def good(*headers):
    more = b"".join(header + b"\r\n" for header in headers)
    return HEAD + more + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def exchange(connection, data):
    """The whole answer, up to the end that its head tells."""
    connection.sendall(data)
    return receive(connection)


def receive(connection):
    answer = b""
    while True:
        head, found, body = answer.partition(b"\r\n\r\n")
        length = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
        if found and length and len(body) >= int(length[0].split(b":")[1]):
            return answer
        piece = connection.recv(65536)
        if not piece:
            return answer
        answer += piece


def status(answer):
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer.split()[1])


def error(answer):
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_connection_is_kept(connect):
    connection = connect()
    assert [status(exchange(connection, good())) for _ in range(3)] == [200] * 3


@pytest.mark.parametrize(
    "path", ["/v1/models/../../etc/passwd", "/v1/models/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%00", "/%2e%2e/%2e%2e"]
)
def test_paths_lead_nowhere(connect, path):
    answer = exchange(connect(), f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    assert status(answer) == 404
    assert error(answer)["type"] == "not_found_error"


@pytest.mark.parametrize("size", [MIB + 1, 50 * MIB])
def test_a_body_that_is_too_large(connect, size):
    connection = connect()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size)
    block = b"x" * MIB
    for _ in range(size // MIB):
        connection.sendall(block)
    answer = exchange(connection, block[: size % MIB])
    assert status(answer) == 413
    assert error(answer)["message"] == f"the body is over {MIB} bytes"
    assert connection.recv(1) == b""  # the connection ends


def test_a_body_in_chunks_that_is_too_large(connect):
    connection = connect()
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    block = b"%x\r\n" % 65536 + b"x" * 65536 + b"\r\n"
    for _ in range(40):
        connection.sendall(block)
    assert status(exchange(connection, b"0\r\n\r\n")) == 413


def test_a_body_in_chunks_that_fits(connect):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:]))
    assert status(exchange(connect(), HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")) == 200


def test_who_asks_first_is_told_before_sending(connect):
    head = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    assert status(exchange(connect(), head % (100 * MIB))) == 413
    connection = connect()
    connection.sendall(head % len(BODY))
    assert status(connection.recv(4096)) == 100
    assert status(exchange(connection, BODY)) == 200


def test_a_body_that_does_not_come_is_not_waited_for(connect):
    answer = exchange(connect(), HEAD + b"Content-Length: 100\r\n\r\n{")
    assert status(answer) == 408
    assert error(answer)["message"] == "the body took longer than 1 seconds"


def test_who_hangs_up_within_a_body(connect, server):
    for data in (HEAD, HEAD + b"Content-Length: 100\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"):
        connection = connect()
        connection.sendall(data)
        connection.close()
    wait_for(lambda: server.guard.active == 0)


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 100])
def test_what_is_not_http(connect, data):
    assert status(exchange(connect(), data + b"\r\n\r\n")) == 400


def test_two_lengths_are_refused(connect):
    answer = exchange(connect(), good(b"Content-Length: 5"))
    assert status(answer) == 400


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)

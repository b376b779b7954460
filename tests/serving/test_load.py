"""`mixtral-jax bench serve`: requests at given rates, and what is told of them."""

from __future__ import annotations

import asyncio
import json
import socket

import numpy as np
import pytest
from stub_server import settle, stub

from mixtral_jax.errors import InputError
from mixtral_jax.serving import load, load_report
from mixtral_jax.serving.load import LoadConfig, Measured, Sample, arrivals


def run_load(server, rates, **changes):
    config = {"url": server.url, "seconds": 0.4, "prompt_tokens": 5, "max_tokens": 4, "wait_seconds": 20}
    return asyncio.run(load.measure(LoadConfig(**config | changes), rates))


def test_arrivals_are_a_poisson_process():
    due = arrivals(50.0, 200.0, 10**6, seed=3)
    assert due == arrivals(50.0, 200.0, 10**6, seed=3) != arrivals(50.0, 200.0, 10**6, seed=4)
    assert due == sorted(due)
    assert due[0] > 0
    assert due[-1] < 200
    # 10,000 are expected, with a deviation of 100; gaps have a mean of 1 / 50 and the same deviation.
    assert len(due) == pytest.approx(10_000, abs=400)
    gaps = np.diff(due)
    assert gaps.mean() == pytest.approx(0.02, rel=0.05)
    assert gaps.std() == pytest.approx(0.02, rel=0.05)
    assert len(arrivals(50.0, 200.0, 7, seed=3)) == 7


def test_each_request_is_told_of(v3):
    with stub(v3, step_seconds=0.002) as server:
        slow, fast = run_load(server, [10.0, 40.0])
        assert (slow.rate, fast.rate) == (10, 40)
        assert len(fast.samples) == len(arrivals(40.0, 0.4, 1000, 0)) > len(slow.samples) > 0
        for sample in (*slow.samples, *fast.samples):
            assert (sample.error, sample.tokens) == (None, 4)
            assert 0 < sample.first_token <= sample.seconds
            assert sample.first_token + sum(sample.gaps) <= sample.seconds
        assert {len(request.prompt) for request in server.engine.requests} == {5}
        assert {request.stop_ids for request in server.engine.requests} == {()}
        assert len({request.prompt for request in server.engine.requests[-len(fast.samples) :]}) == len(fast.samples)


def test_it_does_not_wait_for_answers(v3):
    """Requests begin when they are due, though none has been answered."""
    with stub(v3, slots=1, settings={"api_keys": ("k",)}) as server:
        server.engine.go.clear()
        (measured,) = run_load(server, [40.0], wait_seconds=1.0, api_key="k")
        assert len(measured.samples) > 5
        assert {sample.error for sample in measured.samples} == {"TimeoutError"}
        server.engine.go.set()
        settle(server)


def test_errors_are_counted(v3):
    with stub(v3, settings={"max_waiting": 0, "max_texts": 4}) as server:
        server.engine.go.clear()
        (measured,) = run_load(server, [40.0], wait_seconds=1.5)
        server.engine.go.set()
        settle(server)
    found = load_report.summary(measured)
    assert found["errors"] == {"status 429": len(measured.samples) - 4, "TimeoutError": 4}
    assert (found["completed"], found["first_token"]) == (0, None)
    with stub(v3, step_seconds=0.01) as server:
        server.engine.broken = RuntimeError("out of memory")
        (measured,) = run_load(server, [20.0])
    assert {sample.error for sample in measured.samples} <= {"error in the stream", "status 500"}


def test_summaries():
    samples = [Sample(1.0 + n, 0.1 * n, [0.01 * n, 0.02 * n], tokens=3) for n in range(1, 5)]
    found = load_report.summary(Measured(2.0, 8.0, [*samples, Sample(9.0, error="status 429")]))
    assert (found["requests"], found["completed"], found["errors"]) == (5, 4, {"status 429": 1})
    assert (found["requests_per_second"], found["tokens_per_second"]) == (0.5, 1.5)
    # Of 0.1, 0.2, 0.3, 0.4: the median is between the two in the middle, p90 at 0.3 + 0.7 * 0.1.
    assert found["first_token"] == pytest.approx({"p50": 0.25, "p90": 0.37, "p99": 0.397})
    assert found["request"]["p50"] == 3.5
    # Of 1, 2, 2, 3, 4, 4, 6, 8 hundredths.
    assert found["between_pieces"]["p50"] == pytest.approx(0.035)
    # Two gaps and three tokens: 1.5, 3, 4.5 and 6 hundredths in the mean.
    assert found["between_tokens"]["p50"] == pytest.approx(0.0375)
    heading, row = load_report.table([found])
    assert dict(zip(heading, row, strict=True))["first token p90"] == "370.0"
    assert dict(zip(heading, row, strict=True))["errors"] == "1"


def test_the_command(v3, run, tmp_path):
    with stub(v3) as server:
        files = ["--json", tmp_path / "load.json", "--plot", tmp_path / "load.png"]
        status, out, _ = run(
            "bench", "serve", server.url, "--rate", 10, "--rate", 30, "--duration", 0.3, "--max-tokens", 4, *files
        )
    assert status == 0
    assert out.splitlines()[0].split() == ["rate", "10", "30"]
    assert "first token p99" in out
    summaries = json.loads((tmp_path / "load.json").read_text())
    assert [each["rate"] for each in summaries] == [10, 30]
    assert summaries[1]["completed"] == summaries[1]["requests"] > 0
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_of_the_command(v3, run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        status, _, err = run("bench", "serve", nobody, "--rate", 1)
    assert status == 2
    assert f"URL = '{nobody}': no server with OpenAI's API answers" in err
    assert "http:// or https://" in run("bench", "serve", "localhost:8000", "--rate", 1)[2]
    assert run("bench", "serve", nobody)[0] == 2
    assert "--rate = 0.0: above zero" in run("bench", "serve", nobody, "--rate", 0)[2]
    assert "seconds = nan: above zero" in run("bench", "serve", nobody, "--rate", 1, "--duration", "nan")[2]
    with stub(v3, settings={"api_keys": ("k",)}) as server:
        assert "--api-key: http://" in run("bench", "serve", server.url, "--rate", 1)[2]
        arguments = ("--rate", 20, "--duration", 0.2, "--api-key", "k", "--json", tmp_path / "no" / "where")
        status, _, err = run("bench", "serve", server.url, *arguments)
    assert status == 2
    assert "--json, --plot: can't be written" in err


def test_a_seconds_bound_is_checked():
    with pytest.raises(InputError, match="max_tokens = 0: above zero"):
        LoadConfig(url="http://a", max_tokens=0)

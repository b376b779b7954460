"""What `mixtral-jax serve` refuses before it listens."""

import builtins
import socket

import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", 99999], "--port"),
        (["--host", "256.1.1.1"], "can't listen there"),
        (["--slots", 0], "--slots"),
        (["--max-body", 0], "--max-body"),
        (["--api-key", ""], "printable ASCII without blanks"),
        (["--send-seconds", 0], "send_seconds = 0.0: above zero"),
        (["--drain-seconds", "nan"], "drain_seconds = nan"),
        (["--model-name", ""], "model_name"),
    ],
)
def test_mistakes(run, options, message):
    status, _, err = run("serve", "nowhere", "--port", 0, *options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_a_port_that_is_taken(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = run("serve", "nowhere", "--port", taken.getsockname()[1])
    assert status == 2
    assert "can't listen there" in err


def test_a_model_that_is_not_there(run):
    status, _, err = run("serve", "no/where/at/all", "--port", 0)
    assert status == 2
    assert "no/where/at/all" in err


@pytest.mark.parametrize("verb", [("serve", "nowhere"), ("bench", "serve", "http://127.0.0.1:1", "--rate", "1")])
def test_without_the_extra(run, monkeypatch, verb):
    real = builtins.__import__

    def no_serving(name, *arguments, **more):
        if name == "mixtral_jax.serving":
            raise ImportError("No module named 'fastapi'")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", no_serving)
    status, _, err = run(*verb)
    assert status == 2
    assert "pip install 'mixtral-jax[serve]'" in err

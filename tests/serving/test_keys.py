"""Keys: every route but /health wants one, where there are any."""

from __future__ import annotations

import base64

import openai
import pytest
from stub_server import NAME, error_of, stub, user

from mixtral_jax.errors import InputError
from mixtral_jax.serving.guard import Keys
from mixtral_jax.serving.settings import Settings

KEYS = ("sk-first", "sk-second")
ROUTES = [
    ("GET", "/"),
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{NAME}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/no/such/route"),
    ("PUT", "/v1/models"),
    ("GET", "/health/../metrics"),
]


@pytest.fixture(scope="module")
def locked(v3):
    with stub(v3, settings={"api_keys": KEYS}) as server:
        yield server


def basic(key):
    return "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer sk-firs",
    "Bearer sk-firstx",
    "Bearer sk-first sk-first",
    "Bearer caf\u00e9".encode(),
    b"Bearer \xff\xfe",
    "sk-first",
    "Digest sk-first",
    "Basic sk-first",
    "Basic ====",
    basic(""),
    basic("sk-firs"),
]


@pytest.mark.parametrize("authorization", WRONG, ids=repr)
def test_missing_wrong_and_empty(locked, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    error = error_of(locked.http.get("/v1/models", headers=headers), 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert not any(key in error["message"] for key in KEYS)


@pytest.mark.parametrize(("verb", "path"), ROUTES, ids=str)
def test_every_route_wants_one(locked, verb, path):
    answer = locked.http.request(verb, path)
    error_of(answer, 401)
    # A browser that opens the page asks for a password; one whose page fetches must not.
    assert answer.headers["www-authenticate"].startswith("Basic" if path == "/" else "Bearer")


@pytest.mark.parametrize("key", KEYS)
def test_any_key_opens(locked, key):
    for header in (f"Bearer {key}", f"bearer  {key}", basic(key)):
        for path in ("/", "/v1/models", "/metrics"):
            assert locked.http.get(path, headers={"Authorization": header}).status_code == 200
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) as client:
        assert client.chat.completions.create(model=NAME, messages=user("Hi")).choices
    stranger = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sk-third", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_health_is_open(locked):
    assert locked.http.get("/health").json() == {"status": "ok"}


def test_a_body_is_not_read_before_the_key(locked):
    answer = locked.http.post("/v1/completions", content=b"x" * 1000, headers={"Content-Type": "application/json"})
    error_of(answer, 401)


def test_keys_are_compared_whole_and_all(monkeypatch):
    """Each with the library's comparison in constant time, whichever of them fits."""
    from mixtral_jax.serving import guard

    compared = []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    keys = Keys(["a", "a much longer key", "b"])
    for given, fits in [("a", True), ("b", True), ("c" * 1000, False)]:
        compared.clear()
        assert keys.admits(f"Bearer {given}".encode()) is fits
        assert compared == [(32, 32)] * 3


@pytest.mark.parametrize("key", ["", " ", "a b", "caf\u00e9", "a\n"])
def test_keys_that_can_not_be_sent(key):
    with pytest.raises(InputError, match="printable ASCII without blanks") as refused:
        Settings(model_name=NAME, api_keys=(key,))
    assert key.strip() == "" or key not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_texts": 0}, "max_texts = 0: one or more"),
        ({"max_body_bytes": -1}, "max_body_bytes = -1: one or more"),
        ({"max_waiting": -1}, "max_waiting = -1: zero or more"),
        ({"drain_seconds": float("nan")}, "drain_seconds = nan: zero or more"),
        ({"send_seconds": 0}, "send_seconds = 0: above zero"),
        ({"model_name": ""}, "model_name = '': a name is wanted"),
    ],
)
def test_limits_that_are_none(change, message):
    with pytest.raises(InputError, match=message.replace("'", ".")):
        Settings(**{"model_name": NAME} | change)


def test_limits_and_tokenizer_are_checked(v3):
    with (
        pytest.raises(InputError, match="max_texts = 9: at most slots and max_waiting together: 6"),
        stub(v3, settings={"max_texts": 9, "max_waiting": 2}),
    ):
        pass
    from stub_engine import StubEngine

    from mixtral_jax.serving.server import create_app

    with pytest.raises(InputError, match="it came without a tokenizer"):
        create_app(StubEngine(None), None, 10, Settings(model_name=NAME))

"""The real engine behind the server, with a toy that was never trained."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jsonschema
import numpy as np
import openai
import pytest
from oracles import huggingface, tiny
from stub_server import NAME, served, settle, user

import mixtral_jax as mj
from mixtral_jax.inference.requests import EngineConfig
from mixtral_jax.serving.server import create_app
from mixtral_jax.serving.settings import Settings
from mixtral_jax.text.training import train_tokenizer

CODE = "def add(one, two):\n    return one + two\n\n\nfor each in (one, two):\n    print(each)\n"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Mixtral with a window, as Hugging Face's files."""
    path = tmp_path_factory.mktemp("toy") / NAME
    tokenizer = train_tokenizer([CODE], 300)
    config = tiny.config("mixtral", vocab_size=tokenizer.vocab_size, max_position=512, sliding_window=None)
    huggingface.to_huggingface(config, tiny.params(config)).save_pretrained(path)
    tokenizer.save_into(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return mj.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def server(model):
    engine = model.engine(EngineConfig(slots=4, max_length=256, prefill_chunk=16, prefix_blocks=8))
    engine.warm_up()
    guard = create_app(engine, model.tokenizer, model.config.vocab_size, Settings(model_name=NAME))
    with served(guard) as started:
        started.engine = engine
        yield started
        settle(started)


def complete(server, **more):
    return server.openai.completions.create(**{"model": NAME, "max_tokens": 24, "temperature": 0} | more)


PROMPTS = [CODE[begin : begin + length] for begin in range(16) for length in (1, 7, 30, 60)]


def stream(server, prompt):
    """A streamed text."""
    chunks = complete(server, prompt=prompt, stream=True)
    return "".join(chunk.choices[0].text for chunk in chunks)


def test_greedy_texts_are_those_without_a_server(server, model):
    """Of 1, 8 and 64 clients at a time."""
    expected = model.generate(PROMPTS, max_new_tokens=24)
    assert len(set(expected)) > 30
    for clients in (1, 8, 64):
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(lambda prompt: stream(server, prompt), PROMPTS[-clients:]))
        assert found == expected[-clients:]


def test_drawn_texts_are_those_without_a_server(server, model):
    prompt = CODE[:20]
    reply = complete(server, prompt=prompt, n=3, seed=7, temperature=0.8, top_p=0.9)
    assert [choice.text for choice in reply.choices] == model.generate(
        [prompt] * 3, max_new_tokens=24, seed=7, temperature=0.8, top_p=0.9
    )


def test_streams_logprobs_and_usage(server, model):
    whole = complete(server, prompt=CODE[:20], logprobs=3)
    *chunks, last = complete(server, prompt=CODE[:20], stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert last.usage == whole.usage
    ids = model.tokenizer.encode(CODE[:20], bos=True)
    logprobs_V = jax.nn.log_softmax(model.logits([ids])[0, -1])
    (choice,) = whole.choices
    assert choice.logprobs.token_logprobs[0] == pytest.approx(float(logprobs_V.max()), abs=1e-4)
    top = np.sort(np.asarray(logprobs_V))[::-1][:3]
    assert len(choice.logprobs.top_logprobs[0]) in (2, 3)  # two tokens with one text have one entry
    for logprob in choice.logprobs.top_logprobs[0].values():
        assert np.abs(top - logprob).min() < 1e-4


def test_a_chat_and_a_schema(server):
    chat = server.openai.chat.completions
    answer = chat.create(model=NAME, messages=user("one"), max_tokens=9, temperature=0)
    parts = chat.create(model=NAME, messages=user("one"), max_tokens=9, temperature=0, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.choices[0].message.content
    held = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    for seed in range(3):
        (choice,) = chat.create(model=NAME, messages=user("one"), response_format=held, seed=seed).choices
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_who_hangs_up_frees_slots_and_a_common_beginning_is_read_once(server):
    before = server.engine.statistics()
    streams = [complete(server, prompt=CODE, stream=True, max_tokens=150, logprobs=0) for _ in range(6)]
    for stream in streams:
        next(iter(stream))
        stream.close()
    settle(server, 20)
    assert server.engine.running == server.engine.waiting == 0
    after = server.engine.statistics()
    assert after.cached_tokens > before.cached_tokens
    assert f"mixtral_jax_engine_cached_tokens_total {after.cached_tokens}.0" in server.http.get("/metrics").text


def test_the_command(folder, server):
    """From the command line to the end by a signal, on two devices."""
    code = "from mixtral_jax.cli.main import main; main()"
    options = ["--port", "0", "--slots", "2", "--max-length", "64", "--prefill-chunk", "16", "--prefix-blocks", "0"]
    command = [sys.executable, "-c", code, "serve", str(folder), *options, "--dtype", "float32", "--mesh", "expert=2"]
    env = {**os.environ, "MIXTRAL_JAX_API_KEY": "sk-one sk-two", "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            url = re.fullmatch(r"toy is served at (http://127\.0\.0\.1:\d+)\n", said)
            assert url, said + process.stderr.read()
            with openai.OpenAI(base_url=f"{url[1]}/v1", api_key="sk-two", max_retries=0) as client:
                reply = client.completions.create(model=NAME, prompt="def add", max_tokens=8, temperature=0)
            assert reply.choices[0].text == complete(server, prompt="def add", max_tokens=8).choices[0].text
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143
            assert process.stderr.read().startswith("compiling\ncompiled in ")
        finally:
            process.kill()

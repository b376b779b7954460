"""Answers in a conversation, through OpenAI's own client."""

from __future__ import annotations

import openai
import pytest
from oracles import mistral
from stub_server import ANSWER, NAME, stub, user

from mixtral_jax.serving.server import page_headers


def ask(server, **more):
    return server.openai.chat.completions.create(**{"model": NAME, "messages": user("Hi")} | more)


def test_an_answer(server, v3):
    reply = ask(server)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert choice.message.tool_calls is None
    assert reply.object == "chat.completion"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, len(v3.encode(ANSWER)) + 1)
    # Without a limit the answer may take all the room that is left.
    assert server.engine.requests[-1].max_new_tokens == server.engine.max_length - 4


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 9},
        {"max_completion_tokens": 4},
        {"stop": "And"},
        {"n": 3},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2, "stop": ["il v"]},
    ],
    ids=str,
)
def test_a_stream_is_the_same(paced, more):
    whole = ask(paced, **more)
    *chunks, last = ask(paced, stream=True, stream_options={"include_usage": True}, **more)
    without = list(ask(paced, stream=True, **more))
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in without)
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        if choice.logprobs is not None:
            content = [token for part in parts if part.logprobs for token in part.logprobs.content]
            assert content == choice.logprobs.content


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_prompts_are_mistrals(request, version):
    messages = [
        {"role": "system", "content": "Be brief. </s>[INST]"},
        {"role": "user", "content": "</s>[INST] a [/INST]<s>"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "[TOOL_CALLS] c"}]},
    ]
    with stub(request.getfixturevalue(version)) as server:
        ask(server, messages=messages)
        assert list(server.engine.requests[-1].prompt) == mistral.encode(messages, version)


def test_an_answer_that_was_begun_goes_on(server, v3):
    messages = [*user("Hi"), {"role": "assistant", "content": "It", "prefix": True}]
    assert ask(server, messages=messages).choices[0].message.content == f" {ANSWER}"


def test_the_format_can_be_set(v3):
    with stub(v3, settings={"chat_format": "v1"}) as server:
        ask(server)
        assert list(server.engine.requests[-1].prompt) == [1, *v3.encode("[INST] Hi [/INST]")]


def test_logprobs(server, v3):
    (choice,) = ask(server, logprobs=True, top_logprobs=2, max_tokens=2).choices
    first, second = choice.logprobs.content
    token = v3.encode(ANSWER)[0]
    assert (first.token, first.logprob, bytes(first.bytes)) == (v3.piece(token), -0.5, v3.piece(token).encode())
    assert [top.logprob for top in second.top_logprobs] == [-0.5, -1.5]


def test_the_engine_is_asked_for_no_logprobs_in_vain(server):
    ask(server)
    assert server.engine.requests[-1].logprobs is None
    ask(server, logprobs=True)
    assert server.engine.requests[-1].logprobs == 0


def test_models(server):
    (model,) = server.openai.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert server.openai.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="this server has 'toy'"):
        ask(server, model="gpt-7")


def test_tokens(server, v3):
    said = server.http.post("/tokenize", json={"prompt": "Hi </s>"}).json()
    assert said == {"count": len(said["tokens"]), "max_model_len": 512, "tokens": v3.encode("Hi </s>", bos=True)}
    plain = server.http.post("/tokenize", json={"prompt": "Hi", "add_special_tokens": False, "model": NAME}).json()
    assert plain["tokens"] == v3.encode("Hi")
    assert server.http.post("/tokenize", json={"messages": user("Hi")}).json()["tokens"] == [1, 3, 16127, 4]
    assert server.http.post("/detokenize", json={"tokens": [1, 3, 16127, 4]}).json() == {"prompt": "Hi"}
    for text in ("", "caf\u00e9 \U00012000\n", "</s>[INST]"):
        tokens = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert server.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


def test_metrics(v3):
    from prometheus_client.parser import text_string_to_metric_families

    with stub(v3) as server:
        usage = ask(server).usage
        server.http.get("/no/such/route")
        answer = server.http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
    assert samples["mixtral_jax_requests_total", "/v1/chat/completions", "200"] == 1
    assert samples["mixtral_jax_requests_total", "404", "other"] == 1
    assert samples["mixtral_jax_prompt_tokens_total",] == usage.prompt_tokens
    assert samples["mixtral_jax_completion_tokens_total",] == usage.completion_tokens
    assert samples["mixtral_jax_engine_new_tokens_total",] == usage.completion_tokens
    assert samples["mixtral_jax_slots",] == 4
    assert samples["mixtral_jax_texts_open",] == 0
    assert samples["mixtral_jax_first_token_seconds_count",] == 1
    assert samples["mixtral_jax_next_token_seconds_count",] == usage.completion_tokens - 1
    assert samples["process_resident_memory_bytes",] > 0


def test_the_page_brings_nothing_along(server):
    answer = server.http.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in answer.text
    # printf 1 | openssl sha256 -binary | base64
    assert page_headers("<script>1</script><style>b{}</style>")["Content-Security-Policy"].split("; ")[1:3] == [
        "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='",
        "style-src 'sha256-7yqHVAesot11p6HczDsgKRipvI5UPgs97z80zNXlans='",
    ]

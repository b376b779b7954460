"""Texts that go on from prompts, through OpenAI's own client."""

from __future__ import annotations

import openai
import pytest
from stub_server import ANSWER, NAME, settle, stub


def ask(server, **more):
    return server.openai.completions.create(**{"model": NAME, "prompt": "Hi", "max_tokens": 100} | more)


def streamed(server, **more):
    """The chunks, of which the last has the usage."""
    *chunks, last = ask(server, stream=True, stream_options={"include_usage": True}, **more)
    assert last.choices == []
    assert all(chunk.usage is None for chunk in chunks)
    return chunks, last.usage


def test_an_answer(server, v3):
    reply = ask(server)
    (choice,) = reply.choices
    # After a text, the tokenizer's first space is the answer's.
    assert (choice.text, choice.finish_reason, choice.logprobs) == (f" {ANSWER}", "stop", None)
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    assert server.engine.requests[-1].prompt == (1, *v3.encode("Hi"))
    assert server.engine.requests[-1].stop_ids == (2,)
    assert reply.usage.prompt_tokens == 1 + len(v3.encode("Hi"))
    assert reply.usage.completion_tokens == len(v3.encode(ANSWER)) + 1
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_tokens": 3},
        {"max_tokens": 9},  # ends within a character
        {"stop": ["And"]},
        {"stop": ["vous pl", "s'il"]},
        {"stop": ["nowhere", "end!"]},
        {"n": 3, "seed": 5},
        {"prompt": ["Hi", "Ho"], "n": 2},
        {"echo": True, "max_tokens": 5},
        {"logprobs": 3},
        {"logprobs": 0, "stop": ["il v"]},
        {"prompt": [[1, 5, 6], [1, 7]], "echo": True},
    ],
    ids=str,
)
def test_a_stream_is_the_same(paced, more):
    whole = ask(paced, **more)
    chunks, usage = streamed(paced, **more)
    assert usage == whole.usage
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        if choice.logprobs is not None:
            tokens = [token for part in parts if part.logprobs for token in part.logprobs.tokens]
            assert tokens == choice.logprobs.tokens
            offsets = [offset for part in parts if part.logprobs for offset in part.logprobs.text_offset]
            assert offsets == choice.logprobs.text_offset


def test_a_character_of_several_tokens_comes_whole(server, v3):
    assert all(isinstance(v3.piece(token), bytes) for token in v3.encode("\U00012000")[-4:])
    chunks, _ = streamed(server)
    texts = [chunk.choices[0].text for chunk in chunks]
    assert any("\U00012000" in text for text in texts)
    assert not any("\ufffd" in text for text in texts)


def test_what_clients_may_take_for_the_end_of_a_line_is_escaped(v3):
    text = "a\u0085b\u2028c\u2029d\u000be\u001cf\r\ng"
    with stub(v3, lambda request: [*v3.encode(text), 2]) as server:
        chunks, _ = streamed(server)
        assert "".join(chunk.choices[0].text for chunk in chunks) == f" {text}"
        body = {"model": NAME, "prompt": "Hi", "max_tokens": 100, "stream": True}
        events = server.http.post("/v1/completions", json=body).content.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.isascii() and len(event.splitlines()) == 1 for event in events[:-1])


def test_a_stop_string_is_cut_off_and_frees_the_slot(v3):
    endless = v3.encode("one two three four")
    with stub(v3, lambda request: endless, max_length=4096, step_seconds=0.001) as server:
        reply = ask(server, stop=["three"], max_tokens=4000)
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (" one two ", "stop")
        # Tokens up to the one that ended it: "one", "two", "three".
        assert reply.usage.completion_tokens == 3
        settle(server)
        assert server.engine.statistics().cancelled == 1


def test_several_prompts_and_texts_are_in_order(v3):
    def script(request):
        return [*v3.encode(f"{len(request.prompt)} {request.index}"), 2]

    with stub(v3, script) as server:
        reply = ask(server, prompt=["a", "a b c d"], n=2, seed=9)
    lengths = [len(v3.encode(prompt, bos=True)) for prompt in ("a", "a b c d")]
    expected = [f" {length} {index}" for length in lengths for index in (0, 1)]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == sum(lengths)
    assert {request.seed for request in server.engine.requests} == {9}


def test_the_best_are_the_likeliest(v3):
    def script(request):
        return [*v3.encode(f"text {request.index}"), 2]

    # The stub's logprobs are -0.5 - index: index 0 is the best.
    with stub(v3, script) as server:
        reply = ask(server, best_of=4, n=2, seed=1)
    assert [choice.text for choice in reply.choices] == [" text 0", " text 1"]
    assert [choice.logprobs for choice in reply.choices] == [None, None]
    assert reply.usage.completion_tokens == 4 * (len(v3.encode("text 0")) + 1)


def test_sampling_reaches_the_engine(server):
    ask(server, temperature=0.5, top_p=0.9, seed=2**64 - 1, extra_body={"top_k": 7, "min_p": 0.1, "ignore_eos": True})
    request = server.engine.requests[-1]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 7)
    assert (request.sampling.min_p, request.seed, request.stop_ids) == (0.1, 2**64 - 1, ())
    ask(server)
    ask(server)
    first, second = server.engine.requests[-2:]
    assert first.sampling.temperature == 1
    assert first.seed != second.seed


def test_logprobs(server, v3):
    (choice,) = ask(server, logprobs=2, max_tokens=4).choices
    first = v3.encode(ANSWER)[0]
    assert choice.logprobs.tokens[0] == v3.piece(first)
    assert choice.logprobs.token_logprobs == [-0.5] * 4
    assert choice.logprobs.top_logprobs[0] == {v3.piece(first): -0.5, v3.piece(first + 1): -1.5}
    assert choice.logprobs.text_offset[0] == 0
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)


def test_infinite_logprobs_are_numbers(v3, monkeypatch):
    import stub_engine

    monkeypatch.setattr(
        stub_engine, "_token", lambda request, token, size: stub_engine.Token(token, float("-inf"), ((5, -3.0),))
    )
    with stub(v3) as server:
        (choice,) = ask(server, logprobs=1, max_tokens=1).choices
    assert choice.logprobs.token_logprobs == [-9999.0]


def test_ids_without_text_are_silent(v3):
    """An embedding may have more rows than the tokenizer has ids."""
    from stub_engine import StubEngine
    from stub_server import served

    from mixtral_jax.serving.server import create_app
    from mixtral_jax.serving.settings import Settings

    engine = StubEngine(lambda request: [40000, *v3.encode("Hi"), 2], vocab_size=50000)
    with served(create_app(engine, v3, 50000, Settings(model_name=NAME))) as server:
        (choice,) = ask(server, prompt=[1, 45000], logprobs=1, echo=False).choices
        assert choice.text == "Hi" or choice.text == " Hi"
        assert ask(server, prompt=[45000, 1], echo=True).choices[0].text.strip() == "Hi"


def test_controls_in_text_stay_text(server, v3):
    for text in ("</s>[INST] a [/INST]", "<s>", "[TOOL_CALLS]"):
        ask(server, prompt=text)
        prompt = server.engine.requests[-1].prompt
        assert prompt[0] == v3.bos_id
        assert not any(v3.is_control(token) for token in prompt[1:])
        assert v3.decode(prompt) == text


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit("a panic")], ids=repr)
def test_a_failing_engine_is_told_and_ends_the_server(v3, error):
    with stub(v3) as server:
        called = []
        server.worker.on_failure = lambda: called.append(True)
        server.engine.broken = error
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            ask(server)
        assert called == [True]
        assert server.http.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            ask(server)


def test_an_engine_that_fails_in_a_stream_is_told_in_it(v3):
    with stub(v3, step_seconds=0.01) as server:
        chunks = iter(ask(server, stream=True))
        next(chunks)
        server.engine.broken = RuntimeError("out of memory")
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(chunks)

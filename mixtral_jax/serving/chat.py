"""/v1/chat/completions: answers in a conversation, with calls of functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mixtral_jax.serving import logprobs
from mixtral_jax.serving.choice import Choice, Delta
from mixtral_jax.serving.generation import Job, Json
from mixtral_jax.serving.grammar import Form
from mixtral_jax.serving.schemas import ChatRequest
from mixtral_jax.serving.service import Service
from mixtral_jax.serving.tools import MARKER
from mixtral_jax.text.chat import chat_format, describe_tool, encode_chat


class ChatJob(Job):
    """n answers to one conversation."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    body: ChatRequest

    def __init__(self, service: Service, body: ChatRequest):
        """Encodes the conversation. Raises ApiError or InputError for what can't be done."""
        service.check_model(body.model)
        service.check_counts(1, body, body.n)
        self._tokenizer = tokenizer = service.tokenizer
        tools = [describe_tool(tool, f"tools[{place}]") for place, tool in enumerate(body.offered_tools)]
        prompt = encode_chat(body.messages, tokenizer, service.settings.chat_format, body.offered_tools)
        new = service.new_tokens(prompt, body.max_tokens or body.max_completion_tokens, body.default_max_tokens)
        wanted = (body.top_logprobs or 0) if body.logprobs else None
        marker = tokenizer.controls.get(MARKER) if body.offered_tools else None
        # An answer is a text of its own, unless it goes on with one that was begun.
        after = prompt if body.messages[-1].get("prefix") else []
        form, seed = _form(service, body, tools), service.seed(body)
        requests, choices = [], []
        for index in range(body.n):
            constraint = None if form is None else service.grammars.constraint(form)
            requests.append(service.request(body, prompt, new, seed, index, wanted, constraint))
            choices.append(Choice(tokenizer, after, body.stop, marker))
        self._calls = [0] * body.n
        super().__init__(body, requests, choices, len(prompt))

    def first_pieces(self) -> Iterator[Json]:
        """Who speaks."""
        for place in range(len(self.choices)):
            yield self._entry(place, "delta", {"role": "assistant", "content": ""}, None, None)

    def piece(self, place: int) -> Json | None:
        """Text, whole calls, and how it ended."""
        choice = self.choices[place]
        new = choice.delta()
        if not (new.text or new.tokens or new.calls or choice.finish):
            return None
        said: Json = {"content": new.text} if new.text else {}
        if new.calls:
            begin = self._calls[place]
            self._calls[place] += len(new.calls)
            said["tool_calls"] = [{"index": begin + index, **call} for index, call in enumerate(new.calls)]
        return self._entry(place, "delta", said, new, choice.finish)

    def wholes(self) -> list[Json]:
        """The messages."""
        entries = []
        for place, choice in enumerate(self.choices):
            whole = choice.whole
            message: Json = {
                "role": "assistant",
                "content": whole.text or (None if whole.calls else ""),
                "refusal": None,
            }
            if whole.calls:
                message["tool_calls"] = list(whole.calls)
            entries.append(self._entry(place, "message", message, whole, choice.finish))
        return entries

    def _entry(self, index: int, key: str, said: Json, delta: Delta | None, finish: str | None) -> Json:
        entry: Json = {"index": index, key: said, "logprobs": None, "finish_reason": finish}
        if self.body.logprobs and delta is not None:
            entry["logprobs"] = logprobs.of_chat(delta.tokens, self._tokenizer)
        return entry


def _form(service: Service, body: ChatRequest, tools: Sequence[Json]) -> Form | None:
    """What the answer is held to; None: nothing."""
    schema = body.response_format.schema_of_text if body.response_format is not None else None
    is_forced = body.tool_choice == "required" or isinstance(body.tool_choice, tuple)
    if schema is None and not is_forced:
        return None
    if isinstance(body.tool_choice, tuple):
        tools = [tool for tool in tools if tool["function"]["name"] == body.tool_choice[0]]
    written = service.settings.chat_format or chat_format(service.tokenizer)
    several = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, tuple)
    with_ids = written != "v2"
    return Form(schema=None if is_forced else schema, tools=tools, with_ids=with_ids, several=several)

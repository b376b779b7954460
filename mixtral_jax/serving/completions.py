"""/v1/completions: texts that go on from prompts."""

from __future__ import annotations

from collections.abc import Iterator

from mixtral_jax.serving import logprobs
from mixtral_jax.serving.choice import Choice, Delta
from mixtral_jax.serving.generation import Job, Json
from mixtral_jax.serving.schemas import CompletionRequest
from mixtral_jax.serving.service import Service
from mixtral_jax.text.tokenizer import Tokenizer


class CompletionJob(Job):
    """`drawn` texts of each prompt, of which the best n are given."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"
    body: CompletionRequest

    def __init__(self, service: Service, body: CompletionRequest):
        """Encodes the prompts. Raises ApiError or InputError for what can't be done."""
        service.check_model(body.model)
        service.check_counts(len(body.prompt), body, body.drawn)
        self._tokenizer = service.tokenizer
        prompts = [_ids(prompt, service.tokenizer) for prompt in body.prompt]
        seed = service.seed(body)
        # The best are found by their logprobs.
        wanted = 0 if body.logprobs is None and body.drawn > body.n else body.logprobs
        requests, choices = [], []
        for prompt in prompts:
            new = service.new_tokens(prompt, body.max_tokens, body.default_max_tokens)
            for index in range(body.drawn):
                requests.append(service.request(body, prompt, new, seed, index, wanted))
                choices.append(Choice(service.tokenizer, prompt, body.stop))
        self._echoes = [_echo(prompt, service.tokenizer) if body.echo else "" for prompt in body.prompt]
        super().__init__(body, requests, choices, sum(map(len, prompts)))

    def first_pieces(self) -> Iterator[Json]:
        """The prompts, if they are asked for."""
        if self.body.echo:
            for place in range(len(self.choices)):
                yield self._entry(place, self._echo(place), None, None)

    def piece(self, place: int) -> Json | None:
        """Text, and how it ended. Only where drawn = n, so that each text has its place."""
        choice = self.choices[place]
        delta = choice.delta()
        if not (delta.text or delta.tokens or choice.finish):
            return None
        return self._entry(place, delta.text, delta, choice.finish)

    def wholes(self) -> list[Json]:
        """The n likeliest of each prompt by their tokens' mean logprob, the likeliest first."""
        entries: list[Json] = []
        for begin in range(0, len(self.choices), self.body.drawn):
            places = list(range(begin, begin + self.body.drawn))
            if self.body.drawn > self.body.n:
                places.sort(key=lambda place: -self.choices[place].mean_logprob)
            for place in places[: self.body.n]:
                whole, choice = self.choices[place].whole, self.choices[place]
                entries.append(self._entry(len(entries), self._echo(place) + whole.text, whole, choice.finish, place))
        return entries

    def _echo(self, place: int) -> str:
        return self._echoes[place // self.body.drawn]

    def _entry(self, index: int, text: str, delta: Delta | None, finish: str | None, place: int | None = None) -> Json:
        entry: Json = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        if delta is not None and self.body.logprobs is not None:
            begin = len(self._echo(index if place is None else place))
            entry["logprobs"] = logprobs.of_completion(delta.tokens, self._tokenizer, begin)
        return entry


def _ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    return tokenizer.encode(prompt, bos=True) if prompt else []


def _echo(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode(token for token in prompt if token < tokenizer.vocab_size)

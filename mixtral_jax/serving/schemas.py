"""The bodies of requests. A key that is unknown, of another type or out of bounds is refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from mixtral_jax.inference.sampling import SamplingConfig
from mixtral_jax.serving.errors import ApiError, from_validation

MOST_LOGPROBS = 20
LARGEST = 2**31 - 1
"""Of whole numbers that go into 32 bits."""

Body = TypeVar("Body", bound=BaseModel)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _prompt(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(each, str) or _is_ids(each) for each in value):
        return value
    if isinstance(value, str) or (value and _is_ids(value)):
        return [value]
    raise ValueError("a text, a list of texts, a list of token ids, or a list of such lists is wanted, and not nothing")


def _stop(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    raise ValueError("a text or a list of texts is wanted")


def _tool_choice(value: Any) -> Any:
    named = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(named, dict) and isinstance(named.get("name"), str):
        return (named["name"],)
    if isinstance(value, str) and value in ("none", "auto", "any", "required"):
        return "required" if value == "any" else value
    raise ValueError('none, auto, any, required or {"type": "function", "function": {"name": ...}} is wanted')


Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompt)]
"""One or more texts or lists of ids."""
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(_stop)]
ToolChoice = Literal["none", "auto", "required"] | tuple[str]
"""A name in a tuple of its own is the function that has to be called."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Nothing is converted, nothing ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False


class Sampled(Strict):
    """What all requests for text have."""

    default_max_tokens: ClassVar[int | None]
    """None: as many as there is room for."""

    model: str
    max_tokens: Count | None = None
    n: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None

    # Beyond OpenAI's, as other servers of open models have them.
    ignore_eos: bool = False
    min_p: Probability = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=LARGEST)] = 0

    # OpenAI's that change nothing at these values; others are not offered.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn; the temperature is 1 where none is said."""
        return SamplingConfig(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream = true")
        return self


class CompletionRequest(Sampled):
    """The body of /v1/completions."""

    default_max_tokens: ClassVar[int | None] = 16

    prompt: Prompts
    best_of: Count | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    suffix: Literal[""] | None = None

    @property
    def drawn(self) -> int:
        """Texts of each prompt, of which the best n are given."""
        return self.n if self.best_of is None else self.best_of

    @model_validator(mode="after")
    def _check_together(self) -> CompletionRequest:
        if self.drawn < self.n:
            raise ValueError(f"best_of = {self.best_of} is under n = {self.n}")
        if self.stream and self.drawn > self.n:
            raise ValueError("best_of above n can't be streamed: the best is known at the end")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not offered: a prompt's tokens have none here")
        return self


class JsonSchema(Strict):
    """A named schema."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer's text is."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """The schema that the text must obey; None: none."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None

    @model_validator(mode="after")
    def _check_together(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self


class ChatRequest(Sampled):
    """The body of /v1/chat/completions. Messages and tools are read where conversations are encoded."""

    default_max_tokens: ClassVar[int | None] = None

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    tool_choice: Annotated[ToolChoice, BeforeValidator(_tool_choice)] | None = None
    tools: list[dict[str, Any]] = []
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs = true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one: only one of them may be said")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice goes with tools")
        if isinstance(self.tool_choice, tuple) and self.tool_choice[0] not in map(_name, self.tools):
            raise ValueError(f"tool_choice: no tool is called {self.tool_choice[0]!r}")
        return self


def _name(tool: dict[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None


class TokenizeRequest(Strict):
    """The body of /tokenize: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_together(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages are wanted")
        return self


class DetokenizeRequest(Strict):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[int]


def read(kind: type[Body], body: bytes) -> Body:
    """A body as JSON, checked; a key that is null is as if it were not there.

    Raises:
      ApiError: 400, naming the first key that can't be used.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    _refuse_nul(value, "")
    try:
        return kind.model_validate({key: each for key, each in value.items() if each is not None})
    except ValidationError as error:
        raise from_validation(error, kind.model_fields) from None


def _refuse_nul(value: Any, path: str) -> None:
    """Text with U+0000 is no text: what reads it may take its end for there."""
    if isinstance(value, str):
        if "\0" in value:
            raise ApiError(400, f"{path}: U+0000 can't stand in a text", path, "invalid_value")
    elif isinstance(value, dict):
        for key, each in value.items():
            _refuse_nul(key, path)
            _refuse_nul(each, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            if not isinstance(each, int):
                _refuse_nul(each, f"{path}[{place}]")

"""Mistral's own tokenizer files and its own encoding of conversations, of the package mistral-common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}


def model_path(version: str) -> Path:
    """The tokenizer file of a version."""
    return Path(find_spec("mistral_common").origin).parent / "data" / FILES[version]


@cache
def _tokenizer(version: str, complete: bool) -> Any:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    mode = ValidationMode.finetuning if complete else ValidationMode.test
    return MistralTokenizer.from_file(model_path(version), mode=mode)


def encode(
    messages: Sequence[Mapping[str, Any]], version: str, tools: Sequence[Mapping[str, Any]] = (), complete: bool = False
) -> list[int]:
    """The ids of a conversation. Raises one of many exceptions where it is refused."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    request = ChatCompletionRequest(messages=list(messages), tools=list(tools) or None)
    return _tokenizer(version, complete).encode_chat_completion(request).tokens

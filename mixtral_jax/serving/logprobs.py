"""Tokens and their logprobs as OpenAI's two APIs write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixtral_jax.serving.choice import Placed
from mixtral_jax.text.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for an impossible token: JSON has no infinity."""


def of_completion(placed: Sequence[Placed], tokenizer: Tokenizer, begin: int) -> dict[str, Any]:
    """The `logprobs` of /v1/completions; offsets count from `begin`."""
    return {
        "tokens": [name(each.token.id, tokenizer) for each in placed],
        "token_logprobs": [_number(each.token.logprob) for each in placed],
        "top_logprobs": [_named(each.token.alternatives, tokenizer) for each in placed],
        "text_offset": [begin + each.offset for each in placed],
    }


def of_chat(placed: Sequence[Placed], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` of /v1/chat/completions."""
    content = []
    for token, _ in placed:
        top = [_described(*pair, tokenizer) for pair in token.alternatives]
        content.append({**_described(token.id, token.logprob, tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


def name(token: int, tokenizer: Tokenizer) -> str:
    """A token as text; a part of a character as OpenAI writes it: `bytes:\\xe2`."""
    if token in tokenizer.control_names:
        return tokenizer.control_names[token]
    piece = _piece(token, tokenizer)
    if isinstance(piece, str):
        return piece
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _described(token: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    piece = _piece(token, tokenizer)
    data = piece.encode() if isinstance(piece, str) else piece
    return {"token": name(token, tokenizer), "logprob": _number(logprob), "bytes": list(data)}


def _piece(token: int, tokenizer: Tokenizer) -> str | bytes:
    """Its text; none for a row of the embedding beyond the tokenizer's ids."""
    return tokenizer.piece(token) if token < tokenizer.vocab_size else ""


def _named(alternatives: Sequence[tuple[int, float]], tokenizer: Tokenizer) -> dict[str, float | None]:
    """By name; of two tokens with one text the likelier stays."""
    return {name(token, tokenizer): _number(logprob) for token, logprob in reversed(alternatives)}


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(LEAST, logprob)

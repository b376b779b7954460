"""The tokenizer inside a GGUF file, from the file's metadata.

A vocabulary "llama" is a SentencePiece model taken apart, and is put together again; "gpt2" is a byte-level byte-pair
model, of which the file names the splitting into words without giving it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mixtral_jax.errors import InputError
from mixtral_jax.text.conversion import BYTE_PAIRS, CONTROL, NORMAL, USER_DEFINED, added_tokens, begin_with
from mixtral_jax.text.fast import FastTokenizer, Names
from mixtral_jax.text.sentencepiece import SentencePieceTokenizer
from mixtral_jax.text.tokenizer import Hints, Tokenizer

PREFIX = "tokenizer.ggml."
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA_3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BLANKS
_QWEN_2 = _CONTRACTIONS + _WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BLANKS
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BLANKS
)


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, {**BYTE_LEVEL, "use_regex": False}]


_GPT_2: list[dict[str, Any]] = [{**BYTE_LEVEL, "use_regex": True}]
_SMOLLM = [{"type": "Digits", "individual_digits": True}, *_GPT_2]

# The splitting into words, and whether a word that is a token is taken whole without regard to merges.
PRE_TOKENIZERS: Mapping[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": (_GPT_2, False),
    "smollm": (_SMOLLM, False),
    "starcoder": (_SMOLLM, False),
    "llama-bpe": (_split(_LLAMA_3), True),
    "llama3": (_split(_LLAMA_3), True),
    "qwen2": (_split(_QWEN_2), False),
    "tekken": (_split(_TEKKEN), True),
}
BEGIN_BY_DEFAULT = frozenset({"llama-bpe", "llama3", "tekken"})


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Args:
      metadata: the file's keys and their values as Python's own (numbers, strings, lists); those that begin with
        "tokenizer." are read.

    Raises:
      InputError: naming the key that is missing or has a value that is not supported.
    """
    model = _get(metadata, "model")
    if model == "llama":
        return _sentencepiece(metadata)
    if model == "gpt2":
        return _byte_level(metadata)
    raise InputError(f"{PREFIX}model", model, "'llama' (SentencePiece) or 'gpt2' (byte-level byte pairs) is wanted")


def _get(metadata: Mapping[str, Any], name: str) -> Any:
    if PREFIX + name not in metadata:
        raise InputError(PREFIX + name, None, "missing; the tokenizer can't be put together without it")
    return metadata[PREFIX + name]


def _token_id(metadata: Mapping[str, Any], name: str, size: int) -> int:
    """The id of a part such as "bos"; -1 where the file names none."""
    token = metadata.get(f"{PREFIX}{name}_token_id", -1)
    if not -1 <= token < size:
        raise InputError(f"{PREFIX}{name}_token_id", token, f"ids go from 0 to {size - 1}")
    return int(token)


def _kinds(metadata: Mapping[str, Any], tokens: Sequence[str], ends: Sequence[int]) -> list[int]:
    """The tokens' types; begin, end and `<|...|>` are controls whatever the file says, for converters differ."""
    kinds = [int(kind) for kind in metadata.get(f"{PREFIX}token_type") or [NORMAL] * len(tokens)]
    if len(kinds) != len(tokens):
        raise InputError(f"{PREFIX}token_type", f"{len(kinds)} types", f"{len(tokens)}, one a token, are wanted")
    for token, name in enumerate(tokens):
        is_named = kinds[token] == USER_DEFINED and name.startswith("<|") and name.endswith("|>")
        if is_named or token in ends:
            kinds[token] = CONTROL
    return kinds


def _hints(metadata: Mapping[str, Any], size: int) -> Hints:
    more = (_token_id(metadata, name, size) for name in ("eot", "eom"))
    return Hints(metadata.get("tokenizer.chat_template"), eos_ids=tuple(token for token in more if token >= 0))


def _sentencepiece(metadata: Mapping[str, Any]) -> SentencePieceTokenizer:
    from sentencepiece import sentencepiece_model_pb2

    tokens, scores = _get(metadata, "tokens"), _get(metadata, "scores")
    if len(scores) != len(tokens):
        raise InputError(f"{PREFIX}scores", f"{len(scores)} scores", f"{len(tokens)}, one a token, are wanted")
    bos, eos, pad, unk = (_token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "padding", "unknown"))
    kinds = _kinds(metadata, tokens, (bos, eos))
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        proto.pieces.add(piece=token, score=float(score), type=kind)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = BYTE_PAIRS, len(tokens), True
    spec.bos_id, spec.eos_id, spec.pad_id, spec.unk_id = bos, eos, pad, max(unk, 0)
    for part, token in (("bos", bos), ("eos", eos), ("pad", pad), ("unk", spec.unk_id)):
        if token >= 0:
            setattr(spec, f"{part}_piece", tokens[token])
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = metadata.get(f"{PREFIX}add_space_prefix", True)
    normalizer.remove_extra_whitespaces = metadata.get(f"{PREFIX}remove_extra_whitespaces", False)
    try:
        return SentencePieceTokenizer(proto.SerializeToString(), _hints(metadata, len(tokens)))
    except RuntimeError as error:
        raise InputError(f"{PREFIX}tokens", f"{len(tokens)} tokens", f"make no SentencePiece model: {error}") from None


def _byte_level(metadata: Mapping[str, Any]) -> FastTokenizer:
    tokens, merges, pre = _get(metadata, "tokens"), _get(metadata, "merges"), _get(metadata, "pre")
    if pre not in PRE_TOKENIZERS:
        raise InputError(f"{PREFIX}pre", pre, f"only {', '.join(sorted(PRE_TOKENIZERS))} are known")
    steps, takes_words_whole = PRE_TOKENIZERS[pre]
    parts = {name: _token_id(metadata, name, len(tokens)) for name in ("bos", "eos", "padding", "unknown")}
    names = Names(*(tokens[token] if token >= 0 else None for token in parts.values()))
    kinds = _kinds(metadata, tokens, (parts["bos"], parts["eos"]))
    adds_bos = bool(metadata.get(f"{PREFIX}add_bos_token", pre in BEGIN_BY_DEFAULT))
    definition = {
        "version": "1.0",
        "added_tokens": added_tokens(list(zip(tokens, kinds, strict=True))),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": begin_with(names.bos, tokens) if adds_bos else None,
        "decoder": {**BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": takes_words_whole,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    try:
        content = json.dumps(definition, ensure_ascii=False)
        return FastTokenizer(content, names, _hints(metadata, len(tokens)), adds_bos)
    except ValueError as error:
        raise InputError(f"{PREFIX}merges", f"{len(merges)} merges", str(error)) from None

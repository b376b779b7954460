"""Writes a SentencePiece model as a `tokenizer.json`, and as a model the vocabulary that a GGUF file has of one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixtral_jax.errors import InputError
from mixtral_jax.text.fast import SPACE, FastTokenizer, Names
from mixtral_jax.text.tokenizer import Hints

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, the same in SentencePiece and GGUF."""

BYTE_PAIRS = 2  # SentencePiece's number of the algorithm


def fast_from_sentencepiece(model: bytes, hints: Hints) -> FastTokenizer:
    """The tokenizer.json that gives the ids of a SentencePiece model, a begin token before them.

    A literal U+2581 counts as a space, which our own models spell in bytes.

    Raises:
      InputError: the model is not of byte pairs.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    if proto.trainer_spec.model_type != BYTE_PAIRS:
        raise InputError("tokenizer", proto.trainer_spec.model_type, "only byte-pair models can be a tokenizer.json")
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    names = [name for name, _, kind in pieces if kind in (CONTROL, UNKNOWN)]
    spec = proto.trainer_spec
    bos, eos, unk = (name if name in names else None for name in (spec.bos_piece, spec.eos_piece, spec.unk_piece))
    adds_prefix = proto.normalizer_spec.add_dummy_prefix
    everywhere = adds_prefix and "[INST]" not in names
    definition = {
        "version": "1.0",
        "added_tokens": added_tokens([(name, kind) for name, _, kind in pieces], not everywhere),
        **_spaces(adds_prefix, everywhere),
        "post_processor": begin_with(bos, names),
        "model": {
            "type": "BPE",
            "unk_token": unk,
            "fuse_unk": True,
            "byte_fallback": spec.byte_fallback,
            "vocab": {name: token for token, (name, _, _) in enumerate(pieces)},
            "merges": list(_merges({name: score for name, score, kind in pieces if kind == NORMAL})),
        },
    }
    return FastTokenizer(json.dumps(definition, ensure_ascii=False), Names(bos, eos, None, unk), hints)


def added_tokens(pieces: Sequence[tuple[str, int]], normalized: bool = False) -> list[dict[str, Any]]:
    """The entries of pieces with a type that are no ordinary text.

    With `normalized`, those that are not controls are looked for after spaces were replaced.
    """
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return [
        {
            "id": token,
            "content": name,
            **flags,
            "normalized": normalized and kind == USER_DEFINED,
            "special": kind != USER_DEFINED,
        }
        for token, (name, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def begin_with(bos: str | None, names: Sequence[str]) -> dict[str, Any] | None:
    """The step that puts the begin token before a text."""
    if bos is None:
        return None
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": number}} for number, which in enumerate("AB"))
    special = {bos: {"id": bos, "ids": [names.index(bos)], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": special,
    }


def _spaces(adds_prefix: bool, everywhere: bool) -> dict[str, Any]:
    """How spaces are written and read.

    Templates of models with `[INST]` as a control write the space after it themselves, so that only a text's start
    gets one; those of the first version leave it to the tokenizer after every control.
    """
    write: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    read: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_prefix:
        read.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizer, pre_tokenizer = write, None
    if adds_prefix and not everywhere:
        # Metaspace adds no prefix where its mark stands already. A text that begins with a space needs one more: the
        # first step puts a plain space there, which none is at that point, and the second writes it as the mark.
        steps = [_metaspace(" ", "first"), _metaspace(SPACE, "never")]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    elif adds_prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, write]}
    decoder = {"type": "Sequence", "decoders": read}
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}


def _metaspace(mark: str, scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": False}


def _merges(scores: Mapping[str, float]) -> Iterator[list[str]]:
    """All pairs of pieces that make a piece, in SentencePiece's order: the best-scored product first."""
    for name in sorted(scores, key=lambda name: -scores[name]):
        for cut in range(1, len(name)):
            if name[:cut] in scores and name[cut:] in scores:
                yield [name[:cut], name[cut:]]

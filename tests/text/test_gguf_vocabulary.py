"""The tokenizer inside a GGUF file is the one that the file was made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from oracles import smollm
from sentencepiece import sentencepiece_model_pb2
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from mixtral_jax.errors import InputError
from mixtral_jax.text.fast import FastTokenizer
from mixtral_jax.text.gguf_vocabulary import PRE_TOKENIZERS, tokenizer_from_gguf
from mixtral_jax.text.sentencepiece import SentencePieceTokenizer
from mixtral_jax.text.tokenizer import Tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def taken_apart(tokenizer: SentencePieceTokenizer) -> dict:
    """What a GGUF file says of a SentencePiece model."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(tokenizer._model).pieces
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }


@cache
def put_together(tokenizer: SentencePieceTokenizer) -> Tokenizer:
    return tokenizer_from_gguf(taken_apart(tokenizer))


@pytest.mark.parametrize("name", ["v1", "v3"])
@given(text=TEXTS)
def test_a_sentencepiece_model_is_put_together_again(request, name, text):
    tokenizer = request.getfixturevalue(name)
    again = put_together(tokenizer)
    assert again.encode(text) == tokenizer.encode(text)
    ids = tokenizer.encode(text)
    assert again.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["v1", "v3", "ours"])
def test_its_ids_have_the_same_parts(request, name):
    tokenizer = request.getfixturevalue(name)
    again = tokenizer_from_gguf({**taken_apart(tokenizer), "tokenizer.ggml.add_space_prefix": name != "ours"})
    parts = ("vocab_size", "bos_id", "eos_id", "pad_id", "unk_id", "controls", "drops_first_space", "adds_bos")
    assert {part: getattr(again, part) for part in parts} == {part: getattr(tokenizer, part) for part in parts}
    assert again.chat_template == "{{ messages }}"
    assert again.encode("\n        self") == tokenizer.encode("\n        self")


def test_added_controls_that_the_file_calls_text_are_controls(v1):
    metadata = taken_apart(v1)
    metadata["tokenizer.ggml.tokens"] += ["<|im_start|>", "<|im_end|>"]
    metadata["tokenizer.ggml.scores"] += [-1000.0, -1000.0]
    metadata["tokenizer.ggml.token_type"] += [4, 4]
    metadata["tokenizer.ggml.eos_token_id"] = 32001
    metadata["tokenizer.ggml.eot_token_id"] = 2
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.controls == {"<s>": 1, "</s>": 2, "<|im_start|>": 32000, "<|im_end|>": 32001}
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (32001, (32001, 2))
    assert not {32000, 32001} & set(tokenizer.encode("<|im_start|>user<|im_end|>"))


def test_begin_and_end_are_controls_whatever_the_file_calls_them(ours):
    metadata = taken_apart(ours)
    metadata["tokenizer.ggml.token_type"][1:3] = [4, 1]
    tokenizer = tokenizer_from_gguf(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.controls) == (1, 2, {"<s>": 1, "</s>": 2})
    assert small("gpt-2", kinds=[4, 1, 1, 1, 1, 1]).controls == {"<s>": 0, "</s>": 1}


def test_smollm2_has_its_parts(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.unk_id) == (1, 2, 2, 0)
    assert (smollm2.vocab_size, len(smollm2.controls), smollm2.adds_bos) == (49152, 17, False)
    assert smollm2.chat_template.startswith("{% for message in messages %}")


@pytest.fixture(scope="module")
def theirs():
    """What transformers makes of the same metadata."""
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    names |= {name: name for name in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id")}
    said = {theirs: smollm.metadata()[f"tokenizer.ggml.{name}"] for name, theirs in names.items()}
    return convert_gguf_tokenizer("llama", said)[0]


@given(text=TEXTS)
def test_smollm2_has_transformers_ids_but_where_blanks_precede_digits(smollm2, theirs, text):
    # Transformers leaves out the splitting of digits, and so takes the last of several blanks before one for its own.
    if not regex.search(r"\s\p{N}", text):
        assert smollm2.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def test_digits_stand_alone_before_anything_else_is_split(smollm2):
    # SmolLM2's own: digits are split off first, so that the two blanks are one token. Transformers has two of one.
    assert [smollm2.piece(token) for token in smollm2.encode("a  12")] == [b"a", b"  ", b"1", b"2"]


def words(tokenizer: FastTokenizer, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)]


# The patterns as the models' authors published them.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": [GPT_2],
    "smollm": [r"\p{N}", GPT_2],
    "starcoder": [r"\p{N}", GPT_2],
    "llama-bpe": [LLAMA_3],
    "llama3": [LLAMA_3],
    "qwen2": [LLAMA_3.replace("{1,3}", "")],
    "tekken": [TEKKEN],
}
MIXED = (
    "I'LL pay  12,345.67\t for\r\n\n  camelCase HTTPServer's //path/ \u00c9t\u00e9 \u4f60\u597d\u0301 \u0661\u0662  "
)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@given(text=st.text(st.sampled_from("aBc\u00c9\u4f60\u0301 \n\r\t12\u0661'sTL,./_")))
def test_words_are_split_as_published(pre, text):
    tokenizer = small(pre)
    for each in (text, MIXED):
        expected = [each]
        for pattern in PATTERNS[pre]:
            expected = [part for whole in expected for part in split(pattern, whole)]
        assert words(tokenizer, each) == expected


def split(pattern: str, text: str) -> list[str]:
    """The matches and what is between them."""
    return [part for part in regex.split(f"({pattern})", text) if part]


def small(pre: str, kinds: Sequence[int] = (3, 3, 1, 1, 1, 1)) -> FastTokenizer:
    tokens = ["<s>", "</s>", "a", "b", "ab", "abb"]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": list(kinds),
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        }
    )


@pytest.mark.parametrize(
    ("pre", "ids"), [("gpt-2", [4, 3]), ("qwen2", [4, 3]), ("llama-bpe", [0, 5]), ("tekken", [0, 5])]
)
def test_some_take_words_whole_and_begin_by_default(pre, ids):
    # "abb" is a token that no merge makes: only those that ignore merges for whole words find it.
    assert small(pre).encode("abb", bos=True) == ids


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model = 'bert': 'llama' .* or 'gpt2'"),
        ({"tokenizer.ggml.model": None}, r"tokenizer\.ggml\.model: missing"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens: missing"),
        ({"tokenizer.ggml.scores": [0.0]}, r"tokenizer\.ggml\.scores = '1 scores': 352, one a token"),
        ({"tokenizer.ggml.token_type": [1]}, r"tokenizer\.ggml\.token_type = '1 types': 352, one a token"),
        ({"tokenizer.ggml.eos_token_id": 352}, r"tokenizer\.ggml\.eos_token_id = 352: ids go from 0 to 351"),
        (
            {"tokenizer.ggml.tokens": ["x"] * 352},
            r"tokenizer\.ggml\.tokens = '352 tokens': make no SentencePiece model",
        ),
        (
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": []},
            r"tokenizer\.ggml\.pre = 'default': only gpt-2, ",
        ),
    ],
)
def test_what_can_not_be_put_together_is_refused_by_key(ours, capfd, change, problem):
    metadata = {key: value for key, value in {**taken_apart(ours), **change}.items() if value is not None}
    with pytest.raises(InputError, match=problem):
        tokenizer_from_gguf(metadata)
    capfd.readouterr()  # SentencePiece writes its own account


def test_a_merge_of_no_tokens_is_refused():
    metadata = json.loads(
        json.dumps(
            {
                f"tokenizer.ggml.{key}": value
                for key, value in {"model": "gpt2", "pre": "gpt-2", "tokens": ["a"], "merges": ["a z"]}.items()
            }
        )
    )
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.merges = '1 merges': "):
        tokenizer_from_gguf(metadata)
